"""What a run knows travels with its weights, and every command uses it or is told so."""

import json
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from shvit.certificate import certificate_path
from shvit.checkpoint import write_checkpoint
from shvit.cli import run
from shvit.errors import CheckFailed, InputError
from shvit.export.labels import contradiction, find_labels, match_classes
from shvit.export.spec import open_model, open_weights
from shvit.files import sha256
from shvit.img_size import ImgSize
from shvit.train.data.datasets import open_splits
from shvit.train.distributed import World
from shvit.train.loop import train
from shvit.train.recipe import Data, Distill
from shvit.train.step.setup import set_up
from shvit.weights.imagenet import imagenet_ids, imagenet_names
from shvit.weights.resolve import resolve_weights
from shvit.weights.run_info import RUN_KEY, RunInfo, read_run_info
from tests.conftest import SMALL, create_tiny, randomize

INFO = RunInfo("tiny_vit", ("b", "a", "c"), 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", 1.0, "squash")


def always(index: int, classes: int = 3) -> dict[str, torch.Tensor]:
    """Weights of a model that takes every image for one class."""
    model = create_tiny(num_classes=classes)
    torch.nn.init.zeros_(model.head.l.weight)
    torch.nn.init.constant_(model.head.l.bias, 0)
    model.head.l.bias.data[index] = 10
    return model.state_dict()


def class_folders(root: Path, counts: dict[str, int]) -> Path:
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(root / name / f"{name}{index}.png")
    return root


# --- what training writes ---------------------------------------------------------------------------------------------


def test_every_checkpoint_of_a_run_knows_it_wherever_it_is_copied(recipe, tmp_path, capsys):
    result = train(replace(recipe, model=SMALL, epochs=1, img_size=48, first_img_size=32), tmp_path / "run")
    (tmp_path / "else").mkdir()
    config = timm.data.resolve_data_config(model=timm.create_model(SMALL))
    for name in ("best.safetensors", "best_ema.safetensors", "last.pt"):
        copy = Path(shutil.copy(tmp_path / "run" / name, tmp_path / "else" / f"mine-{name}"))
        info = read_run_info(copy)
        assert (info.model, info.classes, info.img_size) == (SMALL, ("blue", "red"), (48, 48))
        assert (info.mean, info.crop_pct) == (config["mean"], config["crop_pct"])
    best = tmp_path / "else" / "mine-best.safetensors"
    assert timm.create_model(SMALL, num_classes=2, checkpoint_path=best).num_classes == 2
    capsys.readouterr()
    evaluated = run(["eval", "--checkpoint", str(best), "--data", str(recipe.data.root)])
    assert evaluated["top1"] == pytest.approx(result["top1"])
    assert f"{SMALL} at 48 px, 2 classes" in capsys.readouterr().out
    run(["eval", "--checkpoint", str(best), "--data", str(recipe.data.root), "--img-size", "32"])
    assert "was trained for 48 px; --img-size 32 was asked for" in capsys.readouterr().out


def test_an_older_run_is_known_by_the_recipe_beside_its_files_alone(tmp_path):
    record = {"recipe": {"model": "tiny_vit", "img_size": 48}, "classes": ["1", "yes"], "data": {"count": 3}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(record))
    for name in ("best.safetensors", "mine.safetensors"):
        save_file(create_tiny(num_classes=2).state_dict(), tmp_path / name)
    torch.save({"model": create_tiny(num_classes=2).state_dict()}, tmp_path / "last-1.pt")
    for name in ("best.safetensors", "last-1.pt"):
        assert read_run_info(tmp_path / name) == RunInfo("tiny_vit", ("1", "yes"), 48, data={"count": 3})
    assert read_run_info(tmp_path / "mine.safetensors") is None


def test_timms_layout_is_known_by_its_config(tmp_path):
    cfg = {"input_size": [3, 48, 48], "mean": [0.5] * 3, "std": [0.2] * 3, "crop_pct": 0.9, "interpolation": "bilinear"}
    config = {"architecture": "tiny_vit", "num_classes": 3, "label_names": ["x", "y", "z"], "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(create_tiny(num_classes=3).state_dict(), tmp_path / "model.safetensors")
    _, spec = open_model(None, tmp_path / "model.safetensors")
    assert (spec.model, spec.img_size, spec.mean, spec.crop_pct) == ("tiny_vit", (48, 48), (0.5, 0.5, 0.5), 0.9)


@pytest.mark.parametrize(("size", "text"), [(64, "64"), ((64, 96), "64x96")])
def test_model_of_one_size_is_opened_at_its_runs(tmp_path, size, text):
    model = timm.create_model("test_vit", num_classes=2, img_size=size)
    write_checkpoint(model.state_dict(), tmp_path / "v.safetensors", RunInfo("test_vit", ("a", "b"), size).metadata)
    opened, spec = open_model(None, tmp_path / "v.safetensors")
    assert str(spec.img_size) == text
    assert opened(spec.blank()).shape == (1, 2)
    assert open_model(None, tmp_path / "v.safetensors", size)[1] == spec
    for other in (96, (96, 64)):
        with pytest.raises(InputError, match=f"takes {text} px only; leave out --img-size {ImgSize.of(other)}"):
            open_model(None, tmp_path / "v.safetensors", other)


def test_a_size_that_is_not_square_is_known_wherever_it_is_written(tmp_path):
    config = {"architecture": "tiny_vit", "pretrained_cfg": {"input_size": [3, 48, 96]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "recipe.yaml").write_text("recipe: {model: tiny_vit, img_size: 48x96}\nclasses: [a, b, c]")
    weights, info = create_tiny(num_classes=3).state_dict(), RunInfo("tiny_vit", ("a", "b", "c"), (48, 96))
    write_checkpoint(weights, tmp_path / "own.safetensors", info.metadata)
    for name in ("best.safetensors", "model.safetensors"):
        write_checkpoint(weights, tmp_path / name)
    for name in ("best.safetensors", "model.safetensors", "own.safetensors"):
        lines = []
        _, spec = open_weights(resolve_weights(None, tmp_path / name), log=lines.append)
        assert spec.shape == (3, 48, 96), name
        assert lines == [], name
    assert json.loads(info.metadata[RUN_KEY])["img_size"] == [48, 96]
    assert json.loads(RunInfo("tiny_vit", (), 48).metadata[RUN_KEY])["img_size"] == 48  # as older versions read it


def test_another_size_than_the_runs_is_reported(tmp_path):
    info = RunInfo("tiny_vit", ("a", "b", "c"), (48, 96), crop_pct=0.7)
    write_checkpoint(create_tiny(num_classes=3).state_dict(), tmp_path / "t.safetensors", info.metadata)
    lines = []
    open_weights(resolve_weights(None, tmp_path / "t.safetensors"), (64, 96), log=lines.append)
    assert [line.partition(": ")[2] for line in lines] == [
        "was trained for 48x96 px; --img-size 64x96 was asked for",
        "crop_pct 0.7, as in its run; timm has other values for tiny_vit",
    ]


@pytest.mark.parametrize("to", ["timm", "reference", "deployed"])
def test_conversion_keeps_it(tmp_path, to):
    info = RunInfo("shvit_s1", ("a", "b", "c"), 64, data={"train": {"count": 3}})
    model = randomize(timm.create_model("shvit_s1", num_classes=3))
    write_checkpoint(model.state_dict(), tmp_path / "s1.safetensors", info.metadata)
    for name in ("out.pth", "out.safetensors"):
        run(["weights", "convert", f"{tmp_path}/s1.safetensors", f"{tmp_path}/{name}", "--to", to])
        assert read_run_info(tmp_path / name) == info


BROKEN = {
    "no JSON": "{",
    "nested": "[" * 100_000,
    "no object": "[1]",
    "newer": json.dumps({"format": 2}),
    "nothing": json.dumps({"format": 1}),
    "number": json.dumps({"format": 1, "model": "tiny_vit", "classes": [1, 2, 3], "img_size": 32}),
    "escape": json.dumps({"format": 1, "model": "tiny_vit", "classes": ["\x1b[2J", "b", "c"], "img_size": 32}),
    "half a character": json.dumps({"format": 1, "model": "tiny_vit", "classes": ["\udc80", "b"], "img_size": 32}),
    "twice": json.dumps({"format": 1, "model": "tiny_vit", "classes": ["a", "a", "c"], "img_size": 32}),
    "size": json.dumps({"format": 1, "model": "tiny_vit", "classes": [], "img_size": 10**9}),
    **{
        f"size {name}": json.dumps({"format": 1, "model": "tiny_vit", "classes": [], "img_size": size})
        for name, size in {
            "three": [1, 2, 3],
            "text": ["a", 1],
            "long": [10**30, 1],
            "none": None,
            "nested": [[1, 2]],
            "many": [1] * 10_000,
            "words": "x" * 10_000,
            "float": [1.5, 2],
            "zero": [0, 4],
        }.items()
    },
    "bool": json.dumps({"format": 1, "model": "tiny_vit", "classes": [], "img_size": True}),
    "scheme": json.dumps({"format": 1, "model": "detector:x.py", "classes": [], "img_size": 32}),
    "infinite": '{"format": 1, "model": "tiny_vit", "classes": [], "img_size": 32, "mean": [1e999]}',
    "std": json.dumps({"format": 1, "model": "tiny_vit", "classes": [], "img_size": 32, "std": [0, 1, 1]}),
    "crop": json.dumps({"format": 1, "model": "tiny_vit", "classes": [], "img_size": 32, "crop_pct": "x"}),
    "data": json.dumps({"format": 1, "model": "tiny_vit", "classes": [], "img_size": 32, "data": [[[[[[1]]]]]]}),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_what_no_run_says_is_refused_in_one_line(tmp_path, text):
    write_checkpoint({"head.weight": torch.zeros(1)}, tmp_path / "x.safetensors", {RUN_KEY: text})
    with pytest.raises(InputError, match=r"x\.safetensors") as error:
        read_run_info(tmp_path / "x.safetensors")
    assert len(str(error.value)) < 500
    assert str(error.value).isprintable()


def test_recipes_that_unfold_or_run_code_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "best.safetensors")
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    head = "recipe: {model: tiny_vit, img_size: 32}\n"
    for text in (
        f"{bomb}{head}classes: [a]\ndata: {{x: *a59}}\n",
        f"{head}classes: !!python/object/apply:os.getcwd []\n",
    ):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(InputError, match=r"recipe\.yaml"):
            read_run_info(tmp_path / "best.safetensors")


def test_a_head_of_other_classes_begins_anew_and_such_a_teacher_is_refused(recipe, tmp_path):
    """Of as many classes: nothing but their names tells."""
    source = randomize(timm.create_model("shvit_s1", num_classes=2))
    world = World(0, 1, torch.device("cpu"))
    for classes, kept in ((("blue", "red"), True), (("red", "blue"), False), (("cat", "dog"), False)):
        write_checkpoint(source.state_dict(), tmp_path / "s.safetensors", RunInfo("shvit_s1", classes, 32).metadata)
        started = replace(recipe, model="shvit_s1", checkpoint=tmp_path / "s.safetensors")
        model = set_up(started, world, ["blue", "red"], 1, 1).model
        assert torch.equal(model.head.l.weight, source.head.l.weight) == kept
        assert torch.equal(model.patch_embed[0].c.weight, source.patch_embed[0].c.weight)
    distill = Distill(teacher="shvit_s1", checkpoint=tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="the teacher was trained on other classes"):
        set_up(replace(recipe, distill=distill), world, ["blue", "red"], 1, 1)


# --- which weights ----------------------------------------------------------------------------------------------------


def test_a_shvit_is_known_by_its_widths_and_others_want_a_name(tmp_path):
    save_file(timm.create_model("shvit_s2", num_classes=2).state_dict(), tmp_path / "s2.safetensors")
    save_file(timm.create_model(SMALL, num_classes=2).state_dict(), tmp_path / "other.safetensors")
    found = resolve_weights(None, tmp_path / "s2.safetensors")
    assert (found.model, found.info, found.classes) == ("shvit_s2", None, ())
    with pytest.raises(InputError, match="give --model NAME"):
        resolve_weights(None, tmp_path / "other.safetensors")
    assert resolve_weights(SMALL, tmp_path / "other.safetensors").model == SMALL


def test_another_model_than_the_runs_is_an_error_that_names_the_runs(tmp_path):
    write_checkpoint(always(0), tmp_path / "t.safetensors", INFO.metadata)
    with pytest.raises(InputError, match="it was trained as tiny_vit, so leave out --model shvit_s1"):
        open_model("shvit_s1", tmp_path / "t.safetensors")


def test_published_weights_are_found_by_name_and_by_hash_and_know_imagenet(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("SHVIT_CACHE", str(cache))
    write_checkpoint(timm.create_model("shvit_s1").state_dict(), cache / "shvit_s1.in1k.safetensors")
    own = tmp_path / "own.safetensors"
    shutil.copy(cache / "shvit_s1.in1k.safetensors", own)
    assert resolve_weights(None, own).classes == ()  # 1000 classes, and nothing says that they are ImageNet's
    record = {"sha256": sha256(own), "size_bytes": 1, "url": "https://x", "date": "2026-01-01"}
    (cache / "lock.json").write_text(json.dumps({"shvit_s1.in1k": record}))
    by_name, by_hash = resolve_weights(None, "shvit_s1.in1k"), resolve_weights(None, own)
    pretrained = resolve_weights("shvit_s1", None, pretrained=True)
    for found in (by_name, by_hash, pretrained):
        assert (found.model, found.classes, found.info.img_size) == ("shvit_s1", imagenet_names(), (224, 224))
    assert by_name.checkpoint == pretrained.checkpoint
    run(["weights", "convert", str(own), f"{tmp_path}/fast.safetensors", "--to", "deployed"])
    assert resolve_weights(None, tmp_path / "fast.safetensors").classes == imagenet_names()
    assert resolve_weights("shvit_s1", None).classes == ()  # random weights


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shvit_s1.in1", r"no published checkpoint of that name; choose from shvit_s1\.in1k"),
        ("shvit_s1.pth", r"no such file; shvit_s1 is the name of published weights"),
        ("runs/best.safetensors", "no such file"),
    ],
)
def test_a_name_that_is_none_suggests_others(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        resolve_weights(None, name)


def test_timms_weights_become_a_file_that_knows_them(tmp_path, monkeypatch):
    """timm's own download is replaced: here is no network."""
    monkeypatch.setenv("SHVIT_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="timm has no weights of 'tiny_vit'"):
        resolve_weights("tiny_vit", None, pretrained=True)
    made = timm.create_model("resnet10t")
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append(options) or made)
    first, again = (resolve_weights("resnet10t", None, pretrained=True) for _ in range(2))
    assert asked == [{"pretrained": True}]
    assert first == again
    assert first.classes == imagenet_names()
    assert load_file(first.checkpoint).keys() == made.state_dict().keys()

    def offline(name, **options):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"resnet18: timm's weights cannot be fetched \(no route\)"):
        resolve_weights("resnet18", None, pretrained=True)


# --- classes by name --------------------------------------------------------------------------------------------------


def test_folders_are_matched_to_classes_by_name(tmp_path, capsys):
    """The model takes everything for "a", its second class, which is the first folder."""
    write_checkpoint(always(1), tmp_path / "m.safetensors", INFO.metadata)
    data = class_folders(tmp_path / "data", {"a": 3, "b": 2, "c": 1})
    result = run(["eval", "--checkpoint", f"{tmp_path}/m.safetensors", "--data", str(data)])
    assert result["top1"] == pytest.approx(50)
    assert result["per_class"] == pytest.approx((0, 100, 0))
    shutil.rmtree(data / "b")
    result = run(["eval", "--checkpoint", f"{tmp_path}/m.safetensors", "--data", str(data)])
    assert (result["top1"], result["n"]) == (75, 4)
    assert "1 of the model's 3 classes are not in it (b)" in capsys.readouterr().out
    class_folders(data, {"A": 4})
    options = ["eval", "--checkpoint", f"{tmp_path}/m.safetensors", "--data", str(data)]
    with pytest.raises(
        InputError, match=r"1 classes that the model does not know: A \('A' may be 'a'\); it knows b, a, c"
    ):
        run(options)
    result = run([*options, "--skip-unknown-classes"])
    assert (result["top1"], result["n"], result["left_out"]) == (75, 4, 4)


def test_without_names_only_the_number_of_classes_is_compared(tmp_path):
    save_file(always(1), tmp_path / "m.safetensors")
    data = class_folders(tmp_path / "data", {"x": 3, "y": 3, "z": 1})
    options = ["eval", "--model", "tiny_vit", "--checkpoint", f"{tmp_path}/m.safetensors", "--img-size", "32", "--data"]
    assert run([*options, str(data)])["per_class"] == (0, 100, 0)
    with pytest.raises(InputError, match="--skip-unknown-classes does not apply"):
        run([*options, str(data), "--skip-unknown-classes"])
    shutil.rmtree(data / "z")
    with pytest.raises(InputError, match="has 2 classes and the model 3"):
        run([*options, str(data)])


def test_names_are_equal_however_their_accents_are_written():
    apart = unicodedata.normalize("NFD", "café")
    assert apart != "café"
    assert match_classes(["bar", apart], ["café", "bar"]).index == (1, 0)
    assert match_classes(["café", apart], ["café", "bar"]).index == (0, -1)
    assert match_classes(["café", apart], [apart, "café"]).index == (1, 0)
    with pytest.raises(InputError, match="a class name is given twice"):
        RunInfo("shvit_s1", ("café", apart), 32)


def test_imagenets_folders_may_be_ids_names_or_numbers():
    ids, names = imagenet_ids(), imagenet_names()
    for classes in (ids, names):
        assert match_classes([ids[7], names[8], "9", "x"], classes).index == (7, 8, 9, -1)
    assert match_classes(["7"], [f"own {i}" for i in range(1000)]).index == (-1,)


# --- labels -----------------------------------------------------------------------------------------------------------

TEXT = "bar\r\ndisc\r\n\r\n"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + TEXT.encode(),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.replace("\r\n", "\r").encode(),
        TEXT.replace("\r\n", "\n").encode(),
        b"bar\ndisc",
    ],
)
def test_labels_are_read_as_every_editor_writes_them(tmp_path, content):
    (tmp_path / "labels.txt").write_bytes(content)
    assert find_labels(tmp_path / "labels.txt", 2) == ["bar", "disc"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT.encode("utf-16-le"), "line 1 holds control characters"),
        (TEXT.encode("utf-32-be"), "line 1 holds control characters"),
        ("bar\u2028x\ndisc".encode(), "line 1 holds control characters"),
        (b"bar\n\ndisc\n", "line 2 is empty"),
        (b"bar\nbar\n", "'bar' stands there twice"),
        (b"bar\n", "has 1 lines, and the model 2 classes"),
    ],
)
def test_labels_that_are_no_names_are_refused(tmp_path, content, message):
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        find_labels(tmp_path / "labels.txt", 2)


