"""What `shvit info` counts, against other counters and by hand; the designs that it compares are what it says."""

from itertools import pairwise

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis, parameter_count
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from shvit.cli import run
from shvit.export.analysis.counting import Cost, cost, count
from shvit.export.analysis.designs import MacroDesign, _summarize_macro, multi_head, stride_4, times
from shvit.export.analysis.info import Description, describe, tables
from shvit.export.spec import open_model
from shvit.shvit import SHSA
from tests.conftest import create_tiny

GMACS = {"shvit_s1": 0.241, "shvit_s2": 0.366, "shvit_s3": 0.601, "shvit_s4": 0.986}  # the paper's


@pytest.fixture(scope="module", params=["shvit_s1", "shvit_s4"])
def described(request):
    model, spec = open_model(request.param)
    return model, describe(model, spec)


@pytest.mark.parametrize(
    "name",
    [
        "shvit_s1",
        "shvit_s4",
        pytest.param("shvit_s2", marks=pytest.mark.slow),
        pytest.param("shvit_s3", marks=pytest.mark.slow),
    ],
)
def test_counts_are_those_of_fvcore_and_torch_and_the_paper(name):
    """fvcore also counts BatchNorm, GroupNorm and the pooling, as a few operations for each value; the paper, torch and
    we do not. None of the counters counts additions, gates and softmax. Both see the attention's products as matmul."""
    model, spec = open_model(name)
    ours = {kind: sum(o.macs for o in count(model, spec.blank()) if o.kind == kind) for kind in
            ("convolution", "depthwise convolution", "matrix product")}  # fmt: skip
    analysis = FlopCountAnalysis(model, spec.blank()).unsupported_ops_warnings(False)
    theirs = analysis.uncalled_modules_warnings(False).by_operator()
    assert set(theirs) == {"conv", "linear", "matmul", "batch_norm", "group_norm", "adaptive_avg_pool2d"}
    assert ours["convolution"] + ours["depthwise convolution"] == theirs["conv"]
    assert ours["matrix product"] == theirs["linear"] + theirs["matmul"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(spec.blank())
    total = cost(model, spec.blank())
    assert total.macs == sum(ours.values()) == counter.get_total_flops() / 2
    assert total.macs / 1e9 == pytest.approx(GMACS[name], abs=7e-4)
    assert total.params == parameter_count(model)[""]


def test_bytes_of_a_convolution():
    """3 × 16² → 8 × 8², by 3 × 3 kernels."""
    layer, x = nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.zeros(1, 3, 16, 16)
    assert cost(layer, x) == Cost(
        macs=8 * 27 * 64,
        params=8 * 27 + 8,
        activation_bytes=4 * (3 * 256 + 8 * 64),
        weight_bytes=4 * (8 * 27 + 8),
        flop_per_byte=2 * 8 * 27 * 64 / (4 * (3 * 256 + 8 * 64 + 8 * 27 + 8)),
        memory_bound_bytes=0,
        memory_bound_percent=0,
    )


def test_bytes_of_a_linear_layer():
    """Its weight is read through a transposed view."""
    counted = cost(nn.Linear(10, 5), torch.zeros(1, 10))
    assert (counted.macs, counted.activation_bytes, counted.weight_bytes) == (50, 4 * 15, 4 * 55)


def test_bytes_of_operators_without_multiply_adds():
    """Read and written once each; BatchNorm also reads four values of each channel; views are free."""
    model = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten(2), nn.Softmax(-1)).eval()
    operations = count(model, torch.zeros(1, 2, 4, 4))
    assert [o.kind for o in operations] == ["normalization", "activation", "softmax"]
    assert [o.activation_bytes for o in operations] == [2 * 4 * 32] * 3
    assert [o.weight_bytes for o in operations] == [4 * 4 * 2, 0, 0]
    assert Cost.of(operations).memory_bound_percent == 100


