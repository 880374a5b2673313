"""Checkpoint files of every layout against the reference's names and logits, and files that must be refused."""

import argparse
import hashlib
import json
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, assert_close, create_tiny, images, randomize
from safetensors.torch import save_file
from torch import nn

from shvit import SHViT, deploy, load_checkpoint
from shvit.checkpoint import (
    create_model,
    load_strictly,
    read_checkpoint,
    read_state_dict,
    rename_reference_keys,
    to_reference,
    write_checkpoint,
)
from shvit.errors import InputError
from shvit.shvit import VARIANTS

# --- goldens of the reference implementation --------------------------------------------------------------------------

GOLDENS = Path(__file__).parent / "goldens"
CHECKPOINTS = [(name, distilled) for name in VARIANTS for distilled in (False, True)]
LOGITS = [("shvit_s1", False, 224), ("shvit_s1", False, 320), ("shvit_s3", False, 224), ("shvit_s3", False, 320),
          ("shvit_s1", True, 224)]  # fmt: skip


def key_of(name: str, distilled: bool) -> str:
    return f"{name}_distilled" if distilled else name


def names_hash(shapes: dict) -> str:
    """Over one sorted line for each tensor: its name and its shape."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.fixture(scope="module", autouse=True)
def refreshed_goldens():
    """Writes the goldens anew from the file that SHVIT_REFRESH_GOLDENS names."""
    source = os.environ.get("SHVIT_REFRESH_GOLDENS")
    if source is None:
        return
    reference = json.loads(Path(source).read_text())
    names = {key: {"tensors": len(entry["shapes"]), "sha256": names_hash(entry["shapes"])}
             for key, entry in reference.items()}  # fmt: skip
    (GOLDENS / "reference_names.json").write_text(json.dumps(names, indent=1) + "\n")
    for name, distilled, px in LOGITS:
        entry = reference[key_of(name, distilled)]
        logits = entry["logits"] if px == entry["input_px"] else entry[f"logits_{px}"]
        lines = "\n".join(f"{logit:.6g}" for logit in logits)
        (GOLDENS / f"reference_logits_{key_of(name, distilled)}_{px}.txt").write_text(lines + "\n")


def reference_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    """What the reference's parameter `name` was when the golden logits were made; from its name and shape alone."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(100)
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    kind = name.rpartition(".")[2]
    if kind == "running_var":
        value = np.exp(normal * 0.3)
    elif kind in ("running_mean", "bias"):
        value = normal * 0.1
    elif len(shape) > 1:
        value = normal / np.sqrt(np.prod(shape[1:]))
    else:
        branch_end = name.endswith(("pw2.bn.weight", "m.bn.weight", "proj.1.bn.weight"))
        value = np.maximum(1 + normal * 0.2, 0.3) * (0.25 if branch_end else 1)
    return torch.tensor(value, dtype=torch.float32)


def reference_image(px: int) -> torch.Tensor:
    return torch.tensor(np.random.RandomState(0).standard_normal((1, 3, px, px)), dtype=torch.float32)


