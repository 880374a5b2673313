"""What the emulated machine consists of: the distribution's packages for ARM64, by apt, pinned wheels, and a library.

apt resolves dependencies and checks every package against the signed lists of the machine's own sources. It keeps its
state in a folder that is given: nothing of the machine changes, and no privilege is needed.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from shvit.errors import InputError
from shvit.files import sha256

from ..backends.backend import Library, Wheel

PACKAGES = ("python3", "libstdc++6", "libgomp1")  # what wheels for Linux take for granted
COMPILER = "aarch64-linux-gnu-g++"
COMPILER_FLAGS = ("-shared", "-fPIC", "-O1")
MAX_SECONDS = 900  # of one call of apt, pip or the compiler
GLIBC_MINORS = range(17, 45)  # of 2.x: the platforms that a wheel may be for; its hash names the one
APT_CONF = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
#clear APT::Architectures;
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "60";
"""
"""Read after the machine's own configuration, whose hooks are for the machine's own packages."""


def download_packages(folder: Path, packages: Sequence[str] = PACKAGES) -> list[Path]:
    """Download ARM64 packages and all that they depend on, as .deb files.

    Args:
        folder: an empty one.

    Raises:
        InputError: apt is missing, or its sources do not have the packages.
    """
    lists, archives = folder / "state" / "lists" / "partial", folder / "cache" / "archives" / "partial"
    for each in (lists, archives):
        each.mkdir(parents=True)
    configuration, status = folder / "apt.conf", folder / "status"
    configuration.write_text(APT_CONF)
    status.touch()
    places = {"Dir::State": folder / "state", "Dir::State::status": status, "Dir::Cache": folder / "cache"}
    apt = ["apt-get", "-c", str(configuration), *(f"-o{name}={place}" for name, place in places.items())]
    _call([*apt, "update"], "apt-get cannot read its sources")
    _call([*apt, "install", "--yes", "--download-only", *packages],
          "apt-get has no ARM64 packages; check the network, and that its sources have arm64")  # fmt: skip
    return sorted(archives.parent.glob("*.deb"))


def unpack_packages(packages: Sequence[Path], root: Path) -> None:
    """Unpack .deb files into a folder, without their installation scripts."""
    root.mkdir(parents=True)
    for package in packages:
        _call(["dpkg", "-x", str(package), str(root)], f"{package.name} cannot be unpacked")


def download_wheels(wheels: Sequence[Wheel], python: str, folder: Path) -> list[Path]:
    """Download pinned wheels for ARM64 Linux.

    Args:
        python: version of Python that they are for, such as 3.11.
        folder: an empty one.

    Raises:
        InputError: there is none for this Python, pip is missing, or what it finds has another hash.
    """
    pinned = [(wheel, wheel.sha256.get(python) or wheel.sha256.get("any")) for wheel in wheels]
    if lacking := [wheel.name for wheel, digest in pinned if digest is None]:
        known = ", ".join(sorted(set.intersection(*(set(wheel.sha256) for wheel in wheels))))
        raise InputError(f"this distribution's Python for ARM64 is {python}, for which {lacking[0]} is not pinned; "
                         f"--arm64 works with {known}")  # fmt: skip
    requirements = folder / "requirements.txt"
    lines = [f"{wheel.name}=={wheel.version} --hash=sha256:{digest}\n" for wheel, digest in pinned]
    requirements.write_text("".join(lines))
    abis = [f"--abi={each}" for each in (f"cp{python.replace('.', '')}", "abi3", "none")]
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in GLIBC_MINORS]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:"]
    target = [f"--python-version={python}", "--implementation=cp", *abis, *platforms, "--platform=any"]
    _call([*pip, *target, "--require-hashes", f"--dest={folder}", f"--requirement={requirements}"],
          "pip cannot download wheels for ARM64; check the network")  # fmt: skip
    files = sorted(folder.glob("*.whl"))
    assert {sha256(file) for file in files} == {digest for _, digest in pinned}, "pip checked them"
    return files


def unpack_wheels(wheels: Sequence[Path], folder: Path) -> None:
    """Unpack wheels, whose hashes were checked, into a folder of Python packages."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def check_compiler() -> None:
    """Raise InputError, in a line that says what to install, where there is no compiler for ARM64."""
    if shutil.which(COMPILER) is None:
        raise InputError(f"--arm64 needs {COMPILER} for this format; install it with: apt-get install "
                         "g++-aarch64-linux-gnu")  # fmt: skip


def compile_library(library: Library, folder: Path) -> None:
    """Compile a library into a folder of Python packages, with which it is linked.

    Raises:
        InputError: there is no compiler, or it does not take the source.
    """
    check_compiler()
    _call([COMPILER, *COMPILER_FLAGS, str(library.path), "-o", library.name, *library.flags],
          f"{library.source} cannot be compiled", folder)  # fmt: skip


def _call(command: Sequence[str], what: str, folder: Path | None = None) -> None:
    """Run a program, in a folder where one is given; raise InputError with the last line that says what is wrong."""
    if shutil.which(command[0]) is None:
        raise InputError(f"--arm64 needs {command[0]}, which Debian and Ubuntu have, and is not installed here")
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=MAX_SECONDS,
                              stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"}, cwd=folder,
                              check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise InputError(f"{what}: {Path(command[0]).name} does not end in {MAX_SECONDS} s") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"E:|ERROR:|.* error: ", line)] or lines or ["no message"]
        raise InputError(f"{what} ({errors[-1][:200]})")
