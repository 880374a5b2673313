"""Configs: the bundled ones, and what is refused in others."""

import pytest
import torch

from shvit.cli import run
from shvit.detection.detector import create_detector
from shvit.detection.parsing.config import list_configs, load_config
from shvit.detection.parsing.reader import check_is_data
from shvit.errors import InputError
from shvit.shvit import VARIANTS
from tests.detection.detection_data import write_coco, write_config


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"), images=3)


@pytest.mark.parametrize("name", list_configs())
def test_bundled_config_is_the_papers(name):
    """Widths of the variant; the schedule of 12 epochs; anchors at the strides of the pyramid."""
    config = load_config(name)
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
        model = create_detector(load_config(name))
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
        ("train_dataloader = dict(dataset=dict(ann_file='x.pkl'))", "'x.pkl' is not a JSON file"),
        (
            "train_dataloader = dict(dataset=dict(type='BaseDetDataset'))",
            "is not among those that a config gets unasked",
        ),
        ("model = dict(type='KnowledgeDistillationSingleStageDetector')", "is not among those"),
        ("model = dict(backbone=dict(checkpoint_path='x.pth'))", "checkpoint_path is not taken"),
        ("model = dict(neck=dict(_scope_='evilpkg'))", "_scope_ 'evilpkg' is not one of"),
        ("default_scope = 'evilpkg'", "default_scope 'evilpkg' is not one of"),
        ("default_hooks = dict(checkpoint=dict(out_dir='/'))", "out_dir is not taken"),
        ("custom_imports = None", "custom_imports is not a dict"),
        ("model = 5", "has no model with a backbone"),
        ("test_dataloader = None", "test_dataloader has no dataset"),
        ('_base_ = "mmdet::_base_/nope.py"', "not a usable config"),
    ],
)
def test_config_that_is_more_than_data_or_misspelt_is_one_line(tmp_path, text, message):
    config = tmp_path / "c.py"
    config.write_text(text if "_base_" in text else BASE + text)
    with pytest.raises(InputError, match=message) as caught:
        load_config(str(config))
    assert "\n" not in str(caught.value)


def test_a_base_of_a_base_is_looked_into(tmp_path):
    (tmp_path / "base.py").write_text("import os\n")
    (tmp_path / "c.py").write_text('_base_ = ["./base.py"]\n')
    with pytest.raises(InputError, match=r"base\.py, line 1: Import"):
        load_config(str(tmp_path / "c.py"))


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
        create_detector(load_config(next(iter(files))))
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
        load_config("link/c.py")
    assert not (tmp_path / "harm").exists()


def test_config_that_is_trusted_runs(tmp_path):
    (tmp_path / "c.py").write_text(BASE + "import math\nx = math.floor(2.5)\n")
    assert load_config(str(tmp_path / "c.py"), trust=True).x == 2


def test_what_configs_use_is_data(tmp_path):
    (tmp_path / "c.py").write_text(
        '"""A docstring."""\n'
        + BASE
        + "a = [i * 2 for i in range(3)]\nb = dict(c=1, **dict(d=-2))\ne = _base_.model.neck"
    )
    check_is_data((tmp_path / "c.py").read_text(), tmp_path / "c.py")
    assert load_config(str(tmp_path / "c.py")).b.d == -2


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
        load_config("retinanet_shvit-s4_fpn_1x")