def test_labels_that_contradict_the_runs_are_refused(tmp_path):
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    assert find_labels(tmp_path / "labels.txt", 3, ("a", "b", "c")) == ["a", "b", "c"]
    with pytest.raises(InputError, match="in another order: class 0 of the model is 'b', and the labels say 'a'"):
        find_labels(tmp_path / "labels.txt", 3, ("b", "a", "c"))
    with pytest.raises(InputError, match=r"class 2 of the model is 'd', and the labels say 'c'; leave out --labels"):
        find_labels(tmp_path / "labels.txt", 3, ("a", "b", "d"))
    assert find_labels(None, 3, ("b", "a", "c")) == ["b", "a", "c"]
    assert find_labels(None, 1000) == []


def test_imagenets_classes_may_be_called_otherwise_but_not_in_another_order():
    short = [name.split(",")[0] + str(i) for i, name in enumerate(imagenet_names())]
    assert contradiction(short, imagenet_names()) is None
    assert contradiction(imagenet_ids(), imagenet_names()) is None
    for order in (imagenet_ids(), imagenet_names()):
        assert "in another order" in contradiction(sorted(order, reverse=True), imagenet_names())


# --- export and verify ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint that knows its run, and its file, exported without a further word."""
    folder = tmp_path_factory.mktemp("exported")
    write_checkpoint(create_tiny(num_classes=3).state_dict(), folder / "m.safetensors", INFO.metadata)
    run(["export", "onnx", "--checkpoint", f"{folder}/m.safetensors", "--output", f"{folder}/m.onnx"])
    return folder


