"""ncnn: files that give their model's answers, wrong ones that are refused, and files that ncnn must not be given."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from shvit.deployment import deploy
from shvit.errors import InputError
from shvit.export.backends import ncnn as backend
from shvit.export.backends.ncnn import write_ncnn
from shvit.export.backends.registry import load_artifact
from shvit.export.formats.ncnn import (
    extract,
    layer_parameters,
    open_net,
    read_graph,
    read_tensors,
    round_weights,
    separate_activations,
    to_mat,
)
from shvit.export.formats.ncnn_param import format_param, parse_param
from shvit.export.formats.rounding import HALVES
from shvit.export.spec import Spec
from shvit.export.verify import certify
from shvit.export.wrappers import feature_maps, layer_outputs, layers
from shvit.fold import DeployedSHSA
from tests.conftest import assert_close, create_tiny, images, randomize
from tests.export.backends.conftest import PX, spec_of
from tests.export.judged import GRAPH_DEFECTS, LAYER, WEIGHT_DEFECTS


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """A model in fp32; tests copy it before they change it."""
    path = tmp_path_factory.mktemp("ncnn") / "tiny.ncnn.param"
    write_ncnn(deploy(tiny, PX), path, spec_of(tiny), ["a", "b"])
    return path


@pytest.fixture
def copied(written, tmp_path):
    for file in written.parent.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path / written.name


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_file_gives_the_models_answers_in_any_batch_and_names_its_layers(tiny, written):
    artifact, x = load_artifact(written, threads=1), images(3, 3, PX, PX)
    with torch.no_grad():
        assert_close(artifact.run(x)[0], tiny(x))
    assert artifact.labels == ("a", "b")
    expected = layer_outputs(deploy(tiny, PX), x)
    outputs = artifact.run_layers(x)
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():  # activations are apart, though ncnn computes them within its layers
        assert_close(output, expected[name])


def test_pixels_are_normalized_inside_as_ncnn_reads_them_from_an_image(tiny, tmp_path):
    spec = spec_of(tiny, uint8_input=True)
    write_ncnn(deploy(tiny, PX), tmp_path / "m.ncnn.param", spec)
    pixels = torch.randint(0, 256, (2, 3, PX, PX), dtype=torch.uint8)
    with torch.no_grad():
        assert_close(load_artifact(tmp_path / "m.ncnn.param")(pixels), tiny(spec.normalize(pixels)))


def test_feature_maps_are_the_models(tiny, tmp_path):
    model, names = feature_maps("shvit_s1", tiny)
    write_ncnn(deploy(model, PX), tmp_path / "f.ncnn.param", spec_of(tiny, outputs=names))
    x = images(2, 3, PX, PX)
    with torch.no_grad():
        for output, expected in zip(load_artifact(tmp_path / "f.ncnn.param").run(x), model(x), strict=True):
            assert_close(output, expected)


class Attending(nn.Module):
    """Convolutions with PyTorch's own attention between them, as in MobileNetV4's hybrids."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Conv2d(3, 24, 8, 8), nn.Linear(8, 5)

    def forward(self, x):
        q, k, v = (part.flatten(2).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=1))
        x = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return self.head(x.mean(1))


def test_pytorchs_attention_is_a_layer_of_ncnn(tmp_path):
    torch.manual_seed(0)
    model, x = Attending().eval(), 3 * images(2, 3, PX, PX)
    write_ncnn(model, path := tmp_path / "m.ncnn.param", replace(spec_of(model), num_classes=5))
    artifact = load_artifact(path)
    assert artifact.operators["SDPA"] == 1
    with torch.no_grad():
        assert_close(artifact.run(x)[0], model(x))


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_mambaout"])
def test_peers_of_timm_are_written_too(tmp_path, name):
    model = randomize(timm.create_model(name)).eval()
    spec = replace(Spec.of(name, model), img_size=PX)
    write_ncnn(deploy(model, PX), tmp_path / "m.ncnn.param", spec)
    x = images(1, 3, PX, PX)
    with torch.no_grad():
        assert_close(load_artifact(tmp_path / "m.ncnn.param").run(x)[0], model(x), 1e-4)


# --- half precision ---------------------------------------------------------------------------------------------------


def test_the_convolutions_that_ncnn_computes_wrongly_in_float16_are_kept_from_it(tiny, written):
    """3×3 depthwise ones with stride 2, on ARM; tests/export/arm64 runs them."""
    kept = {layer.name for layer in read_graph(written) if layer.int(backend.FEATURES) & 1}
    convolutions = {name: layer for name, layer in layers(deploy(tiny, PX)) if isinstance(layer, nn.Conv2d)}
    stride_2 = {name for name, each in convolutions.items() if each.groups > 1 and each.stride == (2, 2)}
    assert kept == stride_2 != set()


