"""Where Core ML means to run a package: its compute plan, as a record.

A plan is made by Core ML on this Mac, for this Mac; an iPhone's comes from Xcode (docs/how-to/devices.md).
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shvit.errors import InputError
from shvit.files import scratch_folder

from ..bench.cases import COMPUTE_UNITS
from ..bench.records import Placement

DEVICES = {
    "MLCPUComputeDevice": "cpu",
    "MLGPUComputeDevice": "gpu",
    "MLNeuralEngineComputeDevice": "neural engine",
}
"""What Placement calls the devices, by their classes in coremltools."""
UNKNOWN = "unknown"


def measure_placement(package: Path, compute_units: str, model: str) -> Placement:
    """Compiles a package and asks Core ML for its plan; on macOS 14.4 or newer.

    Args:
        package: an .mlpackage.
        compute_units: of `COMPUTE_UNITS`.
        model: what the record is to call it.

    Raises:
        InputError: not an ML Program.
    """
    import coremltools as ct
    from coremltools.models.compute_plan import MLComputePlan

    with scratch_folder() as folder:
        compiled = str(folder / "model.mlmodelc")
        ct.models.utils.compile_model(str(package), compiled)
        units = ct.ComputeUnit[COMPUTE_UNITS[compute_units]]
        plan = MLComputePlan.load_from_path(compiled, compute_units=units)
        if plan.model_structure.program is None:
            raise InputError(f"{package}: is not an ML Program, whose operations alone have a compute plan here")
        return placement(model, compute_units, placed_operations(plan))


def placed_operations(plan: Any) -> Iterator[tuple[str, float | None]]:
    """Device and estimated cost of each operation of an `MLComputePlan`, constants left out."""
    for function in plan.model_structure.program.functions.values():
        for operation in operations_of(function.block):
            if operation.operator_name.rpartition(".")[2].startswith("const"):
                continue
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
            device = UNKNOWN if usage is None else device_name(usage.preferred_compute_device)
            yield device, None if cost is None else cost.weight


def operations_of(block: Any) -> Iterator[Any]:
    """The operations of a block and of the blocks within them, in order."""
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from operations_of(inner)


def device_name(device: Any) -> str:
    """Of one of coremltools' compute devices."""
    return DEVICES.get(type(device).__name__, UNKNOWN)


def placement(model: str, compute_units: str, operations: Iterable[tuple[str, float | None]]) -> Placement:
    """The sums over (device, estimated cost), each device that a Mac may have among them.

    Costs are shares of the whole by Core ML's estimate; they are scaled to 100 %, whatever their sum.
    """
    counts, costs = Counter(dict.fromkeys(DEVICES.values(), 0)), dict.fromkeys(DEVICES.values(), 0.0)
    for device, cost in operations:
        counts[device] += 1
        costs[device] = costs.get(device, 0.0) + (cost or 0.0)
    total = sum(costs.values())
    percent = {device: 100 * cost / total for device, cost in costs.items()} if total else {}
    return Placement(model, compute_units, dict(counts), percent)
