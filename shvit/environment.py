"""Optional packages and their extras, installed versions, how OpenMP's threads wait, and turns in measurements."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

Case = TypeVar("Case")

EXPORT = ("export", "coreml", "openvino", "litert", "ncnn", "executorch", "phone", "detection", "demo")
EXTRAS = {  # top-level module: the extras that install it, the first one unless a command has another
    "onnx": EXPORT,
    "onnxruntime": EXPORT,
    "onnxscript": EXPORT,
    "skimage": EXPORT,
    "scipy": EXPORT,
    "tornado": ("phone",),
    "segno": ("phone",),
    "cryptography": ("phone",),
    "coremltools": ("coreml", "demo"),
    "openvino": ("openvino",),
    "ai_edge_litert": ("litert",),
    "litert_torch": ("litert",),
    "ai_edge_quantizer": ("litert",),
    "ncnn": ("ncnn",),
    "pnnx": ("ncnn",),
    "executorch": ("executorch",),
    "flatbuffers": ("executorch",),
    "elpv_dataset": ("demo",),
    "matplotlib": ("train", *EXPORT),
    "sklearn": ("train", *EXPORT),
    "tensorboard": ("train", "detection", "demo"),
    "torchvision": ("train", "detection", "demo"),
    "datasets": ("data",),
    "pyarrow": ("data",),
    "av": ("video",),
    "ray": ("ray",),
    "pillow_heif": ("heic",),
    "tifffile": ("tiff",),
    "imagecodecs": ("tiff",),
    "mmengine": ("detection",),
    "mmcv": ("detection",),
    "mmdet": ("detection",),
}
COMMAND_EXTRAS = {  # words that a command begins with, longest first: the extra that installs all it needs
    "bench phone": "phone",
    "bench import": "phone",
    "site": "phone",
    "bench": "export",
    "info": "export",
    "eval": "export",
    "predict": "export",
    "export": "export",
    "verify": "export",
    "detect": "detection",
    "train": "train",
    "demo": "demo",
}
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "cv2": "opencv-python-headless", "sklearn": "scikit-learn"}


def extra_of(module: str, words: Sequence[str] = ()) -> str | None:
    """Return the extra that installs a top-level module, the command's own if that does; None where none does.

    Args:
        words: the command line after `shvit`.
    """
    brought_by = EXTRAS.get(module, ())
    line = " ".join([*words, ""])
    own = next((extra for command, extra in COMMAND_EXTRAS.items() if line.startswith(f"{command} ")), None)
    return own if own in brought_by else next(iter(brought_by), None)


def advise(module: str, words: Sequence[str] = ()) -> str:
    """Return one line that says that a module is missing and how it is installed.

    Args:
        module: its name, as in an import.
        words: as in `extra_of`.
    """
    package = module.partition(".")[0]
    if extra := extra_of(package, words):
        return f"this needs the package {package}; install it with: pip install 'shvit[{extra}]'"
    distribution = DISTRIBUTIONS.get(package, package.replace("_", "-"))
    return f"this needs the package {package}, which is not installed; install it with: pip install {distribution}"


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed.

    Args:
        packages: names of distributions, such as `onnxruntime`; one that is not installed is left out.
    """
    import platform
    from importlib import metadata  # this module is imported for --help, too

    installed = {"python": platform.python_version()}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""OpenMP's own variable, which GNU's library (PyTorch's on Linux), LLVM's (on macOS) and Intel's (on Windows) read, and
what the latter two call it: milliseconds of spinning before a thread sleeps."""
WAITING = (*SLEEPING, "GOMP_SPINCOUNT", "KMP_LIBRARY")
"""All variables that say how threads wait; one that the user has set decides alone."""
_set_here: dict[str, str] = {}


def let_threads_sleep() -> None:
    """Set `SLEEPING`, unless the user has set one of `WAITING` or PyTorch is loaded: OpenMP reads it only then.

    By default a thread that waits for others spins, so that one whose core another process has makes the rest burn
    theirs: training beside a busy process, of which a loader's worker is one, is then slower (docs/how-to/train.md).
    """
    if "torch" in sys.modules or any(name in os.environ for name in WAITING):
        return
    os.environ.update(SLEEPING)
    _set_here.update(SLEEPING)


def users_environment() -> dict[str, str]:
    """Return this process's variables without what `let_threads_sleep` set, for processes that measure latency."""
    return {name: value for name, value in os.environ.items() if _set_here.get(name) != value}


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MAX_MMAP_THRESHOLD = 32 << 20  # the largest that glibc accepts
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Have glibc keep up to `KEPT_BYTES` of freed memory for what this process allocates next; elsewhere do nothing.

    By default it returns the memory of each batch to the system and asks for it again, page by page: predictions took
    a quarter more processor time (docs/how-to/predict.md).
    """
    import ctypes

    with suppress(OSError, TypeError, AttributeError):  # no such library, or none with this function
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def take_turns(cases: Sequence[Case], rounds: int) -> Iterator[tuple[int, Case]]:
    """Yield each round's number and case, in reversed order every other round.

    What else a machine does meanwhile then disturbs all cases alike, and none always follows the same one.
    """
    for number in range(rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            yield number, case
