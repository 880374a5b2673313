"""What a detector's run writes into its folder, and what it leaves alone there."""

from pathlib import Path

import pytest
import torch
from mmdet.structures import DetDataSample

from shvit.cli import run
from shvit.detection.detector import create_detector, torch_detect
from shvit.detection.parsing.config import load_config
from shvit.detection.training import WRITTEN, plainly
from shvit.detection.training import write_config as write_run_config
from shvit.errors import InputError
from tests.detection.detection_data import write_coco, write_config

PREDICT = ["detect", "predict", "c.py", "--checkpoint", "x.pth"]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "c.py", "retinanet", write_coco(tmp_path / "coco", images=2))
    return load_config("c.py")


def test_a_runs_own_config_is_read_again(tmp_path, config):
    config.work_dir, config.resume, config.launcher = str(tmp_path), True, "pytorch"
    path = write_run_config(config, tmp_path / "runs (1)" / "x")
    assert path.name == "c.py"
    read = load_config(str(path))
    assert read.model == config.model
    assert "work_dir" not in read or not Path(read.work_dir).is_absolute()
    assert write_run_config(config, path.parent) == path  # as when a run goes on


def test_a_users_file_is_not_written_over(tmp_path, config):
    own = (tmp_path / "c.py").read_text()
    (tmp_path / "c_run.py").write_text("x = 1\n")
    path = write_run_config(config, tmp_path)
    assert (tmp_path / "c.py").read_text() == own
    assert (tmp_path / "c_run.py").read_text() == "x = 1\n"
    assert path.read_text().startswith(WRITTEN)
    (tmp_path / "epoch_1.pth").write_bytes(b"somebody's")
    with pytest.raises(InputError, match=r"holds epoch_1\.pth, and no run to resume"):
        run(["detect", "train", "c.py", "--output", "."])


def test_predictions_are_not_written_among_the_images(tmp_path, config):
    for output in ("coco/images", "coco/images/new"):
        with pytest.raises(InputError, match="among the images that are read"):
            run([*PREDICT, "--images", "coco/images", "--output", output])
    assert len(list((tmp_path / "coco" / "images").iterdir())) == 2


def test_sizes_are_bounded_before_memory_is_taken(config):
    config.model.neck.out_channels = 16384
    with pytest.raises(InputError, match="more than the 536,870,912 parameters allowed"):
        create_detector(config)


def test_what_fails_while_it_runs_is_one_line(config):
    """Parts of a config that do not fit together show when the first image passes."""
    config.model.bbox_head.in_channels = 8
    model = create_detector(config)
    sample = DetDataSample(metainfo={"img_shape": (64, 64), "ori_shape": (64, 64), "scale_factor": (1.0, 1.0)})
    image = {"inputs": torch.zeros(3, 64, 64, dtype=torch.uint8), "data_samples": sample}
    with pytest.raises(InputError, match="the detector cannot be run as the config says: Given groups"), plainly():
        torch_detect(model)(image)
