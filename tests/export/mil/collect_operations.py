"""Collect the MIL operations that Core ML packages hold: `python -m tests.export.mil.collect_operations`.

The command converts SHViT in every form that is exported, the feature maps of detectors, models of many families from
timm, all with random weights, and the cases of `test_program.py`. It writes `operations.json` beside this file: the
packages, and for each operation the first packages that hold it. `shvit.export.mil` computes these operations and no
others. The command takes about half an hour.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import coremltools as ct
import timm
import torch
from coremltools.proto.Model_pb2 import Model
from torch import nn

from shvit.deployment import deploy
from shvit.export.backends.coreml import write_coreml
from shvit.export.spec import Spec, randomize_norms
from shvit.export.wrappers import Probabilities, feature_maps
from tests.conftest import create_tiny
from tests.export.mil.test_program import convert_cases

TABLE = Path(__file__).with_name("operations.json")
EXAMPLES = 5
"""The number of packages that are named for each operation."""
SIZES = (64, None)
"""Pixels to try in turn; None is the model's own size."""
MODELS = (
    *("resnet18", "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small", "efficientnet_lite0"),
    *("tf_efficientnet_b0", "ghostnet_100", "mobileone_s0", "repvgg_a0", "regnetx_002", "densenet121"),
    *("convnext_atto", "convnextv2_atto", "edgenext_xx_small", "efficientformerv2_s0", "efficientvit_b0"),
    *("efficientvit_m0", "fastvit_t8", "repvit_m0_9", "mobilevit_xxs", "mobilevitv2_050", "levit_128s"),
    *("vit_tiny_patch16_224", "deit_tiny_patch16_224", "poolformer_s12", "tiny_vit_5m_224"),
    *("swin_tiny_patch4_window7_224", "efficientformer_l1"),
)
"""coremltools 9 converts all of them but convnextv2_atto, which needs `addcmul`."""


def operations(path: Path) -> set[str]:
    """Return the types of all operations of a package but constants."""
    proto: Model = ct.models.MLModel(str(path), skip_model_load=True).get_spec()
    main = proto.mlProgram.functions["main"]
    found = {op.type for op in main.block_specializations[main.opset].operations}
    return {name for name in found if not name.startswith("const")}


def convert(model: nn.Module, spec: Spec, classifier: bool = False) -> set[str]:
    """Return the operations of what `write_coreml` makes of a model."""
    calibration = list(torch.randint(0, 256, (2, *spec.shape), dtype=torch.uint8)) if spec.precision == "w8a8" else []
    labels = [str(index) for index in range(spec.num_classes)] if classifier else []
    options = {"classifier": classifier, "labels": labels, "calibration": calibration}
    with TemporaryDirectory() as folder:
        write_coreml(model, Path(folder) / "m.mlpackage", spec, **options)
        return operations(Path(folder) / "m.mlpackage")


def own_packages() -> Iterator[tuple[str, set[str]]]:
    """Yield every form of SHViT that is exported, and the operations of its package."""
    model = create_tiny()
    plain = Spec.of("shvit_s1", model, 64)
    for precision in ("fp32", "fp16", "int8", "w8a8"):
        for pixels in (False, True):
            spec = replace(plain, precision=precision, uint8_input=pixels)
            yield f"SHViT, {precision}{', pixels' * pixels}", convert(deploy(model, 64), spec)
            if precision != "w8a8":
                sizes = replace(spec, other_sizes=(96, 128))
                yield f"SHViT, {precision}{', pixels' * pixels}, sizes", convert(deploy(model), sizes)
        spec = replace(plain, precision=precision, uint8_input=True, outputs=("probabilities",))
        yield f"SHViT, {precision}, classifier", convert(deploy(Probabilities(model).eval(), 64), spec, True)
        for other_sizes in ((96,), ()) if precision != "w8a8" else ((),):
            maps, outputs = feature_maps("shvit_s1", create_tiny())
            spec = replace(plain, precision=precision, uint8_input=True, outputs=outputs, num_classes=0)
            maps = deploy(maps, None if other_sizes else 64)
            name = f"SHViT, {precision}, features{', sizes' if other_sizes else ''}"
            yield name, convert(maps, replace(spec, other_sizes=other_sizes))

    from shvit.detection.pyramid import create_pyramid

    name = "retinanet_shvit-s1_fpn_1x_coco"
    maps, outputs = feature_maps(name, create_pyramid(name))
    spec = replace(Spec.of(name, maps, 128), uint8_input=True, outputs=outputs)
    yield f"{name}, fp32", convert(deploy(maps, 128), spec)


def timm_packages() -> Iterator[tuple[str, set[str]]]:
    """Yield models of timm with random weights, and the operations of their packages; those that fail are printed."""
    for index, name in enumerate(MODELS):
        precision = ("fp32", "fp16")[index % 2]
        for size in SIZES:
            try:
                model = timm.create_model(name, num_classes=5).eval()
                randomize_norms(model)
                spec = replace(Spec.of(name, model, size), precision=precision, uint8_input=True)
                yield f"{name}, {precision}", convert(deploy(model, spec.img_size), spec)
                break
            except Exception as error:
                print(f"{name} at {size} px: {str(error).splitlines()[0][:200]}", file=sys.stderr, flush=True)


def packages_of_cases() -> Iterator[tuple[str, set[str]]]:
    """Yield one package with every case of `test_program.py`, and its operations."""
    with TemporaryDirectory() as folder:
        yield "test_program.py", operations(convert_cases(Path(folder)))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sources = {"SHViT": own_packages, "timm": timm_packages, "tests": packages_of_cases}
    table: dict[str, list[str]] = {}
    looked_at: dict[str, list[str]] = {source: [] for source in sources}
    for source, packages in sources.items():
        for name, found in packages():
            looked_at[source].append(name)
            for operation in found:
                examples = table.setdefault(operation, [])
                if len(examples) < EXAMPLES:
                    examples.append(name)
            print(f"{name}: {len(table)} operations so far", flush=True)
    versions = {"coremltools": ct.__version__, "timm": timm.__version__, "torch": torch.__version__}
    content = {"versions": versions, **looked_at, "operations": dict(sorted(table.items()))}
    TABLE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
