"""The commands `shvit list` and `shvit weights {list,pull,check,convert}`; shvit/cli.py says how they are called."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Column, Table
from tyro.conf import Positional, arg

from shvit import terminal
from shvit.errors import CheckFailed, InputError
from shvit.files import atomic_write, check_replaceable, is_file, is_folder, is_there, sha256
from shvit.img_size import ImgSize
from shvit.terminal import right_aligned

from .address import shown_address
from .cache import cache_folder, expected_hash, obtain, read_lock
from .download import Report
from .manifest import Published, find, read_manifest


def _pixels(img_size: tuple[int, int] | None) -> str:
    return str(ImgSize(*img_size)) if img_size else ""


# --- shvit list -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class List:
    """List models: parameters, GMACs, input size, published top-1, and where weights are."""

    pattern: Positional[Annotated[str, arg(metavar="PATTERN")]] = "shvit*"
    """Models to list, as a glob; '*' lists every model that timm knows."""

    def run(self) -> dict[str, Any]:
        from .models import describe, names

        console = terminal.console()
        rows = [describe(name) for name in names(self.pattern)]
        table = Table("model", *right_aligned("params", "GMACs", "input px", "top-1 %"), "weights")
        for row in rows:
            table.add_row(
                row.model,
                "" if row.params is None else f"{row.params:,}",
                "" if row.gmacs is None else f"{row.gmacs:.3f}",
                _pixels(row.img_size),
                "" if row.top1 is None else str(row.top1),
                ", ".join(f"{name} ({urlsplit(url).hostname})" for name, url in row.weights.items()),
            )
        console.print(table)
        for source in dict.fromkeys(row.top1_source for row in rows if row.top1_source):
            console.print(f"top-1: {source}")
        return {"models": [asdict(row) for row in rows]}


# --- shvit weights … --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightsList:
    """List published checkpoints: cached or not, hash known or not, license, accuracy and its source."""

    def run(self) -> dict[str, Any]:
        cache = cache_folder()
        locked = read_lock(cache)
        entries = read_manifest()
        sources = list(dict.fromkeys(entry.accuracy_source for entry in entries))
        table = Table(Column("name", no_wrap=True), "cached", "hash", "license", "accuracy %")
        rows = []
        for entry in entries:
            cached = is_file(cache / entry.file_name)
            known = "manifest" if entry.sha256 else "locked" if entry.name in locked else "unknown"
            accuracy = ", ".join(f"{metric} {value}" for metric, value in entry.accuracy.items())
            note = sources.index(entry.accuracy_source) + 1
            table.add_row(entry.name, "yes" if cached else "no", known, entry.license, f"{accuracy} [{note}]")
            rows.append({**asdict(entry), "cached": cached, "hash": known, "sha256": expected_hash(entry, cache)})
        console = terminal.console()
        console.print(table)
        for number, source in enumerate(sources, start=1):
            console.print(f"[{number}] {source}")
        console.print(
            f"cache: {cache}; an unknown hash is recorded at the first download, and later downloads must match it"
        )
        return {"cache": str(cache), "checkpoints": rows}


@dataclass(frozen=True)
class Pull:
    """Download a published checkpoint into the cache, check that it loads as its model, and record its hash."""

    name: Positional[Annotated[str, arg(metavar="NAME")]]
    """Name of a published checkpoint, as in `shvit weights list`."""
    url: Annotated[str | None, arg(metavar="URL")] = None
    """Address to download from, such as a mirror; once the hash is known, the file must have it."""
    output: Annotated[Path | None, arg(metavar="FILE")] = None
    """File to copy the checkpoint to."""

    def run(self) -> dict[str, Any]:
        entry = find(self.name)
        suffix = Path(entry.file_name).suffix
        if self.output and self.output.suffix != suffix:
            raise InputError(f"--output {self.output}: {entry.name} is a {suffix} file; give a file name that ends so "
                             "(`shvit weights convert` writes other formats)")  # fmt: skip
        if self.output:
            check_replaceable(self.output)
        console, url = terminal.console(), self.url or entry.url
        with _progress(console, entry.name) as report:
            obtained = obtain(entry, url, report)
        if self.output:
            with atomic_write(self.output) as partial:
                shutil.copyfile(obtained.path, partial)
        path = self.output or obtained.path
        known = "trusted as the first download and recorded" if obtained.first_use else "as it should be"
        console.print(f"{entry.name}: {'fetched' if obtained.fetched else 'already in the cache'}; sha256 {known}")
        console.print(f"{path}  ({entry.license}, {obtained.size_bytes:,} bytes)")
        return {
            "name": entry.name,
            "model": entry.model,
            **asdict(obtained),
            "path": str(path),
            "url": shown_address(url) if obtained.fetched else None,
        }


@contextmanager
def _progress(console: Console, name: str) -> Iterator[Report]:
    """Show a bar on a terminal; elsewhere a line for each tenth, or each 16 MiB where the size is not known."""
    if console.is_terminal:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = -1

    def report(done: int, total: int | None) -> None:
        nonlocal last
        step = 10 * done // total if total else done >> 24
        if step != last:
            console.print(f"{name}: {done / 1e6:.1f}{f' of {total / 1e6:.1f}' if total else ''} MB")
        last = step

    yield report


HashState = Literal["as recorded", "differs", "unknown"]


@dataclass(frozen=True)
class Checked:
    """The result of checking one file."""

    target: str
    path: str
    sha256: str
    hash: HashState
    identity: dict[str, Any] | None
    """Layout, model, classes and so on; None where the file does not load strictly."""
    problem: str | None


@dataclass(frozen=True)
class Check:
    """Compare hashes of checkpoints with the known ones, and load each file strictly."""

    targets: Positional[Annotated[tuple[str, ...], arg(metavar="[NAME|FILE ...]")]] = ()
    """Published names, as in `shvit weights list`, or files; everything in the cache by default."""

    def run(self) -> dict[str, Any]:
        cache = cache_folder()
        targets = self.targets or tuple(e.name for e in read_manifest() if is_file(cache / e.file_name))
        if not targets:
            raise InputError(f"{cache}: holds no checkpoint; `shvit weights pull NAME` downloads one, or name a file")
        files = [(target, *_locate(target, cache)) for target in targets]
        checks = [_check(target, path, entry, cache) for target, path, entry in files]
        table = Table(
            "checkpoint", "hash", "layout", "model", *right_aligned("classes", "params"), "distilled", "holds"
        )
        for check in checks:
            figures = ("layout", "model", "num_classes", "params", "distilled")
            identity = [str((check.identity or {}).get(key, "")) for key in figures]
            table.add_row(check.target, check.hash, *identity, check.problem or "yes")
        terminal.console().print(table)
        result = {"checks": [asdict(check) for check in checks]}
        problems = [f"{check.target}: {check.problem}" for check in checks if check.problem]
        if problems:
            raise CheckFailed(f"{len(problems)} of {len(checks)} do not hold: {'; '.join(problems)}", result)
        return result


def _locate(target: str, cache: Path) -> tuple[Path, Published | None]:
    """Return the file that a name or a path stands for, and its entry in the manifest if it has one."""
    entry = next((entry for entry in read_manifest() if entry.name == target), None)
    path = cache / entry.file_name if entry else Path(target)
    if is_folder(path):
        raise InputError(f"{path}: is a folder; name the checkpoint file in it")
    if not is_file(path):
        hint = (
            f"`shvit weights pull {target}` downloads it" if entry else "give a file, or a name of `shvit weights list`"
        )
        raise InputError(f"{path}: no such file; {hint}")
    return path, entry


def _check(target: str, path: Path, entry: Published | None, cache: Path) -> Checked:
    from .layouts import identify

    digest = sha256(path)
    expected = expected_hash(entry, cache) if entry else None
    known: HashState = "unknown" if expected is None else "as recorded" if digest == expected else "differs"
    problem = f"its sha256 is {digest}, and {expected} is on record; pull it again" if known == "differs" else None
    try:
        identity = identify(path)
    except InputError as error:
        return Checked(target, str(path), digest, known, None, problem or str(error).removeprefix(f"{path}: "))
    if entry and identity.model != entry.model:
        problem = problem or f"it is a {identity.model}, and should be a {entry.model}; remove {path} and pull it again"
    return Checked(target, str(path), digest, known, asdict(identity), problem)


@dataclass(frozen=True)
class Convert:
    """Write a checkpoint in another layout. timm and reference differ in names only; deployed cannot be undone."""

    src: Positional[Annotated[Path, arg(metavar="SRC")]]
    """Checkpoint to read, of any layout."""
    dst: Positional[Annotated[Path, arg(metavar="DST")]]
    """File to write: .safetensors, .pth or .pt."""
    to: Literal["timm", "reference", "deployed"]
    """Layout: timm's parameter names, the reference's, or the inference form (shvit.deploy)."""
    ema: bool = False
    """Convert the EMA weights (model_ema or state_dict_ema) of a training checkpoint."""

    def run(self) -> dict[str, Any]:
        if self.dst.suffix not in (".safetensors", ".pth", ".pt"):
            raise InputError(f"{self.dst}: unknown suffix {self.dst.suffix!r}; choose .safetensors, .pth or .pt")
        if is_there(self.dst) and is_there(self.src) and self.dst.samefile(self.src):
            raise InputError(f"{self.dst}: is the source too; give another name")
        check_replaceable(self.dst)

        from shvit.checkpoint import write_checkpoint

        from .layouts import convert
        from .resolve import resolve_weights

        identity, state_dict = convert(self.src, self.to, self.ema)
        info = resolve_weights(identity.model, self.src, self.ema).info
        write_checkpoint(state_dict, self.dst, info.metadata if info else None)
        console = terminal.console()
        console.print(f"{self.src} ({identity.layout} {identity.model}, {identity.num_classes} classes) → "
                      f"{self.dst} ({self.to}, {len(state_dict)} tensors)")  # fmt: skip
        if identity.beside:
            console.print(f"left out: {identity.beside} tensors of the detector beside the SHViT")
        return {"source": asdict(identity), "output": str(self.dst), "layout": self.to, "sha256": sha256(self.dst)}


WEIGHTS = {"list": WeightsList, "pull": Pull, "check": Check, "convert": Convert}
