"""Tests of files on an emulated ARM64 processor: what they need, and a cache for its root."""

import os
from collections.abc import Callable

import pytest

from shvit.errors import InputError
from shvit.export.arm64.emulator import check_emulator
from shvit.export.arm64.packages import check_compiler


def need_emulator() -> None:
    """Skip the test where programs for ARM64 cannot run; it fails where the environment says CI."""
    _need(check_emulator)


def need_compiler() -> None:
    """Skip the test where nothing can be compiled for ARM64; it fails where the environment says CI."""
    _need(check_compiler)


def _need(check: Callable[[], None]) -> None:
    try:
        check()
    except InputError as missing:
        pytest.fail(str(missing)) if os.environ.get("CI") else pytest.skip(str(missing))
