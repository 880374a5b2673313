"""Core ML packages that we write, against PyTorch and coremltools' own reading of them."""

import resource
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from shvit.deployment import deploy
from shvit.errors import InputError
from shvit.export.backends.coreml import write_coreml
from shvit.export.mil.program import LAYERS, Package
from shvit.export.spec import Spec, randomize_norms
from tests.conftest import create_tiny, randomize

SIZE = 64
SMALL = {"depth": (1, 1, 1)}
"""One block a stage: every kind of layer, for what does not depend on how many there are."""
LABELS = [f"thing {i}" for i in range(10)]


def spec_of(model: nn.Module, size: int = SIZE, **changes) -> Spec:
    return replace(Spec.of("shvit_s1", model, size), **changes)


def pixels(count: int = 1, size: int | tuple[int, int] = SIZE, seed: int = 0) -> torch.Tensor:
    """Soft patches of color, uint8 (count, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    return (nn.functional.interpolate(coarse, size=size, mode="bilinear") * 255).round().to(torch.uint8)


def feed(spec: Spec, image: torch.Tensor) -> torch.Tensor:
    return image.float() if spec.uint8_input else spec.normalize(image)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """The largest difference is at most `tolerance` of the spread of expected values."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / (expected.max() - expected.min())
    assert error <= tolerance, f"relative error {error:.2e} above {tolerance:.0e}"


def snr_db(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (actual - expected).square().sum()))


@pytest.fixture(scope="module")
def w8a8(tmp_path_factory):
    """A package with one layer kept, the model that it was made of, its spec, and that layer's name."""
    model, kept = create_tiny(), "stages.1.blocks.1.mixer.m.qkv"
    deployed = deploy(model, SIZE)
    spec = spec_of(model, precision="w8a8", uint8_input=True)
    path = tmp_path_factory.mktemp("w8a8") / "w8a8.mlpackage"
    write_coreml(deployed, path, replace(spec, excluded_layers=(kept,)), calibration=list(pixels(24)))
    return path, deployed, spec, kept


@pytest.mark.parametrize(
    ("precision", "uint8_input"),
    [
        ("fp32", False),
        ("int8", True),
        pytest.param("fp32", True, marks=pytest.mark.slow),
        pytest.param("int8", False, marks=pytest.mark.slow),
    ],
)
def test_every_size_gives_the_models_answers(tmp_path, precision, uint8_input):
    model = create_tiny(**SMALL)
    spec = spec_of(model, precision=precision, uint8_input=uint8_input, other_sizes=(96, (64, 128)))
    write_coreml(deploy(model), tmp_path / "m.mlpackage", spec)
    package = Package(tmp_path / "m.mlpackage")
    assert [shape[-2:] for shape in package.inputs[0].shapes] == [(64, 64), (96, 96), (64, 128)]
    for size in spec.sizes:
        image = pixels(size=size)
        with torch.no_grad():
            expected = model(spec.normalize(image))
        assert_near(package(image=feed(spec, image))["logits"], expected, 1e-4 if precision == "fp32" else 0.1)
    for size, shape in ((80, "80×80"), ((128, 64), "128×64")):
        with pytest.raises(InputError, match=f"not 1×3×{shape}"):
            package(image=pixels(size=size).float())


def test_several_sizes_leave_the_model_as_it_was(tmp_path):
    deployed = deploy(create_tiny(**SMALL))
    kinds = [type(module) for module in deployed.modules()]
    write_coreml(deployed, tmp_path / "m.mlpackage", spec_of(deployed, other_sizes=(96,)))
    assert [type(module) for module in deployed.modules()] == kinds


@pytest.mark.parametrize("other_sizes", [(), (96,)])
def test_features_come_out_under_their_names(tmp_path, other_sizes):
    model = randomize(timm.create_model("test_resnet", features_only=True, out_indices=(1, 2)), 0).eval()
    spec = replace(
        spec_of(model), uint8_input=True, outputs=("stride_4", "stride_8"), other_sizes=other_sizes, num_classes=0
    )
    write_coreml(deploy(model), tmp_path / "m.mlpackage", spec)
    package = Package(tmp_path / "m.mlpackage")
    assert [output.name for output in package.proto.description.output] == list(spec.outputs)
    for size in spec.sizes:
        image = pixels(size=size)
        with torch.no_grad():
            expected = model(spec.normalize(image))
        got = package(image=image.float())
        for name, value in zip(spec.outputs, expected, strict=True):
            assert_near(got[name], value)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8a8"])
