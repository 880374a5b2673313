"""A model or an artefact as a function from a batch to logits, with a fixed number of threads."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from shvit.errors import InputError
from shvit.train.evaluate import Predict

from .onnx import INPUT, OUTPUT, operators, read_spec, spec_from
from .spec import Spec


def torch_predict(model: nn.Module) -> Predict:
    """PyTorch, eager; set the number of threads with `torch.set_num_threads`."""

    def predict(batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(batch)

    return predict


def onnxruntime_predict(path: Path, threads: int | None = None) -> Predict:
    """ONNX Runtime on the CPU; a file with a fixed batch of 1 is fed one image after the other.

    Args:
        threads: of one operator; ONNX Runtime's choice (all cores) where None.

    Raises:
        InputError: the file is not there or ONNX Runtime refuses it.
    """
    import onnxruntime

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types are not public
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"{path}: ONNX Runtime cannot open it ({reason})") from error
    fixed_one = session.get_inputs()[0].shape[0] == 1

    def predict(batch: torch.Tensor) -> torch.Tensor:
        chunks = batch.split(1) if fixed_one else (batch,)
        outputs = [session.run(None, {INPUT: chunk.numpy()})[0] for chunk in chunks]
        return torch.cat([torch.from_numpy(output) for output in outputs])

    return predict


@dataclass(frozen=True)
class Artefact:
    """An exported file, opened."""

    path: Path
    spec: Spec
    runtime: str
    operators: dict[str, int]
    """How many of each, most frequent first."""
    run: Predict
    """What the file itself takes → logits."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W), from `spec.transform(normalize=False)` → logits (B, classes)."""
        return self.run(pixels if self.spec.takes_pixels else self.spec.normalize(pixels))


def open_artefact(path: Path, threads: int | None = None) -> Artefact:
    """A file of `shvit export`, by its suffix, in the runtime for it.

    Args:
        threads: of ONNX Runtime; its choice (all cores) where None.

    Raises:
        InputError: a suffix that no runtime here runs, no such file, or one that cannot be read.
    """
    if path.suffix == ".onnx":
        spec = read_spec(path)
        return Artefact(path, spec, "onnxruntime", operators(path), onnxruntime_predict(path, threads))
    if path.suffix == ".mlpackage":
        return _open_coreml(path)
    raise InputError(f"{path}: unknown artefact {path.suffix!r}; choose an .onnx file or an .mlpackage")


def _open_coreml(path: Path) -> Artefact:
    """Through `mil`, which runs everywhere."""
    from torchvision.transforms.functional import to_pil_image

    from .mil import Package

    package = Package(path)
    spec = spec_from(package.metadata, path)
    package.half = spec.precision == "fp16"

    def predict(pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([package(**{INPUT: to_pil_image(image)})[OUTPUT] for image in pixels])

    return Artefact(path, spec, "mil", package.operators, predict)
