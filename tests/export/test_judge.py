"""The judge is judged: files with one deliberate defect are refused, sound ones are not."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from shvit.export.backends.registry import BACKENDS, load_artifact
from shvit.export.formats.parameters import LayerParameters, Stored, compare_parameters, range_faults
from shvit.export.labels import label_faults
from shvit.export.pipeline import export
from shvit.export.spec import Spec
from shvit.export.verdict import MAX_DB, TOLERANCES, compare, judge, snr_db
from shvit.export.verify import (
    LAYER_IMAGES,
    Reference,
    preprocessing_faults,
    stem_gray_levels,
)
from shvit.export.wrappers import layer_outputs, layers, run_batches
from tests.conftest import create_tiny
from tests.export.judged import (
    COREML_SCALE_DEFECTS,
    COREML_WEIGHT_DEFECTS,
    GRAPH_DEFECTS,
    ONNX_GRAPH_DEFECTS,
    SCALE_DEFECTS,
    WEIGHT_DEFECTS,
    Workshop,
    draw_images,
    inner_spec_defects,
    judged,
    spec_defects,
)

SPEC = Spec("tiny_vit", 64, 3, 10, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875)
FORMATS = {
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "bf16", "int8"),
    "coreml": ("fp32", "fp16", "int8", "w8a8"),
}
FILES = [(kind, precision) for kind, precisions in FORMATS.items() for precision in precisions]


def defects_of(kind: str, precision: str) -> list[str]:
    """All that a file of this format can have."""
    graph = GRAPH_DEFECTS if kind == "coreml" else ONNX_GRAPH_DEFECTS
    names = [*spec_defects(SPEC), *inner_spec_defects(SPEC), *WEIGHT_DEFECTS, *graph]
    names += ["labels permuted", "a softmax twice"]
    if precision == "fp16" or (kind == "coreml" and precision in ("int8", "w8a8")):
        names.append("float16 overflows")  # bfloat16 reaches as far as float32, and int8 learns its ranges
    if kind == "coreml":
        names += {"int8": COREML_WEIGHT_DEFECTS, "w8a8": COREML_SCALE_DEFECTS}.get(precision, ())
    elif precision == "int8":
        names += SCALE_DEFECTS
    return names


QUICK = {
    *(("onnx", "fp32", defect) for defect in (*WEIGHT_DEFECTS, *ONNX_GRAPH_DEFECTS, "inside: off by 2 gray levels")),
    ("onnx", "fp32", "said: another filter"),
    ("onnx", "fp32", "labels permuted"),
    *(("onnx", "fp16", defect) for defect in ("one weight off by 1 %", "a bias dropped", "BatchNorm's eps wrong")),
    *(("onnx", "fp16", defect) for defect in ("float16 overflows", "inside: off by 2 gray levels")),
    *(("onnx", "int8", defect) for defect in SCALE_DEFECTS),
    *(("onnx", "int8", defect) for defect in ("one weight off by 1 %", "BatchNorm's eps wrong")),
    ("onnx", "int8", "inside: off by 2 gray levels"),
}
"""What the ordinary tests try; the rest is `-m slow`."""
CASES = [(*file, defect) for file in FILES for defect in defects_of(*file)]


def marked(cases):
    return [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in cases]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("judge"))


def test_every_quick_case_is_one_of_the_table():
    assert set(CASES) >= QUICK
    assert len(CASES) == len(set(CASES))


SOUND = [pytest.param(*file, marks=() if file[0] == "onnx" else pytest.mark.slow) for file in FILES]


@pytest.mark.parametrize(("kind", "precision"), SOUND)
def test_the_file_without_a_defect_is_not_refused(workshop, kind, precision):
    assert judged(workshop.sound(kind, precision), workshop.reference) == ("passed", "")


@pytest.mark.parametrize("precision", FORMATS["onnx"])
def test_sound_files_of_two_classes_are_not_refused(workshop, precision):
    assert judged(*workshop.two_classes(precision)) == ("passed", "")


@pytest.mark.parametrize(("kind", "precision", "defect"), marked(CASES))
def test_defect_is_refused(workshop, kind, precision, defect):
    verdict, why = judged(*workshop.defective(kind, precision, defect))
    assert verdict == "refused"
    assert why


# --- sound files ------------------------------------------------------------------------------------------------------

COUNTS = {"onnx": (8, 26, 500, 2600), "openvino": (8, 26, 500, 2600), "coreml": (8, 26, 500)}
"""Images; our evaluator of Core ML packages is slow."""
EXPORTED = {"onnx": 200, "openvino": 200, "coreml": 26}
"""Images on which a file is verified when it is written, and its layers for float32 are chosen."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_sound_files_are_accepted_for_any_number_of_classes_and_images(tmp_path, classes, seed):
    """The file is run once; fewer images are some of its outputs."""
    workshop = Workshop(tmp_path, classes, images=2600, seed=seed)
    reference = workshop.reference
    # At random: classes take turns in the images' order.
    order = torch.randperm(2600, generator=torch.Generator().manual_seed(seed))
    sources = {}
    for count in sorted(set(EXPORTED.values())):
        few = [reference.images[index] for index in order[:count]]
        drawn = replace(reference, images=few, _pixels={}, _outputs={}, _gray_levels={})
        sources[count] = replace(workshop.source, reference=drawn)
    for kind, precision in FILES:
        source = sources[EXPORTED[kind]]
        path = tmp_path / f"sound{BACKENDS[kind].suffix}"
        backend = BACKENDS[kind]
        export(backend, path, replace(source, spec=replace(source.spec, precision=precision)), backend.all_options)
        artifact = load_artifact(path, 1, rounded=True)
        most = max(COUNTS[kind])
        (got,) = run_batches(
            lambda pixels, artifact=artifact: artifact.run(artifact.spec.feed(pixels)),
            reference.pixels(artifact.spec)[:most],
        )
        (expected,) = reference.outputs(64)
        for count in COUNTS[kind]:
            chosen = order[order < most][:count]
            figures = compare(expected[chosen], got[chosen], TOLERANCES[precision])
            assert judge(figures, TOLERANCES[precision], count) == ("passed", []), (kind, precision, count)


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Of an untrained model, for what needs no outputs."""
    model = create_tiny()
    spec = Spec.of("tiny_vit", model, 64)
    return Reference(model, spec, draw_images(tmp_path_factory.mktemp("parts") / "drawn", 3, 9), "drawn")


def test_gray_levels_are_those_that_a_wrong_mean_moves(reference):
    spec = reference.spec
    assert preprocessing_faults(spec, reference, {}) == (pytest.approx(0, abs=0.01), [])
    for levels, refused in ((0.5, False), (2.0, True), (-3.0, True)):
        told = replace(spec, mean=tuple(each + levels / 255 for each in spec.mean))
        found, faults = preprocessing_faults(told, reference, {})
        assert found == pytest.approx(abs(levels), abs=0.01)
        assert (f"preprocessing is off by {abs(levels):.1f} gray levels (at most 1)" in faults) == refused
    told = replace(spec, in_chans=1, mean=(0.5,), std=(0.5,))
    assert preprocessing_faults(told, reference, {})[0] == 255


def first_output(reference: Reference, **changes) -> dict[str, torch.Tensor]:
    """What the first layer gives behind a normalization with other constants."""
    wrong = replace(reference.spec, **changes)
    return layer_outputs(reference.deployed, wrong.normalize(reference.pixels(wrong)[:LAYER_IMAGES]))


def test_gray_levels_inside_a_file_are_found_in_what_its_first_layer_gives(reference):
    spec = reference.spec
    assert reference.stem == "patch_embed.0"
    assert stem_gray_levels(first_output(reference), reference) < 1e-3
    one = (spec.mean[0], spec.mean[1] + 3 / 255, spec.mean[2])
    assert stem_gray_levels(first_output(reference, mean=one), reference) == pytest.approx(3, rel=0.1)
    levels, (fault,) = preprocessing_faults(spec, reference, first_output(reference, mean=one))
    assert levels == pytest.approx(3, rel=0.1)
    assert "the first layer is given colors that are off by" in fault
    two = tuple(each + 2 / 255 for each in spec.mean)
    for limit, refused in ((1.0, True), (4.0, False)):  # of 8-bit weights alone, and of 8-bit sums
        assert bool(preprocessing_faults(spec, reference, first_output(reference, mean=two), limit)[1]) == refused
    wide = tuple(1.02 * each for each in spec.std)  # 2 per cent of the distance of black or white from the mean
    expected = 0.02 / 1.02 * 255 * max(max(mean, 1 - mean) for mean in spec.mean)
    assert stem_gray_levels(first_output(reference, std=wide), reference) == pytest.approx(expected, rel=0.1)
    noisy = {name: output * (1 + 2**-8 * torch.randn(output.shape)) for name, output in first_output(reference).items()}
    assert stem_gray_levels(noisy, reference) < 0.2
    assert stem_gray_levels({}, reference) == 0


@torch.no_grad()
def test_what_the_rounding_of_the_first_layers_weights_moves_is_no_other_color(reference):
    coarse = replace(reference, model=copy.deepcopy(reference.model))
    layer = coarse.deployed.get_submodule(reference.stem)
    steps = layer.weight.flatten(1).abs().amax(1)[:, None, None, None] / 7
    layer.weight.copy_((layer.weight / steps).round() * steps)
    layer.bias += 0.01
    stem = read_back(coarse.deployed)[reference.stem]
    given = first_output(coarse)
    assert stem_gray_levels(given, reference) > 1
    assert stem_gray_levels(given, reference, stem) < 1e-3
    two = tuple(each + 2 / 255 for each in reference.spec.mean)
    levels, _ = preprocessing_faults(reference.spec, reference, first_output(coarse, mean=two), 1.0, stem)
    assert levels == pytest.approx(2, rel=0.2)


def read_back(model: nn.Module, weight=lambda weight: weight, bias=lambda bias: bias, rounding: float = 2.0**-9):
    """A file's parameters: the model's, changed, stored in a format that rounds by so much at most."""
    return {
        name: LayerParameters(*(Stored(each, each.abs() * rounding)
                                for each in (weight(layer.weight.detach()), bias(layer.bias.detach()))))
        for name, layer in layers(model)
    }  # fmt: skip


def faults_of(parameters, model) -> str:
    return "; ".join(compare_parameters(parameters, model).faults)


def test_weights_of_a_file_are_held_against_the_models_one_by_one(reference):
    model = reference.deployed
    generator = torch.Generator().manual_seed(0)

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * (1 + 2.0**-9 * (2 * torch.rand(tensor.shape, generator=generator) - 1))

    sound = read_back(model, rounded, rounded)
    assert compare_parameters(sound, model).compared == len(sound) == 45
    assert faults_of(sound, model) == ""
    name = "stages.1.blocks.0.ffn.m.pw1"
    one = sound[name].weight.value.clone()
    one[3, 2] *= 1.01
    wrong = replace(sound[name], weight=Stored(one, sound[name].weight.rounding))
    assert f"a weight of {name}" in faults_of({**sound, name: wrong}, model)


def test_rounding_has_no_direction(reference):
    """A thousandth more is less than bfloat16 rounds a weight by, but not than all weights together."""
    model, name = reference.deployed, "stages.1.blocks.0.ffn.m.pw1"
    sound, larger = read_back(model), read_back(model, lambda weight: 1.001 * weight)
    assert faults_of({**sound, name: larger[name]}, model).startswith(f"the scale of {name}'s weights")
    slightly = read_back(model, lambda weight: (1 + 1.2e-4) * weight)
    assert faults_of(slightly, model).startswith("the scale of all weights")


def test_biases_are_compared_and_one_that_is_missing_is_named(reference):
    model, name = reference.deployed, "head"
    sound = read_back(model)
    moved = read_back(model, bias=lambda bias: 1.01 * bias)
    assert faults_of({**sound, name: moved[name]}, model).startswith(f"a bias of {name}")
    missing = {**sound, name: replace(sound[name], bias=None)}
    assert f"the bias of {name}, which is missing" in faults_of(missing, model)


def test_scales_and_zero_points_stand_for_the_ranges_that_were_learned():
    learned = {"a": (-1.0, 1.55), "b": (0.0, 2.55), "c": (-1.0, 1.0)}
    assert range_faults(learned, {"a": (0.01, 100.0), "b": (0.01, 0.0)}) == []
    assert range_faults(learned, {"c": (2 / 255, 127.0)}) == range_faults(learned, {"c": (2 / 255, 128.0)}) == []
    assert range_faults(learned, {"other": (3.0, 7.0)}) == []
    for wrong in ({"a": (0.01, 101.0)}, {"a": (0.02, 100.0)}, {"b": (0.01, 1.0)}, {"b": (0.0101, 0.0)}):
        (fault,) = range_faults(learned, wrong)
        assert "in place of" in fault


def test_infinite_outputs_are_as_far_as_can_be():
    assert snr_db(torch.ones(2), torch.tensor([1.0, float("inf")])) == -MAX_DB
    assert snr_db(torch.ones(2), torch.tensor([1.0, float("nan")])) == -MAX_DB


def test_labels_are_the_models_in_its_order():
    assert label_faults(["a", "b"], ["a", "b"]) == label_faults([], ["a"]) == label_faults(["a"], []) == []
    assert "class 0 is called 'b' and is 'a'" in label_faults(["b", "a"], ["a", "b"])[0]
    assert "'c'" in label_faults(["a", "c"], ["a", "b"])[0]
