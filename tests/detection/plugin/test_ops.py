"""torchvision's operators in mmcv's place."""

import pytest
import torch
from torchvision import ops as reference

from shvit.detection.plugin.ops import Operators, has_compiled_ops, stands_in
from tests import forks
from tests.conftest import images


def test_something_gives_mmcv_its_operators():
    assert has_compiled_ops() != stands_in()


def boxes(number: int, seed: int = 0) -> torch.Tensor:
    corners = torch.rand(number, 2, 2, generator=torch.Generator().manual_seed(seed)) * 40
    return torch.cat([corners.amin(1), corners.amax(1) + 1], dim=1)


def test_nms_keeps_what_torchvisions_keeps():
    from mmcv.ops import batched_nms, nms

    scores, labels = torch.rand(60, generator=torch.Generator().manual_seed(1)), torch.arange(60) % 3
    expected = reference.nms(boxes(60), scores, 0.5)
    assert torch.equal(nms(boxes(60), scores, 0.5)[1], expected)
    _, kept = batched_nms(boxes(60), scores, labels, {"type": "nms", "iou_threshold": 0.5})
    assert torch.equal(kept, reference.batched_nms(boxes(60), scores, labels, 0.5))


def test_nms_with_offset_counts_pixels():
    """A box from 0 to 9 is then 10 pixels wide: two that share 5 of 10 columns overlap by 5/15."""
    pair = torch.tensor([[0.0, 0.0, 9.0, 9.0], [5.0, 0.0, 14.0, 9.0]])
    scores = torch.tensor([0.9, 0.8])
    assert Operators.nms(pair, scores, 5 / 15 + 0.001, offset=1).tolist() == [0, 1]
    assert Operators.nms(pair, scores, 5 / 15 - 0.001, offset=1).tolist() == [0]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_is_torchvisions_forward_and_backward(aligned, sampling_ratio):
    from mmcv.ops import RoIAlign

    rois = torch.cat([torch.tensor([[0.0], [1.0], [1.0]]), boxes(3)], dim=1)
    ours, theirs = (images(2, 4, 12, 12).requires_grad_() for _ in range(2))
    pooled = RoIAlign((7, 5), 0.25, sampling_ratio, aligned=aligned)(ours, rois)
    expected = reference.roi_align(theirs, rois, (7, 5), 0.25, sampling_ratio, aligned)
    assert torch.equal(pooled, expected)
    weight = images(*pooled.shape, seed=3)
    (pooled * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_other_operators_say_that_they_are_missing():
    with pytest.raises(NotImplementedError, match="deform_conv_forward needs mmcv's compiled operators"):
        Operators().deform_conv_forward()
    with pytest.raises(NotImplementedError, match="'max'"):
        Operators.roi_align_forward(*[None] * 5, 7, 7, 1.0, 0, pool_mode=0, aligned=True)


def test_stand_in_leaves_compiled_operators_alone():
    """In a process of its own, where `mmcv._ext` is there."""
    code = """
import sys, types, importlib.machinery
ext = types.ModuleType("mmcv._ext"); ext.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
sys.modules["mmcv._ext"] = ext
import importlib.util
spec = importlib.util.spec_from_file_location("ops", sys.argv[1]); ops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ops)
ops.stand_in()
assert ops.has_compiled_ops() and sys.modules["mmcv._ext"] is ext
"""
    from shvit.detection.plugin import ops

    done = forks.run(ops.__file__, code=code)
    assert done.returncode == 0, done.stderr[-2000:]
