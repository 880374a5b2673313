"""Cost of a model: MACs, parameters, bytes moved and tokens, by stage, kind of layer and operator."""

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod

import torch
from rich.table import Table
from torch import nn
from torch.utils._pytree import tree_leaves

from shvit.deployment import deploy
from shvit.img_size import ImgSize
from shvit.shvit import FFN, SHSA, ConvNorm, PatchMerging, Residual, SHViT
from shvit.terminal import right_aligned

from ..spec import Spec
from .counting import MULTIPLIES, Cost, Operation, cost, count
from .designs import Comparison, MacroDesign, MicroDesign, compare_macro, compare_micro

LAYERS = {ConvNorm: "depthwise conv", FFN: "FFN", SHSA: "attention"}  # kinds of residual branches
ALL = "all"


@dataclass(frozen=True)
class Row:
    """All layers of one kind in one stage that have the same number of tokens."""

    stage: str
    kind: str
    layers: int
    tokens: int
    """Positions in the grid of the layers' first output; 1 after pooling, 0 for a module that returns no tensor."""
    cost: Cost


@dataclass(frozen=True)
class OperatorRow:
    """All operators of one kind in the whole model."""

    operator: str
    calls: int
    mac_percent: float
    byte_percent: float
    """Percent of the bytes of activations and weights."""
    cost: Cost


@dataclass(frozen=True)
class Description:
    """Cost of a model with float32 parameters for one image of `img_size` pixels."""

    model: str
    img_size: ImgSize
    macs: int
    params: int
    rows: list[Row]
    """Rows by stage and kind of layer for a SHViT, by top-level module for others; they add up to the total."""
    subtotals: list[Row]
    """Sums for each stage of a SHViT, its downsampling included."""
    total: Cost
    operators: list[OperatorRow]
    """Operators by their share of the bytes, largest first."""
    deployed: Cost | None
    """Cost of the whole model as `shvit.deploy` rewrites it. None for other models than SHViT, as the comparisons."""
    macro: Comparison | None
    micro: list[Comparison]
    """Comparisons of attention layers, one for each stage that has them."""
    summary: str
    """The operators' figures in a sentence."""


def describe(model: nn.Module, spec: Spec) -> Description:
    """Count the cost of a model in eval mode on a blank image."""
    x = spec.blank()
    parts = _parts(model)
    with ExitStack() as hooks:
        for part in parts:
            hooks.enter_context(part.module.register_forward_hook(part.hook))
        operations = count(model, x)
    params = sum(p.numel() for p in model.parameters())
    total = Cost.of(operations, params)
    rows = _rows(model, parts, operations)
    operators = _operators(operations, total)
    ours = model if isinstance(model, SHViT) and not model.deployed else None
    return Description(
        model=spec.model,
        img_size=spec.img_size,
        macs=total.macs,
        params=params,
        rows=rows,
        subtotals=_subtotals(rows) if ours else [],
        total=total,
        operators=operators,
        deployed=cost(deploy(ours, spec.img_size), x) if ours else None,
        macro=compare_macro(ours, x) if ours else None,
        micro=compare_micro(ours, x) if ours else [],
        summary=_summarize(operators, total),
    )


@dataclass
class _Part:
    """A module whose operators and parameters belong to one row."""

    stage: str
    kind: str
    name: str
    module: nn.Module
    layers: int = 1
    operations: list[Operation] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    """Shape of the first tensor that the module returns."""

    def hook(self, module: nn.Module, inputs: object, output: object) -> None:
        """Record the shape of the output, as a forward hook."""
        self.shape = next((tuple(leaf.shape) for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)), ())


def _rows(model: nn.Module, parts: list[_Part], operations: list[Operation]) -> list[Row]:
    """Return rows with every operator and every parameter in one; those outside of all parts are in the last row."""
    rest = _Part("", "outside of these", "", model)
    owners = {f"{part.name}.{name}".rstrip("."): part for part in parts for name, _ in part.module.named_modules()}
    for operation in operations:
        owner = next((owners[name] for name in operation.modules if name in owners), rest)
        owner.operations.append(operation)
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    counted: set[nn.Parameter] = set()
    merged: dict[tuple[str, str, int], list[tuple[_Part, int]]] = defaultdict(list)
    for part in [*parts, rest]:
        own = set(part.module.parameters()) - counted
        counted |= own
        params = sum(p.numel() for p in own)
        if params or part.operations:
            merged[part.stage, part.kind, _tokens(part, channels_last)].append((part, params))
    rows = []
    for (stage, kind, tokens), group in merged.items():
        total = Cost.of((o for part, _ in group for o in part.operations), sum(params for _, params in group))
        rows.append(Row(stage, kind, sum(part.layers for part, _ in group), tokens, total))
    return rows


def _tokens(part: _Part, channels_last: bool) -> int:
    """Return the tokens of an output: H·W of (B, C, H, W), or of (B, H, W, C); N of (B, N, C); 1 of (B, C)."""
    if len(part.shape) == 4:
        return prod(part.shape[1:3] if channels_last else part.shape[2:])
    return part.shape[1] if len(part.shape) == 3 else int(len(part.shape) == 2)


