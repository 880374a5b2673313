"""What the emulated machine is made of and checked by: processors, roots, packages; and what is missing, in a line."""

import json
import os
import re
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from shvit.errors import InputError
from shvit.export.arm64 import emulator, packages, root
from shvit.export.arm64.compare import check_arm64
from shvit.export.arm64.emulator import DEFAULT_CPU, PROCESSORS, features, furnish, strip
from shvit.export.arm64.packages import compile_library, download_packages, download_wheels, unpack_wheels
from shvit.export.arm64.root import NUMPY, Manifest, open_root
from shvit.export.backends.backend import Arm64Build, Library, Wheel
from shvit.export.backends.registry import BACKENDS
from shvit.files import sha256
from tests.apps.build import need
from tests.conftest import ROOT
from tests.emulation import need_emulator

BUILDS = {name: backend.arm64 for name, backend in BACKENDS.items() if backend.arm64}


# --- what is missing --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def forgotten():
    """What was found out of this machine before."""
    emulator.confined.cache_clear()
    yield
    emulator.confined.cache_clear()


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder that is all of PATH; a function that puts programs of this machine there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    found = {name: shutil.which(name) for name in ("unshare", "prlimit", "true")}
    monkeypatch.setenv("PATH", str(folder))

    def put(*names: str) -> Path:
        for name in names:
            (folder / name).symlink_to(found[name])
        return folder

    return put


def test_missing_qemu_is_one_line_that_installs_it(programs):
    with pytest.raises(InputError, match=r"needs QEMU's user emulation; install it with: apt-get install qemu-user-s"):
        emulator.check_emulator()


def test_missing_unshare_is_one_line(programs):
    qemu = programs() / emulator.QEMU[0]
    qemu.write_text("#!/bin/sh\n")
    qemu.chmod(0o755)
    with pytest.raises(InputError, match=r"needs unshare; install it with: apt-get install util-linux"):
        emulator.check_emulator()


def test_neither_root_nor_namespaces_is_one_line_that_allows_them(programs):
    unshare = programs("true") / "unshare"
    unshare.write_text("#!/bin/sh\nexit 1\n")
    unshare.chmod(0o755)
    with pytest.raises(InputError, match=r"needs user namespaces, or root, and has neither here; allow them with: sys"):
        emulator.confined()


