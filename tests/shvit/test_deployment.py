"""Each identity against torch's own operators, and whole deployed models against what they came from."""

import copy
import re
from collections import Counter

import pytest
import timm
import torch
from timm.layers import GroupNorm1
from timm.models.shvit import SHViT as TimmSHViT
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional as F

from shvit.checkpoint import read_checkpoint, write_checkpoint
from shvit.create import create_model
from shvit.deployment import deploy
from shvit.fold import (
    ConvNorm,
    DeployedSHSA,
    DeployedSqueezeExcite,
    NormLinear,
    Residual,
    SqueezeExcite,
    average_linears,
    drop_key_bias,
    fold_affine_into_conv,
    fold_identity_into_depthwise,
    fold_norm_into_conv,
    fold_norm_into_linear,
    fold_scale_into_queries,
)
from shvit.shvit import FFN, SHSA, BasicBlock
from tests.conftest import TINY, assert_close, create_tiny, images, randomize

PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-10)]
QK_DIM, PARTIAL_DIM, DIM = 16, 12, 20


@pytest.fixture(params=PRECISIONS, ids=["float32", "float64"])
def precision(request):
    return request.param


def made(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    return randomize(layer.to(dtype)).eval()


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "groups", "out_dim"), [(1, 1, 24), (2, 1, 24), (2, 12, 12), (1, 12, 24)])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_norm_folds_into_convolution(precision, stride, groups, out_dim, bias):
    dtype, tolerance = precision
    conv = made(nn.Conv2d(12, out_dim, 3, stride, padding=1, groups=groups, bias=bias), dtype)
    bn = made(nn.BatchNorm2d(out_dim, eps=1e-3), dtype)
    x = images(2, 12, 7, 9).to(dtype)
    expected = F.conv2d(x, conv.weight, conv.bias, stride, 1, 1, groups)
    expected = F.batch_norm(expected, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0, bn.eps)
    folded = fold_norm_into_conv(conv, bn)
    assert isinstance(folded, nn.Conv2d)
    assert_close(folded(x), expected, tolerance)


@torch.no_grad()
def test_norm_folds_into_classifier(precision):
    dtype, tolerance = precision
    bn, linear = made(nn.BatchNorm1d(12, eps=1e-3), dtype), made(nn.Linear(12, 5), dtype)
    x = images(3, 12).to(dtype)
    normalized = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0, bn.eps)
    assert_close(fold_norm_into_linear(bn, linear)(x), F.linear(normalized, linear.weight, linear.bias), tolerance)


