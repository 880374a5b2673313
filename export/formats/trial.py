"""Runs a file once on a black image, in a process of its own: `python -I trial.py RUNTIME FILE …`.

Runtimes trust their files: a graph whose parts do not fit each other can end the process, and lengths in a damaged one
can make its reader use all memory. Nothing but the runtime is loaded.
"""

import sys
from collections.abc import Callable

MAX_MEMORY = 6 << 30  # bytes of address space; a graph that needs them is no image classifier's


def run_ncnn(param: str, weights: str, channels: str, height: str, width: str, image: str, *outputs: str) -> str | None:
    """Return what is wrong with an ncnn model, in one line; None where it runs."""
    import ncnn
    import numpy as np

    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.num_threads = 1
    if net.load_param(param) != 0 or net.load_model(weights) != 0:
        return "ncnn cannot load it"
    black = np.zeros((int(channels), int(height), int(width)), np.float32)
    extractor = net.create_extractor()
    extractor.input(image, ncnn.Mat(black))
    for name in outputs:
        status, mat = extractor.extract(name)
        if status != 0 or mat.empty():
            return f"ncnn does not compute {name}"
    return None


def run_litert(path: str) -> str | None:
    """Return what is wrong with a LiteRT model, in one line; None where it can be read and runs."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_litert.tools import flatbuffer_utils

    _limit_memory()
    flatbuffer_utils.read_model(path)
    interpreter = Interpreter(path, num_threads=1)
    interpreter.allocate_tensors()
    for each in interpreter.get_input_details():
        interpreter.set_tensor(each["index"], np.zeros(each["shape"], each["dtype"]))
    interpreter.invoke()
    return None


def run_executorch(path: str) -> str | None:
    """Return what is wrong with an ExecuTorch program, in one line; None where it runs.

    ExecuTorch verifies a program's tables, and not the graphs of its delegates.
    """
    import torch  # before the binding, which needs its libraries
    from executorch.extension.pybindings import _C

    module = _C._load_for_executorch(path)
    meta = module.method_meta("forward")
    if meta.num_inputs() != 1:
        return "it has no single input"
    tensor = meta.input_tensor_meta(0)
    kinds = {0: torch.uint8, 5: torch.float16, 6: torch.float32}
    if tensor.dtype() not in kinds:
        return "its input is of another type than images have"
    module.forward([torch.zeros(tensor.sizes(), dtype=kinds[tensor.dtype()])])
    return None


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # not on this system


RUNTIMES: dict[str, Callable[..., str | None]] = {"ncnn": run_ncnn, "litert": run_litert, "executorch": run_executorch}


def main(runtime: str, *words: str) -> str | None:
    """Return what is wrong, in one line; None where the file runs."""
    try:
        return RUNTIMES[runtime](*words)
    except Exception as error:
        return " ".join(str(error).split())[:200] or type(error).__name__


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
