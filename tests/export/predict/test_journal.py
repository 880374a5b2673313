"""A job that is killed, at any moment, and started again writes what one that was not killed does."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from shvit.cli import run
from shvit.errors import InputError
from shvit.export.predict import journal
from tests.train.forked import start

from .conftest import draw

OPTIONS = ("--batch-size", "2", "--workers", "0")


def predict(words: list[str]) -> dict:
    return run(["predict", *words])


def die(words: list[str], fsyncs: int) -> None:
    """Predict in this process, and be killed when the disk has been waited for so often."""
    import tests.conftest  # noqa: F401  (registers the model)

    left, fsync = fsyncs, os.fsync

    def count(number: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(number)

    os.fsync, journal.COMMIT_S = count, 0.0
    predict(words)


def killed(words: list[str], fsyncs: int) -> None:
    process = start(die, words, fsyncs)
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture
def words(photos, weights, tmp_path) -> list[str]:
    return [str(photos), "--checkpoint", str(weights), "--output", str(tmp_path / "p.jsonl"), *OPTIONS]


@pytest.fixture
def partial(tmp_path) -> Path:
    return tmp_path / "p.jsonl.partial"


def test_killed_five_times_it_writes_the_same_bytes(words, partial, tmp_path, capsys):
    """Lines are written once for each batch, here six."""
    output = tmp_path / "p.jsonl"
    predict(words)
    expected = output.read_bytes()
    output.unlink()
    seen = []
    left_over = (b"", b'0 6 {"path"', b"\0" * 50, b'0 5 {"path": "x"}\n', b"0 9")
    for fsyncs, more in zip((0, 1, 0, 0, 0), left_over, strict=True):
        killed(words, fsyncs)
        assert not output.exists()
        seen.append((partial / "lines").read_bytes().count(b"\n"))
        with (partial / "lines").open("ab") as file:
            file.write(more)  # what a kill in the middle of a write leaves, or a disk that lost its power
    assert seen == [2, 6, 8, 10, 11]
    capsys.readouterr()
    result = predict(words)
    assert "resuming after" in capsys.readouterr().out
    assert output.read_bytes() == expected
    assert result["images"] == 11
    assert not partial.exists()


def test_features_killed_between_their_two_files(photos, weights, tmp_path):
    words = [str(photos), "--checkpoint", str(weights), "--features", "pooled", "--output", str(tmp_path / "f.npy")]
    words += OPTIONS
    predict(words)
    expected, lines = (tmp_path / "f.npy").read_bytes(), (tmp_path / "f.jsonl").read_bytes()
    for name in ("f.npy", "f.jsonl"):
        (tmp_path / name).unlink()
    partial = tmp_path / "f.npy.partial"
    for fsyncs in (1, 2, 4):  # arrays and lines in turns; the last one is killed when arrays are written
        killed(words, fsyncs)
    features = np.lib.format.open_memmap(expected_file(tmp_path, expected), "r")
    rows = (partial / "arrays").stat().st_size // features[0].nbytes
    assert (rows, (partial / "lines").read_bytes().count(b"\n")) == (10, 8)
    predict(words)
    assert (tmp_path / "f.npy").read_bytes() == expected
    assert (tmp_path / "f.jsonl").read_bytes() == lines


def expected_file(folder: Path, content: bytes) -> Path:
    path = folder / "expected.npy"
    path.write_bytes(content)
    return path


def test_what_is_done_is_not_done_again(weights, tmp_path):
    folder = tmp_path / "images"
    for index in range(6):
        draw(folder / f"{index}.png", index)
    words = [str(folder), "--checkpoint", str(weights), "--output", str(tmp_path / "p.jsonl"), *OPTIONS]
    predict(words)
    expected = (tmp_path / "p.jsonl").read_text().splitlines()
    (tmp_path / "p.jsonl").unlink()
    killed(words, 1)
    for name in ("0.png", "5.png"):
        (folder / name).write_bytes(b"damaged since")
    predict(words)
    found = (tmp_path / "p.jsonl").read_text().splitlines()
    assert found[:5] == expected[:5]
    assert json.loads(found[5]).keys() == {"path", "error"}


@pytest.mark.parametrize(
    ("change", "message"),
    [(("--top", "1"), "begun with other top;"), (("--img-size", "48"), "begun with other preprocessing;")],
)
def test_another_jobs_journal_is_refused(words, partial, change, message):
    killed(words, 2)
    before = {path: path.read_bytes() for path in partial.iterdir()}
    with pytest.raises(InputError, match=message) as failed:
        predict([*words, *change])
    assert "\n" not in str(failed.value)
    assert {path: path.read_bytes() for path in partial.iterdir()} == before


def test_a_journal_of_other_images_or_weights_is_refused(words, partial, photos, tmp_path, mine):
    killed(words, 2)
    with pytest.raises(InputError, match="begun with other images;"):
        predict([str(photos / "a"), *words[1:]])
    other = [str(mine.with_suffix(".safetensors")) if word.endswith("tiny.safetensors") else word for word in words]
    with pytest.raises(InputError, match="begun with other weights"):
        predict([*other, "--model", "tiny_vit"])


def hold(words: list[str], ready: str) -> None:
    """Stop before the second batch, for as long as the file is there."""
    import time

    import tests.conftest  # noqa: F401

    fsync = os.fsync

    def wait(number: int) -> None:
        fsync(number)
        Path(ready).touch()
        while Path(ready).exists():
            time.sleep(0.01)

    os.fsync, journal.COMMIT_S = wait, 0.0
    predict(words)


def test_two_processes_do_not_write_one_output(words, tmp_path):
    import time

    ready = tmp_path / "ready"
    process = start(hold, words, str(ready))
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(InputError, match="another process is writing it"):
        predict(words)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    ready.unlink()
    assert predict(words)["images"] == 11


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("mine"), "is in the way"),
        (lambda path: path.symlink_to(path.parent), "is in the way"),
        (lambda path: (path.mkdir(), (path / "thesis.txt").write_text("x")), "holds thesis.txt, which no job wrote"),
        (lambda path: (path.mkdir(), (path / "lines").write_text("x")), "has no job.json"),
        (lambda path: (path.mkdir(), (path / "job.json").write_text("[1]")), "begun with other options"),
        (lambda path: (path.mkdir(), (path / "job.json").write_text("{")), "not readable as JSON"),
    ],
)
def test_what_no_job_wrote_stays(words, partial, make, message):
    make(partial)
    with pytest.raises(InputError, match=message):
        predict(words)
    assert partial.exists()
