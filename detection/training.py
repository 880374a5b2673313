"""Training by MMEngine's Runner, which resumes a run, shows its progress, and never unpickles code."""

import copy
import io
import os
import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.checkpoint import load_from_local
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import distributed, nn

from shvit import terminal
from shvit.checkpoint import is_archive
from shvit.errors import InputError, first_line
from shvit.files import atomic_write, check_file, check_output_folder, is_file, is_there, open_file, read_text

from .coco.annotations import check_datasets
from .coco.report import show
from .detector import create_detector, log_types
from .evaluate import percent
from .parsing.config import innermost
from .plugin.transforms import name_images

LONGEST = 16  # lines of one message that are worth a reader's time; a dump of the config has hundreds
MAX_NAME = 1 << 16  # bytes of the file that names the last checkpoint
REFUSED = "a checkpoint was refused, because it holds more than tensors and a run's history; nothing of it was run"
WRITTEN = "# Written by shvit detect train.\n"
"""First line of the configs in run folders; a file that begins otherwise is the user's own."""
WEIGHTS = re.compile(r"(epoch|iter)_\d+\.pth|best_")
"""Names of the checkpoints that a run writes."""
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""PyTorch's switch: while it is set, no `torch.load`, whoever calls it, runs pickled code."""


def train(config: Config, output: Path, auto_scale_lr: bool = False) -> dict[str, Any]:
    """Train a config's detector, or resume the run that `output` holds.

    Under torchrun, every process calls this; the first one writes.

    Args:
        output: the run folder: the config as it was run, checkpoints, logs, TensorBoard's events.
        auto_scale_lr: scale the learning rate to the batch, from the one that the config was written for.

    Returns:
        The run folder, what was left to learn from and to evaluate against, the last checkpoint, and the last
        evaluation's figures in percent.

    Raises:
        InputError: annotations, images or the config are not usable, or training diverged.
    """
    last = output / "last_checkpoint"
    check_output_folder(output)
    if not is_file(last) and (others := sorted(each.name for each in output.glob("*.pth") if WEIGHTS.match(each.name))):
        raise InputError(f"{output}: holds {others[0]}, and no run to resume; choose another folder for --output")
    if auto_scale_lr and not config.get("auto_scale_lr"):
        raise InputError(f"{config.filename}: has no auto_scale_lr.base_batch_size; leave out --auto-scale-lr")
    rank = int(os.environ.get("RANK", "0"))
    reports = check_datasets(config, ("train", "val"))
    show(reports, terminal.console(quiet=rank != 0))
    model = create_detector(config)  # which says what does not fit; the Runner builds its own
    original, config = config, copy.deepcopy(config)
    for split in ("train", "val"):
        if (loader := config.get(f"{split}_dataloader")) is not None:
            name_images(innermost(loader.dataset))
    config.work_dir = str(output)
    if config.get("visualizer"):
        config.visualizer.name = str(output)  # mmengine gives a second run in one process the first one's otherwise
    if config.get("auto_scale_lr"):
        config.auto_scale_lr.enable = auto_scale_lr
    config.resume = is_file(last)
    if config.resume:
        config.load_from = None
        check_resumable(last, model)
    config.launcher = "pytorch" if "RANK" in os.environ else "none"
    if config.launcher == "pytorch" and not torch.cuda.is_available():  # MMEngine itself would have each take a GPU
        distributed.init_process_group("gloo")
        config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}
    progress = ProgressHook()
    with plainly(), weights_only(), redirect_stdout(_ShortMessages(sys.stdout)):
        runner = _Runner.from_cfg(config)
        if rank == 0:
            write_config(original, output)
        runner.register_hook(progress, priority="VERY_LOW")
        try:
            runner.train()
        finally:
            progress.stop()
    return {
        "output": str(output),
        "data": [report.summary() for report in reports],
        "checkpoint": read_text(last, MAX_NAME).strip() if is_file(last) else None,
        "resumed": config.resume,
        "iterations": runner.iter,
        "ap": progress.ap,
    }


class _Runner(Runner):
    """MMEngine's Runner, which leaves the run folder's config to `write_config`.

    MMEngine's own dump also holds what a run sets, such as an absolute path, and overwrites any file of that name.
    """

    def dump_config(self) -> None:
        """Write nothing."""


def write_config(config: Config, output: Path) -> Path:
    """Write a config into its run folder, as it was given to the run and can be given to the next command.

    Returns:
        The file: of the config's name, or of another where a file that no run wrote has it.

    Raises:
        InputError: it cannot be written, or not be read again.
    """
    config = copy.deepcopy(config)
    for name in ("work_dir", "resume", "launcher"):
        config.pop(name, None)
    path = output / Path(config.filename).name
    while is_there(path) and not (is_file(path) and _is_written(path)):
        path = path.with_name(f"{path.stem}_run.py")
    try:
        text = config.pretty_text
    except Exception as error:  # whatever yapf raises for names that Python keeps for itself
        raise InputError(f"{config.filename}: cannot be written as Python ({first_line(error)}); correct it") from error
    with atomic_write(path) as partial:
        partial.write_text(WRITTEN + text, "utf-8")
    return path


def _is_written(path: Path) -> bool:
    """Return whether a run has written a config."""
    with open_file(path) as file:
        return file.read(len(WRITTEN)) == WRITTEN.encode()


