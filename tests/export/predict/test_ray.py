"""Predictions on Ray, by a local cluster with several workers, against those of the plain command."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow.parquet
import pytest
import ray
import timm

from shvit.checkpoint import write_checkpoint
from shvit.cli import run
from shvit.errors import InputError
from shvit.export import Predictor
from shvit.export.predict.cluster import JobPart, predict_on_ray
from shvit.export.predict.inputs import find_inputs
from shvit.export.predict.loading import BEGINNING
from shvit.weights.run_info import RunInfo
from tests.conftest import LABELS, ROOT, images, randomize, settle
from tests.train.forked import start

from .conftest import PX, draw
from .test_inputs import frames, write_video

MODEL, WIDTH = "test_resnet", 96  # which timm has, so that workers know it too


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Path:
    """Weights that know their model."""
    path = tmp_path_factory.mktemp("known") / "known.safetensors"
    model = settle(randomize(timm.create_model(MODEL, num_classes=3)), images(64, 3, PX, PX))
    write_checkpoint(model.state_dict(), path, RunInfo(MODEL, LABELS, PX).metadata)
    return path


@pytest.fixture(scope="module")
def cluster():
    """A local cluster; what Ray Data reads with takes a core beside those of two actors."""
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture
def place(known, photos, tmp_path, monkeypatch) -> dict[str, list[str]]:
    """The classes of each image by its name, one of which is damaged, in a folder that has what the page names."""
    monkeypatch.chdir(tmp_path)
    for path in photos.rglob("*.png"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "photos")
    draw(tmp_path / "photos" / "bad.jpg", 0).write_bytes(b"no image")
    shutil.copy(known, "best.safetensors")
    listed = sorted(map(str, (tmp_path / "photos").iterdir()))
    return dict(zip(listed, Predictor(checkpoint=known, top=1)({"path": listed})["labels"], strict=True))


def test_ray_data_takes_it_as_a_function_and_as_a_class(cluster, place, known):
    assert len({str(labels) for labels in place.values()}) > 2
    dataset = ray.data.read_binary_files(sorted(place), include_paths=True, override_num_blocks=2)
    options = {"checkpoint": str(known), "top": 1}
    for mapped in (
        dataset.map_batches(Predictor(**options), batch_size=5),
        dataset.map_batches(Predictor, fn_constructor_kwargs=options, batch_size=5, concurrency=2),
    ):
        rows = mapped.take_all()
        assert {row["path"]: None if row["labels"] is None else [*row["labels"]] for row in rows} == place
        assert len(rows) == len(place)
        (error,) = (row["error"] for row in rows if row["error"] is not None)
        assert error.startswith("not a readable image")


def test_code_of_the_page_runs(cluster, place, tmp_path):
    """That for Spark too, where it is installed."""
    page = (ROOT / "docs" / "how-to" / "predict.md").read_text().replace("/data/", f"{tmp_path}/")
    _, on_ray, in_datasets, on_spark = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(on_ray)
    assert written("on_ray") == place
    assert np.stack(pandas.read_parquet("embeddings")["embedding"].dropna()).shape == (11, WIDTH)
    if importlib.util.find_spec("pyspark"):
        values: dict = {}
        exec(on_spark, values)
        values["spark"].stop()
        assert written("on_spark") == place
    Path("photos/bad.jpg").unlink()
    values = {}
    exec(in_datasets, values)
    rows = values["predicted"].cast_column("image", datasets.Image(decode=False))
    assert {row["image"]["path"]: row["labels"] for row in rows} == {
        name: found for name, found in place.items() if found
    }


def written(folder: str) -> dict[str, list[str] | None]:
    """The classes of each image by its name, in a folder of Parquet files."""
    table = pandas.read_parquet(folder)
    names = [name.removeprefix("file:") for name in table["path"]]
    return {name: found if found is None else [*found] for name, found in zip(names, table["labels"], strict=True)}


# --- the command ------------------------------------------------------------------------------------------------------


def predict(*words: object) -> dict:
    return run(["predict", *map(str, words)])


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def table_of(folder: Path) -> list[dict]:
    return [row for path in parts_of(folder) for row in pyarrow.parquet.read_table(path).to_pylist()]


@pytest.fixture
def words(place, known, tmp_path) -> list[object]:
    """Of a folder, a tar and a video, in that order."""
    with tarfile.open("more.tar", "w") as archive:
        archive.add("photos/00.png", "z.png")
        archive.add("photos/01.png", "y.png")
    write_video(Path("clip.mkv"), frames(5))
    return ["photos", "more.tar", "clip.mkv", "--checkpoint", known, "--batch-size", 2]


def test_files_have_the_same_bytes(cluster, words):
    """With relative paths, which are those of this process."""
    for options, names in ((("--top", 2), ("p.jsonl", "p.csv", "p.parquet")),
                           (("--features", "maps"), ("f.npy",))):  # fmt: skip
        for name in names:
            expected = predict(*words, *options, "--output", f"plain_{name}")
            result = predict(*words, *options, "--output", name, "--ray", "auto", "--part-size", 3)
            assert Path(name).read_bytes() == Path(f"plain_{name}").read_bytes()
            assert (result["images"], result["damaged"]) == (19, 1) == (expected["images"], expected["damaged"])


def test_parts_that_are_there_are_not_predicted_again(cluster, words, capsys):
    predict(*words, "--output", "plain.parquet")
    options = ("--output", "parts", "--ray", "auto", "--part-size", 4)
    predict(*words, *options)
    names = [path.name for path in parts_of(Path("parts"))]
    assert names == [f"part-{index:05}-of-00005.parquet" for index in range(5)]  # 4 + 4 + 4 images, a tar, a video
    expected = pyarrow.parquet.read_table("plain.parquet").to_pylist()
    assert table_of(Path("parts")) == expected
    assert len(pandas.read_parquet("parts")) == 19
    Path("parts", names[1]).unlink()
    Path("parts", names[4]).unlink()
    for name in ("photos/00.png", "photos/05.png"):  # of a part that is there, and of one that is not
        Path(name).write_bytes(b"damaged since")
    capsys.readouterr()
    assert predict(*words, *options)["damaged"] == 2
    assert "resuming: 3 of 5 parts are there" in capsys.readouterr().out
    changed = [index for index, row in enumerate(table_of(Path("parts"))) if row != expected[index]]
    assert [expected[index]["path"] for index in changed] == ["photos/05.png"]
    with pytest.raises(InputError, match="begun with other part size;"):
        predict(*words, *options[:-1], 6)
    with pytest.raises(InputError, match="begun with other images;"):
        predict("photos", *words[3:], *options)
    path = Path("parts", names[0])
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(1), path)
    with pytest.raises(InputError, match=r"of-00005\.parquet: has 3 rows for 4 images"):
        predict(*words, *options)
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"of-00005\.parquet: not a part that a job wrote; remove it"):
        predict(*words, *options)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:x"])
def test_a_cluster_that_is_not_there_is_one_line(cluster, words, address):
    with pytest.raises(InputError, match=f"--ray {address}: no Ray cluster there") as failed:
        predict(*words, "--output", "parts", "--ray", address)
    assert "\n" not in str(failed.value)
    assert not Path("parts").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--ray: give --output"),
        (("--output", "p.txt"), r"written as \.jsonl, \.csv, \.parquet"),
        (("--output", "parts", "--draw", "sheet.png"), "--draw does not apply: the output is a folder"),
        (("--output", "parts", "--part-size", 0), "--part-size 0 is out of range"),
        (("--output", "parts", "--workers", 2), "--workers does not apply: the cluster's own cores"),
        (("--output", "parts", "--workers", 0), "--workers 0: Ray needs at least one core"),
        (("--output", "photos"), r"photos: holds 00\.png, .* which no job wrote"),
    ],
)
def test_unusable_options_are_one_line(cluster, words, options, message):
    with pytest.raises(InputError, match=message) as failed:
        predict(*words, "--ray", "auto", *options)
    assert "\n" not in str(failed.value)


def test_without_ray_there_are_no_parts(words):
    with pytest.raises(InputError, match="--part-size does not apply"):
        predict(*words, "--output", "p.csv", "--part-size", 3)


def test_nothing_is_left_where_no_image_can_be_read(cluster, known, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1\.jpg: not a readable image"):
        predict(tmp_path / "bad", "--checkpoint", known, "--output", tmp_path / "parts", "--ray", "auto")
    assert not (tmp_path / "parts").exists()


def test_what_a_task_raises_is_one_line(cluster, known, tmp_path, monkeypatch):
    copy = tmp_path / "known.safetensors"
    shutil.copy(known, copy)
    predictor = Predictor(checkpoint=copy)
    copy.write_bytes(b"another file")
    job_part = JobPart(BEGINNING, find_inputs([str(draw(tmp_path / "a.png", 0))], 1, print).parts[0], 0)
    with pytest.raises(InputError, match=r"known\.safetensors: is another file here") as failed:
        list(predict_on_ray(predictor, 1, 1, [job_part]))
    assert "\n" not in str(failed.value)

    class Ends:
        def open(self) -> None:
            os._exit(1)

    monkeypatch.setattr("shvit.export.predict.cluster.RETRIES", 0)
    with pytest.raises(InputError, match=r"a\.png: the worker that read it, .* ended 1 times") as failed:
        list(predict_on_ray(Ends(), 1, 1, [job_part]))
    assert "\n" not in str(failed.value)


def run_locally(words: list[str]) -> None:
    predict(*words)


def tasks_below(pid: int) -> list[int]:
    """The workers of a process that predict at this moment: they have the task as their name."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    family = {str(pid)}
    for _ in range(5):
        family |= {child for child, parent, _ in rows if parent in family}
    return [int(child) for child, _, name in rows if child in family and name.startswith("ray::predict_part")]


def test_a_worker_is_killed_and_each_image_has_its_row(known, tmp_path):
    """Of large images, so that it is killed while it predicts one of the later parts."""
    listed = [str(draw(tmp_path / f"{index}.png", index, (900, 900))) for index in range(5)] * 10
    options = ["--checkpoint", str(known), "--batch-size", "2"]
    predict(*listed, *options, "--output", tmp_path / "plain.parquet", "--workers", 0)
    parts = tmp_path / "parts"
    on_ray = ["--output", str(parts), "--ray", "local", "--workers", "2", "--part-size", "2"]
    process = start(run_locally, [*listed, *options, *on_ray])
    killed = None
    while killed is None and process.is_alive():
        if len(parts_of(parts)) >= 2 and (workers := tasks_below(process.pid)):
            killed = workers[0]
            os.kill(killed, signal.SIGKILL)
            assert len(parts_of(parts)) < 25
        time.sleep(0.01)
    process.join()
    assert killed is not None
    assert process.exitcode == 0
    assert table_of(parts) == pyarrow.parquet.read_table(tmp_path / "plain.parquet").to_pylist()
