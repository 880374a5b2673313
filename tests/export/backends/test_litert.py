"""LiteRT: files that give their model's answers, wrong ones that are refused, and files that are damaged."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from ai_edge_litert import schema_py_generated as schema

from shvit.deployment import deploy
from shvit.errors import InputError
from shvit.export.backends import litert as backend
from shvit.export.backends.litert import ChannelsLastSHSA, convert, write_litert
from shvit.export.backends.registry import load_artifact
from shvit.export.formats.litert import constant, delegation, graph_of, layers_of, pack, steps, unpack, write_notes
from shvit.export.formats.litert_edits import invoke, to_planes
from shvit.export.spec import Spec
from shvit.export.verify import certify
from shvit.export.wrappers import feature_maps, layer_outputs, layers, with_attention
from tests.conftest import assert_close, images, randomize
from tests.export.backends.conftest import PX, spec_of
from tests.export.judged import LAYER


@pytest.fixture(scope="module")
def converted(tiny):
    """A model's graph in fp32, as its converter gives it: that takes seconds."""
    return convert(deploy(tiny, PX), spec_of(tiny))


@pytest.fixture
def written(tiny, converted, tmp_path):
    path = tmp_path / "tiny.tflite"
    write_litert(converted, path, spec_of(tiny), ["a", "b"], {})
    return path


@pytest.fixture(scope="module")
def in_int8(workshop, tmp_path_factory):
    """A trained model in int8, without the search for layers to exclude."""
    source = replace(workshop.source, spec=replace(workshop.spec, precision="int8"))
    path = tmp_path_factory.mktemp("int8") / "q.tflite"
    backend.create_writer(source, backend.LitertOptions())(path, replace(source.spec, excluded_layers=workshop.kept()))
    return path


