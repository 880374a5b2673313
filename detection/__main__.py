"""`torchrun … -m shvit.detection train CONFIG …`: `shvit detect` in each of several processes."""

import os
import sys

from shvit.cli import program

if __name__ == "__main__":
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  (until the process ends)
    sys.argv = ["shvit", "detect", *sys.argv[1:]]
    program()
