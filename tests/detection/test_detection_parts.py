"""Operators, neck, backbones and configs of detectors, each by itself."""

import subprocess
import sys

import pytest
import timm
import torch
from mmengine.runner.checkpoint import load_state_dict as load_as_mmengine
from torch.nn import functional as F
from torchvision import ops as reference

from shvit.checkpoint import create_model, to_reference
from shvit.cli import run
from shvit.detection import SHViTBackbone, TimmBackbone, TransposedFPN
from shvit.detection.detector import build_detector, check_img_size, load_detector
from shvit.detection.parsing.config import bundled, open_config
from shvit.detection.parsing.reader import check_is_data
from shvit.detection.plugin.ops import Operators, has_compiled_ops, stands_in
from shvit.errors import InputError
from shvit.shvit import VARIANTS
from tests.conftest import TINY, assert_close, create_tiny, images, randomize
from tests.detection.detection_data import write_coco, write_config

FIELDS = {name: TINY[name] for name in ("embed_dim", "depth", "partial_dim")}


def tiny_backbone(**kwargs) -> SHViTBackbone:
    return SHViTBackbone("shvit_s1", **{**FIELDS, **kwargs})


# --- operators --------------------------------------------------------------------------------------------------------


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

    subprocess.run([sys.executable, "-c", code, ops.__file__], check=True)


# --- neck -------------------------------------------------------------------------------------------------------------


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


# --- backbones --------------------------------------------------------------------------------------------------------


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
        for name, value in source.state_dict().items():
            assert torch.equal(detector["backbone"].state_dict()[name], value), name


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
    config = open_config("mask-rcnn_shvit-s1_fpn_1x_coco")
    config.model.backbone = {"type": "TimmBackbone", "model": "test_resnet", "pretrained": True, "_scope_": "mmdet"}
    config.model.neck.in_channels = TimmBackbone("test_resnet").model.feature_info.channels()
    config.model.neck.num_outs = 7
    build_detector(config)
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


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"), images=3)


@pytest.mark.parametrize("name", bundled())
def test_bundled_config_is_the_papers(name):
    """Widths of the variant; the schedule of 12 epochs; anchors at the strides of the pyramid."""
    config = open_config(name)
    kind, variant, *rest = name.split("_")
    assert rest == ["fpn", "1x", "coco"]
    model = f"shvit_{variant.removeprefix('shvit-')}"
    assert tuple(config.model.neck.in_channels) == VARIANTS[model].embed_dim
    assert config.model.backbone.init_cfg.checkpoint == f"{model}.in1k"
    head = config.model.rpn_head if kind == "mask-rcnn" else config.model.bbox_head
    assert head.anchor_generator.strides == ([4, 8, 16, 32, 64] if kind == "mask-rcnn" else [8, 16, 32, 64, 128])
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 1e-4, 0.05)
    assert config.optim_wrapper.get("clip_grad") is None
    assert config.train_cfg.max_epochs == 12
    assert [scheduler.get("milestones") for scheduler in config.param_scheduler] == [None, [8, 11]]
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 16