@pytest.fixture(scope="module")
def float_file(workshop, tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "m.tflite"
    content = convert(workshop.source.deployed(), workshop.spec)
    write_litert(content, path, workshop.spec, workshop.reference.labels, {})
    return path


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_file_gives_the_models_answers_in_any_batch_and_names_its_layers(tiny, written):
    artifact, x = load_artifact(written, threads=1), images(3, 3, PX, PX)
    with torch.no_grad():
        assert_close(artifact.run(x)[0], tiny(x))
    assert artifact.labels == ("a", "b")
    expected = layer_outputs(deploy(tiny, PX), x)
    outputs = artifact.run_layers(x)
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():  # activations are apart, though LiteRT computes them within its layers
        assert_close(output, expected[name])


def test_pixels_are_normalized_inside_and_feature_maps_are_the_models(tiny, tmp_path):
    model, names = feature_maps("shvit_s1", tiny)
    spec = spec_of(tiny, uint8_input=True, outputs=names)
    write_litert(convert(deploy(model, PX), spec), tmp_path / "f.tflite", spec, (), {})
    pixels = torch.randint(0, 256, (2, 3, PX, PX), dtype=torch.uint8)
    artifact = load_artifact(tmp_path / "f.tflite")
    with torch.no_grad():
        expected = model(spec.normalize(pixels))
    for output, each in zip(artifact.run(spec.feed(pixels)), expected, strict=True):
        assert_close(output, each)


@pytest.mark.parametrize("grid", [None, (7, 7)])
def test_attention_in_litert_s_order_is_the_models(tiny, grid):
    deployed = deploy(tiny, None if grid is None else 112)
    x = images(2, 3, 112, 112)
    with torch.no_grad():
        assert_close(with_attention(deployed, ChannelsLastSHSA)(x), tiny(x))


def test_delegate_leaves_what_it_does_not_compute(written):
    """XNNPACK takes no weights that are computed, as the product of queries and keys has."""
    partitions, outside = delegation(written)
    assert partitions == 1 + sum(outside.values())
    assert set(outside) == {"FULLY_CONNECTED"}


def test_what_a_delegate_leaves_at_the_end_is_told_too(converted, tmp_path):
    """A graph that ends with the product of queries and keys, which XNNPACK leaves."""
    model = unpack(converted)
    layers = {each.operator.outputs[0] for each in layers_of(model)}
    code = schema.BuiltinOperator.FULLY_CONNECTED
    linear = [each for each in graph_of(model).operators if model.operatorCodes[each.opcodeIndex].builtinCode == code]
    last = next(each for each in linear if each.outputs[0] not in layers)
    graph = graph_of(model)
    graph.operators = graph.operators[: graph.operators.index(last) + 1]
    graph.outputs, model.signatureDefs = last.outputs, []
    (tmp_path / "m.tflite").write_bytes(pack(model))
    assert delegation(tmp_path / "m.tflite")[1] == {"FULLY_CONNECTED": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_mambaout"])
def test_peers_of_timm_are_written_too(tmp_path, name):
    model = randomize(timm.create_model(name)).eval()
    spec = Spec.of(name, model)
    write_litert(convert(deploy(model, spec.img_size), spec), tmp_path / "m.tflite", spec, (), {})
    x = images(1, *spec.shape)
    with torch.no_grad():
        assert_close(load_artifact(tmp_path / "m.tflite").run(x)[0], model(x), 1e-4)


# --- half precision ---------------------------------------------------------------------------------------------------


def test_half_weights_are_rounded_to_nearest_and_values_after_each_operator(tiny, converted, tmp_path):
    path = tmp_path / "m.tflite"
    write_litert(converted, path, spec_of(tiny, precision="fp16"), (), {})
    artifact, x = load_artifact(path, rounded=True), images(2, 3, PX, PX)
    deployed = deploy(tiny, PX)
    for name, layer in layers(deployed):
        assert torch.equal(artifact.parameters()[name].weight.value, layer.weight.half().float())
    output = artifact.run(x)[0]
    with torch.no_grad():
        error = ((output - tiny(x)).abs().max() / tiny(x).abs().max()).item()
    assert 2.0**-15 < error < 2.0**-5
    outputs, expected = artifact.run_layers(x), layer_outputs(deployed, x)
    assert outputs.keys() == expected.keys()
    for name, each in outputs.items():
        assert torch.equal(each, each.half().float())
        assert_close(each, expected[name], 0.02)
    assert artifact.overflow() is None
    assert not torch.isfinite(artifact.run(x * 1e30)[0]).all()
    assert artifact.overflow() == "patch_embed.0"


# --- int8 -------------------------------------------------------------------------------------------------------------


def test_int8_file_holds_its_weights_in_8_bits_and_passes(workshop, in_int8):
    certificate = certify(load_artifact(in_int8), workshop.reference)
    assert certificate.passed
    assert certificate.compared_layers > 20
    model, excluded = unpack(in_int8.read_bytes()), certificate.spec.excluded_layers
    for layer in layers_of(model):
        assert constant(model, layer.weight).dtype == (np.float32 if layer.name in excluded else np.int8)


@torch.no_grad()
def test_int8_layers_are_rounded_as_pytorch_rounds_them(workshop, in_int8):
    """A layer of the file, on what it really gets, against PyTorch's fake quantization and float convolution."""
    model = unpack(in_int8.read_bytes())
    graph, ranges = graph_of(model), workshop.source.ranges()
    parameters, modules = load_artifact(in_int8).parameters(), dict(layers(workshop.source.unfolded()))
    layer = next(each for each in layers_of(model) if f"{each.name}.output" in steps(model) and not each.rectified)
    module, (low, high) = modules[layer.name], ranges[layer.name].input
    scales = module.weight.abs().amax((1, 2, 3)) / 127
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    weight = torch.fake_quantize_per_channel_affine(module.weight.detach(), scales, zeros, 0, -127, 127)
    assert_close(parameters[layer.name].weight.value, weight)
    source = next(each for each in graph.operators if each.outputs[0] == layer.operator.inputs[0])
    graph.outputs, model.signatureDefs = [source.inputs[0], layer.operator.outputs[0]], []
    x, actual = invoke(
        backend.create_interpreter(pack(model), 1), workshop.spec.feed(workshop.reference.pixels(workshop.spec)[:1])
    )
    step = (high - low) / 255
    rounded = torch.fake_quantize_per_tensor_affine(to_planes(x), step, round(-low / step), 0, 255)
    expected = torch.nn.functional.conv2d(
        rounded, weight, module.bias, module.stride, module.padding, module.dilation, module.groups
    )
    low, high = ranges[layer.name].output
    assert (to_planes(actual) - expected.clamp(low, high)).abs().max() <= 1.01 * (high - low) / 255


@pytest.mark.parametrize("which", ["weight", "input", "bias"])
def test_a_wrong_scale_is_refused(workshop, in_int8, tmp_path, which):
    model = unpack(in_int8.read_bytes())
    layer = next(each for each in layers_of(model) if f"{each.name}.output" in steps(model))
    index = {"weight": layer.weight, "input": layer.operator.inputs[0], "bias": layer.operator.inputs[2]}[which]
    about = graph_of(model).tensors[index].quantization
    about.scale = [1.01 * each for each in about.scale]  # LiteRT itself takes no bias that is off by more than 2 %
    (tmp_path / "q.tflite").write_bytes(pack(model))
    certificate = certify(load_artifact(tmp_path / "q.tflite"), workshop.reference)
    assert certificate.passed is False
    assert any(layer.name in fault for fault in certificate.faults)


# --- wrong files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defect", ["one weight off by 1 %", "a bias dropped", "a ReLU missing"])
def test_defects_are_refused(workshop, float_file, tmp_path, defect):
    model = unpack(float_file.read_bytes())
    layer = next(each for each in layers_of(model) if each.name == LAYER)
    if defect == "a ReLU missing":
        layer.operator.builtinOptions.fusedActivationFunction = 0
    else:
        index = layer.weight if defect.startswith("one") else layer.operator.inputs[2]
        values = constant(model, index).copy()
        values.reshape(-1)[np.abs(values).argmax()] *= 1.01
        if defect == "a bias dropped":
            values[:] = 0
        model.buffers[graph_of(model).tensors[index].buffer].data = np.frombuffer(values.tobytes(), np.uint8)
    (tmp_path / "m.tflite").write_bytes(pack(model))
    assert certify(load_artifact(float_file), workshop.reference).passed
    assert certify(load_artifact(tmp_path / "m.tflite"), workshop.reference).passed is False


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "is not a LiteRT model"),
        (lambda data: data[:4] + b"TFL2" + data[8:], "is not a LiteRT model"),
        (lambda data: data[:8], "does not run in litert"),
        (lambda data: data[: len(data) // 2], "does not run in litert"),
        (lambda data: data[:-1000], "does not run in litert"),
        (lambda data: data.replace(b"shvit.spec", b"shvit.spic"), "was not written by `shvit export`"),
        (lambda data: data.replace(b'"num_classes"', b'"num_klasses"'), "num_classes|num_klasses"),
        (lambda data: b"TFL3TFL3" * 100, "does not run in litert"),
    ],
)
def test_damaged_files_are_one_line(written, change, message):
    written.write_bytes(change(written.read_bytes()))
    with pytest.raises(InputError, match=message) as error:
        load_artifact(written)
    assert str(error.value).startswith(str(written))
    assert "\n" not in str(error.value)


def test_a_graph_that_ends_the_process_is_refused(written):
    """LiteRT reads the weights that a shape says are there."""
    model = unpack(written.read_bytes())
    layer = next(layers_of(model))
    graph_of(model).tensors[layer.weight].shape = [4096, 3, 3, 3]
    written.write_bytes(pack(model))
    with pytest.raises(InputError, match="does not run in litert"):
        load_artifact(written)


def test_a_third_party_file_is_timed_but_not_evaluated(written, converted):
    written.write_bytes(converted)
    assert backend.inspect(written) == ((PX, PX), 1, "fp32")
    with pytest.raises(InputError, match="was not written by `shvit export`"):
        load_artifact(written)


def test_notes_that_are_none_are_refused(tiny, converted, written):
    for notes in ({"shvit.spec": "[]", "shvit.format": "1"}, {"shvit.spec": "{", "shvit.format": "1"}):
        model = unpack(converted)
        write_notes(model, notes)
        written.write_bytes(pack(model))
        with pytest.raises(InputError, match=r"tiny\.tflite"):
            load_artifact(written)


def test_a_file_larger_than_any_is_not_read(written):
    with written.open("ab") as file:
        file.truncate(1 << 31)
    with pytest.raises(InputError, match="larger than any"):
        load_artifact(written)