def test_classifier_gives_label_and_probabilities(tmp_path, precision):
    model = create_tiny(**SMALL)
    spec = spec_of(model, precision=precision, uint8_input=True, outputs=("probabilities",))
    write_coreml(
        nn.Sequential(deploy(model, SIZE), nn.Softmax(-1)),
        tmp_path / "m.mlpackage",
        spec,
        labels=LABELS,
        classifier=True,
        calibration=list(pixels(8)),
    )
    package = Package(tmp_path / "m.mlpackage", half=precision != "fp32")
    description = package.proto.description
    assert list(package.proto.mlProgram.functions) == ["main"]
    assert (description.predictedFeatureName, description.predictedProbabilitiesName) == ("classLabel", "probabilities")
    assert [output.name for output in description.output] == ["classLabel", "probabilities"]
    image = pixels()
    with torch.no_grad():
        expected = model(spec.normalize(image)).softmax(-1)[0]
    got = package(image=image.float())
    assert list(got["probabilities"]) == LABELS
    values = torch.tensor(list(got["probabilities"].values()))
    assert_near(values, expected, {"fp32": 1e-4, "fp16": 1e-2, "w8a8": 0.2}[precision])
    assert got["classLabel"] == LABELS[values.argmax()]


@pytest.mark.parametrize("uint8_input", [True, False])
def test_layers_are_named_after_their_modules_and_give_their_values(tmp_path, uint8_input):
    deployed = deploy(create_tiny(**SMALL), SIZE)
    spec = spec_of(deployed, uint8_input=uint8_input)
    write_coreml(deployed, tmp_path / "m.mlpackage", spec)
    image, expected = pixels(), {}
    for name, module in deployed.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda _m, _i, out, name=name: expected.__setitem__(name, out.clone()))
    with torch.no_grad():
        deployed(spec.normalize(image))
    got = Package(tmp_path / "m.mlpackage").layers(image=feed(spec, image))
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert_near(got[name], value)


def test_norm_names_the_convolution_that_it_was_folded_into(tmp_path):
    model = randomize(timm.create_model("test_resnet", num_classes=3), 0).eval()
    spec, image, expected = replace(spec_of(model), num_classes=3), pixels(), {}
    write_coreml(model, tmp_path / "m.mlpackage", spec)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.Linear):
            module.register_forward_hook(lambda _m, _i, out, name=name: expected.__setitem__(name, out.clone()))
    with torch.no_grad():
        model(spec.normalize(image))
    got = Package(tmp_path / "m.mlpackage").layers(image=spec.normalize(image))
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert_near(got[name], value)


@pytest.mark.parametrize("keep", [(), ("stages.0.blocks.0.conv", "head")])
def test_int8_weights_are_numpys_per_channel(tmp_path, keep):
    deployed = deploy(create_tiny(**SMALL), SIZE)
    write_coreml(deployed, tmp_path / "m.mlpackage", spec_of(deployed, precision="int8", excluded_layers=tuple(keep)))
    package, found = Package(tmp_path / "m.mlpackage"), {}
    for op in package.program.function.operations:
        if op.op_type in ("conv", "linear"):
            found[op.name] = op.inputs["weight"].op
    for name, op in found.items():
        assert (op.op_type == "const") == (name in keep), name
        if name in keep:
            continue
        weight = deployed.get_submodule(name).weight.detach().half().float().numpy()
        scale = np.abs(weight).reshape(len(weight), -1).max(1).reshape(-1, *[1] * (weight.ndim - 1)) / 127
        assert op.quantized_data.val.dtype == np.int8
        np.testing.assert_allclose(op.materialized_val_inference(), weight, atol=float(0.55 * scale.max()))
        np.testing.assert_allclose(op.scale.val, scale.ravel(), rtol=2e-3)


def test_w8a8_rounds_the_input_of_every_convolution_that_is_not_kept(w8a8):
    path, deployed, _, kept = w8a8
    package = Package(path)
    assert package.proto.specificationVersion == 8  # iOS 17
    names = {name for name, module in deployed.named_modules() if isinstance(module, nn.Conv2d)}
    seen = set()
    for op in package.program.function.operations:
        if op.op_type != "conv":
            continue
        seen.add(op.name)
        before = op.inputs["x"].op
        if op.name == kept:
            assert op.inputs["weight"].op.op_type == "const"
            assert before.op_type != "dequantize"
            continue
        assert op.inputs["weight"].op.quantized_data.val.dtype == np.int8
        assert before.op_type == "dequantize"
        assert before.inputs["input"].op.op_type == "quantize"
        assert before.inputs["input"].op.inputs["output_dtype"].val == "uint8"
    assert seen == names


