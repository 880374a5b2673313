"""The root of the emulated machine: made once for each runtime, kept in the cache, and compared with its manifest."""

import hashlib
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from shvit.documents import load_json, parse_model, to_json
from shvit.errors import InputError, some
from shvit.files import atomic_write, is_folder, scratch_folder, sha256
from shvit.weights.cache import cache_folder

from ..backends.backend import Arm64Build, Library, Wheel
from . import emulator
from .packages import (
    COMPILER_FLAGS,
    PACKAGES,
    check_compiler,
    compile_library,
    download_packages,
    download_wheels,
    unpack_packages,
    unpack_wheels,
)

Log = Callable[[str], None]
FORMAT_VERSION = 1  # of roots; it rises when they are made in another way
NUMPY = Wheel("numpy", "2.2.6", {
    "3.11": "b64d8d4d17135e00c8e346e0a738deb17e754230d7e0810ac5012750bbd85a5a",
    "3.12": "f2618db89be1b4e05f7a1a847a9c1c0abd63e63a1607d892dd54668dd92faf87",
    "3.13": "f92729c95468a2f4f15e9bb94c432a9229d0d50de67304399627a943201baa2f",
})  # fmt: skip
"""What images are given by to every runtime."""
SITE = "usr/lib/python3/dist-packages"  # where Debian's and Ubuntu's Python looks for packages
PYTHON = "/usr/bin/python3"
WAIT_S = 1800.0  # for another process that makes the root
TRIAL_S = 600.0
MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True)
class Manifest:
    """What a root was made of, and what it consists of."""

    format_version: int
    system: str  # the distribution and its version, such as debian 12
    python: str
    packages: Mapping[str, str]  # .deb files and their SHA-256, which apt compared with signed lists
    wheels: Mapping[str, str]  # wheels and their SHA-256, which are pinned
    files: Mapping[str, str]  # the files of the root and their SHA-256, or where a symbolic link leads


@dataclass(frozen=True)
class Root:
    """A root as it is in the cache; programs run in a copy."""

    folder: Path
    manifest: Manifest

    @property
    def sha256(self) -> str:
        """The digest of all that the root consists of."""
        return hashlib.sha256(to_json(self.manifest.files).encode()).hexdigest()

    @contextmanager
    def copied(self, cpu: emulator.Cpu) -> Iterator[Path]:
        """Give a copy, of links to the same files, in which programs run on a processor; remove it at the end."""
        with scratch_folder(self.folder) as folder:
            copy = folder / "root"
            shutil.copytree(self.folder / "root", copy, symlinks=True, copy_function=_link)
            emulator.furnish(copy, cpu)
            yield copy


def open_root(name: str, build: Arm64Build, log: Log = lambda line: None) -> Root:
    """Return the root for a runtime from the cache; where there is none, make it, which needs the network.

    Args:
        name: what the cache calls it.
        build: what it holds besides Python and NumPy.

    Raises:
        InputError: it cannot be made, or has changed since.
    """
    path = _path(name, build)
    with _alone(path):
        if not is_folder(path):
            log(f"making the ARM64 root for {name}, once: {_system()}'s packages and wheels, in {path}")
            with atomic_write(path) as partial:
                _make(partial, build)
    manifest = parse_model(Manifest, load_json(path / "manifest.json", MAX_MANIFEST_BYTES), str(path), _again(path))
    files = _files(path / "root")
    if changed := sorted({each for each, _ in files.items() ^ manifest.files.items()}):
        raise InputError(f"{path}: has changed since it was made ({some(changed)}); {_again(path)}")
    return Root(path, manifest)


def check_root(name: str, build: Arm64Build) -> None:
    """Raise InputError where the cache has no root for a runtime yet, and the compiler that it takes is missing."""
    if isinstance(build.loaded, Library) and not is_folder(_path(name, build)):
        check_compiler()


