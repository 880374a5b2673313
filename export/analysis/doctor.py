"""The command `shvit doctor`: this machine, its versions and extras, and each runtime tried with a tiny model."""

import importlib.util
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rich.table import Table
from torch import nn

from shvit.deployment import deploy
from shvit.environment import EXTRAS, advise, versions
from shvit.errors import InputError, first_line
from shvit.files import scratch_folder
from shvit.sessions import create_session
from shvit.terminal import console, quiet, right_aligned

from ..arm64.compare import check_arm64
from ..arm64.emulator import check_emulator, qemu_version
from ..backends.backend import Backend
from ..backends.registry import BACKENDS, load_artifact
from ..bench.roofline import PACKAGES, gpu_name, instruction_sets, processor_name
from ..metadata import INPUT
from ..source import Source
from ..spec import Spec, randomize_norms
from ..verify import Reference

TINY: dict[str, Any] = {"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "partial_dim": (8, 6, 8), "num_classes": 10}
IMG_SIZE = 64
MAX_ERROR = 2e-2  # of a runtime that works, relative to the spread of the outputs; float16 needs some of it


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
    """A tiny SHViT with random weights, one image as uint8 (1, C, H, W) and normalized, and a folder for its files."""

    model: nn.Module
    spec: Spec
    pixels: torch.Tensor
    batch: torch.Tensor
    folder: Path

    def write(self, backend: Backend[Any]) -> Path:
        """Return a file of the model, written once."""
        path, options = self.folder / f"tiny{backend.ending}", backend.options()
        if not path.exists():
            source = Source(Reference(self.model, self.spec, [], ""), options.complete(self.spec), [])
            backend.create_writer(source, options)(path, source.spec)
        return path


@dataclass(frozen=True)
class Doctor:
    """Check this machine: hardware, versions, installed extras, and each runtime, tried with a tiny SHViT."""

    def run(self) -> dict[str, Any]:
        show = console().print
        machine, installed, extras = describe_machine(), versions(*PACKAGES), missing_packages()
        for title, rows in (("machine", machine), ("versions", installed)):
            show(f"{title}: " + ", ".join(f"{name} {value}" for name, value in rows.items()))
        for extra, missing in extras.items():
            hint = f"lacks {', '.join(missing)}; pip install 'shvit[{extra}]'" if missing else "installed"
            show(f"extra {extra}: {hint}")
        arm64 = describe_emulator()
        show(f"ARM64: {arm64}")
        trials = try_runtimes(show)
        table = Table("runtime", "works", *right_aligned("error", "seconds"), "reason")
        for each in trials:
            error = "–" if each.error is None else f"{each.error:.1e}"
            table.add_row(each.runtime, "yes" if each.works else "no", error, f"{each.seconds:.1f}", each.reason)
        show(table)
        runtimes = [asdict(trial) for trial in trials]
        return {"machine": machine, "versions": installed, "extras": extras, "arm64": arm64, "runtimes": runtimes}


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


def describe_emulator() -> str:
    """Return what verifies files for ARM64 here, or what is missing for it, in one line."""
    try:
        check_emulator()
    except InputError as missing:
        return str(missing)
    lacking = "".join(_what_arm64_lacks(backend) for backend in BACKENDS.values() if backend.arm64 is not None)
    return f"files can be verified on processors that QEMU {qemu_version()} emulates, with --arm64{lacking}"


def _what_arm64_lacks(backend: Backend[Any]) -> str:
    """Return the end of a sentence on files of one format; empty where nothing is missing."""
    try:
        check_arm64(backend)
    except InputError as missing:
        return f"; those of {backend.title} not yet: {missing}"
    return ""


def missing_packages() -> dict[str, list[str]]:
    """Return the packages that each extra lacks here; none where it is installed."""
    missing: dict[str, list[str]] = {extra: [] for extra in sorted({name for each in EXTRAS.values() for name in each})}
    for package, extras in EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            for extra in extras:
                missing[extra].append(package)
    return missing


def try_runtimes(log: Callable[[str], None] = lambda _: None) -> list[Trial]:
    """Return the outcome of every runtime; whatever goes wrong in one is its reason, in one line."""
    with scratch_folder() as folder, torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        model = timm.create_model("shvit_s1", **TINY).eval()
        randomize_norms(model)
        spec = Spec.of("shvit_s1", model, IMG_SIZE)
        pixels = torch.randint(256, (1, *spec.shape), dtype=torch.uint8)
        tiny = TinyModel(model, spec, pixels, spec.normalize(pixels), folder)
        expected = model(tiny.batch)
        return [_try(name, tiny, expected, log) for name in RUNTIMES]


def _try(name: str, tiny: TinyModel, expected: torch.Tensor, log: Callable[[str], None]) -> Trial:
    log(f"trying {name}")
    start, error, reason = time.perf_counter(), None, ""
    try:
        if name.endswith("on CUDA") and not torch.cuda.is_available():
            raise InputError("PyTorch finds no CUDA device here")
        with quiet():
            output = RUNTIMES[name](tiny)
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
    deployed = deploy(tiny.model, IMG_SIZE)
    next(deployed.stages.children()).compile()  # type: ignore[union-attr]
    with inductor.patch(compile_threads=1):
        return deployed(tiny.batch)


def _run_onnx_cuda(tiny: TinyModel) -> torch.Tensor:
    session = create_session(tiny.write(BACKENDS["onnx"]), provider="cuda")
    return torch.from_numpy(session.run(None, {INPUT: tiny.batch.numpy()})[0])


def _run_backend(backend: Backend[Any], native: bool = False) -> Callable[[TinyModel], torch.Tensor]:
    return lambda tiny: load_artifact(tiny.write(backend), native=native)(tiny.pixels)


RUNTIMES: dict[str, Callable[[TinyModel], torch.Tensor]] = {
    "torch": lambda tiny: deploy(tiny.model, IMG_SIZE)(tiny.batch),
    "torch.compile": _compile,
    "torch on CUDA": lambda tiny: deploy(tiny.model, IMG_SIZE).cuda()(tiny.batch.cuda()),
    **{f"{backend.title} files": _run_backend(backend) for backend in BACKENDS.values()},
    "ONNX Runtime on CUDA": _run_onnx_cuda,
    "Core ML of macOS": _run_backend(BACKENDS["coreml"], native=True),
}
ADVICE = {  # for a runtime that is installed, and fails
    "torch.compile": "install a C++ compiler (g++ or clang)",
    **{f"{backend.title} files": f"pip install 'shvit[{backend.extra}]'" for backend in BACKENDS.values()},
}
