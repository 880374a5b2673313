"""Training in processes of their own: several of them, stopped, and killed."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shvit.train.distributed import join
from shvit.train.loop import train
from shvit.train.recipe import Data, Optim, Recipe, Save
from tests.conftest import PLAIN, assert_same_end, state
from tests.train.forked import options, start_torchrun, start_training


def command(recipe: Recipe, folder: Path, *launcher: str) -> list[str]:
    """`shvit train` of this recipe in a new process."""
    return [sys.executable, *launcher, "-m", "shvit.train", *options(recipe, folder)]


def torchrun(*options: str) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", *options)


# torchrun otherwise keeps the store of a group that died, in which the next one finds its dead members' addresses.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def finish(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def started(argv: list[str]) -> Iterator[subprocess.Popen]:
    """torchrun, which is told at the end to stop whatever it still runs."""
    process = subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def exit_status(process: BaseProcess, seconds: float) -> int | None:
    """The status that a process ends with; None where it does not end in time."""
    process.join(seconds)
    return process.exitcode


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_sigterm_leaves_a_state_in_the_middle_of_a_long_step(image_folder, tmp_path):
    """Its backward pass is one call of many seconds on a CPU, in which Python runs nothing."""
    slow = Recipe(
        model="shvit_s1",
        img_size=384,
        epochs=2,
        batch_size=16,
        data=Data(root=image_folder, workers=1),
        augment=replace(PLAIN, repeats=3),
        save=Save(eval_epochs=2),
    )
    folder = tmp_path / "run"
    process = start_training(slow, folder)
    wait_for(lambda: (folder / "tensorboard").exists())
    time.sleep(2)
    assert process.is_alive()
    process.terminate()
    wait_for((folder / "last.pt").exists, seconds=10)  # one or two where nothing else runs
    assert process.is_alive()
    saved = state(folder)
    assert exit_status(process, seconds=60) == 143
    assert saved["step"] == state(folder)["step"] < 6


def test_signal_to_the_whole_group_of_processes_is_survived_by_the_state(small, tmp_path):
    """As schedulers send it: the loader's workers get it too, and die of it."""
    folder = tmp_path / "run"
    lasting = replace(small, epochs=400, data=replace(small.data, workers=2))
    process = start_training(lasting, folder, tmp_path / "stderr")
    wait_for((folder / "last.pt").exists)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)
    assert exit_status(process, seconds=30) == 143, (tmp_path / "stderr").read_text()
    saved = state(folder)
    assert saved["step"] > 4 * len(saved["log"]) - 1


def test_run_that_fails_ends_its_workers(small, tmp_path):
    """The images vanish while workers read them: nobody must wait for these afterwards."""
    folder = tmp_path / "run"
    fragile = replace(small, epochs=400, data=replace(small.data, workers=2, max_corrupt=0))
    process = start_training(fragile, folder, tmp_path / "stderr")
    wait_for((folder / "last.pt").exists)
    images, hidden = small.data.root / "train", small.data.root / "hidden"
    images.rename(hidden)
    try:
        status = exit_status(process, seconds=60)
    finally:
        hidden.rename(images)
    said = (tmp_path / "stderr").read_text()
    assert status == 2
    assert "none of the" in said
    assert "can be read" in said


def test_two_processes_train_as_one(small, tmp_path):
    """With BatchNorm frozen, and nothing drawn for a process's own part of the batch, the losses are equal."""
    recipe = replace(small, epochs=5, freeze_bn=True, augment=PLAIN, optim=Optim(lr=1e-2), save=Save(log_steps=1))
    train(recipe, tmp_path / "one")
    process = start_torchrun(2, recipe, tmp_path / "two", tmp_path / "stdout", tmp_path / "stderr")
    assert exit_status(process, seconds=120) == 0, (tmp_path / "stderr").read_text()
    out = (tmp_path / "stdout").read_text()
    assert "batch 8 = 2 processes × 1 gradient accumulation steps × 4" in out
    result = json.loads(out.splitlines()[-1])
    assert result["n_val"] == 12  # each once
    losses = []
    for name in ("one", "two"):
        events = EventAccumulator(str(tmp_path / name / "tensorboard"))
        events.Reload()
        losses.append([event.value for event in events.Scalars("train/loss")])
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    one, two = (state(tmp_path / name)["log"] for name in ("one", "two"))
    assert [entry["train_loss"] for entry in two] == pytest.approx([entry["train_loss"] for entry in one], abs=1e-5)
    assert [entry["top1"] for entry in two] == [entry["top1"] for entry in one]


# --- long proofs ------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def children(number: int) -> list[int]:
    """The processes that a process has started, torchrun's trainers for one."""
    listed = subprocess.run(["pgrep", "-P", str(number)], capture_output=True, text=True, check=True).stdout
    return [int(word) for word in listed.split()]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_ten_kills_change_nothing(small, tmp_path, workers):
    often = replace(small, epochs=150, data=replace(small.data, workers=workers), save=Save(every_minutes=0.003))
    finish(command(often, tmp_path / "whole"))
    draw, kills = random.Random(workers), 0
    while kills < 10:
        process = subprocess.Popen(command(often, tmp_path / "cut"), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        last = tmp_path / "cut" / "last.pt"
        before = last.stat().st_mtime_ns if last.exists() else 0
        wait_for(lambda: process.poll() is not None or (last.exists() and last.stat().st_mtime_ns > before))  # noqa: B023
        time.sleep(draw.uniform(0, 0.5))
        assert process.poll() is None, f"finished after {kills} kills"
        process.kill()
        process.wait()
        kills += 1
    finish(command(often, tmp_path / "cut"))
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_elastic_restarts_a_killed_process_and_ends_the_same(small, tmp_path):
    often = replace(small, epochs=100, save=Save(every_minutes=0.003))
    elastic = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=3")
    finish(command(often, tmp_path / "whole", *elastic))
    with started(command(often, tmp_path / "cut", *elastic)) as process:
        wait_for(lambda: (tmp_path / "cut" / "last-1.pt").exists())
        listed = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(listed[-1]), signal.SIGKILL)
        assert process.wait(timeout=300) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(("restarts", "fresh", "warned"), [("3", "0", True), ("3", "1", False), ("0", "0", False)])
def test_torchrun_that_keeps_the_addresses_of_the_dead_is_warned_of(monkeypatch, capsys, restarts, fresh, warned):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", fresh)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("timm.utils.distributed.init_distributed_device_so", lambda kind: {
        "device": kind, "global_rank": 0, "world_size": 1
    })  # fmt: skip
    with join("cpu"):
        pass
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err) == warned


@pytest.mark.slow
def test_two_nodes_end_as_one_node_of_two(small, tmp_path):
    recipe = replace(small, epochs=10)
    finish(command(recipe, tmp_path / "one", *torchrun("--standalone", "--nproc-per-node=2")))
    nodes = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    argv = command(recipe, tmp_path / "two", *torchrun(*nodes))
    processes = [subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert_same_end(tmp_path / "one", tmp_path / "two")
