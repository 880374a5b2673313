"""A detector's whole way on a small dataset: train, go on, evaluate, export, compare, draw."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from shvit.cli import run
from shvit.detection.detector import create_detector, fixed_pipeline, preparation, torch_detect
from shvit.detection.main import check_backbone
from shvit.detection.onnx import OnnxDetector, load_onnx
from shvit.detection.parsing.config import load_config
from shvit.errors import CheckFailed, InputError
from shvit.weights.run_info import RunInfo
from tests import forks
from tests.conftest import ROOT, create_tiny
from tests.detection.detection_data import write_coco, write_config

KINDS = ("mask-rcnn", "retinanet")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Eight images of 96×128 pixels with red and blue rectangles, and their annotations."""
    return write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory):
    """(config, checkpoint) by kind: of 40 thousand parameters' SHViT, trained a little by the command."""
    folder = tmp_path_factory.mktemp("trained")
    found = {}
    for kind in KINDS:
        config = write_config(folder / f"{kind}.py", kind, coco)
        result = run(["detect", "train", str(config), "--output", str(folder / kind)])
        assert result["iterations"] == 4
        assert set(result["ap"]) >= {"bbox_mAP", "bbox_mAP_50"}
        found[kind] = config, folder / kind
    return found


def spread(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Heads whose scores are far apart: those of few iterations are so alike that rounding decides their order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith(("rpn_head", "roi_head", "bbox_head", "neck")):
                fan_in = parameter[0].numel() if "trans" not in name else parameter.shape[0]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (3 / fan_in) ** 0.5)
        if hasattr(model, "rpn_head"):
            model.roi_head.bbox_head.fc_cls.weight.mul_(3)
        else:
            model.bbox_head.retina_cls.bias.fill_(-2)
    return model


@pytest.fixture(scope="module")
def weights(trained, tmp_path_factory):
    """Checkpoints with such heads."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {}
    for kind, (config, _) in trained.items():
        torch.manual_seed(0)
        model = spread(create_detector(load_config(str(config))))
        paths[kind] = folder / f"{kind}.pth"
        torch.save({"meta": {}, "state_dict": model.state_dict()}, paths[kind])
    return paths


@pytest.fixture(scope="module")
def coco_images(coco):
    return coco / "images"


@pytest.fixture(scope="module")
def exported(trained, weights, coco_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    results = {}
    for kind, (config, _) in trained.items():
        path = folder / f"{kind}.onnx"
        given = ["--checkpoint", str(weights[kind]), "--images", str(coco_images), "--img-size", "96", "128"]
        results[kind] = path, run(["detect", "export", str(config), *given, "--output", str(path)])
    return results


def state_of(path: Path) -> dict[str, torch.Tensor]:
    """The parameters in a checkpoint of mmengine's, which a test here has just written."""
    return torch.load(path, weights_only=False)["state_dict"]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_run_folder_holds_what_was_trained(trained, kind):
    _, folder = trained[kind]
    assert (folder / "epoch_2.pth").is_file()
    assert (folder / "last_checkpoint").read_text().endswith("epoch_2.pth")
    assert list(folder.glob("*/vis_data/events.out.tfevents*"))


def test_run_goes_on_where_it_stopped(trained, tmp_path):
    config, folder = trained["retinanet"]
    (tmp_path / "run").mkdir()
    first = torch.load(folder / "epoch_1.pth", weights_only=False)  # ours, written a moment ago
    torch.save(first, tmp_path / "run" / "epoch_1.pth")
    (tmp_path / "run" / "last_checkpoint").write_text(str(tmp_path / "run" / "epoch_1.pth"))
    result = run(["detect", "train", str(config), "--output", str(tmp_path / "run")])
    assert result["resumed"]
    assert result["iterations"] == 4
    ended = state_of(tmp_path / "run" / "epoch_2.pth")
    assert ended.keys() == first["state_dict"].keys()
    name = "bbox_head.retina_cls.weight"
    assert not torch.equal(ended[name], first["state_dict"][name])


