"""ONNX Runtime for browsers: its files, where they come from, and their hashes."""

import base64
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shvit.errors import InputError
from shvit.files import atomic_write, is_file, sha256
from shvit.weights.cache import cache_folder
from shvit.weights.download import download

VERSION = "1.30.0"
NPM = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
NPM_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
WAIT_S = 600.0  # for another process that fills the folder
CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{VERSION}/dist/"


@dataclass(frozen=True)
class RuntimeFile:
    """A file in the folder dist of the npm package, as published."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Build:
    """The files of one worker: the module that is imported, the one that it loads, and their WebAssembly."""

    module: RuntimeFile
    loader: RuntimeFile
    binary: RuntimeFile


# Sizes and hashes were read from the package that npm's own integrity value, sha512-q0y+JrrtukXS…, belongs to.
BUILDS = {
    "wasm": Build(
        RuntimeFile("ort.wasm.min.mjs", 50126, "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b"),
        RuntimeFile("ort-wasm-simd-threaded.mjs", 24381,
                    "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b"),
        RuntimeFile("ort-wasm-simd-threaded.wasm", 14239897,
                    "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"),
    ),
    "webgpu": Build(  # which has WebNN, too
        RuntimeFile("ort.webgpu.min.mjs", 66349, "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0"),
        RuntimeFile("ort-wasm-simd-threaded.asyncify.mjs", 53057,
                    "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28"),
        RuntimeFile("ort-wasm-simd-threaded.asyncify.wasm", 26781914,
                    "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da"),
    ),
}  # fmt: skip
FILES: dict[str, RuntimeFile] = {file.name: file for build in BUILDS.values() for file in vars(build).values()}


def integrity(sha256_hex: str) -> str:
    """Return a hash in the form of HTML's `integrity`."""
    return "sha256-" + base64.b64encode(bytes.fromhex(sha256_hex)).decode()


def runtime_files(folder: Path | None, progress: Callable[[str], None] = lambda _: None) -> dict[str, Path]:
    """Return the files by name; those missing from the folder are downloaded from npm.

    Args:
        folder: such as node_modules/onnxruntime-web/dist; a folder in the cache of downloads where None.

    Raises:
        InputError: the folder cannot be written to, or holds another version.
        CheckFailed: npm's package is not the one that was published.
    """
    folder = folder or cache_folder() / f"onnxruntime-web-{VERSION}"
    paths = {name: folder / name for name in FILES}
    if not all(map(is_file, paths.values())):
        progress(f"downloading onnxruntime-web {VERSION} from npm")
        _fill(folder)
    for name, path in paths.items():
        if sha256(path) != FILES[name].sha256:
            raise InputError(f"{path}: is not the file of onnxruntime-web {VERSION}; remove it to download it from "
                             "npm, or give --ort-web another folder")  # fmt: skip
    return paths


def _fill(folder: Path) -> None:
    """Extract the missing files from npm's package; one process at a time."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=WAIT_S):
            missing = [name for name in FILES if not is_file(folder / name)]
            if missing:
                _fetch(folder, missing)
    except Timeout as error:  # a kind of OSError
        raise InputError(f"{folder}: another process has been filling it for {WAIT_S:.0f} s; wait until it ends, or "
                         "give --ort-web another folder") from error  # fmt: skip
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to: {error.strerror}; give --ort-web another folder") from error


def _fetch(folder: Path, names: list[str]) -> None:
    package = folder / Path(NPM).name
    try:
        download(NPM, package, NPM_SHA256, lambda _: None)
    except InputError as error:
        raise InputError(f"{str(error).partition('; ')[0]}; check the network, or give --ort-web the folder dist of "
                         f"npm package onnxruntime-web@{VERSION}, or `cdn`")  from error  # fmt: skip
    try:
        with tarfile.open(package) as archive:
            for name in names:
                member = archive.extractfile(f"package/dist/{name}")
                assert member is not None  # the package's hash was right
                with atomic_write(folder / name) as partial:
                    partial.write_bytes(member.read(FILES[name].size_bytes))
    finally:
        package.unlink(missing_ok=True)
