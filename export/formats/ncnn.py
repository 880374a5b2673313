"""The graph of an ncnn model (F.ncnn.param, text) and its weights (F.ncnn.bin), read and checked before ncnn gets them.

ncnn trusts both files: counts and lengths that contradict each other make it read beyond its memory. Formats: ncnn's
wiki, "param and model file structure".
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shvit.errors import InputError
from shvit.files import check_file, open_file, scratch_folder

from ..guards import check_elements, one_line, run_trial
from .ncnn_param import ARRAY_KEY, Layer, format_param, parse_param
from .parameters import LayerParameters, Stored, quantized, stored
from .rounding import Outputs, Rounded, join

if TYPE_CHECKING:
    from ncnn import Extractor, Mat, Net

MAX_PARAM_BYTES = 8 << 20


# --- weights ----------------------------------------------------------------------------------------------------------

CONVOLUTIONS = ("Convolution", "ConvolutionDepthWise")
FUSED = (*CONVOLUTIONS, "InnerProduct")  # layers that may end with an activation
HALF, BYTE, SINGLE = 0x01306B47, 0x000D4B38, 0  # the words before a weight in float16, int8 and float32
DTYPES: dict[int, np.dtype[Any]] = {HALF: np.dtype("<f2"), BYTE: np.dtype("i1"), SINGLE: np.dtype("<f4")}
LARGEST = 127  # of int8 levels, which are symmetric
INT8 = 8  # option of a layer in int8: 1 or 2; above 100 its output is too
NO_WEIGHTS = (
    *("AbsVal", "BinaryOp", "Cast", "Clip", "Concat", "CopyTo", "Crop", "Dropout", "ELU", "Einsum", "Eltwise", "Exp"),
    *("ExpandDims", "Flatten", "GELU", "HardSigmoid", "HardSwish", "Input", "Interp", "Log", "MatMul", "Mish", "Noop"),
    *("Padding", "Permute", "PixelShuffle", "Pooling", "Power", "ReLU", "Reduction", "Reshape", "SDPA"),
    *("SELU", "ShuffleChannel", "Sigmoid", "Slice", "Softmax", "Softplus", "Split", "Squeeze", "Swish", "TanH", "Tile"),
    "UnaryOp",
)


def is_int8(layer: Layer) -> bool:
    """Return whether a layer rounds its input and its weights to 8 bits."""
    return layer.type in FUSED and layer.int(INT8) != 0


def _tensors(layer: Layer) -> list[tuple[bool, int]]:
    """Return a layer's tensors in the order of the .bin file: whether a word precedes each, and its length.

    Raise ValueError for a type of layer that no export of ours has.
    """
    if layer.type in NO_WEIGHTS:
        return []
    number = layer.int
    if layer.type in FUSED:
        size, bias = (6, 5) if layer.type in CONVOLUTIONS else (2, 1)
        scales = [(False, number(0)), (False, 1)] if is_int8(layer) else []  # of weights; of the input
        if number(INT8) not in (0, 1, 2):
            raise ValueError(f"holds {layer.name[:40]} in a form of int8 that is not read here")
        return [(True, number(size)), *([(False, number(0))] if number(bias) else []), *scales]
    if layer.type == "Gemm":
        rows, columns, inner = (number(key) for key in (7, 8, 9))
        added = {0: 1, 1: rows, 2: rows, 3: rows * columns, 4: columns}.get(number(10), 0)
        sizes = (rows * inner, columns * inner, added)
        return [(True, size) for key, size in zip((4, 5, 6), sizes, strict=True) if number(key) and size]
    if layer.type == "BatchNorm":
        return [(False, number(0))] * 4
    if layer.type in ("LayerNorm", "GroupNorm"):
        size, affine = (0, 2) if layer.type == "LayerNorm" else (1, 3)
        return [(False, number(size))] * 2 if number(affine, 1) else []
    if layer.type == "PReLU":
        return [(False, number(0))]
    if layer.type == "Scale":
        return [(False, number(0))] * (2 if number(1) else 1)
    if layer.type == "MemoryData":
        return [(False, math.prod(number(key) or 1 for key in (0, 1, 2, 11)))]
    raise ValueError(f"holds a layer {layer.type[:40]}, which no export of shvit has")


def read_tensors(layers: Sequence[Layer], data: bytes) -> Iterator[tuple[Layer, list[Stored]]]:
    """Yield each layer that has weights, with them as vectors; raise ValueError unless they are the file's whole."""
    place = 0
    for layer in layers:
        values = []
        for tagged, count in _tensors(layer):
            tag = int.from_bytes(data[place : place + 4], "little") if tagged else SINGLE
            place += 4 * tagged
            if count < 0 or tag not in DTYPES or (tagged and (tag == BYTE) != is_int8(layer)):
                raise ValueError(f"holds weights of {layer.name[:40]} in a way that is not read here")
            dtype = DTYPES[tag]
            end = place + count * dtype.itemsize
            if end > len(data):
                raise ValueError(f"ends within the weights of {layer.name[:40]}")
            content = np.frombuffer(data[place:end], dtype)
            values.append(stored(content.astype(np.float32) if tag == BYTE else content))
            place = end + -end % 4
        if values:
            yield layer, values
    if place != len(data):
        raise ValueError(f"is {len(data)} bytes long, and its layers have {place}")