def test_attention_is_counted_unfused():
    class Attention(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    operations = count(Attention(), torch.zeros(1, 2, 49, 32))
    assert [o.macs for o in operations if o.kind == "matrix product"] == [2 * 49 * 49 * 32] * 2
    assert [o.activation_bytes for o in operations if o.kind == "softmax"] == [2 * 4 * 2 * 49 * 49]


def test_depthwise_convolutions_are_told_apart():
    kinds = [o.kind for layer in (nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(1, 8, 3))
             for o in count(layer, torch.zeros(1, layer.in_channels, 8, 8))]  # fmt: skip
    assert kinds == ["depthwise convolution", "convolution", "convolution"]


def counts(cost: Cost) -> tuple[int, ...]:
    return cost.macs, cost.params, cost.activation_bytes, cost.weight_bytes, cost.memory_bound_bytes


def add(costs: list[Cost]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*map(counts, costs), strict=True)))


def assert_adds_up(said: Description) -> None:
    assert add([row.cost for row in said.rows]) == counts(said.total)
    assert sum(row.byte_percent for row in said.operators) == pytest.approx(100)
    assert sum(row.mac_percent for row in said.operators) == pytest.approx(100)


def test_rows_add_up_to_subtotals_and_the_total(described):
    model, said = described
    assert_adds_up(said)
    stem = said.rows[0].cost
    assert add([stem, *(row.cost for row in said.subtotals)]) == counts(said.total)
    assert [row.stage for row in said.subtotals] == ["stage 1", "stage 2", "stage 3", "head"]
    assert said.params == sum(p.numel() for p in model.parameters())


def test_tokens_are_those_of_each_layers_output(described):
    _, said = described
    tokens = [196, 49, 16, 1] if said.model == "shvit_s1" else [256, 64, 16, 1]
    assert [row.tokens for row in said.subtotals] == tokens
    assert [row.tokens for row in said.rows if row.kind == "attention"] == tokens[1:3]
    assert [row.tokens for row in said.rows if row.kind == "patch merging"] == tokens[1:3]
    assert [row.tokens for row in said.rows if row.kind == "FFN"] == [tokens[i] for i in (0, 0, 1, 1, 2)]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("edgenext_xx_small", {"stem": 64 * 64, "stages": 64, "head": 1}),  # a LayerNorm that turns the axes
        ("vit_tiny_patch16_224", {"patch_embed": 196, "blocks": 197, "norm": 197, "head": 1, "": 0}),
        ("swin_tiny_patch4_window7_224", {"patch_embed": 3136, "layers": 49, "norm": 49, "head": 1}),  # channels last
    ],
)
def test_tokens_of_peers(name, tokens):
    assert {row.stage: row.tokens for row in describe(*open_model(name)).rows} == tokens


def test_deployment_saves_bytes_and_no_multiply_adds(described):
    _, said = described
    assert said.deployed.macs == said.macs
    assert said.deployed.bytes < 0.9 * said.total.bytes
    assert said.deployed.memory_bound_percent < said.total.memory_bound_percent


