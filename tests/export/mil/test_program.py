"""The evaluator of Core ML packages against PyTorch, on packages that coremltools converts and saves."""

import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from shvit.errors import InputError
from shvit.export.mil.program import Package
from shvit.terminal import quiet
from tests.conftest import Apply, randomize


def convert(model: nn.Module, example: torch.Tensor, folder, half: bool = False, target: str = "iOS16", **options):
    """Save a package with a tensor input `x` and an output `y`, or those of `options`, and return its path."""
    path = folder / f"{len(list(folder.iterdir()))}.mlpackage"
    with quiet():
        import coremltools as ct

        with torch.no_grad():
            traced = torch.jit.trace(model.eval(), example)
        options.setdefault("inputs", [ct.TensorType(name="x", shape=example.shape)])
        options.setdefault("outputs", [ct.TensorType(name="y", dtype=np.float32)])
        ct.convert(
            traced,
            minimum_deployment_target=getattr(ct.target, target),
            compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
            **options,
        ).save(str(path))
    return path


WEIGHT = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(1))
CASES = {
    "conv, padded": nn.Conv2d(6, 4, 3, 2, 1),
    "conv, one side padded": nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(6, 4, 2, 2)),
    "conv, dilated, in groups": nn.Conv2d(6, 4, 3, padding=2, dilation=2, groups=2, bias=False),
    "conv, depthwise": nn.Conv2d(6, 6, 7, padding="same", groups=6),
    "transposed conv": nn.ConvTranspose2d(6, 4, 2, 2),
    "transposed conv, padded": nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1, groups=2),
    "batch norm": nn.BatchNorm2d(6),
    "group norm": nn.GroupNorm(3, 6),
    "instance norm": nn.InstanceNorm2d(6, affine=True),
    "layer norm": Apply(lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (6,), torch.arange(6.0), torch.ones(6))),
    "linear": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    "average, border counted": nn.AvgPool2d(3, 2, 1),
    "average, border left out": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "max, ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
    "max, padded": nn.MaxPool2d(3, 2, 1),
    "activations": Apply(
        lambda x: F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh") + F.hardswish(x) + F.hardsigmoid(x) + F.elu(x)
    ),
    "more activations": Apply(
        lambda x: F.leaky_relu(x, 0.1) + F.relu6(x) + F.softplus(x) + F.mish(x) + F.softsign(x) + x.tanh() + x.sigmoid()
    ),
    "learned slope": nn.PReLU(6, 0.3),
    "arithmetic": Apply(
        lambda x: (x * 2 - x.abs().sqrt() + (x.square() + 1).rsqrt()) / (x.exp() + 1) ** 1.5 - 2 / (x + 5)
    ),
    "comparisons": Apply(lambda x: torch.where(x > 0.2, x, x.clamp(-0.5, 0.1)) + torch.maximum(x, x.flip(1))),
    "rounding": Apply(lambda x: x.floor() + x.ceil() + x.round() + x.sign()),
    "reductions": Apply(lambda x: x.mean((2, 3)) + x.amax((2, 3)) + x.sum((2, 3)) + x.norm(dim=(2, 3)) + x.var((2, 3))),
    "log": Apply(lambda x: x.abs().add(0.1).log() + x.logsumexp(1, keepdim=True) + x.log_softmax(1)),
    "attention": Apply(lambda x: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).softmax(-1) @ x.flatten(2)),
    "einsum": Apply(lambda x: torch.einsum("bchw,bdhw->bcd", x, x * 2)),
    "parts": Apply(lambda x: torch.cat((x[:, 1::2], x[:, :2] * 2, x[:, -1:]), 1)),
    "split": Apply(lambda x: x.split((1, 2, 3), 1)[2] + x.chunk(2, 1)[0]),
    "stack": Apply(lambda x: torch.stack((x, x * 2), 2).flatten(1, 2).unsqueeze(1).squeeze(0)),
    "shuffle": Apply(lambda x: F.pixel_shuffle(x.repeat(1, 2, 1, 1), 2)),
    "mirrored border": nn.ReflectionPad2d((1, 2, 2, 1)),
    "copied border": nn.ReplicationPad2d((1, 2, 0, 1)),
    "constant border": nn.ConstantPad2d((1, 2, 0, 3), 0.7),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "bilinear, corners": nn.Upsample(size=(13, 17), mode="bilinear", align_corners=True),
    "nearest": nn.Upsample(scale_factor=2),
    "indices": Apply(lambda x: x[:, [0, 3, 5]] + x.index_select(1, torch.tensor([1, 1, 2]))),
}


