"""The benchmark of a recipe reports what it says; the figures themselves are measured by hand."""

from dataclasses import replace

import pytest

from shvit.errors import InputError
from shvit.train.speed import benchmark
from tests.conftest import SMALL


def test_benchmark_measures_all_that_it_promises(small, capsys):
    recipe = replace(small, data=replace(small.data, workers=1))
    result = benchmark(recipe, 3)
    assert (result["model"], result["batch_size"], result["steps"], result["workers"]) == (SMALL, 8, 3, 1)
    speeds = {name: value for name, value in result.items() if name.endswith("_per_s")}
    assert len(speeds) == 5
    assert all(value > 0 for value in [*speeds.values(), result["speedup"], result["peak_memory_mb"]])
    assert result["loader_scaling"] == 1
    assert "loader alone, 1 worker" in capsys.readouterr().out


def test_no_steps_are_refused(small):
    with pytest.raises(InputError, match="--benchmark 0 must be 1 or more"):
        benchmark(small, 0)
