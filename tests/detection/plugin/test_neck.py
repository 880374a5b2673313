"""The neck, compared with MMDetection's FPN and PyTorch's operators."""

import pytest
import torch
from torch.nn import functional as F

from shvit.detection import TransposedFPN
from tests.conftest import assert_close, images, randomize


def test_without_finer_levels_it_is_mmdetections_fpn():
    from mmdet.models.necks import FPN

    ours, theirs = TransposedFPN([8, 12, 16], 6, num_outs=4), FPN([8, 12, 16], 6, num_outs=4)
    theirs.load_state_dict(randomize(ours).state_dict(), strict=True)
    inputs = [images(2, dim, size, size) for dim, size in ((8, 9), (12, 5), (16, 3))]  # sides that are no multiples
    for one, other in zip(ours(inputs), theirs(inputs), strict=True):
        assert_close(one, other)


def test_finer_levels_are_transposed_convolutions_of_the_finest_lateral():
    neck = randomize(TransposedFPN([8, 12, 16], 6, num_outs=5, num_extra_trans_convs=2))
    inputs = [images(2, dim, size, size) for dim, size in ((8, 8), (12, 4), (16, 2))]
    p = neck.state_dict()

    def conv(x, name, **kwargs):
        return F.conv2d(x, p[f"{name}.conv.weight"], p[f"{name}.conv.bias"], **kwargs)

    lateral = conv(inputs[2], "lateral_convs.2")
    for level in (1, 0):
        up = lateral.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        lateral = conv(inputs[level], f"lateral_convs.{level}") + up
    half = F.conv_transpose2d(lateral, p["extra_trans_convs.0.conv.weight"], p["extra_trans_convs.0.conv.bias"], 2)
    quarter = F.conv_transpose2d(half, p["extra_trans_convs.1.conv.weight"], p["extra_trans_convs.1.conv.bias"], 2)
    outs = neck(inputs)
    assert [tuple(out.shape[1:]) for out in outs] == [(6, 32, 32), (6, 16, 16), (6, 8, 8), (6, 4, 4), (6, 2, 2)]
    assert_close(outs[0], conv(quarter, "extra_fpn_convs.0", padding=1))
    assert_close(outs[1], conv(half, "extra_fpn_convs.1", padding=1))
    assert_close(outs[2], conv(lateral, "fpn_convs.0", padding=1))


def test_coarser_levels_are_subsamplings():
    *_, last, coarser = TransposedFPN([8, 12], 6, num_outs=3)([images(1, 8, 8, 8), images(1, 12, 4, 4)])
    assert torch.equal(coarser, last[:, :, ::2, ::2])


def test_neck_of_too_few_levels_is_refused():
    with pytest.raises(ValueError, match="raise it to 5"):
        TransposedFPN([8, 12, 16], num_outs=3, num_extra_trans_convs=2)
