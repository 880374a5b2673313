"""The judge is judged: files with one deliberate defect are refused, sound ones are not."""

import pytest
from judged import (
    COREML_SCALE_DEFECTS,
    COREML_WEIGHT_DEFECTS,
    GRAPH_DEFECTS,
    ONNX_GRAPH_DEFECTS,
    SCALE_DEFECTS,
    WEIGHT_DEFECTS,
    Workshop,
    inner_spec_defects,
    judged,
    spec_defects,
)

from shvit.export.spec import Spec

SPEC = Spec("tiny_vit", 64, 3, 10, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875)
FORMATS = {
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "bf16", "int8"),
    "coreml": ("fp32", "fp16", "int8", "w8a8"),
}
FILES = [(kind, precision) for kind, precisions in FORMATS.items() for precision in precisions]


def defects_of(kind: str, precision: str) -> list[str]:
    """All that a file of this format can have."""
    graph = GRAPH_DEFECTS if kind == "coreml" else ONNX_GRAPH_DEFECTS
    names = [*spec_defects(SPEC), *inner_spec_defects(SPEC), *WEIGHT_DEFECTS, *graph]
    names += ["labels permuted", "a softmax twice"]
    if precision == "fp16" or (kind == "coreml" and precision in ("int8", "w8a8")):
        names.append("float16 overflows")  # bfloat16 reaches as far as float32, and int8 learns its ranges
    if kind == "coreml":
        names += {"int8": COREML_WEIGHT_DEFECTS, "w8a8": COREML_SCALE_DEFECTS}.get(precision, ())
    elif precision == "int8":
        names += SCALE_DEFECTS
    return names


QUICK = {
    *(("onnx", "fp32", defect) for defect in (*WEIGHT_DEFECTS, *ONNX_GRAPH_DEFECTS, "inside: off by 2 grey levels")),
    ("onnx", "fp32", "said: another filter"),
    ("onnx", "fp32", "labels permuted"),
    *(("onnx", "fp16", defect) for defect in ("one weight off by 1 %", "BatchNorm's eps wrong", "float16 overflows")),
    ("onnx", "fp16", "inside: off by 2 grey levels"),
    *(("onnx", "int8", defect) for defect in SCALE_DEFECTS),
    *(("onnx", "int8", defect) for defect in ("one weight off by 1 %", "BatchNorm's eps wrong")),
    ("onnx", "int8", "inside: off by 2 grey levels"),
}
"""What the ordinary tests try; the rest is `-m slow`."""
CASES = [(*file, defect) for file in FILES for defect in defects_of(*file)]


def marked(cases):
    return [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in cases]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("judge"))


def test_every_quick_case_is_one_of_the_table():
    assert set(CASES) >= QUICK
    assert len(CASES) == len(set(CASES))


SOUND = [pytest.param(*file, marks=() if file[0] == "onnx" else pytest.mark.slow) for file in FILES]


@pytest.mark.parametrize(("kind", "precision"), SOUND)
def test_the_file_without_a_defect_is_not_refused(workshop, kind, precision):
    assert judged(workshop.sound(kind, precision), workshop.reference) == ("passed", "")


@pytest.mark.parametrize(("kind", "precision", "defect"), marked(CASES))
def test_defect_is_refused(workshop, kind, precision, defect):
    verdict, why = judged(*workshop.defective(kind, precision, defect))
    assert verdict == "refused"
    assert why
