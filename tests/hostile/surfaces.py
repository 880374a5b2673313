"""Where third-party files come in: valid ones to begin with, and what reads them."""

import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shvit.errors import InputError

from . import mutators
from .mutators import Mutator


@dataclass(frozen=True)
class Surface:
    """A kind of file."""

    seeds: Callable[[], list[bytes]]
    """Makes valid files."""
    attack: Callable[[bytes], None]
    """Reads one as the commands do: it must return, or raise InputError."""
    mutators: Sequence[Mutator]


def _written(data: bytes, name: str) -> Path:
    """A file in a folder of this process, with nothing else in it."""
    folder = Path(tempfile.gettempdir()) / f"shvit-fuzz-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


# --- images -----------------------------------------------------------------------------------------------------------


def _images() -> list[bytes]:
    from PIL import Image

    seeds = []
    formats = {"PNG": ("RGB", "LA", "P", "I;16"), "JPEG": ("RGB", "L", "CMYK"), "TIFF": ("RGB", "I;16", "LAB"),
               "GIF": ("P",), "BMP": ("RGB",), "WEBP": ("RGBA",), "PPM": ("L",)}  # fmt: skip
    for kind, modes in formats.items():
        for mode in modes:
            file, exif = io.BytesIO(), Image.Exif()
            exif[0x0112] = 6
            options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}
            Image.new(mode, (9, 7)).save(file, kind, **options)
            seeds.append(file.getvalue())
    return seeds


def attack_image(data: bytes) -> None:
    """As training, evaluation and calibration open an image."""
    from shvit.train.data.images import open_image

    open_image(_written(data, "x.jpg")).convert("RGB").load()


# --- predictions ------------------------------------------------------------------------------------------------------


def _videos() -> list[bytes]:
    import av
    import numpy as np

    seeds = []
    for codec, kind, layout in (
        ("ffv1", "matroska", "bgr0"),
        ("mpeg4", "mp4", "yuv420p"),
        ("mjpeg", "avi", "yuvj420p"),
    ):
        file = io.BytesIO()
        with av.open(file, "w", format=kind) as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, layout
            for shade in (0, 90, 200):
                pixels = np.full((32, 32, 3), shade, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        seeds.append(file.getvalue())
    return seeds


def attack_video(data: bytes) -> None:
    """As `shvit predict` reads a video's frames."""
    from shvit.export.predict.videos import open_video

    for frame in open_video(_written(data, "x.mp4"), 1).frames():
        assert (frame.image is None) == bool(frame.problem)


def _journals() -> list[bytes]:
    records = ({"path": "a.jpg", "labels": ["x"], "probabilities": [0.5]}, {"path": "b.jpg", "error": "damaged"})
    lines = [f"{part} {offset} {json.dumps(records[offset % 2])}\n" for part in (0, 1) for offset in range(5)]
    return ["".join(lines).encode(), "".join(lines[:3]).encode()]


def attack_journal(data: bytes) -> None:
    """As an interrupted `shvit predict` resumes: what is kept is whole lines, in order."""
    from shvit.export.predict.journal import Journal

    path = _written(data, "lines")
    journal = Journal(path.parent, 0, 2)
    journal.close()
    kept = [*journal.records()]
    assert len(kept) == journal.count
    assert journal.damaged == sum("error" in record for record in kept)
    assert data.startswith(path.read_bytes())


# --- models -----------------------------------------------------------------------------------------------------------


def _onnx() -> list[bytes]:
    from onnx import TensorProto, helper, numpy_helper

    from shvit.export.metadata import FORMAT_KEY, FORMAT_VERSION, INPUT, LABELS_KEY, RANGES_KEY, SPEC_KEY

    def model(raw: bool) -> bytes:
        import numpy as np

        spec = _spec(raw)
        shape = [1, 16, 16, 3] if raw else [1, 3, 16, 16]
        kind = TensorProto.UINT8 if raw else TensorProto.FLOAT
        nodes = [
            helper.make_node("Cast", [INPUT], ["a"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["a"], ["b"], axes=[1, 2] if raw else [2, 3], keepdims=0),
            helper.make_node("Gemm", ["b", "w"], ["logits"]),
        ]
        weight = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
        inputs = [helper.make_tensor_value_info(INPUT, kind, shape)]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 2])]
        made = helper.make_model(
            helper.make_graph(nodes, "g", inputs, outputs, [weight]), opset_imports=[helper.make_opsetid("", 17)]
        )
        made.ir_version = 8
        notes = {SPEC_KEY: spec, LABELS_KEY: '["a", "b"]', RANGES_KEY: '{"b": [0.0, 1.0]}'}
        helper.set_model_props(made, {FORMAT_KEY: str(FORMAT_VERSION), **notes})
        return made.SerializeToString()

    return [model(False), model(True)]


