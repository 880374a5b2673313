"""A file on an emulated ARM64 processor: its certificate, what it is refused for, and what a program sees there."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from shvit import cli
from shvit.checkpoint import write_checkpoint
from shvit.documents import load_json
from shvit.errors import InputError
from shvit.export.arm64 import emulator
from shvit.export.arm64.compare import certify_arm64
from shvit.export.arm64.root import PYTHON, open_root
from shvit.export.backends.executorch import EXECUTORCH
from shvit.export.backends.onnx import ONNX
from shvit.export.pipeline import export_model, verify_artifact
from shvit.export.source import create_source
from shvit.export.spec import Spec, randomize_norms
from shvit.export.tables import show
from shvit.terminal import console
from tests.conftest import settle
from tests.emulation import need_compiler, need_emulator

PX, CLASSES = 64, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images, and a tiny model that tells them apart."""
    folder = tmp_path_factory.mktemp("arm64")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for index in range(12):
        pixels = rng.integers(0, 255, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).resize((96, 80), Image.Resampling.BICUBIC).save(folder / "images" / f"{index:02}.png")
    write_checkpoint(model_of(folder).state_dict(), folder / "tiny.safetensors")
    return folder


def model_of(folder, seed: int = 5) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("tiny_vit", num_classes=CLASSES)
    randomize_norms(model)
    transform = Spec.of("tiny_vit", model, PX).transform()
    images = [transform(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))]
    return settle(model, torch.stack(images))


@pytest.fixture(scope="module")
def root():
    """The root with ONNX Runtime, made the first time."""
    need_emulator()
    return open_root(ONNX.name, ONNX.arm64)


@pytest.fixture(scope="module")
def certificate(folder, root):
    return export_model("onnx", "tiny_vit", folder / "tiny.onnx", checkpoint=folder / "tiny.safetensors", img_size=PX,
                        images=folder / "images", arm64="cortex-a53")  # fmt: skip


def test_a_sound_file_holds_on_arm64(certificate, root, folder, capsys):
    section = certificate.arm64
    assert load_json(folder / "tiny.onnx.certificate.json")["arm64"]["root_sha256"] == section.root_sha256
    show(certificate, console())
    printed = " ".join(capsys.readouterr().out.split())
    assert "on ARM64 it matches its model (12 images)" in printed
    assert "QEMU's cortex-a53: asimd " in printed
    assert certificate.passed is section.passed is True
    assert (section.cpu, section.features, section.images) == ("cortex-a53", ("asimd",), 12)
    assert section.root_sha256 == root.sha256
    assert section.versions["onnxruntime"] == ONNX.arm64.wheels[0].version
    assert section.snr_db > 90
    assert 100 < section.host_snr_db < 200  # sums in another order: it did run elsewhere
    assert section.outputs.keys() == certificate.outputs.keys()


def test_another_models_file_is_refused_on_arm64(certificate, folder):
    """Its certificate, which it has of its own model, says nothing against it."""
    source = create_source(model_of(folder, seed=6), img_size=PX, images=folder / "images")
    alone = replace(certificate, arm64=None)
    refused = certify_arm64(alone, folder / "tiny.onnx", source.reference, "cortex-a76")
    assert refused.passed is refused.arm64.passed is False
    assert refused.arm64.features == ("asimd", "asimdhp", "asimddp")
    assert refused.reasons[0].startswith("ARM64 (cortex-a76): signal to noise ")
    assert refused.arm64.host_snr_db > 90  # it is not the processor's fault


WITHIN = """
import os, socket
print(*sorted(os.listdir("/")), *os.listdir("/proc"))
print(os.path.exists({path!r}), os.getuid())
try:
    socket.create_connection(("127.0.0.1", {port}), 5)
except OSError:
    print("alone")
"""


def test_a_program_sees_its_root_and_nothing_else(root, folder):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server, root.copied("max") as copy:
        script = WITHIN.format(path=str(folder), port=server.getsockname()[1])
        ended = emulator.run(copy, "max", [PYTHON, "-I", "-c", script], "", 60)
    seen, others, network = ended.printed.splitlines()
    assert {"proc", "qemu", "sys", "tmp", "usr", "work", "cpuinfo"} <= {*seen.split()}
    assert "home" not in seen.split()
    assert others.startswith("False ")
    if len(emulator.confined()) > 1:
        assert network == "alone"


