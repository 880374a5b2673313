"""What a browser says that it measured: checked as strictly as any stranger's file, then made into results."""

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shvit.documents import parse_json
from shvit.errors import InputError
from shvit.files import atomic_write, is_there, read_bytes
from shvit.weights.published import published_top1

from ..bench.measure import percentiles, ratio_of
from ..bench.records import BenchResult, Check, Device, Measurements, Sustained

MAX_BYTES = 16 << 20  # a record of 60 cases with as many rounds and calls as are allowed is half of that
MAX_ROUNDS = 50
MAX_CALLS = 300  # of a round that are told
MAX_SECONDS = 3600
MAX_MS = 1e7

CONTROL = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"  # would write elsewhere on a terminal
Text = Annotated[str, Field(max_length=300, pattern=f"^[^{CONTROL}]*$")]
NAME_CHARS = 80
Name = Annotated[str, Field(min_length=1, max_length=NAME_CHARS, pattern=f"^[^{CONTROL}]+$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Backend = Annotated[str, Field(pattern="^(wasm|webgpu|webnn)$")]
PRECISIONS = ("fp32", "fp16", "int8")
Precision = Annotated[str, Field(pattern=f"^({'|'.join(PRECISIONS)})$")]
Ms = Annotated[float, Field(ge=0, le=MAX_MS, allow_inf_nan=False)]
Calls = Annotated[list[Ms], Field(min_length=1, max_length=MAX_CALLS)]
Count = Annotated[int, Field(ge=0, le=1024)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Said(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class SaidDevice(_Said):
    """The browser's own words."""

    name: Name
    browser: Text
    cores: Count
    memory_gb: Annotated[float, Field(ge=0, le=1e5, allow_inf_nan=False)] | None
    gpu: Text
    missing: Annotated[dict[Name, Text], Field(max_length=8)]


class SaidCheck(_Said):
    """Answers against the expected ones; see `Certificate` for the figures."""

    images: Count
    max_rel_error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    snr_db: Finite
    top1_agreement: Annotated[float, Field(ge=0, le=100)]
    passed: bool


class SaidCase(_Said):
    """A file in a backend."""

    model: Name
    precision: Precision
    sha256: Sha256
    img_size: Annotated[int, Field(ge=1, le=4096)]
    gmacs: Annotated[float, Field(gt=0, le=1e6)] | None
    backend: Backend
    threads: Annotated[int, Field(ge=1, le=64)]
    shared: bool
    """Whether some of its operators ran on the CPU, in a backend that is not the CPU's."""
    check: SaidCheck | None
    error: Text
    load_ms: Ms | None
    """Of the first opening."""
    first_ms: Ms | None
    rounds: Annotated[
        list[Annotated[list[Ms], Field(min_length=1, max_length=MAX_CALLS)]], Field(max_length=MAX_ROUNDS)
    ]
    """Milliseconds of each call, in each round."""


class SaidSustained(_Said):
    """One case run without a pause."""

    case: Annotated[int, Field(ge=0, le=511)]
    """Its index among the cases."""
    seconds: Annotated[list[Ms], Field(min_length=2, max_length=MAX_SECONDS)]
    """The median of each second, in milliseconds."""


class PhoneRecord(_Said):
    """Everything that one browser measured."""

    format: Annotated[str, Field(pattern="^shvit-phone-1$")]
    device: SaidDevice
    runtime: Text
    """onnxruntime-web and its version."""
    cases: Annotated[list[SaidCase], Field(min_length=1, max_length=512)]
    sustained: Annotated[list[SaidSustained], Field(max_length=64)]


def read_record(content: bytes) -> PhoneRecord:
    """A record from its JSON.

    Raises:
        InputError: it is too large, no JSON, or says something that no page of ours would.
    """
    if len(content) > MAX_BYTES:
        raise InputError(f"a record of {len(content):,} bytes is larger than the {MAX_BYTES:,} allowed")
    parse_json(content, "not a record of `shvit bench phone`")  # stricter than pydantic: no key twice, short numbers
    try:
        record = PhoneRecord.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = re.sub(f"[{CONTROL}]", "�", ".".join(map(str, first["loc"]))[:100])
        raise InputError(f"not a record of `shvit bench phone` ({place or 'whole'}: {first['msg'][:120]})") from error
    if any(each.case >= len(record.cases) for each in record.sustained):
        raise InputError("not a record of `shvit bench phone` (sustained: of a case that is not there)")
    return record


def read_record_file(path: Path) -> PhoneRecord:
    """A record that the page saved.

    Raises:
        InputError: as `read_record`, or the file cannot be read.
    """
    content = read_bytes(path, MAX_BYTES)
    try:
        return read_record(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def require_served(record: PhoneRecord, files: Collection[tuple[str, str, str]]) -> None:
    """Raises InputError for a record of other files than these: name, precision and SHA-256 of each."""
    if any((case.model, case.precision, case.sha256) not in files for case in record.cases):
        raise InputError("a record of files that were not served here")


def runtime_of(case: SaidCase) -> str:
    """What a case ran in, as tables call it."""
    threaded = f"-{case.threads}-threads" if case.backend == "wasm" and case.threads > 1 else ""
    return f"{case.backend}{threaded}{'+cpu' if case.shared else ''}"


def add_record(measured: Measurements, record: PhoneRecord) -> Measurements:
    """The measurements with a device more; one whose name is taken gets a number."""
    names = {device.name for device in measured.devices}
    said, name, number = record.device, record.device.name, 1
    while name in names:
        number += 1
        name = f"{said.name} ({number})"
    device = Device(name, said.browser, said.cores, said.memory_gb, said.gpu, dict(said.missing), record.runtime)
    return replace(
        measured,
        results=(*measured.results, *_results(name, record.cases)),
        devices=(*measured.devices, device),
        checks=(*measured.checks, *(_check(name, case) for case in record.cases)),
        sustained=(*measured.sustained, *(_sustained(name, record.cases[s.case], s.seconds) for s in record.sustained)),
    )


def timed(case: SaidCase) -> bool:
    """Whether its times count: only those of right answers do."""
    return bool(case.rounds and case.check and case.check.passed)


def _results(device: str, cases: Sequence[SaidCase]) -> list[BenchResult]:
    """Of the cases that were timed; the first of them that ran in every round comes first, as all ratios are to it."""
    counted = list(filter(timed, cases))
    most = max((len(case.rounds) for case in counted), default=0)
    first = next((case for case in counted if len(case.rounds) == most), None)
    if first is None:
        return []
    return [_result(device, case, first) for case in (first, *(case for case in counted if case is not first))]


def _result(device: str, case: SaidCase, first: SaidCase) -> BenchResult:
    p50, p90, p99 = percentiles([ms for calls in case.rounds for ms in calls])
    ratio, low, high = ratio_of([median(mine) / max(median(other), 1e-3)
                                 for mine, other in zip(case.rounds, first.rounds, strict=False)])  # fmt: skip
    return BenchResult(
        model=case.model,
        runtime=runtime_of(case),
        precision=case.precision,
        img_size=case.img_size,
        batch_size=1,
        threads=case.threads,
        rounds=len(case.rounds),
        calls=sum(map(len, case.rounds)),
        latency_ms_p50=p50,
        latency_ms_p90=p90,
        latency_ms_p99=p99,
        cpu_ms=None,
        ratio_to_first=ratio,
        ratio_low=low,
        ratio_high=high,
        load_ms=case.load_ms or 0.0,
        first_ms=case.first_ms or 0.0,
        peak_memory_mb=None,
        gmacs=case.gmacs,
        percent_of_peak=None,
        top1=published_top1(case.model, case.img_size),
        device=device,
    )


def _check(device: str, case: SaidCase) -> Check:
    said = case.check
    return Check(
        device=device,
        model=case.model,
        runtime=runtime_of(case),
        precision=case.precision,
        images=said.images if said else 0,
        max_rel_error=said.max_rel_error if said else None,
        snr_db=said.snr_db if said else None,
        top1_agreement=said.top1_agreement if said else None,
        error="" if timed(case) else case.error or "it was not run",
        incomplete=case.error if timed(case) else "",
    )


def _sustained(device: str, case: SaidCase, seconds: Sequence[float]) -> Sustained:
    end = max(1, len(seconds) // 5)
    slowdown = median(seconds[-end:]) / max(median(seconds[:end]), 1e-3)
    return Sustained(device, case.model, runtime_of(case), case.precision, tuple(seconds), slowdown)


def describe_record(record: PhoneRecord) -> str:
    """One line for the terminal."""
    counted = list(filter(timed, record.cases))
    runtimes = ", ".join(dict.fromkeys(map(runtime_of, counted)))
    missing = "; ".join(f"no {name}: {why}" for name, why in record.device.missing.items())
    return (
        f"{record.device.name}: {len(counted)} of {len(record.cases)} cases timed"
        + (f" in {runtimes}" if runtimes else "")
        + (f" ({missing})" if missing else "")
    )


def save_record(record: PhoneRecord, folder: Path) -> Path:
    """Writes it as the page would save it, beside those of earlier runs."""
    number = 1
    while is_there(path := folder / f"record-{number}.json"):
        number += 1
    with atomic_write(path) as partial:
        partial.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return path
