"""Published accuracies: ours and others', each at its own size."""

import pytest
import timm

from shvit.img_size import ImgSize
from shvit.weights.manifest import BASELINES, published_top1, read_manifest, tomllib

LISTED = tomllib.loads(BASELINES.read_text(encoding="utf-8"))


def test_ours_is_the_manifests_first_entry_at_that_size():
    for name in ("shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4"):
        entries = [entry for entry in read_manifest() if entry.model == name and entry.task == "classification"]
        assert published_top1(name, ImgSize(*entries[0].img_size)) == entries[0].accuracy["top1"]
        assert published_top1(entries[0].name, ImgSize(*entries[0].img_size)) == entries[0].accuracy["top1"]
    assert published_top1("shvit_s1", ImgSize(225, 225)) is None
    assert published_top1("shvit_s1", ImgSize(224, 225)) is None


@pytest.mark.parametrize(
    ("name", "size", "top1"),
    [
        ("efficientvit_m5", 224, 77.092),
        ("mobilenetv4_conv_small.e2400_r224_in1k", 256, 74.644),
        ("repvit_m1_1", 224, 80.826),
        ("repvit_m1_1", 225, None),
        ("repvit_m1_1", (224, 256), None),
        ("repvit_m1_1.dist_450e_in1k", 224, None),  # other weights than those listed
        ("no_such_model", 224, None),
        ("model.onnx", 224, None),
    ],
)
def test_baselines(name, size, top1):
    assert published_top1(name, ImgSize.of(size)) == top1


def test_baselines_are_the_weights_that_timm_loads_by_default():
    assert len(LISTED["top1"]) >= 40
    for name, sizes in LISTED["top1"].items():
        bare, _, tag = name.partition(".")
        cfg = timm.get_pretrained_cfg(bare)
        assert (cfg.tag, cfg.num_classes) == (tag, 1000), name
        assert str(cfg.input_size[-1]) in sizes, name
        assert all(60 < top1 < 90 for top1 in sizes.values()), name
