"""int8 for ExecuTorch: roundings in an exported PyTorch program around its layers, in the form that XNNPACK fuses.

As in the ONNX files of qdq.py, activations have a range for each tensor and weights a scale for each output channel,
and what lies between the layers reads and gives float32. Levels are signed, which XNNPACK's kernels take.
"""

from typing import TYPE_CHECKING

import torch
from torch import fx

from ..wrappers import layer_name
from .qdq import LayerRanges
from .ranges import LEVELS, Range

if TYPE_CHECKING:
    from torch.export import ExportedProgram

aten = torch.ops.aten
LAYERS = (aten.conv2d.default, aten.linear.default)
ACTIVATIONS = (aten.relu.default, aten.relu_.default)  # computed within the layer before it
LOWEST, HIGHEST = -128, 127


def quantize_program(
    program: "ExportedProgram", ranges: dict[str, LayerRanges]
) -> tuple["ExportedProgram", dict[str, Range]]:
    """Return a program with layers in int8, and the range of each one's input.

    Args:
        ranges: of the layers to quantize, by their modules' names.
    """
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  (defines torch.ops.quantized_decomposed)
    from torch.export import export

    module = program.module()
    assert isinstance(module, fx.GraphModule)
    quantizer = _Quantizer(module, ranges)
    quantizer.run()
    with torch.no_grad():
        return export(module, program.example_inputs[0]), quantizer.inputs


class _Quantizer:
    """Changes one graph in place."""

    def __init__(self, module: fx.GraphModule, ranges: dict[str, LayerRanges]):
        self.module, self.graph, self.ranges = module, module.graph, ranges
        self.layers = {node: name for node, name in _layers(self.graph) if name in ranges}
        self.sources: dict[fx.Node, fx.Node] = {node: node.all_input_nodes[0] for node in self.layers}
        self.inputs: dict[str, Range] = {}
        self.rounded: dict[tuple[fx.Node, Range], fx.Node] = {}
        """Tensors in 8 bits by what they were made from."""

    def run(self) -> None:
        outputs = {self._end(node): self._output_range(node) for node in self.layers}
        for node, name in self.layers.items():
            source = self.sources[node]
            self.inputs[name] = outputs.get(source, self.ranges[name].input)
            self._round_input(node, source, self.inputs[name])
            self._round_weight(node)
        for end, range_ in outputs.items():
            self._round_output(end, range_)
        self.graph.lint()
        self.module.recompile()

    def _end(self, node: fx.Node) -> fx.Node:
        """Return the layer's activation where it has one that nothing else reads past."""
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0].target in ACTIVATIONS else node

    def _output_range(self, node: fx.Node) -> Range:
        """Return the range of what a layer gives: that of the layer which reads it, or its own."""
        end = self._end(node)
        readers = [self.layers[each] for each in self.layers if self.sources[each] is end]
        if readers:
            return self.ranges[readers[0]].input
        low, high = self.ranges[self.layers[node]].output
        return (low if end is node else 0.0, high)

    def _round_input(self, node: fx.Node, source: fx.Node, range_: Range) -> None:
        with self.graph.inserting_after(source):
            levels = self._levels(source, range_)
        with self.graph.inserting_before(node):
            node.update_arg(0, self._values(levels))

    def _levels(self, source: fx.Node, range_: Range) -> fx.Node:
        """Return the node that rounds a tensor, one for all of its readers."""
        key = source, range_
        if key not in self.rounded:
            arguments = (source, *steps(range_), LOWEST, HIGHEST, torch.int8)
            self.rounded[key] = self.graph.call_function(
                torch.ops.quantized_decomposed.quantize_per_tensor.default, arguments
            )
        return self.rounded[key]

    def _values(self, levels: fx.Node) -> fx.Node:
        """Return a node that reads a rounded tensor; XNNPACK wants one for each reader."""
        function = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        return self.graph.call_function(function, (levels, *levels.args[1:]))

    def _round_weight(self, node: fx.Node) -> None:
        attribute = node.args[1].target  # type: ignore[union-attr]
        weight = dict(self.module.named_parameters())[str(attribute)].detach()
        scale = (weight.flatten(1).abs().amax(1) / HIGHEST).clamp_min(1e-30)
        levels = (weight / scale.reshape(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8)
        parts = {"levels": levels, "scale": scale, "zeros": torch.zeros(len(scale), dtype=torch.int64)}
        names = {part: f"int8_{str(attribute).replace('.', '_')}_{part}" for part in parts}
        for part, tensor in parts.items():
            self.module.register_buffer(names[part], tensor)
        with self.graph.inserting_before(node):
            tensors = [self.graph.get_attr(name) for name in names.values()]
            function = torch.ops.quantized_decomposed.dequantize_per_channel.default
            node.update_arg(1, self.graph.call_function(function, (*tensors, 0, -HIGHEST, HIGHEST, torch.int8)))

    def _round_output(self, end: fx.Node, range_: Range) -> None:
        readers = [each for each in end.users if each is not self.rounded.get((end, range_))]
        with self.graph.inserting_after(end):
            levels = self._levels(end, range_)
        for reader in readers:
            with self.graph.inserting_before(reader):
                reader.replace_input_with(end, self._values(levels))


def layer_names(graph: fx.Graph) -> list[str]:
    """Return the dotted names of a graph's convolutions and linear layers in order."""
    return [name for _, name in _layers(graph)]


def _layers(graph: fx.Graph) -> list[tuple[fx.Node, str]]:
    nodes = [node for node in graph.nodes if node.target in LAYERS]
    return [(node, layer_name([path for path, _ in node.meta["nn_module_stack"].values()][-1])) for node in nodes]


def steps(range_: Range) -> tuple[float, int]:
    """Return the scale and the zero point of a tensor in 8 bits, signed."""
    low, high = range_
    scale = (high - low) / LEVELS or 1.0
    return scale, max(LOWEST, min(HIGHEST, round(LOWEST - low / scale)))