def test_another_system_is_one_line(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    with pytest.raises(InputError, match=r"needs Linux, .* and this is Darwin; use a container of Debian"):
        emulator.check_emulator()


def test_missing_apt_is_one_line(programs, tmp_path):
    with pytest.raises(InputError, match=r"--arm64 needs apt-get, which Debian and Ubuntu have, and is not installed"):
        download_packages(tmp_path / "apt")


def test_missing_compiler_is_one_line_that_installs_it(programs, tmp_path, monkeypatch):
    """Where the library is to be compiled; a root that has it needs no compiler any more."""
    monkeypatch.setenv("SHVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(emulator, "check_emulator", lambda: None)
    backend = BACKENDS["executorch"]
    with pytest.raises(
        InputError, match=r"needs aarch64-linux-gnu-g\+\+ .*; install it with: apt-get install g\+\+-aar"
    ):
        check_arm64(backend)
    root._path(backend.name, backend.arm64).mkdir(parents=True)
    assert check_arm64(backend) is backend.arm64
    assert check_arm64(BACKENDS["onnx"]) is BUILDS["onnx"]


def test_a_library_that_does_not_compile_is_one_line(tmp_path, monkeypatch):
    need("g++")
    monkeypatch.setattr(packages, "COMPILER", "g++")
    without = Library("executorch_arm64.cpp", ())
    with pytest.raises(InputError, match=r"^executorch_arm64\.cpp cannot be compiled \(.* error: executorch/[^\n]*\)$"):
        compile_library(without, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_runtime_without_arm64_is_one_line():
    with pytest.raises(InputError, match=r"Core ML has no runtime for ARM64 Linux .*; leave out"):
        check_arm64(BACKENDS["coreml"])


# --- processors -------------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_words_that_linux_gives():
    """The words are what QEMU 7.2 gives a program on each processor; names are the kernel's."""
    assert features((0x8FB, 0)) == ("asimd",)
    assert features((0x119FFB, 0)) == ("asimd", "asimdhp", "asimddp")
    assert set(features((0xECFFFFFB, 0x7F877FFF))) == set(emulator.FEATURES)


def test_a_furnished_root_describes_the_processor_and_is_stripped_again(tmp_path, monkeypatch):
    monkeypatch.setattr(emulator, "find_qemu", lambda: Path(__file__))
    (tmp_path / "usr").mkdir()
    furnish(tmp_path, "cortex-a53")
    rows = dict(re.split(r"\s*: ", line) for line in (tmp_path / "proc/cpuinfo").read_text().strip().splitlines())
    assert (rows["CPU implementer"], rows["CPU part"]) == ("0x41", "0xd03")  # Arm's own numbers of a Cortex-A53
    register = tmp_path / "sys/devices/system/cpu/cpu0/regs/identification/midr_el1"
    assert int(register.read_text(), 16) == 0x410FD030  # of revision 0
    strip(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["usr"]


@pytest.mark.parametrize("cpu", PROCESSORS)
def test_qemu_knows_the_processor(cpu):
    need_emulator()
    known = subprocess.run([emulator.find_qemu(), "-cpu", "help"], capture_output=True, text=True, timeout=60).stdout
    assert cpu in known.split()


@pytest.mark.parametrize(
    ("version", "cpu", "expected"),
    [("7.2.22", "max", "max,sme=off"), ("unknown", "max", "max,sme=off"), ("10.0.13", "max", "max"),
     ("7.2.22", "cortex-a76", "cortex-a76")],
)  # fmt: skip
def test_instructions_that_an_old_qemu_computes_wrongly_are_off(monkeypatch, version, cpu, expected):
    monkeypatch.setattr(emulator, "qemu_version", lambda: version)
    assert emulator.qemu_cpu(cpu) == expected


# --- pins -------------------------------------------------------------------------------------------------------------


def _pins() -> str:
    return "".join((ROOT / name).read_text() for name in ("constraints.txt", "requirements-litert.txt"))


@pytest.mark.parametrize("name", BUILDS)
def test_pinned_wheels_are_of_the_versions_that_tests_run_with(name):
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", _pins(), re.M))
    runtime = BUILDS[name].wheels[0]
    assert runtime.version == pins[runtime.name]
    for wheel in BUILDS[name].wheels:
        assert wheel.sha256.keys() >= NUMPY.sha256.keys() or "any" in wheel.sha256
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in wheel.sha256.values())


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that is all that pip looks in, with a package, and its pin."""
    folder = tmp_path / "index"
    folder.mkdir()
    file = folder / "shvit_arm_test-1.0-py3-none-any.whl"
    info = "shvit_arm_test-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("shvit_arm_test.py", "A = 1\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: shvit-arm-test\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return Wheel("shvit-arm-test", "1.0", {"any": sha256(file)})


def test_a_pinned_wheel_is_downloaded_and_unpacked(wheels, tmp_path):
    target = tmp_path / "wheels"
    target.mkdir()
    (file,) = download_wheels([wheels], "3.11", target)
    unpack_wheels([file], tmp_path / "site")
    assert (tmp_path / "site" / "shvit_arm_test.py").read_text() == "A = 1\n"


def test_a_wheel_of_another_hash_is_refused(wheels, tmp_path):
    with pytest.raises(InputError, match=r"pip cannot download wheels for ARM64; check the network \(ERROR: "):
        download_wheels([replace(wheels, sha256={"any": "0" * 64})], "3.11", tmp_path)
    assert not list(tmp_path.glob("*.whl"))


def test_a_python_that_is_not_pinned_is_refused(wheels, tmp_path):
    with pytest.raises(
        InputError, match=r"Python for ARM64 is 3\.9, for which onnx is not pinned; .* with 3\.11, 3\.12"
    ):
        download_wheels([Wheel("onnx", "1", {"3.11": "", "3.12": ""})], "3.9", tmp_path)


def test_what_takes_too_long_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "MAX_SECONDS", 0.1)
    with pytest.raises(InputError, match=r"sources: sleep does not end in 0\.1 s"):
        packages._call(["sleep", "5"], "sources")


# --- roots ------------------------------------------------------------------------------------------------------------

BUILD = Arm64Build((Wheel("x", "1", {"any": "0" * 64}),), "x")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A root as an earlier run left it, of two files and a link."""
    monkeypatch.setenv("SHVIT_CACHE", str(tmp_path))
    folder = tmp_path / "arm64" / f"x-{root._key(BUILD)}"
    (folder / "root/lib").mkdir(parents=True)
    for name in ("lib/a.so", "b"):
        (folder / "root" / name).write_text(name)
    (folder / "root" / "lib64").symlink_to("lib")
    files = {"b": sha256(folder / "root/b"), "lib/a.so": sha256(folder / "root/lib/a.so"), "lib64": "-> lib"}
    manifest = {"format_version": 1, "system": "debian 12", "python": "3.11", "packages": {}, "wheels": {}}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
    return folder


def test_a_root_is_used_again_without_a_network(cached, monkeypatch):
    monkeypatch.setattr(root, "_make", lambda *_: pytest.fail("it is there"))
    found = open_root("x", BUILD)
    assert found.folder == cached
    assert isinstance(found.manifest, Manifest)
    assert len(found.sha256) == 64


DAMAGE = {
    "another content": lambda root: (root / "b").write_text("c"),
    "one file more": lambda root: (root / "lib/c.so").write_text("c"),
    "one file less": lambda root: (root / "lib/a.so").unlink(),
    "another link": lambda root: ((root / "lib64").unlink(), (root / "lib64").symlink_to("/")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_root_that_changed_is_refused(cached, damage):
    DAMAGE[damage](cached / "root")
    with pytest.raises(
        InputError, match=r"has changed since it was made \(.*\); remove the folder, and it is made again"
    ):
        open_root("x", BUILD)


@pytest.mark.parametrize("text", ["{", "[]", '{"files": {}}'])
def test_a_damaged_manifest_is_one_line(cached, text):
    (cached / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"^[^\n]+$"):
        open_root("x", BUILD)


def test_what_decides_how_a_root_is_made_gives_it_another_name(monkeypatch):
    keys = {root._key(BUILD), root._key(replace(BUILD, loaded="y")), root._key(BUILDS["onnx"])}
    monkeypatch.setattr(root, "PACKAGES", ("python3",))
    keys.add(root._key(BUILD))
    monkeypatch.setattr(root, "_system", lambda: "debian 13")
    assert len({*keys, root._key(BUILD)}) == 5


def test_a_library_and_how_it_is_compiled_give_a_root_another_name(tmp_path, monkeypatch):
    source = tmp_path / "x.cpp"
    monkeypatch.setattr(Library, "path", source)
    keys = set()
    for text, flags in (("int a;", ()), ("int b;", ()), ("int b;", ("-O0",))):
        source.write_text(text)
        keys.add(root._key(replace(BUILD, loaded=Library("x.cpp", flags))))
    monkeypatch.setattr(root, "COMPILER_FLAGS", ("-O3",))
    keys.add(root._key(replace(BUILD, loaded=Library("x.cpp", ("-O0",)))))
    assert len(keys) == 4


def test_a_root_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SHVIT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="--arm64 needs apt-get"):
        open_root("x", BUILD)
    assert [each for each in (tmp_path / "arm64").iterdir() if not each.name.endswith(".lock")] == []


def test_a_copy_is_a_root_of_its_own(cached, monkeypatch):
    """What a program removes or adds there is not in the cache."""
    monkeypatch.setattr(emulator, "find_qemu", lambda: Path(__file__))
    with open_root("x", BUILD).copied(DEFAULT_CPU) as copy:
        (copy / "lib/a.so").unlink()
        (copy / "work" / "new").touch()
    assert not copy.exists()
    open_root("x", BUILD)