@pytest.mark.parametrize(("name", "distilled"), CHECKPOINTS)
def test_names_and_shapes_are_those_of_the_published_checkpoints(name, distilled):
    golden = json.loads((GOLDENS / "reference_names.json").read_text())[key_of(name, distilled)]
    state_dict = timm.create_model(name, distilled=distilled, device="meta").state_dict()
    reference = to_reference(state_dict)
    assert len(reference) == golden["tensors"]
    assert names_hash({key: tensor.shape for key, tensor in reference.items()}) == golden["sha256"]
    assert list(rename_reference_keys(reference)) == list(state_dict)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A function that writes a file as the reference publishes it, with the parameters behind the golden logits."""
    folder = tmp_path_factory.mktemp("published")

    def write(name: str, distilled: bool) -> Path:
        path = folder / f"{key_of(name, distilled)}.pth"
        if not path.exists():
            shapes = to_reference(timm.create_model(name, distilled=distilled, device="meta").state_dict())
            model = {key: reference_tensor(key, tensor.shape) for key, tensor in shapes.items()}
            torch.save({"model": model, "args": argparse.Namespace(model=name), "epoch": 299}, path)
        return path

    return write


@pytest.mark.parametrize(("name", "distilled", "px"), LOGITS)
@torch.no_grad()
def test_published_file_gives_the_references_logits(published, name, distilled, px):
    path = published(name, distilled)
    golden = torch.tensor(np.loadtxt(GOLDENS / f"reference_logits_{key_of(name, distilled)}_{px}.txt"))
    assert golden.shape == (1000,)
    by_timm = timm.create_model(name, checkpoint_path=str(path), distilled=distilled).eval()
    by_us = create_model(name, path)
    for model in (by_timm, by_us, deploy(by_us)):
        torch.testing.assert_close(model(reference_image(px))[0].double(), golden, rtol=0, atol=1e-4)


# --- layouts ----------------------------------------------------------------------------------------------------------

WRAPPINGS = {
    "bare": lambda tensors: tensors,
    "reference": lambda tensors: {"model": to_reference(tensors), "args": argparse.Namespace(lr=1e-3), "epoch": 3},
    "timm": lambda tensors: {"state_dict": tensors, "arch": "shvit_s1", "args": argparse.Namespace(lr=1e-3)},
    "data parallel": lambda tensors: {"model": {f"module.{key}": tensor for key, tensor in tensors.items()}},
    "compiled": lambda tensors: {"state_dict": {f"_orig_mod.{key}": tensor for key, tensor in tensors.items()}},
    "reference data parallel": lambda tensors: {
        f"module.{key}": tensor for key, tensor in to_reference(tensors).items()
    },
    "with optimizer": lambda tensors: {"model": tensors, "optimizer": {"state": {0: {"step": 1}}}, "scaler": {}},
}


@pytest.fixture(scope="module")
def s1() -> SHViT:
    return randomize(timm.create_model("shvit_s1", num_classes=6)).eval()


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_every_wrapping_loads(tiny, tmp_path, wrapping, suffix):
    path = tmp_path / f"tiny{suffix}"
    torch.save(WRAPPINGS[wrapping](tiny.state_dict()), path)
    model = create_tiny(seed=9)
    assert load_checkpoint(model, path) == ()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tiny.state_dict()[name])
    checkpoint = read_checkpoint(path)
    assert (checkpoint.deployed, checkpoint.distilled, checkpoint.num_classes, checkpoint.dropped) == (
        False,
        False,
        10,
        (),
    )


@pytest.mark.parametrize("layout", ["ours", "reference", "deployed"])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@torch.no_grad()
def test_create_model_takes_from_the_file_what_it_tells(tmp_path, layout, distilled, suffix):
    source = randomize(timm.create_model("shvit_s1", num_classes=6, distilled=distilled)).eval()
    rewritten = {"ours": source.state_dict, "reference": lambda: to_reference(source.state_dict()),
                 "deployed": deploy(source).state_dict}[layout]()  # fmt: skip
    write_checkpoint(rewritten, tmp_path / f"s1{suffix}")
    model = create_model("shvit_s1", tmp_path / f"s1{suffix}")
    assert not model.training
    assert model.deployed == (layout == "deployed")
    assert model.distilled == (distilled and layout != "deployed")
    assert model.num_classes == 6
    assert_close(model(images(1, 3, 64, 64)), source(images(1, 3, 64, 64)))


def test_averaged_weights_are_taken_on_request_alone(tiny, tmp_path):
    averaged = create_tiny(seed=5).state_dict()
    for plain, ema in (("model", "model_ema"), ("state_dict", "state_dict_ema")):
        torch.save({plain: to_reference(tiny.state_dict()), ema: to_reference(averaged)}, tmp_path / "both.pth")
        for wanted, expected in ((False, tiny.state_dict()), (True, averaged)):
            model = create_tiny(seed=9)
            load_checkpoint(model, tmp_path / "both.pth", ema=wanted)
            assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    torch.save({"model": tiny.state_dict()}, tmp_path / "plain.pth")
    refused(tmp_path / "plain.pth", "no averaged weights", ema=True)


def test_backbone_of_a_detector_loads_without_the_rest(tiny, tmp_path):
    beside = {"neck.conv.weight": torch.zeros(1), "bbox_head.fc.bias": torch.zeros(2), "backbone_norm": torch.zeros(1)}
    backbone = {key: tensor for key, tensor in to_reference(tiny.state_dict()).items() if not key.startswith("head")}
    content = {f"backbone.{key}": tensor for key, tensor in backbone.items()} | beside
    torch.save({"meta": {"epoch": 12}, "state_dict": content}, tmp_path / "detector.pth")
    checkpoint = read_checkpoint(tmp_path / "detector.pth")
    assert set(checkpoint.dropped) == set(beside)
    assert checkpoint.num_classes == 0
    model = create_tiny(seed=9)
    kept = load_checkpoint(model, tmp_path / "detector.pth", reset_head=True)
    assert set(kept) == {name for name in model.state_dict() if name.startswith("head.")}
    assert_close(model.forward_features(images(1, 3, 64, 64)), tiny.forward_features(images(1, 3, 64, 64)))
    refused(tmp_path / "detector.pth", "missing head.bn.weight, head.bn.bias")


@torch.no_grad()
def test_headless_file_makes_a_headless_model(s1, tmp_path):
    body = {name: tensor for name, tensor in s1.state_dict().items() if not name.startswith("head")}
    write_checkpoint(body, tmp_path / "body.safetensors")
    model = create_model("shvit_s1", tmp_path / "body.safetensors")
    assert model.num_classes == 0
    assert_close(model.forward_features(images(1, 3, 64, 64)), s1.forward_features(images(1, 3, 64, 64)))
    assert create_model("shvit_s1", tmp_path / "body.safetensors", num_classes=3, reset_head=True).num_classes == 3


@torch.no_grad()
def test_half_precision_file_loads_into_a_full_precision_model(tiny, tmp_path):
    halves = {key: value.bfloat16() if value.is_floating_point() else value for key, value in tiny.state_dict().items()}
    write_checkpoint(halves, tmp_path / "half.safetensors")
    model = create_tiny(seed=9)
    load_checkpoint(model, tmp_path / "half.safetensors")
    assert model.head.l.weight.dtype == torch.float32
    assert_close(model(images(1, 3, 64, 64)), tiny(images(1, 3, 64, 64)), 0.1)


# --- classes and heads ------------------------------------------------------------------------------------------------


def test_other_class_count_is_refused_unless_the_head_is_reset(s1, tmp_path, caplog):
    write_checkpoint(s1.state_dict(), tmp_path / "six.safetensors")
    with pytest.raises(InputError, match="made for 6 classes, and the model has 4") as error:
        create_model("shvit_s1", tmp_path / "six.safetensors", num_classes=4)
    assert_one_line(error, tmp_path / "six.safetensors")
    assert not caplog.text
    model = create_model("shvit_s1", tmp_path / "six.safetensors", num_classes=4, reset_head=True)
    assert "the head is not loaded" in caplog.text
    assert model.num_classes == 4
    assert torch.equal(model.stages[2].blocks[4].ffn.m.pw2.c.weight, s1.stages[2].blocks[4].ffn.m.pw2.c.weight)
    assert not model.head.l.bias.any()
    assert create_model("shvit_s1", tmp_path / "six.safetensors", num_classes=0).num_classes == 0


def test_distilled_file_goes_into_a_plain_model_when_the_head_is_reset(tmp_path):
    source = create_tiny(distilled=True)
    write_checkpoint(source.state_dict(), tmp_path / "distilled.pth")
    refused(tmp_path / "distilled.pth", "create the model with distilled=True")
    model = create_tiny(seed=9)
    kept = load_checkpoint(model, tmp_path / "distilled.pth", reset_head=True)
    assert all(name.startswith("head.") for name in kept)
    assert torch.equal(model.patch_embed[0].c.weight, source.patch_embed[0].c.weight)


def test_distillation_head_can_be_asked_for(s1, tmp_path):
    write_checkpoint(s1.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(InputError, match=r"missing head_dist\.bn\.weight"):
        create_model("shvit_s1", tmp_path / "plain.pth", distilled=True)
    assert create_model("shvit_s1", tmp_path / "plain.pth", distilled=True, reset_head=True).distilled
    two = randomize(timm.create_model("shvit_s1", num_classes=6, distilled=True))
    write_checkpoint(two.state_dict(), tmp_path / "two.pth")
    assert not create_model("shvit_s1", tmp_path / "two.pth", distilled=False, reset_head=True).distilled


def test_deployed_file_and_model_that_is_not_are_kept_apart(tiny, tmp_path):
    write_checkpoint(deploy(tiny).state_dict(), tmp_path / "deployed.pth")
    write_checkpoint(tiny.state_dict(), tmp_path / "plain.pth")
    refused(tmp_path / "deployed.pth", "holds a deployed model")
    refused(tmp_path / "plain.pth", "holds a model that is not deployed", model=deploy(tiny))
    model = deploy(create_tiny(seed=9))
    load_checkpoint(model, tmp_path / "deployed.pth")
    assert_close(model(images(1, 3, 64, 64)), tiny(images(1, 3, 64, 64)))


@torch.no_grad()
def test_peers_load_from_timms_layout(tmp_path):
    peer = timm.create_model("resnet18", num_classes=3).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in peer.state_dict().items()}}, tmp_path / "peer.pth")
    model = create_model("resnet18", tmp_path / "peer.pth")
    assert_close(model(images(1, 3, 64, 64)), peer(images(1, 3, 64, 64)))
    with pytest.raises(InputError, match="made for 3 classes, and the model has 5"):
        create_model("resnet18", tmp_path / "peer.pth", num_classes=5)
    assert create_model("resnet18", tmp_path / "peer.pth", num_classes=5, reset_head=True).num_classes == 5


def test_unknown_model_gets_suggestions():
    with pytest.raises(InputError, match=r"unknown model 'shvit_s5'; choose from .*shvit_s1"):
        create_model("shvit_s5")
    with pytest.raises(InputError, match="unknown model"):
        create_model("")


# --- files that are refused -------------------------------------------------------------------------------------------


def assert_one_line(error: pytest.ExceptionInfo, path: Path) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 600 + len(str(path))


def refused(path: Path, cause: str, model: nn.Module | None = None, **options) -> None:
    """`path` must not load, for `cause`, said in one line; and the model stays as it was."""
    model = create_tiny(seed=9) if model is None else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=cause) as error:
        load_checkpoint(model, path, **options)
    assert_one_line(error, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Attack:
    """Unpickling this makes a folder."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("container", ["torch", "legacy", "pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_pickled_code_does_not_run(tiny, tmp_path, container, suffix):
    path, trace = tmp_path / f"attack{suffix}", tmp_path / "was_run"
    content = {"model": tiny.state_dict(), "args": Attack(trace)}
    if container == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "torch")
    refused(path, r"its pickle calls for \w+\.mkdir; nothing of it was run" if container == "torch" else "was run")
    with pytest.raises(InputError):
        create_model("resnet18", path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if container != "pickle" else pickle.loads(path.read_bytes())
    assert trace.exists()  # the attack would have worked


def test_whole_pickled_model_is_refused_by_name(tiny, tmp_path):
    torch.save(tiny, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", r"its pickle calls for shvit\.\S+, .* and \d+ more; nothing")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_and_empty_files_are_refused(tiny, tmp_path, suffix, keep):
    path = tmp_path / f"cut{suffix}"
    write_checkpoint(tiny.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(path, "not a readable|refused, because")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".txt"])
def test_text_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"page{suffix}"
    path.write_text("<!DOCTYPE html>\n<html>\nNot found\n</html>\n")
    refused(path, "not a readable|refused, because")


def test_folders_and_missing_files_are_refused(tmp_path):
    refused(tmp_path, "is a folder; name the checkpoint file in it")
    refused(tmp_path / "nowhere.pth", "no such file")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(tiny, tmp_path, value):
    with torch.no_grad():
        tiny.stages[1].blocks[0].conv.m.bn.weight[3] = value
    for suffix in (".pth", ".safetensors"):
        write_checkpoint(tiny.state_dict(), tmp_path / f"diverged{suffix}")
        refused(
            tmp_path / f"diverged{suffix}", r"stages\.1\.blocks\.0\.conv\.m\.bn\.weight holds NaN or infinite values"
        )


def test_wrong_shape_missing_and_extra_parameters_are_named(tiny, tmp_path):
    path, good = tmp_path / "bad.pth", tiny.state_dict()
    name = "stages.1.blocks.0.mixer.m.qkv.c.weight"
    write_checkpoint({**good, name: torch.zeros(38, 7, 1, 1)}, path)
    refused(path, rf"{name} is \(38, 7, 1, 1\) and should be \(38, 6, 1, 1\)")
    write_checkpoint({key: tensor for key, tensor in good.items() if key != name}, path)
    refused(path, f"missing {name}")
    write_checkpoint({**good, "stages.1.blocks.0.extra": torch.zeros(1)}, path)
    refused(path, r"left over stages\.1\.blocks\.0\.extra")
    write_checkpoint({**good, "head_extra.weight": torch.zeros(1)}, path)
    refused(path, r"left over head_extra\.weight", reset_head=True)
    write_checkpoint({**good, "blocks2.3.mixer.m.qkv.c.weight": good[name]}, path)
    refused(path, f"{name} twice")
    write_checkpoint({f"module.{key}": tensor for key, tensor in good.items()} | {"other": torch.zeros(1)}, path)
    refused(path, r"outside the model's prefix 'module\.': other")


def test_another_variant_is_refused_in_one_line(s1, tmp_path):
    write_checkpoint(s1.state_dict(), tmp_path / "s1.pth")
    with pytest.raises(InputError, match=r"does not fit SHViT .*missing .* and \d+ more; .*should be") as error:
        create_model("shvit_s4", tmp_path / "s1.pth")
    assert_one_line(error, tmp_path / "s1.pth")


def test_another_architecture_is_refused_by_what_it_holds(tmp_path):
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "resnet.safetensors")
    refused(tmp_path / "resnet.safetensors", r"no SHViT in this checkpoint .* it holds bn1\.")
    with pytest.raises(InputError, match="does not fit ResNet"):
        create_model("resnet34", tmp_path / "resnet.safetensors")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ({}, "no SHViT in this checkpoint"),
        ({"model": {}}, "no SHViT in this checkpoint"),
        ({"model": {"patch_embed": {"weight": torch.zeros(1)}}}, "entry 'patch_embed' is of type dict"),
        ({"epoch": 3, "state_dict": None}, "entry 'epoch' is of type int"),
        ({"model": {3: torch.zeros(1)}}, "entry 3 is of type Tensor"),
        ([torch.zeros(1)], "holds a list; a checkpoint is a dict of tensors"),
        (torch.zeros(1), "holds a Tensor"),
        (argparse.Namespace(model=3), "holds a Namespace"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_hold_something_else_say_what(tmp_path, content, cause):
    torch.save(content, tmp_path / "other.pth")
    refused(tmp_path / "other.pth", cause)


def test_zip_that_unpacks_to_more_than_memory_is_refused_unread(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.writestr(f"archive/data/{i}", bytes(1000))
    claim = (1000).to_bytes(4, "little"), (2_000_000_000).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(*claim))
    refused(path, r"6\.0 GB is more than the 4\.3 GB allowed")


def test_safetensors_that_claim_more_than_they_hold_are_refused(tmp_path):
    path = tmp_path / "claim.safetensors"
    claim = b'{"patch_embed.0.c.weight":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    for header in (claim, b"{" * 1000, b""):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        refused(path, "not a readable safetensors file")
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    refused(path, "not a readable safetensors file")


def test_archive_with_a_broken_record_is_refused(tiny, tmp_path):
    path = tmp_path / "broken.pth"
    write_checkpoint(tiny.state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/data/0")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    refused(path, "not a readable checkpoint")


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_written_file_holds_the_tensors(tiny, tmp_path, suffix):
    path = tmp_path / "deep" / f"tiny{suffix}"
    tiny.to(memory_format=torch.channels_last)  # tensors that are not contiguous
    write_checkpoint(tiny.state_dict(), path)
    written = read_state_dict(path)
    assert written.keys() == tiny.state_dict().keys()
    assert all(torch.equal(tensor, tiny.state_dict()[name]) for name, tensor in written.items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_broken_off_writing_leaves_the_old_file(tiny, tmp_path, monkeypatch, suffix):
    path, write_bytes = tmp_path / f"tiny{suffix}", Path.write_bytes
    write_checkpoint(tiny.state_dict(), path)
    before = path.read_bytes()

    def fill_disk(file: Path, content: bytes) -> None:
        write_bytes(file, content[:100])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    monkeypatch.setattr(torch, "save", lambda content, file: file.write_bytes(bytes(1000)))
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(tiny.state_dict(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_unknown_suffix_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match=r"unknown suffix '\.onnx'; choose \.safetensors, \.pth or \.pt"):
        write_checkpoint(tiny.state_dict(), tmp_path / "tiny.onnx")
    assert not list(tmp_path.iterdir())


def test_strict_loading_names_what_differs():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"missing 0\.bias; left over 1\.weight; 0\.weight is \(3, 2\)"):
        load_strictly(model, {"0.weight": torch.zeros(3, 2), "1.weight": torch.zeros(1)}, Path("f.pth"))


def test_reading_changes_no_setting_of_torch(tiny, tmp_path):
    allowed = set(torch.serialization.get_safe_globals())
    write_checkpoint(tiny.state_dict(), tmp_path / "tiny.pth")
    read_checkpoint(tmp_path / "tiny.pth")
    assert set(torch.serialization.get_safe_globals()) == allowed
    assert TINY["num_classes"] == read_checkpoint(tmp_path / "tiny.pth").num_classes
