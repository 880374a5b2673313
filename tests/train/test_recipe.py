"""What recipes say, and recipes from files."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import yaml

from shvit.errors import InputError
from shvit.train.checks import check_fields
from shvit.train.main import Train, parse
from shvit.train.recipe import Recipe, differences, read_recipe
from shvit.train.recipes import DEMO, DESCRIPTIONS, FINETUNE_384, FINETUNE_512, RECIPES
from shvit.train.run.run_folder import RunFolder


@pytest.mark.parametrize(
    ("name", "img_size", "weight_decay"),
    [("s1", 224, 0.025), ("s2", 224, 0.032), ("s3", 224, 0.035), ("s4", 256, 0.03)],
)
def test_paper_recipes_have_the_papers_numbers(name, img_size, weight_decay):
    recipe = RECIPES[name]
    assert (recipe.model, recipe.optim.weight_decay) == (f"shvit_{name}", weight_decay)
    assert recipe.img_size == (img_size, img_size)
    assert (recipe.epochs, recipe.batch_size, recipe.compute.device_batch_size) == (300, 2048, 256)
    optim, augment = recipe.optim, recipe.augment
    assert recipe.peak_lr == pytest.approx(4e-3)
    assert (optim.opt, optim.eps, optim.betas) == ("adamw", 1e-8, (0.9, 0.999))
    assert (optim.schedule, optim.warmup_epochs, optim.warmup_lr, optim.min_lr) == ("cosine", 5, 1e-6, 1e-5)
    assert (optim.clip_grad, optim.clip_mode) == (0.02, "agc")
    assert (augment.auto_augment, augment.color_jitter, augment.interpolation) == (
        "rand-m9-mstd0.5-inc1", 0.4, "bicubic"
    )  # fmt: skip
    assert (augment.mixup, augment.cutmix, augment.mixup_switch_prob, augment.smoothing) == (0.8, 1.0, 0.5, 0.1)
    assert (augment.random_erasing, augment.repeats, recipe.drop_path) == (0.25, 3, 0.0)
    assert recipe.ema_decay == 0.99996


def test_fine_tuning_and_distillation_differ_from_training_as_published():
    assert (FINETUNE_512.img_size, FINETUNE_384.img_size, FINETUNE_512.epochs) == ((512, 512), (384, 384), 30)
    assert FINETUNE_512.peak_lr == pytest.approx(4e-5)
    assert FINETUNE_512.optim.weight_decay == 1e-8
    for name in ("s1", "s2", "s3", "s4"):
        recipe = RECIPES[f"distill_{name}"]
        assert replace(recipe, distill=Recipe().distill) == RECIPES[name]
        assert (recipe.distill.alpha, recipe.distill.tau) == (0.5, 1.0)
        assert recipe.distill.teacher in timm.list_pretrained("regnety_160*")


def test_every_recipe_has_a_description_and_a_model_of_ours():
    assert RECIPES.keys() == DESCRIPTIONS.keys()
    assert {recipe.model for recipe in RECIPES.values()} <= set(timm.list_models(module="shvit"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_comes_back_from_a_file_as_it_was(name, tmp_path):
    recipe = replace(RECIPES[name], checkpoint=tmp_path / "x.pth", first_img_size=64)
    run = {"recipe": recipe.as_dict(), "data": {"train": {"count": 1}, "val": None}, "versions": {"torch": "2"}}
    for content in (recipe.as_dict(), run):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        assert read_recipe(tmp_path / "recipe.yaml") == recipe


SIZES = "give 1 to 4096 px as one number, such as 224, or as HEIGHTxWIDTH, such as 224x640"
NO_SIZES = ("0", "0x3", "224x", "abc", "1x2x3", "5000", "1:30", "010", "true", "1.5", "", "224 640", "-3", "9" * 5000,
            "[1, 2, 3]", "[1]", "[]", "[a, 1]", "{h: 1}")  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epohcs: 3", "unknown field 'epohcs'; did you mean 'epochs'?"),
        *((f"img_size: {text}", SIZES) for text in NO_SIZES),
        ("optim: {learning_rate: 3}", "unknown field 'optim.learning_rate'"),
        ("epochs: three", "epochs is 'three'; input should be a valid integer"),
        ("epochs: '3'", "epochs is '3'; input should be a valid integer"),
        ("augment: {scale: [0.1]}", "augment.scale"),
        ("compute: {precision: fp8}", "compute.precision is 'fp8'; input should be 'fp32', 'bf16' or 'fp16'"),
        ("freeze_bn: 1", "freeze_bn is 1; input should be a valid boolean"),
        ("- epochs", "a recipe is a mapping of fields"),
        ("a: [", "not readable as YAML"),
        ("[" * 3000, "not readable as YAML"),
        ("a: &a [*a]", "not readable as YAML"),
        ("? [a, b]\n: 3", "not readable as YAML (a key is not a word)"),
        ("epochs: 1\n---\nepochs: 2", "not readable as YAML (expected a single document"),
        ("epochs: 010", "epochs is 010, which is octal to some readers"),
        ("epochs: 08", "epochs is 08, which is octal to some readers"),
        ("save: {every_minutes: 1:30}", "save.every_minutes is 1:30, which counts in sixties to some readers"),
        ("save: {every_minutes: 5m}", "save.every_minutes is '5m'; input should be a valid number"),
        ("epochs: 2024-01-01", "epochs is '2024-01-01'; input should be a valid integer"),
        ("epochs: 1,000", "epochs is '1,000'; input should be a valid integer"),
        ("epochs: 3.5", "epochs is 3.5; input should be a valid integer"),
        ("epochs:", "epochs is None; input should be a valid integer"),
        ("optim: {lr: .nan}", "optim.lr is nan; input should be a finite number"),
        ("optim: {lr: 1e400}", "optim.lr is inf; input should be a finite number"),
        ("freeze_bn: 'yes'", "freeze_bn is 'yes'; input should be a valid boolean"),
        ("epochs: 3\nepochs: 4", "the key 'epochs' stands twice in one mapping"),
        ("optim: {lr: 1, opt: sgd, lr: 2}", "the key 'lr' stands twice in one mapping"),
        ("recipe: {epochs: 3}\nrecipe: {epochs: 4}", "the key 'recipe' stands twice in one mapping"),
        ("recipe: {epochs: 3}\nseed: 4", "seed stands beside recipe and would not be read; move it below recipe"),
        ("optim: {lr: 1}\nrecipe: {epochs: 3}", "optim stands beside recipe and would not be read"),
        ("recipe: {epochs: 3}\ndata: {root: x}", "data stands beside recipe and would not be read"),
        ("optim.lr: 1e-3", "'optim.lr' is not a top-level field; write lr below optim, as optim: {lr: …}"),
        ("!!python/object/apply:os.system ['true']", "not a readable recipe"),
    ],
)
def test_unusable_file_is_one_clear_line(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        read_recipe(tmp_path / "r.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'r.yaml'}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("optim: {lr: 3e-4}", {"optim": {"lr": 3e-4}}),
        ("optim: {lr: 3E-4, eps: .5, weight_decay: 1_0.5}", {"optim": {"lr": 3e-4, "eps": 0.5, "weight_decay": 10.5}}),
        ("optim: {betas: [9e-1, 1e0], clip_grad: None}", {"optim": {"betas": [0.9, 1.0], "clip_grad": None}}),
        ("epochs: 1e2", {"epochs": 100}),
        ("epochs: 1_000", {"epochs": 1000}),
        ("epochs: 0o10", {"epochs": 8}),
        ("seed: 0x10", {"seed": 16}),
        ("freeze_bn: yes", {"freeze_bn": True}),
        ("ema_warmup: Off", {"ema_warmup": False}),
        ("augment: {auto_augment: null}", {"augment": {"auto_augment": None}}),
        ("augment: {auto_augment: None}", {"augment": {"auto_augment": None}}),
        ("data: {name: no, train_split: 2024-01-01, val_split: 010}",
         {"data": {"name": "no", "train_split": "2024-01-01", "val_split": "010"}}),
        ("checkpoint: 1e5", {"checkpoint": "1e5"}),
        ("optim: &x {lr: 3e-4}\n", {"optim": {"lr": 3e-4}}),
        ("\ufeffepochs: 3\r\nseed: 4\r\n", {"epochs": 3, "seed": 4}),
    ],
)  # fmt: skip
def test_values_are_what_a_person_sees(text, changed, tmp_path):
    """PyYAML alone reads 1e-3 as text, 010 as 8, `no` as false and 2024-01-01 as a date."""
    (tmp_path / "r.yaml").write_bytes(text.encode())
    expected = Recipe().as_dict()
    for name, value in changed.items():
        expected[name] = {**expected[name], **value} if isinstance(value, dict) else value
    found = read_recipe(tmp_path / "r.yaml")
    assert found.as_dict() == expected
    assert type(found.epochs) is int


@pytest.mark.parametrize("text", ["1e5", "no", "010", "1:30", "2024-01-01", "null", "~", "", "=", "'", "#x", "é☃", "-"])
def test_odd_values_come_back_from_a_run_folder(text, tmp_path):
    recipe = replace(
        DEMO,
        data=replace(DEMO.data, name=text, root=Path(text)),
        optim=replace(DEMO.optim, lr=1e-5, min_lr=1e-300, clip_grad=1e30, warmup_lr=0.1 + 0.2),
    )
    folder = RunFolder(tmp_path)
    folder.claim(recipe, [text, "b"])
    folder.claim(recipe, [text, "b"])  # it is the same run
    assert read_recipe(tmp_path / "recipe.yaml") == recipe


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_home_is_found_in_files_and_options(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "r.yaml").write_text("data: {root: ~/images}\ndistill: {checkpoint: ~nobody-of-that-name/t.pt}")
    command = parse(["--recipe=~/r.yaml", "--checkpoint=~/s.pt", "--output=~/run"], "shvit train")
    assert isinstance(command, Train)
    assert (command.recipe.data.root, command.recipe.checkpoint) == (tmp_path / "images", tmp_path / "s.pt")
    assert command.recipe.distill.checkpoint == Path("~nobody-of-that-name/t.pt")
    assert command.output == tmp_path / "run"


def test_learning_rate_scales_with_the_batch():
    assert Recipe(batch_size=512).peak_lr == pytest.approx(1e-3)
    assert replace(DEMO, batch_size=128).peak_lr == 2 * DEMO.peak_lr


def test_fields_that_change_nothing_computed_do_not_differ():
    moved = replace(
        DEMO,
        data=replace(DEMO.data, root=Path("/elsewhere"), workers=7),
        compute=replace(DEMO.compute, device_batch_size=8),
        save=replace(DEMO.save, every_minutes=1.0, keep=5),
    )
    assert differences(DEMO.as_dict(), moved.as_dict()) == []
    assert differences(DEMO.as_dict(), replace(DEMO, epochs=9).as_dict()) == ["epochs (8 and 9)"]
    older = {name: value for name, value in DEMO.as_dict().items() if name != "balanced_sampling"}
    assert differences(older, DEMO.as_dict()) == []  # a run of before there was such a field
    assert differences(older, replace(DEMO, balanced_sampling=0.5).as_dict()) == ["balanced_sampling (0.0 and 0.5)"]
    warmer = replace(DEMO, optim=replace(DEMO.optim, lr=1.0))
    assert differences(DEMO.as_dict(), warmer.as_dict()) == ["optim.lr (0.008 and 1.0)"]


def sizes(recipe):
    """The size in each epoch, as text."""
    return [str(recipe.img_size_at(epoch)) for epoch in range(recipe.epochs)]


def test_progressive_sizes_share_the_epochs_and_end_at_the_full_size():
    recipe = replace(DEMO, img_size=128, first_img_size=64, epochs=9)
    assert sizes(recipe) == ["64"] * 3 + ["96"] * 3 + ["128"] * 3
    assert sizes(replace(recipe, first_img_size=None)) == ["128"] * 9
    assert sizes(replace(recipe, img_size=112, epochs=3)) == ["64", "96", "112"]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        ((64, 96), (128, 192), ["64x96", "96x128", "96x160", "128x192"]),
        ((96, 64), (192, 128), ["96x64", "128x96", "160x96", "192x128"]),
        ((64, 96), (64, 160), ["64x96", "64x128", "64x160"]),
        (64, (64, 128), ["64", "64x96", "64x128"]),
        ((50, 70), (60, 110), ["50x70", "50x102", "60x110"]),
        ((64, 96), (64, 96), ["64x96"]),
    ],
)
def test_both_sides_grow_in_proportion_by_multiples_of_32(first, last, expected):
    recipe = replace(DEMO, img_size=last, first_img_size=first, epochs=len(expected))
    assert sizes(recipe) == expected


@pytest.mark.parametrize("first", [(65, 96), (64, 97), 128])
def test_first_size_is_not_larger_in_either_side(first):
    with pytest.raises(InputError, match=r"^--first-img-size \w+ must be at most --img-size 64x96 in height"):
        check_fields(replace(DEMO, img_size=(64, 96), first_img_size=first))


@pytest.mark.parametrize("text", ["64x96", "'64x96'", "64X96", "64×96", "[64, 96]", "\n- 64\n- 96"])
def test_size_in_a_file_is_height_and_width(text, tmp_path):
    (tmp_path / "r.yaml").write_text(f"img_size: {text}\nfirst_img_size: 32")
    recipe = read_recipe(tmp_path / "r.yaml")
    assert (recipe.img_size, recipe.first_img_size) == ((64, 96), (32, 32))
    plain = recipe.as_dict()
    assert (plain["img_size"], plain["first_img_size"]) == ("64x96", 32)  # a square as older runs have it


def test_size_that_differs_is_named_as_it_is_given():
    wide = replace(DEMO, img_size=(64, 96))
    assert differences(DEMO.as_dict(), wide.as_dict()) == ["img_size (96 and 64x96)"]
    older = {**DEMO.as_dict(), "img_size": 96, "first_img_size": None}
    assert differences(older, replace(DEMO, img_size=(96, 96)).as_dict()) == []
