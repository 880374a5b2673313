"""Reads a LiteRT model and runs it once, in a process of its own: `python -I litert_trial.py FILE`.

Lengths in a damaged file can make its reader use all memory, and a graph whose parts do not fit each other can end the
process.
"""

import sys

MAX_MEMORY = 6 << 30  # bytes of address space; a graph that needs them is no image classifier's


def main(path: str) -> str | None:
    """Return what is wrong, in one line; None where the model runs."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # not on this system
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_litert.tools import flatbuffer_utils

    try:
        flatbuffer_utils.read_model(path)
        interpreter = Interpreter(path, num_threads=1)
        interpreter.allocate_tensors()
        for each in interpreter.get_input_details():
            interpreter.set_tensor(each["index"], np.zeros(each["shape"], each["dtype"]))
        interpreter.invoke()
    except Exception as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
