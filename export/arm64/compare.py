"""A file run in the ARM64 build of its runtime under emulation, and the section of its certificate on that."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from shvit.documents import parse_json, parse_model
from shvit.errors import CheckFailed, InputError

from ..backends import worker
from ..backends.backend import JOB_FILES, Arm64Build, Artifact, Backend, Library
from ..backends.registry import artifact_files, load_artifact, resolve_backend
from ..formats.rounding import Outputs
from ..guards import checked_run, one_line
from ..images import spread
from ..verdict import accuracy, snr_db, worst_figures, worst_verdict
from ..verify import PASSED, Arm64, Certificate, Reference, judge_outputs
from ..wrappers import run_batches
from . import emulator
from .emulator import Cpu
from .root import NUMPY, PYTHON, Log, Root, check_root, library_path, open_root

MAX_IMAGES = 64  # that are run: under emulation S1 at 224 px takes seconds for each
START_S, IMAGE_S = 300.0, 120.0  # limit of the time: to begin, and for each image


def check_arm64(backend: Backend[Any]) -> Arm64Build:
    """Return the build of a backend's runtime for ARM64.

    Raises:
        InputError: there is none, or what emulates the processor or compiles for it is not installed; a line says what
            to install.
    """
    if backend.arm64 is None:
        raise InputError(f"{backend.title} has no runtime for ARM64 Linux that could run under emulation; leave out "
                         "the options of ARM64")  # fmt: skip
    emulator.check_emulator()
    check_root(backend.name, backend.arm64)
    return backend.arm64


def certify_arm64(
    certificate: Certificate, path: Path, reference: Reference, cpu: Cpu, log: Log = lambda line: None
) -> Certificate:
    """Return a file's certificate with the section on ARM64, whose verdict counts as much as the first.

    Args:
        certificate: the file's, by `certify`.
        cpu: QEMU's name for the processor.
        log: called with a line for each step.

    Raises:
        CheckFailed: outputs are not finite, or of another shape than the model's.
        InputError: the file does not run, or what runs it is missing.
    """
    backend = resolve_backend(path)
    build = check_arm64(backend)
    root = open_root(backend.name, build, log)
    artifact = load_artifact(path)
    chosen = spread(range(len(reference.images)), MAX_IMAGES)
    log(f"running {len(chosen)} images in {backend.title} for ARM64, on QEMU's {cpu}")
    section = _compare(artifact, reference, chosen, root, build, cpu)
    return _joined(certificate, section, f"ARM64 ({cpu})")


def _compare(
    artifact: Artifact, reference: Reference, chosen: Sequence[int], root: Root, build: Arm64Build, cpu: Cpu
) -> Arm64:
    """Run some of a reference's images on the emulated processor and on this machine."""
    spec, px = artifact.spec, artifact.spec.img_size
    pixels = reference.pixels(spec)[chosen]
    emulated = _run(artifact, spec.feed(pixels), root, build, cpu)
    outputs = [output.float() for output in emulated.outputs]
    here = run_batches(lambda batch: artifact.run(spec.feed(batch)), pixels)
    expected = [output[chosen] for output in reference.outputs(px)]
    try:
        figures, verdict, reasons = judge_outputs(spec, px, expected, outputs, reference)
    except CheckFailed as error:
        raise CheckFailed(f"on ARM64 ({cpu}) {error}", error.result) from error
    known = {each.name for each in fields(Arm64)} - {"outputs"}
    return Arm64(
        cpu=cpu,
        features=emulator.features(emulated.hwcap),
        system=root.manifest.system,
        versions=_versions(root, build),
        root_sha256=root.sha256,
        images=len(chosen),
        **{name: value for name, value in worst_figures(list(figures.values())).items() if name in known},
        host_snr_db=min(snr_db(a, b) for a, b in zip(here, outputs, strict=True)),
        host_top1_agreement=_same_class(here[0], outputs[0]) if spec.chooses_class else None,
        outputs=figures,
        accuracy=accuracy(outputs[0], reference.image_labels[chosen]),
        passed=PASSED[verdict],
        reasons=tuple(dict.fromkeys(reasons)),
    )


