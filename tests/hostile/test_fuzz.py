"""The fuzz command: what it takes for a finding, and a moment of it on every surface."""

import os
import time
import tracemalloc

import pytest

from shvit.errors import InputError
from shvit.files import read_bytes
from tests.hostile import fuzz
from tests.hostile.mutators import mutate_bytes, mutate_json, mutate_text
from tests.hostile.surfaces import SURFACES, Surface


def planted(fault):
    """A surface that refuses everything, but files that begin otherwise than with an A do what `fault` does."""

    def attack(data: bytes) -> None:
        if not data.startswith(b"A"):
            fault()
        raise InputError("not a file")

    return Surface(lambda: [b"A" * 64], attack, [mutate_bytes])


def sleep():
    time.sleep(60)


def spin():
    while True:
        pass


def take_memory():
    bytearray(3 << 30)


def say_much():
    raise InputError("one line\nand another")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda: {}["x"], "KeyError in test_fuzz.py:<lambda> < test_fuzz.py:attack"),
        (lambda: os._exit(3), "the process ended with 3"),
        (os.abort, "the process ended with -6"),
        (sleep, "no end within 0.6 s"),
        (spin, "no end within 0.1 s of processor time"),
        (take_memory, "MemoryError in test_fuzz.py:take_memory"),
        (say_much, "a refusal of several lines"),
    ],
    ids=["KeyError", "exit", "abort", "sleep", "spin", "memory", "lines"],
)
def test_a_planted_fault_is_found_and_its_file_kept(fault, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "TIMEOUT_S", 0.1)
    surface = planted(fault)
    counts = fuzz.fuzz("planted", 60, 0, tmp_path, surface, runs=12)
    assert counts["findings"] == 1
    assert counts["refused"] > 0
    found = list(tmp_path.glob("planted-0-*.bin"))
    assert len(found) == 1
    assert not found[0].read_bytes().startswith(b"A")
    assert capsys.readouterr().out.startswith(f"{found[0]}: {said}")


@pytest.mark.parametrize("name", SURFACES)
def test_valid_files_are_taken_and_a_moment_of_mutated_ones_ends(name, tmp_path):
    seeds = SURFACES[name].seeds()
    for seed in seeds:
        SURFACES[name].attack(seed)
    counts = fuzz.fuzz(name, 60, 0, tmp_path, runs=len(seeds) + 40)
    assert counts["runs"] == len(seeds) + 40
    assert counts["accepted"] >= len(seeds)
    assert counts["findings"] == 0, [path.name for path in tmp_path.iterdir()]


@pytest.mark.parametrize("mutate", [mutate_bytes, mutate_text, mutate_json])
def test_a_seed_makes_the_same_files(mutate):
    surface = Surface(lambda: [b'{"a": [1, 2, {"b": "c"}]}'], lambda data: None, [mutate])

    def first_files(seed: int) -> list[bytes]:
        files = fuzz.cases(surface, surface.seeds(), "x", seed)
        return [next(files) for _ in range(50)]

    assert first_files(1) == first_files(1)
    assert first_files(1) != first_files(2)
    assert len(set(first_files(1))) > 20


def test_a_damaged_name_in_a_checkpoints_archive_is_one_line(tmp_path):
    data = SURFACES["safetensors"].seeds()[1]
    at = data.rindex(b"PK\x01\x02")  # the last entry of the archive's directory: its flags, and its name
    damaged = data[: at + 8] + b"\x00\x08" + data[at + 10 : at + 46] + b"\xff" + data[at + 47 :]
    with pytest.raises(InputError):
        SURFACES["safetensors"].attack(damaged)


def test_a_large_limit_takes_no_memory_of_its_own(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    tracemalloc.start()
    try:
        assert read_bytes(tmp_path / "x", 1 << 40) == b"abc"
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
