"""The code of docs/start/app.md compiles, and its C++ gives what `load_artifact` gives.

Each block is taken from the page. A program gets the numbers of a certificate as arguments, and pixels as its input.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from shvit.certificate import certificate_path
from shvit.documents import load_json
from shvit.export import load_artifact
from shvit.export.pipeline import export_model
from tests.conftest import ROOT, assert_close, create_tiny, images, settle

from . import build

SIZE, CLASSES = (64, 96), 3


@dataclass(frozen=True)
class Case:
    """A C++ block of the page, found by a header that it includes, and how a program uses it."""

    header: str
    library: Callable[[Path], build.Library]
    name: str
    """Of the exported file."""
    loaded: str
    classified: str


CASES = {
    "litert": Case(
        "litert/c/litert_model.h",
        build.litert,
        "mine.tflite",
        "Classifier classifier(file, height, width, num_classes);",
        "classifier.classify(rgb.data())",
    ),
    "ncnn": Case(
        "net.h",
        lambda _: build.ncnn(),
        "mine.ncnn.param",
        'ncnn::Net net; load(net, file.substr(0, file.find(".ncnn")), precision);',
        "classify(net, rgb.data(), height, width)",
    ),
    "executorch": Case(
        "executorch/extension/module/module.h",
        lambda _: build.executorch(),
        "mine.pte",
        "executorch::extension::Module module(file);",
        "classify(module, rgb.data(), height, width)",
    ),
}
MAIN = r"""
#include <cstdio>
#include <string>

int main(int, char** argv) {
    const std::string file = argv[1], precision = argv[2];
    const int height = std::stoi(argv[3]), width = std::stoi(argv[4]), num_classes = std::stoi(argv[5]);
    std::vector<unsigned char> rgb(3 * height * width);
    LOADED
    while (std::fread(rgb.data(), 1, rgb.size(), stdin) == rgb.size()) {
        const std::vector<float> probabilities = CLASSIFIED;
        if (probabilities.size() != static_cast<std::size_t>(num_classes)) return 1;
        for (float each : probabilities) std::printf("%.9g ", each);
    }
}
"""


def blocks(language: str) -> list[str]:
    page = (ROOT / "docs" / "start" / "app.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def block(case: Case) -> str:
    (code,) = (code for code in blocks("cpp") if re.search(rf'^#include ["<]{case.header}[">]$', code, re.MULTILINE))
    return code


def test_no_block_of_cpp_is_left_out():
    assert sorted(blocks("cpp")) == sorted(map(block, CASES.values()))


@pytest.mark.parametrize("case", [CASES["litert"], CASES["executorch"]], ids=["litert", "executorch"])
def test_cpp_compiles(tmp_path, case):
    build.need("g++")
    build.check_cpp(block(case), case.library(tmp_path), tmp_path)


@pytest.fixture(scope="module")
def model():
    """Its outputs differ from image to image."""
    return settle(create_tiny(num_classes=CLASSES), images(8, 3, *SIZE))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", CASES)
def test_cpp_gives_what_load_artifact_gives(tmp_path, model, runtime):
    build.need("g++")
    case = CASES[runtime]
    code = block(case) + MAIN.replace("LOADED", case.loaded).replace("CLASSIFIED", case.classified)
    program, path = build.build_cpp(code, case.library(tmp_path), tmp_path), tmp_path / case.name
    export_model(runtime, model, path, img_size=SIZE, outputs="probabilities", raw_pixels=True)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, *SIZE), np.uint8))  # (B, C, H, W)
    expected = load_artifact(path)(pixels)
    assert (expected[1:] - expected[0]).abs().max() > 0.01

    spec = load_json(certificate_path(path))["spec"]
    arguments = [path, spec["precision"], *map(str, spec["img_size"]), str(spec["num_classes"])]
    printed = build.run([program, *arguments], data=pixels.permute(0, 2, 3, 1).numpy().tobytes()).split()
    assert_close(torch.tensor([*map(float, printed)]).reshape(-1, CLASSES), expected, 1e-5)


@pytest.mark.slow
def test_kotlin_compiles(tmp_path):
    assert len(blocks("kotlin")) == 4
    build.check_kotlin(blocks("kotlin"), tmp_path)