@pytest.mark.parametrize("kernel_size", [3, 5])
@torch.no_grad()
def test_residual_folds_into_depthwise_convolution(precision, kernel_size):
    dtype, tolerance = precision
    conv = made(nn.Conv2d(12, 12, kernel_size, padding=kernel_size // 2, groups=12), dtype)
    x = images(2, 12, 7, 9).to(dtype)
    expected = x + F.conv2d(x, conv.weight, conv.bias, padding=kernel_size // 2, groups=12)
    assert_close(fold_identity_into_depthwise(conv)(x), expected, tolerance)


@torch.no_grad()
def test_affine_of_the_norm_folds_into_the_next_convolution(precision):
    dtype, tolerance = precision
    norm, conv = made(GroupNorm1(PARTIAL_DIM, eps=1e-3), dtype), made(nn.Conv2d(PARTIAL_DIM, 44, 1), dtype)
    x = images(2, PARTIAL_DIM, 7, 9).to(dtype)
    expected = F.conv2d(F.group_norm(x, 1, norm.weight, norm.bias, norm.eps), conv.weight, conv.bias)
    assert_close(fold_affine_into_conv(norm, conv)(F.group_norm(x, 1, eps=norm.eps)), expected, tolerance)


@torch.no_grad()
def test_scale_and_key_bias_fold_out_of_the_softmax(precision):
    dtype, tolerance = precision
    qkv = made(nn.Conv2d(PARTIAL_DIM, 2 * QK_DIM + PARTIAL_DIM, 1), dtype)
    x = images(2, PARTIAL_DIM, 7, 9).to(dtype)
    sizes = [QK_DIM, QK_DIM, PARTIAL_DIM]

    def attend(qkv: nn.Conv2d, scale: float) -> torch.Tensor:
        q, k, v = (part.mT for part in qkv(x).flatten(2).split(sizes, 1))  # (B, N, D) (B, N, D) (B, N, P)
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    expected = attend(qkv, QK_DIM**-0.5)
    assert_close(attend(fold_scale_into_queries(qkv, QK_DIM, QK_DIM**-0.5), 1), expected, tolerance)
    keyless = drop_key_bias(qkv, QK_DIM)
    assert_close(attend(keyless, QK_DIM**-0.5), expected, tolerance)
    assert keyless.bias.view(-1)[QK_DIM : 2 * QK_DIM].count_nonzero() == 0
    assert keyless.bias.count_nonzero() == QK_DIM + PARTIAL_DIM


@torch.no_grad()
def test_mean_of_two_heads_is_one_head(precision):
    dtype, tolerance = precision
    heads = [randomize(nn.Linear(12, 5).to(dtype), seed) for seed in (1, 2)]
    x = images(3, 12).to(dtype)
    expected = torch.stack([F.linear(x, head.weight, head.bias) for head in heads]).mean(0)
    mean = average_linears(*heads)
    assert_close(mean(x), expected, tolerance)
    assert not any(torch.equal(mean.weight, head.weight) for head in heads)  # a new layer


@pytest.mark.parametrize("grid", [None, (7, 9)])
@torch.no_grad()
def test_attention_layer_is_that_of_torchs_operators(precision, grid):
    dtype, tolerance = precision
    layer = made(SHSA(DIM, QK_DIM, PARTIAL_DIM), dtype)
    x = images(2, DIM, 7, 9).to(dtype)
    norm, qkv, proj = layer.pre_norm, layer.qkv, layer.proj[1]
    x1, x2 = x[:, :PARTIAL_DIM], x[:, PARTIAL_DIM:]
    q, k, v = qkv(F.group_norm(x1, 1, norm.weight, norm.bias, norm.eps)).split([QK_DIM, QK_DIM, PARTIAL_DIM], 1)
    x1 = F.scaled_dot_product_attention(*(part.flatten(2).mT for part in (q, k, v))).mT.reshape(x1.shape)
    expected = proj.bn(proj.c(F.relu(torch.cat([x1, x2], 1))))
    assert_close(layer(x), expected, tolerance)
    deployed = layer.fuse()
    assert isinstance(deployed, DeployedSHSA)
    deployed.grid = grid
    assert_close(deployed(x), expected, tolerance)


@torch.no_grad()
def test_squeeze_excite_is_that_of_torchs_operators(precision):
    dtype, tolerance = precision
    layer = made(SqueezeExcite(16, 0.25), dtype)
    x = images(2, 16, 7, 9).to(dtype)
    hidden = F.relu(F.conv2d(x.mean((2, 3), keepdim=True), layer.fc1.weight, layer.fc1.bias))
    expected = x * torch.sigmoid(F.conv2d(hidden, layer.fc2.weight, layer.fc2.bias))
    assert_close(layer(x), expected, tolerance)
    deployed = layer.fuse()
    assert isinstance(deployed, DeployedSqueezeExcite)
    assert_close(deployed(x), expected, tolerance)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ConvNorm(12, 24, 3, stride=2), (2, 12, 7, 9)),
        (Residual(ConvNorm(12, 12, 3, groups=12)), (2, 12, 7, 9)),
        (Residual(FFN(12, 24)), (2, 12, 7, 9)),
        (NormLinear(12, 5), (2, 12)),
        (SqueezeExcite(16, 0.25), (2, 16, 7, 9)),
        (SHSA(DIM, QK_DIM, PARTIAL_DIM), (2, DIM, 7, 9)),
    ],
    ids=lambda value: type(value).__name__,
)
@torch.no_grad()
def test_layers_fuse_without_touching_their_argument(precision, layer, shape):
    dtype, tolerance = precision
    layer = made(layer, dtype)
    before = copy.deepcopy(layer.state_dict())
    x = images(*shape).to(dtype)
    fused = layer.fuse()
    assert_close(fused(x), layer(x), tolerance)
    for parameter in fused.parameters():
        parameter.zero_()
    if fused is not layer:
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[name])


