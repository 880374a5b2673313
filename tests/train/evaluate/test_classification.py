"""Accuracy against counting by hand."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from shvit.cli import run
from shvit.errors import InputError
from shvit.train.distributed import World
from shvit.train.evaluate import Counts, count, evaluate, plot_confusion


def batches(targets, size):
    return [(part[:, None].float(), part) for part in torch.tensor(targets).split(size)]


def table_predict(logits):
    """Predicts from a table by the number that stands in the image."""
    return lambda images: torch.tensor(logits)[images[:, 0].long()]


def test_accuracies_are_those_counted_by_hand():
    # class 0 is always right, class 1 never, class 2 always
    logits = [[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 1.0, 9.0]]
    result = evaluate(table_predict(logits), batches([0, 0, 1, 2, 2, 2, 2], size=3), 3)
    assert result.n == 7
    assert result.top1 == pytest.approx(100 * 6 / 7)
    assert result.top5 == 100
    assert result.per_class == (100, 0, 100)
    assert result.balanced_top1 == pytest.approx(100 * 2 / 3)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits)[[0, 0, 1, 2, 2, 2, 2]], torch.tensor([0, 0, 1, 2, 2, 2, 2])
    )
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)


def test_top5_looks_at_five_classes():
    logits = [[float(9 - column) for column in range(8)] for _ in range(8)]  # ranks classes 0, 1, 2 …
    result = evaluate(table_predict(logits), batches(list(range(8)), size=8), 8)
    assert result.top1 == pytest.approx(100 / 8)
    assert result.top5 == pytest.approx(100 * 5 / 8)


def test_a_class_without_images_leaves_valid_json_and_the_balanced_accuracy_alone():
    result = evaluate(table_predict([[1.0, 0.0, 0.0]] * 3), batches([0, 0, 2, 0], size=4), 3)
    assert (result.per_class, result.balanced_top1) == ((100, 0, 0), 50)
    json.dumps(asdict(result), allow_nan=False)


def test_images_without_a_class_do_not_count():
    result = evaluate(table_predict([[1.0, 0.0], [1.0, 0.0]]), batches([0, 1, 1], size=2), 2)
    images = [(torch.tensor([[0.0], [1.0], [1.0], [0.0]]), torch.tensor([0, 1, 1, -1]))]
    other = evaluate(table_predict([[1.0, 0.0], [1.0, 0.0]]), images, 2)
    assert (other.n, other.per_class, other.loss) == (3, result.per_class, pytest.approx(result.loss, rel=1e-6))
    with pytest.raises(InputError, match="no image to evaluate on"):
        evaluate(table_predict([[1.0, 0.0]]), [(torch.zeros(1, 1), torch.tensor([-1]))], 2)


def test_class_that_the_model_does_not_have_is_refused():
    with pytest.raises(InputError, match="an image of class 2, and the model has 2 classes"):
        evaluate(table_predict([[1.0, 0.0]] * 3), batches([2], size=1), 2)


def test_counts_of_two_processes_add_up():
    logits = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).tolist()
    targets = [index % 4 for index in range(60)]
    images = torch.arange(60.0)[:, None]
    whole, first, second = (
        count(table_predict(logits), [(images[part], torch.tensor(targets)[part])], 4)
        for part in (slice(None), slice(0, None, 2), slice(1, None, 2))
    )
    others = iter((second.confusion, second.totals))

    class TwoProcesses(World):
        def sum(self, tensor):
            return tensor + next(others)

    both = first.across(TwoProcesses(0, 2, torch.device("cpu")))
    assert both.evaluation().top1 == whole.evaluation().top1
    assert torch.equal(first.confusion + second.confusion, whole.confusion)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for target, row in zip(targets, logits, strict=True):
        expected[target, row.index(max(row))] += 1
    assert torch.equal(whole.confusion, expected)


@pytest.mark.parametrize("size", [2, 60])
def test_confusion_is_drawn(tmp_path, size):
    counts = Counts(torch.randint(0, 9, (size, size)), torch.zeros(3, dtype=torch.float64))
    plot_confusion(counts, [f"class {i}" for i in range(size)], tmp_path / "c.png", "title")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_eval_reports_weights_and_average_per_class_and_draws_them(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for index in range(12):
        path = tmp_path / "val" / ("cat", "dog", "ewe")[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    model, average = (timm.create_model("shvit_s1", num_classes=3) for _ in range(2))
    for m in (model, average):
        torch.nn.init.normal_(m.head.l.bias)
    torch.save({"model": model.state_dict(), "model_ema": average.state_dict()}, tmp_path / "last.pt")
    options = ["--data", str(tmp_path), "--img-size", "32", "--output", str(tmp_path / "out")]
    result = run(["eval", "--checkpoint", str(tmp_path / "last.pt"), *options])
    printed = capsys.readouterr().out
    for found, expected in ((result, model), (result["ema"], average)):
        transform = create_transform((3, 32, 32), crop_pct=0.875, interpolation="bicubic")
        hits = [0, 0, 0]
        for path in sorted(tmp_path.glob("val/*/*.png")):
            logits = expected.eval()(transform(Image.open(path))[None])
            hits[("cat", "dog", "ewe").index(path.parent.name)] += (
                path.parent.name == ("cat", "dog", "ewe")[logits.argmax()]
            )
        assert found["n"] == 12
        assert found["per_class"] == pytest.approx([25 * hit for hit in hits])
        assert found["balanced_top1"] == pytest.approx(sum(25 * hit for hit in hits) / 3)
        assert f"balanced top-1 {found['balanced_top1']:.2f} %" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "accuracy.json",
        "confusion.png",
        "confusion_ema.png",
    }
    assert json.loads((tmp_path / "out" / "accuracy.json").read_text())["classes"] == ["cat", "dog", "ewe"]
    alone = run(["eval", "--checkpoint", str(tmp_path / "last.pt"), *options[:4], "--ema"])
    assert alone["top1"] == result["ema"]["top1"]
