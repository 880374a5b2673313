"""Runs an ExecuTorch program once on a black image, in a process of its own: `python -I executorch_trial.py PTE`.

ExecuTorch verifies a program's tables, and not the graphs of its delegates.
"""

import sys


def main(path: str) -> str | None:
    """Return what is wrong, in one line; None where the model runs."""
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


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
