"""Several models through every format: which files match their models, and what is wrong with the others.

Each file is written in a process of its own, which a converter may crash, or keep busy for too long.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shvit.create import create_model
from shvit.documents import load_json, parse_model, to_json
from shvit.errors import CheckFailed, InputError, first_line
from shvit.files import atomic_write, is_file, scratch_folder
from shvit.weights.resolve import Log

from ..backends.registry import BACKENDS
from ..images import read_pixels, sample_images
from ..pipeline import export
from ..source import create_source
from ..spec import Precision, Spec
from .comparison import with_precision

MODELS = (
    *("shvit_s1", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100", "mobilenetv4_conv_small"),
    *("mobilenetv4_hybrid_medium", "efficientnet_b0", "efficientnet_lite0", "ghostnet_100", "ghostnetv2_100"),
    *("mnasnet_small", "lcnet_050", "tinynet_e", "resnet18", "resnet50", "regnety_002", "densenet121", "repvgg_a0"),
    *("repvit_m1_1", "mobileone_s0", "fastvit_t8", "efficientformer_l1", "efficientformerv2_s0", "levit_128s"),
    *("mobilevit_xxs", "mobilevitv2_050", "edgenext_xx_small", "convnext_atto", "convnextv2_atto", "poolformer_s12"),
    *("starnet_s1", "efficientvit_b0", "efficientvit_m0", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"),
    *("tiny_vit_5m_224", "xcit_nano_12_p16_224", "pit_ti_224", "mixer_s32_224", "resmlp_12_224"),
)
"""Models of timm that are made for phones, and families that their runtimes should know."""
SETTLING_IMAGES = 26  # as many as scikit-image brings
MAX_SECONDS = 900  # for one file; the largest of `MODELS` takes a minute
END_SECONDS = 10  # for a process to tidy up after its outcome
LOOSE_COSINE = 0.9  # what exporters ask for that compare one sample (timmx 0.10)


@dataclass(frozen=True)
class Outcome:
    """What became of one model in one format."""

    passed: bool | None
    """True if the file matches its model; None where the images do not tell; False for a refused file, or for none."""
    snr_db: float | None = None  # None where there is no file
    cosine: float | None = None
    """The lowest cosine of the outputs of file and model for one image."""
    reason: str = ""
    """Why there is no file, or why it was refused."""

    @property
    def passes_loosely(self) -> bool:
        """True if a comparison by `LOOSE_COSINE` accepts a file that is wrong, whichever image it takes."""
        return self.passed is False and self.cosine is not None and self.cosine >= LOOSE_COSINE


Outcomes = dict[str, dict[str, Outcome]]  # by model and format


def survey(
    folder: Path, models: Sequence[str], formats: Sequence[str], precision: Precision, images: Path | None, log: Log
) -> Outcomes:
    """Try all models in all formats; write survey.json and survey.md into a folder after each.

    What an earlier run wrote into the folder is not tried again.

    Args:
        images: a folder of images to compare with; scikit-image's bundled ones where None.
        log: called with a line for each outcome.
    """
    outcomes = _earlier(folder / "survey.json")
    for model in models:
        for name in formats:
            if name not in outcomes.get(model, {}):
                outcome = _in_own_process(_try, name, model, precision, images)
                outcomes.setdefault(model, {})[name] = outcome
                log(f"{model} {name}: {_cell(outcome)}" + f" ({outcome.reason})" * (outcome.passed is False))
                _write(folder, outcomes)
    return outcomes


def _earlier(path: Path) -> Outcomes:
    if not is_file(path):
        return {}
    return parse_model(Outcomes, load_json(path), str(path), "give --output another folder")


def _write(folder: Path, outcomes: Outcomes) -> None:
    rows = {model: {name: asdict(each) for name, each in row.items()} for model, row in outcomes.items()}
    with atomic_write(folder / "survey.json") as partial:
        partial.write_text(to_json(rows, indent=2) + "\n")
    with atomic_write(folder / "survey.md") as partial:
        partial.write_text(markdown(outcomes), encoding="utf-8")


# --- one file ---------------------------------------------------------------------------------------------------------


def _in_own_process(function: Callable[..., None], *arguments: Any) -> Outcome:
    """Return what a function sends, or how its process ended."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context(
        "forkserver" if "forkserver" in methods else "spawn"
    )  # Windows has no fork
    context.set_forkserver_preload([__name__])  # PyTorch is loaded once
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(MAX_SECONDS):
            outcome: Outcome = ours.recv()
            process.join(END_SECONDS)
            return outcome
        return Outcome(False, reason=f"does not end in {MAX_SECONDS} s")
    except EOFError:
        process.join()
        return Outcome(False, reason=f"its converter ends the process (status {process.exitcode})")
    finally:
        process.kill()
        process.join()