def test_backbone_norms_keep_their_statistics_and_all_parts_learn(trained):
    config, folder = trained["mask-rcnn"]
    first, last = (state_of(folder / f"epoch_{epoch}.pth") for epoch in (1, 2))
    fresh = create_detector(load_config(str(config))).state_dict()
    statistics = [name for name in last if name.startswith("backbone.") and "running_" in name]
    assert statistics
    assert all(torch.equal(last[name], fresh[name]) for name in statistics)
    for part in (
        "backbone.patch_embed",
        "backbone.stages.2",
        "neck.extra_trans_convs.1",
        "rpn_head",
        "roi_head.mask_head",
    ):
        names = [name for name in last if name.startswith(part) and name.endswith("weight")]
        assert any(not torch.equal(last[name], first[name]) for name in names), part


def test_pretrained_backbone_is_loaded_whole(trained, coco, tmp_path):
    torch.manual_seed(1)
    classifier = create_tiny()
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    config = write_config(tmp_path / "config.py", "retinanet", coco)
    options = ["train_cfg.max_epochs=1", "optim_wrapper.optimizer.lr=0.0", "optim_wrapper.optimizer.weight_decay=0.0"]
    given = ["--pretrained", str(tmp_path / "classifier.pth"), "--options", *options]
    run(["detect", "train", str(config), "--output", str(tmp_path / "run"), *given])
    trained_state = state_of(tmp_path / "run" / "epoch_1.pth")
    expected = {name: value for name, value in classifier.state_dict().items() if not name.startswith("head")}
    assert {name.removeprefix("backbone.") for name in trained_state if name.startswith("backbone.")} == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(trained_state[f"backbone.{name}"], tensor), name


def test_weights_of_another_model_or_normalization_are_noticed(coco, tmp_path, capsys):
    path = tmp_path / "classifier.safetensors"
    config = load_config(str(write_config(tmp_path / "config.py", "retinanet", coco)))
    save_file(create_tiny().state_dict(), path, RunInfo(model="shvit_s2", img_size=64, classes=()).metadata)
    config.model.backbone.model = "shvit_s1"
    with pytest.raises(InputError, match=r"was trained as shvit_s2, and the config's backbone is shvit_s1"):
        check_backbone(config, str(path))
    same = RunInfo(model="shvit_s1", img_size=64, classes=(), mean=(0.5, 0.5, 0.5), std=(0.229, 0.224, 0.225))
    save_file(create_tiny().state_dict(), path, same.metadata)
    check_backbone(config, str(path))
    said = " ".join(capsys.readouterr().out.split())
    assert "was trained with mean (0.5, 0.5, 0.5)" in said
    assert "std" not in said


