"""Packages that are not installed: every command names the extra that brings what it needs."""

import importlib
import sys

import pytest

from shvit import cli
from shvit.environment import EXTRAS, advise, extra_of
from shvit.errors import InputError

USES = {  # what of the optional packages a command imports, with some options
    "list": (),
    "info shvit_s1": (),
    "train demo": ("torchvision", "matplotlib", "tensorboard", "datasets", "pillow_heif", "elpv_dataset"),
    "eval --data x": ("torchvision", "onnx", "onnxruntime", "openvino", "coremltools", "skimage", "scipy", "matplotlib",
                      "datasets", "pillow_heif", "elpv_dataset"),
    "export onnx": ("onnx", "onnxruntime", "onnxscript", "skimage", "scipy"),
    "export coreml": ("coremltools", "skimage", "scipy"),
    "export openvino": ("openvino", "skimage", "scipy"),
    "verify x": ("onnx", "onnxruntime", "openvino", "coremltools", "skimage", "scipy"),
    "bench": ("onnx", "onnxruntime", "onnxscript", "openvino", "coremltools", "scipy", "matplotlib"),
    "bench phone": ("onnx", "onnxruntime", "onnxscript", "skimage", "scipy", "matplotlib", "tornado", "segno",
                    "cryptography"),
    "bench import x": ("scipy", "matplotlib"),
    "site": ("onnx", "onnxruntime", "onnxscript", "skimage", "scipy"),
    "detect train x": ("mmdet", "mmcv", "mmengine", "torchvision", "tensorboard", "matplotlib"),
    "detect export x": ("mmdet", "mmcv", "mmengine", "torchvision", "onnx", "onnxruntime", "onnxscript", "scipy"),
    "weights list": (),
    "demo": ("elpv_dataset", "onnx", "onnxruntime", "coremltools", "matplotlib", "tensorboard", "skimage"),
}  # fmt: skip
OWN = {"train": "train", "eval": "export", "export": "export", "verify": "export", "bench": "export",
       "detect": "detection", "bench phone": "phone", "bench import": "phone", "site": "phone",
       "demo": "demo"}  # fmt: skip


@pytest.mark.parametrize("line", USES)
def test_the_extra_brings_the_package_and_is_the_commands_if_it_can_be(line):
    words = line.split()
    own = OWN.get(" ".join(words[:2])) or OWN.get(words[0])
    for module in USES[line]:
        extra = extra_of(module, words)
        assert extra in EXTRAS[module]
        assert extra == own or own not in EXTRAS[module], (line, module)
        assert advise(module, words).endswith(f"pip install 'shvit[{extra}]'")


def test_what_no_extra_brings_is_named_as_pip_knows_it():
    assert advise("yaml.nodes").endswith("pip install pyyaml")
    assert advise("tensorflow_datasets").endswith("pip install tensorflow-datasets")


IMPORTERS = {"segno": "shvit.export.browser.phone", "matplotlib": "shvit.export.bench.plots"}
"""Modules of ours that import an optional package at their beginning."""


@pytest.fixture
def without(monkeypatch):
    """A function that hides a top-level module from everything imported from now on."""
    hidden = set()

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] in hidden:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def hide(module):
        hidden.add(module)
        for name in list(sys.modules):
            if name.partition(".")[0] == module:
                monkeypatch.delitem(sys.modules, name)
        if (importer := IMPORTERS.get(module)) in sys.modules:  # is imported anew, too
            package, _, name = importer.rpartition(".")
            monkeypatch.delitem(sys.modules, importer)
            monkeypatch.delattr(sys.modules[package], name)

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    return hide


@pytest.mark.parametrize(
    ("module", "argv", "extra"),
    [
        ("segno", ["bench", "phone"], "phone"),
        ("cryptography", ["bench", "phone", "--tls"], "phone"),
        ("matplotlib", ["bench", "import", "RECORD"], "phone"),
        ("onnx", ["site", "--models", "shvit_s1", "--ort-web", "cdn"], "phone"),
        ("coremltools", ["export", "coreml", "--model", "shvit_s1", "--output", "x.mlpackage"], "coreml"),
    ],
)
def test_a_command_without_a_package_says_which_extra(module, argv, extra, without, tmp_path, monkeypatch):
    import json

    from tests.export.browser.serving import RECORD

    (tmp_path / "RECORD").write_text(json.dumps(RECORD))
    monkeypatch.chdir(tmp_path)
    output = [] if "--output" in argv else ["--output", "out"]
    without(module)
    with pytest.raises(InputError, match=rf"this needs the package {module}; .*'shvit\[{extra}\]'"):
        cli.run([*argv, *output])


def test_a_module_of_ours_that_is_missing_is_a_fault_of_ours(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'shvit.nowhere'", name="shvit.nowhere")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ModuleNotFoundError):
        cli.run(["list"])
