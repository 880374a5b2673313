"""Programs for ARM64 Linux on this machine: QEMU's user emulation, in a root that is all that they see.

The root has no /proc and /sys of the machine's: the few files of these that runtimes choose their kernels by describe
the emulated processor. What this needs is QEMU, a static one, and either user namespaces or to be root.
"""

import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from shvit.errors import InputError

Cpu = Literal["cortex-a53", "cortex-a76", "max"]
QEMU = ("qemu-aarch64-static", "qemu-aarch64")
MAX_FILE_BYTES = 1 << 30  # that an emulated program may write; S4's feature maps of 64 images have 60 MB
NAMESPACES = ("unshare", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
"""What a program gets of its own: no network, no other process, and no more rights than the user's."""
AS_CHILD = ("sh", "-c", '"$@"; exit $?', "sh")  # the first process of a namespace cannot be ended by its own signals


@dataclass(frozen=True)
class Processor:
    """A processor that QEMU knows, as Linux describes it in /proc/cpuinfo."""

    help: str
    implementer: int
    part: int

    @property
    def midr(self) -> str:
        """What Linux shows of its identification register."""
        return f"0x{self.implementer << 24 | 0xF << 16 | self.part << 4:016x}\n"

    @property
    def cpuinfo(self) -> str:
        """What one core of it looks like in /proc/cpuinfo, from which runtimes learn the core's design."""
        rows = {"processor": "0", "CPU implementer": f"0x{self.implementer:02x}", "CPU architecture": "8",
                "CPU variant": "0x0", "CPU part": f"0x{self.part:03x}", "CPU revision": "0"}  # fmt: skip
        return "".join(f"{name}\t: {value}\n" for name, value in rows.items()) + "\n"


PROCESSORS: dict[Cpu, Processor] = {
    "cortex-a53": Processor("NEON alone, as in cheap phones to this day", 0x41, 0xD03),
    "cortex-a76": Processor("fp16 arithmetic and dot product, as most phones since 2019 have", 0x41, 0xD0B),
    "max": Processor("i8mm, bf16, SVE, and SME from QEMU 10 on, of which the newest phones have a part", 0x00, 0x051),
}
DEFAULT_CPU: Cpu = "cortex-a76"

FEATURES = {
    "asimd": (0, 1),
    "asimdhp": (0, 10),
    "asimddp": (0, 20),
    "sve": (0, 22),
    "asimdfhm": (0, 23),
    "sve2": (1, 1),
    "i8mm": (1, 13),
    "bf16": (1, 14),
    "sme": (1, 23),
}
"""Instruction sets that kernels are chosen by, by Linux's names: word and bit of AT_HWCAP (0) and AT_HWCAP2 (1).

asimd is NEON, asimdhp float16 arithmetic, asimddp the dot product of 8-bit numbers.
"""


def features(hwcap: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the instruction sets that a processor has, by its two words of Linux's."""
    return tuple(name for name, (word, bit) in FEATURES.items() if hwcap[word] >> bit & 1)


# --- what this machine has --------------------------------------------------------------------------------------------


def check_emulator() -> None:
    """Raise InputError, in a line that says what to install, where programs for ARM64 cannot run here."""
    if platform.system() != "Linux":
        raise InputError(f"--arm64 needs Linux, for QEMU's user emulation, and this is {platform.system()}; use a "
                         "container of Debian")  # fmt: skip
    find_qemu()
    confined()


def find_qemu() -> Path:
    """Return QEMU's program for ARM64; raise InputError where there is none."""
    found = next(filter(None, map(shutil.which, QEMU)), None)
    if found is None:
        raise InputError("--arm64 needs QEMU's user emulation; install it with: apt-get install qemu-user-static")
    return Path(found)


@cache
def qemu_version() -> str:
    """Return QEMU's version, such as 7.2.22."""
    done = subprocess.run([find_qemu(), "--version"], capture_output=True, text=True, timeout=60, check=False)
    match = re.search(r"version (\d+(\.\d+)+)", done.stdout)
    return match[1] if match else "unknown"


FIRST_SOUND_SME = 10  # major version of QEMU


def qemu_cpu(cpu: Cpu) -> str:
    """Return QEMU's own name for a processor, without the instructions that this QEMU computes wrongly.

    In 7.2 an int8 file of LiteRT, whose kernels use SME, has -1.5 dB on `max`; without SME, and in QEMU 10.0 with it,
    its outputs are those of x86. Versions between were not tried.
    """
    version = qemu_version().partition(".")[0]
    sound = version.isdigit() and int(version) >= FIRST_SOUND_SME
    return "max,sme=off" if cpu == "max" and not sound else cpu


@cache
def confined() -> tuple[str, ...]:
    """Return the beginning of a command that runs with another root folder, in namespaces where they are allowed.

    Raise InputError where neither is: for one who is not root and may not make user namespaces.
    """
    if shutil.which("unshare") is None:
        raise InputError("--arm64 needs unshare; install it with: apt-get install util-linux")
    for command in ((*NAMESPACES, *AS_CHILD, "unshare"), ("unshare",)):
        done = subprocess.run([*command, "--root=/", "true"], capture_output=True, timeout=60, check=False)
        if done.returncode == 0:
            return command
    raise InputError("--arm64 needs user namespaces, or root, and has neither here; allow them with: sysctl "
                     "kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0")  # fmt: skip


# --- running ----------------------------------------------------------------------------------------------------------


def furnish(root: Path, cpu: Cpu) -> None:
    """Add to a root what a program on this processor needs besides its own files: QEMU, and descriptions of it."""
    cores = "sys/devices/system/cpu"
    content = {f"{cores}/{name}": "0\n" for name in ("possible", "present", "online")}
    content[f"{cores}/cpu0/regs/identification/midr_el1"] = PROCESSORS[cpu].midr
    content["proc/cpuinfo"] = PROCESSORS[cpu].cpuinfo
    for name, text in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("tmp", "work"):
        (root / name).mkdir()
    shutil.copy(find_qemu(), root / "qemu")


def strip(root: Path) -> None:
    """Remove from a root what `furnish` added."""
    for name in ("proc", "sys", "tmp", "work"):
        shutil.rmtree(root / name)
    (root / "qemu").unlink()


class Ended(NamedTuple):
    """How a program ended."""

    status: int  # 0 if all went well, negative for a signal
    printed: str
    last_words: str  # the last line of its standard error


def run(root: Path, cpu: Cpu, program: Sequence[str], given: str, seconds: float) -> Ended:
    """Run a program of a furnished root.

    Args:
        program: an ARM64 program by its path inside the root, and its arguments.
        given: its standard input.
        seconds: limit of its time.

    Raises:
        RuntimeError: it takes longer.
    """
    limits = ["prlimit", f"--fsize={MAX_FILE_BYTES}", "--core=0"]
    command = [*limits, *confined(), f"--root={root.resolve()}", "--wd=/work", "/qemu", "-cpu", qemu_cpu(cpu), *program]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, errors="replace", timeout=seconds, env=environment,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it does not end in {seconds:.0f} s") from None
    last = done.stderr.strip().splitlines()[-1:]
    return Ended(done.returncode, done.stdout, " ".join(last)[:300])
