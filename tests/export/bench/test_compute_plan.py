"""What `shvit bench` asks of Core ML, as far as coremltools can answer where Core ML is not."""

import dataclasses
import inspect
import json
import platform
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args, get_type_hints

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder
from coremltools.models import compute_device
from coremltools.models import compute_plan as plans
from coremltools.models.ml_program.experimental import perf_utils
from coremltools.models.ml_program.experimental.async_wrapper import LocalMLModelAsyncWrapper
from coremltools.models.ml_program.experimental.model_structure_path import map_model_structure_to_path
from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker
from PIL import Image

from shvit.cli import main, run
from shvit.deployment import deploy
from shvit.errors import InputError
from shvit.export.backends import worker
from shvit.export.backends.compute_plan import COMPUTE_UNITS, DEVICES, device_name, list_operations, list_placements
from shvit.export.backends.coreml import write_coreml
from shvit.export.bench.cases import Settings, create_file_case
from shvit.export.bench.main import Bench
from shvit.export.bench.records import Measurements, Placement, parse_measurements
from shvit.export.bench.runtimes import check_runtimes
from shvit.export.bench.tables import show_placements
from shvit.export.mil.program import Package
from shvit.export.spec import Spec
from tests.conftest import create_tiny

ON_A_MAC = sys.platform == "darwin"


@pytest.fixture(scope="module", params=[True, False], ids=["image", "tensor"])
def package(request, tmp_path_factory):
    model = create_tiny()
    spec = replace(Spec.of("shvit_s1", model, 64), precision="fp16", uint8_input=request.param)
    path = tmp_path_factory.mktemp("coreml") / "tiny.mlpackage"
    write_coreml(deploy(model, 64), path, spec)
    return path


# --- coremltools' classes, whose contents Core ML would give ----------------------------------------------------------


def device(name: str) -> compute_device.MLComputeDevice:
    """An instance without Core ML's own, which `__init__` asks for."""
    return object.__new__(getattr(compute_device, name))


def structure_of(proto) -> plans.MLModelStructure:
    """The structure that Core ML tells of a model, from its protobuf."""

    def block_of(block) -> plans.MLModelStructureProgramBlock:
        operations = [
            plans.MLModelStructureProgramOperation(
                inputs={},
                operator_name=f"ios16.{each.type}" if each.type != "const" else each.type,
                outputs=[
                    plans.MLModelStructureProgramNamedValueType(output.name, plans.MLModelStructureProgramValueType())
                    for output in each.outputs
                ],
                blocks=[block_of(inner) for inner in each.blocks],
                __proxy__=None,
            )
            for each in block.operations
        ]
        return plans.MLModelStructureProgramBlock([], operations, list(block.outputs))

    functions = {
        name: plans.MLModelStructureProgramFunction([], block_of(each.block_specializations[each.opset]))
        for name, each in proto.mlProgram.functions.items()
    }
    return plans.MLModelStructure(None, plans.MLModelStructureProgram(functions), None)


class CoreMLsPart:
    """Of a plan: convolutions on the Neural Engine at three times the cost of the rest; nothing known of ReLUs."""

    def __init__(self, structure: plans.MLModelStructure):
        self.model_structure = structure

    def get_compute_device_usage_for_mlprogram_operation(self, operation):
        kind = operation.operator_name
        if kind in ("const", "ios16.relu"):
            return None
        preferred = device("MLNeuralEngineComputeDevice" if kind == "ios16.conv" else "MLCPUComputeDevice")
        return plans.MLComputePlanDeviceUsage(preferred, [preferred])

    def get_estimated_cost_for_mlprogram_operation(self, operation):
        kind = operation.operator_name
        if kind in ("const", "ios16.relu"):
            return None
        return plans.MLComputePlanCost(0.003 if kind == "ios16.conv" else 0.001)


def plan_of(structure: plans.MLModelStructure) -> plans.MLComputePlan:
    plan = object.__new__(plans.MLComputePlan)
    plan.__proxy__ = CoreMLsPart(structure)
    return plan


def nested():
    """A program with blocks in blocks: a condition within a loop."""

    @Builder.program(input_specs=[Builder.TensorSpec(shape=(1, 2))])
    def program(x):
        def body(i, x):
            first = Builder.reduce_sum(x=x, axes=[0, 1], keep_dims=False)
            return Builder.add(x=i, y=1), Builder.cond(
                pred=Builder.greater(x=first, y=3.0),
                _true_fn=lambda: Builder.tanh(x=x),
                _false_fn=lambda: Builder.square(x=x),
            )

        return Builder.while_loop(_cond=lambda i, x: Builder.less(x=i, y=3), _body=body, loop_vars=(0, x))[1]

    return ct.convert(program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS16).get_spec()


def placement(model, units, operations):
    return Placement.of(model, units, operations, DEVICES.values())


# --- sums -------------------------------------------------------------------------------------------------------------


