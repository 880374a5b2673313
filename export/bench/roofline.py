"""The machine's peaks: arithmetic per precision, and reading memory, measured by short loops."""

import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from shvit.environment import WAITING, users_environment, versions

from .records import Machine

SECONDS = 0.4  # minimum of each loop
SIDES = (512, 1024)  # of the matrices; the best counts
READ_MB = 512  # more than a core's share of any cache
PRECISIONS = ("fp32", "bf16", "int8")
X86 = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
ARM = ("asimd", "sve", "bf16", "i8mm")
SWITCHES = ("OMP_NUM_THREADS", *WAITING, "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
PACKAGES = ("torch", "timm", "onnxruntime", "openvino", "coremltools")


def measure_machine() -> Machine:
    """Measure the machine on the threads and cores that this process is set to; takes seconds."""
    return Machine(
        processor=processor_name(),
        cores=os.cpu_count() or 1,
        instructions=instruction_sets(),
        frequency=frequency_policy(),
        threads=torch.get_num_threads(),
        peak_gflops=measure_peaks(),
        bandwidth_gb_per_s=measure_bandwidth(),
        versions=versions(*PACKAGES),
        environment={name: value for name, value in users_environment().items() if name in SWITCHES},
    )


def measure_peaks() -> dict[str, float]:
    """Return the best GFLOP/s of square matrix products in PyTorch and ONNX Runtime, by precision.

    A multiply-add is two operations. A precision that is slower than float32 is left out: the processor has no
    instructions for it.
    """
    peaks: dict[str, float] = {}
    for side in SIDES:
        whole = torch.rand(side, side)
        half, byte = whole.bfloat16(), (100 * whole).to(torch.int8)
        loops: list[tuple[str, Callable[[], object]]] = [
            ("fp32", partial(torch.mm, whole, whole)),
            ("fp32", _onnx_product(whole.numpy())),
            ("bf16", partial(torch.mm, half, half)),
            ("int8", partial(torch._int_mm, byte, byte)),
            ("int8", _onnx_product(byte.numpy())),  # without VNNI or AMX PyTorch's goes number by number
        ]
        for precision, call in loops:
            peaks[precision] = max(peaks.get(precision, 0), 2 * side**3 / _fastest(call) / 1e9)
    return {precision: round(peak, 1) for precision, peak in peaks.items() if peak >= peaks["fp32"]}


def _onnx_product(a: np.ndarray) -> Callable[[], object]:
    """Return the same product in ONNX Runtime; one factor is a weight, the other in int8 unsigned, as in files."""
    from onnx import TensorProto, helper, numpy_helper

    from ..backends.onnx import onnx_session

    is_int8 = a.dtype == np.int8
    x = a.astype(np.uint8) if is_int8 else a
    kinds = (TensorProto.UINT8, TensorProto.INT32) if is_int8 else (TensorProto.FLOAT, TensorProto.FLOAT)
    ends = [helper.make_tensor_value_info(name, kind, a.shape) for name, kind in zip("xy", kinds, strict=True)]
    node = helper.make_node("MatMulInteger" if is_int8 else "MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [numpy_helper.from_array(a, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnx_session(model.SerializeToString(), torch.get_num_threads())
    return lambda: session.run(None, {"x": x})


def measure_bandwidth() -> float:
    """Return the GB/s of reading: a matrix that no cache holds, times a vector."""
    matrix = torch.ones(READ_MB * 2**18 // 8192, 8192)
    vector = torch.ones(8192)
    return round(matrix.nbytes / _fastest(lambda: matrix @ vector) / 1e9, 1)


def _fastest(call: Callable[[], object]) -> float:
    """Return the fastest call's seconds; of one thread by processor time, as a busy machine interrupts long calls."""
    coarse = sys.platform == "win32"  # whose processor time goes in steps of 16 ms
    clock = time.process_time if torch.get_num_threads() == 1 and not coarse else time.perf_counter
    call()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < end:
        start = clock()
        call()
        best = min(best, clock() - start)
    return best


def processor_name() -> str:
    """Return the processor's name, as the operating system reports it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets for arithmetic that the processor reports, or else those that PyTorch uses."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return tuple(name for name in X86 + ARM if name in flags) or (torch.backends.cpu.get_cpu_capability().lower(),)


def frequency_policy() -> str:
    """Return Linux's governor, and a GPU's clock and power limit where there is one."""
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    policy = f"governor {governor.read_text().strip()}" if governor.exists() else "not reported by the operating system"
    return f"{policy}; {gpu_name()}" if torch.cuda.is_available() else policy


def gpu_name() -> str:
    """Return the CUDA device's name, with clock and power where NVML reports them."""
    name = torch.cuda.get_device_name()
    try:
        return f"{name} at {torch.cuda.clock_rate()} MHz, {torch.cuda.power_draw() / 1e3:.0f} W"
    except Exception:  # NVML's own errors, or its package is not there
        return name


def _cpuinfo(key: str) -> str | None:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
