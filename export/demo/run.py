"""The whole line on real images: train → export → verify → evaluate → time → one page.

Each step is the command that a user would type, run through the command table.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shvit import terminal
from shvit.cli import run
from shvit.errors import CheckFailed
from shvit.files import check_output_folder, check_replaceable
from shvit.train.data.datasets import open_dataset
from shvit.train.data.eval_loader import eval_loader
from shvit.train.evaluate import Evaluation, evaluate

from ..backends.registry import Predict, open_artifact, torch_predict
from ..bench.records import disturbance, measurements_from
from . import report

TIMED = ("shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4")
SHOWN = 18  # images in the page
SHOWN_WRONG = 6
NEAR_TIES = 0.5  # percent: on another processor an image whose two highest logits are equal may turn
console = terminal.console()


@dataclass(frozen=True)
class Accuracy:
    """The held-out images, through PyTorch and through the exported file."""

    torch: Evaluation
    onnx: Evaluation


def demo(output: Path, data: Path | None = None, epochs: int | None = None) -> dict[str, Any]:
    """Runs the line into the folder `output` and writes `output`/report.html.

    Args:
        data: a folder of class folders; elpv-dataset's solar cells where None.
        epochs: of training; the recipe's where None.

    Returns:
        What each step returned, and the seconds it took.

    Raises:
        CheckFailed: an artifact drifts, or the ONNX file's accuracy is further from PyTorch's than near-ties explain.
    """
    check_output_folder(output)
    check_replaceable(output / "report.html")
    seconds: dict[str, float] = {}

    def step(name: str, *argv: object) -> dict[str, Any]:
        words = [str(word) for word in argv]
        console.rule(name)
        console.print("$ shvit " + " ".join(words))
        start = time.perf_counter()
        result = run(words)
        seconds[name] = round(time.perf_counter() - start, 1)
        return result

    options = [*(("--data.root", data) if data else ()), *(("--epochs", epochs) if epochs is not None else ())]
    trained = step("train", "train", "demo", "--output", output / "train", *options)
    source = ["--checkpoint", trained["checkpoint"], "--images", data or _cells()]  # others hardly move its outputs
    onnx = step("export to ONNX", "export", "onnx", *source, "--output", output / "model.onnx", "--dynamic-batch")
    coreml = step("export to Core ML", "export", "coreml", *source, "--output", output / "model.mlpackage")
    model = torch_predict(_model(trained))
    accuracy = _evaluate(output / "model.onnx", model, data)
    console.print(f"held-out images: {accuracy.torch.top1:.2f} % in PyTorch, {accuracy.onnx.top1:.2f} % as ONNX")
    models = [*TIMED, output / "model.onnx"]
    timed = step("time", "bench", "--models", *models, "--rounds", 9, "--output", output / "bench")
    _write_report(output, data, trained, onnx, coreml, accuracy, timed)
    console.rule()
    console.print(f"open {output / 'report.html'}")
    return {
        "report": str(output / "report.html"),
        "top1": accuracy.torch.top1,
        "top1_onnx": accuracy.onnx.top1,
        "n": accuracy.torch.n,
        "certificate": onnx["certificate"],
        "seconds": seconds,
    }


def _cells() -> Path:
    """The folder of elpv-dataset's images."""
    import elpv_dataset

    return Path(elpv_dataset.__file__).parent / "data"


def _model(trained: dict[str, Any]) -> torch.nn.Module:
    from shvit.create import create_model

    return create_model(trained["model"], trained["checkpoint"])


def _evaluate(artifact: Path, model: Predict, data: Path | None) -> Accuracy:
    """Both accuracies on the same held-out images.

    Raises:
        CheckFailed: they differ by more than `NEAR_TIES`.
    """
    exported = open_artifact(artifact)
    dataset, spec = open_dataset(data, "val"), exported.spec
    accuracy = Accuracy(
        evaluate(model, eval_loader(dataset, spec.transform(), batch_size=32), spec.num_classes),
        evaluate(exported, eval_loader(dataset, spec.transform(normalize=False), batch_size=32), spec.num_classes),
    )
    if abs(accuracy.torch.top1 - accuracy.onnx.top1) > NEAR_TIES:
        raise CheckFailed(
            f"{artifact} is right on {accuracy.onnx.top1:.2f} % of the held-out images, its model on "
            f"{accuracy.torch.top1:.2f} %",
            asdict(accuracy),
        )
    return accuracy