def library_path(library: Library) -> str:
    """Return where a library is inside its root."""
    return f"/{SITE}/{library.name}"


def _path(name: str, build: Arm64Build) -> Path:
    return cache_folder() / "arm64" / f"{name}-{_key(build)}"


def _again(path: Path) -> str:
    return f"remove the folder, and it is made again: {path}"


def _key(build: Arm64Build) -> str:
    """Return a digest of what decides how a root is made."""
    source = [COMPILER_FLAGS, sha256(build.loaded.path)] if isinstance(build.loaded, Library) else []
    recipe = [FORMAT_VERSION, _system(), PACKAGES, asdict(NUMPY), asdict(build), source]
    return hashlib.sha256(to_json(recipe).encode()).hexdigest()[:12]


def _system() -> str:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    return f"{release.get('ID', 'Linux')} {release.get('VERSION_ID', '')}".strip()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time make a root."""
    from filelock import FileLock, Timeout  # comes with torch and huggingface_hub

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=WAIT_S):
            yield
    except Timeout as error:  # a kind of OSError
        raise InputError(f"{path}: another process has been making it for {WAIT_S:.0f} s; wait until it ends"
                         ) from error  # fmt: skip
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); set SHVIT_CACHE to a folder that can"
                         ) from error  # fmt: skip


def _make(folder: Path, build: Arm64Build) -> None:
    root, downloads = folder / "root", folder / "downloads"
    (downloads / "wheels").mkdir(parents=True)
    packages = download_packages(downloads / "apt")
    unpack_packages(packages, root)
    python = _python(root)
    wheels = download_wheels((NUMPY, *build.wheels), python, downloads / "wheels")
    unpack_wheels(wheels, root / SITE)
    if isinstance(build.loaded, Library):
        compile_library(build.loaded, root / SITE)
    _try(root, build)
    manifest = Manifest(FORMAT_VERSION, _system(), python, _digests(packages), _digests(wheels), _files(root))
    (folder / "manifest.json").write_text(to_json(asdict(manifest), indent=1) + "\n")
    shutil.rmtree(downloads)


def _digests(files: Sequence[Path]) -> dict[str, str]:
    return {file.name: sha256(file) for file in files}


def _python(root: Path) -> str:
    """Return the version of a root's Python, such as 3.11."""
    program = root / PYTHON.lstrip("/")
    match = re.fullmatch(r"python(3\.\d+)", str(program.readlink())) if program.is_symlink() else None
    if match is None:
        raise InputError(f"the packages of {_system()} for ARM64 hold no Python as it is known here")
    return match[1]


def _try(root: Path, build: Arm64Build) -> None:
    """Load the runtime once, which shows that it is complete, and keeps the compiled modules in the root."""
    if isinstance(build.loaded, Library):
        statement = f"import ctypes; ctypes.CDLL({library_path(build.loaded)!r})"
    else:
        statement = f"import {build.loaded}"
    emulator.furnish(root, emulator.DEFAULT_CPU)
    program = [PYTHON, "-I", "-c", f"import numpy; {statement}"]
    ended = emulator.run(root, emulator.DEFAULT_CPU, program, "", TRIAL_S)
    emulator.strip(root)
    if ended.status != 0:
        raise InputError(f"the runtime cannot be loaded on ARM64 under QEMU {emulator.qemu_version()}: {statement} "
                         f"(status {ended.status}: {ended.last_words})")  # fmt: skip


def _files(root: Path) -> dict[str, str]:
    """Return the files below a folder with their digests; where a symbolic link leads in place of its digest."""
    found = {}
    for parent, folders, names in os.walk(root):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for path in (Path(parent, name) for name in (*names, *links)):
            key = path.relative_to(root).as_posix()
            found[key] = f"-> {path.readlink()}" if path.is_symlink() else sha256(path)
    return found


def _link(source: str, target: str) -> None:
    """Make another name for a file; copy it where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
