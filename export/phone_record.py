"""What a browser says that it measured: checked as strictly as any stranger's file, then made into results."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shvit.errors import InputError

from .bench import percentiles, ratio_of
from .published import published_top1
from .records import BenchResult, Check, Device, Measurements, Sustained

MAX_BYTES = 8 << 20  # a record of 40 cases, 10 rounds of 500 calls each, is a quarter of that
MAX_MS = 1e7

CONTROL = r"\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069"  # would write elsewhere on a terminal
Text = Annotated[str, Field(max_length=300, pattern=f"^[^{CONTROL}]*$")]
Name = Annotated[str, Field(min_length=1, max_length=80, pattern=f"^[^{CONTROL}]+$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Backend = Annotated[str, Field(pattern="^(wasm|webgpu|webnn)$")]
Precision = Annotated[str, Field(pattern="^(fp32|fp16|int8)$")]
Ms = Annotated[float, Field(ge=0, le=MAX_MS, allow_inf_nan=False)]
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
    threads: Annotated[int, Field(ge=1, le=256)]
    check: SaidCheck | None
    error: Text
    load_ms: Ms | None
    """Of the first opening."""
    first_ms: Ms | None
    rounds: Annotated[list[Annotated[list[Ms], Field(min_length=1, max_length=20_000)]], Field(max_length=100)]
    """Milliseconds of each call, in each round."""


class SaidSustained(_Said):
    """One case run without a pause."""

    case: Annotated[int, Field(ge=0, le=511)]
    """Its index among the cases."""
    seconds: Annotated[list[Ms], Field(min_length=2, max_length=3600)]
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
    try:
        record = PhoneRecord.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:100]
        raise InputError(f"not a record of `shvit bench phone` ({place or 'whole'}: {first['msg'][:120]})") from error
    if any(each.case >= len(record.cases) for each in record.sustained):
        raise InputError("not a record of `shvit bench phone` (sustained: of a case that is not there)")
    return record


def read_record_file(path: Path) -> PhoneRecord:
    """A record that the page saved.

    Raises:
        InputError: as `read_record`, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return read_record(file.read(MAX_BYTES + 1))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def runtime_of(case: SaidCase) -> str:
    """What a case ran in, as tables call it."""
    threaded = case.backend == "wasm" and case.threads > 1
    return f"{case.backend}-{case.threads}-threads" if threaded else case.backend


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


def _results(device: str, cases: Sequence[SaidCase]) -> list[BenchResult]:
    """Of the cases that were timed; ratios are to the first of them that ran in every round."""
    timed = [case for case in cases if case.rounds]
    most = max((len(case.rounds) for case in timed), default=0)
    first = next((case for case in timed if len(case.rounds) == most), None)
    return [_result(device, case, first) for case in timed] if first else []


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
        error=case.error or ("" if said and said.passed else "its answers were not checked"),
    )


def _sustained(device: str, case: SaidCase, seconds: Sequence[float]) -> Sustained:
    end = max(1, len(seconds) // 5)
    slowdown = median(seconds[-end:]) / max(median(seconds[:end]), 1e-3)
    return Sustained(device, case.model, runtime_of(case), case.precision, tuple(seconds), slowdown)
