"""Files of multi-label models and regressions against PyTorch in float64; wrong ones are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from shvit.checkpoint import write_checkpoint
from shvit.cli import run
from shvit.errors import CheckFailed, InputError
from shvit.export.analysis.comparison import Row, markdown
from shvit.export.backends.registry import BACKENDS, load_artifact
from shvit.export.bench.cases import BenchModel, Settings
from shvit.export.browser.served import load_served, prepare_models
from shvit.export.formats.rounding import HALVES
from shvit.export.images import read_pixels, sample_images
from shvit.export.pipeline import export_model, verify_artifact
from shvit.export.source import create_source
from shvit.export.spec import Spec
from shvit.export.verdict import TOLERANCES, allowed_failures, compare, judge, lowest_rate, worst_figures
from shvit.export.verify import Reference, certify
from shvit.weights.resolve import resolve_weights
from shvit.weights.run_info import Task
from tests.task_models import INFOS, LABELS, MEAN, PX, THRESHOLDS, VALUE, draw_labeled, train_for

TASKS: tuple[Task, ...] = ("multi_label", "regression")
OUTPUTS = {"multi_label": ("probabilities",), "regression": ("value",)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images to verify with, in folders that are called as labels are."""
    folder = tmp_path_factory.mktemp("tasks")
    draw_labeled(folder / "val" / LABELS[0], 16, seed=2)
    draw_labeled(folder / "val" / LABELS[1], 16, seed=3)
    return folder


@pytest.fixture(scope="module")
def models(folder) -> dict[Task, nn.Module]:
    """The model of each task, whose checkpoint has the task's name."""
    return {task: train_for(task, folder / f"train-{task}", folder / f"{task}.safetensors") for task in TASKS}


@pytest.fixture(scope="module")
def references(folder, models) -> dict[Task, Reference]:
    return {task: create_source(resolve_weights(None, folder / f"{task}.safetensors"), images=folder / "val").reference
            for task in TASKS}  # fmt: skip


def exported(folder: Path, task: Task, kind: str, precision: str = "fp32", **options: Any):
    """The certificate of a file F.task-precision, and its path."""
    output = folder / f"{task}-{precision}{BACKENDS[kind].ending}"
    calibration = folder / f"train-{task}" if precision == BACKENDS[kind].calibrated else None
    return export_model(kind, None, output, checkpoint=folder / f"{task}.safetensors", precision=precision,
                        images=folder / "val", calibration=calibration, **options), output  # fmt: skip


@pytest.fixture(scope="module")
def sound(folder, models) -> dict[Task, Path]:
    """An ONNX file of each."""
    return {task: exported(folder, task, "onnx")[1] for task in TASKS}


# --- every format -----------------------------------------------------------------------------------------------------

FILES = [
    *((kind, "fp32", "multi_label") for kind in BACKENDS if kind != "executorch"),  # which takes long to convert
    ("onnx", "fp16", "multi_label"),
    ("onnx", "int8", "multi_label"),
    ("onnx", "int8", "regression"),
    ("ncnn", "fp32", "regression"),
]
REST = [(kind, precision, task) for kind, backend in BACKENDS.items() for precision in backend.precisions
        for task in TASKS if (kind, precision, task) not in FILES
        and not (task == "regression" and precision in HALVES)]  # fmt: skip
NEAR = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.08, "int8": 0.15, "w8a8": 0.15}


