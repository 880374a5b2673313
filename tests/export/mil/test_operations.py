"""The operations that are computed are those that packages hold."""

import json

import pytest

from shvit.export.mil.operations import OPERATIONS
from tests.export.mil.collect_operations import TABLE, own_packages


def test_operations_are_those_of_the_table():
    table = json.loads(TABLE.read_text())
    assert set(OPERATIONS) == set(table["operations"])
    assert len(table["timm"]) >= 25


@pytest.mark.slow
def test_our_packages_hold_no_other_operations():
    for name, operations in own_packages():
        assert operations <= set(OPERATIONS), name