def _spec(raw: bool = False) -> str:
    from shvit.export.spec import Spec

    mean = (0.485, 0.456, 0.406)
    fields = {"model": "shvit_s1", "img_size": 16, "in_chans": 3, "num_classes": 2, "mean": mean, "std": mean,
              "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center", "outputs": ("logits",)}  # fmt: skip
    return Spec(**fields, uint8_input=raw).to_json()


def attack_onnx(data: bytes) -> None:
    """As `shvit eval --artifact` and `shvit verify` open and run a file."""
    import torch

    from shvit.export.backends.registry import load_artifact

    artifact = load_artifact(_written(data, "x.onnx"), threads=1)
    artifact(torch.zeros(1, *artifact.spec.shape, dtype=torch.uint8))


def _ncnn() -> list[bytes]:
    """A graph of few layers, with what else belongs to the model kept in `attack_ncnn`."""
    return [
        b"""7767517
6 7
Input in 0 1 image 0=16 1=16 2=3
Convolution conv 1 1 image a 0=4 1=3 11=3 3=2 4=1 5=1 6=108 9=1
Split twice 1 2 a b c
BinaryOp twofold 2 1 b c d 0=0
Pooling mean 1 1 d e 0=1 4=1
InnerProduct head 1 1 e logits 0=2 1=1 2=8
"""
    ]


def attack_ncnn(data: bytes) -> None:
    """As `shvit eval --artifact` and `shvit verify` open and run a model."""
    import torch

    from shvit.documents import to_json
    from shvit.export.backends.registry import load_artifact
    from shvit.export.metadata import FORMAT_KEY, FORMAT_VERSION, SPEC_KEY

    weights = [bytes(4), bytes(4 * 108), bytes(4 * 4), bytes(4), bytes(4 * 8), bytes(4 * 2)]
    _written(b"".join(weights), "x.ncnn.bin")
    _written(to_json({FORMAT_KEY: str(FORMAT_VERSION), SPEC_KEY: _spec()}).encode(), "x.ncnn.json")
    artifact = load_artifact(_written(data, "x.ncnn.param"), threads=1)
    artifact(torch.zeros(1, *artifact.spec.shape, dtype=torch.uint8))


def _litert() -> list[bytes]:
    """The smallest file that has a layer: made without the converter, which takes seconds."""
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    from shvit.export.formats.litert import pack, write_notes
    from shvit.export.metadata import FORMAT_KEY, FORMAT_VERSION, SPEC_KEY

    model, graph, code, operator = schema.ModelT(), schema.SubGraphT(), schema.OperatorCodeT(), schema.OperatorT()
    weights = schema.BufferT()
    model.version, model.buffers, model.subgraphs, model.operatorCodes = 3, [schema.BufferT(), weights], [graph], [code]
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
    code.version = 1
    graph.tensors = []
    for name, shape, buffer in (("image", [1, 3, 16, 16], 0), ("head.l", [2, 3 * 16 * 16], 1), ("logits", [1, 2], 0)):
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name.encode(), shape, buffer
        graph.tensors.append(tensor)
    weights.data = np.zeros(4 * 2 * 3 * 16 * 16, np.uint8)
    operator.inputs, operator.outputs = [0, 1, -1], [2]
    operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
    operator.builtinOptions = schema.FullyConnectedOptionsT()
    graph.operators, graph.inputs, graph.outputs = [operator], [0], [2]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.inputs, signature.outputs = b"serving_default", [], []
    for ports, name, index in ((signature.inputs, b"image", 0), (signature.outputs, b"logits", 2)):
        port = schema.TensorMapT()
        port.name, port.tensorIndex = name, index
        ports.append(port)
    model.signatureDefs = [signature]
    write_notes(model, {FORMAT_KEY: str(FORMAT_VERSION), SPEC_KEY: _spec()})
    return [pack(model)]


def attack_litert(data: bytes) -> None:
    """As `shvit eval --artifact` and `shvit verify` open and run a file."""
    import torch

    from shvit.export.backends.registry import load_artifact

    artifact = load_artifact(_written(data, "x.tflite"), threads=1)
    artifact(torch.zeros(1, *artifact.spec.shape, dtype=torch.uint8))
    artifact.parameters()
    artifact.scale_faults()