@pytest.mark.parametrize(
    ("kind", "precision", "task"), [*FILES, *(pytest.param(*each, marks=pytest.mark.slow) for each in REST)]
)
def test_every_format_gives_what_its_task_predicts(folder, models, kind, precision, task):
    certificate, path = exported(folder, task, kind, precision)
    assert certificate.passed, certificate.reasons
    assert (certificate.spec.task, certificate.spec.outputs) == (task, OUTPUTS[task])
    assert certificate.spec.thresholds == (THRESHOLDS if task == "multi_label" else ())
    for figure in ("top1_agreement", "top5_agreement", "accuracy", "model_accuracy"):
        assert getattr(certificate, figure) is None
    assert (certificate.decisions > 80) is (task == "multi_label")
    artifact = load_artifact(path)
    pixels = read_pixels(sample_images(folder / "val"), artifact.spec)
    with torch.no_grad():
        outputs = models[task].double()(artifact.spec.normalize(pixels).double())
    models[task].float()
    expected = outputs.sigmoid() if task == "multi_label" else outputs
    scale = 1 if task == "multi_label" else expected.std()
    np.testing.assert_allclose(artifact(pixels), expected, atol=NEAR[precision] * scale)
    assert artifact.labels == INFOS[task].classes


def test_a_file_is_verified_again_by_its_checkpoint(folder, sound):
    for task, path in sound.items():
        certificate = verify_artifact(path, images=folder / "val")
        assert (certificate.passed, certificate.spec.task) == (True, task)


def test_half_precision_has_no_room_for_what_is_far_from_zero(folder, models, tmp_path):
    """Near 20,000 its numbers are 16 apart, and the values differ by as much."""
    weights = models["regression"].state_dict()
    weights["head.l.bias"] = weights["head.l.bias"] + 18_000
    write_checkpoint(weights, tmp_path / "far.safetensors", INFOS["regression"].metadata)
    options = {"checkpoint": tmp_path / "far.safetensors", "images": folder / "val"}
    with pytest.raises(CheckFailed, match="signal to noise"):
        export_model("onnx", None, tmp_path / "far.onnx", precision="fp16", **options)
    assert export_model("onnx", None, tmp_path / "far.onnx", **options).passed


def test_a_value_far_from_zero_is_evidence_by_what_it_varies(folder, sound, references):
    """Years: outputs differ by 1 % of their size, and by most of what the last layer adds to its bias."""
    values = references["regression"].outputs(PX)[0]
    assert (values.mean() - MEAN).abs() < 40
    assert values.std() < 0.02 * MEAN
    assert certify(load_artifact(sound["regression"]), references["regression"]).evidence > 0.3


# --- wrong files ------------------------------------------------------------------------------------------------------


def behind(*nodes: tuple[str, tuple[Any, ...]]) -> Callable[[Any], None]:
    """Operators with constants behind what the file gives."""

    def change(proto: Any) -> None:
        (output,) = proto.graph.output
        last = next(node for node in proto.graph.node if output.name in node.output)
        last.output[0] = value = "inside"
        for number, (operator, constants) in enumerate(nodes):
            names = [f"constant/{number}/{index}" for index in range(len(constants))]
            for name, constant in zip(names, constants, strict=True):
                proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(constant), name))
            result = output.name if number == len(nodes) - 1 else f"inside/{number}"
            options = {"axis": 1} if operator == "Gather" else {}
            proto.graph.node.append(onnx.helper.make_node(operator, [value, *names], [result], result, **options))
            value = result

    return change


def without_sigmoid(proto: Any) -> None:
    last = proto.graph.node[-1]
    assert last.op_type == "Sigmoid"
    last.op_type = "Identity"