class AllCases(nn.Module):
    """(1, 6, 9, 8) → the output of every case, so that all are converted at once."""

    def __init__(self):
        super().__init__()
        self.models = nn.ModuleList(randomize(model) for model in CASES.values())

    def forward(self, x):
        return tuple(model(x) for model in self.models)


def convert_cases(folder):
    """Save a package with an output `y0`, `y1`, … for each case, and return its path."""
    import coremltools as ct

    outputs = [ct.TensorType(name=f"y{index}", dtype=np.float32) for index in range(len(CASES))]
    return convert(AllCases(), torch.rand(1, 6, 9, 8), folder, outputs=outputs)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The outputs of the package and of PyTorch, by case."""
    torch.manual_seed(0)
    x = torch.randn(1, 6, 9, 8)
    got = Package(convert_cases(tmp_path_factory.mktemp("cases")))(x=x)
    with torch.no_grad():
        expected = AllCases()(x)
    return {case: (got[f"y{index}"], expected[index]) for index, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_operations_give_pytorchs_results(case, results):
    got, expected = results[case]
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_half_precision_rounds_each_result(tmp_path):
    model, x = randomize(nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))), torch.randn(1, 6, 9, 8)
    path = convert(model, x, tmp_path, half=True)
    exact, rounded = (Package(path, half)(x=x)["y"] for half in (False, True))
    assert not torch.equal(exact, rounded)
    assert torch.equal(rounded, rounded.half().float())
    with torch.no_grad():
        halves = nn.Sequential(*(layer.half() for layer in model))
        torch.testing.assert_close(rounded, halves(x.half()).float(), rtol=2e-3, atol=2e-3)


def test_half_precision_overflows_as_hardware_does(tmp_path):
    x = torch.full((1, 6, 9, 8), 300.0)
    path = convert(Apply(lambda x: x * x), x, tmp_path, half=True)
    assert Package(path, half=True)(x=x)["y"].isinf().all()


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("repvit_m0_9", "fastvit_t8", "efficientformer_l1")]


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", "test_vit", *LARGE])
def test_baseline_models_run(name, tmp_path):
    torch.manual_seed(0)
    model = randomize(timm.create_model(name, num_classes=7)).eval()
    sizes = {"test_vit": 160, "efficientformer_l1": 224}
    x = torch.randn(1, 3, sizes.get(name, 64), sizes.get(name, 64))
    got = Package(convert(model, x, tmp_path))(x=x)["y"]
    with torch.no_grad():
        expected = model(x)
    assert (got - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


@pytest.mark.parametrize("method", ["linear", "palette", "pruned", "blocks"])
def test_compressed_weights_are_what_coremltools_decompresses(method, tmp_path):
    import coremltools as ct
    from coremltools.optimize import coreml as cto

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(6, 64, 5), nn.ReLU(), nn.Conv2d(64, 8, 3)), torch.randn(1, 6, 9, 8)
    path = convert(model, x, tmp_path, target="iOS18" if method == "blocks" else "iOS16")
    with quiet():
        package = ct.models.MLModel(str(path), skip_model_load=True)
        if method == "linear":
            small = cto.linear_quantize_weights(package, cto.OptimizationConfig(cto.OpLinearQuantizerConfig()))
        elif method == "blocks":
            op = cto.OpLinearQuantizerConfig(dtype="int4", granularity="per_block", block_size=2)
            small = cto.linear_quantize_weights(package, cto.OptimizationConfig(op))
        elif method == "palette":
            small = cto.palettize_weights(
                package, cto.OptimizationConfig(cto.OpPalettizerConfig(mode="uniform", nbits=6))
            )
        else:
            config = cto.OpMagnitudePrunerConfig(target_sparsity=0.5)
            small = cto.prune_weights(package, cto.OptimizationConfig(config))
        small.save(str(tmp_path / "small.mlpackage"))
        whole = cto.decompress_weights(small)
        whole.save(str(tmp_path / "whole.mlpackage"))
    compressed = Package(tmp_path / "small.mlpackage")
    assert any(name.startswith("constexpr_") for name in compressed.operators)
    got, expected = compressed(x=x)["y"], Package(tmp_path / "whole.mlpackage")(x=x)["y"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(got, model(x), atol=1e-6)


QUANTIZED = {
    "uint8 with a zero point": ("uint8", 0.03, 77, None),
    "int8 with a zero point": ("int8", 0.03, -9, None),
    "int8 about zero": ("int8", 0.02, None, None),
    "int8 per channel": ("int8", [0.01, 0.02, 0.05], [0, 3, -4], 1),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_activations_are_rounded_as_numpy_does(case, tmp_path):
    import coremltools as ct
    from coremltools.converters.mil import Builder

    dtype, scale, zero_point, axis = QUANTIZED[case]
    scale = np.array(scale, dtype=np.float32)
    zero = None if zero_point is None else np.array(zero_point, dtype=dtype)

    @Builder.program(input_specs=[Builder.TensorSpec(shape=(1, 3, 4, 50))], opset_version=ct.target.iOS17)
    def program(x):
        levels = Builder.quantize(input=x, scale=scale, zero_point=zero, axis=axis, output_dtype=dtype)
        return Builder.dequantize(input=levels, scale=scale, zero_point=zero, axis=axis, name="y")

    with quiet():
        options = {"minimum_deployment_target": ct.target.iOS17, "compute_precision": ct.precision.FLOAT32}
        ct.convert(program, convert_to="mlprogram", **options).save(str(tmp_path / "q.mlpackage"))
    x = 4 * torch.randn(1, 3, 4, 50, generator=torch.Generator().manual_seed(0))
    got = Package(tmp_path / "q.mlpackage")(x=x)["y"]
    step, shift = (np.reshape(value, (-1, 1, 1)) for value in (scale, 0 if zero is None else zero.astype(np.float32)))
    limits = np.iinfo(dtype)
    expected = (np.clip(np.round(x.numpy() / step) + shift, limits.min, limits.max) - shift) * step
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert len(np.unique(got)) > 50


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """Packages that return each channel's mean, by the colors that they take."""
    import coremltools as ct

    folder, found = tmp_path_factory.mktemp("colors"), {}
    for name, chans in (("RGB", 3), ("BGR", 3), ("GRAYSCALE", 1)):
        image = ct.ImageType(
            name="x", shape=(1, chans, 8, 8), scale=1 / 255, color_layout=getattr(ct.colorlayout, name)
        )
        found[name] = convert(Apply(lambda x: x.mean((2, 3))), torch.rand(1, chans, 8, 8), folder, inputs=[image])
    return found