def _parts(model: nn.Module) -> list[_Part]:
    """Return disjoint parts of a model, in order of execution."""
    if not isinstance(model, SHViT) or model.deployed:
        return [_Part(name, type(module).__name__, name, module) for name, module in model.named_children()]
    convs = sum(isinstance(layer, ConvNorm) for layer in model.patch_embed)
    parts = [_Part("stem", "conv", "patch_embed", model.patch_embed, convs)]
    for index, stage in enumerate(model.stages):
        for name, module in stage.named_modules(prefix=f"stages.{index}"):
            if isinstance(module, Residual):
                parts.append(_Part(f"stage {index + 1}", LAYERS[type(module.m)], name, module))
            elif isinstance(module, PatchMerging):
                parts.append(_Part(f"stage {index + 1}", "patch merging", name, module))
    parts.append(_Part("head", "pooling", "global_pool", model.global_pool))
    heads = {"head": model.head, "head_dist": model.head_dist}
    return parts + [_Part("head", "classifier", name, head) for name, head in heads.items() if head is not None]


def _subtotals(rows: list[Row]) -> list[Row]:
    """Return the sums of the stages, with the tokens of their last layer."""
    stages: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        stages[row.stage].append(row)
    return [
        Row(stage, ALL, sum(row.layers for row in group), group[-1].tokens, Cost.sum(row.cost for row in group))
        for stage, group in stages.items()
        if len(group) > 1
    ]


def _operators(operations: list[Operation], total: Cost) -> list[OperatorRow]:
    kinds: dict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        kinds[operation.kind].append(operation)
    rows = []
    for kind, group in kinds.items():
        part = Cost.of(group)
        shares = 100 * part.macs / max(total.macs, 1), 100 * part.bytes / max(total.bytes, 1)
        rows.append(OperatorRow(kind, len(group), *shares, part))
    return sorted(rows, key=lambda row: -row.cost.bytes)


def _summarize(operators: list[OperatorRow], total: Cost) -> str:
    bound = ", ".join(row.operator for row in operators if row.operator not in MULTIPLIES)
    share = f"{total.memory_bound_percent:.0f} % of the bytes"
    depthwise = [
        f"; depthwise convolutions {row.mac_percent:.1f} % and {row.byte_percent:.1f} %"
        for row in operators
        if row.operator == "depthwise convolution"
    ]
    return f"Memory-bound operators ({bound}) do none of the multiply-adds and move {share}{''.join(depthwise)}."


FIGURES = ("tokens", "MMACs", "params", "activations MB", "weights MB", "FLOP/byte", "memory-bound %")


def tables(description: Description) -> list[Table | str]:
    """Return a description for people: tables and, below each, a sentence or two."""
    costs: list[Table | str] = [_layer_table(description), *_total_lines(description)]
    return [*costs, _operator_table(description), description.summary, *_comparison_tables(description)]


def _layer_table(description: Description) -> Table:
    table = Table("stage", "layer", *right_aligned("n", *FIGURES))
    subtotals = {row.stage: row for row in description.subtotals}
    for index, row in enumerate(description.rows):
        last = index + 1 == len(description.rows) or description.rows[index + 1].stage != row.stage
        end = last and bool(description.subtotals)
        subtotal = subtotals.get(row.stage) if end else None
        figures = (str(row.layers), *_figures(row.tokens or "", row.cost))
        table.add_row(row.stage, row.kind, *figures, end_section=end and not subtotal)
        if subtotal:
            table.add_row(f"{row.stage}, {ALL}", "", "", *_figures(subtotal.tokens, subtotal.cost), end_section=True)
    table.add_section()
    table.add_row(ALL, "", "", *_figures("", description.total))
    return table


def _total_lines(description: Description) -> list[str]:
    now, size = description.deployed, f"{description.macs / 1e9:.3f} GMACs, {description.params:,} parameters"
    moved = f"{_mb(description.total.bytes)} MB moved for one image in float32 without fusion"
    lines = [f"{description.model} at {description.img_size} px: {size}, {moved}"]
    if now is not None:
        bound = f"{now.memory_bound_percent:.0f} % memory-bound"
        lines.append(f"deployed: {_mb(now.bytes)} MB moved, {now.flop_per_byte:.1f} FLOP/byte, {bound}")
    return lines


def _operator_table(description: Description) -> Table:
    table = Table("operator", *right_aligned("calls", "MACs %", "bytes %", "FLOP/byte"))
    for row in description.operators:
        shares = f"{row.mac_percent:.1f}", f"{row.byte_percent:.1f}"
        table.add_row(row.operator, str(row.calls), *shares, f"{row.cost.flop_per_byte:.1f}")
    return table


def _comparison_tables(description: Description) -> list[Table | str]:
    shown: list[Table | str] = []
    if description.macro is not None:
        table = Table("stem and stages", "embed_dim", *right_aligned(*FIGURES))
        for design in (description.macro.own, description.macro.other):
            assert isinstance(design, MacroDesign)
            name = f"stride {design.stride}, {len(design.depth)} stages"
            widths, tokens = (", ".join(map(str, sizes)) for sizes in (design.embed_dim, design.tokens))
            table.add_row(name, widths, *_figures(tokens, design.cost))
        shown += [table, description.macro.summary]
    if description.micro:
        table = Table("attention", *right_aligned("heads", "channels", *FIGURES))
        for pair in description.micro:
            for design in (pair.own, pair.other):
                assert isinstance(design, MicroDesign)
                figures = _figures(design.tokens, design.cost)
                table.add_row(design.stage, str(design.heads), str(design.channels), *figures)
        shown += [table, *(pair.summary for pair in description.micro)]
    return shown


def _figures(tokens: int | str, cost: Cost) -> list[str]:
    """Return a cost in the order of `FIGURES`."""
    activations, weights = _mb(cost.activation_bytes), _mb(cost.weight_bytes)
    shares = f"{cost.flop_per_byte:.1f}", f"{cost.memory_bound_percent:.0f}"
    return [str(tokens), f"{cost.macs / 1e6:.1f}", f"{cost.params:,}", activations, weights, *shares]


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"
