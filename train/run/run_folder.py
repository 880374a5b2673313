"""The run folder, written so that a crash at any moment leaves it usable."""

import os
import re
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from shvit.documents import check_expansion, load_yaml, to_json
from shvit.environment import versions
from shvit.errors import InputError, first_line
from shvit.files import atomic_write, is_file, is_folder, open_file
from shvit.locks import lock_file
from shvit.weights.run_info import RunInfo, read_recipe_file, same_name

from ..recipe import Recipe, differences
from .metrics import check_log, read_log

WRITTEN = re.compile(
    r"recipe\.yaml|metrics\.jsonl|curves\.png|last(-[1-9][0-9]*)?\.pt|best(_ema)?\.safetensors|tensorboard|\.lock"
)
"""Names of the files that a run writes into its folder."""
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".npy"}


class RunFolder:
    """recipe.yaml, metrics.jsonl, tensorboard/, curves.png, last.pt and older states, best[_ema].safetensors."""

    def __init__(self, path: Path, keep: int = 2):
        self.path = path
        self.keep = keep

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other runs, until this process ends in any way; a loader's workers do not hold it.

        Raises:
            InputError: another process trains into this folder, or it cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = lock_file(self.path / ".lock")
        except BlockingIOError as error:
            raise InputError(f"{self.path}: another run is active in it; stop that one, or choose another "
                             "--output") from error  # fmt: skip
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from error
        with lock:
            yield

    def claim(
        self,
        recipe: Recipe,
        classes: list[str],
        images: dict[str, Any] | None = None,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        """Write recipe.yaml, or check that the existing one computes the same.

        Args:
            images: the identity of the images, `Splits.identity`. If the run resumes with other images, as
                `recipe.data.changed` allows, recipe.yaml gets the present ones.
            preprocessing: what the run keeps of its images' preprocessing, by the names of `RunInfo`.

        Raises:
            InputError: the folder cannot be written to, or holds a run of another recipe, on other images, or
                without a recipe.
        """
        import yaml

        path = self.path / "recipe.yaml"
        self._check_entries()

        def write(record: dict[str, Any]) -> None:
            with atomic_write(path) as partial:
                partial.write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), encoding="utf-8")

        if not is_file(path):
            if self.states:
                raise InputError(f"{self.path} holds {self.states[0].name} but no recipe.yaml of that run; put "
                                 "that recipe.yaml back, or choose another --output")  # fmt: skip
            revision = git_revision(Path(__file__).parent.parent)
            made_with = {**versions("shvit", "timm"), "torch": str(torch.__version__), "git": revision}
            kept = {"preprocessing": preprocessing} if preprocessing else {}
            write({"recipe": recipe.as_dict(), "classes": classes, "data": images, **kept, "versions": made_with})
            return
        try:
            stored = load_yaml(path)
            unequal = differences(stored["recipe"], recipe.as_dict())
            known = list(map(same_name, stored.get("classes", classes)))
        except InputError as error:
            raise InputError(f"{error}; choose another --output") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a readable recipe; choose another --output") from error
        if unequal:
            raise InputError(f"{self.path} holds a run that differs in {', '.join(unequal)}; choose another --output")
        if known != list(map(same_name, classes)):
            raise InputError(f"{self.path} holds a run on other classes; choose another --output")
        before = stored.get("data")
        if before is None or images is None or before == images:
            return
        if not _are_images(before):
            raise InputError(f"{path}: does not identify the images of its run; choose another --output")
        finished = self._last_epoch() >= recipe.epochs
        if recipe.data.changed == "refuse" or finished:
            hint = "resume with --data.changed continue"
            if finished:
                hint = f"start from its weights, --checkpoint {self.path / 'best_ema.safetensors'}: its epochs are done"
            raise InputError(
                f"{self.path} holds a run on {_describe_change(before, images)}; choose another --output, or {hint}"
            )
        write({**stored, "data": images})

    def preprocessing(self) -> RunInfo | None:
        """Return what a run in this folder has kept of its preprocessing, among else; None for a new run."""
        path = self.path / "recipe.yaml"
        with suppress(InputError):  # which `claim` reports
            return read_recipe_file(path) if is_file(path) else None
        return None

    def _check_entries(self) -> None:
        """Check that the run would overwrite nothing but files of a run.

        Raises:
            InputError: a file of a run is a link or something else; or the folder is not a run's and holds files of
                such names, or images.
        """
        ours = is_file(self.path / "recipe.yaml")
        for entry in sorted(self.path.iterdir()) if is_folder(self.path) else ():
            if not WRITTEN.fullmatch(entry.name):
                if not ours and entry.suffix.lower() in IMAGES:
                    raise InputError(f"{self.path}: holds images, such as {entry.name}, and no run; choose another "
                                     "--output")  # fmt: skip
                continue
            if entry.name == "tensorboard":
                if not is_folder(entry):
                    raise InputError(f"{entry}: is not a folder, and a run writes one there; choose another --output")
            elif entry.is_symlink() or not is_file(entry):
                raise InputError(
                    f"{entry}: is a link or not a file, and a run writes a file there; choose another --output"
                )
            if not ours and entry.name != ".lock" and not entry.name.startswith("last"):
                raise InputError(
                    f"{self.path}: holds {entry.name} but no recipe.yaml of a run; choose another --output"
                )

    def _last_epoch(self) -> int:
        """Return the epoch of the last evaluation; 0 if there was none."""
        try:
            return read_log(self.path)[-1]["epoch"]
        except InputError:
            return 0

    @property
    def states(self) -> list[Path]:
        """Paths of the existing states, newest first: last.pt, last-1.pt, …"""
        names = ["last.pt", *(f"last-{age}.pt" for age in range(1, max(self.keep, 2)))]
        return [path for name in names if is_file(path := self.path / name)]

    def save_state(self, state: dict[str, Any]) -> None:
        """Write last.pt; the previous one becomes last-1.pt, and so on.

        Raises:
            InputError: it cannot be written, as on a full disk; every older state is kept.
        """
        last = self.path / "last.pt"
        if is_file(last) and not _is_archive(last):
            last.unlink()  # a damaged state; the run resumed from an older one
        with atomic_write(last) as partial:
            with partial.open("wb") as file:
                _write(state, file)
            for age in range(self.keep - 1, 0, -1):
                newer = self.path / (f"last-{age - 1}.pt" if age > 1 else "last.pt")
                if is_file(newer):
                    newer.replace(self.path / f"last-{age}.pt")

    def load_state(self, report: Callable[[str], None]) -> dict[str, Any] | None:
        """Load the newest readable state; None for a new run.

        Args:
            report: called with a message for each newer state that is damaged.

        Raises:
            InputError: none of them can be read.
        """
        problems = []
        for path in self.states:
            try:
                state = _read_state(path)
            except Exception as error:  # torch.load raises many types for a damaged file
                problems.append(f"{path} is damaged ({type(error).__name__}: {first_line(error, 100)})")
                continue
            for problem in problems:
                report(f"{problem}; resuming from {path.name}, step {state['step']}")
            return state
        if problems:
            raise InputError(f"{'; '.join(problems)}: no state to resume from; choose another --output")
        return None

    def write_log(self, log: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl, with a line for each evaluation."""
        with atomic_write(self.path / "metrics.jsonl") as partial:
            partial.write_text("".join(to_json(entry) + "\n" for entry in log))


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of a damaged end
        return False


def _read_state(path: Path) -> dict[str, Any]:
    """Read a state; whatever PyTorch raises for a file without one passes through."""
    with open_file(path) as file:
        with zipfile.ZipFile(file) as archive:
            if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                raise ValueError("it is compressed")  # torch.save writes none, and it may be of any size
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
    _check_expansion(state)
    return check_state(state)


MAX_VALUES = 5_000_000  # of a state, where a list that occurs in several places counts in each


def _check_expansion(state: object) -> None:
    """Raise ValueError for containers nested in each other so often that a walk through them would not end."""

    def children(each: object) -> list[object]:
        return list(each.values()) if isinstance(each, dict) else list(each) if isinstance(each, NESTING) else []

    check_expansion(state, children, MAX_VALUES)


NESTING = (list, tuple, set)


def check_state(state: Any) -> dict[str, Any]:
    """Check that a state's plain values are those of a run, and return it.

    Raises:
        ValueError: one is of another type or range.
    """
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise ValueError("it holds no run")
    for name, kind, lowest in (("step", int, 0), ("steps_per_epoch", int, 1), ("seconds", float, 0)):
        value = state.get(name, kind(lowest))
        if type(value) not in (kind, int) or not lowest <= value <= 1e15:
            raise ValueError(f"its {name} is {str(value)[:40]!r}")
    sums = state.get("sums", [0.0, 0.0, 0.0])
    if not isinstance(sums, list) or len(sums) != 3 or not all(type(each) in (float, int) for each in sums):
        raise ValueError("its sums are not three numbers")
    return {**state, "log": check_log(state.get("log", []), "its log")}


def _are_images(value: object) -> bool:
    """Return whether a value looks like a `Splits.identity`."""
    return isinstance(value, dict) and all(
        isinstance(part, dict) and type(part.get("count")) is int for part in value.values()
    )


def _describe_change(before: dict[str, Any], images: dict[str, Any]) -> str:
    """Describe how the images of a run differ from the present ones."""
    counts = [", ".join(f"{part['count']} {name}" for name, part in each.items()) for each in (before, images)]
    if counts[0] == counts[1]:
        return f"other images, as many ({counts[0]}) but with other names or on other sides of the split"
    return f"other images ({counts[0]} then, {counts[1]} now)"


def _write(state: dict[str, Any], file: BinaryIO) -> None:
    """Save a state and flush it to disk; raise the system's error where PyTorch's own would hide it."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    file.flush()
    os.fsync(file.fileno())


def git_revision(folder: Path) -> str:
    """Return the commit of the checkout around `folder`, with '+' if files differ from it; 'unknown' without one."""

    def git(*argv: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *argv], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if not git("ls-files", "recipe.py"):
            return "unknown"  # installed inside another project's checkout
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