def round_weights(layers: Sequence[Layer], data: bytes, dtype: torch.dtype, kept: torch.dtype = torch.float32) -> bytes:
    """Return the content of a .bin file with the weights of layers rounded to `dtype` and kept as `kept`; biases stay.

    pnnx itself, asked for float16, makes 0 of every weight below 2⁻¹⁴, the smallest normal number.
    """
    parts = []
    for layer, values in read_tensors(layers, data):
        for (tagged, _), tensor in zip(_tensors(layer), values, strict=True):
            parts.append(pack(tensor.value.to(dtype).to(kept) if tagged else tensor.value, tagged))
    return b"".join(parts)


def pack(tensor: torch.Tensor, tagged: bool) -> bytes:
    """Return a tensor as it stands in a .bin file, behind a word for its type if it is the weight of a layer."""
    content = tensor.numpy().tobytes()
    tag = {torch.float16: HALF, torch.int8: BYTE, torch.float32: SINGLE}[tensor.dtype].to_bytes(4, "little")
    return tag * tagged + content + bytes(-len(content) % 4)


def quantize(layers: Sequence[Layer], data: bytes, ranges: Mapping[str, float]) -> tuple[list[Layer], bytes]:
    """Return a float model with layers in int8: inputs and weights rounded to -127 … 127, weights channel by channel.

    Args:
        ranges: the largest absolute value of the input of each of these layers, by the layer's name.
    """
    tensors = {layer.name: values for layer, values in read_tensors(layers, data)}
    quantized_layers, parts = [], []
    for layer in layers:
        values = tensors.get(layer.name, [])
        if layer.name not in ranges or layer.type not in FUSED:
            quantized_layers.append(layer)
            parts += [pack(each.value, tagged) for (tagged, _), each in zip(_tensors(layer), values, strict=True)]
            continue
        weight, *bias = (each.value for each in values)
        rows = weight.reshape(layer.int(0), -1)
        scales = LARGEST / rows.abs().amax(1).clamp_min(1e-30)
        levels = (rows * scales[:, None]).round().to(torch.int8)
        scale = torch.tensor([LARGEST / ranges[layer.name]])
        parts += [pack(levels, True), *(pack(each, False) for each in (*bias, scales, scale))]
        form = "1" if layer.type == "ConvolutionDepthWise" else "2"  # as ncnn's own tool writes it
        quantized_layers.append(replace(layer, options={**layer.options, INT8: form}))
    return quantized_layers, b"".join(parts)


def layer_parameters(layers: Sequence[Layer], data: bytes, pointwise: Sequence[str]) -> dict[str, LayerParameters]:
    """Return the weights of each convolution and linear layer, by its name.

    Args:
        pointwise: convolutions of the model that are linear layers in the file, as they see one pixel.
    """
    found = {}
    for layer, (weight, *rest) in read_tensors(layers, data):
        if holds_weight(layer):
            shape = weight_shape(layer, layer.name in pointwise)
            reshaped = Stored(weight.value.reshape(shape), weight.rounding.reshape(shape))
            if is_int8(layer):
                *rest, scales, _ = rest
                reshaped = quantized(weight.value.reshape(shape).numpy(), 1 / scales.value.numpy())
            found[layer.name] = LayerParameters(reshaped, rest[0] if rest else None)
    return found


def input_scales(layers: Sequence[Layer], data: bytes) -> dict[str, float]:
    """Return the levels per unit that the input of each int8 layer is rounded to, by the layer's name."""
    return {layer.name: values[-1].value.item() for layer, values in read_tensors(layers, data) if is_int8(layer)}