def _versions(root: Root, build: Arm64Build) -> dict[str, str]:
    pinned = {wheel.name: wheel.version for wheel in (*build.wheels, NUMPY)}
    return {**pinned, "python": root.manifest.python, "qemu": emulator.qemu_version()}


def _same_class(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the percentage of images with the same highest class."""
    return 100 * (one.argmax(1) == other.argmax(1)).double().mean().item()


def _joined(certificate: Certificate, section: Arm64, where: str) -> Certificate:
    """Return the certificate with the section, and the worse of both verdicts."""
    verdicts = {passed: verdict for verdict, passed in PASSED.items()}
    worst = worst_verdict([certificate.verdict, verdicts[section.passed]])
    reasons = (*certificate.reasons, *(f"{where}: {each}" for each in section.reasons))
    return replace(certificate, arm64=section, passed=PASSED[worst], reasons=reasons)


# --- running ----------------------------------------------------------------------------------------------------------


class Emulated(NamedTuple):
    """What a file gave on the emulated processor."""

    outputs: Outputs
    hwcap: tuple[int, int]  # what Linux says that the processor has


@dataclass
class _Response:
    """What the worker reports; see its docstring."""

    load: float = 0.0
    lacks_bf16: bool = False
    machine: str = ""
    hwcap: tuple[int, int] = (0, 0)
    error: str = ""


def _run(artifact: Artifact, batch: torch.Tensor, root: Root, build: Arm64Build, cpu: Cpu) -> Emulated:
    """Run what `Spec.feed` returns through a file, one image after the other."""
    path, spec = artifact.path, artifact.spec
    with root.copied(cpu) as folder, one_line(path, f"does not run on ARM64 ({cpu})"):
        job = _place(artifact, build, folder / "work")
        np.save(folder / "work" / "images.npy", batch.numpy())
        command = json.dumps({"images": "images.npy", "outputs": "."})
        program = [PYTHON, "-I", "-B", "worker.py", json.dumps(job)]
        ended = emulator.run(folder, cpu, program, f"{command}\n", START_S + IMAGE_S * len(batch))
        hwcap = _last_response(ended).hwcap
        files = [folder / "work" / f"{number}.npy" for number in range(len(spec.outputs))]
        outputs = checked_run(lambda _: [*map(_read, files)], path, spec)(batch)
    return Emulated(outputs, hwcap)


def _place(artifact: Artifact, build: Arm64Build, folder: Path) -> dict[str, Any]:
    """Copy the worker and the files of its job into a folder, and return the job as it is there."""
    path = artifact.path
    job = {**resolve_backend(path).job(path, 1, artifact.spec.precision, ""), "threads": 1, "cores": []}
    if isinstance(build.loaded, Library):
        job["library"] = library_path(build.loaded)
    named = {key: Path(job[key]) for key in JOB_FILES if key in job}
    for file in {Path(worker.__file__), *named.values(), *artifact_files(path)}:
        shutil.copy(file, folder)
    return {**job, **{key: file.name for key, file in named.items()}}


def _last_response(ended: emulator.Ended) -> _Response:
    """Return the worker's last response; raise RuntimeError where it reports an error, or did not come to its end."""
    lines = ended.printed.splitlines()[-1:]
    response = parse_model(_Response, parse_json(lines[0], "worker.py"), "worker.py") if lines else _Response()
    if response.error:
        raise RuntimeError(response.error)
    if response.machine != "aarch64":
        raise RuntimeError(f"its process ends with status {ended.status}: {ended.last_words}")
    return response


def _read(file: Path) -> torch.Tensor:
    """Return an output that an emulated program wrote, whose size it was held to."""
    if file.is_symlink():
        raise RuntimeError(f"{file.name} leads out of the root")
    return torch.from_numpy(np.load(file, allow_pickle=False))