def test_stock_tools_train_with_our_configs(trained, tmp_path):
    import mmdet

    config, _ = trained["retinanet"]
    tool = Path(mmdet.__file__).parent / ".mim" / "tools" / "train.py"
    options = ["--cfg-options", "train_cfg.max_epochs=1", "val_cfg=None", "val_dataloader=None", "val_evaluator=None"]
    unformatted = """
import runpy, sys
from yapf.yapflib import yapf_api
yapf_api.FormatCode = lambda text, **options: (text, True)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = forks.run(tool, config, "--work-dir", tmp_path, *options, code=unformatted, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "epoch_1.pth").is_file()


@pytest.mark.slow
def test_two_processes_train_one_model(trained, tmp_path):
    config, _ = trained["mask-rcnn"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611", "-m"]
    command += ["shvit.detection", "train", str(config), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["iterations"] == 2  # half as many, of twice the batch
    assert sum('"iterations"' in line for line in done.stdout.splitlines()) == 1


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_exported_detector_finds_what_its_model_finds(exported, kind):
    path, result = exported[kind]
    match = result["certificate"]["match"]
    assert match["images"] == 8
    assert match["detections"] >= 50
    assert match["matched_percent"] == 100
    assert match["box_iou_mean"] > 0.9999
    assert match["box_iou_lowest"] > 0.95  # of boxes a fraction of a pixel wide
    assert match["score_error"] < 1e-3
    assert (match["mask_iou_lowest"] is None) == (kind == "retinanet")
    certificate = json.loads(path.with_name(path.name + ".certificate.json").read_text())
    assert certificate == json.loads(json.dumps(result["certificate"]))


@pytest.mark.parametrize("kind", KINDS)
def test_precision_of_the_file_is_that_of_its_model(trained, weights, exported, kind):
    config, _ = trained[kind]
    given = ["--checkpoint", str(weights[kind]), "--artifact", str(exported[kind][0])]
    result = run(["detect", "eval", str(config), *given])
    assert result["n"] == 8
    torch_ap, onnx_ap = (result["results"][name]["ap"] for name in ("pytorch", "onnxruntime"))
    assert torch_ap.keys() == onnx_ap.keys()
    assert ("segm_mAP" in torch_ap) == (kind == "mask-rcnn")
    assert all(abs(torch_ap[name] - onnx_ap[name]) <= 0.2 for name in torch_ap)
    assert result["latency_ratio"] > 0


def test_precision_is_mmdetections_own(trained):
    """Of a checkpoint that is fed as its config says, against the Runner's own test."""
    config, folder = trained["retinanet"]
    result = run(["detect", "eval", str(config), "--checkpoint", str(folder / "epoch_2.pth")])
    again = run(["detect", "train", str(config), "--output", str(folder)])  # the run is at its end
    assert again["iterations"] == 4
    from mmengine.runner import Runner

    opened = load_config(str(config))
    opened.work_dir, opened.load_from = str(folder / "test"), str(folder / "epoch_2.pth")
    expected = Runner.from_cfg(opened).test()
    for name, value in result["results"]["pytorch"]["ap"].items():
        assert value == pytest.approx(100 * expected[f"coco/{name}"] if value >= 0 else value, abs=0.051), name


@pytest.mark.parametrize("kind", KINDS)
def test_file_takes_a_image_without_anything_on_it(exported, kind):
    detector = load_onnx(exported[kind][0])
    found = detector.run(np.full((1, 96, 128, 3), 128, np.uint8), np.array([96, 128]))
    numbers = {name: value.shape[0] for name, value in found.items()}
    assert len(set(numbers.values())) == 1
    assert found["boxes"].shape[1:] == (4,)


def test_a_detector_of_nothing_gives_empty_outputs(exported, tmp_path):
    """No score is above the threshold: not one box, in no operator."""
    proto = onnx.load(str(exported["mask-rcnn"][0]))
    (bias,) = (tensor for tensor in proto.graph.initializer if tensor.name.endswith("fc_cls.bias"))
    values = onnx.numpy_helper.to_array(bias).copy()
    values[-1] = 1e4  # background alone
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(proto, str(tmp_path / "none.onnx"))
    found = load_onnx(tmp_path / "none.onnx").run(np.zeros((1, 96, 128, 3), np.uint8), np.array([96, 128]))
    assert [value.shape for value in found.values()] == [(0, 4), (0,), (0,), (0, 28, 28)]


def test_drift_is_refused_and_leaves_nothing(trained, weights, coco_images, tmp_path, monkeypatch):
    """A file that takes blue for red."""
    run_file = OnnxDetector.detect

    def swapped(self, image):
        return run_file(self, {**image, "inputs": image["inputs"].flip(0)})

    monkeypatch.setattr(OnnxDetector, "detect", swapped)
    config, _ = trained["retinanet"]
    given = ["--checkpoint", str(weights["retinanet"]), "--images", str(coco_images), "--img-size", "96"]
    with pytest.raises(CheckFailed, match="exceeds its tolerance"):
        run(["detect", "export", str(config), *given, "--output", str(tmp_path / "m.onnx")])
    assert list(tmp_path.iterdir()) == []


