"""Compilers for the code of docs/start/app.md, and what it is compiled and linked with."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
from filelock import FileLock

from shvit.files import scratch_folder, sha256
from shvit.weights.cache import cache_folder

from .declarations import JAVA, KOTLIN, LITERT

PACKAGES = {
    "g++": "g++",
    "cmake": "cmake",
    "ninja": "ninja-build",
    "java": "default-jre-headless",
    "javac": "default-jdk-headless",
    "npm": "npm",
}
"""Programs, and the packages of Debian that have them."""


def need(*programs: str) -> None:
    """Skip the test where one of the programs is missing; it fails where the environment says CI."""
    for program in programs:
        if not shutil.which(program):
            missing = f"needs {program} (Debian: apt-get install {PACKAGES[program]})"
            pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)


def run(command: Sequence[str | Path], cwd: Path | None = None, data: bytes = b"") -> bytes:
    """Run a program, which must succeed; return what it prints."""
    done = subprocess.run(command, cwd=cwd, input=data, capture_output=True, check=False)
    assert done.returncode == 0, f"{command[0]}: {done.stderr.decode(errors='replace')[-3000:]}"
    return done.stdout


def write_files(texts: Mapping[str, str], folder: Path) -> list[Path]:
    """Write texts to files below a folder, which are named by their keys."""
    paths = [folder / name for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return paths


# --- C++ --------------------------------------------------------------------------------------------------------------

GXX = ("g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror")
NCNN, NCNN_SHA256 = "1.0.20261020", "ad8cdd63e9755cfa8e23b9b6d9ce46156077d80298a89e7c3ba325ffccfca200"
"""Version and hash of ncnn's source on PyPI."""
NCNN_OFF = ("VULKAN", "PYTHON", "BUILD_TOOLS", "BUILD_EXAMPLES", "BUILD_BENCHMARK", "BUILD_TESTS", "RUNTIME_CPU", "AVX")
"""What is left out of ncnn's build: what is not needed here, and code for each kind of processor."""


@dataclass(frozen=True)
class Library:
    """What a C++ program needs of a runtime, as arguments of g++."""

    headers: tuple[str, ...]
    linked: tuple[str, ...]


def check_cpp(code: str, library: Library, folder: Path) -> None:
    """Compile code without a `main`; nothing is linked."""
    run([*GXX, "-fsyntax-only", *library.headers, *write_files({"code.cpp": code}, folder)])


def build_cpp(code: str, library: Library, folder: Path) -> Path:
    """Compile and link a program; return its path."""
    sources, program = write_files({"program.cpp": code}, folder), folder / "program"
    run([*GXX, *library.headers, *sources, "-o", program, *library.linked])
    return program


def litert(folder: Path) -> Library:
    """LiteRT's library as its wheel has it, and our declarations of its C API, which are written to the folder."""
    write_files({f"litert/c/{name}": text for name, text in LITERT.items()}, folder)
    wheel = files("ai_edge_litert")
    return Library(("-isystem", str(folder)), (f"{wheel}/libLiteRt.so", f"-Wl,-rpath,{wheel}"))


def executorch() -> Library:
    """ExecuTorch's headers and libraries as its wheel has them, with the definitions that its CMake files ask for."""
    wheel = files("executorch.lib").joinpath("..")
    headers = (f"-isystem{wheel}/include", f"-isystem{wheel}/include/executorch/runtime/core/portable_type/c10")
    names = ("executorch", "executorch_kernels_optimized", "executorch_backend_xnnpack", "executorch_threadpool")
    linked = (f"-L{wheel}/lib", f"-Wl,-rpath,{wheel}/lib", "-Wl,--no-as-needed", *(f"-l{each}" for each in names))
    return Library(("-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_EVENT_TRACER_ENABLED", *headers), linked)


