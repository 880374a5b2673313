"""The models against timm's port: outputs, gradients, features, names, counts and initialization."""

import copy

import pytest
import timm
import torch
from timm.models import FeatureListNet
from timm.models.shvit import SHViT as TimmSHViT

from shvit import SHViT
from shvit.shvit import VARIANTS, ConvNorm
from tests.conftest import assert_close, images, randomize


def create_port(name: str = "shvit_s1", **kwargs) -> TimmSHViT:
    """timm's own model, whose name in the registry we took."""
    variant = VARIANTS[name]
    arguments = {"embed_dim": variant.embed_dim, "depth": variant.depth, "partial_dim": variant.partial_dim}
    return TimmSHViT(**{**arguments, "types": ("i", "s", "s"), **kwargs})


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    """Our model and timm's with the same random parameters, loaded strictly one way and back the other."""
    ours = randomize(timm.create_model(request.param)).eval()
    port = create_port(request.param).eval()
    port.load_state_dict(ours.state_dict(), strict=True)
    fresh = timm.create_model(request.param).eval()
    fresh.load_state_dict(port.state_dict(), strict=True)
    return fresh, port


@torch.no_grad()
def test_outputs_features_and_intermediates_are_the_ports(pair):
    ours, port = pair
    assert isinstance(ours, SHViT)
    x = images(2, 3, 96, 128)
    assert_close(ours(x), port(x))
    assert_close(ours.forward_features(x), port.forward_features(x))
    assert_close(ours.forward_head(port.forward_features(x), pre_logits=True),
                 port.forward_head(port.forward_features(x), pre_logits=True))  # fmt: skip
    (last, stages), (port_last, port_stages) = ours.forward_intermediates(x), port.forward_intermediates(x)
    for a, b in zip([last, *stages], [port_last, *port_stages], strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_features_only_gives_the_ports_features(name):
    ours = randomize(timm.create_model(name, features_only=True)).eval()
    port = FeatureListNet(create_port(name, num_classes=0), out_indices=(0, 1, 2), flatten_sequential=True).eval()
    port.load_state_dict({key: value for key, value in ours.state_dict().items() if "head." not in key}, strict=True)
    x = images(2, 3, 96, 128)
    for a, b in zip(ours(x), port(x), strict=True):
        assert_close(a, b)
    assert ours.feature_info.get_dicts() == port.feature_info.get_dicts()


def test_training_outputs_gradients_and_statistics_are_the_ports(pair):
    ours, port = (copy.deepcopy(model).train() for model in pair)
    x = images(2, 3, 96, 128)
    outputs = []
    for model in (ours, port):
        outputs.append(model(x))
        outputs[-1].square().mean().backward()
    assert_close(*outputs)
    gradients = {name: parameter.grad for name, parameter in port.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[name], 1e-4 if name.endswith("l.bias") else 1e-5)
    buffers = dict(port.named_buffers())
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, buffers[name])


def test_names_order_and_shapes_are_the_ports(pair):
    ours, port = ({name: tensor.shape for name, tensor in model.state_dict().items()} for model in pair)
    assert list(ours.items()) == list(port.items())
    assert [name for name, _ in pair[0].named_parameters()] == [name for name, _ in pair[1].named_parameters()]


@pytest.mark.parametrize(
    ("name", "params"),
    [("shvit_s1", 6_330_808), ("shvit_s2", 11_483_072), ("shvit_s3", 14_245_273), ("shvit_s4", 16_588_484)],
)
def test_parameters_are_as_many_as_published(name, params):
    """Counts of the reference's checkpoints, buffers left out."""
    model = timm.create_model(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == params


@pytest.mark.parametrize("name", VARIANTS)
def test_initialization_draws_what_the_port_draws(name):
    torch.manual_seed(7)
    ours = timm.create_model(name)
    torch.manual_seed(7)
    for (own_name, own), (port_name, port) in zip(
        ours.state_dict().items(), create_port(name).state_dict().items(), strict=True
    ):
        assert own_name == port_name
        torch.testing.assert_close(own, port, rtol=0, atol=0)


def test_initialization_is_the_papers():
    torch.manual_seed(0)
    model = timm.create_model("shvit_s1")
    starts_at_zero = {name for name, module in model.named_modules()
                      if isinstance(module, ConvNorm) and not module.bn.weight.any()}  # fmt: skip
    blocks = [name for name, module in model.named_modules() if name.startswith("stages.") and "blocks." in name
              and isinstance(module, ConvNorm)]  # fmt: skip
    ends = {name for name in blocks if name.endswith(("conv.m", "pw2", "proj.1"))}
    refinements = {name for name, _ in model.named_modules() if "downsample" in name and name.endswith("pw2")}
    assert starts_at_zero == ends | refinements
    for module in model.modules():
        if isinstance(module, ConvNorm):
            assert set(module.bn.weight.tolist()) in ({0.0}, {1.0})
    weight, bias = model.head.l.weight, model.head.l.bias
    assert not bias.any()
    assert abs(weight.std().item() - 0.02) < 1e-3
    assert abs(weight.mean().item()) < 1e-3
    torch.testing.assert_close(model(images(2, 3, 64, 64)), torch.full((2, 1000), 0.0), atol=5, rtol=0)