def test_w8a8_keeps_close_to_its_model(w8a8):
    path, deployed, spec, _ = w8a8
    package, images = Package(path, half=True), pixels(16, seed=1)
    with torch.no_grad():
        expected = deployed(spec.normalize(images))
    got = torch.cat([package(image=image[None].float())["logits"] for image in images])
    assert snr_db(got, expected) > 25


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "mobilenetv4_conv_small")]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", *LARGE])
def test_peers_go_into_w8a8(tmp_path, name):
    model = timm.create_model(name, num_classes=4).eval()
    randomize_norms(model)
    spec = replace(Spec.of(name, model, SIZE), precision="w8a8", uint8_input=True)
    deployed = deploy(model, SIZE)
    write_coreml(deployed, tmp_path / "m.mlpackage", spec, calibration=list(pixels(4)))
    package, images = Package(tmp_path / "m.mlpackage", half=True), pixels(4, seed=1)
    sources = {op.inputs["x"].op for op in package.program.function.operations if op.op_type == "conv"}
    assert {op.op_type for op in sources} == {"dequantize"}
    assert len(sources) == package.operators["quantize"]  # convolutions of one input share its rounding
    with torch.no_grad():
        expected = deployed(spec.normalize(images))
    got = torch.cat([package(image=image[None].float())["logits"] for image in images])
    assert snr_db(got, expected) > 20


@pytest.mark.parametrize("precision", ["int8", "w8a8"])
def test_constants_that_layers_and_norms_share_are_no_obstacle(tmp_path, precision):
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=40, depths=(1, 1, 1, 1)).eval()
    spec = replace(Spec.of("convnext_atto", model, SIZE), precision=precision)
    write_coreml(model, tmp_path / "m.mlpackage", spec, calibration=list(pixels(2)))
    package, image = Package(tmp_path / "m.mlpackage"), spec.normalize(pixels())
    weights = [op.inputs["weight"].op for op in package.program.function.operations if op.op_type in LAYERS]
    assert {op.op_type for op in weights} == {"constexpr_affine_dequantize"}
    with torch.no_grad():
        assert snr_db(package(image=image)["logits"], model(image)) > 20


def test_misfits_are_one_clear_line(tmp_path):
    deployed = deploy(create_tiny(**SMALL), SIZE)
    spec, path = spec_of(deployed), tmp_path / "m.mlpackage"
    eight = replace(spec, precision="w8a8")
    for wrong, options, message in (
        (spec, {"classifier": True, "labels": LABELS[:3]}, "3 labels for 10 classes"),
        (spec, {"classifier": True, "labels": ["a"] * 10}, "label 'a' stands for several classes"),
        (replace(spec, outputs=("a", "b")), {"classifier": True, "labels": LABELS}, "a classifier has one output"),
        (eight, {}, "none were given; give 128 or more"),
        (eight, {"calibration": [pixels()[0, :1]]}, r"must be uint8 \(3, 64, 64\), not \(1, 64, 64\)"),
        (eight, {"calibration": [pixels()[0].float()]}, "not another type"),
        (replace(eight, other_sizes=(96,)), {"calibration": [pixels()[0]]}, "calibrated for one size, not 64, 96"),
        (replace(spec, excluded_layers=("head.l",)), {}, "no convolution or linear layer is called 'head.l'"),
    ):
        with pytest.raises(InputError, match=message) as error:
            write_coreml(deployed, path, wrong, **options)
        assert "\n" not in str(error.value)
    assert not path.exists()


def test_image_of_pil_and_tensor_of_pixels_are_the_same(w8a8):
    path, _, _, _ = w8a8
    image = pixels()[0]
    package = Package(path)
    given = Image.fromarray(image.permute(1, 2, 0).numpy())
    assert torch.equal(package(image=given)["logits"], package(image=image[None].float())["logits"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4"])
@pytest.mark.parametrize("kind", ["plain", "distilled", "features"])
def test_every_variant_at_three_sizes_in_one_file(tmp_path, name, kind):
    torch.manual_seed(0)
    options = {"plain": {}, "distilled": {"distilled": True}, "features": {"features_only": True}}[kind]
    model = timm.create_model(name, **options).eval()
    randomize(model)
    outputs = ("stride_16", "stride_32", "stride_64") if kind == "features" else ("logits",)
    spec = replace(Spec.of(name, model, 224), uint8_input=True, outputs=outputs, other_sizes=(256, 384))
    started, worst = time.perf_counter(), 0.0
    write_coreml(deploy(model), tmp_path / "m.mlpackage", spec)
    package = Package(tmp_path / "m.mlpackage")
    for size in spec.sizes:
        image = pixels(size=size)
        with torch.no_grad():
            expected = model(spec.normalize(image))
        got = package(image=image.float())
        for output, value in zip(outputs, expected if kind == "features" else [expected], strict=True):
            assert_near(got[output], value)
            worst = max(worst, float((got[output] - value).abs().max() / (value.max() - value.min())))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{name} {kind}: {worst:.1e}, {time.perf_counter() - started:.0f} s, {peak:.1f} GB", file=sys.stderr)