def holds_weight(layer: Layer) -> bool:
    """Return whether a layer is a convolution, or a product with a constant matrix (outputs, inputs) on the right."""
    return layer.type in FUSED or (layer.type == "Gemm" and not layer.int(4) and bool(layer.int(5) and layer.int(3)))


def weight_shape(layer: Layer, pointwise: bool = False) -> tuple[int, ...]:
    """Return (outputs, inputs of a group, height, width) of a convolution; (outputs, inputs) of a linear layer.

    Raise ValueError where the layer's numbers contradict each other.
    """
    if layer.type == "Gemm":
        return (layer.int(8), layer.int(9))
    chans = layer.int(0)
    size = layer.int(6) if layer.type in CONVOLUTIONS else layer.int(2)
    kernel = (layer.int(11, layer.int(1)), layer.int(1)) if layer.type in CONVOLUTIONS else ()
    each = chans * math.prod(kernel)
    if each < 1 or size % each:
        raise ValueError(f"{layer.name[:40]} has {size} weights for {chans} channels")
    return (chans, size // each, *kernel, *([1, 1] if pointwise and not kernel else []))


# --- files ------------------------------------------------------------------------------------------------------------


def read_graph(path: Path) -> list[Layer]:
    """Return the layers of a .param file, checked.

    Raises:
        InputError: no such file, or not an ncnn model of images.
    """
    check_file(path)
    if path.stat().st_size > MAX_PARAM_BYTES:
        raise InputError(f"{path}: is larger than any .param file; export the model again")
    with one_line(path, "is not a readable ncnn model"):
        layers = parse_param(path.read_text(encoding="utf-8"))
        counts = [(layer.name, [count]) for layer in layers for _, count in _tensors(layer)]
    check_elements(path, counts)
    return layers


def read_weights(path: Path, layers: Sequence[Layer]) -> bytes:
    """Return the content of the .bin file beside a .param, which must be as long as its layers say."""
    file = path.with_suffix(".bin")
    check_file(file)
    expected = sum(4 * tagged + 4 * count for layer in layers for tagged, count in _tensors(layer))
    if file.stat().st_size > expected:
        raise InputError(f"{file}: is larger than the weights of {path.name}; both must come from one export")
    with open_file(file) as opened:
        data = opened.read()
    with one_line(file, f"does not belong to {path.name}"):
        for _ in read_tensors(layers, data):
            pass
    return data


def operators(layers: Sequence[Layer]) -> dict[str, int]:
    """Return the number of each operation, most frequent first, without inputs and copies."""
    return dict(Counter(layer.type for layer in layers if layer.type not in ("Input", "Split")).most_common())


def try_model(path: Path, layers: Sequence[Layer], shape: Sequence[int]) -> None:
    """Raise InputError where a model ends the process that runs it, or takes too long for one image.

    Args:
        shape: (C, H, W) of its input.
    """
    files = [str(path), str(path.with_suffix(".bin"))]
    words = [*files, *map(str, shape), *input_names(layers), *output_names(layers)]
    run_trial(path, "ncnn", words, [path, path.with_suffix(".bin")])


def open_net(
    layers: Sequence[Layer], weights: Path, threads: int | None = None, bf16: bool = False, keep: bool = False
) -> "Net":
    """Return an ncnn network on the CPU, which computes in float32, or in bfloat16 where that is asked for.

    Args:
        keep: keep values between layers, so that each can be taken out.
    """
    import ncnn

    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = bf16
    net.opt.lightmode = not keep
    if threads is not None:
        net.opt.num_threads = threads
    if net.load_param_mem(format_param(layers)) != 0 or net.load_model(str(weights)) != 0:
        raise ValueError("ncnn cannot load it")
    return net


def to_mat(x: torch.Tensor) -> "Mat":
    """Return a copy of a tensor of one image as ncnn holds it."""
    import ncnn

    array = np.ascontiguousarray(x.numpy(), dtype=np.float32)  # held, as a Mat only points to it
    return ncnn.Mat(array).clone()


def extract(extractor: "Extractor", name: str) -> torch.Tensor:
    """Compute a blob and return a copy of it; raise ValueError where ncnn fails."""
    status, mat = extractor.extract(name)
    if status != 0 or mat.empty():
        raise ValueError(f"ncnn does not compute {name}")
    return torch.from_numpy(np.array(mat, dtype=np.float32))


def to_planes(batch: torch.Tensor) -> torch.Tensor:
    """Return what `Spec.feed` returns as ncnn takes it: float32 (B, C, H, W), pixels from 0 to 255."""
    return batch.permute(0, 3, 1, 2).float() if batch.dtype == torch.uint8 else batch


def input_names(layers: Sequence[Layer]) -> list[str]:
    """Return the blobs that are given from outside."""
    return [name for layer in layers if layer.type == "Input" for name in layer.outputs]


def output_names(layers: Sequence[Layer]) -> list[str]:
    """Return the blobs that no layer reads, in order."""
    read = {name for layer in layers for name in layer.inputs}
    return [name for layer in layers for name in layer.outputs if name not in read]


# --- layers' outputs --------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[int, Callable[[str], Layer]] = {
    1: lambda name: Layer("ReLU", name, (), ()),
    4: lambda name: Layer("Sigmoid", name, (), ()),
    5: lambda name: Layer("Mish", name, (), ()),
}
"""Layers that do what a convolution or linear layer can do to its own output, by ncnn's numbers for them."""