def test_a_bundled_detector_has_the_pyramid_that_its_anchors_expect():
    for name in ("mask-rcnn_shvit-s1_fpn_1x_coco", "retinanet_shvit-s1_fpn_1x_coco"):
        model = build_detector(open_config(name))
        with torch.no_grad():
            sizes = [each.shape[-1] for each in model.extract_feat(torch.zeros(1, 3, 128, 128))]
        head = model.rpn_head if "mask" in name else model.bbox_head
        assert sizes == [128 // stride[0] for stride in head.prior_generator.strides]


BASE = '_base_ = "{{$SHVIT_CONFIGS:}}/mask-rcnn_shvit-s1_fpn_1x_coco.py"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import os\n", "line 2: Import is more than a config needs"),
        ('x = __import__("os").system("true")', "might run code"),
        ("x = open('/etc/passwd')", "a call of open"),
        ("x = (1).__class__", "__class__"),
        ("x = (lambda: 1)()", "might run code"),
        ("for i in range(3): pass", "For is more"),
        ("x = f'{dict.__mro__}'", "__mro__"),
        ("x = (1", "line 2: not a config"),
        ('model = dict(backbone=dict(type="SHVit"))', "unknown type 'SHVit' of model.backbone; did you mean 'SHViT'"),
        ('model = dict(neck=dict(_delete_=True, type="os.system", command="true"))', "unknown type 'os.system'"),
        ('model = dict(neck=dict(_delete_=True, type="mmengine.dump"))', "unknown type 'mmengine.dump'"),
        ("model = dict(test_cfg=dict(rcnn=dict(nms=dict(type='print(1)'))))", r"unknown type 'print\(1\)'"),
        ("train_dataloder = dict()", "did you mean 'train_dataloader'"),
        ('custom_imports = dict(imports=["antigravity"])', "wants antigravity imported"),
        ('_base_ = "nope.py"', "nope.py.* does not exist"),
        ('_base_ = "mmcls::x/y.py"', "mmcls is not installed"),
        ("dict = list", "the name dict"),
        ("x = [str(1) for str in [2]]", "the name str"),
        ("x = [_base_ for _base_ in [2]]", "another _base_"),
        ('x = _base_.__init__.__globals__["os"].system', "__init__"),
        ("runner_type = 'os.path.join'", "runner_type is not taken"),
        ("optim_wrapper = dict(constructor='os.system')", "optim_wrapper.constructor is not taken"),
        ("train_dataloader = dict(dataset=dict(proposal_file='x.pkl'))", "proposal_file is not taken"),
        ("train_dataloader = dict(dataset=dict(ann_file='x.pkl'))", "'x.pkl' is no .json file"),
        (
            "train_dataloader = dict(dataset=dict(type='BaseDetDataset'))",
            "is not among those that a config gets unasked",
        ),
        ("model = dict(type='KnowledgeDistillationSingleStageDetector')", "is not among those"),
        ("model = dict(backbone=dict(checkpoint_path='x.pth'))", "checkpoint_path is not taken"),
        ("model = dict(neck=dict(_scope_='evilpkg'))", "_scope_ 'evilpkg' is not one of"),
        ("default_scope = 'evilpkg'", "default_scope 'evilpkg' is not one of"),
        ("default_hooks = dict(checkpoint=dict(out_dir='/'))", "out_dir is not taken"),
        ("custom_imports = None", "custom_imports is no dict"),
        ("model = 5", "has no model with a backbone"),
        ("test_dataloader = None", "test_dataloader has no dataset"),
        ('_base_ = "mmdet::_base_/nope.py"', "not a usable config"),
    ],
)
def test_config_that_is_more_than_data_or_misspelt_is_one_line(tmp_path, text, message):
    config = tmp_path / "c.py"
    config.write_text(text if "_base_" in text else BASE + text)
    with pytest.raises(InputError, match=message) as caught:
        open_config(str(config))
    assert "\n" not in str(caught.value)


def test_a_base_of_a_base_is_looked_into(tmp_path):
    (tmp_path / "base.py").write_text("import os\n")
    (tmp_path / "c.py").write_text('_base_ = ["./base.py"]\n')
    with pytest.raises(InputError, match=r"base\.py, line 1: Import"):
        open_config(str(tmp_path / "c.py"))


HARM = '__import__("pathlib").Path("harm").touch()'


