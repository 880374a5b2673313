"""Checkpoint files of every layout, and files that must be refused."""

import argparse
import functools
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import reparameterize_model
from torch import nn

from shvit import SHViT, deploy, load_checkpoint
from shvit.checkpoint import (
    load_strictly,
    read_checkpoint,
    read_metadata,
    read_state_dict,
    write_checkpoint,
)
from shvit.create import create_model
from shvit.errors import InputError
from shvit.shvit import to_reference
from tests import forks
from tests.conftest import TINY, assert_close, create_tiny, images, randomize

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


@functools.cache
def six_classes(**options) -> SHViT:
    """S1 with random parameters: the names that `create_model` reads files for are those of the variants."""
    return randomize(timm.create_model("shvit_s1", num_classes=6, **options)).eval()


@pytest.fixture(scope="module")
def s1() -> SHViT:
    return six_classes()


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_every_wrapping_loads(tiny, tmp_path, wrapping, suffix):
    path = tmp_path / f"tiny{suffix}"
    torch.save(WRAPPINGS[wrapping](tiny.state_dict()), path)
    model = create_tiny(seed=9)
    assert load_checkpoint(model, path) == ()
    torch.testing.assert_close(model.state_dict(), tiny.state_dict(), rtol=0, atol=0)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.deployed, checkpoint.distilled, checkpoint.num_classes, checkpoint.dropped) == (
        False,
        False,
        10,
        (),
    )


@pytest.mark.parametrize("layout", ["ours", "reference", "deployed"])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_create_model_takes_from_the_file_what_it_tells(tmp_path, layout, distilled, suffix):
    source = six_classes(distilled=distilled)
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
    refused(tmp_path / "plain.pth", "no EMA weights", ema=True)


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
    refused(tmp_path / "detector.pth", r"has no head, .* create the model with num_classes=0, or have its head re-ini")


@torch.no_grad()
def test_headless_file_makes_a_headless_model(s1, tmp_path):
    body = {name: tensor for name, tensor in s1.state_dict().items() if not name.startswith("head")}
    write_checkpoint(body, tmp_path / "body.safetensors")
    model = create_model("shvit_s1", tmp_path / "body.safetensors")
    assert model.num_classes == 0
    assert_close(model.forward_features(images(1, 3, 64, 64)), s1.forward_features(images(1, 3, 64, 64)))
    assert create_model("shvit_s1", tmp_path / "body.safetensors", num_classes=3, reset_head=True).num_classes == 3
    with pytest.raises(InputError, match="has no head, and the model has one; create the model with num_classes=0"):
        create_model("shvit_s1", tmp_path / "body.safetensors", num_classes=5)


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("form", ["ours", "reference", "deployed"])
@torch.no_grad()
def test_channels_are_those_of_the_files_stem(tmp_path, in_chans, form):
    source = six_classes(in_chans=in_chans)
    rewritten = {"ours": source.state_dict, "reference": lambda: to_reference(source.state_dict()),
                 "deployed": deploy(source).state_dict}[form]()  # fmt: skip
    write_checkpoint(rewritten, tmp_path / "s1.pth")
    assert read_checkpoint(tmp_path / "s1.pth").in_chans == in_chans
    model, x = create_model("shvit_s1", tmp_path / "s1.pth"), images(1, in_chans, 64, 64)
    assert model.in_chans == in_chans
    assert_close(model(x), source(x))


@pytest.mark.parametrize("num_classes", [0, 6])
@torch.no_grad()
def test_two_heads_that_timms_reparameterize_leaves_are_loaded(tmp_path, num_classes):
    source = randomize(timm.create_model("shvit_s1", num_classes=num_classes, distilled=True)).eval()
    path, x = tmp_path / "two.pth", images(1, 3, 64, 64)
    write_checkpoint(reparameterize_model(source).state_dict(), path)
    model = create_model("shvit_s1", path)
    assert model.deployed
    assert_close(model(x), source(x))
    assert_close(deploy(model)(x), source(x))
    if num_classes:
        assert model.distilled
        refused(path, r"distilled=True and fuse\(\) it", model=deploy(create_tiny()))


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
    refused(path, "not a readable")


@pytest.mark.parametrize("content", [b"hello\n", b"hi", b"\x80\x02hello", b"\x80\x02.", bytes(1000)])
def test_junk_is_refused_in_words(tmp_path, content):
    (tmp_path / "junk.pth").write_bytes(content)
    refused(
        tmp_path / "junk.pth", r"not a readable checkpoint \(it \w+ [a-z. ]+\); fetch it|refused, because it is no ch"
    )


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
    refused(tmp_path / "resnet.safetensors", r"not a SHViT checkpoint .* it holds bn1\.")
    with pytest.raises(InputError, match="does not fit ResNet"):
        create_model("resnet34", tmp_path / "resnet.safetensors")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ({}, "not a SHViT checkpoint"),
        ({"model": {}}, "not a SHViT checkpoint"),
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


