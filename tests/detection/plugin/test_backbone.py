"""SHViT and timm's models as backbones."""

import pytest
import timm
import torch
from mmengine.runner.checkpoint import load_state_dict as load_as_mmengine

from shvit.detection import SHViTBackbone, TimmBackbone
from shvit.detection.detector import create_detector
from shvit.detection.parsing.config import load_config
from shvit.errors import InputError
from shvit.shvit import to_reference
from tests.conftest import TINY, assert_close, create_tiny, images, randomize

FIELDS = {name: TINY[name] for name in ("embed_dim", "depth", "partial_dim")}


def tiny_backbone(**kwargs) -> SHViTBackbone:
    return SHViTBackbone("shvit_s1", **{**FIELDS, **kwargs})


def test_backbone_gives_timms_feature_maps():
    whole = create_tiny()
    backbone = tiny_backbone().eval()
    backbone.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("head")}, strict=True)
    expected = create_tiny(features_only=True, num_classes=10)(images(2, 3, 96, 64))
    for one, other in zip(backbone(images(2, 3, 96, 64)), expected, strict=True):
        assert_close(one, other)
    assert [each.shape[1] for each in tiny_backbone(out_indices=(1, 2)).eval()(images(1, 3, 64, 64))] == [24, 32]


def test_references_names_load_below_a_prefix_with_both_loaders():
    source = randomize(tiny_backbone())
    reference_names = {f"backbone.{name}": value for name, value in to_reference(source.state_dict()).items()}
    assert any(name.startswith("backbone.blocks1.0.") for name in reference_names)
    for load in (lambda model, state: model.load_state_dict(state), lambda m, s: load_as_mmengine(m, s, strict=True)):
        detector = torch.nn.ModuleDict({"backbone": tiny_backbone()})
        load(detector, dict(reference_names))
        torch.testing.assert_close(detector["backbone"].state_dict(), source.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["timm", "reference", "detector"])
def test_backbone_begins_with_a_checkpoint_of_any_layout(tmp_path, layout):
    whole = create_tiny().state_dict()
    written = {"timm": whole, "reference": to_reference(whole)}.get(layout)
    if written is None:
        written = {f"backbone.{name}": value for name, value in whole.items() if not name.startswith("head")}
        written["neck.fpn_convs.0.conv.bias"] = torch.zeros(3)
    torch.save({"state_dict": written}, tmp_path / "c.pth")
    backbone = tiny_backbone(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "c.pth")})
    backbone.init_weights()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    whole = create_tiny().state_dict()
    del whole["stages.1.blocks.0.mixer.m.qkv.c.weight"]
    torch.save(whole, tmp_path / "c.pth")
    backbone = tiny_backbone(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "c.pth")})
    with pytest.raises(InputError, match=r"missing stages\.1\.blocks\.0\.mixer\.m\.qkv\.c\.weight"):
        backbone.init_weights()


def test_norms_keep_their_statistics_and_frozen_stages_do_not_learn():
    backbone = tiny_backbone(frozen_stages=1, drop_path_rate=0.2).train()
    assert backbone.training
    norms = [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    assert norms[-1].weight.requires_grad
    learning = {name.split(".")[0] + name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert learning == {"stages1", "stages2"}
    assert backbone.stages[2].blocks[0].ffn.drop_path.training
    assert any(module.training for module in tiny_backbone(norm_eval=False).train().modules()
               if isinstance(module, torch.nn.BatchNorm2d))  # fmt: skip


def test_what_is_frozen_or_unused_is_so_before_a_wrapper_looks():
    """DistributedDataParallel counts the parameters that learn before the first `train()`."""
    frozen = {name for name, p in tiny_backbone(frozen_stages=1).named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"patch_embed", "stages"}
    assert not any(name.startswith("stages.1") for name in frozen)
    unused = {name for name, p in tiny_backbone(out_indices=(0, 1)).named_parameters() if not p.requires_grad}
    assert unused
    assert all(name.startswith("stages.2") for name in unused)


def test_a_peers_own_weights_are_not_fetched_where_others_follow(monkeypatch):
    asked = []
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **kw: asked.append(pretrained) or create(name, **kw)
    )
    config = load_config("mask-rcnn_shvit-s1_fpn_1x_coco")
    config.model.backbone = {"type": "TimmBackbone", "model": "test_resnet", "pretrained": True, "_scope_": "mmdet"}
    config.model.neck.in_channels = TimmBackbone("test_resnet").model.feature_info.channels()
    config.model.neck.num_outs = 7
    create_detector(config)
    assert asked == [False, False]
    TimmBackbone("test_resnet", pretrained=True)
    assert asked[-1] is True


def test_gradient_checkpointing_changes_no_gradient():
    plain, saving = tiny_backbone().train(), tiny_backbone(with_cp=True).train()
    saving.load_state_dict(randomize(plain).state_dict())
    for backbone in (plain, saving):
        sum(each.square().mean() for each in backbone(images(1, 3, 64, 64))).backward()
    learned = [
        (one, other) for one, other in zip(plain.parameters(), saving.parameters(), strict=True) if one.grad.any()
    ]
    assert len(learned) > 50
    for one, other in learned:
        assert_close(other.grad, one.grad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "shvit_s9"}, "unknown SHViT 'shvit_s9'; choose from shvit_s1"),
        ({"out_indices": (0, 3)}, "choose from 0 to 2"),
        ({"frozen_stages": 4}, r"choose from -1 \(none\) to 3"),
        ({"init_cfg": {"type": "Xavier"}}, "init_cfg"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        SHViTBackbone(**{"model": "shvit_s1", **FIELDS, **arguments})


def test_peer_begins_with_its_classifiers_weights(tmp_path):
    whole = randomize(timm.create_model("test_resnet"))
    torch.save(whole.state_dict(), tmp_path / "c.pth")
    backbone = TimmBackbone(
        "test_resnet", (1, 2), init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "c.pth")}
    )
    backbone.init_weights()
    _, expected = whole.eval().forward_intermediates(images(1, 3, 64, 64), indices=[1, 2])
    for one, other in zip(backbone.eval()(images(1, 3, 64, 64)), expected, strict=True):
        assert_close(one, other)
    with pytest.raises(InputError, match="unknown model 'test_resnot'"):
        TimmBackbone("test_resnot")
