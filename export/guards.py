"""Checks between third-party artifacts and this program: declarations when a file is loaded, errors as one line."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from shvit.certificate import certificate_path, read_certificate
from shvit.errors import CheckFailed, InputError, first_line
from shvit.files import check_output_folder, check_replaceable, is_file, is_folder, is_there, open_file, sha256

from .spec import Spec

P = ParamSpec("P")
R = TypeVar("R")
MAX_ELEMENTS = 1 << 30
"""Numbers in one tensor inside a model: 4 GiB in float32. SHViT-S4 at 4096 px has 0.2 · 10⁹ in its largest."""
MAX_PIXEL_BYTES = 2 << 30  # limit of all pixels in memory at once: in uint8 512 of them up to 1182 px
MAX_REASON = 300  # characters of a library's message
MAX_BATCH_ELEMENTS = 1 << 27  # numbers in one batch of images: 512 MiB in float32, 32 images of 1182 px


# --- running ----------------------------------------------------------------------------------------------------------


@contextmanager
def one_line(name: Path | str, what: str) -> Iterator[None]:
    """Turn whatever a library raises into an InputError that begins with a file's path, or a model's name, and `what`.

    Runtimes have exception types of their own, and raise many others for one kind of fault. A missing package and the
    two errors of ours pass, as they are lines already.
    """
    try:
        yield
    except (InputError, CheckFailed, ImportError):
        raise
    except MemoryError as error:
        raise InputError(f"{name}: {what} (it needs more memory than this machine has)") from error
    except Exception as error:
        raise InputError(f"{name}: {what} ({first_line(error)[:MAX_REASON]})") from error


RUNNING = "does not run on what it says that it takes"


def guarded(function: Callable[P, R], path: Path, what: str = RUNNING) -> Callable[P, R]:
    """Return the function with its errors as those of `one_line`."""

    def guard(*args: P.args, **kwargs: P.kwargs) -> R:
        with one_line(path, what):
            return function(*args, **kwargs)

    return guard


def checked_run(
    function: Callable[[torch.Tensor], Sequence[Any]], path: Path, spec: Spec
) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Return the function with its errors as those of `one_line`, and its outputs held against the spec."""

    def run(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with one_line(path, RUNNING):
            outputs = tuple(function(batch))
        _check_outputs(path, spec, outputs, len(batch))
        return outputs

    return run


def _check_outputs(path: Path, spec: Spec, outputs: Sequence[Any], rows: int) -> None:
    """Raise InputError unless there is a tensor for each output that the spec names, with a row for each image."""
    if len(outputs) < len(spec.outputs):
        raise InputError(f"{path}: gives {len(outputs)} outputs of {len(spec.outputs)}; export the model again")
    flat = spec.output_kind != "features"
    for name, output in zip(spec.outputs, outputs, strict=False):
        shape = tuple(output.shape)
        if shape != (rows, spec.num_classes) if flat else shape[:1] != (rows,):
            expected = f"({rows}, {spec.num_classes})" if flat else f"({rows}, …)"
            raise InputError(f"{path}: its output {name} is of shape {shape}, and should be {expected}; export the "
                             "model again")  # fmt: skip


def finite(path: Path, output: torch.Tensor) -> torch.Tensor:
    """Return the output as it is; raise InputError where it holds NaN or infinities, which stand for no class."""
    if not torch.isfinite(output).all():
        raise InputError(f"{path}: gives NaN or infinite outputs, which are no predictions; export the model again")
    return output


MAX_TRIAL_SECONDS = 120  # S4 at 224 px takes 0.1


def run_trial(path: Path, runtime: str, words: Sequence[str], files: Sequence[Path]) -> None:
    """Raise InputError where a model ends the process that runs it, or takes too long for one image.

    Args:
        runtime: a key of `RUNTIMES` in formats/trial.py, which runs with `words`.
        files: those of the model; while they stay as they are, they are not tried again.
    """
    if reason := _trial(runtime, tuple(words), tuple(map(sha256, files))):
        raise InputError(f"{path}: {reason}; export the model again")


@cache
def _trial(runtime: str, words: tuple[str, ...], digests: tuple[str, ...]) -> str | None:
    """Return why a model does not run; None where it does."""
    script = Path(__file__).parent / "formats" / "trial.py"
    command = [sys.executable, "-I", str(script), runtime, *words]
    try:
        done = subprocess.run(command, capture_output=True, timeout=MAX_TRIAL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"takes more than {MAX_TRIAL_SECONDS} s for one image"
    if done.returncode == 0:
        return None
    said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    reason = f"a signal ({-done.returncode})" if done.returncode < 0 else " ".join(said)[:200]
    return f"does not run in {runtime} ({reason})"


# --- what it declares -------------------------------------------------------------------------------------------------


class Port(NamedTuple):
    """An input or output as a file declares it."""

    name: str
    dtype: str  # float32, float16, uint8, image, … or what the runtime calls another
    shape: tuple[int | None, ...] | None
    """None where not even its rank is declared; None in it for an open length."""


FLOATS = ("float32", "float16", "float64")


def check_ports(path: Path, spec: Spec, inputs: Sequence[Port], outputs: Sequence[Port], name: str) -> None:
    """Raise InputError where a file's declared inputs and outputs differ from its own spec.

    That is in names (of its one input: `name`), types, ranks, sizes or the number of classes.
    """
    if [port.name for port in inputs] != [name]:
        names = f"the inputs {', '.join(port.name for port in inputs)}" if inputs else "no input"
        raise InputError(f"{path}: has {names}, and should have one, {name}; export the model again")
    pixels = (*spec.img_size, spec.in_chans)
    expected = pixels if spec.uint8_input and inputs[0].dtype != "image" else spec.shape
    _check_port(path, inputs[0], ("uint8", "image") if spec.uint8_input else FLOATS, (None, *expected))
    by_name = {port.name: port for port in outputs}
    missing = [each for each in spec.outputs if each not in by_name]
    if missing or [each for each in by_name if each in spec.outputs] != list(spec.outputs):
        raise InputError(f"{path}: says that it gives {', '.join(spec.outputs)}, and gives "
                         f"{', '.join(by_name) or 'nothing'}; export the model again")  # fmt: skip
    if spec.output_kind != "features" and spec.num_classes < 1:
        raise InputError(f"{path}: gives {spec.output_kind}, and says that it has no classes; export the model again")
    shape = (None, spec.num_classes) if spec.output_kind != "features" else (None, None, None, None)
    for each in spec.outputs:
        _check_port(path, by_name[each], FLOATS, shape)


def _check_port(path: Path, port: Port, dtypes: Sequence[str], shape: Sequence[int | None]) -> None:
    """Raise InputError unless the port is of one of these types and of this shape, as far as it is declared."""
    declared, same_type = port.shape, port.dtype in dtypes
    if same_type and (declared is None or (len(declared) == len(shape) and all(map(_agree, declared, shape)))):
        return
    actual = _shown(declared or ()) if same_type else f"{port.dtype} {_shown(declared or ())}"
    expected = _shown(shape) if same_type else f"{dtypes[0]} {_shown(shape)}"
    raise InputError(f"{path}: {port.name} is {actual}, and should be {expected} by what it says of itself; export the "
                     "model again")  # fmt: skip


def _agree(declared: int | None, expected: int | None) -> bool:
    return declared is None or expected is None or declared == expected


def _shown(shape: Sequence[int | None]) -> str:
    return "×".join("?" if each is None else str(each) for each in shape) or "a single number"


def check_elements(path: Path, shapes: Iterable[tuple[str, Sequence[int | None]]]) -> None:
    """Raise InputError where a model declares too large a tensor.

    `shapes` holds each tensor's name and shape; an open length counts as 1.
    """
    for name, shape in shapes:
        count = math.prod(each for each in shape if each is not None and each >= 0)
        if count > MAX_ELEMENTS:
            raise InputError(f"{path}: its tensor {name} has {count:.1e} numbers, more than the {MAX_ELEMENTS:.1e} "
                             "allowed; export the model for a smaller size")  # fmt: skip


LOOPS = ("Loop", "Scan", "TensorIterator", "WHILE", "while_loop")
"""Operations that repeat others as often as a number in the file says: no exported classifier has one."""


def check_operators(path: Path, operators: Mapping[str, int] | Iterable[str]) -> None:
    """Raise InputError where a model has an operation that could run for ever."""
    if loops := [each for each in LOOPS if each in operators]:
        raise InputError(f"{path}: holds a loop ({', '.join(loops)}), and could run for ever; no model of `shvit "
                         "export` has one")  # fmt: skip


def images_that_fit(limit: int, *specs: Spec) -> int:
    """Return how many images, at most `limit`, may be held at once at the largest of the specs' sizes."""
    largest = max(spec.pixels.dtype.itemsize * spec.in_chans * size.height * size.width
                  for spec in specs for size in spec.sizes)  # fmt: skip
    return max(1, min(limit, MAX_PIXEL_BYTES // largest))


def rows_that_fit(batch_size: int, spec: Spec) -> int:
    """Return the batch size, or as many images as may be computed at once where that is less."""
    return max(1, min(batch_size, MAX_BATCH_ELEMENTS // math.prod(spec.shape)))


# --- what is written --------------------------------------------------------------------------------------------------


def check_apart(output: Path | None, written: str = "--output", /, **read: object) -> None:
    """Raise InputError where a command's `output` would overwrite what it reads, or lie in a folder of images.

    Args:
        written: the option that names the output.
        read: paths that the command reads, by their options' names; None, and what does not exist, is skipped.
    """
    for option, value in read.items():
        if value is None or output is None or not is_there(path := Path(str(value))):
            continue
        target, source, name = output.resolve(), path.resolve(), f"--{option.replace('_', '-')}"
        if target == source or (is_there(output) and output.samefile(path)):
            raise InputError(f"{written} {output}: is what {name} reads; choose another name")
        holds_images = is_folder(path) and path.suffix != ".mlpackage" and option != "checkpoint"  # that is a run's
        if holds_images and target.is_relative_to(source):
            raise InputError(
                f"{written} {output}: is inside of {name} {path}, among the images; choose a place outside"
            )


def check_files(output: Path, files: Sequence[Path]) -> None:
    """Raise InputError where an artifact's files or its certificate cannot be written, before any work is done."""
    check_output_folder(output.parent)
    certificate = certificate_path(output)
    for path in (*files, certificate):
        check_replaceable(path)
        if path.suffix == ".mlpackage" and is_file(path):
            raise InputError(f"{path}: is a file; choose another name for --output")
    if is_file(certificate):
        try:
            read_certificate(output)
        except InputError as error:
            raise InputError(f"{certificate}: is there already and is not a certificate; choose another name for "
                             "--output") from error  # fmt: skip


def check_own(folder: Path | None, record: str, marker: bytes, others: Sequence[str] = ()) -> None:
    """Raise InputError where a command would overwrite files in a folder that no earlier run of it wrote.

    Args:
        record: the file by which a folder is known to be an earlier run's: its first 4096 bytes hold `marker`.
        others: further files that are written.
    """
    if folder is None or not is_folder(folder):
        return
    ours = False
    if is_file(folder / record):
        with open_file(folder / record) as file:
            ours = marker in file.read(4096)
    if not ours and (foreign := [name for name in (record, *others) if is_there(folder / name)]):
        raise InputError(f"--output {folder}: holds {foreign[0]}, which no earlier run of this command wrote; choose "
                         "another folder")  # fmt: skip
