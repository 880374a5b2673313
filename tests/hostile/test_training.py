"""Recipes, states and logs of others, and models whose outputs are not finite."""

import copy
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from shvit.errors import CheckFailed, InputError
from shvit.img_size import ImgSize
from shvit.train.data.eval_loader import check_loader
from shvit.train.data.pixels.preprocessing import resolve_preprocessing
from shvit.train.evaluate import Counts, evaluate, plot_confusion
from shvit.train.loop import train
from shvit.train.recipe import Augment, Data, Optim, Recipe, read_recipe
from shvit.train.recipes import DEMO
from shvit.train.run.metrics import read_log
from shvit.train.run.run_folder import RunFolder, check_state
from shvit.train.step.augment import create_train_transform
from shvit.train.step.setup import check_recipe, set_up

pytestmark = pytest.mark.usefixtures("no_programs")


def one_process():
    from shvit.train.distributed import World

    return World(0, 1, torch.device("cpu"))


# --- recipes ----------------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join(f'*a{i - 1}' for _ in range(9))}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB, "data: &a {root: *a}\n", "2020-01-01: 1\n", "data: " + "[" * 2000 + "]" * 2000, "epochs: " + "9" * 5000,
        "epochs: 1\nepochs: 2", "? [1]\n: 2", "optim: {lr: .nan}", "seed: !!int x",
        "data: !!python/name:os.system", "a: \0", "<<: 3", "<<: [*x]", "augment: {scale: [1, 2, 3]}",
        "epochs: 0x" + "f" * 5000, "optim: {lr: 1e" + "9" * 500 + "}",
    ],
)  # fmt: skip
def test_recipe_of_any_shape_is_one_line(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        read_recipe(tmp_path / "r.yaml")
    assert len(str(error.value)) < 600
    run = RunFolder(tmp_path)
    (tmp_path / "r.yaml").rename(tmp_path / "recipe.yaml")
    with pytest.raises(InputError):
        run.claim(DEMO, ["a", "b"])


@pytest.mark.parametrize(
    ("part", "field", "values"),
    [
        ("", "epochs", (0, -1, 10**9)),
        ("", "img_size", (0, 10**6)),
        ("", "batch_size", (0, 10**9)),
        ("", "seed", (-1,)),
        ("", "ema_decay", (1.5, -1)),
        ("", "drop_path", (1.0, -0.1)),
        ("", "first_img_size", (0, 10**6)),
        ("augment", "scale", ((5.0, 10.0), (-1.0, -2.0), (0.0, 0.0), (1.0, 0.5))),
        ("augment", "ratio", ((0.0, 0.0), (-1.0, 1.0), (2.0, 1.0), (1.0, 1e300))),
        ("augment", "hflip", (2.0, -1.0)),
        ("augment", "mixup", (-1.0, 1e9)),
        ("augment", "smoothing", (1.0,)),
        ("augment", "repeats", (0, 10**6)),
        ("optim", "lr", (-1e-3, 0.0, float("inf"))),
        ("optim", "betas", ((1.5, 0.9), (-1.0, 0.9))),
        ("optim", "weight_decay", (-1.0,)),
        ("optim", "warmup_epochs", (-1,)),
        ("optim", "clip_grad", (-1.0, 0.0)),
        ("data", "workers", (-1, 100_000)),
        ("data", "max_corrupt", (-1,)),
        ("save", "keep", (0, 10**6)),
        ("save", "log_steps", (0,)),
        ("distill", "alpha", (2.0,)),
    ],
)
def test_value_out_of_range_is_refused_by_its_name(part, field, values, recipe):
    for value in values:
        inner = replace(getattr(recipe, part), **{field: value}) if part else value
        with pytest.raises(InputError, match=field.replace("_", "[-_]")):
            check_recipe(replace(recipe, **{part or field: inner}), one_process())


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_augment": "rand-n1000000"}, {"auto_augment": "nowhere"}, {"auto_augment": "augmix-w99999"},
        {"auto_augment": "rand-m9-n999999999999"}, {"auto_augment": "augmix-d999999"}, {"interpolation": "nowhere"},
    ],
)  # fmt: skip
def test_policy_that_cannot_be_carried_out_is_refused(fields):
    with pytest.raises(InputError, match="auto-augment"):
        create_train_transform(Augment(**fields), resolve_preprocessing(Recipe(img_size=ImgSize(32, 32))))


@pytest.mark.parametrize("options", [(32, 100_000, 10), (0, 0, 10), (32, -1, 10), (10**9, 0, 10), (32, 0, -1)])
def test_loader_out_of_range_is_refused(options):
    with pytest.raises(InputError, match="out of range"):
        check_loader(*options)