def test_export_takes_everything_from_the_run(exported):
    said = {prop.key: prop.value for prop in onnx.load(exported / "m.onnx").metadata_props}
    assert json.loads(said["shvit.labels"]) == ["b", "a", "c"]
    spec = json.loads(said["shvit.spec"])
    assert (spec["model"], spec["img_size"], spec["mean"], spec["std"]) == ("tiny_vit", 32, [0.5] * 3, [0.25] * 3)
    assert (spec["interpolation"], spec["crop_pct"], spec["crop_mode"]) == ("bilinear", 1.0, "squash")


def test_verify_takes_model_and_weights_from_the_certificate(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["verify", f"{exported}/m.onnx"])["checkpoint"] == f"{exported}/m.safetensors"
    moved = tmp_path / "moved"
    shutil.copytree(exported, moved)
    record = json.loads(certificate_path(moved / "m.onnx").read_text())
    certificate_path(moved / "m.onnx").write_text(json.dumps({**record, "checkpoint": "elsewhere/m.safetensors"}))
    assert run(["verify", f"{moved}/m.onnx"])["passed"]
    with pytest.raises(CheckFailed, match="was made from another model: tiny_vit, not shvit_s1"):
        run(["verify", f"{moved}/m.onnx", "--model", "shvit_s1"])
    write_checkpoint(create_tiny(1, num_classes=3).state_dict(), tmp_path / "other.safetensors", INFO.metadata)
    with pytest.raises(CheckFailed, match=r"was made from another checkpoint: its weights are SHA-256 .*other"):
        run(["verify", f"{moved}/m.onnx", "--checkpoint", f"{tmp_path}/other.safetensors"])
    shutil.copy(tmp_path / "other.safetensors", moved / "m.safetensors")
    with pytest.raises(CheckFailed, match="was made from another checkpoint"):
        run(["verify", f"{moved}/m.onnx"])
    (moved / "m.safetensors").unlink()
    with pytest.raises(InputError, match=r"names elsewhere/m\.safetensors, which is not there; give --checkpoint"):
        run(["verify", f"{moved}/m.onnx"])
    certificate_path(moved / "m.onnx").unlink()
    with pytest.raises(InputError, match="no certificate beside it names its weights; give --checkpoint"):
        run(["verify", f"{moved}/m.onnx"])


