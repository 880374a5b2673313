"""Small third-party artifacts: an ONNX classifier of three nodes, and what of it is changed for an attack."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

SPEC = {
    "model": "shvit_s1",
    "img_size": 64,
    "in_chans": 3,
    "num_classes": 2,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "precision": "fp32",
    "uint8_input": False,
    "outputs": ["logits"],
    "other_sizes": [],
    "excluded_layers": [],
}
HEAD = "\x1b[2J\x1b]0;PWNED\x07head"
"""A node's name that would clear a terminal."""


def write_onnx(
    path: Path,
    spec: dict[str, Any] | str = SPEC,
    *,
    name: str = "image",
    dtype: int = TensorProto.FLOAT,
    shape: Sequence[int | str | None] = (1, 3, 64, 64),
    weight: np.ndarray | None = None,
    nodes: Sequence[Any] = (),
    outputs: Sequence[str] = ("logits",),
    initializers: Sequence[Any] = (),
    feature: str = "pooled",
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a model that pools its input and multiplies it by a matrix.

    Args:
        spec: what the file says of itself; a text is written as it is.
        nodes: further ones; from `feature`, the value that the matrix is multiplied with.
    """
    weight = np.ones((3, 2), np.float32) if weight is None else weight
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", [name], ["pooled"]),
            *nodes,
            helper.make_node("Flatten", [feature], ["flat"]),
            helper.make_node("Gemm", ["flat", "weight"], ["logits"], name=HEAD),
        ],
        "graph",
        [helper.make_tensor_value_info(name, dtype, shape)],
        [helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in outputs],
        [numpy_helper.from_array(weight, "weight"), *initializers],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    text = spec if isinstance(spec, str) else json.dumps(spec)
    for key, value in {"shvit.format": "1", "shvit.spec": text, **(metadata or {})}.items():
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


def external(location: str, length: int = 24) -> Any:
    """The matrix, kept in another file."""
    tensor = onnx.TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=(3, 2))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def constant(name: str, values: Any, dtype: Any = np.int64) -> Any:
    return numpy_helper.from_array(np.array(values, dtype), name)


def class_folders(folder: Path, names: Sequence[str] = ("a", "b"), count: int = 4) -> Path:
    """Write a folder of class folders with plain images."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (20, 20), (40 * index, 0, 0)).save(folder / name / f"{index}.png")
    return folder
