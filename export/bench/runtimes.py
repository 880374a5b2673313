"""The table of runtimes that `shvit bench` can time, and its help. Importing it loads no runtime but PyTorch."""

import importlib.util
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shvit.errors import InputError

from ..backends.backend import Backend, Delegation, Job, Timing
from ..backends.compute_plan import MIN_MACOS
from ..backends.onnx import ONNX
from ..backends.registry import BACKENDS


@dataclass(frozen=True)
class Runtime:
    """A runtime in which models are timed, with its compute precision."""

    help: str
    """Description in `shvit bench --help`."""
    precision: str
    job: Callable[..., Job]
    """Function of a `BenchModel` and a batch size that returns the worker's options, besides threads and cores."""
    backend: str | None = None
    """Key of `BACKENDS` whose packages it needs; None for PyTorch."""
    tuned: bool = False
    """Run in the environment that the backend sets."""
    on_cpu: bool = True
    """Run on the CPU, where one thread's processor time is the work's."""
    has_profiler: bool = False
    """Known here: the time of each operator."""
    delegation: Callable[[Any], Delegation] | None = None
    """Function of a `BenchModel` that returns how it is divided; None where the runtime has no delegates."""


def _torch(help: str, precision: str = "fp32", device: str = "cpu", **options: bool) -> Runtime:  # noqa: A002
    compiled = options.get("compiled", False)
    changes = {"device": device, "bf16": precision == "bf16", "channels_last": False, "compiled": False, **options}

    def job(model: Any, batch_size: int) -> Job:
        file = model.weights.checkpoint
        checkpoint = str(file.resolve()) if file else None
        return {"runner": "torch", "model": model.name, "checkpoint": checkpoint,
                "img_size": model.spec.img_size, **changes}  # fmt: skip

    on_cpu = device == "cpu"
    return Runtime(help, precision, job, on_cpu=on_cpu, has_profiler=on_cpu and not compiled)


def _timed(backend: Backend[Any], timing: Timing) -> Runtime:
    def job(model: Any, batch_size: int) -> Job:
        path = model.file(backend.name, timing.file)
        return {**backend.job(path, batch_size, timing.precision, model.settings.compute_units), **timing.options}

    divide = backend.delegation
    return Runtime(
        timing.help, timing.precision, job, backend.name,
        tuned=timing.on_cpu, on_cpu=timing.on_cpu,
        has_profiler=timing.on_cpu and backend.profile is not None,
        delegation=None if divide is None else lambda model: divide(model.file(backend.name, timing.file)),
    )  # fmt: skip


def _reference(model: Any, batch_size: int) -> Job:
    return ONNX.job(model.reference(batch_size), batch_size, "fp32", "")


RUNTIMES = {
    "torch": _torch("eager PyTorch"),
    "torch-channels-last": _torch("eager PyTorch, channels last in memory", channels_last=True),
    "torch-bf16": _torch("eager PyTorch, channels last", "bf16", channels_last=True),
    "torch-compiled": _torch("torch.compile with frozen weights", compiled=True),
    "torch-compiled-bf16": _torch(
        "torch.compile with frozen weights, channels last", "bf16", compiled=True, channels_last=True
    ),
    "cuda": _torch("PyTorch on a GPU, one CUDA graph", device="cuda", channels_last=True),
    "cuda-bf16": _torch("PyTorch on a GPU, one CUDA graph", "bf16", "cuda", channels_last=True),
    "reference": Runtime(
        "reference export: timm's model with fused norms, opset 11, ONNX Runtime's defaults", "fp32",
        _reference, "onnx", has_profiler=True,
    ),
    **{name: _timed(backend, each) for backend in BACKENDS.values() for name, each in backend.timings.items()},
}  # fmt: skip
DEFAULT_RUNTIMES = ("torch", "onnxruntime")


def is_artifact(model: str | Path) -> bool:
    """Return whether a model is given as an exported file, and not by a name that timm knows."""
    return Path(model).suffix in {backend.suffix for backend in BACKENDS.values()}


def describe_runtimes() -> str:
    """Return a line for each runtime with its precision, for --help."""
    return "\n".join(f"{name}: {each.help} ({each.precision})" for name, each in RUNTIMES.items())


def check_runtimes(names: Sequence[str]) -> None:
    """Raise InputError for a runtime that is unknown or does not run on this machine."""
    for name in names:
        if name not in RUNTIMES:
            raise InputError(f"unknown runtime {name!r}; choose from {', '.join(RUNTIMES)}")
        backend = BACKENDS.get(RUNTIMES[name].backend or "")
        missing = [each for each in backend.packages if importlib.util.find_spec(each) is None] if backend else []
        if backend and missing:
            raise InputError(f"runtime {name} needs {missing[0]}; pip install 'shvit[{backend.extra}]'")
        if name == "coreml":
            _check_macos()
        if name.startswith("cuda"):
            import torch

            if not torch.cuda.is_available():
                raise InputError(f"runtime {name} needs a CUDA device, and PyTorch finds none here; leave it out")


def _check_macos() -> None:
    if sys.platform != "darwin":
        raise InputError("runtime coreml needs macOS, of which Core ML is a part; leave it out here")
    version, oldest = platform.mac_ver()[0], ".".join(map(str, MIN_MACOS))
    if tuple(map(int, version.split("."))) < MIN_MACOS:
        raise InputError(f"runtime coreml needs macOS {oldest} or newer, where Core ML reports its compute plan, and "
                         f"this is {version}; leave it out here")  # fmt: skip
