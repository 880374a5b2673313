"""The command `shvit doctor`: this machine, its versions and extras, and each runtime tried with a tiny model."""

import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rich.table import Table
from torch import nn

from shvit import terminal
from shvit.deployment import deploy
from shvit.environment import EXTRAS, advise
from shvit.errors import InputError, first_line
from shvit.files import scratch_folder
from shvit.terminal import quiet

from ..backends.registry import load_artifact
from ..bench.roofline import gpu_name, instruction_sets, package_versions, processor_name
from ..spec import Spec, randomize_norms

TINY: dict[str, Any] = {"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "partial_dim": (8, 6, 8), "num_classes": 10}
IMG_SIZE = 64
MAX_ERROR = 2e-2
"""Largest error of a runtime that works, relative to the spread of the outputs; float16 needs some of it."""
console = terminal.console()


@dataclass(frozen=True)
class Trial:
    """The outcome of one runtime: it exported, opened and ran the tiny model with matching outputs, or why not."""

    runtime: str
    works: bool
    error: float | None
    """Largest difference from the model in eager PyTorch, relative to the spread of its outputs."""
    seconds: float
    reason: str
    """Empty if it works."""


@dataclass(frozen=True)
class TinyModel:
    """A tiny SHViT with random weights, one image, and a folder for exported files."""

    model: nn.Module
    spec: Spec
    pixels: torch.Tensor
    """uint8 (1, C, H, W)."""
    folder: Path

    @property
    def deployed(self) -> nn.Module:
        return deploy(self.model, IMG_SIZE)

    @property
    def batch(self) -> torch.Tensor:
        return self.spec.normalize(self.pixels)


@dataclass(frozen=True)
class Doctor:
    """Check this machine: hardware, versions, installed extras, and each runtime, tried with a tiny SHViT."""

    def run(self) -> dict[str, Any]:
        machine, versions, extras = describe_machine(), package_versions(), missing_packages()
        for title, rows in (("machine", machine), ("versions", versions)):
            console.print(f"{title}: " + ", ".join(f"{name} {value}" for name, value in rows.items()))
        for extra, missing in extras.items():
            hint = f"lacks {', '.join(missing)}; pip install 'shvit[{extra}]'" if missing else "installed"
            console.print(f"extra {extra}: {hint}")
        trials = try_runtimes(console.print)
        table = Table("runtime", "works", *terminal.right_aligned("error", "seconds"), "reason")
        for each in trials:
            error = "–" if each.error is None else f"{each.error:.1e}"
            table.add_row(each.runtime, "yes" if each.works else "no", error, f"{each.seconds:.1f}", each.reason)
        console.print(table)
        return {"machine": machine, "versions": versions, "extras": extras, "runtimes": [asdict(t) for t in trials]}


def describe_machine() -> dict[str, str]:
    """Return processor, cores, memory, instruction sets, operating system and GPUs."""
    names = getattr(os, "sysconf_names", {})  # none on Windows
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None
    gpus = [gpu_name()] if torch.cuda.is_available() else []
    gpus += ["Metal"] if torch.backends.mps.is_available() else []
    return {
        "processor": processor_name(),
        "cores": str(os.cpu_count()),
        "memory": "unknown" if size is None else f"{size / 2**30:.1f} GiB",
        "instructions": " ".join(instruction_sets()),
        "system": f"{platform.system()} {platform.release()}",
        "GPU": " and ".join(gpus) or "none",
    }


def missing_packages() -> dict[str, list[str]]:
    """Return the packages that each extra lacks here; none where it is installed."""
    extras = sorted({extra for each in EXTRAS.values() for extra in each})
    return {
        extra: [name for name, each in EXTRAS.items() if extra in each and importlib.util.find_spec(name) is None]
        for extra in extras
    }


def try_runtimes(log: Callable[[str], None] = lambda _: None) -> list[Trial]:
    """Return the outcome of every runtime; whatever goes wrong in one is its reason, in one line."""
    with scratch_folder() as folder, torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        model = timm.create_model("shvit_s1", **TINY).eval()
        randomize_norms(model)
        spec = Spec.of("shvit_s1", model, IMG_SIZE)
        tiny = TinyModel(model, spec, torch.randint(256, (1, *spec.shape), dtype=torch.uint8), folder)
        expected = model(tiny.batch)
        return [_try(name, run, tiny, expected, log) for name, run in RUNTIMES.items()]


def _try(
    name: str, run: Callable[[TinyModel], torch.Tensor], tiny: TinyModel, expected: torch.Tensor,
    log: Callable[[str], None],
) -> Trial:  # fmt: skip
    log(f"trying {name}")
    start, error, reason = time.perf_counter(), None, ""
    try:
        with quiet():
            output = run(tiny)
        error = float((output.float().cpu() - expected).abs().max() / expected.std())
        if not error <= MAX_ERROR:
            reason = "its outputs differ from the model's; please report it with the versions above"
    except ModuleNotFoundError as missing:
        reason = advise(missing.name or "", ["doctor"])
    except Exception as failure:
        advice = f"; {ADVICE[name]}" if name in ADVICE and not isinstance(failure, InputError) else ""
        reason = (first_line(failure) or type(failure).__name__)[:300] + advice
    return Trial(name, not reason, error, round(time.perf_counter() - start, 1), reason)


def _compile(tiny: TinyModel) -> torch.Tensor:
    """Compile one stage, which needs all that the others need, and is done in seconds."""
    import torch._inductor.config as inductor

    torch.compiler.reset()
    deployed = tiny.deployed
    next(deployed.stages.children()).compile()  # type: ignore[union-attr]
    with inductor.patch(compile_threads=1):
        return deployed(tiny.batch)


def _run_cuda(tiny: TinyModel) -> torch.Tensor:
    if not torch.cuda.is_available():
        raise InputError("PyTorch finds no CUDA device here")
    return tiny.deployed.cuda()(tiny.batch.cuda())


def _run_onnx(tiny: TinyModel) -> torch.Tensor:
    return load_artifact(_write_onnx(tiny))(tiny.pixels)


def _run_onnx_cuda(tiny: TinyModel) -> torch.Tensor:
    import onnxruntime

    provider = "CUDAExecutionProvider"
    if provider not in onnxruntime.get_available_providers() or not torch.cuda.is_available():
        raise InputError("ONNX Runtime finds no CUDA device here; where there is one, pip install onnxruntime-gpu")
    session = onnxruntime.InferenceSession(str(_write_onnx(tiny)), providers=[provider])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: tiny.batch.numpy()})[0])


