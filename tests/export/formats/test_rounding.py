"""Files computed with rounding after every operation, against PyTorch's own float16 and bfloat16."""

import math
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import TensorProto, helper
from torch import nn

from shvit.deployment import deploy
from shvit.errors import InputError
from shvit.export.backends.onnx import write_onnx
from shvit.export.backends.openvino import write_openvino
from shvit.export.formats.onnx import RoundedOnnx, load_onnx
from shvit.export.formats.openvino import RoundedOpenvino, load_openvino
from shvit.export.formats.rounding import ROWS
from shvit.export.spec import Spec
from shvit.export.verdict import snr_db
from shvit.export.wrappers import ChannelsLast, Half, Normalized, layer_outputs
from tests.conftest import Apply, create_tiny, images, randomize

PX = 32


def spec_for(precision: str = "fp16", **changes) -> Spec:
    settings = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25), "interpolation": "bicubic", "crop_pct": 0.9}
    return Spec(**{"model": "m", "img_size": PX, "in_chans": 3, "num_classes": 10, **settings, **changes},
                precision=precision)  # fmt: skip


def in_onnx(model: nn.Module, folder, dynamic_batch: bool = True, **changes) -> RoundedOnnx:
    write_onnx(model.eval(), folder / "m.onnx", spec_for(**changes), dynamic_batch)
    return RoundedOnnx(load_onnx(folder / "m.onnx"), threads=1)


def write_openvino_file(model: nn.Module, folder, dynamic_batch: bool = True, **changes) -> None:
    write_onnx(model.eval(), folder / "f.onnx", spec_for("fp32", **changes), dynamic_batch)
    write_openvino(folder / "f.onnx", folder / "m.xml", spec_for())  # the files of fp16 and bf16 are the same


def in_openvino(model: nn.Module, folder, **changes) -> RoundedOpenvino:
    write_openvino_file(model, folder, **changes)
    return RoundedOpenvino(load_openvino(folder / "m.xml")[0], threads=1)


