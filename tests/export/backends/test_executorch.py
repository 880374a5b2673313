"""ExecuTorch: programs that give their model's answers, wrong ones that are refused, and files that it must not get."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from shvit.deployment import deploy
from shvit.errors import InputError
from shvit.export.arm64 import packages
from shvit.export.backends import executorch as backend
from shvit.export.backends import worker
from shvit.export.backends.executorch import EXECUTORCH, LIBRARY, write_executorch
from shvit.export.backends.registry import load_artifact
from shvit.export.formats.executorch import XNNPACK, input_steps, program_parameters, read_program
from shvit.export.formats.executorch_evaluator import Evaluator
from shvit.export.quantization.pt2 import steps
from shvit.export.spec import Spec
from shvit.export.verify import certify
from shvit.export.wrappers import feature_maps, layer_outputs
from tests.apps.build import need
from tests.conftest import assert_close, images, randomize
from tests.export.backends.conftest import PX, spec_of
from tests.export.judged import WEIGHT_DEFECTS


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """A model in fp32; tests copy it before they change it."""
    path = tmp_path_factory.mktemp("executorch") / "tiny.pte"
    write_executorch(deploy(tiny, PX), path, spec_of(tiny), ["a", "b"])
    return path


@pytest.fixture
def copied(written, tmp_path):
    return Path(shutil.copy(written, tmp_path))


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_file_gives_the_models_answers_in_any_batch_and_names_its_layers(tiny, written):
    artifact, x = load_artifact(written, threads=1), images(3, 3, PX, PX)
    with torch.no_grad():
        assert_close(artifact.run(x)[0], tiny(x))
    assert artifact.labels == ("a", "b")
    expected = layer_outputs(deploy(tiny, PX), x)
    outputs = artifact.run_layers(x)
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():  # activations are apart, though XNNPACK computes them within its layers
        assert_close(output, expected[name])


def test_the_whole_network_is_one_delegate(written):
    artifact = load_artifact(written)
    assert artifact.operators[XNNPACK] == 1
    assert not [name for name in artifact.operators if "::" in name]  # kernels outside


def test_evaluator_computes_what_the_runtime_does(written):
    program, x = read_program(written), images(2, 3, PX, PX)
    count = len(program_parameters(program))
    assert_close(Evaluator(program, [""] * count).run(x)[0], load_artifact(written).run(x)[0])


class Unlikely(nn.Module):
    """Attention that rows of nothing but -∞ are kept from: kernels outside of XNNPACK that take numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, 8)

    def forward(self, x):
        x = self.conv(x)
        x = torch.where(x < -0.2, torch.full_like(x, -math.inf), x).flatten(2)
        alone = (x == -math.inf).all(-1, keepdim=True)
        return torch.where(alone, torch.zeros_like(x), x.softmax(-1)).flatten(1)


