"""Detectors' weights, and the images that they are given."""

import pytest
import torch

from shvit.cli import run
from shvit.create import create_model
from shvit.detection.detector import check_img_size, create_detector, load_detector_weights
from shvit.detection.parsing.config import load_config
from shvit.errors import InputError
from shvit.shvit import to_reference
from tests.conftest import images, randomize
from tests.detection.detection_data import write_coco, write_config


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"), images=3)


@pytest.mark.parametrize("sides", [(), (1, 2, 3), (100,), (64, 0), (8192,)])
def test_sizes_that_cannot_be_are_refused(sides):
    with pytest.raises(InputError, match="--img-size"):
        check_img_size(sides)


# --- weights ----------------------------------------------------------------------------------------------------------


class Harm:
    def __reduce__(self):
        import os

        return os.mkdir, ("harm",)


class Getattr:
    """What mmengine's own list of allowed names lets through."""

    def __reduce__(self):
        return getattr, (torch.Tensor, "add_")


@pytest.mark.parametrize("harm", [Harm(), Getattr()])
def test_pickled_code_in_a_checkpoint_is_not_run(coco, tmp_path, monkeypatch, harm):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "c.py", "retinanet", coco)
    torch.save({"state_dict": {}, "message_hub": harm}, tmp_path / "harm.pth")
    with pytest.raises(InputError, match=r"refused, because its pickle calls for|damaged|not a checkpoint of tensors"):
        run(["detect", "eval", str(config), "--checkpoint", "harm.pth"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last_checkpoint").write_text(str(tmp_path / "harm.pth"))
    with pytest.raises(InputError, match="nothing of it was run"):
        run(["detect", "train", str(config), "--output", "run"])
    assert not (tmp_path / "harm").exists()


def test_weights_of_another_detector_are_named(coco, tmp_path):
    retina = create_detector(load_config(str(write_config(tmp_path / "r.py", "retinanet", coco))))
    mask = create_detector(load_config(str(write_config(tmp_path / "m.py", "mask-rcnn", coco))))
    torch.save({"state_dict": mask.state_dict()}, tmp_path / "mask.pth")
    with pytest.raises(InputError, match=r"missing bbox_head\.cls_convs.*left over neck\.extra_trans_convs"):
        load_detector_weights(retina, tmp_path / "mask.pth")
    wide = create_detector(load_config(str(write_config(tmp_path / "w.py", "mask-rcnn", coco, dim=24))))
    with pytest.raises(InputError, match=r"neck\.\S+ is \(.*\) and should be \("):
        load_detector_weights(wide, tmp_path / "mask.pth")
    load_detector_weights(mask, tmp_path / "mask.pth")


def test_a_detector_of_the_reference_loads_whole(coco, tmp_path):
    """Under the reference's names of the backbone's parameters, as DistributedDataParallel saves them."""
    config = load_config(str(write_config(tmp_path / "m.py", "mask-rcnn", coco)))
    source = randomize(create_detector(config)).state_dict()
    backbone = {name.removeprefix("backbone."): v for name, v in source.items() if name.startswith("backbone.")}
    theirs = {f"backbone.{name}": value for name, value in to_reference(backbone).items()}
    theirs |= {name: value for name, value in source.items() if not name.startswith("backbone.")}
    torch.save({"state_dict": {f"module.{name}": value for name, value in theirs.items()}}, tmp_path / "theirs.pth")
    model = create_detector(config)
    load_detector_weights(model, tmp_path / "theirs.pth")
    assert any(name.startswith("backbone.blocks3.") for name in theirs)
    for name, value in model.state_dict().items():
        assert torch.equal(value, source[name]), name


def test_backbone_and_neck_are_a_model_with_feature_maps(coco, tmp_path):
    config = write_config(tmp_path / "m.py", "mask-rcnn", coco)
    model = create_model(f"detector:{config}")
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32, 64]
    assert [each.shape[1:] for each in model(images(1, 3, 64, 64))] == [
        (16, 64 // s, 64 // s) for s in (4, 8, 16, 32, 64)
    ]


# --- images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(tmp_path, workers):
    coco = write_coco(tmp_path / "coco", images=4)
    path = coco / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:700])
    config = write_config(tmp_path / "c.py", "retinanet", coco)
    options = [f"train_dataloader.num_workers={workers}"]
    with pytest.raises(InputError, match=r"2\.png: not a readable image") as caught:
        run(["detect", "train", str(config), "--output", str(tmp_path / "run"), "--options", *options])
    assert "\n" not in str(caught.value)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"file not readable: 1 image .*image 2 \(2\.png\) is not an image"):
        run(["detect", "train", str(config), "--output", str(tmp_path / "run"), "--options", *options])