def test_a_truncated_file_has_changed_and_is_not_opened(exported, tmp_path):
    for name in ("m.onnx", "m.onnx.certificate.json"):
        shutil.copy(exported / name, tmp_path)
    (tmp_path / "m.onnx").write_bytes((tmp_path / "m.onnx").read_bytes()[:1000])
    for command in ("verify", f"eval --data {exported} --artifact", "bench --models"):
        with pytest.raises(CheckFailed, match="has changed since it was certified"):
            run([*command.split(), f"{tmp_path}/m.onnx"])


def test_a_file_is_evaluated_on_what_its_run_kept_for_validation(tmp_path, capsys):
    """As its checkpoint is: the certificate tells the images that the weights were trained on."""
    data = class_folders(tmp_path / "data", {"a": 40, "b": 40, "c": 40})
    identity = {**open_splits(Data(root=data)).identity(), "group": None}
    info = replace(INFO, data=identity)
    write_checkpoint(create_tiny(num_classes=3).state_dict(), tmp_path / "m.safetensors", info.metadata)
    run(["export", "onnx", "--checkpoint", f"{tmp_path}/m.safetensors", "--output", f"{tmp_path}/m.onnx"])
    evaluate = ["eval", "--data", str(data), "--artifact", f"{tmp_path}/m.onnx"]
    assert run(evaluate)["n"] == identity["val"]["count"] < 40
    assert "the part that this run kept for validation" in capsys.readouterr().out
    assert run([*evaluate, "--all-images"])["n"] == 120
    for index in range(30):  # of which some would have been kept
        shutil.copy(data / "a" / "a0.png", data / "a" / f"new{index}.png")
    assert run(evaluate)["n"] == 150
    assert "which of them this run was trained on, if any, is not known" in capsys.readouterr().out