def test_backbone_and_neck_become_a_core_ml_package(trained, weights, coco_images, tmp_path):
    config, _ = trained["mask-rcnn"]
    output = tmp_path / "m.mlpackage"
    given = ["--checkpoint", str(weights["mask-rcnn"]), "--images", str(coco_images), "--img-size", "96", "128"]
    result = run(["detect", "export", str(config), *given, "--output", str(output)])
    certificate = result["certificate"]
    assert certificate["spec"]["img_size"] == (96, 128)
    assert certificate["passed"] is not False  # a few images leave it undecided
    assert certificate["runtime"] == "mil"
    assert certificate["spec"]["outputs"] == tuple(f"stride_{stride}" for stride in (4, 8, 16, 32, 64))
    assert output.is_dir()
    checked = ["--model", f"detector:{config}", "--checkpoint", str(weights["mask-rcnn"])]
    assert run(["verify", str(output), *checked, "--images", str(coco_images)])["passed"] is not False


def test_a_file_that_changed_after_it_was_certified_is_noticed(trained, exported, coco_images, tmp_path):
    config, _ = trained["mask-rcnn"]
    for suffix in ("", ".certificate.json"):
        name = exported["mask-rcnn"][0].name + suffix
        shutil.copy(exported["mask-rcnn"][0].with_name(name), tmp_path / name)
    changed = tmp_path / "mask-rcnn.onnx"
    changed.write_bytes(changed.read_bytes() + b"\x7a\x00")  # an empty field that a reader skips
    given = ["--artifact", str(changed), "--images", str(coco_images), "--output", str(tmp_path / "drawn")]
    with pytest.raises(CheckFailed, match="has changed since it was certified"):
        run(["detect", "predict", str(config), *given])
    assert not (tmp_path / "drawn").exists()


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_have_the_images_size_and_what_was_found(trained, exported, coco_images, tmp_path):
    config, _ = trained["mask-rcnn"]
    given = ["--artifact", str(exported["mask-rcnn"][0]), "--images", str(coco_images), "--score", "0.2"]
    result = run(["detect", "predict", str(config), *given, "--output", str(tmp_path)])
    assert len(result["found"]) == 8
    assert any(result["found"].values())
    for name, found in result["found"].items():
        drawn = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        original = np.asarray(Image.open(coco_images / name.removesuffix(".png")).convert("RGB"))
        assert drawn.shape == original.shape
        assert np.array_equal(drawn, original) == (not found)
        assert set(found) <= {"red", "blue"}


def test_boxes_stay_inside_the_image(trained, weights, coco_images):
    """At a size with a wide border around it."""
    config, _ = trained["retinanet"]
    from shvit.detection.detector import load_detector

    detect = torch_detect(load_detector(load_config(str(config)), weights["retinanet"]))
    found = detect(preparation(fixed_pipeline((128, 128)))(next(coco_images.iterdir())))
    assert len(found)
    assert found.boxes[:, 0::2].max() <= 128
    assert found.boxes[:, 1::2].max() <= 96


# --- other backbones --------------------------------------------------------------------------------------------------


def test_any_model_of_timms_is_a_backbone_in_the_same_config(coco, coco_images, tmp_path):
    """Trained, exported, and matched."""
    text = write_config(tmp_path / "config.py", "mask-rcnn", coco).read_text()
    own = next(line for line in text.splitlines() if line.strip().startswith("backbone="))
    neck = next(line for line in text.splitlines() if line.strip().startswith("neck="))
    peer = '    backbone=dict(_delete_=True, type="TimmBackbone", model="test_resnet", out_indices=(1, 2, 3, 4)),'
    fpn = '    neck=dict(_delete_=True, type="FPN", in_channels=[32, 48, 192, 96], out_channels=16, num_outs=5),'
    config = tmp_path / "peer.py"
    config.write_text(text.replace(own, peer).replace(neck, fpn))
    options = ["--options", "val_cfg=None", "val_dataloader=None", "val_evaluator=None"]
    assert run(["detect", "train", str(config), "--output", str(tmp_path / "run"), *options])["iterations"] == 4
    torch.manual_seed(0)
    model = spread(create_detector(load_config(str(config))))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "peer.pth")
    given = ["--checkpoint", str(tmp_path / "peer.pth"), "--images", str(coco_images), "--img-size", "96"]
    result = run(["detect", "export", str(config), *given, "--output", str(tmp_path / "peer.onnx")])
    assert result["certificate"]["match"]["matched_percent"] == 100


