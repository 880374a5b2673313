"""Records that browsers send: validated as strictly as any third-party file, then made into results."""

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
from shvit.img_size import ImgSize
from shvit.weights.manifest import published_top1

from ..bench.measure import percentiles, ratio_interval
from ..bench.records import BenchResult, Check, Device, Measurements, Sustained

MAX_BYTES = 16 << 20  # a record of 60 cases with as many rounds and calls as are allowed is half of that
MAX_ROUNDS = 50
MAX_CALLS = 300  # reported of a round
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


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class DeviceRecord(_Strict):
    """The device, as its browser describes it."""

    name: Name
    browser: Text
    cores: Count
    memory_gb: Annotated[float, Field(ge=0, le=1e5, allow_inf_nan=False)] | None
    gpu: Text
    missing: Annotated[dict[Name, Text], Field(max_length=8)]


class CheckRecord(_Strict):
    """The comparison of outputs with the expected ones; see `Certificate` for the figures."""

    images: Count
    max_rel_error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    snr_db: Finite
    top1_agreement: Annotated[float, Field(ge=0, le=100)]
    passed: bool


class CaseRecord(_Strict):
    """A file in a backend."""

    model: Name
    precision: Precision
    sha256: Sha256
    img_size: ImgSize
    gmacs: Annotated[float, Field(gt=0, le=1e6)] | None
    backend: Backend
    threads: Annotated[int, Field(ge=1, le=64)]
    cpu_fallback: bool
    """True if some operators ran on the CPU, in a backend of another device."""
    check: CheckRecord | None
    error: Text
    load_ms: Ms | None
    """Milliseconds of the first opening."""
    first_ms: Ms | None
    rounds: Annotated[list[Calls], Field(max_length=MAX_ROUNDS)]
    """Milliseconds of each call, in each round."""


class SustainedRecord(_Strict):
    """One case run without a pause."""

    case: Annotated[int, Field(ge=0, le=511)]
    """Index of the case in the record."""
    seconds: Annotated[list[Ms], Field(min_length=2, max_length=MAX_SECONDS)]
    """The median of each second, in milliseconds."""


class PhoneRecord(_Strict):
    """Everything that one browser measured."""

    format: Annotated[str, Field(pattern="^shvit-phone-1$")]
    device: DeviceRecord
    runtime: Text
    """onnxruntime-web and its version."""
    cases: Annotated[list[CaseRecord], Field(min_length=1, max_length=512)]
    sustained: Annotated[list[SustainedRecord], Field(max_length=64)]


def read_record(content: bytes) -> PhoneRecord:
    """Return a record from its JSON.

    Raises:
        InputError: it is too large, not JSON, or not a record as our page makes it.
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
        raise InputError("not a record of `shvit bench phone` (sustained: its case is not in the record)")
    return record


def read_record_file(path: Path) -> PhoneRecord:
    """Return a record that the page saved.

    Raises:
        InputError: as `read_record`, or the file cannot be read.
    """
    content = read_bytes(path, MAX_BYTES)
    try:
        return read_record(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def require_served(record: PhoneRecord, files: Collection[tuple[str, str, str]]) -> None:
    """Raise InputError for a record of other files than these: name, precision and SHA-256 of each."""
    if any((case.model, case.precision, case.sha256) not in files for case in record.cases):
        raise InputError("a record of files that were not served here")


def runtime_of(case: CaseRecord) -> str:
    """Return the name of a case's runtime, as in tables."""
    threaded = f"-{case.threads}-threads" if case.backend == "wasm" and case.threads > 1 else ""
    return f"{case.backend}{threaded}{'+cpu' if case.cpu_fallback else ''}"


def add_record(measured: Measurements, record: PhoneRecord) -> Measurements:
    """Return the measurements with one more device; if its name is taken, it gets a number."""
    names = {device.name for device in measured.devices}
    name, number = record.device.name, 1
    while name in names:
        number += 1
        name = f"{record.device.name} ({number})"
    device = Device(**{**record.device.model_dump(), "name": name}, runtime=record.runtime)
    return replace(
        measured,
        results=(*measured.results, *_results(name, record.cases)),
        devices=(*measured.devices, device),
        checks=(*measured.checks, *(_check(name, case) for case in record.cases)),
        sustained=(*measured.sustained, *(_sustained(name, record.cases[s.case], s.seconds) for s in record.sustained)),
    )


def is_timed(case: CaseRecord) -> bool:
    """Return whether a case's times count: only those with matching outputs do."""
    return bool(case.rounds and case.check and case.check.passed)


def _results(device: str, cases: Sequence[CaseRecord]) -> list[BenchResult]:
    """Return results of the timed cases; the first that ran in every round comes first, as all ratios are to it."""
    counted = list(filter(is_timed, cases))
    if not counted:
        return []
    first = max(counted, key=lambda case: len(case.rounds))
    return [_result(device, case, first) for case in (first, *(case for case in counted if case is not first))]


def _result(device: str, case: CaseRecord, first: CaseRecord) -> BenchResult:
    p50, p90, p99 = percentiles([ms for calls in case.rounds for ms in calls])
    ratio, low, high = ratio_interval([median(mine) / max(median(other), 1e-3)
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


def _check(device: str, case: CaseRecord) -> Check:
    check = case.check
    return Check(
        device=device,
        model=case.model,
        runtime=runtime_of(case),
        precision=case.precision,
        images=check.images if check else 0,
        max_rel_error=check.max_rel_error if check else None,
        snr_db=check.snr_db if check else None,
        top1_agreement=check.top1_agreement if check else None,
        error="" if is_timed(case) else case.error or "it was not run",
        incomplete=case.error if is_timed(case) else "",
    )


def _sustained(device: str, case: CaseRecord, seconds: Sequence[float]) -> Sustained:
    end = max(1, len(seconds) // 5)
    slowdown = median(seconds[-end:]) / max(median(seconds[:end]), 1e-3)
    return Sustained(device, case.model, runtime_of(case), case.precision, tuple(seconds), slowdown)


def describe_record(record: PhoneRecord) -> str:
    """Return a record in one line, for the terminal."""
    counted = list(filter(is_timed, record.cases))
    runtimes = ", ".join(dict.fromkeys(map(runtime_of, counted)))
    missing = "; ".join(f"no {name}: {why}" for name, why in record.device.missing.items())
    line = f"{record.device.name}: {len(counted)} of {len(record.cases)} cases timed"
    return line + (f" in {runtimes}" if runtimes else "") + (f" ({missing})" if missing else "")


def save_record(record: PhoneRecord, folder: Path) -> Path:
    """Write a record as the page would save it, beside those of earlier runs, and return its path."""
    number = 1
    while is_there(path := folder / f"record-{number}.json"):
        number += 1
    with atomic_write(path) as partial:
        partial.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return path
