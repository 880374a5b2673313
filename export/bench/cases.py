"""What `shvit bench` times: from a model or a file to a case with its options for worker.py."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from shvit.deployment import deploy
from shvit.errors import InputError, refuse
from shvit.files import is_there
from shvit.weights.resolve import Weights, find_weights, resolve_weights

from ..backends.artifact import refuse_changed
from ..backends.tuning import TUNING
from ..guards import one_line
from ..images import sample_images
from ..pipeline import MIN_CALIBRATION, Format, Source, float_layers, int8_onnx_writer
from ..spec import Spec, open_weights
from ..verify import Reference
from .runtimes import FILE_RUNTIMES, RUNTIMES, Job, check_runtimes, file_job

VARIANTS = ("shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4")


@dataclass(frozen=True)
class Settings:
    """Settings that all cases of a run share."""

    threads: int
    checkpoint: Path | None = None
    img_size: int | None = None
    compute_units: str = "all"
    """A key of `COMPUTE_UNITS`."""
    pretrained: bool = False
    """Use each model's published weights in place of a checkpoint."""


@dataclass(frozen=True)
class BenchModel:
    """A model to be timed, and a folder for the files that are made from it; each file is made once."""

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
        excluded = float_layers(kind, deploy(self.opened[0]))
        self._write_int8(path, replace(self.spec, precision="int8", excluded_layers=excluded))
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
        """Write the reference export: timm's own model, its norms fused by timm, by the older exporter at opset 11."""
        from timm.utils import reparameterize_model

        from ..backends.onnx import INPUT, quiet

        path = self._path(f"-reference-{batch_size}.onnx")
        model = reparameterize_model(create_timm_model(self.name, self.opened[0])).eval()
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


def create_timm_model(name: str, model: nn.Module) -> nn.Module:
    """Return timm's port of a SHViT with the weights of ours; any other model as it is."""
    import timm.models.shvit

    from shvit.shvit import SHViT

    if not isinstance(model, SHViT) or model.distilled:
        return model
    port = getattr(timm.models.shvit, name)(num_classes=model.num_classes, in_chans=model.in_chans)
    port.load_state_dict(model.state_dict())
    return port.eval()


def resolve_models(
    models: list[str] | None, checkpoint: Path | None, pretrained: bool, log: Callable[[str], None]
) -> tuple[list[str], Path | None]:
    """Return the models to be timed, by default the checkpoint's, and the checkpoint's file.

    Raises:
        InputError: as `resolve_weights`, or a checkpoint and pretrained weights are both asked for.
    """
    if models is not None and not models:
        raise InputError("--models: nothing to try; give at least one model")
    if pretrained:
        refuse("--pretrained takes each model's published weights", checkpoint=checkpoint)
    if checkpoint is None:
        return models or list(VARIANTS), None
    if models:
        return models, find_weights(checkpoint, log)[0]
    weights = resolve_weights(None, checkpoint, log=log)
    return [weights.model], weights.checkpoint


@dataclass(frozen=True)
class BenchCase:
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


def create_case(model: BenchModel, name: str, batch_size: int, cores: Sequence[int]) -> BenchCase:
    """Return the case of a model in the runtime of that name."""
    runtime = RUNTIMES[name]
    job = {**runtime.job(model, batch_size), "threads": model.settings.threads, "cores": list(cores)}
    environment = dict(TUNING[runtime.tuning].environment) if runtime.tuning else {}
    return BenchCase(
        model.name, name, runtime.precision, model.spec.img_size, batch_size, model.macs, job, environment
    )  # fmt: skip


