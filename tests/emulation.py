"""Tests of files on an emulated ARM64 processor: what they need, and a cache for its root."""

import os

import pytest

from shvit.errors import InputError
from shvit.export.arm64.emulator import check_emulator


def need_emulator() -> None:
    """Skip the test where programs for ARM64 cannot run; it fails where the environment says CI."""
    try:
        check_emulator()
    except InputError as missing:
        pytest.fail(str(missing)) if os.environ.get("CI") else pytest.skip(str(missing))