def separate_activations(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers with activations apart, so that the output of each convolution can be taken out itself."""
    separated: list[Layer] = []
    for layer in layers:
        make = ACTIVATIONS.get(layer.int(9)) if layer.type in FUSED else None
        if make is None:
            separated.append(layer)
            continue
        between = f"{layer.outputs[0]}.before"
        options = {key: value for key, value in layer.options.items() if key not in (9, ARRAY_KEY - 10)}
        activation = replace(make(f"{layer.name}.act"), inputs=(between,), outputs=layer.outputs)
        separated += [replace(layer, outputs=(between,), options=options), activation]
    return separated


def take_layers(
    layers: Sequence[Layer], values: Callable[[str], torch.Tensor], pointwise: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return the output of each convolution and linear layer for one image, with a dimension for it, by its name.

    Args:
        layers: those of `separate_activations`.
        values: returns what a blob holds, by its name.
    """
    outputs = {}
    for layer in layers:
        if layer.type == "Gemm" or (layer.type in FUSED and layer.int(9) == 0):
            value = values(layer.outputs[0])[None]
            outputs[layer.name] = value[..., None, None] if layer.name in pointwise else value
    return outputs


EXACT = (
    *("Concat", "Crop", "ExpandDims", "Flatten", "MemoryData", "Padding", "Permute", "ReLU", "Reshape", "Slice"),
    *("Squeeze", "Tile"),
)
"""Layers whose results are among their inputs, or 0."""


class RoundedNcnn(Rounded):
    """An ncnn model whose values are rounded after each layer; layers run one by one."""

    def __init__(
        self, layers: Sequence[Layer], weights: Path, dtype: torch.dtype, threads: int | None, pointwise: Sequence[str]
    ):
        self.layers = separate_activations(layers)
        names = [layer.name for layer in self.layers if layer.type not in ("Input", "Split", *EXACT)]
        super().__init__(names, dtype, 1)
        self.outputs, self.pointwise = output_names(layers), pointwise
        with scratch_folder() as folder:
            rounded = folder / "rounded.bin"
            rounded.write_bytes(round_weights(layers, weights.read_bytes(), dtype))
            self.net = open_net(self.layers, rounded, threads)

    def run(self, batch: torch.Tensor) -> Outputs:
        """Return all outputs in order for what `Spec.feed` returns."""
        values = map(self._values, to_planes(batch))
        return join([[value[name][None] for name in self.outputs] for value in values])

    def run_layers(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the output of each convolution and linear layer, by its dotted name, for what `Spec.feed` returns."""
        parts = [
            take_layers(self.layers, values.__getitem__, self.pointwise)
            for values in map(self._values, to_planes(batch))
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _values(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what every blob holds for one image."""
        values: dict[str, torch.Tensor] = {}
        for layer in self.layers:
            if layer.type == "Input":
                values[layer.outputs[0]] = image.to(self.dtype).float()
            elif layer.type == "Split":
                values |= dict.fromkeys(layer.outputs, values[layer.inputs[0]])
            else:
                values |= self._compute(layer, [values[name] for name in layer.inputs])
        return values

    def _compute(self, layer: Layer, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        extractor = self.net.create_extractor()
        mats = [to_mat(value) for value in inputs]  # held until the layer is done
        for name, mat in zip(layer.inputs, mats, strict=True):
            extractor.input(name, mat)
        results = {}
        for name in layer.outputs:
            exact = extract(extractor, name)
            if layer.name in self.largest:
                self.record(layer.name, exact.abs().max().item() if exact.numel() else 0.0)
            results[name] = exact.to(self.dtype).float()
        return results