def test_labels_in_another_order_than_the_runs_are_found_out(exported, tmp_path):
    proto = onnx.load(exported / "m.onnx")
    (said,) = [prop for prop in proto.metadata_props if prop.key == "shvit.labels"]
    said.value = json.dumps(["a", "b", "c"])
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(CheckFailed, match="labels in another order: class 0"):
        run(["verify", f"{tmp_path}/m.onnx", "--checkpoint", f"{exported}/m.safetensors"])


# --- options that do not apply ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval --data D --artifact m.onnx --model tiny_vit --ema", "--model and --ema do not apply"),
        ("eval --data D --artifact m.onnx --checkpoint m.safetensors", "--checkpoint does not apply"),
        ("eval --data D --checkpoint m.safetensors --split test", "--split does not apply"),
        ("eval --data D --checkpoint m.safetensors --ema", "has no EMA weights"),
        ("eval --data D --checkpoint m.safetensors --pretrained", "--checkpoint does not apply"),
        ("eval --data D --model shvit_s1", "nothing trained to evaluate"),
        ("eval --data V --checkpoint m.safetensors --all-images", "--all-images does not apply: V has a part"),
        ("eval --data= --checkpoint m.safetensors", "--data is empty"),
        ("export onnx --output x.onnx --checkpoint one.safetensors --img-size 64 --softmax", "has one output"),
        ("export onnx --output x.onnx --classifier", "not an option of `shvit export onnx`, but of coreml"),
        ("export coreml --output x.mlpackage --raw-pixels", "but of executorch, litert, ncnn, onnx and openvino"),
        ("bench --models m.safetensors", "is a file of weights and not a model's name; .* --checkpoint"),
        ("export onnx --output x.onnx", "which model"),
        ("export onnx --output x.onnx --pretrained", "of which model"),
        ("export onnx --output x.onnx --model tiny_vit --ema", "--ema does not apply"),
        ("export onnx --output x.onnx --checkpoint m.safetensors --features --labels l.txt", "--labels does not apply"),
        ("export onnx --output x.onnx --checkpoint m.safetensors --calibration D", "--calibration does not apply"),
        ("export coreml --output x.mlpackage --checkpoint m.safetensors --precision int8 --calibration D", "learns"),
        ("verify m.onnx --ema", "not the EMA weights"),
        ("bench --checkpoint m.safetensors --pretrained", "--checkpoint does not apply"),
        ("bench --models m.onnx --runtimes openvino --img-size 64", "--runtimes and --img-size do not apply"),
        ("site --models m.onnx --checkpoint m.safetensors --output s", "--checkpoint does not apply"),
    ],
)  # fmt: skip
def test_options_that_do_not_apply_are_refused(exported, monkeypatch, command, message):
    monkeypatch.chdir(exported)
    monkeypatch.setattr("shvit.export.browser.ort_web.runtime_files", lambda *_: {})
    if not (exported / "D").exists():
        class_folders(exported / "D", {"a": 1, "b": 1, "c": 1})
        class_folders(exported / "V" / "val", {"a": 1, "b": 1, "c": 1})
        write_checkpoint(timm.create_model("shvit_s1", num_classes=1).state_dict(), exported / "one.safetensors")
    with pytest.raises((InputError, CheckFailed), match=message):
        run(command.split())


# --- run folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top1", "ema", "best"), [(70.0, 60.0, "best"), (60.0, 60.0, "best_ema"), (0, 1, "best_ema")])
def test_a_run_folder_stands_for_its_best_weights(tmp_path, top1, ema, best):
    for name in ("best", "best_ema"):
        write_checkpoint(always(0), tmp_path / f"{name}.safetensors", INFO.metadata)
    metrics = [{"top1": 1.0, "ema_top1": 1.0}, {"top1": top1, "ema_top1": ema}, {"top1": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in metrics))
    said = []
    assert resolve_weights(None, tmp_path, log=said.append).checkpoint == tmp_path / f"{best}.safetensors"
    assert f"its best weights are {best}.safetensors" in said[0]


def test_a_folder_without_weights_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"is a folder without best_ema\.safetensors or best\.safetensors; give"):
        resolve_weights(None, tmp_path)


def test_metrics_of_somebody_else_are_one_line(tmp_path):
    for name in ("best", "best_ema"):
        write_checkpoint(always(0), tmp_path / f"{name}.safetensors", INFO.metadata)
    (tmp_path / "metrics.jsonl").write_text("[[")
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 1: not readable as JSON"):
        resolve_weights(None, tmp_path)
