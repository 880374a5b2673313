"""`torchrun … -m shvit.train RECIPE …`: `shvit train` in each of several processes, of which the first one prints."""

import os
import sys

from shvit.cli import program

if __name__ == "__main__":
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  (until the process ends)
    sys.argv = ["shvit", "train", *sys.argv[1:]]
    program()
