"""All backends, and artifacts of any of them. A new backend is a file beside this one and a line here."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shvit.certificate import check_unchanged
from shvit.errors import InputError
from shvit.files import is_there, sha256
from shvit.train.evaluate import Predict

from ..formats.rounding import HALVES
from ..guards import checked_run, guarded, one_line
from .backend import Artifact, Backend
from .coreml import COREML
from .executorch import EXECUTORCH
from .litert import LITERT
from .ncnn import NCNN
from .onnx import ONNX
from .openvino import OPENVINO

BACKENDS: dict[str, Backend[Any]] = {
    backend.name: backend for backend in (ONNX, OPENVINO, COREML, LITERT, NCNN, EXECUTORCH)
}
"""Every backend, by the format's name."""


def resolve_backend(path: Path) -> Backend[Any]:
    """Return the backend of an artifact, by its suffix; raise InputError where no backend has it."""
    suffixes = {backend.suffix: backend for backend in BACKENDS.values()}
    if path.suffix not in suffixes:
        raise InputError(f"{path}: unknown artifact {path.suffix!r}; choose from {', '.join(suffixes)}")
    return suffixes[path.suffix]


def load_artifact(
    path: str | Path, threads: int | None = None, native: bool = False, rounded: bool = False
) -> Artifact:
    """Load a file of `shvit export`: a function from images to outputs, which also tells what the file is.

    Args:
        path: an .onnx file, .xml (with its .bin), .mlpackage, .tflite, .pte or .param (with its .bin and .json).
        threads: threads of ONNX Runtime and OpenVINO; their choice (all cores) where None.
        native: run a Core ML package in Core ML, which is part of macOS, in place of our own evaluator.
        rounded: compute half precision in half precision, rounding after each operation, whatever the processor has:
            on a CPU the runtimes compute it in float32. Meant for verification; it is slow.

    Raises:
        InputError: an unknown suffix, no such file, one that cannot be read, or no Core ML.
    """
    path = Path(path)
    backend = resolve_backend(path)
    with one_line(path, "cannot be opened"):
        artifact = backend.load(path, threads)
        if native and backend.load_native is None:
            raise InputError(f"{path}: Core ML runs .mlpackage alone; leave out --runtime coreml")
        if native and backend.load_native is not None:
            artifact = backend.load_native(artifact)
        elif rounded and backend.load_rounded is not None and artifact.spec.precision in HALVES:
            artifact = backend.load_rounded(artifact, threads)
    return _guarded(artifact)


def _guarded(artifact: Artifact) -> Artifact:
    """Return the artifact with its runtime's exceptions as one line, and its outputs checked against its spec."""
    path, spec, defaults = artifact.path, artifact.spec, artifact.run_with_defaults
    return replace(
        artifact,
        run=checked_run(artifact.run, path, spec),
        run_layers=guarded(artifact.run_layers, path),
        parameters=guarded(artifact.parameters, path, "its weights cannot be read"),
        scale_faults=guarded(artifact.scale_faults, path, "its scales cannot be read"),
        run_with_defaults=None if defaults is None else checked_run(defaults, path, spec),
    )


def artifact_files(path: Path) -> list[Path]:
    """Return the files or folders that an artifact consists of."""
    return [path, *(path.with_suffix(suffix) for suffix in resolve_backend(path).companions)]


def artifact_sha256(path: Path) -> str:
    """Return the digest of an artifact's file; of several, that of their digests one after the other."""
    digests = [sha256(file) for file in artifact_files(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def refuse_changed(path: Path) -> None:
    """Raise CheckFailed if a file is not the one that its certificate describes; called before anything reads it.

    Raise InputError for an unknown suffix, such as that of a folder of anything, which is not hashed.
    """
    if all(is_there(file) for file in artifact_files(path)):
        check_unchanged(path, artifact_sha256(path))


def torch_predict(model: nn.Module) -> Predict:
    """Return a function that runs a model in eager PyTorch; `torch.set_num_threads` sets the number of threads."""

    def predict(batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(batch)

    return predict
