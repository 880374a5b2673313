"""Published checkpoints: the manifest, the cache, what files hold, and conversion. Nothing here needs a network."""

import json
import sysconfig
from pathlib import Path

import pytest
import timm
import torch
from timm.models.shvit import SHViT as TimmSHViT
from timm.utils import reparameterize_model

from shvit import SHViT, deploy
from shvit.checkpoint import read_checkpoint, read_state_dict, write_checkpoint
from shvit.cli import run
from shvit.create import create_model
from shvit.errors import CheckFailed, InputError
from shvit.files import sha256
from shvit.shvit import VARIANTS, to_reference
from shvit.weights import main as commands
from shvit.weights.layouts import variant_of
from shvit.weights.manifest import MANIFEST, find, read_manifest
from tests import forks

# --- a model and its files --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> SHViT:
    torch.manual_seed(0)
    model = timm.create_model("shvit_s1", num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            for tensor in (module.weight, module.bias, module.running_mean):
                torch.nn.init.normal_(tensor, 0.5, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> Path:
    """A folder with the model in each layout."""
    folder = tmp_path_factory.mktemp("files")
    write_checkpoint(model.state_dict(), folder / "timm.safetensors")
    write_checkpoint(to_reference(model.state_dict()), folder / "reference.pth")
    write_checkpoint(deploy(model).state_dict(), folder / "deployed.safetensors")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SHVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def adopt(cache: Path, files: Path) -> Path:
    """The model in the cache as shvit_s1.in1k, its hash recorded."""
    path = cache / "shvit_s1.in1k.safetensors"
    write_checkpoint(read_state_dict(files / "timm.safetensors"), path)
    assert run(["weights", "pull", "shvit_s1.in1k"])["first_use"]
    return path


# --- manifest ---------------------------------------------------------------------------------------------------------


def test_manifest_agrees_with_timm():
    entries = read_manifest()
    assert len(entries) == 10
    for entry in entries:
        cfg = timm.get_pretrained_cfg(entry.model)
        assert entry.model in VARIANTS
        assert entry.license.lower() == cfg.license
        if entry.task == "classification":
            assert entry.img_size == cfg.input_size[1:]
        if entry.layout == "timm":
            assert entry.url == f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/model.safetensors"
            assert entry.name == cfg.hf_hub_id.removeprefix("timm/")
        else:
            assert entry.url == f"{cfg.origin_url}/releases/download/v1.0/{entry.name}.pth"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'license = "MIT"',
            'license = "MIT"\nlicence = "MIT"',
            r"unknown field 'checkpoint\.0\.licence'; its first lines say",
        ),
        ('license = "MIT"\n', "", r"checkpoint\.0\.license is missing"),
        ('license = "MIT"', "license = 1", "license is 1"),
        ('task = "classification"', 'task = "segmentation"', "'classification' or 'detection'"),
        ('layout = "timm"', 'layout = "timmm"', "'timm' or 'reference'"),
        ("https://huggingface.co", "http://huggingface.co", "an https address"),
        ("top1 = 72.78", "box_ap = 72.78", "a table of top1"),
        ("top1 = 72.78", "top1 = 7278.0", r"checkpoint\.0\.accuracy\.top1 is 7278\.0; .* less than 100"),
        ("[224, 224]", "224", r"checkpoint\.0\.img_size is 224; .* array"),
        ('license = "MIT"', 'license = "MIT"\nsha256 = "ABC"', "64 lower-case hex digits"),
        ('name = "shvit_s1.in1k"', 'name = "shvit_s2.in1k"', "given 2 times"),
        ('name = "shvit_s1.in1k"', 'name = "../shvit_s1"', "letters, digits"),
        ("[[checkpoint]]", "[other]\n[[checkpoint]]", "unknown field 'other'"),
        ("[[checkpoint]]", "[[checkpoint]", "not a readable manifest"),
    ],
)
def test_manifest_is_read_strictly(tmp_path, old, new, message):
    text = MANIFEST.read_text()
    assert old in text
    (tmp_path / "manifest.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        read_manifest(tmp_path / "manifest.toml")


def test_unknown_names_are_answered_with_close_ones():
    with pytest.raises(InputError, match=r"'shvit_s4.in1K'; choose from shvit_s4.in1k"):
        find("shvit_s4.in1K")


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_file_put_into_the_cache_by_hand_is_proved_and_recorded(cache, files):
    cache.mkdir()
    (cache / "shvit_s1.pth").write_bytes((files / "reference.pth").read_bytes())
    (cache / "shvit_s2.pth").write_bytes((files / "reference.pth").read_bytes())
    assert run(["weights", "pull", "shvit_s1"])["first_use"]
    with pytest.raises(CheckFailed, match=r"it is a shvit_s1.*remove the file"):
        run(["weights", "pull", "shvit_s2"])
    assert list(json.loads((cache / "lock.json").read_text())) == ["shvit_s1"]


def test_a_damaged_lock_file_is_named(cache):
    cache.mkdir()
    (cache / "lock.json").write_text('{"shvit_s1": {"sha256": 1}}')
    with pytest.raises(InputError, match=r"lock\.json: shvit_s1\.sha256 is 1; .*; restore the file, or remove it"):
        run(["weights", "list"])


# --- lists ------------------------------------------------------------------------------------------------------------


def test_list_counts_the_models_as_published(capsys):
    rows = run(["list"])["models"]
    figures = {row["model"]: (row["params"], round(row["gmacs"], 3), row["img_size"], row["top1"]) for row in rows}
    assert figures == {
        "shvit_s1": (6_330_808, 0.241, (224, 224), 72.78),
        "shvit_s2": (11_483_072, 0.365, (224, 224), 75.184),
        "shvit_s3": (14_245_273, 0.601, (224, 224), 77.356),
        "shvit_s4": (16_588_484, 0.986, (256, 256), 79.362),
    }
    assert list(rows[0]["weights"]) == ["shvit_s1.in1k", "shvit_s1"]
    assert "16,588,484" in capsys.readouterr().out


def test_list_names_other_models_without_building_them(monkeypatch):
    monkeypatch.setattr(timm, "create_model", None)
    rows = {row["model"]: row for row in run(["list", "resnet*t"])["models"]}
    assert rows["resnet10t"]["img_size"] == (176, 176)
    assert list(rows["resnet10t"]["weights"]) == ["resnet10t.c3_in1k"]
    assert rows["resnet10t"]["params"] is None
    with pytest.raises(InputError, match="no model matches 'shvit_s9'"):
        run(["list", "shvit_s9"])


def test_weights_list_tells_what_is_cached_and_locked(cache, files, capsys):
    adopt(cache, files)
    rows = {row["name"]: row for row in run(["weights", "list"])["checkpoints"]}
    out = capsys.readouterr().out
    assert "mask_ap 35.9 [3]" in out
    assert "[3] the paper, arXiv 2401.16456: 1x schedule" in out
    assert (rows["shvit_s1.in1k"]["cached"], rows["shvit_s1.in1k"]["hash"]) == (True, "locked")
    assert rows["shvit_s1.in1k"]["sha256"] == sha256(cache / "shvit_s1.in1k.safetensors")
    assert (rows["shvit_s1"]["cached"], rows["shvit_s1"]["hash"], rows["shvit_s1"]["sha256"]) == (
        False,
        "unknown",
        None,
    )
    assert rows["maskrcnn_shvit_s4_1x_coco"]["accuracy"] == {"box_ap": 39.0, "mask_ap": 35.9}


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_tells_what_a_file_is(files):
    names = ("timm.safetensors", "reference.pth", "deployed.safetensors")
    checks = run(["weights", "check", *(str(files / name) for name in names)])["checks"]
    assert [check["identity"]["layout"] for check in checks] == ["timm", "reference", "deployed"]
    assert {(check["identity"]["model"], check["identity"]["num_classes"]) for check in checks} == {("shvit_s1", 10)}
    assert {check["hash"] for check in checks} == {"unknown"}
    expected = sum(p.numel() for p in create_model("shvit_s1", num_classes=10).parameters())
    assert [check["identity"]["params"] for check in checks[:2]] == [expected, expected]
    assert checks[2]["identity"]["params"] < expected


def test_check_finds_a_changed_file_in_the_cache(cache, files):
    with pytest.raises(InputError, match="holds no checkpoint"):
        run(["weights", "check"])
    with pytest.raises(InputError, match=r"no such file.*weights pull shvit_s3"):
        run(["weights", "check", "shvit_s3"])
    path = adopt(cache, files)
    assert run(["weights", "check"])["checks"][0]["hash"] == "as recorded"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1  # one bit of one weight: still a SHViT
    path.write_bytes(changed)
    with pytest.raises(CheckFailed, match=r"1 of 1 do not hold.*is on record") as failed:
        run(["weights", "check"])
    assert failed.value.result["checks"][0]["hash"] == "differs"


def test_check_says_what_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="is a folder; name the checkpoint file in it"):
        run(["weights", "check", str(tmp_path)])
    (tmp_path / "notes.txt").write_text("hello\n")
    with pytest.raises(
        CheckFailed, match=r"notes\.txt: not a readable checkpoint \(it was not written by torch\.save\)"
    ):
        run(["weights", "check", str(tmp_path / "notes.txt")])