@pytest.mark.parametrize(
    "files",
    [
        {"c.py": "x = {{'$A:0|" + HARM + "#'}}"},
        {"c.py": BASE + 'x = """{{_base_.model}}""" "; ' + HARM + ' #"'},
        {"c.py": '_base_ = "./{{$XX:evil}}.py"', "{{$XX:evil}}.py": "", "evil.py": HARM},
        {"c.py": '_base_ = ["./evil.py"]', "evil.py": HARM},
        {"c.py": '_base_ = "mmdet::{here}/evil.py"', "evil.py": HARM},
        {'f"+str(' + HARM + ')+"/c.py': 'x = "{{ fileDirname }}"'},
        {"c.py": BASE + 'with __import__("mmengine.config").config.read_base():\n    ' + HARM},
        {"c.py": 'str = _base_.__class__\nx = str("' + HARM + '")'},
        {"c.py": BASE + 'model = dict(roi_head=dict(bbox_head=dict(bbox_coder=dict(warp_mode="' + HARM.replace('"', "'")
                 + '", type="CameraMotionCompensation"))))'},
    ],
)  # fmt: skip
def test_a_hostile_config_runs_nothing(tmp_path, monkeypatch, files):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("{here}", str(tmp_path)))
    with pytest.raises(InputError):
        build_detector(open_config(next(iter(files))))
    assert not (tmp_path / "harm").exists()


def test_what_a_link_leads_to_is_what_is_checked(tmp_path, monkeypatch):
    """mmengine looks for bases beside the link, not beside the file."""
    monkeypatch.chdir(tmp_path)
    for folder, text in (("safe", "x = 1"), ("link", HARM)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "base.py").write_text(text)
    (tmp_path / "safe" / "c.py").write_text('_base_ = "./base.py"')
    (tmp_path / "link" / "c.py").symlink_to(tmp_path / "safe" / "c.py")
    with pytest.raises(InputError, match=r"link/base\.py, line 1: Expr"):
        open_config("link/c.py")
    assert not (tmp_path / "harm").exists()


def test_config_that_is_trusted_runs(tmp_path):
    (tmp_path / "c.py").write_text(BASE + "import math\nx = math.floor(2.5)\n")
    assert open_config(str(tmp_path / "c.py"), trust=True).x == 2


def test_what_configs_use_is_data(tmp_path):
    (tmp_path / "c.py").write_text(
        '"""A docstring."""\n'
        + BASE
        + "a = [i * 2 for i in range(3)]\nb = dict(c=1, **dict(d=-2))\ne = _base_.model.neck"
    )
    check_is_data((tmp_path / "c.py").read_text(), tmp_path / "c.py")
    assert open_config(str(tmp_path / "c.py")).b.d == -2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.backbone.model=shvit_s9"], "unknown SHViT 'shvit_s9'"),
        (["model.backbone.froze=1"], "froze"),
        (["model.neck.in_channels=[1,2,3]"], r"neck.in_channels is \[1, 2, 3\]"),
        (["nothing"], "not of the form key.key=value"),
        (["model.roi_head.bbox_head.num_classes=3"], "num_classes is 3 and metainfo.classes has 2"),
        (["val_evaluator.ann_file=other.json"], "val_evaluator reads other.json"),
        (["train_dataloader.batch_size=two"], "batch_size"),
    ],
)
def test_option_that_does_not_fit_is_one_line(coco, tmp_path, options, message):
    config = write_config(tmp_path / "c.py", "mask-rcnn", coco)
    with pytest.raises(InputError, match=message) as caught:
        run(["detect", "train", str(config), "--output", str(tmp_path / "run"), "--options", *options])
    assert "\n" not in str(caught.value)


def test_unknown_config_is_suggested():
    with pytest.raises(InputError, match="did you mean retinanet_shvit-s4_fpn_1x_coco"):
        open_config("retinanet_shvit-s4_fpn_1x")


@pytest.mark.parametrize("sides", [(), (1, 2, 3), (100,), (64, 0), (8192,)])
def test_sizes_that_cannot_be_are_refused(sides):
    with pytest.raises(InputError, match="--img-size"):
        check_img_size(sides)


# --- weights ----------------------------------------------------------------------------------------------------------


class Harm:
    def __reduce__(self):
        import os

        return os.mkdir, ("harm",)


