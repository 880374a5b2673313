"""The whole pipeline on real images: train → export → verify → evaluate → benchmark → one page.

Each step is the command that a user would type, run through the command table.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shvit import terminal
from shvit.cli import run
from shvit.create import create_model
from shvit.errors import CheckFailed
from shvit.files import check_output_folder, check_replaceable
from shvit.train.data.datasets import open_dataset
from shvit.train.data.eval_loader import eval_loader
from shvit.train.evaluate import Evaluation, evaluate

from ..analysis.comparison import imports, runs_here
from ..backends.registry import BACKENDS, Predict, load_artifact, torch_predict
from ..bench.records import describe_preemption, parse_measurements
from . import report

FORMATS = tuple(BACKENDS)  # of which those are written whose packages are installed; ONNX always is
TIMED = ("shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4")
MAX_SHOWN = 18  # images in the page
MAX_SHOWN_WRONG = 6
MAX_DIFFERENCE = 0.5  # percent: an image whose two highest logits are equal may differ on another processor
console = terminal.console()


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on the validation images, of PyTorch and of the exported file."""

    torch: Evaluation
    onnx: Evaluation


def demo(output: Path, data: Path | None = None, epochs: int | None = None) -> dict[str, Any]:
    """Run the pipeline in the folder `output`, write `output`/report.html, and return figures and each step's seconds.

    Args:
        data: a folder of class folders; elpv-dataset's solar cells where None.
        epochs: training epochs; the recipe's where None.

    Raises:
        CheckFailed: an artifact exceeds its tolerance, or the ONNX file's accuracy differs from PyTorch's by more than
            near-ties explain.
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
    files: dict[str, dict[str, Any]] = {}  # certificates by the format's name on the command line
    for backend in (BACKENDS[name] for name in FORMATS if imports(BACKENDS[name], console)):
        path = output / f"model{backend.ending}"
        batches = ["--dynamic-batch"] if backend.name == "onnx" else []  # which is evaluated
        exported = step(f"export to {backend.title}", "export", backend.name, *source, "--output", path, *batches)
        files[backend.name] = exported["certificate"]
    model = torch_predict(create_model(trained["model"], trained["checkpoint"]))
    accuracy = _evaluate(output / "model.onnx", model, data)
    console.print(f"validation images: {accuracy.torch.top1:.2f} % in PyTorch, {accuracy.onnx.top1:.2f} % as ONNX")
    models = [*TIMED, *(output / f"model{BACKENDS[name].ending}" for name in files if runs_here(BACKENDS[name]))]
    timed = step("time", "bench", "--models", *models, "--rounds", 9, "--output", output / "bench")
    _write_report(output, data, trained, files, accuracy, timed)
    console.rule()
    console.print(f"open {output / 'report.html'}")
    return {
        "report": str(output / "report.html"),
        "top1": accuracy.torch.top1,
        "top1_onnx": accuracy.onnx.top1,
        "n": accuracy.torch.n,
        "certificate": files["onnx"],
        "seconds": seconds,
    }


def _cells() -> Path:
    """Return the folder of elpv-dataset's images."""
    import elpv_dataset

    return Path(elpv_dataset.__file__).parent / "data"


def _evaluate(artifact: Path, model: Predict, data: Path | None) -> Accuracy:
    """Return both accuracies on the same validation images.

    Raises:
        CheckFailed: they differ by more than `MAX_DIFFERENCE`.
    """
    exported = load_artifact(artifact)
    dataset, spec = open_dataset(data, "val"), exported.spec
    accuracy = Accuracy(
        evaluate(model, eval_loader(dataset, spec.transform(), batch_size=32), spec.num_classes),
        evaluate(exported, eval_loader(dataset, spec.transform(normalize=False), batch_size=32), spec.num_classes),
    )
    if abs(accuracy.torch.top1 - accuracy.onnx.top1) > MAX_DIFFERENCE:
        raise CheckFailed(f"{artifact} is right on {accuracy.onnx.top1:.2f} % of the validation images, its model on "
                          f"{accuracy.torch.top1:.2f} %", asdict(accuracy))  # fmt: skip
    return accuracy