def _predictions(artifact: Path, data: Path | None) -> list[report.Prediction]:
    """What the exported file says of held-out images: up to `SHOWN_WRONG` mistakes among right answers."""
    predict = open_artifact(artifact)
    dataset, transform = open_dataset(data, "val"), predict.spec.transform(normalize=False)
    targets = [target for _, target in dataset.samples]
    answers = [predict(transform(dataset[index][0])[None]).softmax(dim=1)[0] for index in range(len(dataset))]
    right = [int(answer.argmax()) == target for answer, target in zip(answers, targets, strict=True)]

    def spread(indices: list[int], count: int) -> list[int]:
        return indices[:: max(1, len(indices) // count)][:count]

    shown = spread([index for index, hit in enumerate(right) if not hit], SHOWN_WRONG)
    shown += spread([index for index, hit in enumerate(right) if hit], SHOWN - len(shown))
    names = dataset.classes
    return [
        report.Prediction(
            dataset[index][0], names[targets[index]], names[int(answers[index].argmax())], float(answers[index].max())
        )
        for index in sorted(shown)
    ]


def _write_report(
    output: Path,
    data: Path | None,
    trained: dict[str, Any],
    onnx: dict[str, Any],
    coreml: dict[str, Any],
    accuracy: Accuracy,
    timed: dict[str, Any],
) -> None:
    """report.html from what the steps returned."""
    measured = measurements_from(timed)
    assert measured.machine is not None  # nothing was measured elsewhere
    certificate, package = onnx["certificate"], coreml["certificate"]
    source = str(data) if data else "ELPV: electroluminescence images of solar cells (CC BY-NC-SA 4.0)"
    figures = (
        ("images compared", lambda c: f"{c['images']} ({c['image_source']})"),
        ("largest difference of two logits", lambda c: f"{c['max_abs_error']:.1e}"),
        ("relative to the logits' spread", lambda c: f"{c['max_rel_error']:.1e}"),
        ("signal to noise", lambda c: f"{c['snr_db']:.0f} dB"),
        ("same top-1", lambda c: f"{c['top1_agreement']:.1f} %"),
        ("size", lambda c: f"{c['artifact_bytes'] / 1e6:.1f} MB"),
    )
    drift = [(name, figure(certificate), figure(package)) for name, figure in figures]
    drift += [
        ("held-out accuracy, PyTorch", f"{accuracy.torch.top1:.2f} % of {accuracy.torch.n}", ""),
        ("held-out accuracy", f"{accuracy.onnx.top1:.2f} % of {accuracy.onnx.n}", ""),
    ]
    disturbed = f" of wall time; {said}" if (said := disturbance(measured.results)) else ""
    sections = [
        report.Section(
            "Images",
            "Held-out images and what the ONNX file says of them, mistakes among them.",
            report.gallery(_predictions(output / "model.onnx", data)),
        ),
        report.Section(
            "Training",
            f"{trained['model']} from scratch at {trained['img_size']} px for {trained['epochs']} epochs: "
            f"{accuracy.torch.top1:.2f} % on {accuracy.torch.n} held-out images, which also chose the best epoch.",
            report.picture(output / "train" / "curves.png", "loss and accuracy over epochs"),
        ),
        report.Section(
            "The exported files against their model",
            "Logits of the ONNX file in ONNX Runtime, and of the Core ML package in this project's evaluator of such "
            "packages, against the trained model in PyTorch, before deployment.",
            report.table(("figure", "ONNX", "Core ML"), drift),
        ),
        report.Section(
            "Latency",
            f"{measured.machine.processor}, {measured.machine.threads} thread, {measured.results[0].rounds} "
            f"interleaved rounds: median and the 90th percentile{disturbed}. S1–S4 have random weights, model.onnx "
            "those trained above. bench/report.html has more, and lets you choose a model by its latency.",
            report.picture(output / "bench" / "bench.png", "latency of each model and runtime"),
        ),
    ]
    made_with = ", ".join(f"{name} {version}" for name, version in certificate["versions"].items())
    lead = f"{trained['model']} trained on real images, exported, verified and timed. Images: {source}."
    report.write_page(output / "report.html", "SHViT, from images to phone", lead, sections, made_with)