class Getattr:
    """What mmengine's own list of allowed names lets through."""

    def __reduce__(self):
        return getattr, (torch.Tensor, "add_")


@pytest.mark.parametrize("harm", [Harm(), Getattr()])
def test_pickled_code_in_a_checkpoint_is_not_run(coco, tmp_path, monkeypatch, harm):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "c.py", "retinanet", coco)
    torch.save({"state_dict": {}, "message_hub": harm}, tmp_path / "harm.pth")
    with pytest.raises(InputError, match=r"refused, because its pickle calls for|damaged|no checkpoint of tensors"):
        run(["detect", "eval", str(config), "--checkpoint", "harm.pth"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last_checkpoint").write_text(str(tmp_path / "harm.pth"))
    with pytest.raises(InputError, match="nothing of it was run"):
        run(["detect", "train", str(config), "--output", "run"])
    assert not (tmp_path / "harm").exists()


def test_weights_of_another_detector_are_named(coco, tmp_path):
    retina = build_detector(open_config(str(write_config(tmp_path / "r.py", "retinanet", coco))))
    mask = build_detector(open_config(str(write_config(tmp_path / "m.py", "mask-rcnn", coco))))
    torch.save({"state_dict": mask.state_dict()}, tmp_path / "mask.pth")
    with pytest.raises(InputError, match=r"missing bbox_head\.cls_convs.*left over neck\.extra_trans_convs"):
        load_detector(retina, tmp_path / "mask.pth")
    wide = build_detector(open_config(str(write_config(tmp_path / "w.py", "mask-rcnn", coco, dim=24))))
    with pytest.raises(InputError, match=r"neck\.\S+ is \(.*\) and should be \("):
        load_detector(wide, tmp_path / "mask.pth")
    load_detector(mask, tmp_path / "mask.pth")


def test_a_detector_of_the_reference_loads_whole(coco, tmp_path):
    """Under the reference's names of the backbone's parameters, as DistributedDataParallel saves them."""
    config = open_config(str(write_config(tmp_path / "m.py", "mask-rcnn", coco)))
    source = randomize(build_detector(config)).state_dict()
    backbone = {name.removeprefix("backbone."): v for name, v in source.items() if name.startswith("backbone.")}
    theirs = {f"backbone.{name}": value for name, value in to_reference(backbone).items()}
    theirs |= {name: value for name, value in source.items() if not name.startswith("backbone.")}
    torch.save({"state_dict": {f"module.{name}": value for name, value in theirs.items()}}, tmp_path / "theirs.pth")
    model = build_detector(config)
    load_detector(model, tmp_path / "theirs.pth")
    assert any(name.startswith("backbone.blocks3.") for name in theirs)
    for name, value in model.state_dict().items():
        assert torch.equal(value, source[name]), name


def test_backbone_and_neck_are_a_model_with_feature_maps(coco, tmp_path):
    config = write_config(tmp_path / "m.py", "mask-rcnn", coco)
    model = create_model(f"detector:{config}")
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32, 64]
    assert [each.shape[1:] for each in model(images(1, 3, 64, 64))] == [
        (16, 64 // s, 64 // s) for s in (4, 8, 16, 32, 64)
    ]


# --- images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(tmp_path, workers):
    coco = write_coco(tmp_path / "coco", images=4)
    path = coco / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:700])
    config = write_config(tmp_path / "c.py", "retinanet", coco)
    options = [f"train_dataloader.num_workers={workers}"]
    with pytest.raises(InputError, match=r"2\.png: not a readable image") as caught:
        run(["detect", "train", str(config), "--output", str(tmp_path / "run"), "--options", *options])
    assert "\n" not in str(caught.value)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"file not readable: 1 image .*image 2 \(2\.png\) is not an image"):
        run(["detect", "train", str(config), "--output", str(tmp_path / "run"), "--options", *options])
