"""The table of runtimes that `shvit bench` can time, and its help. Importing it loads no runtime."""

import importlib.util
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shvit import sessions
from shvit.errors import InputError

from ..backends.compute_plan import COMPUTE_UNITS, MIN_MACOS

Job = dict[str, Any]
"""Options of worker.py, sent to it as JSON."""


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


def _torch(**changes: object) -> Callable[..., Job]:
    options = {"device": "cpu", "bf16": False, "channels_last": False, "compiled": False, **changes}

    def job(model: Any, batch_size: int) -> Job:
        file = model.weights.checkpoint
        checkpoint = str(file.resolve()) if file else None
        return {"runner": "torch", "model": model.name, "checkpoint": checkpoint,
                "img_size": model.spec.img_size, **options}  # fmt: skip

    return job


def _onnx(path: Path, provider: str = "cpu") -> Job:
    return {"runner": "onnx", "path": str(path), "provider": provider, "sessions": sessions.__file__}


def _openvino(path: Path, batch_size: int, bf16: bool = False) -> Job:
    return {"runner": "openvino", "path": str(path), "bf16": bf16, "batch_size": batch_size}


def _coreml(path: Path, compute_units: str) -> Job:
    return {"runner": "coreml", "path": str(path), "compute_units": COMPUTE_UNITS[compute_units]}


RUNTIMES = {
    "torch": Runtime("eager PyTorch", "fp32", _torch()),
    "torch-channels-last": Runtime("eager PyTorch, channels last in memory", "fp32", _torch(channels_last=True)),
    "torch-bf16": Runtime("eager PyTorch, channels last", "bf16", _torch(channels_last=True, bf16=True)),
    "torch-compiled": Runtime("torch.compile with frozen weights", "fp32", _torch(compiled=True)),
    "torch-compiled-bf16": Runtime(
        "torch.compile with frozen weights, channels last",
        "bf16",
        _torch(compiled=True, channels_last=True, bf16=True),
    ),
    "reference": Runtime(
        "reference export: timm's model with fused norms, opset 11, ONNX Runtime's defaults",
        "fp32",
        lambda model, batch_size: _onnx(model.reference(batch_size)),
        "onnx",
    ),
    "onnxruntime": Runtime(
        "the file of `shvit export onnx` in ONNX Runtime", "fp32", lambda model, _: _onnx(model.onnx), "onnx", True
    ),
    "onnxruntime-int8": Runtime("the same in int8", "int8", lambda model, _: _onnx(model.onnx_int8), "onnx", True),
    "openvino": Runtime(
        "the ONNX file in OpenVINO", "fp32", lambda model, batch: _openvino(model.onnx, batch), "openvino", True
    ),
    "openvino-bf16": Runtime(
        "the ONNX file in OpenVINO", "bf16", lambda model, batch: _openvino(model.onnx, batch, bf16=True), "openvino",
        True,
    ),
    "openvino-int8": Runtime(
        "an int8 file in OpenVINO", "int8", lambda model, batch: _openvino(model.openvino_int8, batch), "openvino", True
    ),
    "coreml": Runtime(
        "the package of `shvit export coreml` in Core ML, on a Mac",
        "fp16",
        lambda model, _: _coreml(model.coreml, model.settings.compute_units),
        "coreml",
    ),
    "cuda": Runtime("PyTorch on a GPU, one CUDA graph", "fp32", _torch(device="cuda", channels_last=True)),
    "cuda-bf16": Runtime(
        "PyTorch on a GPU, one CUDA graph", "bf16", _torch(device="cuda", channels_last=True, bf16=True)
    ),
    "onnxruntime-cuda": Runtime(
        "the ONNX file on a GPU, CUDA provider", "fp32", lambda model, _: _onnx(model.onnx, "cuda"), "onnx",
    ),
    "onnxruntime-tensorrt": Runtime(
        "the ONNX file on a GPU, TensorRT provider", "fp32", lambda model, _: _onnx(model.onnx, "tensorrt"), "onnx",
    ),
}  # fmt: skip
DEFAULT_RUNTIMES = ("torch", "onnxruntime")


def file_job(path: Path, batch_size: int, precision: str, compute_units: str) -> Job:
    """Return the worker's options for an exported file in the runtime of its format, besides threads and cores."""
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix == ".xml":
        return _openvino(path, batch_size, bf16=precision == "bf16")
    return _coreml(path, compute_units)


def is_artifact(model: str | Path) -> bool:
    """Return whether a model is given as an exported file, and not by a name that timm knows."""
    from ..backends.registry import BACKENDS

    return Path(model).suffix in {backend.suffix for backend in BACKENDS.values()}


def describe_runtimes() -> str:
    """Return a line for each runtime with its precision, for --help."""
    return "\n".join(f"{name}: {each.help} ({each.precision})" for name, each in RUNTIMES.items())


def check_runtimes(names: Sequence[str]) -> None:
    """Raise InputError for a runtime that is unknown or does not run on this machine."""
    from ..backends.registry import BACKENDS

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
            _check_cuda(name)


def _check_macos() -> None:
    if sys.platform != "darwin":
        raise InputError("runtime coreml needs macOS, of which Core ML is a part; leave it out here")
    version = platform.mac_ver()[0]
    if tuple(map(int, version.split("."))) < MIN_MACOS:
        oldest = ".".join(map(str, MIN_MACOS))
        raise InputError(
            f"runtime coreml needs macOS {oldest} or newer, where Core ML reports its compute plan, "
            f"and this is {version}; leave it out here"
        )


def _check_cuda(name: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError(f"runtime {name} needs a CUDA device, and PyTorch finds none here; leave it out")