def test_half_weights_are_rounded_to_nearest_and_small_ones_are_kept(written):
    """pnnx itself makes 0 of what float16 has only below its normal numbers."""
    graph, data = read_graph(written), written.with_suffix(".bin").read_bytes()
    layer = next(each for each in graph if each.name == LAYER.replace("1.blocks", "0.blocks"))
    small = np.frombuffer(data, np.float32).copy()
    small[1:9] = 3e-5
    halves = layer_parameters(graph, round_weights(graph, small.tobytes(), torch.float16, torch.float16), ())
    exact = layer_parameters(graph, small.tobytes(), ())
    for name, each in exact.items():
        assert torch.equal(halves[name].weight.value, each.weight.value.half().float())
        assert torch.equal(halves[name].bias.value, each.bias.value)
    assert (halves["patch_embed.0"].weight.value.flatten()[:8] > 0).all()
    assert layer.name in halves


@pytest.mark.parametrize("precision", HALVES)
def test_values_are_rounded_after_each_layer(tiny, tmp_path, precision):
    path = tmp_path / "m.ncnn.param"
    write_ncnn(deploy(tiny, PX), path, spec_of(tiny, precision=precision))
    assert path.with_suffix(".bin").stat().st_size < 0.6 * 4 * sum(each.numel() for each in tiny.parameters())
    artifact, x = load_artifact(path, rounded=True), images(2, 3, PX, PX)
    output = artifact.run(x)[0]
    with torch.no_grad():
        error = ((output - tiny(x)).abs().max() / tiny(x).abs().max()).item()
    bits = {"fp16": 11, "bf16": 8}[precision]
    assert 2.0 ** -(bits + 4) < error < 2.0 ** -(bits - 6)
    assert torch.equal(output, output.to(HALVES[precision]).float())
    assert all(torch.equal(each, each.to(HALVES[precision]).float()) for each in artifact.run_layers(x).values())
    assert artifact.overflow() is None
    large = artifact.run(x * 1e30)[0] if precision == "fp16" else torch.full((1,), torch.inf)
    assert not torch.isfinite(large).all()


# --- int8 -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_int8(workshop, tmp_path_factory):
    """A trained model in int8, without the search for layers to exclude."""
    source = replace(workshop.source, spec=replace(workshop.spec, precision="int8"))
    path = tmp_path_factory.mktemp("int8") / "q.ncnn.param"
    backend.create_writer(source, backend.NcnnOptions())(path, replace(source.spec, excluded_layers=workshop.kept()))
    return path


def test_int8_file_is_smaller_and_holds(workshop, in_int8, tmp_path):
    certificate = certify(load_artifact(in_int8), workshop.reference)
    assert certificate.passed
    assert certificate.compared_layers > 20
    write_ncnn(workshop.source.deployed(), tmp_path / "m.ncnn.param", workshop.spec)
    assert in_int8.with_suffix(".bin").stat().st_size < 0.6 * (tmp_path / "m.ncnn.bin").stat().st_size


@torch.no_grad()
def test_int8_weights_and_inputs_are_rounded_as_pytorch_rounds_them(workshop, in_int8):
    """Each layer of the file, on what it really gets, against PyTorch's fake quantization and float convolution."""
    graph, data = read_graph(in_int8), in_int8.with_suffix(".bin").read_bytes()
    ranges = {name: each.input[1] for name, each in workshop.source.ranges(symmetric=True).items()}
    parameters, modules = layer_parameters(graph, data, ()), dict(layers(workshop.source.unfolded()))
    layer = next(each for each in graph if each.type == "Convolution" and each.int(8) and each.int(9) == 0)
    module = modules[layer.name]
    scales = module.weight.abs().amax((1, 2, 3)) / 127
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    weight = torch.fake_quantize_per_channel_affine(module.weight.detach(), scales, zeros, 0, -127, 127)
    assert_close(parameters[layer.name].weight.value, weight)
    net = open_net(separate_activations(graph), in_int8.with_suffix(".bin"), 1, keep=True)
    extractor = net.create_extractor()
    pixels = to_mat(workshop.reference.pixels(workshop.spec)[0].float())
    extractor.input("image", pixels)
    x = extract(extractor, layer.inputs[0])[None]
    rounded = torch.fake_quantize_per_tensor_affine(x, ranges[layer.name] / 127, 0, -127, 127)
    expected = torch.nn.functional.conv2d(
        rounded, weight, module.bias, module.stride, module.padding, module.dilation, module.groups
    )
    assert_close(extract(extractor, layer.outputs[0])[None], expected, 1e-4)


@pytest.mark.parametrize("which", ["a weight channel's scale", "the scale of an input"])
def test_a_wrong_scale_is_refused(workshop, in_int8, tmp_path, which):
    for file in in_int8.parent.iterdir():
        shutil.copy(file, tmp_path)
    path, weights = tmp_path / in_int8.name, tmp_path / "q.ncnn.bin"
    graph, data = read_graph(path), weights.read_bytes()
    layer, values = next((layer, values) for layer, values in read_tensors(graph, data) if layer.int(8))
    scales = values[-2 if which.startswith("a weight") else -1].value.numpy().copy()
    place = data.index(scales.tobytes())
    scales[0] *= 2
    weights.write_bytes(data[:place] + scales.tobytes() + data[place + scales.nbytes :])
    certificate = certify(load_artifact(path), workshop.reference)
    assert certificate.passed is False
    assert any(layer.name in fault for fault in certificate.faults)


