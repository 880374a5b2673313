"""What `shvit bench` can time: a table of runtimes, and from a model in one of them to a job for worker.py."""

import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shvit.deployment import deploy
from shvit.errors import InputError
from shvit.files import is_there
from shvit.terminal import quiet
from shvit.weights.resolve import Weights, resolve_weights

from ..backends.registry import refuse_changed
from ..backends.tuning import TUNING
from ..guards import one_line
from ..images import sample_images
from ..metadata import INPUT, SPEC_KEY, spec_from
from ..pipeline import MIN_CALIBRATION, Format, Source, float_layers, int8_onnx_writer
from ..spec import Spec, open_weights
from ..verify import Reference

Job = dict[str, Any]
COMPUTE_UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "cpu-gpu": "CPU_AND_GPU", "cpu-ne": "CPU_AND_NE"}
"""What Core ML may run on (ne: Neural Engine), and the names that coremltools has for it."""


@dataclass(frozen=True)
class Settings:
    """What holds for every case of a run."""

    threads: int
    checkpoint: Path | None = None
    img_size: int | None = None
    compute_units: str = "all"
    """Of `COMPUTE_UNITS`."""
    pretrained: bool = False
    """Each model's published weights in place of a checkpoint."""


@dataclass(frozen=True)
class Subject:
    """A model to be timed, and a folder for the files that are made of it; each is made once."""

    name: str
    settings: Settings
    folder: Path

    @cached_property
    def opened(self) -> tuple[nn.Module, Spec]:
        return open_weights(self.weights, self.settings.img_size)

    @cached_property
    def weights(self) -> Weights:
        return resolve_weights(self.name, self.settings.checkpoint, pretrained=self.settings.pretrained)

    @property
    def spec(self) -> Spec:
        return self.opened[1]

    @cached_property
    def macs(self) -> int:
        """Multiply-adds for one image (convolutions and matrix products)."""
        from torch.utils.flop_counter import FlopCounterMode

        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.opened[0](self.spec.blank())
        return counter.get_total_flops() // 2

    @cached_property
    def onnx(self) -> Path:
        from ..backends.onnx import write_onnx

        path = self._path(".onnx")
        write_onnx(deploy(self.opened[0], self.spec.img_size), path, self.spec, dynamic_batch=True)
        return path

    @cached_property
    def onnx_int8(self) -> Path:
        return self._int8("onnx")

    @cached_property
    def openvino_int8(self) -> Path:
        return self._int8("openvino")

    def _int8(self, kind: Format) -> Path:
        path = self._path(f"-{kind}-int8.onnx")
        self._write_int8(
            path, replace(self.spec, precision="int8", excluded_layers=float_layers(kind, deploy(self.opened[0])))
        )
        return path

    @cached_property
    def _write_int8(self) -> Callable[[Path, Spec], None]:
        calibration = sample_images(None, limit=MIN_CALIBRATION)  # speed does not depend on the ranges
        source = Source(Reference(self.opened[0], self.spec, [], ""), self.spec, calibration)
        return int8_onnx_writer(source.unfolded(), self.spec, source.ranges(), dynamic_batch=True)

    @cached_property
    def coreml(self) -> Path:
        from ..backends.coreml import write_coreml

        path = self._path(".mlpackage")
        spec = replace(self.spec, precision="fp16", uint8_input=True)
        write_coreml(deploy(self.opened[0], spec.img_size), path, spec)
        return path

    def reference(self, batch_size: int) -> Path:
        """As others export it: timm's own model, its norms folded by timm, through the older exporter at opset 11."""
        from timm.utils import reparameterize_model

        path = self._path(f"-reference-{batch_size}.onnx")
        model = reparameterize_model(timms_own(self.name, self.opened[0])).eval()
        with torch.no_grad(), quiet():
            torch.onnx.export(
                model,
                (self.spec.blank(batch_size),),
                str(path),
                dynamo=False,
                opset_version=11,
                input_names=[INPUT],
                output_names=["logits"],
            )
        return path

    def _path(self, ending: str) -> Path:
        name = self.name.replace("/", "_")  # of a model on the hub
        return self.folder / f"{name}-{self.settings.img_size or 'own'}{ending}"