def _executorch() -> list[bytes]:
    """A program of one convolution and a mean."""
    import torch

    from shvit.export.backends.executorch import write_executorch
    from shvit.export.spec import Spec

    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    path = _written(b"", "seed.pte")
    write_executorch(torch.nn.Sequential(*layers, torch.nn.Linear(4, 2)).eval(), path, Spec.from_json(_spec()), "ab")
    return [path.read_bytes()]


def attack_executorch(data: bytes) -> None:
    """As `shvit eval --artifact` and `shvit verify` open and run a program."""
    import torch

    from shvit.export.backends.registry import load_artifact

    artifact = load_artifact(_written(data, "x.pte"), threads=1)
    artifact(torch.zeros(1, *artifact.spec.shape, dtype=torch.uint8))
    artifact.run_layers(torch.zeros(1, *artifact.spec.shape))
    artifact.parameters()
    artifact.scale_faults()


def _safetensors() -> list[bytes]:
    import timm
    import torch
    from safetensors.torch import save

    from shvit.weights.run_info import RunInfo

    torch.manual_seed(0)
    state = timm.create_model("shvit_s1", num_classes=2).state_dict()
    small = {name: tensor[:1].contiguous() if tensor.ndim > 1 else tensor for name, tensor in state.items()}
    small["head.l.weight"], file = state["head.l.weight"], io.BytesIO()
    torch.save({"model": dict(list(small.items())[:9])}, file)
    return [save(small, {"format": "pt", **RunInfo("shvit_s1", ("a", "b"), 64).metadata}), file.getvalue()]


def attack_checkpoint(data: bytes) -> None:
    """As `--checkpoint` reads a file."""
    from shvit.checkpoint import read_checkpoint
    from shvit.weights.run_info import read_run_info

    path = _written(data, "x.pth" if data[:2] in (b"PK", b"\x80\x02") else "x.safetensors")
    read_run_info(path)
    read_checkpoint(path)


# --- records and recipes ----------------------------------------------------------------------------------------------


def _json() -> list[bytes]:
    said = {"name": "phone", "browser": "b", "cores": 8, "memory_gb": None, "gpu": "", "missing": {}}
    case = {
        "model": "tiny",
        "precision": "fp32",
        "sha256": "0" * 64,
        "img_size": 64,
        "gmacs": 0.1,
        "backend": "wasm",
        "threads": 1,
        "cpu_fallback": False,
        "check": None,
        "error": "",
        "load_ms": 1.5,
        "first_ms": 3,
        "rounds": [[1.5]],
    }
    record = {"format": "shvit-phone-1", "device": said, "runtime": "r", "cases": [case], "sustained": []}
    result = {"model": "shvit_s1", "runtime": "torch", "precision": "fp32", "img_size": 224, "batch_size": 1,
              "threads": 1, "rounds": 3, "calls": 30, "latency_ms_p50": 1.5, "latency_ms_p90": 2, "latency_ms_p99": 3,
              "cpu_ms": 1, "ratio_to_first": 1.0, "ratio_low": 0.9, "ratio_high": 1.1, "load_ms": 5, "first_ms": 6,
              "peak_memory_mb": 100, "gmacs": 0.24, "percent_of_peak": 20, "top1": 72.8,
              "device": "phone"}  # fmt: skip
    lock = {"shvit_s1": {"sha256": "0" * 64, "size_bytes": 1, "url": "https://example.org/x", "date": "2026-01-01"}}
    certificate = {"format_version": 1, "artifact": "x.onnx", "artifact_sha256": "0" * 64, "checkpoint": "shvit_s1",
                   "checkpoint_sha256": None, "model": "shvit_s1", "ema": False, "passed": True}  # fmt: skip
    measured = {"machine": None, "results": [result], "devices": [{**said, "runtime": "r"}]}
    documents = (measured, record, lock, certificate, json.loads(_spec()))
    return [json.dumps(document).encode() for document in documents]


def attack_json(data: bytes) -> None:
    """As every reader of JSON takes it: certificates, measurements, records, the cache's hashes, specs."""
    from shvit.certificate import read_origin
    from shvit.export.bench.records import read_measurements
    from shvit.export.browser.phone_record import read_record_file
    from shvit.export.spec import Spec
    from shvit.weights.cache import read_lock

    path = _written(data, "lock.json")
    readers = (
        lambda: read_lock(path.parent),
        lambda: read_record_file(path),
        lambda: read_measurements(path),
        lambda: read_origin(_written(data, "x.onnx.certificate.json").with_name("x.onnx")),
        lambda: Spec.from_json(data.decode("utf-8", "replace")),
    )
    _try_all(readers)