# --- the page ---------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "how-to" / "detection.md").read_text()


def block(part: str) -> str:
    """A piece of the page that is marked as tested."""
    found = re.search(rf"<!-- {part}: tested -->\n```[a-z]+\n(.*?)```", PAGE, re.DOTALL)
    assert found, part
    return found[1]


def test_config_on_the_page_trains_on_ones_own_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_coco(tmp_path / "pets", images=2)
    annotations = (
        (tmp_path / "pets" / "annotations.json").read_text().replace('"red"', '"cat"').replace('"blue"', '"dog"')
    )
    for split in ("train", "val"):
        shutil.copytree(tmp_path / "pets" / "images", tmp_path / "pets" / split)
        (tmp_path / "pets" / f"{split}.json").write_text(annotations)
    Path("pets.py").write_text(block("own"))
    assert len(block("own").splitlines()) <= 10
    options = ["train_cfg.max_epochs=1", "train_dataloader.num_workers=0", "train_dataloader.persistent_workers=false"]
    options += [
        "val_dataloader=None",
        "val_cfg=None",
        "val_evaluator=None",
        "train_dataloader.dataset.pipeline.2.scale=(64,64)",
        "model.roi_head.bbox_head.fc_out_channels=16",
        "model.roi_head.mask_head.conv_out_channels=16",
        "default_hooks.checkpoint.interval=2",  # none of 200 MB is written
        "default_hooks.checkpoint.save_last=false",
    ]
    result = run(["detect", "train", "pets.py", "--pretrained", "none", "--options", *options])
    assert result["output"] == "runs/pets"
    assert result["iterations"] == 1


def test_faster_rcnn_on_the_page_trains_on_boxes_alone(coco, tmp_path, monkeypatch):
    content = json.loads((coco / "annotations.json").read_text())
    for each in content["annotations"]:
        del each["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    write_config(Path("pets.py"), "mask-rcnn", coco)
    words = shlex.split(block("boxes").replace("\\\n", " "))[1:]
    files = [f"{split}_dataloader.dataset.ann_file={tmp_path / 'boxes.json'}" for split in ("train", "val")]
    files += [f"val_evaluator.ann_file={tmp_path / 'boxes.json'}", "train_cfg.max_epochs=2"]
    at = words.index("--options") + 1
    result = run([*words[:at], *files, *words[at:]])
    assert result["iterations"] == 4
    assert any(name.startswith("bbox") for name in result["ap"])
    assert not any("segm" in name for name in result["ap"])


def test_program_on_the_page_finds_what_the_command_finds(exported, coco_images, tmp_path, monkeypatch):
    """On an image that has to be shrunk and gets a border."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(exported["mask-rcnn"][0], "mine.onnx")
    Image.open(coco_images / "0.png").resize((201, 170), Image.Resampling.BICUBIC).save("image.png")
    found: dict = {}
    exec(block("use").replace("image.jpg", "image.png"), found)
    detector = load_onnx(Path("mine.onnx"))
    expected = detector.detect(preparation(fixed_pipeline((96, 128)))(Path("image.png")))
    assert len(expected) > 0
    assert np.allclose(found["scores"], expected.scores, atol=1e-5)
    assert np.allclose(found["boxes"], expected.boxes, atol=1e-3)
    assert found["labels"] == [detector.spec.classes[label] for label in expected.labels]