def _try(connection: Connection, name: str, model: str, precision: Precision, images: Path | None) -> None:
    """Send the outcome of one export."""
    backend = BACKENDS[name]
    with scratch_folder() as folder:
        try:
            source = with_precision(create_source(_settled(model, images), images=images), backend, precision)
            certificate = asdict(export(backend, folder / f"file{backend.ending}", source, backend.all_options))
        except CheckFailed as error:
            certificate = {"reasons": [first_line(error)], **error.result}
        except Exception as error:  # InputError, and what a converter raises besides
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            connection.send(Outcome(False, reason=kind + first_line(error).replace(f"{folder}/", "")))
            return
    figures = {key: certificate.get(key) for key in ("passed", "snr_db", "cosine")}
    connection.send(Outcome(**figures, reason="; ".join(certificate["reasons"][:2])))


def _settled(name: str, images: Path | None) -> nn.Module:
    """Return a model with random weights, its classifier's too, whose BatchNorms have the statistics of some images.

    With others a random model gives nearly the same outputs for all images, and no file could be told from another.
    """
    torch.manual_seed(0)
    model = create_model(name)
    spec = Spec.of(name, model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches, of which there is one
        elif isinstance(module, nn.Linear) and not module.weight.any():  # a classifier that begins with zeros
            nn.init.normal_(module.weight, std=0.02)
    with torch.no_grad():
        model.train()(spec.normalize(read_pixels(sample_images(images, limit=SETTLING_IMAGES), spec)))
    return model.eval()


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown(outcomes: Outcomes) -> str:
    """Return a table of models and formats, how many a loose check would have accepted, and why files do not hold."""
    formats = list(dict.fromkeys(name for row in outcomes.values() for name in row))
    titles = [BACKENDS[name].title if name in BACKENDS else name for name in formats]
    rows = [("model", *titles), ("---",) * (1 + len(formats))]
    for model, row in outcomes.items():
        rows.append((f"`{model}`", *(_cell(row[name]) if name in row else "" for name in formats)))
    table = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)
    total = [each for row in outcomes.values() for each in row.values()]
    loose = [each for each in total if each.passes_loosely]
    refused = [each for each in total if each.passed is False and each.snr_db is not None]
    held = sum(each.passed is not False for each in total)
    text = (
        f"{len(total)} files were asked for: {held} hold; {len(refused)} refused, {len(loose)} of them with a cosine "
        f"of {LOOSE_COSINE} or more on every image; {len(total) - held - len(refused)} could not be written or run."
    )
    reasons = "".join(
        f"- `{model}`, {BACKENDS[name].title if name in BACKENDS else name}: {each.reason}\n"
        for model, row in outcomes.items() for name, each in row.items() if each.passed is False
    )  # fmt: skip
    return f"{table}\n{text}\n" + (f"\n{reasons}" if reasons else "")


def _cell(outcome: Outcome) -> str:
    if outcome.passed is not False:
        return f"{outcome.snr_db or 0:.0f} dB" + ("" if outcome.passed else ", undecided")
    if outcome.snr_db is None:
        return "no file"
    return "**refused**" + (f", cosine {outcome.cosine:.3f}" if outcome.passes_loosely else "")
