"""A model or an artefact as a function from a batch to logits, with a fixed number of threads."""

from pathlib import Path

import torch
from torch import nn

from shvit.errors import InputError
from shvit.train.evaluate import Predict

from .onnx import INPUT


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


def open_artefact(path: Path, threads: int | None = None) -> Predict:
    """The predict function of an artefact, by its suffix.

    Raises:
        InputError: a suffix that no runtime here runs.
    """
    if path.suffix == ".onnx":
        return onnxruntime_predict(path, threads)
    if path.suffix == ".mlpackage":
        raise InputError(f"{path}: Core ML packages cannot be run yet; verify the ONNX file of the same checkpoint")
    raise InputError(f"{path}: unknown artefact {path.suffix!r}; choose an .onnx file")