def ncnn() -> Library:
    """ncnn, which is built from its source in the cache of downloads the first time; that takes minutes."""
    assert version("ncnn") == NCNN, "the source should be the wheel's: pin its version and its hash"
    folder = _obtain(f"ncnn-{NCNN}", _build_ncnn)
    return Library(("-isystem", f"{folder}/include/ncnn"), (f"{folder}/lib/libncnn.a", "-fopenmp"))


def _build_ncnn(scratch: Path, target: Path) -> None:
    need("cmake", "ninja")
    _unpack(_download_ncnn(scratch), NCNN_SHA256, scratch)
    off = [f"-DNCNN_{each}=OFF" for each in NCNN_OFF]
    install = [f"-DCMAKE_INSTALL_PREFIX={target}", "-DCMAKE_INSTALL_LIBDIR=lib", "-DNCNN_INSTALL_SDK=ON"]
    source, build = scratch / f"ncnn-{NCNN}", scratch / "build"
    run(["cmake", "-G", "Ninja", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *off, *install])
    run(["ninja", "-C", build, "install"])


def _download_ncnn(folder: Path) -> Path:
    """Download ncnn's source.

    Its version becomes the day on which it is built, so that pip refuses it under its name, but says where it is.
    """
    pip = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps", "--no-build-isolation"]
    named = [*pip, "--no-binary=:all:", f"ncnn=={NCNN}"]
    refused = subprocess.run(named, cwd=folder, capture_output=True, text=True, check=False)
    address = re.search(rf"https://\S+/ncnn-{re.escape(NCNN)}\.tar\.gz", refused.stdout + refused.stderr)
    assert address, refused.stderr
    run([*pip, f"ncnn @ {address[0]}#sha256={NCNN_SHA256}"], cwd=folder)
    return folder / f"ncnn-{NCNN}.tar.gz"


# --- Kotlin -----------------------------------------------------------------------------------------------------------

KOTLINC, KOTLINC_SHA256 = "2.4.20", "c23dab400d7ce5ea8b6c909947c0ca5454189e4bb1108695b5f464500e5e950f"
"""Version and hash of JetBrains' package kotlin-compiler on npm."""


def check_kotlin(blocks: Sequence[str], folder: Path) -> None:
    """Compile files of Kotlin together, with our declarations of the classes that they use."""
    need("java", "javac")
    jars = _obtain(f"kotlin-compiler-{KOTLINC}", _download_kotlinc)
    compiler = ["java", "-cp", f"{jars}/kotlin-compiler.jar"]
    compiler += ["org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-no-stdlib", "-no-reflect", "-Werror"]
    classes = folder / "classes"
    known = f"{classes}:{jars}/kotlin-stdlib.jar"
    run(["javac", "-d", classes, *write_files(JAVA, folder / "java")])
    run([*compiler, "-cp", known, "-d", classes, *write_files(KOTLIN, folder / "kotlin")])
    sources = write_files({f"Block{index}.kt": block for index, block in enumerate(blocks)}, folder / "blocks")
    run([*compiler, "-cp", known, "-d", folder / "compiled", *sources])


def _download_kotlinc(scratch: Path, target: Path) -> None:
    need("npm")
    run(["npm", "pack", "--silent", f"kotlin-compiler@{KOTLINC}"], cwd=scratch)
    _unpack(scratch / f"kotlin-compiler-{KOTLINC}.tgz", KOTLINC_SHA256, scratch)
    (scratch / "package" / "lib").rename(target)


# --- downloads --------------------------------------------------------------------------------------------------------


def _obtain(name: str, make: Callable[[Path, Path], None]) -> Path:
    """Return a folder of the cache of downloads; where it is missing, one process makes it.

    Args:
        make: given an empty folder for its own files, and the path of the folder to make.
    """
    folder = cache_folder() / "apps" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with scratch_folder(folder) as scratch:
                make(scratch, scratch / "made")
                (scratch / "made").rename(folder)
    return folder


def _unpack(archive: Path, digest: str, folder: Path) -> None:
    """Unpack an archive, if it is the one that was published."""
    assert sha256(archive) == digest, f"{archive.name} is not what was published"
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