def note(key: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Another text of what a file says of itself."""

    def edit(proto: Any) -> None:
        (entry,) = [each for each in proto.metadata_props if each.key == key]
        entry.value = json.dumps(change(json.loads(entry.value)))

    return edit


WRONG: dict[str, tuple[Task, Callable[[Any], None], str]] = {
    "labels swapped": (
        "multi_label",
        note("shvit.labels", lambda each: [each[1], each[0], *each[2:]]),
        "another order",
    ),
    "outputs swapped": ("multi_label", behind(("Gather", ([1, 0, 2, 3],))), "signal to noise"),
    "no sigmoid": ("multi_label", without_sigmoid, "signal to noise"),
    "sigmoid twice": ("multi_label", behind(("Sigmoid", ())), "signal to noise"),
    "a softmax": ("multi_label", behind(("Softmax", ())), "signal to noise"),
    "other thresholds": (
        "multi_label",
        note("shvit.spec", lambda each: {**each, "thresholds": [0.5, 0.3, 0.6, 0.45]}),
        "label 2 has the threshold 0.6 and the model's 0.7",
    ),
    "no thresholds": (
        "multi_label",
        note("shvit.spec", lambda each: {**each, "thresholds": []}),
        "label 1 has the threshold 0.5 and the model's 0.3",
    ),
    "another task": (
        "multi_label",
        note("shvit.spec", lambda each: {**each, "thresholds": [], "task": "classification"}),
        "its task is classification and the model's multi_label",
    ),
    "offset": ("regression", behind(("Add", (np.float32(0.1),))), "signal to noise"),
    "scale": ("regression", behind(("Mul", (np.float32(1.001),))), "signal to noise"),
    "scale about the mean": (
        "regression",
        behind(("Sub", (np.float32(MEAN),)), ("Mul", (np.float32(1.01),)), ("Add", (np.float32(MEAN),))),
        "signal to noise",
    ),
    "constant": ("regression", behind(("Mul", (np.float32(0),)), ("Add", (np.float32(MEAN),))), "signal to noise"),
    "another value": ("regression", note("shvit.labels", lambda _: ["age"]), "labels that are not the model's"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused(sound, references, tmp_path, name):
    task, change, reason = WRONG[name]
    assert certify(load_artifact(sound[task]), references[task]).passed
    proto = onnx.load(sound[task])
    change(proto)
    onnx.save(proto, tmp_path / "wrong.onnx")
    certificate = certify(load_artifact(tmp_path / "wrong.onnx"), references[task])
    assert certificate.passed is False
    assert reason in "; ".join(certificate.reasons)


# --- decisions on labels ----------------------------------------------------------------------------------------------


def probabilities(images: int, labels: int, offset: float = -2.0) -> torch.Tensor:
    """Logits of labels that most images do not have."""
    return 3 * torch.randn(images, labels, generator=torch.Generator().manual_seed(0)).double() + offset


def test_decisions_are_pairs_of_an_image_and_a_label_beyond_rounding():
    """A certain label is a decision whose change counts, and one near its threshold is none."""
    thresholds = torch.tensor([0.5, 0.3]).double()
    reference = torch.tensor([[0.9, 0.1], [0.1, 0.3001], [0.8, 0.2999]] * 4).double()
    output = reference.clone()
    output[1, 1], output[2, 1] = 0.2999, 0.3001  # near-ties
    output[0, 0] = 0.4
    figures = compare(reference, output, TOLERANCES["int8"], True, thresholds)
    assert (figures["changed"], figures["changed_decisions"]) == (3, 1)
    assert figures["decisions"] == 4 * 4
    assert figures["top1_agreement"] is figures["top5_agreement"] is None
    json.dumps(figures, allow_nan=False)


def test_a_probability_at_its_threshold_is_predicted():
    thresholds = torch.tensor([0.0, 0.5, 1.0]).double()
    reference = torch.tensor([[0.0, 0.5, 1.0]] * 9).double()
    output = torch.tensor([[0.0, 0.4999, 0.9999]] * 9).double()
    assert compare(reference, output, TOLERANCES["fp16"], True, thresholds)["changed"] == 18


@pytest.mark.parametrize("labels", [1, 4, 80, 1000])
@pytest.mark.parametrize("offset", [-6.0, -2.0, 0.0])
def test_noise_within_the_tolerance_turns_hardly_any_decision(labels, offset):
    """Normal noise on logits that leaves probabilities just within the bound; many decisions are left nevertheless."""
    logits, tolerance = probabilities(400, labels, offset), TOLERANCES["int8"]
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()
    thresholds, reference = torch.full((labels,), 0.5).double(), logits.sigmoid()
    low, high = 0.0, 10.0
    for _ in range(40):  # as strong as the bound allows
        middle = (low + high) / 2
        found = compare(reference, (logits + middle * noise).sigmoid(), tolerance, True, thresholds)
        low, high = (middle, high) if found["snr_db"] > tolerance.snr_db else (low, middle)
    figures = compare(reference, (logits + low * noise).sigmoid(), tolerance, True, thresholds)
    assert figures["decisions"] > 0.8 * reference.numel()
    assert figures["changed_decisions"] <= 0.001 * figures["decisions"]
    assert figures["changed"] >= figures["changed_decisions"]
    assert judge({**figures, "changed_decisions": figures["decisions"] // 20}, tolerance, 400)[0] == "refused"


def test_figures_that_mean_nothing_stay_so_in_the_worst_of_several():
    reference = probabilities(9, 3).sigmoid()
    figures = compare(reference, reference, TOLERANCES["fp32"], True, torch.full((3,), 0.5).double())
    assert worst_figures([figures, figures])["top1_agreement"] is None
    assert worst_figures([figures, {**figures, "changed": 2}])["changed"] == 2


def test_allowed_failures_are_the_last_whose_rate_can_be_true():
    for percent, trials in ((0, 50), (1.5, 26), (0.5, 400), (0.1, 3000), (100, 5)):
        expected = next((n - 1 for n in range(1, trials + 1) if lowest_rate(n, trials) > percent / 100), trials)
        assert allowed_failures(percent, trials) == expected


# --- what a file says of itself ---------------------------------------------------------------------------------------

PLAIN = Spec("shvit_s1", 64, 3, 3, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9)


def test_files_of_before_are_those_of_classifiers():
    said = json.loads(PLAIN.to_json())
    assert (said.pop("task"), said.pop("thresholds")) == ("classification", [])
    assert Spec.from_json(json.dumps(said)) == PLAIN


def test_task_and_thresholds_are_read_as_they_were_written():
    said = {**json.loads(PLAIN.to_json()), "task": "multi_label", "outputs": ["probabilities"]}
    spec = Spec.from_json(json.dumps({**said, "thresholds": [0.1, 0, 1]}))
    assert Spec.from_json(spec.to_json()) == spec
    assert spec.label_thresholds.tolist() == [0.1, 0, 1]
    assert Spec.from_json(json.dumps(said)).label_thresholds.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "detection"}, "task"),
        ({"task": 5}, "task"),
        ({"thresholds": [0.5, 0.5, 1.5]}, "thresholds"),
        ({"thresholds": [0.5, -0.1, 0.5]}, "thresholds"),
        ({"thresholds": [0.5, "x", 0.5]}, "thresholds"),
        ({"thresholds": 0.5}, "thresholds"),
        ({"thresholds": [0.5, 0.5]}, "2 thresholds for 3 labels"),
        (
            {"task": "classification", "outputs": ["logits"], "thresholds": [0.5] * 3},
            "a classification model with",
        ),
        ({"outputs": ["logits"]}, "a multi-label model that gives logits"),
        ({"outputs": ["value"]}, "a multi-label model that gives value"),
        ({"task": "regression", "outputs": ["value"]}, "a regression with 3 outputs"),
        ({"task": "regression", "num_classes": 1, "outputs": ["logits"]}, "a regression model that gives logits"),
        ({"task": "classification", "outputs": ["value"]}, "a classification model that gives value"),
    ],
    ids=str,
)
def test_tasks_that_contradict_the_rest_are_one_line(changes, message):
    said = {**json.loads(PLAIN.to_json()), "task": "multi_label", "outputs": ["probabilities"]}
    with pytest.raises(InputError, match=message) as refused:
        Spec.from_json(json.dumps({**said, **changes}))
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError):
        Spec.from_json(json.dumps({**said, "thresholds": [float("nan")] * 3}))


def test_a_run_whose_model_has_other_outputs_is_one_line():
    model = torch.nn.Conv2d(3, 3, 1)
    model.num_classes = 3
    for info, message in ((INFOS["regression"], "a regression with 3 outputs"), (INFOS["multi_label"], "4 thresholds")):
        with pytest.raises(
            InputError, match=rf"m: its run says that it is .*{message}.*; take the checkpoint"
        ) as refused:
            Spec.of("m", model, info=info)
        assert "\n" not in str(refused.value)


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("multi_label", ["onnx", "--softmax"], "--softmax does not apply: a multi-label model gives the probability"),
        ("multi_label", ["coreml", "--classifier"], "--classifier does not apply: a multi-label model"),
        ("regression", ["onnx", "--softmax"], "--softmax does not apply: the model has one output"),
        ("regression", ["coreml", "--classifier"], "--classifier does not apply: the model has one output"),
    ],
)
def test_options_of_classifiers_are_refused(folder, models, tmp_path, task, words, message):
    output = tmp_path / f"x{BACKENDS[words[0]].ending}"
    with pytest.raises(InputError, match=message) as refused:
        run(["export", *words, "--checkpoint", f"{folder}/{task}.safetensors", "--output", str(output)])
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_the_terminal_shows_what_means_something(folder, sound, capsys):
    shown = {}
    for task, path in sound.items():
        result = run(["verify", str(path), "--images", str(folder / "val")])
        assert result["top1_agreement"] is None
        shown[task] = capsys.readouterr().out
    assert "top-1" not in "".join(shown.values())
    assert "labels on another side" in shown["multi_label"]
    assert "labels on another side" not in shown["regression"]


def test_feature_maps_are_those_of_any_model(folder, models, tmp_path):
    checkpoint = folder / "multi_label.safetensors"
    certificate = export_model("onnx", None, tmp_path / "f.onnx", checkpoint=checkpoint, outputs="features",
                               images=folder / "val")  # fmt: skip
    assert certificate.passed
    assert certificate.spec.task == "multi_label"
    assert certificate.top1_agreement is None


def test_the_table_of_formats_has_no_column_of_top_1(folder, sound):
    certificate = json.loads(Path(f"{sound['multi_label']}.certificate.json").read_text())
    table = markdown([Row("ONNX fp32", BACKENDS["onnx"], certificate)])
    assert "top-1" not in table
    assert "SNR dB" in table


def test_models_are_timed_with_what_their_files_give(folder, models, tmp_path):
    settings = Settings(threads=1, checkpoint=folder / "multi_label.safetensors")
    path = BenchModel("tiny_labels", settings, tmp_path).file("onnx", "fp32")
    assert load_artifact(path).spec.outputs == ("probabilities",)


def test_the_page_that_shows_one_class_refuses_them(folder, models, sound, tmp_path):
    for task, word in (("multi_label", "multi-label"), ("regression", "regression")):
        with pytest.raises(InputError, match=f"is a {word} model, and the page shows") as refused:
            load_served(sound[task])
        assert "\n" not in str(refused.value)
        settings = Settings(threads=1, checkpoint=folder / f"{task}.safetensors")
        with pytest.raises(InputError, match=f"{INFOS[task].model}: is a {word} model"):
            prepare_models([INFOS[task].model], ["fp32"], settings, None, tmp_path)


def test_the_name_of_a_value_is_written_and_may_be_given(folder, models, sound, tmp_path):
    assert load_artifact(sound["regression"]).labels == (VALUE,)
    (tmp_path / "labels.txt").write_text("age\n")
    with pytest.raises(InputError, match=r"labels\.txt: class 0 of the model is 'year'"):
        export_model("onnx", None, tmp_path / "x.onnx", checkpoint=folder / "regression.safetensors",
                     labels=tmp_path / "labels.txt")  # fmt: skip