def test_check_at_the_command_line_exits_with_1(files, model, tmp_path):
    broken = {
        name: tensor for name, tensor in model.state_dict().items() if name != "stages.2.blocks.1.conv.m.c.weight"
    }
    write_checkpoint(broken, tmp_path / "broken.pth")
    program = Path(sysconfig.get_path("scripts")) / "shvit"
    done = forks.run(program, "weights", "check", "broken.pth", files / "timm.safetensors", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "missing stages.2.blocks.1.conv.m.c.weight" in done.stderr
    assert done.stderr.count("broken.pth") == 1
    checks = json.loads(done.stdout.splitlines()[-1])["checks"]
    assert [check["problem"] is None for check in checks] == [False, True]


# --- convert ----------------------------------------------------------------------------------------------------------


def convert(src: Path, dst: Path, to: str, *more: str) -> dict:
    return run(["weights", "convert", str(src), str(dst), "--to", to, *more])


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert sorted(a) == sorted(b)
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_conversion_there_and_back_is_exact(files, model, tmp_path):
    result = convert(files / "timm.safetensors", tmp_path / "a.pth", "reference")
    assert (result["source"]["layout"], result["layout"]) == ("timm", "reference")
    assert_same(read_state_dict(tmp_path / "a.pth"), read_state_dict(files / "reference.pth"))
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors", "timm")
    assert_same(read_state_dict(tmp_path / "b.safetensors"), model.state_dict())
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "reference")
    assert_same(read_state_dict(tmp_path / "c.safetensors"), to_reference(model.state_dict()))