def test_sums_are_by_device_and_costs_are_percent_of_their_sum():
    found = placement("m", "cpu-ne", [("neural engine", 0.3), ("neural engine", 0.3), ("cpu", 0.2), ("unknown", None)])
    assert found.operations == {"cpu": 1, "gpu": 0, "neural engine": 2, "unknown": 1}
    assert found.cost_percent == pytest.approx({"cpu": 25, "gpu": 0, "neural engine": 75, "unknown": 0})
    assert placement("m", "all", [("cpu", None)]) == Placement(
        "m", "all", {"cpu": 1, "gpu": 0, "neural engine": 0}, {}
    )  # fmt: skip


def test_record_is_read_back_and_older_records_have_none():
    measured = Measurements(None, (), placements=(placement("m", "cpu", [("cpu", 0.5)]),))
    said = json.loads(json.dumps(asdict(measured)))
    assert parse_measurements(said) == measured
    del said["placements"]
    assert parse_measurements(said).placements == ()


def test_table_names_devices_counts_and_shares(capsys):
    show_placements([placement("tiny", "cpu-ne", [("neural engine", 0.3), ("cpu", 0.1), ("unknown", None)])])
    said = capsys.readouterr().out
    assert all(text in said for text in ("tiny", "cpu-ne", "neural engine", "1, 75 %", "1, 25 %", "1, 0 %"))


# --- the plan of a package --------------------------------------------------------------------------------------------


def test_every_operation_of_a_package_is_placed_once(package):
    proto = ct.models.MLModel(str(package), skip_model_load=True).get_spec()
    main = proto.mlProgram.functions["main"]
    kinds = Counter(each.type for each in main.block_specializations[main.opset].operations)
    found = placement("tiny", "all", list_placements(plan_of(structure_of(proto))))
    rest = kinds.total() - kinds["const"] - kinds["conv"] - kinds["relu"]
    assert kinds["conv"] > 10
    assert kinds["relu"] > 3
    expected = {"cpu": rest, "gpu": 0, "neural engine": kinds["conv"], "unknown": kinds["relu"]}
    assert found.operations == expected
    assert found.cost_percent["neural engine"] == pytest.approx(300 * kinds["conv"] / (3 * kinds["conv"] + rest))
    assert sum(found.cost_percent.values()) == pytest.approx(100)


def test_blocks_within_blocks_are_walked_as_coremltools_walks_them():
    structure = structure_of(nested())
    operations = list(list_operations(structure.program.functions["main"].block))
    theirs = {id(operation) for operation, _ in map_model_structure_to_path(structure, [])}
    assert {id(each) for each in operations if each.outputs} == theirs
    assert len({id(each) for each in operations}) == len(operations)
    kinds = {each.operator_name for each in operations}
    assert {"ios16.while_loop", "ios16.cond", "ios16.tanh", "ios16.square", "ios16.less"} <= kinds


# --- coremltools has what is used of it -------------------------------------------------------------------------------


def test_devices_are_coremltools_own():
    kinds = {each.__name__ for each in compute_device.MLComputeDevice.__subclasses__()}
    assert kinds == set(DEVICES)
    assert {device_name(device(kind)) for kind in kinds} == {"cpu", "gpu", "neural engine"}


def test_compute_units_are_coremltools_own():
    assert {ct.ComputeUnit[name] for name in COMPUTE_UNITS.values()} == set(ct.ComputeUnit)
    assert get_args(get_type_hints(Bench)["compute_units"]) == tuple(COMPUTE_UNITS)
    assert Settings(threads=1).compute_units == Bench().compute_units == "all"


def test_coremltools_takes_what_it_is_given():
    def takes(function, *args, **options):
        inspect.signature(function).bind(*args, **options)

    fields = {kind: {each.name for each in dataclasses.fields(kind)} for kind in vars(plans).values()
              if dataclasses.is_dataclass(kind)}  # fmt: skip
    assert "program" in fields[plans.MLModelStructure]
    assert "functions" in fields[plans.MLModelStructureProgram]
    assert "block" in fields[plans.MLModelStructureProgramFunction]
    assert "operations" in fields[plans.MLModelStructureProgramBlock]
    assert {"operator_name", "blocks"} <= fields[plans.MLModelStructureProgramOperation]
    assert "preferred_compute_device" in fields[plans.MLComputePlanDeviceUsage]
    assert "weight" in fields[plans.MLComputePlanCost]
    assert "samples" in {each.name for each in dataclasses.fields(MLModelBenchmarker.Measurement)}
    takes(plans.MLComputePlan.load_from_path, "m.mlmodelc", compute_units=ct.ComputeUnit.ALL)
    takes(ct.models.utils.compile_model, "m.mlpackage", "m.mlmodelc")
    takes(ct.models.MLModel, "m.mlpackage", compute_units=ct.ComputeUnit.ALL, skip_model_load=True)
    takes(MLModelBenchmarker, "model")
    takes(MLModelBenchmarker.benchmark_load, "self")
    takes(MLModelBenchmarker.benchmark_predict, "self", {}, iterations=2)
    for coroutine in (MLModelBenchmarker.benchmark_load, MLModelBenchmarker.benchmark_predict):
        assert inspect.iscoroutinefunction(coroutine)
    assert LocalMLModelAsyncWrapper.last_predict_duration_in_nano_seconds.fget is not None