TENSORS = {
    "meta": (lambda weight: weight.to("meta"), "{name} is strided, float32, meta; save it as a dense tensor"),
    "sparse": (lambda weight: weight.to_sparse(), "{name} is sparse_coo, float32"),
    "compressed": (lambda weight: weight.flatten(1).to_sparse_csr(), "{name} is sparse_csr"),
    "nested": (lambda weight: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), "{name} is nested"),
    "complex": (lambda weight: weight.to(torch.complex64), "{name} is strided, complex64"),
    "float8": (lambda weight: weight.to(torch.float8_e4m3fn), "{name} is strided, float8_e4m3fn"),
    "terabyte": (lambda _: torch.zeros(1).expand(250_000_000_000, 1), "{name} is of 1000000000000 bytes, of which 4"),
    "gigabytes": (lambda _: torch.zeros(1).expand(1_000_000_000, 1), "{name} is of 4000000000 bytes, of which 4 are"),
    "scalar": (lambda _: torch.tensor(1.0), r"{name} has shape \(\), and should have \d axes"),
    "no rows": (lambda weight: weight[:0].clone(), r"{name} has shape \(0, .*, and should have"),
    "integers": (lambda weight: weight.long(), "integers where floats should be: {name}$"),
    "truth values": (lambda weight: weight > 0, "integers where floats should be: {name}$"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("name", ["head.l.weight", "patch_embed.0.c.weight"])
def test_tensors_that_no_model_has_are_refused_by_name(tiny, tmp_path, kind, name):
    change, cause = TENSORS[kind]
    torch.save({**tiny.state_dict(), name: change(tiny.state_dict()[name])}, tmp_path / "odd.pth")
    refused(tmp_path / "odd.pth", cause.format(name=name.replace(".", r"\.")))


def test_peers_classifier_without_axes_is_refused(tmp_path):
    torch.save({**timm.create_model("resnet18").state_dict(), "fc.weight": torch.tensor(1.0)}, tmp_path / "peer.pth")
    with pytest.raises(InputError, match=r"fc\.weight is \(\) and should be \(1000, 512\)"):
        create_model("resnet18", tmp_path / "peer.pth")


def test_many_views_of_one_memory_count_each(tiny, tmp_path, monkeypatch):
    memory = torch.zeros(100_000)
    content = tiny.state_dict() | {f"extra{i}": memory.view(100, -1) for i in range(20)}
    torch.save(content, tmp_path / "views.pth")
    monkeypatch.setattr("shvit.checkpoint.MAX_BYTES", 7_000_000)
    assert (tmp_path / "views.pth").stat().st_size < 1_000_000
    refused(tmp_path / "views.pth", "are more than the 0.0 GB allowed")


def test_refusal_is_not_accompanied_by_warnings(tiny, tmp_path):
    """In a process of its own: torch warns once."""
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "sparse.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps({"model": tiny.state_dict(), "args": Attack(tmp_path / "x")}))
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    names = ("sparse.pth", "raw.pth", "script.pt")
    code = f"""
import sys
from shvit.cli import main
for name in {names}:
    sys.argv = ["shvit", "weights", "convert", name, "to.pth", "--to", "timm"]
    try:
        main()
    except SystemExit as end:
        print(end.code)
"""
    done = forks.run(code=code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"] * 3
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(name in line for name, line in zip(names, lines, strict=True))


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


def test_archive_that_python_cannot_measure_is_refused(tmp_path):
    """Found by the fuzz command: of several disks, as its end says."""
    locator, end = b"PK\x06\x07" + struct.pack("<LQL", 1, 0, 2), b"PK\x05\x06" + bytes(18)
    path = tmp_path / "disks.pth"
    path.write_bytes(b"PK\x03\x04" + bytes(100) + locator + end)
    refused(path, "not a readable checkpoint")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        read_metadata(path)


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_written_file_holds_the_tensors(tiny, tmp_path, suffix):
    path = tmp_path / "deep" / f"tiny{suffix}"
    tiny.to(memory_format=torch.channels_last)  # tensors that are not contiguous
    write_checkpoint(tiny.state_dict(), path)
    torch.testing.assert_close(read_state_dict(path), dict(tiny.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_broken_off_writing_leaves_the_old_file(tiny, tmp_path, monkeypatch, suffix):
    path, write_bytes = tmp_path / f"tiny{suffix}", Path.write_bytes
    write_checkpoint(tiny.state_dict(), path)
    before = path.read_bytes()

    def fill_disk(file: Path, content: bytes) -> None:
        write_bytes(file, content[:100])
        raise OSError("broken off")

    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    monkeypatch.setattr(torch, "save", lambda content, file: file.write_bytes(bytes(1000)))
    with pytest.raises(OSError, match="broken off"):
        write_checkpoint(tiny.state_dict(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_unknown_suffix_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match=r"unknown suffix '\.onnx'; choose \.safetensors, \.pth or \.pt"):
        write_checkpoint(tiny.state_dict(), tmp_path / "tiny.onnx")
    assert not list(tmp_path.iterdir())


def test_classifier_of_another_shape_is_named(tiny):
    for bias in (torch.tensor(1.0), torch.zeros(3)):
        with pytest.raises(InputError, match=r"head\.l\.bias is \(.*\) and should be \(10,\)"):
            load_strictly(tiny, {**tiny.state_dict(), "head.l.bias": bias}, Path("f.pth"))


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