def in_torch(model: nn.Module, batch: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """PyTorch's eager arithmetic in that format."""
    half = Half(model)
    half.model.to(dtype)
    with torch.no_grad():
        return half.model(batch.to(dtype)).float()


CHAIN = Apply(lambda x: ((((x + 2048).abs() - 2040) / (x.abs() + 0.375).sqrt()) * 900).relu() * 70.0)
"""Correctly rounded operations, for which float32 in between changes nothing; some results pass 65504."""


@pytest.fixture(scope="module")
def tiny():
    return deploy(create_tiny(), PX)


@pytest.fixture(scope="module")
def tiny_onnx(tiny, tmp_path_factory):
    return in_onnx(tiny, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def tiny_openvino(tiny, tmp_path_factory):
    """Its graph, as it was read."""
    folder = tmp_path_factory.mktemp("openvino")
    write_openvino_file(tiny, folder, dynamic_batch=False)
    return load_openvino(folder / "m.xml")[0]


def test_onnx_is_rounded_as_pytorch_rounds_bit_for_bit(tmp_path):
    rounded = in_onnx(CHAIN, tmp_path)
    x = images(2, 3, PX, PX)
    expected = in_torch(CHAIN, x)
    assert torch.equal(rounded.run(x)[0], expected)
    assert expected.isinf().any()
    assert rounded.overflow == "model.Mul.1"


def test_openvino_is_rounded_as_pytorch_rounds_bit_for_bit(tmp_path):
    write_openvino_file(CHAIN, tmp_path)
    x = images(2, 3, PX, PX)
    for dtype, overflow in ((torch.float16, "logits"), (torch.bfloat16, None)):
        rounded = RoundedOpenvino(load_openvino(tmp_path / "m.xml")[0], dtype, threads=1)
        expected = in_torch(CHAIN, x, dtype)
        assert torch.equal(rounded.run(x)[0], expected)
        assert expected.isinf().any() == (overflow is not None)
        assert rounded.overflow == overflow


@pytest.mark.parametrize("convert", [in_onnx, in_openvino])
def test_the_first_layer_that_overflows_is_named_with_how_far(convert, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight *= 1e3
        model[1].weight *= 1e3
        model[3].weight *= 1e-4
    rounded = convert(model, tmp_path)
    x = images(2, 3, PX, PX)
    assert rounded.overflow is None  # nothing was run
    with torch.no_grad():
        between, expected = model[:2](x), model(x)
    assert expected.isfinite().all()  # in float32 nothing is to be seen
    assert not rounded.run(x)[0].isfinite().all()
    assert rounded.overflow == "1"
    assert rounded.largest["1"] == pytest.approx(between.abs().max().item(), rel=5e-3)
    assert rounded.largest["1"] > 65504 > rounded.nearest(1)["0"] == rounded.largest["0"]  # of those before it
    assert not convert(nn.Conv2d(3, 4, 1), tmp_path).overflow


def test_nan_is_seen_where_it_comes_from(tmp_path):
    rounded = in_onnx(Apply(lambda x: (x * 1e-4 - x * 1e-4) / (x.abs() * 1e-9) + 1), tmp_path)
    assert rounded.run(images(1, 3, PX, PX))[0].isnan().any()
    assert rounded.overflow == "model.Div"
    assert math.isinf(rounded.largest["model.Div"])
    assert rounded.largest["model.Sub"] == 0


def test_no_rounding_is_optimized_away(tiny_onnx, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(tiny_onnx.graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    casts = Counter(helper.get_node_attr_value(node, "to") for node in nodes if node.op_type == "Cast")
    assert casts[TensorProto.FLOAT16] == len(tiny_onnx.largest) > 40
    assert casts[TensorProto.FLOAT] >= len(tiny_onnx.largest)


@pytest.mark.parametrize("kind", ["onnx float16", "openvino float16", "openvino bfloat16"])
def test_a_shvit_is_as_far_from_float32_as_in_pytorch(kind, tiny, tiny_onnx, tiny_openvino):
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float16
    rounded = tiny_onnx if "onnx" in kind else RoundedOpenvino(tiny_openvino, dtype, threads=1)
    x = images(4, 3, PX, PX)
    with torch.no_grad():
        exact = tiny(x)
    half, (got,) = in_torch(tiny, x, dtype), rounded.run(x)
    noise = snr_db(exact, half)
    assert snr_db(exact, got) == pytest.approx(noise, abs=3)
    assert snr_db(half, got) > noise - 4
    assert rounded.overflow is None
    layers, expected = rounded.run_layers(x), layer_outputs(tiny, x)
    assert len(layers.keys() & expected.keys()) >= len(expected) - 1  # OpenVINO calls the last one after the output
    assert all(snr_db(expected[name], layers[name]) > noise - 10 for name in layers.keys() & expected.keys())


def test_batches_of_any_size_and_single_images_give_the_same(tiny, tiny_onnx):
    x = images(ROWS + 3, 3, PX, PX)
    (whole,) = tiny_onnx.run(x)
    one_by_one = torch.cat([tiny_onnx.run(image)[0] for image in x.split(1)])
    assert whole.shape == one_by_one.shape == (ROWS + 3, 10)
    noise = snr_db(in_torch(tiny, x), whole)
    assert snr_db(whole, one_by_one) > noise  # sums in another order round otherwise here and there
    assert tiny_onnx.run_layers(x)["head"].shape == (ROWS + 3, 10)


@pytest.mark.parametrize("convert", [in_onnx, in_openvino])
def test_pixels_are_left_alone_and_float32_stays_float32(convert, tmp_path):
    spec = spec_for(uint8_input=True)
    model = timm.create_model("test_vit", img_size=PX, num_classes=10, depth=2)  # MatMul, GELU, layer norm, attention
    model = randomize(model).eval()
    rounded = convert(model, tmp_path, dynamic_batch=False, uint8_input=True)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, PX, PX), dtype=np.uint8))
    with torch.no_grad():
        exact = ChannelsLast(Normalized(model, spec, white=255))(spec.feed(pixels))
    half = in_torch(model, spec.normalize(pixels))
    (got,) = rounded.run(spec.feed(pixels))
    assert snr_db(exact, got) == pytest.approx(snr_db(exact, half), abs=4)
    assert rounded.overflow is None
    assert ("model.Mul" in rounded.largest) == (convert is in_openvino)  # ONNX normalizes in float32, as it says
    assert rounded.rows == 1
    assert rounded.run_layers(spec.feed(pixels))["patch_embed.proj"].shape[:2] == (2, 64)


def test_what_cannot_be_computed_is_one_clear_line(tiny_onnx):
    node = helper.make_node("Unheard", ["image"], ["y"], domain="somewhere")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 3]) for name in ("image", "y")]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("somewhere", 1)]
    proto = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]), opset_imports=opsets, ir_version=10)
    with pytest.raises(InputError) as error:
        RoundedOnnx(proto)
    assert "\n" not in str(error.value)