def test_evaluator_tells_kernels_of_a_number_from_those_of_a_tensor(tiny, tmp_path):
    torch.manual_seed(1)
    model = Unlikely().eval()
    write_executorch(model, tmp_path / "f.pte", spec_of(tiny, num_classes=4 * (PX // 8) ** 2))
    artifact, x = load_artifact(tmp_path / "f.pte"), images(2, 3, PX, PX)
    assert {"aten::lt", "aten::eq"} <= {name.partition(".")[0] for name in artifact.operators}
    with torch.no_grad():
        assert_close(artifact.run(x)[0], model(x))
        assert_close(artifact.run_layers(x)["conv"], model.conv(x))


def test_feature_maps_are_the_models_from_pixels_too(tiny, tmp_path):
    model, names = feature_maps("shvit_s1", tiny)
    spec = spec_of(tiny, outputs=names, uint8_input=True)
    write_executorch(deploy(model, PX), tmp_path / "f.pte", spec)
    artifact = load_artifact(tmp_path / "f.pte")
    pixels = torch.randint(0, 256, (2, 3, PX, PX), dtype=torch.uint8)
    with torch.no_grad():
        for output, expected in zip(artifact.run(spec.feed(pixels)), model(spec.normalize(pixels)), strict=True):
            assert_close(output, expected)
    assert len(artifact.run_layers(spec.feed(pixels))) > 20


def test_a_peer_whose_operations_are_not_all_xnnpacks(tmp_path):
    """LayerNorm is a kernel of its own, between several delegates; layers keep their names.

    XNNPACK's partitioner takes GELU's approximation by tanh, which this model has, for GELU itself: 2e-4 of the output.
    """
    model = randomize(timm.create_model("test_convnext")).eval()
    spec = replace(Spec.of("test_convnext", model), img_size=PX)
    write_executorch(deploy(model, PX), tmp_path / "m.pte", spec)
    artifact, x = load_artifact(tmp_path / "m.pte"), images(1, 3, PX, PX)
    assert artifact.operators[XNNPACK] > 1
    with torch.no_grad():
        assert_close(artifact.run(x)[0], model(x), 1e-3)
    expected = layer_outputs(deploy(model, PX), x)
    outputs = artifact.run_layers(x)
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():
        assert_close(output, expected[name], 1e-3)


# --- half precision ---------------------------------------------------------------------------------------------------


def test_values_are_rounded_after_each_operation(tiny, tmp_path):
    path = tmp_path / "m.pte"
    write_executorch(deploy(tiny, PX), path, spec_of(tiny, precision="fp16"))
    artifact, x = load_artifact(path, rounded=True), images(2, 3, PX, PX)
    output = artifact.run(x)[0]
    with torch.no_grad():
        error = ((output - tiny(x)).abs().max() / tiny(x).abs().max()).item()
    assert 2.0**-15 < error < 2.0**-5
    assert torch.equal(output, output.half().float())
    assert artifact.overflow() is None
    assert artifact.largest_values()
    with torch.no_grad():
        assert_close(load_artifact(path).run(x)[0], tiny(x), 2.0**-5)
    artifact.run(x * 1e30)
    assert artifact.overflow() == "patch_embed.0"


# --- int8 -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_int8(workshop, tmp_path_factory):
    """A trained model in int8, without the search for layers to exclude."""
    source = replace(workshop.source, spec=replace(workshop.spec, precision="int8"))
    path = tmp_path_factory.mktemp("int8") / "q.pte"
    floats = (*EXECUTORCH.float_layers(source.deployed()), *workshop.kept())
    backend.create_writer(source, backend.ExecutorchOptions())(path, replace(source.spec, excluded_layers=floats))
    return path


def test_int8_file_holds(workshop, in_int8):
    certificate = certify(load_artifact(in_int8), workshop.reference)
    assert certificate.passed
    assert certificate.compared_layers > 20


def test_int8_layers_round_to_the_learned_ranges_and_others_do_not(workshop, in_int8):
    artifact, program = load_artifact(in_int8), read_program(in_int8)
    assert artifact.scale_faults() == []
    names = list(artifact.parameters())
    rounded = {name for name, each in zip(names, input_steps(program), strict=True) if each is not None}
    assert rounded == set(names) - set(artifact.spec.excluded_layers)
    name = next(name for name in workshop.source.ranges() if name in rounded)
    scale, zero_point = steps(workshop.source.ranges()[name].input)
    found = dict(zip(names, input_steps(program), strict=True))[name]
    assert found == pytest.approx((scale, zero_point + 128), rel=1e-6)


def test_int8_evaluator_computes_what_the_runtime_does(workshop, in_int8):
    """To a level here and there: ties are rounded either way."""
    artifact = load_artifact(in_int8)
    x = artifact.spec.feed(workshop.reference.pixels(workshop.spec)[:2])
    names = list(artifact.parameters())
    expected, output = artifact.run(x)[0], Evaluator(read_program(in_int8), names).run(x)[0]
    assert (output - expected).norm() < 0.02 * expected.norm()


def test_a_wrong_scale_is_refused(workshop, in_int8, tmp_path):
    data, artifact = in_int8.read_bytes(), load_artifact(in_int8)
    name = next(name for name in artifact.parameters() if name not in artifact.spec.excluded_layers)
    scale = np.float32(steps(workshop.source.ranges()[name].input)[0])
    assert data.count(scale.tobytes()) >= 1
    path = tmp_path / "wrong.pte"
    path.write_bytes(data.replace(scale.tobytes(), np.float32(2 * scale).tobytes()))
    certificate = certify(load_artifact(path), workshop.reference)
    assert certificate.passed is False
    assert any(name in fault for fault in certificate.faults)


# --- other delegates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("delegate", "name"), [("coreml", "CoreMLBackend"), ("vulkan", "VulkanBackend")])
def test_a_program_for_another_delegate_is_written_and_not_run(tiny, tmp_path, delegate, name):
    path = tmp_path / f"m.{delegate}.pte"
    written = backend.write_delegated(deploy(tiny, PX), spec_of(tiny), ["a", "b"], delegate, path)
    assert written.startswith(f"1 {name}; outside of it nothing")
    with pytest.raises(InputError, match=f"is written for {name}, which is not run here"):
        load_artifact(path)


def test_what_other_delegates_lack_is_refused(tiny):
    with pytest.raises(InputError, match="--also does not apply: int8"):
        backend.ExecutorchOptions(also=("coreml",)).complete(spec_of(tiny, precision="int8"))
    with pytest.raises(InputError, match="--raw-pixels does not apply: Core ML's delegate takes no uint8"):
        backend.ExecutorchOptions(also=("coreml",), raw_pixels=True).complete(spec_of(tiny))


# --- wrong files ------------------------------------------------------------------------------------------------------


def test_a_wrong_weight_is_refused(workshop, tmp_path):
    model = WEIGHT_DEFECTS["one weight off by 1 %"](workshop.model)
    path = tmp_path / "m.pte"
    write_executorch(model, path, workshop.spec, workshop.reference.labels)
    assert certify(load_artifact(path), workshop.reference).passed is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "is not a readable ExecuTorch program"),
        (lambda data: b"a text\n" * 100, "is not an ExecuTorch program"),
        (lambda data: data[:50], "is not a readable ExecuTorch program"),
        (lambda data: data[: len(data) // 2], "ends within its weights"),
        (lambda data: data[:-100], "ends within its weights"),
        (lambda data: data.replace(b"XNNC", b"XNNX").replace(b"XH00", b"XH01"), "in a form that is not read here"),
        (lambda data: data.replace(b"XnnpackBackend", b"OpenvinoBacken"), "written for OpenvinoBacken.* not run here"),
        (lambda data: data.replace(b"forward", b"farward"), "has no method forward"),
        (lambda data: data.replace(b"shvit.spec", b"shvit.spez"), "was not written by `shvit export`"),
        (lambda data: data.replace(b'executorch.layers', b'executorch.layerz'), "names 0 layers, and has"),
    ],
)  # fmt: skip
def test_a_damaged_program_is_refused(copied, change, message):
    copied.write_bytes(change(copied.read_bytes()))
    with pytest.raises(InputError, match=message) as error:
        load_artifact(copied).parameters()
    assert "\n" not in str(error.value)


def test_a_graph_that_ends_the_process_is_refused(copied, monkeypatch):
    """The trial is a process of its own: what it dies of is said in one line."""
    program = read_program(copied)
    graph = program.graphs[0]
    reshape = next(node for node in graph.nodes if node.kind == "XNNStaticReshape")
    shape = reshape.fields["new_shape"].astype("<u4").tobytes()
    copied.write_bytes(copied.read_bytes().replace(shape, np.full(len(shape) // 4, 0x7FFFFFFF, "<u4").tobytes()))
    with pytest.raises(InputError, match="does not run in executorch"):
        load_artifact(copied)


def test_a_program_without_our_notes_is_timed_but_not_evaluated(copied):
    copied.write_bytes(copied.read_bytes().replace(b"shvit.spec", b"shvit.spez"))
    assert backend.inspect(copied) == ((PX, PX), 1, "fp32")
    assert backend.job(copied, 2, "fp32", "all")["shape"] == [1, 3, PX, PX]


def test_worker_runs_a_program_without_the_exporter(written):
    job = {**backend.job(written, 2, "fp32", "all"), "threads": 1, "cores": []}
    worker = Path(backend.__file__).with_name("worker.py")
    done = subprocess.run([sys.executable, "-I", worker, json.dumps(job)], input='{"batch": 2}\n{"seconds": 0.01}\n',
                          capture_output=True, text=True, check=True)  # fmt: skip
    responses = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(responses) == 3
    assert min(responses[-1]["wall"]) > 0


# --- without PyTorch --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library for ARM64, compiled for this machine, where its wheel has the same headers and libraries."""
    need("g++")
    folder = tmp_path_factory.mktemp("library")
    (folder / "executorch").symlink_to(Path(find_spec("executorch.lib").submodule_search_locations[0]).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packages, "COMPILER", "g++")
        packages.compile_library(LIBRARY, folder)
    return folder / LIBRARY.name


def run_library(library: Path, path: Path, batch: torch.Tensor) -> dict:
    """Run images through a program in a worker that has no PyTorch, and return its last response."""
    job = {**EXECUTORCH.job(path, 1, "fp32", ""), "threads": 1, "cores": [], "library": str(library)}
    np.save(path.parent / "images.npy", batch.numpy())
    command = json.dumps({"images": "images.npy", "outputs": "."})
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    program = [sys.executable, "-I", "-c", code, worker.__file__, json.dumps(job)]
    done = subprocess.run(program, input=command, cwd=path.parent, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1])


def test_its_library_gives_what_its_python_binding_gives(library, copied):
    batch = images(3, 3, PX, PX)
    assert "error" not in run_library(library, copied, batch)
    assert_close(torch.from_numpy(np.load(copied.with_name("0.npy"))), load_artifact(copied).run(batch)[0], 1e-6)


def test_its_library_takes_pixels_and_gives_all_outputs(tiny, tmp_path, library):
    path = tmp_path / "features.pte"
    model, names = feature_maps("shvit_s1", tiny)
    spec = spec_of(tiny, outputs=names, uint8_input=True)
    write_executorch(deploy(model, PX), path, spec)
    pixels = spec.feed(torch.randint(0, 256, (2, 3, PX, PX), dtype=torch.uint8))
    assert "error" not in run_library(library, path, pixels)
    for number, expected in enumerate(load_artifact(path).run(pixels)):
        assert_close(torch.from_numpy(np.load(tmp_path / f"{number}.npy")), expected, 1e-6)
    assert number == len(names) - 1


def test_what_its_library_refuses_is_one_line(library, copied):
    refused = run_library(library, copied, images(1, 3, PX, PX + 1))
    assert refused == {"error": "ValueError: ExecuTorch: Error::NotSupported"}
