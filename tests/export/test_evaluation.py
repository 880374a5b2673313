"""`shvit eval` by a table of labels: the same figures of a checkpoint and of its exported file, for each task."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, r2_score

from shvit.checkpoint import write_checkpoint
from shvit.cli import run
from shvit.create import create_model
from shvit.errors import InputError
from shvit.export.spec import open_model
from shvit.train.data.images import open_image
from shvit.weights.run_info import RunInfo
from tests.conftest import SMALL, randomize

LABELS = ("blue", "green", "red")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 images, a table of their labels in another order than the model's, and one of a value."""
    root = tmp_path_factory.mktemp("evaluated")
    rng = np.random.default_rng(1)
    labels, values = ["image;red;blue;green;split"], ["image,weight"]
    for index in range(24):
        color = rng.uniform(size=3)
        Image.fromarray((255 * rng.uniform(0.7, 1, (32, 32, 3)) * color).astype(np.uint8)).save(root / f"{index}.png")
        flags = ";".join(str(int(each > 0.5)) for each in color[[0, 2, 1]])
        labels.append(f"{index}.png;{flags};{'test' if index < 4 else 'val'}")
        values.append(f"{index}.png,{100 * color.sum():.3f}")
    (root / "labels.csv").write_text("\n".join(labels))
    (root / "values.csv").write_text("\n".join(values))
    return root


def write(folder, name, info):
    torch.manual_seed(0)
    model = randomize(create_model(SMALL, num_classes=len(info.classes)))
    path = folder / f"{name}.safetensors"
    write_checkpoint(model.state_dict(), path, info.metadata)
    return path


@pytest.fixture(scope="module")
def labeled(folder):
    return write(folder, "labeled", RunInfo(SMALL, LABELS, 32, task="multi_label", thresholds=(0.3, 0.5, 0.7)))


@pytest.fixture(scope="module")
def valued(folder):
    return write(folder, "valued", RunInfo(SMALL, ("weight",), 32, task="regression"))


def outputs(checkpoint, folder, indices):
    model, spec = open_model(None, checkpoint)
    transform = spec.transform()
    with torch.no_grad():
        return model(torch.stack([transform(open_image(folder / f"{index}.png")) for index in indices])).numpy()


def test_labels_are_matched_by_name_and_figures_are_sklearns(folder, labeled, tmp_path, capsys):
    options = ["--data", str(folder), "--data.labels", str(folder / "labels.csv")]
    result = run(["eval", "--checkpoint", str(labeled), *options, "--output", str(tmp_path)])
    scores = outputs(labeled, folder, range(4, 24))
    rows = [line.split(";") for line in (folder / "labels.csv").read_text().splitlines()[5:]]
    truth = np.array([[int(row[2]), int(row[3]), int(row[1])] for row in rows])  # blue, green, red
    expected = [100 * average_precision_score(truth[:, place], scores[:, place]) for place in range(3)]
    assert result["average_precision"] == pytest.approx(expected)
    assert result["map"] == pytest.approx(np.mean(expected))
    predicted = 1 / (1 + np.exp(-scores)) >= np.array([0.3, 0.5, 0.7])
    hits = (predicted & (truth == 1)).sum(0)
    assert result["recall"] == pytest.approx(100 * hits / truth.sum(0))
    said = capsys.readouterr().out
    assert "its val images" in said
    assert "from the thresholds of its run on, on 20 images" in said
    assert (tmp_path / "precision_recall.png").exists()
    tested = run(["eval", "--checkpoint", str(labeled), *options, "--split", "test"])
    assert tested["n"] == 4


def test_an_exported_file_has_the_figures_of_its_checkpoint(folder, labeled, valued, tmp_path):
    for checkpoint, table, figures in (
        (labeled, "labels.csv", ("map", "micro_f1", "average_precision")),
        (valued, "values.csv", ("r2", "mae", "rmse")),
    ):
        artifact = tmp_path / f"{checkpoint.stem}.onnx"
        run(["export", "onnx", "--checkpoint", str(checkpoint), "--output", str(artifact), "--images", str(folder)])
        options = ["--data", str(folder), "--data.labels", str(folder / table)]
        one = run(["eval", "--checkpoint", str(checkpoint), *options])
        other = run(["eval", "--artifact", str(artifact), *options])
        for name in figures:
            assert other[name] == pytest.approx(one[name], abs=1e-3), name