def _predictions(artifact: Path, data: Path | None) -> list[report.Prediction]:
    """Return predictions for validation images: up to `MAX_SHOWN_WRONG` mistakes among correct ones."""
    predict = load_artifact(artifact)
    dataset, transform = open_dataset(data, "val"), predict.spec.transform(normalize=False)
    targets = [target for _, target in dataset.samples]
    outputs = [predict(transform(dataset[index][0])[None]).softmax(dim=1)[0] for index in range(len(dataset))]
    right = [int(output.argmax()) == target for output, target in zip(outputs, targets, strict=True)]

    def spread(indices: list[int], count: int) -> list[int]:
        return indices[:: max(1, len(indices) // count)][:count]

    shown = spread([index for index, hit in enumerate(right) if not hit], MAX_SHOWN_WRONG)
    shown += spread([index for index, hit in enumerate(right) if hit], MAX_SHOWN - len(shown))
    predictions = []
    for index in sorted(shown):
        probability, predicted = outputs[index].max(dim=0)
        classes = dataset.classes[targets[index]], dataset.classes[int(predicted)]
        image: Any = dataset[index][0]
        predictions.append(report.Prediction(image, *classes, float(probability)))
    return predictions


def _write_report(
    output: Path, data: Path | None, trained: dict[str, Any], files: dict[str, dict[str, Any]], accuracy: Accuracy,
    timed: dict[str, Any],
) -> None:  # fmt: skip
    """Write report.html from the results of the steps; `files` are the certificates by format."""
    measured = parse_measurements(timed)
    assert measured.machine is not None  # nothing was measured elsewhere
    titles = [BACKENDS[name].title for name in files]
    source = str(data) if data else "ELPV: electroluminescence images of solar cells (CC BY-NC-SA 4.0)"
    figures = (
        ("precision", lambda c: c["spec"]["precision"]),
        ("images compared", lambda c: str(c["images"])),
        ("largest difference of two logits", lambda c: f"{c['max_abs_error']:.1e}"),
        ("relative to the logits' spread", lambda c: f"{c['max_rel_error']:.1e}"),
        ("signal to noise", lambda c: f"{c['snr_db']:.0f} dB"),
        ("same top-1", lambda c: f"{c['top1_agreement']:.1f} %"),
        ("size", lambda c: f"{c['artifact_bytes'] / 1e6:.1f} MB"),
    )
    errors = [(name, *map(figure, files.values())) for name, figure in figures]
    right = f"{accuracy.torch.top1:.2f} % in PyTorch and {accuracy.onnx.top1:.2f} % as ONNX"
    preemption = describe_preemption(measured.results)
    disturbed = f" of wall time; {preemption}" if preemption else ""
    sections = [
        report.Section(
            "Images",
            "Validation images and the ONNX file's predictions, mistakes among them.",
            report.gallery(_predictions(output / "model.onnx", data)),
        ),
        report.Section(
            "Training",
            f"{trained['model']} from scratch at {trained['img_size']} px for {trained['epochs']} epochs: "
            f"{accuracy.torch.top1:.2f} % on {accuracy.torch.n} validation images, which also chose the best epoch.",
            report.plot(output / "train" / "curves.png", "loss and accuracy over epochs"),
        ),
        report.Section(
            "The exported files against their model",
            "Logits of each file in its runtime, and of the Core ML package in this project's evaluator of such "
            "packages, against the trained model in PyTorch, before deployment, on images of "
            f"{files['onnx']['image_source']}. Validation accuracy: {right}, of {accuracy.torch.n} images.",
            report.table(("figure", *titles), errors),
        ),
        report.Section(
            "Latency",
            f"{measured.machine.processor}, {measured.machine.threads} thread, {measured.results[0].rounds} "
            f"interleaved rounds: median and the 90th percentile{disturbed}. S1–S4 have random weights, the files "
            "those trained above. bench/report.html has more, and lets you choose a model by its latency.",
            report.plot(output / "bench" / "bench.png", "latency of each model and runtime"),
        ),
    ]
    made_with = ", ".join(f"{name} {version}" for name, version in files["onnx"]["versions"].items())
    lead = f"{trained['model']} trained on real images, exported, verified and timed. Images: {source}."
    report.write_page(output / "report.html", "SHViT, from images to phone", lead, sections, made_with)