@pytest.mark.skipif(ON_A_MAC, reason="Core ML runs")
def test_benchmarker_gets_as_far_as_core_ml(package):
    """All of it that is Python: the package is read, copied and handed over to a Core ML that is not there."""
    with pytest.raises(ValueError, match="Failed to load model"):
        worker.CoreML({"path": str(package), "compute_units": "CPU_AND_NE"})


def test_worker_feeds_a_package_what_it_asks_for(package):
    description = ct.models.MLModel(str(package), skip_model_load=True).get_spec().description
    inputs = worker.coreml_inputs(description)
    assert list(inputs) == ["image"]
    image = inputs["image"]
    if isinstance(image, Image.Image):
        assert (image.size, image.mode) == ((64, 64), "RGB")
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    output = Package(package)(image=torch.as_tensor(image))["logits"]
    assert output.shape == (1, 10)
    assert output.isfinite().all()


def test_worker_feeds_gray_images():
    description = ct.proto.Model_pb2.ModelDescription()
    gray = description.input.add(name="image").type.imageType
    gray.height, gray.width, gray.colorSpace = 48, 64, gray.ColorSpace.GRAYSCALE
    image = worker.coreml_inputs(description)["image"]
    assert (image.size, image.mode) == ((64, 48), "L")


def test_benchmarkers_own_inputs_do_not_know_images(package):
    """If this fails, `worker.coreml_inputs` can go."""
    description = ct.models.MLModel(str(package), skip_model_load=True).get_spec().description
    if description.input[0].type.WhichOneof("Type") == "imageType":
        with pytest.raises(ValueError, match="Unsupported feature type"):
            perf_utils._gen_random_inputs(description)
    else:
        assert perf_utils._gen_random_inputs(description)["image"].shape == (1, 3, 64, 64)


def test_time_of_a_call_is_what_the_runtime_says():
    times = worker.time_calls(lambda: 0.25, 0.0, worker.reported_time)
    assert times["wall"] == [0.25, 0.25]


# --- commands ---------------------------------------------------------------------------------------------------------


def said_by(capsys, monkeypatch, *options: str) -> str:
    monkeypatch.setattr(sys, "argv", ["shvit", "bench", *options])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


@pytest.mark.skipif(ON_A_MAC, reason="Core ML runs")
@pytest.mark.parametrize("units", ["all", "cpu", "cpu-gpu", "cpu-ne"])
def test_elsewhere_core_ml_is_refused_in_one_line(capsys, monkeypatch, units):
    said = said_by(capsys, monkeypatch, "--runtimes", "coreml", "--compute-units", units)
    assert said == "shvit bench: runtime coreml needs macOS, of which Core ML is a part; leave it out here\n"


@pytest.mark.skipif(ON_A_MAC, reason="Core ML runs")
@pytest.mark.parametrize("option", ["--models", "--against"])
def test_elsewhere_a_package_is_refused_in_one_line(capsys, monkeypatch, package, option):
    said = said_by(capsys, monkeypatch, option, str(package), "--compute-units", "cpu-ne")
    assert said == "shvit bench: runtime coreml needs macOS, of which Core ML is a part; leave it out here\n"
    with pytest.raises(InputError, match="needs macOS"):
        create_file_case(package, 1, Settings(threads=1), [], tuned=True)


def test_older_macos_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("13.6.1", ("", "", ""), "arm64"))
    with pytest.raises(InputError, match=r"needs macOS 14\.4 or newer, .* this is 13\.6\.1; leave it out here"):
        check_runtimes(["coreml"])
    monkeypatch.setattr(platform, "mac_ver", lambda: ("26.0", ("", "", ""), "arm64"))
    check_runtimes(["coreml"])


def test_compute_units_of_nothing_are_refused():
    with pytest.raises(InputError, match="--compute-units cpu-ne is for Core ML, and nothing here runs in Core ML"):
        run(["bench", "--models", "tiny_vit", "--runtimes", "torch", "--compute-units", "cpu-ne"])
    with pytest.raises(InputError, match="compute-units"):
        run(["bench", "--runtimes", "coreml", "--compute-units", "CPU_ONLY"])


def test_job_carries_coremltools_name(package, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("26.0", ("", "", ""), "arm64"))
    case = create_file_case(package, 1, Settings(threads=1, compute_units="cpu-ne"), [], tuned=True)
    assert (case.runtime, case.precision, case.img_size) == ("coreml", "fp16", (64, 64))
    assert case.job["compute_units"] == "CPU_AND_NE"
    assert Path(case.job["path"]) == package.resolve()