@torch.no_grad()
def test_converted_files_are_what_timm_and_deploy_take(files, model, tmp_path):
    image = torch.randn(1, 3, 64, 64)
    convert(files / "reference.pth", tmp_path / "timm.pth", "timm")
    port = TimmSHViT(num_classes=10, **vars(VARIANTS["shvit_s1"]), types=("i", "s", "s")).eval()
    port.load_state_dict(read_state_dict(tmp_path / "timm.pth"), strict=True)
    torch.testing.assert_close(port(image), model(image))
    convert(files / "reference.pth", tmp_path / "deployed.safetensors", "deployed")
    deployed = create_model("shvit_s1", tmp_path / "deployed.safetensors")
    assert deployed.deployed
    torch.testing.assert_close(deployed(image), model(image), rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="folded for good"):
        convert(tmp_path / "deployed.safetensors", tmp_path / "back.pth", "timm")
    assert not (tmp_path / "back.pth").exists()


def test_conversion_takes_the_averaged_weights_when_asked(model, tmp_path):
    averaged = {**model.state_dict(), "head.l.bias": torch.ones(10)}
    torch.save({"model": model.state_dict(), "model_ema": averaged}, tmp_path / "run.pth")
    convert(tmp_path / "run.pth", tmp_path / "ema.pth", "timm", "--ema")
    assert read_checkpoint(tmp_path / "ema.pth").state_dict["head.l.bias"].eq(1).all()
    convert(tmp_path / "run.pth", tmp_path / "plain.pth", "timm")
    assert_same(read_state_dict(tmp_path / "plain.pth"), model.state_dict())


@torch.no_grad()
def test_two_deployed_heads_are_recognized_and_made_one(tmp_path):
    source = timm.create_model("shvit_s1", num_classes=10, in_chans=1, distilled=True).eval()
    write_checkpoint(reparameterize_model(source).state_dict(), tmp_path / "two.pth")
    identity = run(["weights", "check", str(tmp_path / "two.pth")])["checks"][0]["identity"]
    assert (identity["layout"], identity["distilled"], identity["num_classes"]) == ("deployed", True, 10)
    convert(tmp_path / "two.pth", tmp_path / "one.pth", "deployed")
    one, image = create_model("shvit_s1", tmp_path / "one.pth"), torch.randn(1, 1, 64, 64)
    assert not one.distilled
    torch.testing.assert_close(one(image), source(image), rtol=1e-3, atol=1e-3)


def test_a_detectors_backbone_is_taken_alone(model, tmp_path):
    backbone = {f"backbone.{k}": v for k, v in to_reference(model.state_dict()).items() if not k.startswith("head.")}
    write_checkpoint({**backbone, "neck.weight": torch.ones(1)}, tmp_path / "detector.pth")
    source = convert(tmp_path / "detector.pth", tmp_path / "backbone.safetensors", "timm")["source"]
    assert (source["beside"], source["num_classes"], source["layout"]) == (1, 0, "reference")
    converted = read_state_dict(tmp_path / "backbone.safetensors")
    assert_same(converted, {k: v for k, v in model.state_dict().items() if not k.startswith("head.")})


def test_conversion_refuses_before_it_works(files, tmp_path, monkeypatch):
    monkeypatch.setattr("shvit.weights.layouts.convert", None)
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "same.pth").symlink_to(files / "reference.pth")
    with pytest.raises(InputError, match="is the source too"):
        convert(files / "reference.pth", tmp_path / "same.pth", "timm")
    with pytest.raises(InputError, match=r"unknown suffix '\.onnx'"):
        convert(files / "reference.pth", tmp_path / "a.onnx", "timm")
    with pytest.raises(InputError, match="is a folder"):
        convert(files / "reference.pth", tmp_path / "folder.pth", "timm")


def test_variants_are_told_by_shape(model):
    for name in VARIANTS:
        with torch.device("meta"):
            assert variant_of(timm.create_model(name, distilled=True).state_dict()) == name
    assert variant_of(deploy(model).state_dict()) == "shvit_s1"
    shallower = {key: value for key, value in model.state_dict().items() if not key.startswith("stages.2.blocks.4.")}
    assert variant_of(shallower) is None
    assert variant_of({**model.state_dict(), "stages.0.blocks.0.conv.m.c.weight": torch.tensor(1.0)}) is None


def test_commands_are_those_of_the_contract():
    assert list(commands.WEIGHTS) == ["list", "pull", "check", "convert"]