def timms_own(name: str, model: nn.Module) -> nn.Module:
    """timm's port of a SHViT with the weights of ours; any other model as it is."""
    import timm.models.shvit

    from shvit.shvit import SHViT

    if not isinstance(model, SHViT) or model.distilled:
        return model
    port = getattr(timm.models.shvit, name)(num_classes=model.num_classes, in_chans=model.in_chans)
    port.load_state_dict(model.state_dict())
    return port.eval()


@dataclass(frozen=True)
class Runtime:
    """A column of the table: how a model gets into it, and in which arithmetic it runs there."""

    precision: str
    job: Callable[[Subject, int], Job]
    """From a model and a batch size to what the worker is told, besides threads and cores."""
    tuning: str | None = None
    """Whose tuning it runs with."""
    package: str = "torch"
    """That it needs."""
    extra: str = "export"
    """That installs it."""


def _torch(**options: Any) -> Callable[[Subject, int], Job]:
    said = {"device": "cpu", "bf16": False, "channels_last": False, "compiled": False, **options}

    def job(subject: Subject, batch_size: int) -> Job:
        file = subject.weights.checkpoint
        checkpoint = str(file.resolve()) if file else None
        return {"runner": "torch", "model": subject.name, "checkpoint": checkpoint,
                "img_size": subject.spec.img_size, **said}  # fmt: skip

    return job


def _onnx(path: Path, provider: str = "cpu") -> Job:
    return {"runner": "onnx", "path": str(path), "provider": provider}


def _openvino(path: Path, batch_size: int, bf16: bool = False) -> Job:
    return {"runner": "openvino", "path": str(path), "bf16": bf16, "batch_size": batch_size}


def _coreml(path: Path, settings: Settings) -> Job:
    return {"runner": "coreml", "path": str(path), "compute_units": COMPUTE_UNITS[settings.compute_units]}


RUNTIMES = {
    # eager
    "torch": Runtime("fp32", _torch()),
    # eager, channels last in memory
    "torch-channels-last": Runtime("fp32", _torch(channels_last=True)),
    # eager, bfloat16, channels last
    "torch-bf16": Runtime("bf16", _torch(channels_last=True, bf16=True)),
    # torch.compile with frozen weights
    "torch-compiled": Runtime("fp32", _torch(compiled=True)),
    # the same in bfloat16, channels last
    "torch-compiled-bf16": Runtime("bf16", _torch(compiled=True, channels_last=True, bf16=True)),
    # how others export: timm's model, fused, opset 11, ONNX Runtime's defaults
    "reference": Runtime(
        "fp32",
        lambda subject, batch_size: _onnx(subject.reference(batch_size)),
        package="onnxruntime",
    ),
    # our ONNX file
    "onnxruntime": Runtime("fp32", lambda subject, _: _onnx(subject.onnx), "onnxruntime", "onnxruntime"),
    # our int8 ONNX file
    "onnxruntime-int8": Runtime("int8", lambda subject, _: _onnx(subject.onnx_int8), "onnxruntime", "onnxruntime"),
    # our model in OpenVINO
    "openvino": Runtime(
        "fp32",
        lambda subject, batch_size: _openvino(subject.onnx, batch_size),
        "openvino",
        "openvino",
        "openvino",
    ),
    # the same in bfloat16
    "openvino-bf16": Runtime(
        "bf16",
        lambda subject, batch_size: _openvino(subject.onnx, batch_size, bf16=True),
        "openvino",
        "openvino",
        "openvino",
    ),
    # our int8 model in OpenVINO
    "openvino-int8": Runtime(
        "int8",
        lambda subject, batch_size: _openvino(subject.openvino_int8, batch_size),
        "openvino",
        "openvino",
        "openvino",
    ),
    # our float16 package in Core ML, on a Mac
    "coreml": Runtime(
        "fp16",
        lambda subject, _: _coreml(subject.coreml, subject.settings),
        package="coremltools",
        extra="coreml",
    ),
    # PyTorch on a GPU, one CUDA graph
    "cuda": Runtime("fp32", _torch(device="cuda", channels_last=True)),
    # the same in bfloat16
    "cuda-bf16": Runtime("bf16", _torch(device="cuda", channels_last=True, bf16=True)),
    # our ONNX file, CUDA provider
    "onnxruntime-cuda": Runtime("fp32", lambda subject, _: _onnx(subject.onnx, "cuda"), package="onnxruntime"),
    # our ONNX file, TensorRT provider
    "onnxruntime-tensorrt": Runtime(
        "fp32",
        lambda subject, _: _onnx(subject.onnx, "tensorrt"),
        package="onnxruntime",
    ),
}
FILES = {".onnx": "onnxruntime", ".xml": "openvino", ".mlpackage": "coreml"}
"""Which runtime runs an exported file."""


