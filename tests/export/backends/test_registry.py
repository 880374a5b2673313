"""What runtimes give back, as the outputs that a spec names."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn

from shvit.certificate import certificate_path
from shvit.documents import load_json
from shvit.errors import InputError
from shvit.export.backends.coreml import _by_name
from shvit.export.backends.registry import BACKENDS, load_artifact
from shvit.export.images import read_pixels, sample_images
from shvit.export.pipeline import export_model
from shvit.export.spec import Spec
from shvit.export.verdict import snr_db
from shvit.train.data.images import open_image
from tests import forks
from tests.conftest import create_tiny, settle

SPEC = SimpleNamespace(outputs=("probabilities",))
UNORDERED = {"owl": 0.05, "cat": 0.15, "dog": 0.8}
"""As Core ML gives a classifier's probabilities on a Mac: made from an NSDictionary, in no order."""


def test_probabilities_come_in_the_order_of_the_packages_labels():
    first, second = {"label": "dog", "probabilities": UNORDERED}, {"label": "cat", "probabilities": {1: 0.0}}
    (found,) = _by_name([first], SPEC, ["cat", "dog", "owl"])
    torch.testing.assert_close(found, torch.tensor([[0.15, 0.8, 0.05]]))
    reversed_order = {"probabilities": dict(reversed(UNORDERED.items()))}
    (both,) = _by_name([first, reversed_order], SPEC, ["owl", "cat", "dog"])
    torch.testing.assert_close(both, torch.tensor([[0.05, 0.15, 0.8]] * 2))
    with pytest.raises(InputError, match=r"not those that its package tells: 1, cat, dog"):
        _by_name([second], SPEC, ["cat", "dog"])


@pytest.mark.parametrize("labels", [["cat", "dog"], ["cat", "dog", "owl", "fox"], ["cat", "dog", "fox"]])
def test_labels_that_are_missing_or_left_over_are_named(labels):
    with pytest.raises(InputError, match=r"labels are not those that its package tells: (fox|owl)"):
        _by_name([{"probabilities": UNORDERED}], SPEC, labels)


def test_numbered_labels_without_a_list_are_in_the_order_in_which_people_count():
    chances = {f"class{i}": i / 100 for i in (0, 5, 11, 1, 6, 2, 10, 3, 9, 4, 8, 7)}
    (found,) = _by_name([{"probabilities": chances}], SPEC)
    torch.testing.assert_close(found, torch.arange(12)[None] / 100)


class Odd(nn.Module):
    """What no format has."""

    def forward(self, x):
        return x + torch.linalg.svdvals(x[:, None]).sum(-1, keepdim=True)


@pytest.mark.parametrize("name", BACKENDS)
def test_operations_that_a_format_lacks_are_one_line(tmp_path, name):
    model = timm.create_model("test_efficientnet")
    model.classifier = nn.Sequential(model.classifier, Odd())
    with pytest.raises(InputError, match=r"cannot be converted to|operations that ncnn lacks|does not run") as error:
        export_model(name, model, tmp_path / f"m{BACKENDS[name].ending}", img_size=64)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A tiny SHViT whose outputs differ from image to image at 64×96 px, and a folder of images."""
    folder, generator = tmp_path_factory.mktemp("wide"), np.random.default_rng(0)
    for index in range(12):
        patches = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        patches.resize((100 + 9 * index, 150 - 5 * index)).save(folder / f"{index}.png")
    model = create_tiny(num_classes=3, depth=(1, 1, 1))
    spec = Spec.of("tiny_vit", model, (64, 96))
    return settle(model, spec.normalize(read_pixels(sample_images(folder), spec))), folder


FILES = {"onnx": "int8", "openvino": "fp32", "coreml": "w8a8", "litert": "fp32", "ncnn": "fp32", "executorch": "fp32"}
"""A precision of each format."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "executorch" else name for name in BACKENDS]
)
def test_every_format_takes_images_that_are_not_square(tmp_path, name, wide):
    """Against the model on images as timm's own transform makes them; files of fp32 take pixels."""
    (model, folder), precision = wide, FILES[name]
    given = {"raw_pixels": True} if precision == "fp32" else {"calibration": folder}
    path = tmp_path / f"m{BACKENDS[name].ending}"
    certificate = export_model(name, model, path, img_size=(64, 96), precision=precision, images=folder, **given)
    assert certificate.passed is not False
    assert load_json(certificate_path(path))["spec"]["img_size"] == [64, 96]
    assert list(certificate.outputs) == ["logits at 64x96 px"]
    assert BACKENDS[name].inspect(path).img_size == (64, 96)
    transform = create_transform(**resolve_data_config({"input_size": (3, 64, 96)}, model=model))
    images = [open_image(file.path) for file in sample_images(folder)]
    with torch.no_grad():
        expected = model(torch.stack([*map(transform, images)]))
    found = load_artifact(path)(images)
    assert snr_db(expected, found) > (60 if precision == "fp32" else 15)


GIVEN_UP = """
import gc, signal, threading
import numpy as np
import openvino as ov
from openvino import opset13 as ops
from shvit.export.backends.openvino import compile_openvino

signal.signal(signal.SIGINT, lambda *_: print("handled"))
x = ops.parameter([1, 3], np.float32)
held = [compile_openvino(ov.Model([ops.result(ops.relu(x))], [x], "relu"), "fp32", 1)]

def give_up():
    held.clear()
    gc.collect()

thread = threading.Thread(target=give_up)
thread.start()
thread.join()
signal.raise_signal(signal.SIGINT)
"""


def test_a_signal_is_handled_after_another_thread_gave_an_openvino_model_up():
    """With a Core of its own for each model it is a segmentation fault."""
    done = forks.run(code=GIVEN_UP)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