def check_resumable(last: Path, model: nn.Module) -> None:
    """Raise InputError where `last`, the run folder's file that names the checkpoint to resume from, is no use.

    It names no file of the run, or one that is damaged, holds more or less than a run, or is of another detector.
    """
    advice = f"write the path of an epoch's checkpoint into {last}, or give another --output"
    named = read_text(last, MAX_NAME).strip()
    if not named.isprintable() or not named:
        raise InputError(f"{last}: does not name a checkpoint; {advice}")
    path = Path(named)
    if not path.resolve().is_relative_to(last.parent.resolve()):
        raise InputError(f"{last}: names {named}, which is not in the run folder; nothing of it was run; {advice}")
    if not is_there(path):
        raise InputError(f"{last}: names {named}, which is not there; {advice}")
    check_file(path)
    try:
        with weights_only(), torch.serialization.safe_globals(log_types()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive(path))
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: {REFUSED}") from error
    except Exception as error:  # whatever PyTorch raises for a file that was cut off
        raise InputError(f"{path}: not a readable checkpoint ({first_line(error)}); {advice}") from error
    parts = content if isinstance(content, dict) else {}
    if missing := [name for name in ("state_dict", "meta", "optimizer") if not isinstance(parts.get(name), dict)]:
        raise InputError(f"{path}: is no checkpoint of a run (it has no {missing[0]}); to begin with its weights, give "
                         f"--options load_from={path} and another --output")  # fmt: skip
    count = content["meta"]
    if not all(isinstance(count.get(name), int) and 0 <= count[name] < 1 << 40 for name in ("epoch", "iter")):
        raise InputError(f"{path}: does not tell how far the run is; {advice}")
    own, theirs = ({name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
                   for state in (model.state_dict(), content["state_dict"]))  # fmt: skip
    if other := [name for name in (*own, *theirs) if own.get(name) != theirs.get(name)]:
        raise InputError(f"{path}: is of another detector ({len(other)} tensors differ, such as {str(other[0])[:80]}); "
                         "give the run's own config, or another --output")  # fmt: skip


class ProgressHook(Hook):
    """A progress bar on a terminal, which also keeps the last evaluation's figures and stops a run that diverges."""

    def __init__(self) -> None:
        self.ap: dict[str, float] | None = None
        self.bar: Progress | None = None

    def before_train(self, runner: Runner) -> None:
        if sys.__stdout__ is not None and sys.__stdout__.isatty() and runner.rank == 0:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, transient=True, console=Console(file=sys.__stdout__))
            self.task = self.bar.add_task("iterations", total=runner.max_iters, completed=runner.iter)
            self.bar.start()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict[str, torch.Tensor] | None = None
    ) -> None:
        loss = (outputs or {}).get("loss")
        if loss is not None and not torch.isfinite(torch.as_tensor(loss)):
            place = f"at iteration {runner.iter + 1}"
            raise InputError(f"the loss is {float(loss)} {place}; lower optim_wrapper.optimizer.lr")
        if self.bar is not None:
            self.bar.update(self.task, completed=runner.iter + 1)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.ap = {key.removeprefix("coco/"): percent(value) for key, value in (metrics or {}).items()}

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()


class _ShortMessages(io.TextIOBase):
    """A stream that drops the longest messages, which the run's log file holds."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        if text.count("\n") <= LONGEST:
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def weights_only() -> Iterator[None]:
    """Keep pickled code in checkpoints from running in a block.

    MMEngine would run it where there is more than tensors, and its own loader of local files allows Python's `getattr`,
    which is enough to run anything; a run's history needs less. The loader is replaced in MMEngine's registry of them.
    """
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    CheckpointLoader.register_scheme("", load_from_local_file, force=True)
    try:
        yield
    finally:
        CheckpointLoader.register_scheme("", load_from_local, force=True)
        del os.environ[WEIGHTS_ONLY]
        if before is not None:
            os.environ[WEIGHTS_ONLY] = before


def load_from_local_file(filename: str, map_location: str | None = None) -> dict[str, Any]:
    """Load a checkpoint as MMEngine's `load_from_local` does, with nothing but tensors and a run's history in it."""
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{filename} can not be found.")
    with torch.serialization.safe_globals(log_types()):
        return torch.load(path, map_location=map_location, weights_only=True)


@contextmanager
def plainly() -> Iterator[None]:
    """Turn what MMEngine and mmdet raise for unusable input in a block into an InputError of one line."""
    try:
        yield
    except InputError as error:
        raise InputError(_innermost(str(error))) from error
    except pickle.UnpicklingError as error:
        raise InputError(REFUSED) from error
    except Exception as error:  # whatever a constructor raises
        place = _place(error)
        if place is None:
            raise
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        raise InputError(f"{place}: {_innermost(message) or type(error).__name__}") from error


PLACES = {
    "load_or_resume": "a checkpoint cannot be loaded",
    "init_weights": "the weights that the config begins with cannot be loaded",
    "build_from_cfg": "the config cannot be built",
    "from_cfg": "the config cannot be built",
    "build_runner_from_cfg": "the config cannot be built",
    "mmengine.runner.loops": "the detector cannot be trained as the config says",
    "mmengine.model.base_model.base_model": "the detector cannot be run as the config says",
    "mmengine.evaluator.metric": "the metric cannot be computed as the config says",
}
"""Descriptions of failures, by MMEngine's function or module in which they occur."""


def _place(error: BaseException) -> str | None:
    """Return what failed, if the input can be the reason."""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        for name in (frame.f_code.co_name, frame.f_globals.get("__name__")):
            if name in PLACES:
                return PLACES[name]
        trace = trace.tb_next
    return None


def _innermost(message: str) -> str:
    """Return the message itself, where a loader's worker has put its own traceback around it."""
    marked = [line for line in message.splitlines() if "InputError: " in line]
    return marked[-1].partition("InputError: ")[2] if marked else (message.strip().splitlines() or [""])[-1]
