"""Core ML's compute plan: on which device it means to run each operation of a package.

Core ML makes a plan on this Mac, for this Mac; an iPhone's comes from Xcode (docs/how-to/devices.md).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from shvit.errors import InputError
from shvit.files import scratch_folder

if TYPE_CHECKING:
    from coremltools.models.compute_device import MLComputeDevice
    from coremltools.models.compute_plan import (
        MLComputePlan,
        MLModelStructureProgramBlock,
        MLModelStructureProgramOperation,
    )

COMPUTE_UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "cpu-gpu": "CPU_AND_GPU", "cpu-ne": "CPU_AND_NE"}
"""What Core ML may run on (ne: Neural Engine), and coremltools' names for it."""
DEVICES = {"MLCPUComputeDevice": "cpu", "MLGPUComputeDevice": "gpu", "MLNeuralEngineComputeDevice": "neural engine"}
"""Our names for the devices, by their classes in coremltools."""
UNKNOWN = "unknown"
MIN_MACOS = (14, 4)  # the first macOS with compute plans


def load_placements(package: Path, compute_units: str) -> list[tuple[str, float | None]]:
    """Compile a package and return device and estimated cost of each operation; needs macOS 14.4 or newer.

    Args:
        package: an .mlpackage.
        compute_units: a key of `COMPUTE_UNITS`.

    Raises:
        InputError: the package is not an ML Program.
    """
    import coremltools as ct
    from coremltools.models.compute_plan import MLComputePlan

    with scratch_folder() as folder:
        compiled = str(folder / "model.mlmodelc")
        ct.models.utils.compile_model(str(package), compiled)
        units = ct.ComputeUnit[COMPUTE_UNITS[compute_units]]
        plan = MLComputePlan.load_from_path(compiled, compute_units=units)
        if plan.model_structure.program is None:
            raise InputError(f"{package}: is not an ML Program; only ML Programs have a compute plan here")
        return list(list_placements(plan))


def list_placements(plan: "MLComputePlan") -> Iterator[tuple[str, float | None]]:
    """Yield device and estimated cost of each operation of a plan, constants left out."""
    for function in plan.model_structure.program.functions.values():
        for operation in list_operations(function.block):
            if operation.operator_name.rpartition(".")[2].startswith("const"):
                continue
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
            device = UNKNOWN if usage is None else device_name(usage.preferred_compute_device)
            yield device, None if cost is None else cost.weight


def list_operations(block: "MLModelStructureProgramBlock") -> "Iterator[MLModelStructureProgramOperation]":
    """Yield the operations of a block and of the blocks inside them, in order."""
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from list_operations(inner)


def device_name(device: "MLComputeDevice") -> str:
    """Return our name for one of coremltools' compute devices."""
    return DEVICES.get(type(device).__name__, UNKNOWN)