PROGRAMS = {
    "import os; os.abort()": "Aborted",
    "open('big', 'wb').write(bytes(1 << 21))": "File too large",
    "raise ValueError('this is wrong')": "ValueError: this is wrong",
}


@pytest.mark.parametrize("script", PROGRAMS)
def test_what_goes_wrong_in_a_program_is_told(root, script, monkeypatch):
    monkeypatch.setattr(emulator, "MAX_FILE_BYTES", 1 << 20)
    with root.copied("max") as copy:
        ended = emulator.run(copy, "max", [PYTHON, "-I", "-c", script], "", 60)
    assert ended.status != 0
    assert PROGRAMS[script] in ended.last_words


def test_a_program_has_only_so_much_time(root):
    with root.copied("max") as copy, pytest.raises(RuntimeError, match=r"it does not end in 2 s"):  # and starts in one
        emulator.run(copy, "max", [PYTHON, "-I", "-c", "while True: pass"], "", 2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_executorch_holds_on_arm64(folder, precision):
    need_emulator()
    need_compiler()
    path = folder / f"{precision}.pte"
    found = export_model("executorch", "tiny_vit", path, checkpoint=folder / "tiny.safetensors", img_size=PX,
                         precision=precision, raw_pixels=precision == "fp16", images=folder / "images",
                         arm64="cortex-a76")  # fmt: skip
    assert found.passed is found.arm64.passed is True
    assert found.arm64.versions["executorch"] == EXECUTORCH.arm64.wheels[0].version
    assert found.arm64.host_snr_db < 200  # sums in another order: it did run elsewhere


def test_options_of_arm64_go_together(folder):
    with pytest.raises(InputError, match=r"--cpu does not apply: it is the processor of --arm64; leave it out"):
        cli.run(["verify", "x.onnx", "--cpu", "max"])
    with pytest.raises(InputError, match=r"--cpu does not apply: it is the processor of --verify-arm64"):
        cli.run(["export", "onnx", "--output", f"{folder}/x.onnx", "--cpu", "max"])
    with pytest.raises(InputError, match=r"Core ML has no runtime for ARM64 Linux"):
        cli.run(["export", "coreml", "--output", f"{folder}/x.mlpackage", "--verify-arm64"])
    with pytest.raises(InputError, match=r"cortex-a53"):
        cli.run(["verify", "x.onnx", "--arm64", "--cpu", "cortex-m0"])


def test_all_formats_are_refused_before_one_is_written_where_arm64_lacks_something(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"--arm64 needs"):
        cli.run(["export", "all", "--model", "tiny_vit", "--checkpoint", f"{folder}/tiny.safetensors", "--verify-arm64",
                 "--img-size", f"{PX}", "--images", f"{folder}/images", "--output", f"{folder}/all"])  # fmt: skip
    assert not (folder / "all").exists()


@pytest.mark.slow
def test_verify_finds_what_export_found(certificate, folder):
    found = cli.run(["verify", f"{folder}/tiny.onnx", "--images", f"{folder}/images", "--arm64", "--cpu", "cortex-a53"])
    assert found["arm64"]["snr_db"] == pytest.approx(certificate.arm64.snr_db)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_ncnn_holds_on_arm64(folder, precision):
    need_emulator()
    path = folder / f"{precision}.ncnn.param"
    found = export_model("ncnn", "tiny_vit", path, checkpoint=folder / "tiny.safetensors", img_size=PX,
                         precision=precision, images=folder / "images", arm64="cortex-a76")  # fmt: skip
    assert found.passed is True
    own = verify_artifact(path, images=folder / "images", arm64="cortex-a53").arm64
    if precision == "fp16":  # a processor with float16 arithmetic sums in it, one without does not
        assert own.host_snr_db > found.arm64.host_snr_db + 20
