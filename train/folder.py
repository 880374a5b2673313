"""The run folder: what it holds, written so that a crash at any moment leaves it usable."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch

import shvit
from shvit.errors import InputError
from shvit.files import write_whole
from shvit.run_info import same_name

from .recipe import Recipe, differences


def check_apart(output: Path, root: Path | None) -> None:
    """Whether a run folder is where no folder is taken for a class, now or the next time.

    Raises:
        InputError: it is the folder of the images, or in it; beside the folders of a split there it may be.
    """
    if root is None or not root.is_dir():
        return
    inside, splits = output.resolve(), ("train", "val", "test")
    if root.resolve() not in (inside, *inside.parents):
        return
    below = inside.relative_to(root.resolve()).parts
    is_split = any(each.is_dir() and each.name.lower().startswith(splits) for each in root.iterdir())
    if not below or not is_split or below[0].lower().startswith(splits):
        raise InputError(f"--output {output}: lies in {root}, whose folders are classes of images; choose another")


class RunFolder:
    """recipe.yaml, metrics.jsonl, tensorboard/, curves.png, last.pt and older states, best[_ema].safetensors."""

    def __init__(self, path: Path, keep: int = 2):
        self.path = path
        self.keep = keep

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out; the lock dies with this process, however it dies, and a loader's workers have no part.

        Raises:
            InputError: another process trains into this folder, or it cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = _lock(self.path / ".lock")
        except BlockingIOError as error:
            raise InputError(f"{self.path}: another run is under way in it; stop that one, or choose another "
                             "--output") from error  # fmt: skip
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from error
        with lock:
            yield

    def claim(self, recipe: Recipe, classes: list[str], images: dict[str, Any] | None = None) -> None:
        """Writes recipe.yaml, or checks that the one there computes the same.

        Args:
            images: what tells the images from others, `Splits.identity`. Where the run goes on with other images, as
                `recipe.data.changed` may ask for, recipe.yaml has the present ones.

        Raises:
            InputError: the folder cannot be written to, or holds a run of another recipe, on other images, or of
                which nothing tells the recipe.
        """
        import yaml

        path = self.path / "recipe.yaml"

        def write(record: dict[str, Any]) -> None:
            with write_whole(path) as partial:
                partial.write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), encoding="utf-8")

        if not path.exists():
            if self.states:
                raise InputError(f"{self.path} holds {self.states[0].name} and no recipe.yaml that tells its run; put "
                                 "that run's recipe.yaml back, or choose another --output")  # fmt: skip
            write({"recipe": recipe.as_dict(), "classes": classes, "data": images, "versions": versions()})
            return
        try:
            stored = yaml.safe_load(path.read_text(encoding="utf-8"))
            unequal = differences(stored["recipe"], recipe.as_dict())
            known = list(map(same_name, stored.get("classes", classes)))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a readable recipe; choose another --output") from error
        if unequal:
            raise InputError(f"{self.path} holds a run that differs in {', '.join(unequal)}; choose another --output")
        if known != list(map(same_name, classes)):
            raise InputError(f"{self.path} holds a run on other classes; choose another --output")
        before = stored.get("data")
        if before is None or images is None or before == images:
            return
        finished = self._last_epoch() >= recipe.epochs
        if recipe.data.changed == "refuse" or finished:
            hint = "go on with --data.changed continue"
            if finished:
                hint = f"begin with its weights, --checkpoint {self.path / 'best_ema.safetensors'}: its epochs are done"
            raise InputError(f"{self.path} holds a run on {_other(before, images)}; choose another --output, or {hint}")
        write({**stored, "data": images})

    def _last_epoch(self) -> int:
        """The epoch of the last evaluation; 0 where there was none."""
        try:
            return int(json.loads((self.path / "metrics.jsonl").read_text().splitlines()[-1])["epoch"])
        except (OSError, ValueError, IndexError, KeyError, TypeError):
            return 0

    @property
    def states(self) -> list[Path]:
        """last.pt and the older states, newest first, those that exist."""
        names = ["last.pt", *(f"last-{age}.pt" for age in range(1, max(self.keep, 2)))]
        return [path for name in names if (path := self.path / name).exists()]

    def save_state(self, state: dict[str, Any]) -> None:
        """Writes last.pt; what had that name becomes last-1.pt, and so on.

        Raises:
            InputError: it cannot be written, as on a full disk; every older state is still there.
        """
        with write_whole(self.path / "last.pt") as partial:
            with partial.open("wb") as file:
                _write(state, file)
            for age in range(self.keep - 1, 0, -1):
                newer = self.path / (f"last-{age - 1}.pt" if age > 1 else "last.pt")
                if newer.exists():
                    newer.replace(self.path / f"last-{age}.pt")

    def load_state(self, report: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest state that can be read, or None for a new run.

        Args:
            report: called with a message for each newer one that cannot be.

        Raises:
            InputError: none of them can be read.
        """
        problems = []
        for path in self.states:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                if not isinstance(state, dict) or not isinstance(state.get("step"), int):
                    raise ValueError("it holds no run")
            except Exception as error:  # torch.load raises many types for a damaged file
                problems.append(f"{path} is damaged ({type(error).__name__})")
                continue
            for problem in problems:
                report(f"{problem}; going on from {path.name}, step {state['step']}")
            return state
        if problems:
            raise InputError(f"{'; '.join(problems)}: nothing to go on from; choose another --output")
        return None

    def write_log(self, log: list[dict[str, Any]]) -> None:
        """metrics.jsonl: a line for each evaluation."""
        with write_whole(self.path / "metrics.jsonl") as partial:
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in log))


def _lock(path: Path) -> AbstractContextManager:
    """A lock of this process alone on the file, if its file system has locks; BlockingIOError where another has it.

    On POSIX not filelock's: that is inherited by the workers of a loader, and lives on with one that outlives its run.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where no other process inherits it
        return _lock_without_fcntl(path)
    file = path.open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # which of them is the system's choice
        file.close()
        raise BlockingIOError from error
    except OSError:
        pass  # a file system without locks
    return file


def _lock_without_fcntl(path: Path) -> AbstractContextManager:
    from filelock import FileLock, Timeout

    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout as error:
        raise BlockingIOError from error
    except NotImplementedError:
        return nullcontext()  # a file system without locks


def _other(before: dict[str, Any], images: dict[str, Any]) -> str:
    """How the images of a run differ from those that are there now."""
    counts = [", ".join(f"{part['count']} {name}" for name, part in each.items()) for each in (before, images)]
    if counts[0] == counts[1]:
        return f"other images, as many ({counts[0]}) but with other names or on other sides of the split"
    return f"other images ({counts[0]} then, {counts[1]} now)"


def _write(state: dict[str, Any], file: BinaryIO) -> None:
    """`torch.save`, down to the disk; the system's error where it fails, which PyTorch's own hides."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    file.flush()
    os.fsync(file.fileno())


def versions() -> dict[str, str]:
    """What made a run: packages, and the revision of this code where it is a git checkout."""
    import platform

    found = {"shvit": shvit.__version__, "torch": str(torch.__version__), "timm": timm.__version__}
    return {**found, "python": platform.python_version(), "git": git_revision(Path(__file__).parent)}


def git_revision(folder: Path) -> str:
    """The commit of the checkout that `folder` lies in, with '+' where files differ from it; 'unknown' without one."""

    def git(*argv: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *argv], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if not git("ls-files", "recipe.py"):
            return "unknown"  # installed inside another project's checkout
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
