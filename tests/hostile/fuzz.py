"""Mutated files against everything that reads files: `python -m tests.hostile.fuzz --minutes 30 --surface onnx`.

Each attack runs in a child process, which must end it in time, within memory and alive, and may raise nothing but
InputError. What does otherwise is a finding: one line, and the file below --output. The same --seed makes the same
files.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from shvit.errors import InputError, first_line, printable

from .surfaces import SURFACES, Surface

TIMEOUT_S = 20.0  # of one attack, in processor time: other programs may have the cores
WAITING = 6  # times as long may pass on the clock, as for an attack that waits
MAX_MEMORY = 2 << 30  # bytes that a child may take beyond those it began with
ATTACKS_OF_A_CHILD = 2000


class Child:
    """A process that attacks one surface, again and again."""

    def __init__(self, surface: Surface, seed: bytes):
        context = multiprocessing.get_context("fork")  # what was imported need not be imported again
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(surface, seed, other), daemon=True)
        self.process.start()
        other.close()
        self.attacks = 0
        with suppress(EOFError):
            self.pipe.recv_bytes()  # it has imported what attacks need

    def attack(self, data: bytes) -> str:
        """ "accepted", "refused", or what went wrong; after the latter the process is gone."""
        self.attacks += 1
        try:
            self.pipe.send_bytes(data)
            if not self.pipe.poll(WAITING * TIMEOUT_S):
                self.close()
                return f"no end within {WAITING * TIMEOUT_S:g} s"
            outcome = self.pipe.recv_bytes().decode(errors="replace")
        except (EOFError, OSError):
            self.process.join(TIMEOUT_S)
            outcome = f"the process ended with {self.process.exitcode}"
            if self.process.exitcode == -signal.SIGPROF:
                outcome = f"no end within {TIMEOUT_S:g} s of processor time"
        if outcome not in ("accepted", "refused"):
            self.close()
        return outcome

    def close(self) -> None:
        """End the process, and remove what its attacks wrote."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        shutil.rmtree(Path(tempfile.gettempdir()) / f"shvit-fuzz-{self.process.pid}", ignore_errors=True)


def _serve(surface: Surface, seed: bytes, pipe: Any) -> None:
    """Attack with what comes through the pipe, and answer what came of it; a valid file is the first."""
    import torch

    torch.set_num_threads(1)  # threads of the parent's are not in this process
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries write past Python's
        os.dup2(nowhere, stream)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MAX_MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send_bytes(_outcome(surface, seed).encode(errors="replace"))
    while True:
        data = pipe.recv_bytes()
        signal.setitimer(signal.ITIMER_PROF, TIMEOUT_S)  # SIGPROF ends the process
        outcome = _outcome(surface, data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send_bytes(outcome.encode(errors="replace"))


def _outcome(surface: Surface, data: bytes) -> str:
    try:
        surface.attack(data)
    except InputError as error:
        return "refused" if "\n" not in str(error).strip() else f"a refusal of several lines: {first_line(error)}"
    except BaseException as error:
        places = [f"{Path(frame.filename).name}:{frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
        return f"{type(error).__name__} in {' < '.join(places[:0:-1][:3])}: {first_line(error)}"
    return "accepted"


def cases(surface: Surface, seeds: Sequence[bytes], name: str, seed: int) -> Iterator[bytes]:
    """Valid files, then mutated ones without end; the same for the same seed."""
    yield from seeds
    number = 0
    while True:
        chance = random.Random(f"{seed}/{name}/{number}")
        with suppress(UnicodeError, RecursionError):
            yield chance.choice(surface.mutators)(chance.choice(seeds), chance, seeds)
        number += 1


def fuzz(
    name: str, seconds: float, seed: int, output: Path, surface: Surface | None = None, runs: int | None = None
) -> dict[str, int]:
    """Attack one surface for a time; prints findings, the first of each kind, and saves their files.

    Args:
        name: of the surface, one of `SURFACES` unless another `surface` is given.
        output: a folder.
        runs: end after so many, too.

    Returns:
        How many runs, accepted, refused and findings (of different kinds) there were.
    """
    surface = surface or SURFACES[name]
    seeds = surface.seeds()
    counts, found, end = Counter[str](), Counter[str](), time.monotonic() + seconds
    child = None
    for data in islice(cases(surface, seeds, name, seed), runs):
        if time.monotonic() > end:
            break
        if child is None or child.attacks >= ATTACKS_OF_A_CHILD or child.process.exitcode is not None:
            if child is not None:
                child.close()
            child = Child(surface, seeds[0])
        outcome = child.attack(data)
        counts["runs"] += 1
        if outcome in ("accepted", "refused"):
            counts[outcome] += 1
            continue
        child = None
        kind = outcome.partition(": ")[0]
        found[kind] += 1
        if found[kind] == 1:
            path = output / f"{name}-{seed}-{counts['runs']}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            print(f"{path}: {printable(outcome)}", flush=True)
    if child is not None:
        child.close()
    return {**{key: counts[key] for key in ("runs", "accepted", "refused")}, "findings": len(found)}


def replay(name: str, path: Path) -> str:
    """What one saved file does, in a child of its own."""
    child = Child(SURFACES[name], SURFACES[name].seeds()[0])
    outcome = child.attack(path.read_bytes())
    if child.process.exitcode is None:
        child.close()
    return outcome


def main() -> int:
    """The command; 1 where there were findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="for each surface")
    parser.add_argument(
        "--surface", choices=SURFACES, action="append", help="all by default; may be given several times"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("findings"), help="folder for the files that were found")
    parser.add_argument("--replay", type=Path, help="attack the one surface with this file, and tell what comes of it")
    options = parser.parse_args()
    names = options.surface or list(SURFACES)
    if options.replay:
        print(replay(names[0], options.replay))
        return 0
    results = {name: fuzz(name, 60 * options.minutes, options.seed, options.output) for name in names}
    print(json.dumps({"seed": options.seed, "minutes": options.minutes, "surfaces": results}))
    return int(any(result["findings"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
