"""Files with one thing wrong that a comparison by cosine accepts, in every format, and what the certificate says.

$ python -m tests.export.gallery docs/explanation/gallery.md

Each is written by the backend itself from a small trained model, judged on 26 drawn images.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from shvit.errors import CheckFailed
from shvit.export.analysis.survey import LOOSE_COSINE
from shvit.export.backends import ncnn
from shvit.export.backends.backend import Artifact
from shvit.export.backends.registry import BACKENDS, load_artifact
from shvit.export.formats.litert import notes_of, pack, unpack, write_notes
from shvit.export.verify import Reference, certify
from shvit.fold import DeployedSHSA
from tests.export.judged import GRAPH_DEFECTS, PX, WEIGHT_DEFECTS, Workshop, deploy, overflowing, spec_defects

DEFECTS = {
    "two color channels swapped in the first layer": WEIGHT_DEFECTS["channels swapped"],
    "one weight off by 1 %": WEIGHT_DEFECTS["one weight off by 1 %"],
    "a bias dropped": WEIGHT_DEFECTS["a bias dropped"],
    "BatchNorm folded with another eps": WEIGHT_DEFECTS["BatchNorm's eps wrong"],
    "a ReLU missing": GRAPH_DEFECTS["a ReLU missing"],
    "probabilities in place of logits": GRAPH_DEFECTS["logits given as probabilities"],
}


class Row(NamedTuple):
    """One wrong file."""

    format: str
    what: str
    cosine: float  # the lowest of all images
    said: str  # by the certificate; empty where it accepts


def wrong_files(workshop: Workshop) -> Iterator[Row]:
    """Yield what becomes of each defect in each format."""
    for name, backend in BACKENDS.items():
        for what, defect in DEFECTS.items():
            path = _written(workshop, name, defect(workshop.model))
            yield Row(backend.title, what, *_judged(path, workshop.reference))
        sound = load_artifact(_written(workshop, name, workshop.source.deployed()))
        wrong_crop = replace(sound, spec=spec_defects(sound.spec)["said: crop_pct ignored"])
        yield Row(backend.title, "another crop in its description", *_judged(wrong_crop, workshop.reference))
        reference = replace(workshop.reference, model=overflowing(workshop.model), _outputs={})
        half = _written(workshop, name, deploy(reference.model, PX), "fp16")
        yield Row(backend.title, "fp16 with values above 65504, which a CPU hides", *_judged(half, reference))
    yield Row("ncnn", "LayerNorm over (P, H, W), which ncnn computes wrongly", *_ncnn_layer_norm(workshop))
    yield Row("LiteRT", "int8 with its quantizer's own ranges, of every operator", *_litert_defaults(workshop))


def _written(workshop: Workshop, name: str, deployed: nn.Module, precision: str = "fp32") -> Path:
    backend, source = BACKENDS[name], workshop.source
    spec = backend.all_options.complete(replace(workshop.spec, precision=precision, uint8_input=False))
    source = replace(source, spec=spec, _shared={("deployed", source.size): deployed})
    path = workshop.path(backend.ending)
    backend.create_writer(source, backend.all_options)(path, spec)
    return path


def _judged(file: Path | Artifact, reference: Reference) -> tuple[float, str]:
    """Return the lowest cosine of the runtime's outputs, and what the certificate says."""
    plain = load_artifact(file) if isinstance(file, Path) else file
    try:
        cosine = certify(plain, reference).cosine
    except CheckFailed as error:
        return 0.0, str(error)
    try:
        certificate = certify(load_artifact(file, rounded=True) if isinstance(file, Path) else file, reference)
    except CheckFailed as error:
        return cosine, str(error).partition(" overflows ")[2] and f"overflows {str(error).partition(' overflows ')[2]}"
    return cosine, "" if certificate.passed is not False else certificate.reasons[0]


def _with(module: object, name: str, value: object, run: Callable[[], Path]) -> Path:
    """Return what a function gives while a module has another value under a name."""
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        return run()
    finally:
        setattr(module, name, kept)


def _ncnn_layer_norm(workshop: Workshop) -> tuple[float, str]:
    def write() -> Path:
        return _written(workshop, "ncnn", workshop.source.deployed())

    return _judged(_with(ncnn, "GroupedSHSA", DeployedSHSA, write), workshop.reference)


def _litert_defaults(workshop: Workshop) -> tuple[float, str]:
    """As ai-edge-quantizer's own example does it: every operator, ranges from minimum to maximum."""
    from ai_edge_quantizer import qtyping, quantizer, recipe
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    path = _written(workshop, "litert", workshop.source.deployed())
    notes = notes_of(unpack(path.read_bytes()))
    spec = load_artifact(path).spec
    images = [spec.feed(image[None]).numpy() for image in workshop.source.calibration_pixels()]
    work = quantizer.Quantizer(path.read_bytes(), recipe.static_wi8_ai8())
    for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        work.update_quantization_recipe(".*", end, algorithm_key=AlgorithmName.NO_QUANTIZE)
    ranges = work.calibrate({"serving_default": [{"image": image} for image in images]})
    model = unpack(bytes(work.quantize(ranges, enable_progress_report=False).quantized_model))
    model.metadata = []
    write_notes(model, {**notes, "shvit.spec": replace(spec, precision="int8").to_json()})
    path.write_bytes(pack(model))
    return _judged(path, workshop.reference)


def markdown(rows: list[Row]) -> str:
    """Return a table of the wrong files whose cosine is loose enough, by format."""
    loose = [row for row in rows if row.cosine >= LOOSE_COSINE]
    lines = ["| format | what is wrong | lowest cosine | what the certificate says |", "| --- | --- | ---: | --- |"]
    for row in loose:
        lines.append(f"| {row.format} | {row.what} | {row.cosine:.4f} | {row.said or '**accepted**'} |")  # noqa: PERF401
    refused = sum(bool(row.said) for row in rows)
    lines += ["", f"{len(rows)} wrong files, of which {refused} are refused, and {len(loose)} have a cosine of "
              f"{LOOSE_COSINE} or more on every image."]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for each in wrong_files(Workshop(Path(folder))):
            print(*each, sep=" | ", flush=True)
            found.append(each)
    table = markdown(found)
    print(table)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(table)