@dataclass(frozen=True)
class Case:
    """One model in one runtime with one batch size."""

    model: str
    runtime: str
    precision: str
    img_size: int
    batch_size: int
    macs: int | None
    job: Job
    environment: dict[str, str]

    @property
    def is_one_cpu_thread(self) -> bool:
        """Whether processor time is the time of its work alone.

        Of several threads the slowest decides how long a call takes, and those that spin while they wait count too.
        """
        runs_on_cpu = self.job["runner"] == "openvino" or "cpu" in (self.job.get("provider"), self.job.get("device"))
        return runs_on_cpu and self.job["threads"] == 1


PLANNING_MACOS = (14, 4)
"""The first macOS with compute plans."""


def check_runtimes(names: Sequence[str]) -> None:
    """Raises InputError for a runtime that is unknown or does not run on this machine."""
    for name in names:
        if name not in RUNTIMES:
            raise InputError(f"unknown runtime {name!r}; choose from {', '.join(RUNTIMES)}")
        runtime = RUNTIMES[name]
        if importlib.util.find_spec(runtime.package) is None:
            raise InputError(f"runtime {name} needs {runtime.package}; pip install 'shvit[{runtime.extra}]'")
        if name == "coreml" and sys.platform != "darwin":
            raise InputError("runtime coreml needs macOS, of which Core ML is a part; leave it out here")
        if name == "coreml" and tuple(map(int, platform.mac_ver()[0].split("."))) < PLANNING_MACOS:
            least, this = ".".join(map(str, PLANNING_MACOS)), platform.mac_ver()[0]
            raise InputError(
                f"runtime coreml needs macOS {least} or newer, whose Core ML tells where it runs what, "
                f"and this is {this}; leave it out here"
            )
        if "cuda" in name and not name.startswith("onnx") and not torch.cuda.is_available():
            raise InputError(f"runtime {name} needs a CUDA device, and PyTorch finds none here; leave it out")


def case_of_model(subject: Subject, name: str, batch_size: int, cores: Sequence[int]) -> Case:
    """The model in the runtime of that name."""
    runtime, spec = RUNTIMES[name], subject.spec
    job = {**runtime.job(subject, batch_size), "threads": subject.settings.threads, "cores": list(cores)}
    environment = TUNING[runtime.tuning].environment if runtime.tuning else {}
    return Case(
        subject.name, name, runtime.precision, spec.img_size, batch_size, subject.macs, job, dict(environment)
    )  # fmt: skip