def test_stride_4_pyramid_is_what_it_says(described):
    model, said = described
    x = torch.zeros(1, 3, *said.img_size)
    pyramid = stride_4(model, x)
    maps = pyramid.forward_intermediates(x, intermediates_only=True)
    assert [said.img_size.width // features.shape[-1] for features in maps] == [4, 8, 16, 32]
    dims = [features.shape[1] for features in maps]
    assert all(abs(2 * a - b) <= 1 for a, b in pairwise(dims))
    blocks = [[type(block.mixer).__name__ for block in stage.blocks] for stage in pyramid.stages]
    own = [[type(block.mixer).__name__ for block in stage.blocks] for stage in model.stages]
    assert blocks[0] + blocks[1] == own[0]
    assert blocks[2:] == own[1:]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pyramid(x)
    assert counter.get_total_flops() / 2 == pytest.approx(said.macs, rel=0.02)


def test_comparison_holds_both_designs_and_what_they_cost(described):
    model, said = described
    own, other = said.macro.own, said.macro.other
    assert own.cost == said.total
    assert (own.stride, own.embed_dim[-1], own.tokens[-1]) == (16, model.num_features, 16)
    assert (other.stride, len(other.depth), other.tokens[0]) == (4, 4, 16 * own.tokens[0])
    assert sum(other.depth) == sum(own.depth)
    assert other.cost.activation_bytes > own.cost.activation_bytes  # the paper's claim
    assert [pair.own.stage for pair in said.micro] == ["stage 2", "stage 3"]
    for pair, row in zip(said.micro, (row for row in said.rows if row.kind == "attention"), strict=True):
        assert pair.own.tokens == pair.other.tokens == row.tokens
        assert pair.own.cost.macs == row.cost.macs / row.layers
        assert pair.own.cost.bytes < pair.other.cost.bytes  # the paper's claim


@pytest.mark.parametrize(("dim", "heads"), [(224, 7), (336, 12), (448, 14), (308, 11)])
def test_multi_head_attention_is_torchs(dim, heads):
    """On all channels, in heads of about 32."""
    module = multi_head(SHSA(dim, 16, 48))
    x = torch.randn(1, dim, 4, 4, generator=torch.Generator().manual_seed(0))
    norm, attention = module
    assert attention.num_heads == heads
    assert 24 <= dim // heads <= 40
    with torch.no_grad():
        q, k, v = attention.qkv(norm(x)).reshape(1, 3, heads, dim // heads, 16).transpose(-1, -2).unbind(1)
        expected = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(1, dim, 4, 4)
        torch.testing.assert_close(module(x), attention.proj(expected))


@pytest.mark.parametrize(
    ("new", "old", "said"),
    [
        (3, 1, "3.0 times more"),
        (1, 3, "3.0 times fewer"),
        (1.04, 1, "about as many"),
        (0.96, 1, "about as many"),
        (1.06, 1, "1.1 times more"),
    ],
)
def test_sentences_follow_the_figures(new, old, said):
    assert times(new, old) == said


def test_a_comparison_that_goes_the_other_way_says_so():
    def design(stride: int, size: int) -> MacroDesign:
        return MacroDesign(stride, (8,), (1,), (1,), Cost(10, 10, size, size, 10 / size, 0, 0.0))

    assert "3.0 times more bytes of activations" in _summarize_macro(design(16, 10), design(4, 30))
    assert "3.0 times fewer bytes of activations" in _summarize_macro(design(16, 30), design(4, 10))
    assert "about as many bytes of activations" in _summarize_macro(design(16, 10), design(4, 10))


def test_describing_draws_none_of_the_callers_random_numbers_and_leaves_the_model_alone():
    model = create_tiny()
    _, spec = open_model("shvit_s1", img_size=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    said = describe(model, spec)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert_adds_up(said)


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", "vit_tiny_patch16_224", "test_efficientnet"])
def test_info_of_a_peer_counts_everything_and_compares_nothing(name):
    """By its top-level modules; what belongs to none of them, such as a ViT's positions, has a row of its own."""
    model, spec = open_model(name)
    said = describe(model, spec)
    assert_adds_up(said)
    assert said.params == sum(p.numel() for p in timm.create_model(name).parameters())
    assert {row.stage for row in said.rows} <= {name for name, _ in model.named_children()} | {""}
    assert (said.macro, said.micro, said.deployed, said.subtotals) == (None, [], None, [])
    assert len(tables(said)) == 4


def test_info_command_prints_tables_and_gives_rows_totals_and_comparisons(capsys):
    result = run(["info", "shvit_s1", "--img-size", "64"])
    printed = capsys.readouterr().out
    assert {"rows", "subtotals", "total", "operators", "deployed", "macro", "micro"} <= set(result)
    assert result["total"]["macs"] == result["macs"]
    assert f"{result['macs'] / 1e9:.3f} GMACs, 6,330,808 parameters" in printed
    for sentence in (result["summary"], result["macro"]["summary"], *(pair["summary"] for pair in result["micro"])):
        assert sentence.split(":")[0][:100] in printed