def test_images_are_given_in_the_order_that_is_asked_for(colors):
    image = Image.new("RGB", (8, 8), (255, 51, 0))
    for name, expected in (("RGB", (1, 0.2, 0)), ("BGR", (0, 0.2, 1)), ("GRAYSCALE", (106 / 255,))):
        got = Package(colors[name])(x=image)["y"]
        assert got.flatten().tolist() == pytest.approx(expected, abs=1e-3)


def test_enumerated_sizes_all_run(tmp_path):
    import coremltools as ct

    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    shapes = ct.EnumeratedShapes([(1, 3, size, size) for size in (32, 48, 64)], default=(1, 3, 48, 48))
    path = convert(model, torch.rand(1, 3, 48, 48), tmp_path, inputs=[ct.TensorType(name="x", shape=shapes)])
    package = Package(path)
    assert package.inputs[0].shapes[0] == (1, 3, 48, 48)
    assert len(package.inputs[0].shapes) == 3
    for size in (32, 48, 64):
        x = torch.rand(1, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(package(x=x)["y"], model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"takes 1×3×48×48 or .*, not 1×3×40×40"):
        package(x=torch.rand(1, 3, 40, 40))


def test_what_cannot_be_run_is_one_clear_line(colors, tmp_path):
    with pytest.raises(InputError, match="not a Core ML package"):
        Package(tmp_path)
    with pytest.raises(InputError, match="wants an input 'x'"):
        Package(colors["RGB"])()
    with pytest.raises(InputError, match="takes 1×3×8×8, not 1×3×9×8"):
        Package(colors["RGB"])(x=Image.new("RGB", (8, 9)))
    unknown = convert(Apply(lambda x: x.cumprod(1) + x.sort(1)[0]), torch.rand(1, 3, 4, 4), tmp_path)
    with pytest.raises(InputError, match="operations that are not known here: ") as error:
        Package(unknown)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["no weights", "noise", "cut", "no program"])
def test_damaged_packages_are_one_clear_line(damage, tmp_path):
    path = convert(nn.Conv2d(3, 64, 3), torch.rand(1, 3, 8, 8), tmp_path)
    spec = next(path.rglob("*.mlmodel"))
    if damage == "no weights":
        shutil.rmtree(next(path.rglob("weights")))
    elif damage == "noise":
        spec.write_bytes(bytes(255 - byte for byte in spec.read_bytes()))
    elif damage == "cut":
        spec.write_bytes(spec.read_bytes()[:-200])
    else:
        spec.unlink()
    with pytest.raises(InputError) as error:
        Package(path)(x=torch.rand(1, 3, 8, 8))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
