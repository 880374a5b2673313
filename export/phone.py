"""`shvit bench phone`: this machine's processor first, then whatever browser opens the page, in one report."""

import asyncio
import io
import logging
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shvit.errors import InputError
from shvit.files import sha256, write_whole

from .bench import Progress, pinned, run_rounds, summarize
from .cases import Settings, case_of_file, choose_cores
from .phone_record import PhoneRecord, add_record, runtime_of
from .records import Check, Measurements
from .roofline import measure_machine
from .server import LOGGER, Address, serve
from .tls import lan_address, self_signed
from .trial import Content, Tried, policy

LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"
Say = Callable[[str], None]


def measure_here(tried: Sequence[Tried], threads: Sequence[int], rounds: int, progress: Progress) -> Measurements:
    """The files in ONNX Runtime on this machine, batch 1, with each number of threads."""
    results, machine = [], None
    for count in dict.fromkeys(threads):
        cores = choose_cores(count)
        with pinned(cores, count):
            if machine is None:
                progress("measuring the machine")
                machine = measure_machine()
            cases = [
                replace(
                    case_of_file(each.path, 1, Settings(count), cores, tuned=True),
                    model=each.model,
                    macs=None if each.gmacs is None else round(1e9 * each.gmacs),
                )
                for each in tried
            ]
            if count > 1:
                cases = [replace(case, runtime=f"{case.runtime}-{count}-threads") for case in cases]
            results += summarize(run_rounds(cases, rounds, progress), machine)
    return Measurements(machine, tuple(results))


@dataclass(frozen=True)
class Door:
    """Where phones come in."""

    lan: bool
    """Reachable from the network; from this machine alone otherwise."""
    tls: bool
    port: int
    time_limit_s: float


class Visits:
    """The measurements, growing by each record that arrives."""

    def __init__(self, measured: Measurements, tried: Sequence[Tried], wanted: int, save: "Save"):
        self.measured, self.wanted, self.save = measured, wanted, save
        self.known = {(each.model, each.spec.precision, sha256(each.path)) for each in tried}
        self.count = 0

    def receive(self, record: PhoneRecord) -> bool:
        """Takes a record in; True where no more are awaited.

        Raises:
            InputError: it is of other files than were served.
        """
        for case in record.cases:
            if (case.model, case.precision, case.sha256) not in self.known:
                raise InputError("a record of files that were not served here")
        self.measured = add_record(self.measured, record)
        self.count += 1
        self.save(self.count, record, self.measured)
        return self.count >= self.wanted


Save = Callable[[int, PhoneRecord, Measurements], None]


def save_record(record: PhoneRecord, path: Path) -> None:
    """Writes it as the page would save it."""
    with write_whole(path) as partial:
        partial.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")


def receive_phones(served: Mapping[str, Content], visits: Visits, door: Door, hosted: bool, say: Say) -> None:
    """Serves the page until the awaited records are there, the time is over or the user interrupts."""
    shown = lan_address() if door.lan else LOOPBACK
    signed = self_signed([shown, LOOPBACK, "localhost"]) if door.tls else None
    address = Address(
        EVERYWHERE if door.lan else LOOPBACK, door.port, secrets.token_urlsafe(16), signed.context if signed else None
    )

    def ready(port: int) -> None:
        url = f"{'https' if signed else 'http'}://{shown}:{port}/{address.token}/"
        if "utf" in (sys.stdout.encoding or "").lower():
            say(qr_code(url))
        say(f"open {url}")
        if signed:
            say(f"the browser will warn, as nobody vouches for this certificate; its SHA-256 is {signed.fingerprint}")
        elif door.lan:
            say("without --tls a phone's browser has no threads, no WebGPU and no camera here: the page says so")
        else:
            say("this machine alone can open it; add --lan for phones, best with --tls")
        say(f"stops after {visits.wanted} record(s), after {door.time_limit_s / 60:g} minutes, or at Ctrl-C")

    handler = logging.StreamHandler(_Lines(say))
    handler.setLevel(logging.INFO)
    loggers = (LOGGER, logging.getLogger("tornado.general"))
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        asyncio.run(serve(served, policy(hosted), address, visits.receive, ready, door.time_limit_s))
    except KeyboardInterrupt:
        say("interrupted; what arrived is kept")
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _Lines(io.TextIOBase):
    """A stream of log lines, whose strangers' words cannot move a terminal's cursor."""

    def __init__(self, say: Say):
        self.say = say

    def write(self, text: str) -> int:
        if line := "".join(each if each.isprintable() else "�" for each in text.rstrip("\n")):
            self.say(line[:500])
        return len(text)


def qr_code(text: str) -> str:
    """A QR code of half-block characters, for a terminal."""
    import segno

    drawn = io.StringIO()
    segno.make(text, error="l", micro=False).terminal(drawn, compact=True)
    return drawn.getvalue()


def failed_checks(measured: Measurements) -> list[Check]:
    """Those of files whose answers were wrong or that did not run."""
    return [check for check in measured.checks if check.error]


def describe_record(record: PhoneRecord) -> str:
    """One line for the terminal."""
    timed = [case for case in record.cases if case.rounds]
    runtimes = ", ".join(dict.fromkeys(map(runtime_of, timed)))
    missing = "; ".join(f"no {name}: {why}" for name, why in record.device.missing.items())
    return f"{record.device.name}: {len(timed)} of {len(record.cases)} cases timed in {runtimes or 'nothing'}" + (
        f" ({missing})" if missing else ""
    )