def test_values_have_errors_in_their_unit(folder, valued, tmp_path, capsys):
    options = ["--data", str(folder), "--data.labels", str(folder / "values.csv"), "--output", str(tmp_path)]
    result = run(["eval", "--checkpoint", str(valued), *options])
    truth = np.array([float(line.split(",")[1]) for line in (folder / "values.csv").read_text().splitlines()[1:]])
    values = outputs(valued, folder, range(24))[:, 0]
    assert result["r2"] == pytest.approx(r2_score(truth, values), rel=1e-4)
    assert result["mae"] == pytest.approx(np.abs(truth - values).mean(), rel=1e-4)
    assert "of weight on 24 images" in capsys.readouterr().out
    assert (tmp_path / "values.png").exists()


def test_labels_that_the_model_does_not_know_are_refused_or_left_out(folder, labeled, tmp_path):
    table = tmp_path / "more.csv"
    table.write_text("image,labels\n" + "".join(f"{i}.png,{'red|purple' if i % 2 else 'blue'}\n" for i in range(12)))
    options = ["eval", "--checkpoint", str(labeled), "--data", str(folder), "--data.labels", str(table)]
    with pytest.raises(InputError, match="holds 1 classes that the model does not know: purple"):
        run(options)
    result = run([*options, "--skip-unknown-classes"])
    assert result["positives"] == (6, 0, 6)
    scores = outputs(labeled, folder, range(12))
    false = (1 / (1 + np.exp(-scores[:, 1])) >= 0.5).sum()  # green is in no list, so that no image has it
    predicted = (1 / (1 + np.exp(-scores)) >= np.array([0.3, 0.5, 0.7])).sum()
    hits = sum(
        count * recall / 100 for count, recall in zip((6, 6), (result["recall"][0], result["recall"][2]), strict=True)
    )
    assert false
    assert result["micro_f1"] == pytest.approx(100 * 2 * hits / (predicted + 12))


def test_a_label_without_a_column_is_not_known(folder, labeled, tmp_path):
    table = tmp_path / "fewer.csv"
    table.write_text("image,red,blue\n" + "".join(f"{i}.png,{i % 2},{1 - i % 2}\n" for i in range(12)))
    options = ["--data", str(folder), "--data.labels", str(table)]
    result = run(["eval", "--checkpoint", str(labeled), *options])
    scores = outputs(labeled, folder, range(12))[:, [0, 2]]
    predicted = (1 / (1 + np.exp(-scores)) >= np.array([0.3, 0.7])).sum()
    hits = 6 * (result["recall"][0] + result["recall"][2]) / 100
    assert result["micro_f1"] == pytest.approx(100 * 2 * hits / (predicted + 12))


def test_proportions_of_a_class_that_the_model_does_not_know_are_refused(folder, tmp_path):
    checkpoint = write(tmp_path, "classes", RunInfo(SMALL, ("odd", "even"), 32))
    table = tmp_path / "soft.csv"
    table.write_text("image,odd,prime\n" + "".join(f"{i}.png,0.5,0.5\n" for i in range(12)))
    options = ["eval", "--checkpoint", str(checkpoint), "--data", str(folder), "--data.labels", str(table)]
    with pytest.raises(InputError, match="images have proportions of prime, which the model does not know"):
        run([*options, "--skip-unknown-classes"])


def test_classes_of_a_table_are_those_of_folders(folder, tmp_path):
    for index in range(24):
        place = tmp_path / "data" / ("odd" if index % 2 else "even")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index}.png").write_bytes((folder / f"{index}.png").read_bytes())
    table = tmp_path / "classes.csv"
    table.write_text("image,class\n" + "".join(f"{i}.png,{'odd' if i % 2 else 'even'}\n" for i in range(24)))
    checkpoint = write(tmp_path, "classes", RunInfo(SMALL, ("odd", "even"), 32))
    options = ["eval", "--checkpoint", str(checkpoint), "--data"]
    by_folder = run([*options, str(tmp_path / "data")])
    by_table = run([*options, str(folder), "--data.labels", str(table)])
    assert by_table == by_folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "was trained for multi_label, and folders do not tell its labels; give --data.labels"),
        (["--data.file-column", "image"], "--data.file-column does not apply: there is no --data.labels"),
        (["--split", "val"], "--split does not apply: .* is not a dataset with splits of its own"),
    ],
)
def test_options_that_do_not_apply_are_refused(folder, labeled, options, message):
    with pytest.raises(InputError, match=message):
        run(["eval", "--checkpoint", str(labeled), "--data", str(folder), *options])