# --- states and logs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(image_folder, tmp_path_factory):
    """A run of an epoch."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(plain_recipe(image_folder), folder)
    return folder


@pytest.fixture(scope="module")
def saved(finished):
    """Its state."""
    return torch.load(finished / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def resumed(image_folder):
    """What a state of such a run is given to."""
    return set_up(plain_recipe(image_folder), one_process(), ["blue", "red"], 2, 1)


def plain_recipe(root: Path) -> Recipe:
    augment = Augment(auto_augment=None, random_erasing=0.0, mixup=0.0, cutmix=0.0, repeats=1)
    return Recipe(
        model="tiny_vit", img_size=32, epochs=1, batch_size=16, data=Data(root=root, workers=0), augment=augment,
        optim=Optim(lr=1e-2, warmup_epochs=0),
    )  # fmt: skip


def tampered(state: dict, how: str) -> None:
    moments = state["optimizer"]["state"]
    if how == "moments of another shape":
        moments[0]["exp_avg"] = torch.zeros(3)
    elif how == "moments that are text":
        moments[0]["exp_avg"] = "x"
    elif how == "hyperparameters of another type":
        state["optimizer"]["param_groups"] = "x"
    elif how == "log of a later epoch":
        state["log"] = [{**state["log"][0], "epoch": 9}]
    elif how == "an entry twice":
        state["log"] = state["log"] * 2
    elif how == "accuracy of 1000 %":
        state["log"][0]["top1"] = 1000.0
    elif how.startswith("no "):
        del state[how.removeprefix("no ")]
    else:
        name, value = how.split("=")
        state[name] = eval(value, {"nan": float("nan"), "inf": float("inf")})


@pytest.mark.parametrize(
    "how",
    [
        "step=-5", "step=10**9", "step=True", "step='x'", "step=1.0", "log=[{'x': 1}]", "log='abc'", "log=[]",
        "log=[3]", "log=None", "log={}", "seconds='x'", "seconds=nan", "seconds=-1.0", "seconds=None", "sums='x'",
        "sums=[1]", "sums=[nan, 0.0, 1.0]", "steps_per_epoch=0", "steps_per_epoch='x'", "model={}", "model='x'",
        "model_ema=3", "optimizer={}", "no model", "no model_ema", "no optimizer", "no sums", "no log", "no seconds",
        "moments of another shape", "moments that are text", "hyperparameters of another type",
        "log of a later epoch", "an entry twice", "accuracy of 1000 %",
    ],
)  # fmt: skip
def test_tampered_state_is_refused(how, saved, resumed):
    state = copy.deepcopy(saved)
    tampered(state, how)

    def go_on() -> None:
        resumed.load_state_dict(check_state(state))

    with pytest.raises(ValueError):  # noqa: PT011  (of which the kind for a user, InputError, is one)
        go_on()


@pytest.mark.parametrize("how", ["step=-5", "log='abc'", "seconds='x'", "log=[]"])
def test_run_on_a_tampered_state_is_one_line(how, finished, image_folder, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    tampered(state, how)
    torch.save(state, tmp_path / "run" / "last.pt")
    with pytest.raises(InputError, match="choose another --output"):
        train(plain_recipe(image_folder), tmp_path / "run")


def test_state_that_was_tampered_with_falls_back_to_the_one_before(finished, tmp_path):
    state = torch.load(finished / "last.pt", weights_only=True)
    torch.save(state, tmp_path / "last-1.pt")
    torch.save({**state, "log": "abc"}, tmp_path / "last.pt")
    reported: list[str] = []
    assert RunFolder(tmp_path).load_state(reported.append)["step"] == 2
    assert "last.pt is damaged" in reported[0]


def test_compressed_state_is_not_unpacked(finished, tmp_path):
    with zipfile.ZipFile(finished / "last.pt") as plain, zipfile.ZipFile(tmp_path / "last.pt", "w") as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="it is compressed"):
        RunFolder(tmp_path).load_state(pytest.fail)


def test_sound_state_goes_on(finished, image_folder, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    assert train(plain_recipe(image_folder), tmp_path / "run")["epochs"] == 1


@pytest.mark.parametrize(
    "line",
    ["[" * 5000, "{}", "3", '{"epoch": 1e999}', "{", '{"epoch": 1, "epoch": 2}', "\x00", '{"epoch": NaN}'],
)  # fmt: skip
def test_log_of_any_shape_is_one_line(line, finished, tmp_path):
    good = (finished / "metrics.jsonl").read_text()
    assert read_log(finished)[0]["epoch"] == 1
    for text in (line, good + line, good * 2):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(InputError):
            read_log(tmp_path)


# --- outputs of a model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_outputs_that_are_not_finite_are_no_accuracy(value):
    logits = torch.tensor([[value, -value], [0.0, 1.0]])
    with pytest.raises(InputError, match="not finite"):
        evaluate(lambda images: logits, [(torch.zeros(2, 1), torch.tensor([1, 1]))], 2)


def test_names_that_are_formulas_or_steer_a_terminal_are_drawn(tmp_path):
    counts = Counts(torch.eye(3, dtype=torch.int64), torch.zeros(3, dtype=torch.float64))
    plot_confusion(counts, [r"$\frac{$", "a\x1b[2J\nb", "$x$ and $"], tmp_path / "c.png", "title")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_training_does_not_go_on_with_outputs_that_are_not_finite(image_folder, tmp_path, monkeypatch):
    recipe = plain_recipe(image_folder)
    monkeypatch.setattr("shvit.train.loop.distribute_bn", lambda *_: None)
    monkeypatch.setattr(
        "shvit.train.evaluate.classification.F.cross_entropy", lambda *_, **__: torch.tensor(float("nan"))
    )
    with pytest.raises(CheckFailed, match="not finite"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_recipe_of_a_run_folder_that_is_no_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"recipe": [], "classes": 3}))
    with pytest.raises(InputError, match="choose another"):
        RunFolder(tmp_path).claim(DEMO, ["a", "b"])
