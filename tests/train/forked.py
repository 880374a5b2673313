"""Training in processes that are forked from a server which has PyTorch, timm and our code in memory already."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import yaml
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from shvit.cli import program
from shvit.train.recipe import Recipe

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["shvit.cli", "shvit.train.loop", "torch.utils.tensorboard", "tests.train.forked"])


def options(recipe: Recipe, folder: Path) -> list[str]:
    """The arguments of `shvit train` for this recipe, written to a file."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe.as_dict()))
    return ["--recipe", str(file), "--output", str(folder)]


def start(function: Callable[..., None], *args: object) -> BaseProcess:
    """Call a function in a forked process, the leader of a group of its own."""
    process = SERVER.Process(target=_lead, args=(function, *args))
    process.start()
    return process


def _lead(function: Callable[..., None], *args: object) -> None:
    os.setsid()
    function(*args)


def start_training(recipe: Recipe, folder: Path, stderr: Path | str = os.devnull) -> BaseProcess:
    """`shvit train` of this recipe in a forked process."""
    return start(_train, options(recipe, folder), stderr)


def start_torchrun(processes: int, recipe: Recipe, folder: Path, stdout: Path, stderr: Path) -> BaseProcess:
    """torchrun in a forked process, and what it runs on this machine in others that it forks: training of this recipe.

    It writes what the first of them prints to `stdout`.
    """
    return start(_run_torchrun, processes, options(recipe, folder), stdout, stderr)


def _run_torchrun(processes: int, words: list[str], stdout: Path, stderr: Path) -> None:
    where = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # what --standalone sets
    given = [*where, f"--nproc-per-node={processes}", "--start-method=fork", "-m", "shvit.train"]
    config, *_ = config_from_args(parse_args(given))
    elastic_launch(config, _train_in_group)(words, stdout, stderr)


def _train_in_group(words: list[str], stdout: Path, stderr: Path) -> None:
    try:
        _train(words, stderr, stdout if os.environ["RANK"] == "0" else os.devnull)
    except SystemExit as ended:  # torchrun waits for a function's return
        if ended.code:
            raise


def _train(words: list[str], stderr: Path | str, stdout: Path | str = os.devnull) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of a loader's workers, as where nothing is set
    torch.set_num_threads(1)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["shvit", "train", *words]
    program()