def _run_openvino(tiny: TinyModel) -> torch.Tensor:
    from ..backends.openvino import write_openvino

    path = tiny.folder / "tiny.xml"
    write_openvino(_write_onnx(tiny), path, tiny.spec)
    return load_artifact(path)(tiny.pixels)


def _run_mil(tiny: TinyModel) -> torch.Tensor:
    return load_artifact(_write_coreml(tiny))(tiny.pixels)


def _run_coreml(tiny: TinyModel) -> torch.Tensor:
    if sys.platform != "darwin":
        raise InputError("Core ML is part of macOS, which this is not")
    return load_artifact(_write_coreml(tiny), native=True)(tiny.pixels)


def _write_onnx(tiny: TinyModel) -> Path:
    from ..backends.onnx import write_onnx

    path = tiny.folder / "tiny.onnx"
    if not path.exists():
        write_onnx(tiny.deployed, path, tiny.spec)
    return path


def _write_coreml(tiny: TinyModel) -> Path:
    from ..backends.coreml import write_coreml

    path = tiny.folder / "tiny.mlpackage"
    if not path.exists():
        write_coreml(tiny.deployed, path, tiny.spec)
    return path


RUNTIMES: dict[str, Callable[[TinyModel], torch.Tensor]] = {
    "torch": lambda tiny: tiny.deployed(tiny.batch),
    "torch.compile": _compile,
    "torch on CUDA": _run_cuda,
    "onnxruntime": _run_onnx,
    "onnxruntime on CUDA": _run_onnx_cuda,
    "openvino": _run_openvino,
    "Core ML packages in our evaluator": _run_mil,
    "Core ML": _run_coreml,
}
ADVICE = {
    "torch.compile": "install a C++ compiler (g++ or clang)",
    "openvino": "pip install 'shvit[openvino]'",
    "onnxruntime": "pip install 'shvit[export]'",
    "Core ML packages in our evaluator": "pip install 'shvit[coreml]'",
}
"""What may help where a runtime is installed, and fails."""