def test_layer_of_no_inference_form_stays_and_its_parts_are_fused():
    block = made(BasicBlock(16, 16, 8, use_attn=True), torch.float32)
    assert not hasattr(block, "fuse")
    fused = reparameterize_model(nn.Sequential(block))[0]
    assert isinstance(fused, BasicBlock)
    assert [type(part) for part in (fused.conv, fused.mixer.m, fused.ffn.m.pw1)] == [nn.Conv2d, DeployedSHSA, nn.Conv2d]


# --- models -----------------------------------------------------------------------------------------------------------

SIZES = [(64, 64), (128, 96), (97, 161)]


@pytest.fixture(scope="module", params=["tiny", "shvit_s1"])
def pair(request):
    """A model and its deployed form."""
    model = create_tiny() if request.param == "tiny" else randomize(timm.create_model("shvit_s1")).eval()
    return model, deploy(model)


@torch.no_grad()
def test_deployed_model_gives_the_same_at_any_size(pair):
    model, deployed = pair
    assert deployed.deployed
    assert not model.deployed
    assert not deployed.training
    for size in SIZES:
        x = images(2, 3, *size)
        assert_close(deployed(x), model(x))
        for a, b in zip(deployed.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
            assert_close(a, b)
        features = deployed.forward_features(x)
        assert_close(deployed.forward_head(features, pre_logits=True), model.forward_head(features, pre_logits=True))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_deployed_model_of_one_size_gives_the_same_at_it(pair, size):
    model, _ = pair
    x = images(2, 3, *size)
    deployed = deploy(model, img_size=size if size[0] != size[1] else size[0])
    assert_close(deployed(x), model(x))
    grids = {module.grid for module in deployed.modules() if isinstance(module, DeployedSHSA)}
    assert grids == {tuple(-(-length // stride) for length in size) for stride in (32, 64)}


@torch.no_grad()
def test_deployed_model_of_one_size_refuses_another(tiny):
    with pytest.raises(RuntimeError):
        deploy(tiny, img_size=128)(images(1, 3, 256, 256))


@torch.no_grad()
def test_deployed_model_can_be_given_another_size_or_any(tiny):
    fixed = deploy(tiny, img_size=64)
    assert_close(deploy(fixed, img_size=(128, 96))(images(1, 3, 128, 96)), tiny(images(1, 3, 128, 96)))
    for size in ((128, 96), (64, 64)):
        x = images(1, 3, *size)
        assert_close(deploy(deploy(tiny))(x), tiny(x))
        assert_close(deploy(fixed)(x), tiny(x))
    assert_close(fixed(images(1, 3, 64, 64)), tiny(images(1, 3, 64, 64)))  # left as it was


@pytest.mark.parametrize("img_size", [0, -5, "96", 96.0, (96,), (96, 0), (96, "96"), (96, 96, 96)])
def test_size_that_is_none_is_refused_in_one_line(tiny, img_size):
    with pytest.raises(
        ValueError, match=r"img_size .* is not a size; give pixels above 0, as 224 or \(height, width\)$"
    ):
        deploy(tiny, img_size)


@torch.no_grad()
def test_memory_format_is_kept(pair):
    """As `.to(memory_format=…)` after deployment leaves it."""
    model, deployed = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    x = images(2, 3, 64, 96).to(memory_format=torch.channels_last)
    expected = deployed.to(memory_format=torch.channels_last)
    converted = deploy(model.to(memory_format=torch.channels_last))
    for name, tensor in converted.named_parameters():
        assert tensor.ndim != 4 or tensor.is_contiguous(memory_format=torch.channels_last), name
    assert_close(converted(x), model(x))
    assert converted.forward_features(x).stride() == expected.forward_features(x).stride()
    assert all(tensor.is_contiguous() for tensor in pair[1].parameters())


@pytest.mark.parametrize("frozen", [r"", r"^(patch_embed|stages)\.", r"^head\."])
def test_frozen_layers_stay_frozen_and_no_other(frozen):
    model = create_tiny(distilled=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not re.match(frozen, name))
    for name, parameter in deploy(model).named_parameters():
        assert parameter.requires_grad != bool(re.match(frozen, name)), name


def test_deployment_draws_no_random_numbers(tiny):
    before = torch.get_rng_state()
    deploy(tiny, 64)
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_double_precision_leaves_rounding_alone(tiny):
    x = images(2, 3, 97, 161).double()
    assert_close(deploy(tiny.double())(x), tiny(x), 1e-10)


@pytest.mark.parametrize("img_size", [None, 64])
def test_deploy_leaves_its_argument_alone(img_size):
    model = create_tiny(distilled=True)
    before, layers = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    deployed = deploy(model, img_size)
    with torch.no_grad():
        for tensor in [*deployed.parameters(), *deployed.buffers()]:
            tensor.zero_()
    assert [type(module) for module in model.modules()] == layers
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not model.training
    assert model.distilled
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_mode_is_refused(tiny):
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        deploy(tiny.train())
    tiny.eval().head.train()
    with pytest.raises(ValueError, match="training mode"):
        deploy(tiny)


def test_no_norm_is_left(pair):
    _, deployed = pair
    kinds = {type(module) for module in deployed.modules()}
    assert not kinds & {nn.BatchNorm2d, nn.BatchNorm1d, GroupNorm1, nn.GroupNorm, ConvNorm, NormLinear}
    residual = [module for module in deployed.modules() if isinstance(module, Residual)]
    assert not any(isinstance(module.m, nn.Conv2d) for module in residual)


@torch.no_grad()
def test_distilled_model_deploys_to_one_head():
    model, x = create_tiny(distilled=True), images(2, 3, 64, 96)
    deployed = deploy(model)
    assert_close(deployed(x), model(x))
    assert not any(name.startswith("head_dist") for name in deployed.state_dict())
    assert isinstance(deployed.get_classifier(), nn.Linear)
    assert_close(deployed.train()(x), model(x))
    backbone = create_tiny(distilled=True, num_classes=0)
    assert_close(deploy(backbone)(x), backbone(x))


@pytest.mark.parametrize("img_size", [None, (96, 161)])
@pytest.mark.parametrize("feature_cls", ["list", "dict", "getter", "hook", "fx"])
@torch.no_grad()
def test_feature_extractors_deploy(feature_cls, img_size):
    model = randomize(timm.create_model("shvit_s1", features_only=True, feature_cls=feature_cls, **TINY)).eval()
    x = images(2, 3, 96, 161)
    features, expected = deploy(model, img_size)(x), model(x)
    if isinstance(expected, dict):
        assert list(features) == list(expected)
        features, expected = features.values(), expected.values()
    for a, b in zip(features, expected, strict=True):
        assert_close(a, b)


@torch.no_grad()
def test_model_inside_a_larger_one_deploys():
    larger = nn.Sequential(create_tiny(num_classes=0, global_pool=""), nn.Conv2d(32, 4, 1)).eval()
    x = images(1, 3, 96, 64)
    assert_close(deploy(larger, img_size=(96, 64))(x), larger(x))
    distilled = nn.Sequential(create_tiny(distilled=True), nn.Linear(10, 2)).eval()
    assert_close(deploy(distilled)(x), distilled(x))
    assert not any("head_dist" in name for name in deploy(distilled).state_dict())


@torch.no_grad()
def test_deployed_state_dict_saves_and_loads(tmp_path):
    model = randomize(timm.create_model("shvit_s1", num_classes=7, distilled=True)).eval()
    deployed, x = deploy(model), images(1, 3, 64, 64)
    for suffix in (".safetensors", ".pth"):
        path = tmp_path / f"deployed{suffix}"
        write_checkpoint(deployed.state_dict(), path)
        other = deploy(timm.create_model("shvit_s1", num_classes=7).eval())
        other.load_state_dict(read_checkpoint(path).state_dict, strict=True)
        assert torch.equal(other(x), deployed(x))
        recognized = create_model("shvit_s1", path)
        assert recognized.deployed
        assert torch.equal(recognized(x), deployed(x))


@torch.no_grad()
def test_timms_reparameterize_gives_the_deployed_form(tiny):
    deployed, timms = deploy(tiny).state_dict(), reparameterize_model(tiny).state_dict()
    assert deployed.keys() == timms.keys()
    for name, tensor in deployed.items():
        assert torch.equal(tensor, timms[name])


@torch.no_grad()
def test_model_fuses_in_place_as_timms_port_does():
    model, port = create_tiny(), TimmSHViT(**TINY, types=("i", "s", "s")).eval()
    port.load_state_dict(model.state_dict(), strict=True)
    x = images(2, 3, 64, 96)
    expected = model(x)
    assert model.fuse() is model
    assert model.deployed
    assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in model.modules())
    assert_close(model(x), expected)
    assert_close(model(x), port.fuse()(x))
    assert_close(model.fuse()(x), expected)
    assert_close(deploy(model)(x), expected)


@torch.no_grad()
def test_timms_reparameterize_fuses_a_copy_of_a_model_inside_a_larger_one(tiny):
    larger, x = nn.Sequential(tiny, nn.Linear(10, 2)).eval(), images(1, 3, 64, 96)
    fused = reparameterize_model(larger)
    assert_close(fused(x), larger(x))
    assert fused[0].deployed
    assert not tiny.deployed


@pytest.mark.parametrize("name", ["repvit_m0_9", "mobileone_s0", "resnet18", "mobilenetv4_conv_small"])
@torch.no_grad()
def test_peers_deploy_as_timm_does_and_without_norms(name):
    model = timm.create_model(name, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            randomize(module)
    x, before = images(1, 3, 64, 64), copy.deepcopy(model.eval().state_dict())
    drawn = torch.get_rng_state()
    deployed = deploy(model, img_size=64)
    if name in ("resnet18", "mobilenetv4_conv_small"):  # timm makes new convolutions of the others' branches
        assert torch.equal(torch.get_rng_state(), drawn)
    assert_close(deployed(x), model(x), 1e-3)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())
    if name in ("repvit_m0_9", "mobileone_s0"):
        assert len(list(deployed.modules())) < len(list(model.modules()))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


class Forked(nn.Module):
    """A convolution whose output is used with its norm and without."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.bn(x) + x


@torch.no_grad()
def test_norm_stays_where_its_convolution_is_also_used_without_it():
    model = randomize(Forked()).eval()
    deployed, x = deploy(model, img_size=16), images(1, 3, 16, 16)
    assert isinstance(deployed.bn, nn.BatchNorm2d)
    assert_close(deployed(x), model(x))


# --- graphs -----------------------------------------------------------------------------------------------------------


def operators(model: nn.Module, x: torch.Tensor) -> Counter:
    """How often each operator of torch's export occurs."""
    graph = torch.export.export(model, (x,)).run_decompositions({}).graph
    return Counter(str(node.target) for node in graph.nodes if str(node.target).startswith("aten."))


@pytest.mark.parametrize("img_size", [None, (97, 64)])
@torch.no_grad()
def test_deployed_model_traces_scripts_and_exports(tiny, img_size, tmp_path):
    x = images(2, 3, 97, 64)
    expected, deployed = tiny(x), deploy(tiny, img_size)
    assert_close(torch.jit.trace(deployed, x)(x), expected)
    script = torch.jit.script(deployed)
    script.save(tmp_path / "deployed.pt")
    assert_close(torch.jit.load(tmp_path / "deployed.pt")(x), expected)
    program = torch.export.export(deployed, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert_close(program.module()(x[:1]), expected[:1])


@torch.no_grad()
def test_traced_graph_of_one_size_has_no_shape_arithmetic(tiny):
    x = images(2, 3, 64, 96)
    kinds = {node.kind() for node in torch.jit.trace(deploy(tiny, img_size=(64, 96)), x).inlined_graph.nodes()}
    assert "aten::layer_norm" in kinds
    assert not {kind for kind in kinds if kind in ("aten::size", "prim::NumToTensor", "aten::Int")}
    assert "aten::size" in {node.kind() for node in torch.jit.trace(deploy(tiny), x).inlined_graph.nodes()}
    program = torch.export.export(
        deploy(tiny, img_size=(64, 96)), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    shapes = [node for node in program.graph.nodes if str(node.target).startswith("aten.sym_size")]
    assert len(shapes) <= 1  # the batch


@torch.no_grad()
def test_deployed_model_has_fewer_operators(tiny):
    x = images(1, 3, 64, 96)
    before, after = operators(tiny, x), operators(deploy(tiny, img_size=(64, 96)), x)
    assert after.total() < 0.75 * before.total()
    depthwise_residuals = 8
    assert after["aten.conv2d.default"] == before["aten.conv2d.default"]
    assert after["aten.add.Tensor"] == before["aten.add.Tensor"] - depthwise_residuals
    assert not any("batch_norm" in name or "group_norm" in name for name in after)