def case_of_file(path: Path, batch_size: int, settings: Settings, cores: Sequence[int], tuned: bool) -> Case:
    """An exported file in the runtime of its format, whoever made it.

    Args:
        tuned: run it as ours are run, in place of as a runtime's defaults have it.

    Raises:
        InputError: an unknown format, no such file, or no input that could be an image.
    """
    if path.suffix not in FILES:
        raise InputError(f"{path}: unknown artifact {path.suffix!r}; choose from {', '.join(FILES)}")
    if not is_there(path):
        raise InputError(f"{path}: no such file")
    refuse_changed(path)
    runtime = FILES[path.suffix]
    check_runtimes([runtime])
    with one_line(path, "cannot be opened"):
        img_size, batch, precision = READERS[path.suffix](path)
    if batch not in (None, batch_size):
        raise InputError(f"{path} takes batches of {batch}, not of {batch_size}; choose --batch-sizes {batch}")
    job = {
        ".onnx": lambda: _onnx(path.resolve()),
        ".xml": lambda: _openvino(path.resolve(), batch_size, bf16=precision == "bf16"),
        ".mlpackage": lambda: _coreml(path.resolve(), settings),
    }[path.suffix]()
    job |= {"threads": settings.threads, "cores": list(cores)}
    environment = TUNING[runtime].environment if tuned and runtime in TUNING else {}
    return Case(path.name, runtime, precision, img_size, batch_size, None, job, dict(environment))


def _image_input(path: Path, shapes: Sequence[Sequence[Any]]) -> tuple[int, int | None]:
    """Height in pixels and the fixed batch, if any, of a file's one input."""
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise InputError(f"{path}: has no single input of four dimensions; only image models are timed here")
    batch, *sides = shapes[0]
    sizes = [side for side in sides if isinstance(side, int) and side > 4]
    if len(sizes) < 2:
        raise InputError(f"{path}: leaves the image's height and width open; export it for one size")
    return sizes[0], batch if isinstance(batch, int) else None


def _read_onnx_file(path: Path) -> tuple[int, int | None, str]:
    from ..backends.registry import onnx_session
    from ..backends.onnx import metadata, read_onnx

    said = metadata(read_onnx(path))
    session = onnx_session(path, 1)
    inputs = session.get_inputs()
    size, batch = _image_input(path, [each.shape for each in inputs])
    if inputs[0].type not in ONNX_INPUTS:
        raise InputError(f"{path}: takes {inputs[0].type}; only {', '.join(ONNX_INPUTS)} are timed here")
    precision = spec_from(said, path).precision if SPEC_KEY in said else _onnx_precision(path)
    return size, batch, precision


ONNX_INPUTS = ("tensor(float)", "tensor(float16)", "tensor(uint8)")
"""What the worker makes inputs of."""


def _onnx_precision(path: Path) -> str:
    """Of a stranger's file, by its operators and the types of its weights."""
    import onnx

    from ..backends.onnx import operators, read_onnx

    proto = read_onnx(path)
    if {"QuantizeLinear", "QLinearConv", "DynamicQuantizeLinear"} & set(operators(proto)):
        return "int8"
    halves = sum(each.data_type == onnx.TensorProto.FLOAT16 for each in proto.graph.initializer)
    return "fp16" if 2 * halves > len(proto.graph.initializer) else "fp32"


def _read_openvino_file(path: Path) -> tuple[int, int | None, str]:
    from ..backends.openvino import read_openvino

    model, said = read_openvino(path)
    shapes = [[dim.get_length() if dim.is_static else None for dim in port.partial_shape] for port in model.inputs]
    size, batch = _image_input(path, shapes)
    return size, batch, spec_from(said, path).precision if SPEC_KEY in said else "fp32"


def _read_coreml_file(path: Path) -> tuple[int, int | None, str]:
    from ..backends.registry import open_artifact

    spec = open_artifact(path).spec
    return spec.img_size, None, spec.precision


READERS = {".onnx": _read_onnx_file, ".xml": _read_openvino_file, ".mlpackage": _read_coreml_file}


def choose_cores(threads: int) -> list[int]:
    """The last of the cores that this process may use, one for each thread; none where they cannot be chosen.

    Raises:
        InputError: more threads than cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise InputError(f"--threads {threads} is more than the {len(allowed)} cores that this process may use")
    return allowed[-threads:]
