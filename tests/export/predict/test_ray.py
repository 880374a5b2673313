"""Predictions on Ray: a local cluster with several workers."""

import importlib.util
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import timm

from shvit.checkpoint import write_checkpoint
from shvit.export import Predictor
from shvit.weights.run_info import RunInfo
from tests.conftest import LABELS, ROOT, images, randomize, settle

from .conftest import PX, draw

ray = pytest.importorskip("ray")

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