# --- wrong files ------------------------------------------------------------------------------------------------------


def certificate_of(workshop, model, path: Path):
    write_ncnn(model, path, workshop.spec, workshop.reference.labels)
    return certify(load_artifact(path), workshop.reference)


def test_layer_norm_is_computed_wrongly_by_ncnn_and_refused(workshop, tmp_path, monkeypatch):
    """Its outputs look alike: what other exporters check, a cosine of 0.9, passes some of them."""
    sound = certificate_of(workshop, workshop.source.deployed(), tmp_path / "sound.ncnn.param")
    assert sound.passed
    assert sound.compared_layers > 20
    monkeypatch.setattr(backend, "GroupedSHSA", DeployedSHSA)
    wrong = certificate_of(workshop, workshop.source.deployed(), tmp_path / "wrong.ncnn.param")
    assert wrong.passed is False


@pytest.mark.parametrize("defect", ["one weight off by 1 %", "a ReLU missing"])
def test_defects_are_refused(workshop, tmp_path, defect):
    model = {**WEIGHT_DEFECTS, **GRAPH_DEFECTS}[defect](workshop.model)
    assert certificate_of(workshop, model, tmp_path / "m.ncnn.param").passed is False


# --- files ------------------------------------------------------------------------------------------------------------


def test_graph_is_written_as_it_was_read(written):
    assert format_param(parse_param(written.read_text())) == written.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("7767517", "7767518"), "does not begin with 7767517"),
        (lambda text: text[: len(text) // 2], "has .* layers and .* blobs, and says|describes no layer|names that it"),
        (lambda text: text.replace("\nInput", "\nInput\nInput", 1), "describes no layer"),
        (lambda text: text.replace(" 1 1 image ", " 1 1 nowhere "), "reads nowhere before it is computed"),
        (lambda text: text.replace("6=54", "6=900000000"), r"does not belong to tiny\.ncnn\.param \(ends within"),
        (lambda text: text.replace("6=54", "6=-5"), "must come from one export"),
        (lambda text: text.replace("6=54", "6=x"), "is not a readable ncnn model"),
        (lambda text: text.replace("-23300=2,", "-23300=20000,"), "array that is not as long as it says"),
        (lambda text: text.replace("GroupNorm ", "Made up   "), "describes no layer|names that it counts"),
        (lambda text: text.replace("GroupNorm ", "Invented  "), "holds a layer Invented"),
        (lambda text: text.replace(" image", " picture"), "has the inputs picture"),
        (lambda text: re.sub(r"(Concat .*) 0=0", r"\1 0=3", text), "does not run in ncnn"),  # a segmentation fault
        (lambda text: text + "x" * (9 << 20), "larger than any .param file"),
        (lambda text: "\udcff\x00" + text, "is not a readable ncnn model"),
    ],
)
def test_a_graph_that_contradicts_itself_is_refused(copied, change, message):
    text = copied.read_text()
    assert change(text) != text
    copied.write_bytes(change(text).encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message) as error:
        load_artifact(copied)
    assert str(error.value).startswith(f"{copied.parent}/tiny.ncnn.")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, 1, 1000, -4, -1])
def test_weights_that_are_cut_off_are_refused(copied, length):
    weights = copied.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(InputError, match=r"does not belong to tiny\.ncnn\.param"):
        load_artifact(copied)


def test_weights_of_another_model_are_refused(copied, tmp_path):
    other = create_tiny(depth=(1, 1, 1), num_classes=3)
    write_ncnn(deploy(other, PX), tmp_path / "other.ncnn.param", spec_of(other))
    shutil.copy(tmp_path / "other.ncnn.bin", copied.with_suffix(".bin"))
    with pytest.raises(InputError, match="does not belong to"):
        load_artifact(copied)
    shutil.copy(tmp_path / "other.ncnn.json", copied.with_suffix(".json"))
    with pytest.raises(InputError, match="does not belong to"):
        load_artifact(copied)


def test_a_model_without_our_notes_is_timed_but_not_evaluated(copied):
    copied.with_suffix(".json").unlink()
    assert backend.inspect(copied) == ((PX, PX), 1, "fp32")
    with pytest.raises(InputError, match="was not written by `shvit export`"):
        load_artifact(copied)


def test_notes_that_are_none_are_refused(copied):
    notes = json.loads(copied.with_suffix(".json").read_text())
    for content in ("[]", "{", json.dumps({**notes, backend.POINTWISE_KEY: "5"}), json.dumps({"a": 5})):
        copied.with_suffix(".json").write_text(content)
        with pytest.raises(InputError, match=r"tiny\.ncnn"):
            load_artifact(copied)


def test_operations_that_ncnn_lacks_are_named(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return torch.special.erfinv(self.conv(x).tanh()).mean((2, 3))

    with pytest.raises(InputError, match=r"has operations that ncnn lacks: .*erfinv"):
        write_ncnn(Odd().eval(), tmp_path / "m.ncnn.param", spec_of(create_tiny(), num_classes=4))
    assert not list(tmp_path.iterdir())
