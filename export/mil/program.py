"""An evaluator of Core ML packages for any machine: it reads a saved file and computes each operation with PyTorch.

It is meant for verification, not for speed. Everything is float32; or rounded to float16 after each operation whose
result the program declares as such, which stands in for hardware that computes in half precision, such as the Neural
Engine.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from shvit.documents import load_json
from shvit.errors import InputError, first_line
from shvit.files import files_below, is_file, is_folder
from shvit.terminal import quiet

from ..guards import Port, check_elements, one_line
from ..wrappers import MIL_LAYERS as LAYERS
from .operations import OPERATIONS

if TYPE_CHECKING:
    from coremltools.converters.mil.mil import Function, Operation, Var
    from coremltools.proto.Model_pb2 import FeatureDescription, Model

PIL_MODES = {"RGB": "RGB", "BGR": "RGB", "GRAYSCALE": "L"}  # PIL's names of Core ML's color spaces
MAIN = "main"  # the one function that is run; a program may have several


@dataclass(frozen=True)
class ModelInput:
    """An input of a package, as the package describes it."""

    name: str
    shapes: tuple[tuple[int, ...], ...]  # the shapes allowed, (B, C, H, W); the first is the default
    colors: str | None  # RGB, BGR or GRAYSCALE of an image; None for a tensor


class Program:
    """The main function of a program of Core ML's intermediate language (MIL), in memory; errors call it `name`."""

    def __init__(self, function: "Function", name: str):
        self.function = function
        self.name = name

    def values(self, inputs: Mapping[str, torch.Tensor], half: bool = False) -> dict["Var", Any]:
        """Return every variable's value, by coremltools' object for it; with gradients where PyTorch records them.

        `half` rounds to float16 wherever the program says float16. Raise InputError if an operation cannot be computed.
        """
        variables = self.function.inputs
        values: dict[Var, Any] = {
            variables[name]: _rounded(value, variables[name], half) for name, value in inputs.items()
        }
        for op in self.function.operations:
            self._compute(op, values, half)
        return values

    def _compute(self, op: "Operation", values: dict["Var", Any], half: bool) -> None:
        if op.op_type.startswith("const"):  # const and constexpr_… are among the constants
            return
        optional = dict.fromkeys(op.input_spec.input_types)
        arguments = optional | {name: self._argument(var, values) for name, var in op.inputs.items()}
        try:
            results = OPERATIONS[op.op_type](**arguments)
        except (InputError, RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
            fault = f"{op.op_type} {op.name!r} cannot be computed here ({first_line(error)})"
            raise InputError(f"{self.name}: {fault}") from error
        results = results if isinstance(results, tuple | list) else (results,)
        for var, result in zip(op.outputs, results, strict=False):
            values[var] = _rounded(result, var, half)

    def _argument(self, var: "Var | Sequence[Var] | None", values: Mapping["Var", Any]) -> Any:
        if isinstance(var, tuple | list):
            return [self._argument(each, values) for each in var]
        return None if var is None else values[var] if var in values else self._constants.get(var)

    @cached_property
    def _constants(self) -> dict["Var", Any]:
        """Weights as float32 tensors, compressed ones decompressed; numbers and strings as Python's."""
        constants: dict[Var, Any] = {}
        for op in self.function.operations:
            if op.op_type == "const":
                constants[op.outputs[0]] = _constant(op.outputs[0].val)
            elif op.op_type.startswith("constexpr_"):
                constants[op.outputs[0]] = _constant(op.materialized_val_inference())
        return constants


class Package:
    """A loaded .mlpackage; `half` rounds to float16 wherever the program says float16.

    Raises:
        InputError: the package is missing, unreadable, not an ML Program, or holds an operation that is not known.
    """

    def __init__(self, path: Path, half: bool = False):
        self.path = path
        self.half = half
        if not is_folder(path) or not is_file(path / "Manifest.json"):
            raise InputError(f"{path}: not a Core ML package (a folder with a Manifest.json)")
        _check_files(path)
        with one_line(path, "not a readable Core ML package"):
            with quiet():
                import coremltools as ct
                from coremltools.converters.mil.frontend.milproto.load import load

                model = ct.models.MLModel(str(path), skip_model_load=True)
                self.proto = model.get_spec()
                if self.proto.WhichOneof("Type") != "mlProgram":
                    raise InputError(f"{path}: a Core ML file of the older kind; only ML Programs can be read")
                _check_program(path, self.proto)
                program = load(self.proto, self.proto.specificationVersion, model.weights_dir)
            if MAIN not in program.functions:
                names = ", ".join(sorted(program.functions)) or "none"
                raise InputError(f"{path}: has no function {MAIN} (it has {names}); export the model again")
            self.program = Program(program.functions[MAIN], str(path))
            self.inputs = tuple(_model_input(description) for description in self.proto.description.input)
        variables = [var for op in self.program.function.operations for var in op.outputs]  # constants included
        check_elements(path, [(var.name, _lengths(var)) for var in variables])
        unknown = {name for name in self.operators if name not in OPERATIONS and not name.startswith("constexpr_")}
        if unknown:
            raise InputError(f"{path}: holds operations that are not known here: {', '.join(sorted(unknown))}")

    @property
    def operators(self) -> dict[str, int]:
        """The number of operations of each type, most frequent first; constants are not counted."""
        counts = Counter(op.op_type for op in self.program.function.operations if op.op_type != "const")
        return dict(counts.most_common())

    @property
    def ports(self) -> tuple[list[Port], list[Port]]:
        """Inputs and outputs as the package declares them."""
        inputs = [Port(each.name, "image" if each.colors else "float32", each.shapes[0]) for each in self.inputs]
        return inputs, [_port(var) for var in self.program.function.outputs]

    @property
    def metadata(self) -> dict[str, str]:
        """The user-defined metadata of the package."""
        return dict(self.proto.description.metadata.userDefined)

    @property
    def labels(self) -> tuple[str, ...]:
        """A classifier's labels in the order of its classes; empty for any other model."""
        classifiers = (op for op in self.program.function.operations if op.op_type == "classify")
        return next((tuple(map(str, op.inputs["classes"].val)) for op in classifiers), ())

    def __call__(self, **inputs: torch.Tensor | Image.Image) -> dict[str, Any]:
        """Return all outputs by name.

        Args:
            inputs: for each input an image, or a tensor of one of its shapes: float32, for images the pixels' values,
                0–255, channels in the input's order.

        Raises:
            InputError: an input is missing, or has another shape, or an operation cannot be computed.
        """
        values = self._values(inputs)
        return {var.name: values[var] for var in self.program.function.outputs}

    def layers(self, **inputs: torch.Tensor | Image.Image) -> dict[str, torch.Tensor]:
        """Return the output of each convolution and linear layer, by the operation's name, for inputs as of a call."""
        values = self._values(inputs)
        return {op.name: values[op.outputs[0]] for op in self.program.function.operations if op.op_type in LAYERS}

    def _values(self, inputs: Mapping[str, torch.Tensor | Image.Image]) -> dict["Var", Any]:
        if missing := [each.name for each in self.inputs if each.name not in inputs]:
            raise InputError(f"{self.path}: wants an input {missing[0]!r}")
        tensors = {each.name: _tensor(each, inputs[each.name], self.path) for each in self.inputs}
        with torch.inference_mode():
            return self.program.values(tensors, self.half)


def _rounded(value: Any, var: "Var", half: bool) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    from coremltools.converters.mil.mil import types

    return value.half().float() if half and types.builtin_to_string(var.dtype) == "fp16" else value.float()


def _lengths(var: "Var") -> list[int | None]:
    """Return a variable's shape, a length that depends on the input as None; empty where it is no tensor."""
    from coremltools.converters.mil.mil import types

    shape = var.shape if types.is_tensor(var.sym_type) else ()
    return [int(each) if isinstance(each, int | np.integer) else None for each in shape]


def _port(var: "Var") -> Port:
    from coremltools.converters.mil.mil import types

    if types.is_dict(var.sym_type):  # a classifier's probabilities by label
        return Port(var.name, "float32", None)
    dtype = types.builtin_to_string(var.dtype)
    return Port(var.name, {"fp32": "float32", "fp16": "float16"}.get(dtype, dtype), tuple(_lengths(var)) or None)


MAX_FILES = 1000  # files of a package; `shvit export` writes three
MAX_MANIFEST_BYTES = 1 << 20


def _check_files(path: Path) -> None:
    """Raise InputError unless a package holds nothing but files and folders that its hash covers.

    Opening a FIFO would never return, and the hash leaves out names that begin with a dot, which file managers use.
    """
    if len(files_below(path)) > MAX_FILES:
        raise InputError(f"{path}: has more than {MAX_FILES} files; export the model again")
    manifest = load_json(path / "Manifest.json", MAX_MANIFEST_BYTES)
    items = manifest.get("itemInfoEntries") if isinstance(manifest, dict) else None
    for item in items.values() if isinstance(items, dict) else ():
        name = item.get("path") if isinstance(item, dict) else None
        parts = PurePosixPath(name).parts if isinstance(name, str) else ("..",)
        if any(part.startswith((".", "/")) for part in parts):
            raise InputError(f"{path}: its Manifest.json names {name!r}, which is no file of a package; export the "
                             "model again")  # fmt: skip


EXPANDING = ("fill", "tile", "range_1d", "one_hot")
"""Operations whose result has as many numbers as their constants say; coremltools computes it when it loads them."""


def _check_program(path: Path, proto: "Model") -> None:
    """Raise InputError where a program has weights in a file that the package's hash leaves out, or huge tensors."""
    numbers: dict[str, list[int]] = {}
    left = [function.block_specializations[function.opset] for function in proto.mlProgram.functions.values()
            if function.opset in function.block_specializations]  # fmt: skip
    while left:
        for op in left.pop().operations:
            left.extend(op.blocks)
            declared = [(each.name, each.type.tensorType.dimensions) for each in op.outputs]
            check_elements(path, [(name, [dim.constant.size or None for dim in dims]) for name, dims in declared])
            if op.type == "const" and op.outputs:
                value = op.attributes["val"].immediateValue.tensor
                numbers[op.outputs[0].name] = [*value.ints.values, *value.longInts.values]
            if op.type in EXPANDING:
                names = (each.name for argument in op.inputs.values() for each in argument.arguments)
                check_elements(path, [(op.outputs[0].name, [abs(n) for name in names for n in numbers.get(name, ())])])
            bound = (each.value for argument in op.inputs.values() for each in argument.arguments)
            for value in (*op.attributes.values(), *bound):
                name = value.blobFileValue.fileName
                if any(part.startswith((".", "/")) for part in PurePosixPath(name).parts):
                    raise InputError(f"{path}: has weights in {name!r}, which is no file of a package; export the "
                                     "model again")  # fmt: skip


def _model_input(description: "FeatureDescription") -> ModelInput:
    kind = description.type.WhichOneof("Type")
    if kind == "imageType":
        image = description.type.imageType
        colors = type(image).ColorSpace.Name(image.colorSpace)
        sizes = [(image.height, image.width), *((s.height, s.width) for s in image.enumeratedSizes.sizes)]
        chans = 1 if colors == "GRAYSCALE" else 3
        return ModelInput(description.name, tuple(dict.fromkeys((1, chans, *size) for size in sizes)), colors)
    array = description.type.multiArrayType
    shapes = [tuple(array.shape), *(tuple(each.shape) for each in array.enumeratedShapes.shapes)]
    return ModelInput(description.name, tuple(dict.fromkeys(shapes)), None)


def _tensor(port: ModelInput, value: torch.Tensor | Image.Image, path: Path) -> torch.Tensor:
    if isinstance(value, Image.Image):
        if port.colors is None:
            raise InputError(f"{path}: its input {port.name!r} is a tensor, and an image was given")
        pixels = np.asarray(value.convert(PIL_MODES[port.colors]), dtype=np.float32)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        value = torch.from_numpy(np.ascontiguousarray(pixels[::-1] if port.colors == "BGR" else pixels))[None]
    if tuple(value.shape) not in port.shapes:
        allowed = " or ".join("×".join(map(str, shape)) for shape in port.shapes)
        raise InputError(f"{path}: takes {allowed}, not {'×'.join(map(str, value.shape))}")
    return value.float()


def _constant(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "US" or value.dtype == object:
            return value.tolist()
        tensor = torch.from_numpy(np.ascontiguousarray(value))
        return tensor.float() if tensor.is_floating_point() else tensor
    return value.item() if isinstance(value, np.generic) else value