def _try_all(readers: Sequence[Callable[[], object]]) -> None:
    """Raises the last InputError where no reader takes it."""
    refusals = []
    for reader in readers:
        try:
            reader()
        except InputError as error:  # noqa: PERF203
            refusals.append(error)
    if len(refusals) == len(readers):
        raise refusals[-1]


def _yaml() -> list[bytes]:
    import yaml

    from shvit.train.recipe import Recipe

    recipe = json.loads(json.dumps(Recipe().as_dict(), default=str))
    data = {"train": "0" * 64, "val": "0" * 64}
    run = {"recipe": recipe, "data": data, "classes": ["a", "b"]}
    return [yaml.safe_dump(recipe).encode(), yaml.safe_dump(run).encode(), json.dumps(recipe).encode()]


def attack_yaml(data: bytes) -> None:
    """As `shvit train --recipe` and a run folder's recipe are read."""
    from shvit.train.data.eval_dataset import read_trained_on
    from shvit.train.recipe import read_recipe

    path = _written(data, "recipe.yaml")
    read_trained_on(path.with_name("best.safetensors"))
    read_recipe(path)


# --- detection --------------------------------------------------------------------------------------------------------


def _coco() -> list[bytes]:
    image = {"id": 1, "file_name": "a.png", "width": 9, "height": 7}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 4], "area": 20.0, "iscrowd": 0}
    import numpy as np
    from pycocotools import mask as codec

    counts = codec.encode(np.asfortranarray(np.eye(7, 9, dtype=np.uint8)))["counts"].decode()
    outline = [[1, 1, 6, 1, 6, 5, 1, 5]]
    plain = {**box, "segmentation": outline}
    masks = (outline, {"size": [7, 9], "counts": [8, 5, 50]}, {"size": [7, 9], "counts": counts})
    crowds = [{**box, "id": 2, "segmentation": mask, "iscrowd": int(isinstance(mask, dict))} for mask in masks]
    categories = [{"id": 1, "name": "cat"}]
    return [
        json.dumps({"images": [image], "categories": categories, "annotations": [plain, crowd]}).encode()
        for crowd in crowds
    ]


def attack_coco(data: bytes) -> None:
    """As `shvit detect train` checks annotations."""
    from PIL import Image

    from shvit.detection.coco.annotations import check_annotations

    path = _written(data, "annotations.json")
    if not path.with_name("a.png").exists():
        Image.new("RGB", (9, 7)).save(path.with_name("a.png"))
    check_annotations(path, path.parent, ("cat",), masks=True)


def _configs() -> list[bytes]:
    from shvit.detection.parsing.config import list_configs, load_config
    from shvit.detection.parsing.reader import CONFIGS

    ours = [path.read_text() for path in sorted(CONFIGS.glob("*-s1_*.py"))]
    flat = [load_config(name).pretty_text for name in list_configs() if "-s1_" in name]
    return [text.replace("./_base_", "{{$SHVIT_CONFIGS:}}/_base_").encode() for text in (*ours, *flat)]


def attack_config(data: bytes) -> None:
    """As the detection commands read a config without --trust-config; it must run nothing, and so write nothing."""
    from shvit.detection.parsing.config import load_config

    path = _written(data, "config.py")
    before = set(path.parent.iterdir())
    try:
        load_config(str(path))
    finally:
        if set(path.parent.iterdir()) != before:
            raise AssertionError("a config wrote a file")


SURFACES = {
    "images": Surface(_images, attack_image, [mutators.mutate_image]),
    "videos": Surface(_videos, attack_video, [mutators.mutate_bytes]),
    "journals": Surface(_journals, attack_journal, [mutators.mutate_text, mutators.mutate_bytes]),
    "onnx": Surface(_onnx, attack_onnx, [mutators.mutate_onnx]),
    "litert": Surface(_litert, attack_litert, [mutators.mutate_bytes]),
    "ncnn": Surface(_ncnn, attack_ncnn, [mutators.mutate_text]),
    "executorch": Surface(_executorch, attack_executorch, [mutators.mutate_bytes]),
    "json": Surface(_json, attack_json, [mutators.mutate_json, mutators.mutate_json, mutators.mutate_text]),
    "yaml": Surface(_yaml, attack_yaml, [mutators.mutate_text, mutators.mutate_json]),
    "safetensors": Surface(_safetensors, attack_checkpoint, [mutators.mutate_safetensors]),
    "coco": Surface(_coco, attack_coco, [mutators.mutate_json, mutators.mutate_json, mutators.mutate_text]),
    "configs": Surface(_configs, attack_config, [mutators.mutate_text]),
}
