"""Files that a browser is given: they are their certificates', and what strangers' say of themselves is checked."""

import json
import math

import onnx
import pytest

from shvit import cli
from shvit.certificate import certificate_path
from shvit.errors import CheckFailed, InputError
from shvit.export.bench.cases import Settings
from shvit.export.browser.served import Pace, check_names, create_contents, load_served, prepare_models, select_images
from shvit.export.metadata import LABELS_KEY, SPEC_KEY
from shvit.files import sha256

PACE = Pace()


def test_a_file_needs_its_certificate_and_must_be_unchanged(mine, tmp_path):
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(mine.read_bytes())
    with pytest.raises(InputError, match="has no certificate beside it"):
        load_served(copy)
    certificate = json.loads((mine.parent / "mine.onnx.certificate.json").read_text())
    certificate |= {"artifact": "copy.onnx", "artifact_sha256": "0" * 64}
    (tmp_path / "copy.onnx.certificate.json").write_text(json.dumps(certificate))
    with pytest.raises(CheckFailed, match="has changed since it was certified"):
        load_served(copy)


def forged(mine, folder, **changes):
    """The file with another description of itself, or other labels, and a certificate that fits."""
    proto = onnx.load(mine)
    for prop in proto.metadata_props:
        if prop.key == SPEC_KEY:
            prop.value = json.dumps({**json.loads(prop.value), **{k: v for k, v in changes.items() if k != "labels"}})
        if prop.key == LABELS_KEY and "labels" in changes:
            prop.value = changes["labels"]
    path = folder / "forged.onnx"
    onnx.save(proto, path)
    certificate = json.loads(certificate_path(mine).read_text())
    certificate |= {"artifact": path.name, "artifact_sha256": sha256(path)}
    certificate_path(path).write_text(json.dumps(certificate))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": "abc"},
        {"mean": [math.nan] * 3},
        {"std": [0, 0, 0]},
        {"in_chans": 2},
        {"in_chans": "3"},
        {"interpolation": "random"},
        {"crop_pct": -1},
        {"crop_pct": 1e-6},
        {"crop_mode": "x"},
        {"img_size": 96},
        {"model": "\x1b[2J"},
        {"precision": "bf16"},
        {"num_classes": -1},
        {"outputs": [5]},
    ],
    ids=str,
)
def test_what_a_strangers_file_says_of_itself_is_checked(mine, tmp_path, changes):
    path = forged(mine, tmp_path, **changes)
    with pytest.raises(InputError) as refused:
        create_contents([load_served(path)], select_images(None), None, PACE, None)
    assert "\x1b" not in str(refused.value)


def test_labels_of_another_number_are_left_out(mine, tmp_path):
    assert load_served(forged(mine, tmp_path, labels='["a", "b"]')).labels == ()


@pytest.mark.parametrize("labels", ["{", "5", "[1, 2, 3]", "null", '["a", "\\u001b[2J", "c"]'])
def test_labels_that_are_none_are_refused(mine, tmp_path, labels):
    with pytest.raises(InputError, match="its labels"):
        load_served(forged(mine, tmp_path, labels=labels))


def test_random_weights_are_known_as_such(tmp_path):
    path = tmp_path / "random.onnx"
    cli.run(["export", "onnx", "--model", "tiny_vit", "--img-size", "64", "--output", str(path)])
    assert not load_served(path).trained


def test_a_taken_name_is_refused(mine, tmp_path):
    elsewhere = mine.parent / ".." / mine.parent.name / mine.name
    with pytest.raises(InputError, match="have the same name and precision"):
        check_names(prepare_models([str(mine), str(elsewhere)], ["fp32"], Settings(threads=1), None, tmp_path))


def test_a_runtime_from_the_cdn_is_pinned(mine):
    served = create_contents([load_served(mine)], select_images(None), None, PACE, "records")
    described = json.loads(served["served.json"].source)
    for build in described["runtime"]["builds"].values():
        for part in build.values():
            assert part["url"].startswith("https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/")
            assert part["integrity"].startswith("sha256-")
    assert b"connect-src 'self' blob: https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/;" in served[""].source
    assert not any(name.startswith("ort/") for name in served)
