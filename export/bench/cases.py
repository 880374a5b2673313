"""Cases of `shvit bench`: a model or a file in a runtime, with the options for worker.py."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import timm.models.shvit
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shvit.errors import InputError, refuse
from shvit.files import is_there
from shvit.img_size import ImgSize
from shvit.shvit import SHViT
from shvit.terminal import quiet
from shvit.weights.resolve import Weights, find_weights, resolve_weights

from ..backends.backend import Job
from ..backends.registry import BACKENDS, refuse_changed, resolve_backend
from ..guards import one_line
from ..images import ImageFile, sample_images
from ..metadata import INPUT
from ..pipeline import MIN_CALIBRATION
from ..source import Source
from ..spec import Precision, Spec, open_weights
from ..verify import Reference
from ..wrappers import with_predictions
from .runtimes import RUNTIMES, check_runtimes

VARIANTS = ("shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4")


@dataclass(frozen=True)
class Settings:
    """Settings that all cases of a run share."""

    threads: int
    checkpoint: Path | None = None
    img_size: ImgSize | None = None
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
    _files: dict[tuple[str, str], Path] = field(default_factory=dict)

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
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.opened[0](self.spec.blank())
        return counter.get_total_flops() // 2

    def file(self, name: str, precision: Precision) -> Path:
        """Return the file of a format (a key of `BACKENDS`) that `shvit export all` would write."""
        if (name, precision) not in self._files:
            backend, path = BACKENDS[name], self._path(f"-{precision}{BACKENDS[name].ending}")
            options = backend.options_for(self.spec)
            spec = options.complete(replace(self._source.spec, precision=precision))
            write = backend.create_writer(replace(self._source, spec=spec), options)
            floats = backend.float_layers(self._source.deployed()) if precision == "int8" else ()
            write(path, replace(spec, excluded_layers=floats))
            self._files[name, precision] = path
        return self._files[name, precision]

    @cached_property
    def _source(self) -> Source:
        calibration = self._calibration()  # speed does not depend on the ranges
        model, spec = with_predictions(*self.opened)
        return Source(Reference(model, spec, [], ""), spec, calibration)

    def _calibration(self) -> list[ImageFile]:
        """Return scikit-image's images; or noise, of a model that takes no images of 1 or 3 channels of 8 bits."""
        spec, rng = self.spec, np.random.default_rng(0)
        if spec.pixels.uses_pillow:
            return sample_images(None, limit=MIN_CALIBRATION)
        files = [ImageFile(self._path(f"-noise-{index}.npy"), -1) for index in range(MIN_CALIBRATION)]
        for file in files:
            np.save(file.path, (255 * rng.random(spec.shape)).astype(spec.pixel_type))
        return files

    def reference(self, batch_size: int) -> Path:
        """Write the reference export: timm's own model, its norms fused by timm, by the older exporter at opset 11."""
        path = self._path(f"-reference-{batch_size}.onnx")
        model = reparameterize_model(create_timm_model(self.name, self.opened[0])).eval()
        names: dict[str, Any] = {"input_names": [INPUT], "output_names": ["logits"]}
        with torch.no_grad(), quiet():
            torch.onnx.export(model, (self.spec.blank(batch_size),), str(path), dynamo=False, opset_version=11, **names)
        return path

    def _path(self, ending: str) -> Path:
        name = self.name.replace("/", "_")  # of a model on the hub
        return self.folder / f"{name}-{self.settings.img_size or 'own'}{ending}"


def create_timm_model(name: str, model: nn.Module) -> nn.Module:
    """Return timm's port of a SHViT with the weights of ours; any other model as it is."""
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
    img_size: ImgSize
    batch_size: int
    macs: int | None
    job: Job
    environment: dict[str, str]
    on_cpu: bool = True

    @property
    def is_one_cpu_thread(self) -> bool:
        """Processor time is the work's alone: of several threads, those that spin while they wait count too."""
        return self.on_cpu and self.job["threads"] == 1


def create_case(model: BenchModel, name: str, batch_size: int, cores: Sequence[int]) -> BenchCase:
    """Return the case of a model in the runtime of that name."""
    runtime = RUNTIMES[name]
    job = {**runtime.job(model, batch_size), "threads": model.settings.threads, "cores": list(cores)}
    environment = dict(BACKENDS[runtime.backend].environment) if runtime.backend and runtime.tuned else {}
    size, macs = model.spec.img_size, model.macs
    return BenchCase(model.name, name, runtime.precision, size, batch_size, macs, job, environment, runtime.on_cpu)


def create_file_case(path: Path, batch_size: int, settings: Settings, cores: Sequence[int], tuned: bool) -> BenchCase:
    """Return the case of an exported file, ours or third-party, in the runtime of its format.

    Args:
        tuned: run the file with our settings for the runtime, in place of the runtime's defaults.

    Raises:
        InputError: an unknown format, no such file, or no input that could be an image.
    """
    backend = resolve_backend(path)
    if not is_there(path):
        raise InputError(f"{path}: no such file")
    refuse_changed(path)
    check_runtimes([backend.runtime])
    with one_line(path, "cannot be opened"):
        img_size, batch, precision = backend.inspect(path)
    if batch not in (None, batch_size):
        raise InputError(f"{path} takes batches of {batch}, not of {batch_size}; choose --batch-sizes {batch}")
    job = backend.job(path.resolve(), batch_size, precision, settings.compute_units)
    job |= {"threads": settings.threads, "cores": list(cores)}
    environment = backend.environment if tuned else {}
    on_cpu = backend.timings[backend.runtime].on_cpu
    return BenchCase(path.name, backend.runtime, precision, img_size, batch_size, None, job, dict(environment), on_cpu)


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