def create_file_case(path: Path, batch_size: int, settings: Settings, cores: Sequence[int], tuned: bool) -> BenchCase:
    """Return the case of an exported file, ours or third-party, in the runtime of its format.

    Args:
        tuned: run the file with our settings for the runtime, in place of the runtime's defaults.

    Raises:
        InputError: an unknown format, no such file, or no input that could be an image.
    """
    if path.suffix not in FILE_RUNTIMES:
        raise InputError(f"{path}: unknown artifact {path.suffix!r}; choose from {', '.join(FILE_RUNTIMES)}")
    if not is_there(path):
        raise InputError(f"{path}: no such file")
    refuse_changed(path)
    runtime = FILE_RUNTIMES[path.suffix]
    check_runtimes([runtime])
    with one_line(path, "cannot be opened"):
        img_size, batch, precision = INSPECTORS[path.suffix](path)
    if batch not in (None, batch_size):
        raise InputError(f"{path} takes batches of {batch}, not of {batch_size}; choose --batch-sizes {batch}")
    job = file_job(path.resolve(), batch_size, precision, settings.compute_units)
    job |= {"threads": settings.threads, "cores": list(cores)}
    environment = TUNING[runtime].environment if tuned and runtime in TUNING else {}
    return BenchCase(path.name, runtime, precision, img_size, batch_size, None, job, dict(environment))


def choose_cores(threads: int) -> list[int]:
    """Return the last of the cores that this process may use, one for each thread; none where they cannot be chosen.

    Raises:
        InputError: more threads than cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise InputError(f"--threads {threads} is more than the {len(allowed)} cores that this process may use")
    return allowed[-threads:]


# --- third-party files ------------------------------------------------------------------------------------------------

Inspection = tuple[int, int | None, str]
"""Height in pixels, the fixed batch size if any, and the precision of a file."""
ONNX_INPUTS = ("tensor(float)", "tensor(float16)", "tensor(uint8)")
"""Types of inputs that the worker can make."""


def _inspect_onnx(path: Path) -> Inspection:
    from ..backends.artifact import onnx_session
    from ..backends.onnx import SPEC_KEY, metadata, read_onnx, spec_from

    notes = metadata(read_onnx(path))
    inputs = onnx_session(path, 1).get_inputs()
    size, batch = _image_input(path, [each.shape for each in inputs])
    if inputs[0].type not in ONNX_INPUTS:
        raise InputError(f"{path}: takes {inputs[0].type}; only {', '.join(ONNX_INPUTS)} are timed here")
    precision = spec_from(notes, path).precision if SPEC_KEY in notes else _onnx_precision(path)
    return size, batch, precision


def _inspect_openvino(path: Path) -> Inspection:
    from ..backends.onnx import SPEC_KEY, spec_from
    from ..backends.openvino import read_openvino

    model, notes = read_openvino(path)
    shapes = [[dim.get_length() if dim.is_static else None for dim in port.partial_shape] for port in model.inputs]
    size, batch = _image_input(path, shapes)
    return size, batch, spec_from(notes, path).precision if SPEC_KEY in notes else "fp32"


def _inspect_coreml(path: Path) -> Inspection:
    from ..backends.artifact import open_artifact

    spec = open_artifact(path).spec
    return spec.img_size, None, spec.precision


def _image_input(path: Path, shapes: Sequence[Sequence[int | str | None]]) -> tuple[int, int | None]:
    """Return the height in pixels and the fixed batch size, if any, of a file's one input."""
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise InputError(f"{path}: has no single input of four dimensions; only image models are timed here")
    batch, *sides = shapes[0]
    sizes = [side for side in sides if isinstance(side, int) and side > 4]
    if len(sizes) < 2:
        raise InputError(f"{path}: leaves the image's height and width open; export it for one size")
    return sizes[0], batch if isinstance(batch, int) else None


def _onnx_precision(path: Path) -> str:
    """Return the precision of a third-party file, by its operators and the types of its weights."""
    import onnx

    from ..backends.onnx import operators, read_onnx

    proto = read_onnx(path)
    if {"QuantizeLinear", "QLinearConv", "DynamicQuantizeLinear"} & set(operators(proto)):
        return "int8"
    halves = sum(each.data_type == onnx.TensorProto.FLOAT16 for each in proto.graph.initializer)
    return "fp16" if 2 * halves > len(proto.graph.initializer) else "fp32"


INSPECTORS = {".onnx": _inspect_onnx, ".xml": _inspect_openvino, ".mlpackage": _inspect_coreml}
