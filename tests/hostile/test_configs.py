"""Configs of detectors from strangers: what is refused, and what people write that is not."""

import copy
import time
from pathlib import Path

import mmdet
import pytest

from shvit.detection.parsing.arguments import SECTIONS
from shvit.detection.parsing.config import load_config, only_known
from shvit.detection.parsing.reader import CONFIGS, DataConfig
from shvit.detection.parsing.vocabulary import CHECKS, DICTS, PARTS, PRIORITIES, TYPES, registered
from shvit.errors import InputError

MIM = Path(mmdet.__file__).parent / ".mim" / "configs"
OURS = '_base_ = "{{$SHVIT_CONFIGS:}}/mask-rcnn_shvit-s1_fpn_1x_coco.py"\n'
MASK = '_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"\n'
FASTER = '_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"\n'
RETINA = '_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"\n'
CASCADE = '_base_ = "mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py"\n'


@pytest.fixture(autouse=True, scope="module")
def known_bases():
    """Bases of ours and of MMDetection are read once: each is a file that mmengine writes beside three times."""
    read, known = DataConfig._content, {}

    def remembered(filename, files):
        if not Path(filename).resolve().is_relative_to(CONFIGS) and not Path(filename).resolve().is_relative_to(MIM):
            return read(filename, files)
        key = str(Path(filename).resolve())
        known[key] = known.get(key) or read(filename, files)
        return copy.deepcopy(known[key])

    load_config("mask-rcnn_shvit-s1_fpn_1x_coco")  # imports what there is
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataConfig, "_content", staticmethod(remembered))
        yield


def opened(tmp_path: Path, text: str, options: tuple[str, ...] = ()):
    (tmp_path / "c.py").write_text(text)
    return load_config(str(tmp_path / "c.py"), options)


# --- what people write ------------------------------------------------------------------------------------------------

LOADED = 'dict(type="LoadImageFromFile", backend_args=None), dict(type="LoadAnnotations", with_bbox=True)'
USERS = {
    "classes": FASTER + """
classes = ("cat", "dog", "l'oiseau (rare)", "人")
num_classes = len(classes)
data_root = "data/pets/"
metainfo = dict(classes=classes, palette=[(220, 20, 60), (119, 11, 32), (0, 0, 142), (0, 0, 230)])
model = dict(roi_head=dict(bbox_head=dict(num_classes=num_classes)))
train_dataloader = dict(batch_size=8, dataset=dict(data_root=data_root, metainfo=metainfo, ann_file="train.json",
                        data_prefix=dict(img="train/")))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, ann_file="val.json",
                      data_prefix=dict(img="val/")))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "val.json", metric="bbox", classwise=True)
test_evaluator = val_evaluator
work_dir = "./work_dirs/pets"
""",
    "absolute data": MASK + 'data_root = "/data/coco/"\ntrain_dataloader = dict(dataset=dict(data_root=data_root))\n',
    "schedule": RETINA + """
max_epochs = 36
train_cfg = dict(max_epochs=max_epochs, val_interval=3, dynamic_intervals=[(30, 1)])
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=max_epochs, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
""",
    "cosine": RETINA + """
param_scheduler = [
    dict(type="CosineAnnealingLR", eta_min=1e-6, T_max=12, begin=0, end=12, by_epoch=True, convert_to_iter_based=True)
]
""",
    "iterations": FASTER + """
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=90000, val_interval=10000)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10000, filename_tmpl="iter_{:06d}.pth"))
log_processor = dict(by_epoch=False)
train_dataloader = dict(sampler=dict(type="InfiniteSampler"))
""",
    "amp": MASK + 'optim_wrapper = dict(type="AmpOptimWrapper", loss_scale="dynamic", dtype="bfloat16")\n',
    "clip": OURS + "optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2), accumulative_counts=4)\n",
    "adamw": MASK + """
optim_wrapper = dict(_delete_=True, type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"absolute_pos_embed": dict(decay_mult=0.0), "backbone.layer1": dict(lr_mult=0.1),
                                    "norm": dict(decay_mult=0.0)}, norm_decay_mult=0.0))
""",
    "ema": RETINA + 'custom_hooks = [dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.0002, priority=49)]\n',
    "early stopping": OURS + """
custom_hooks = [dict(type="EarlyStoppingHook", monitor="coco/bbox_mAP", patience=5, rule="greater"),
                dict(type="NumClassCheckHook")]
default_hooks = dict(checkpoint=dict(interval=1, save_best="coco/segm_mAP", rule="greater", max_keep_ckpts=3))
""",
    "multi-scale": MASK + f"""
train_pipeline = [{LOADED},
    dict(type="RandomChoiceResize", scales=[(1333, s) for s in range(640, 801, 32)], keep_ratio=True),
    dict(type="RandomFlip", prob=[0.3, 0.3], direction=["horizontal", "vertical"]), dict(type="PackDetInputs")]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
""",
    "augmentations": RETINA + f"""
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [{LOADED},
    dict(type="PhotoMetricDistortion", brightness_delta=32, contrast_range=(0.5, 1.5), saturation_range=(0.5, 1.5)),
    dict(type="Expand", mean=img_norm_cfg["mean"], to_rgb=True, ratio_range=(1, 4)),
    dict(type="MinIoURandomCrop", min_ious=(0.1, 0.3, 0.5, 0.7, 0.9), min_crop_size=0.3),
    dict(type="RandomResize", scale=(1024, 1024), ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_type="absolute_range", crop_size=(640, 640), recompute_bbox=True,
         allow_negative_crop=True),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-2, 1e-2)), dict(type="RandomFlip", prob=0.5),
    dict(type="Pad", size=(640, 640), pad_val=dict(img=(114, 114, 114))),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip"))]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
""",
    "repeat": FASTER + """
train_dataloader = dict(dataset=dict(_delete_=True, type="RepeatDataset", times=3, dataset=dict(type="CocoDataset",
    data_root="data/", ann_file="train.json", data_prefix=dict(img="train/"), pipeline=_base_.train_pipeline,
    filter_cfg=dict(filter_empty_gt=True, min_size=32))))
""",
    "balanced": FASTER + """
train_dataloader = dict(dataset=dict(_delete_=True, type="ClassBalancedDataset", oversample_thr=1e-3, dataset=dict(
    type="CocoDataset", data_root="data/", ann_file="train.json", pipeline=_base_.train_pipeline)))
""",
    "tensorboard": MASK + """
vis_backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
visualizer = dict(type="DetLocalVisualizer", vis_backends=vis_backends, name="visualizer")
default_hooks = dict(logger=dict(interval=20), visualization=dict(draw=True, interval=10))
""",
    "anchors": MASK + """
model = dict(rpn_head=dict(anchor_generator=dict(_delete_=True, type="AnchorGenerator", scales=[4, 8],
    ratios=[0.33, 0.5, 1.0, 2.0, 3.0], strides=[2**2 if False else 4, 8, 16, 32, 64])))
""".replace("2**2 if False else ", ""),
    "soft nms": CASCADE + 'model = dict(test_cfg=dict(rcnn=dict(score_thr=0.001, nms=dict(type="soft_nms",'
    ' iou_threshold=0.5, min_score=1e-3), max_per_img=300)))\n',
    "losses": FASTER + """
model = dict(roi_head=dict(bbox_head=dict(reg_decoded_bbox=True, loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
    loss_cls=dict(_delete_=True, type="CrossEntropyLoss", use_sigmoid=False, class_weight=[1.0] * 80 + [0.5]))))
""",
    "tta": RETINA + """
tta_model = dict(type="DetTTAModel", tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100))
tta_pipeline = [dict(type="LoadImageFromFile"), dict(type="TestTimeAug", transforms=[
    [dict(type="Resize", scale=s, keep_ratio=True) for s in [(1333, 800), (666, 400)]],
    [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)], [dict(type="PackDetInputs")]])]
""",
    "frozen": MASK + """
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(backbone=dict(frozen_stages=4, norm_cfg=norm_cfg, norm_eval=False),
             neck=dict(norm_cfg=dict(type="GN", num_groups=32)),
             roi_head=dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg)))
""",
    "deeper": MASK + """
model = dict(backbone=dict(depth=101, init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet101")))
""",
    "fine-tuning": MASK + """
load_from = "https://download.openmmlab.com/mmdetection/v2.0/mask_rcnn/mask_rcnn_r50_fpn_1x_coco/mask_rcnn_r50.pth"
""",
    "own weights": OURS + 'load_from = "checkpoints/mask_rcnn.pth"\nrandomness = dict(seed=0, deterministic=False)\n',
    "peer": OURS + """
model = dict(backbone=dict(_delete_=True, type="TimmBackbone", model="resnet18.a1_in1k", out_indices=(1, 2, 3, 4)),
             neck=dict(_delete_=True, type="FPN", in_channels=[64, 128, 256, 512], out_channels=256, num_outs=5))
""",
    "distributed": OURS + """
env_cfg = dict(cudnn_benchmark=True, mp_cfg=dict(mp_start_method="spawn", opencv_num_threads=4),
               dist_cfg=dict(backend="gloo"))
auto_scale_lr = dict(enable=True, base_batch_size=16)
experiment_name = f"pets_{_base_.train_cfg.max_epochs}e"
""",
    "warm-up": RETINA + """
custom_hooks = [dict(type="EMAHook", ema_type="mmdet.ExpMomentumEMA", momentum=0.0001)]
param_scheduler = [dict(type="QuadraticWarmupLR", by_epoch=True, begin=0, end=5, convert_to_iter_based=True)]
train_dataloader = dict(num_workers=4, persistent_workers=True, prefetch_factor=4, multiprocessing_context="spawn")
""",
    "hooks": FASTER + """
default_hooks = dict(
    timer=dict(type="IterTimerHook"), logger=dict(type="LoggerHook", interval=50), sampler_seed=None,
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=3, save_best="auto", out_dir=None),
    visualization=dict(type="DetVisualizationHook", draw=True, show=False, test_out_dir=None))
resume = True
load_from = None
""",
    "names": FASTER + """
names = ("person (adult)", "bus/truck", "naïve", "日本語", "50% off", "a:b", "x{y}", "C#", "r&d", "it's")
metainfo = dict(classes=names, palette=[[220, 20, 60]] * len(names))
train_dataloader = dict(dataset=dict(metainfo=metainfo, data_root="D:/my data/", ann_file=r"D:\\my data\\train.json"))
model = dict(pretrained=None, data_preprocessor=dict(batch_augments=[dict(type="BatchFixedSizePad", size=(64, 64))]))
""",
    "old variables": FASTER + """
cudnn_benchmark = True
gpu_ids = range(0, 1)
workflow = [("train", 1)]
log_config = dict(interval=50, hooks=[dict(type="TextLoggerHook")])
evaluation = dict(interval=1, metric="bbox")
""",
    "a run's own": OURS + 'visualizer = dict(name="/home/me/runs/pets (1)")\n',
}  # fmt: skip


@pytest.mark.parametrize("name", USERS)
def test_what_people_write_passes(tmp_path, name):
    config = opened(tmp_path, USERS[name])
    assert only_known(config).model.type == config.model.type


@pytest.mark.parametrize(
    "name",
    [
        "mask_rcnn/mask-rcnn_r50_fpn_1x_coco",
        "mask_rcnn/mask-rcnn_r50-caffe_fpn_ms-poly-1x_coco",
        "mask_rcnn/mask-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco",
        "faster_rcnn/faster-rcnn_r50_fpn_1x_coco",
        "faster_rcnn/faster-rcnn_r50_fpn_ohem_1x_coco",
        "retinanet/retinanet_x101-32x4d_fpn_1x_coco",
        "cascade_rcnn/cascade-mask-rcnn_r101_fpn_20e_coco",
        "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco",
    ],
)
def test_mmdetections_own_configs_pass(tmp_path, name):
    opened(tmp_path, f'_base_ = "mmdet::{name}.py"\n')


# --- attacks ----------------------------------------------------------------------------------------------------------


def hook(text: str) -> str:
    return f"custom_hooks = [dict({text})]"


def backbone(text: str) -> str:
    return f"model = dict(backbone=dict({text}))"


def loader(text: str) -> str:
    return f"train_dataloader = dict(dataset=dict({text}))"


ATTACKS = {
    # other programs
    'compile = dict(backend="inductor", options={"cpp.cxx": ("/tmp/tool",)})': "compile is not taken",
    'model_wrapper_cfg = dict(type="Any")': "model_wrapper_cfg is not taken",
    "activation_checkpointing = ['model']": "activation_checkpointing is not taken",
    'strategy = dict(type="DeepSpeedStrategy")': "strategy is not taken",
    "env_cfg = dict(dist_cfg=dict(backend='nccl', init_method='tcp://1.2.3.4:1'))": "init_method is not taken",
    "env_cfg = dict(mp_cfg=dict(mp_start_method='evil'))": "choose from fork",
    "optim_wrapper = dict(constructor='x.y')": "constructor is not taken",
    # files written
    'default_hooks = dict(checkpoint=dict(filename_tmpl="/tmp/thesis.txt"))': "filename_tmpl .* is not a file name",
    'default_hooks = dict(checkpoint=dict(filename_tmpl="../../{}.pth"))': "is not a file name",
    'default_hooks = dict(checkpoint=dict(filename_tmpl="{:>9999999999}.pth"))': "is not a file name",
    'default_hooks = dict(checkpoint=dict(filename_tmpl="{0.__class__}.pth"))': "is not a file name",
    'default_hooks = dict(logger=dict(out_dir="/tmp/x"))': "out_dir is not taken",
    'default_hooks = dict(logger=dict(out_suffix=".py", keep_local=False))': "out_suffix is not taken",
    'default_hooks = dict(visualization=dict(draw=True, test_out_dir="/tmp"))': "test_out_dir is not taken",
    'vis_backends = [dict(type="LocalVisBackend", config_save_file="/tmp/sitecustomize.py")]':
        "config_save_file is not taken",
    'visualizer = dict(vis_backends=[dict(type="LocalVisBackend", scalar_save_file="../x.json")])':
        "scalar_save_file is not taken",
    'visualizer = dict(save_dir="/tmp")': "save_dir is not taken",
    'vis_backends = [dict(type="WandbVisBackend", init_kwargs=dict())]': "not among those",
    hook('type="ProfilerHook", json_trace_path="/tmp/x.json"'): "not among those",
    hook('type="ProfilerHook", on_trace_ready=dict(type="tb_trace", dir_name="/tmp")'): "not among those",
    'val_evaluator = dict(outfile_prefix="/tmp/results")': "outfile_prefix is not taken",
    'val_evaluator = dict(collect_dir="/home")': "collect_dir is not taken",
    'work_dir = "/home/me"': "work_dir .* is not below the working folder; give --output",
    'work_dir = "runs/../../me"': "leads out of the folder",
    'work_dir = "~/runs"': "leads out of the folder",
    # keys and values that become code in the config that a run writes
    '''note = {"a': __import__('os').system('id'), 'b": 1}''': "which is not a name",
    'note = {"a\\nimport os": 1}': "which is not a name",
    'default_hooks = {"a": None, "x=1\\nimport os": None}': "which is not a name",
    "model = dict(**{'a b': 1})": "which is not a name",
    'default_hooks = {"class": None}': "has 'class', which is not a name",
    "note = [b'x']": "is b'x'; write numbers",
    'note = "{{$SECRET:}}"': "not told the environment variable SECRET",
    # windows that are waited for, files that nothing has checked
    "default_hooks = dict(visualization=dict(draw=True, show=True))": "show is True; leave it out",
    loader('pipeline=[dict(type="LoadAnnotations", with_seg=True)]'): "with_seg is True; leave it out",
    # addresses
    'load_from = "http://127.0.0.1/x.pth"': "is an address",
    'load_from = "https://download.openmmlab.com.evil.org/x.pth"': "is an address",
    'load_from = "https://download.openmmlab.com/../x.pth"': "is an address",
    'load_from = "s3://bucket/x.pth"': "is an address",
    'load_from = "http:/127.0.0.1/x.pth"': "is an address",
    'load_from = "//server/share.pth"': "is an address",
    backbone('init_cfg=dict(type="Pretrained", checkpoint="http://x/{{$HOME:}}")'): "environment variable HOME",
    backbone('init_cfg=dict(type="Pretrained", checkpoint="petrel://x/y.pth")'): "is an address",
    backbone('_delete_=True, type="TimmBackbone", model="hf_hub:evil/x"'): "is not a name of letters",
    backbone('_delete_=True, type="TimmBackbone", model="resnet18", pretrained_cfg=dict(url="http://x")'):
        "pretrained_cfg is not taken",
    loader('metainfo=dict(classes=("a",), note="http://127.0.0.1/x")'): "note is not taken",
    loader('metainfo=dict(classes="http://127.0.0.1/x")'): "is the text .*; write a tuple",
    loader('metainfo=dict(classes="/etc/passwd")'): "is the text .*; write a tuple",
    loader('backend_args=dict(_delete_=True, backend="petrel")'): "choose from local|cannot inherit",
    'val_evaluator = dict(_delete_=True, type="CocoMetric", ann_file="a.json", backend_args=dict(backend="petrel"))':
        "choose from local",
    'val_evaluator = dict(_delete_=True, type="CocoMetric", ann_file="a.json", backend_args=dict(db_path="/x"))':
        "db_path is not taken",
    loader('data_root="http://127.0.0.1/"'): "is an address; give --data",
    loader('data_root="../../etc/"'): "leads out of the folder; give --data",
    loader('data_root="~root/"'): "leads out of the folder",
    loader('data_prefix=dict(img="http://127.0.0.1/")'): "is an address",
    loader('ann_file="x.pkl"'): "is not a JSON file",
    loader('ann_file="x\\n.json"'): "is not a plain line",
    loader('pipeline=[dict(type="LoadImageFromFile", file_client_args=dict(backend="lmdb"))]'):
        "file_client_args is not",
    'val_evaluator = dict(ann_file="http://127.0.0.1/a.json")': "is an address",
    # types
    hook('type="EMAHook", ema_type="mmdet.MaskRCNN"'): "ema_type is 'mmdet.MaskRCNN'; choose from ExpMomentumEMA",
    hook('type="EMAHook", ema_type=print'): "the name print|name 'print' is not defined",
    hook('type="EMAHook", ema_type=dict'): "ema_type is|name 'dict'",
    hook('type=["EMAHook"]'): "is not a text",
    hook('type=dict(type="EMAHook")'): "is not a text",
    hook('type="nms"'): "cannot be there",
    loader('pipeline=[dict(type="RandomChoiceResize", scales=[(64, 64)], resize_type="mmdet.Albu")]'):
        "choose from Resize",
    loader('pipeline=[dict(type="Albu", transforms=[])]'): "not among those",
    loader('pipeline=[dict(type="LoadProposals")]'): "not among those",
    loader('type="mmengine.Config.fromfile"'): "type",
    'train_dataloader = dict(collate_fn=dict(type="eval"))': "type 'eval'",
    'train_dataloader = dict(worker_init_fn=dict(type="exec"))': "worker_init_fn is not taken",
    'model = dict(roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(type="os.system"))))':
        "unknown type 'os.system'",
    "model = dict(neck=dict(norm_cfg=dict(type='MMBN')))": "norm_cfg",
    "model = dict(type='MaskRCNN', backbone=dict(type='SHViT', act_layer='x'))": "act_layer is not taken",
    'log_processor = dict(mean_pattern="(a+)+$")': "mean_pattern is not taken",
    'log_processor = dict(custom_cfg=[dict(data_src="loss", method_name="__class__")])': "choose from mean",
    'default_scope = "os"': "default_scope 'os' is not one of",
    'custom_imports = dict(imports=["this"])': "wants this imported",
    'launcher = "evil"': "choose from none",
    # memory and time
    "x = [0] * 10**11": "Pow is more",
    "x = [0] * 100000000000": "more than 50,000 values",
    "x = 'a' * 100000000000": "more than 50,000 values",
    "x = 100000000000 * (0,)": "more than 50,000 values",
    "x = list(range(100000000000))": "more than 50,000 values",
    "x = range(10 * 1000000)": "more than 50,000 values",
    "x = [a for a in range(1000) for b in range(1000)]": "more than",
    "x = [1]\n" + "x = [x, x, x, x, x, x, x, x, x, x]\n" * 12: "more than 50,000 values",
    "x = 3\n" + "x = x * x\n" * 40: "64 bits",
    "x = f'{1:>9999999999}'": "a format",
    "x = '%99999999999d' % 1": "is not a number",
    "x=1;" * 60_000: "more than 150,000 parts",
    "x = 'ab'\n" + "x = x + x\n" * 40: "a text of",
    "x = " + "[" * 150 + "]" * 150: "more than|nested|deep|parentheses",
    "x = 1\n" + "x = [x]\n" * 300: "deep",
    "x = " + "-" * 5000 + "1": "more than|recursion|nested|deep",
    "x = str(['a' * 99999] * 40000)": "more than 50,000 values",
    "x = 'a' * 40000\ny = f'" + "{x}" * 2000 + "'": "a text of",
    "x = list(range(9999))\ny = [" + "*x, " * 2000 + "]": "more than 50,000 values",
    "x = list(range(9999))\ny = dict(" + "*x, " * 2000 + ")": "more than 50,000 values",
    "x = list(range(9999))\ny = [-1 in x for a in range(9999)]": "steps",
    "x = list(range(9999))\ny = [len(x[:]) for a in range(9999)]": "steps",
    "x = _base_" + ".a" * 20000: "more than|recursion|nested|deep|not there",
    "\n".join(f"x{number} = 1" for number in range(2000)): "2,0.. fields",
    "x = int('9' * 5000)": "digits|64 bits",
    "train_dataloader = dict(num_workers=100000)": "num_workers is 100000; choose",
    "train_dataloader = dict(batch_size=10000000000)": "batch_size is 10000000000; choose",
    loader('pipeline=[dict(type="Resize", scale=(10000000, 10000000))]'): "scale.* is 10000000; choose",
    "model = dict(neck=dict(out_channels=1000000000))": "out_channels is 1000000000; choose",
    "train_cfg = dict(max_epochs=float('inf'))": "max_epochs is inf",
    # texts as names
    'visualizer = dict(name="a\\x1b[2Jb")': "is not a plain line",
    'experiment_name = "../../x"': "is not a name of letters",
    'default_hooks = dict(checkpoint=dict(save_best="../../x"))': "is not a metric's name",
}  # fmt: skip


@pytest.mark.parametrize("text", ATTACKS, ids=[each[:60].replace("\n", " ") for each in ATTACKS])
def test_attacks_are_one_line(tmp_path, monkeypatch, text):
    monkeypatch.setenv("SECRET", "s3cr3t")
    began = time.perf_counter()
    with pytest.raises(InputError, match=ATTACKS[text]) as caught:
        opened(tmp_path, OURS + text + "\n")
    assert "\n" not in str(caught.value)
    assert "s3cr3t" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert time.perf_counter() - began < 5
    assert [path.name for path in tmp_path.iterdir()] == ["c.py"]


def test_a_base_that_is_its_own_ends(tmp_path):
    with pytest.raises(InputError, match=r"bases|recursion"):
        opened(tmp_path, '_base_ = "./c.py"\n')
    for number in range(20):
        (tmp_path / f"b{number}.py").write_text(f'_base_ = ["./b{number + 1}.py", "./b{number + 1}.py"]\n')
    with pytest.raises(InputError):
        opened(tmp_path, '_base_ = "./b0.py"\n')


@pytest.mark.parametrize("text", ["x = {{$SECRET:1}}", "x = '{{ $SECRET : }}'", "x = {{'$SECRET:0'}}"])
def test_an_environment_variable_is_told_to_nobody(tmp_path, monkeypatch, text):
    monkeypatch.setenv("SECRET", "s3cr3t")
    with pytest.raises(InputError, match="environment variable SECRET"):
        opened(tmp_path, OURS + text)


def test_what_runs_a_config_gets_no_variables_of_it(tmp_path):
    config = opened(tmp_path, OURS + "heads = dict(num_classes=2)\n", ("note=5",))
    known = only_known(config, ("note=5",))
    assert "heads" in config
    assert "heads" not in known
    assert known.note == 5
    assert known.filename == config.filename


def test_options_are_the_users_own_word(tmp_path):
    config = opened(tmp_path, OURS, ("load_from=/home/me/x.pth", "default_hooks.checkpoint.out_dir=/tmp/x"))
    assert config.load_from == "/home/me/x.pth"
    with pytest.raises(InputError, match="save_dir is not taken"):  # beside what is given
        opened(tmp_path, OURS + 'visualizer = dict(save_dir="/tmp")', ("visualizer={'name': 'x'}",))
    with pytest.raises(InputError, match="is an address"):
        opened(tmp_path, OURS + 'load_from = "http://x/y"', ("model.neck.num_outs=5",))


IMPOSSIBLE = [
    *("a=" + "[" * 9999, "a.b.c=" + "9" * 9999, "model=5", "model.neck=3", "train_dataloader=[]", "=1", "a\n=1"),
    *("model.roi_head.0.x=1", "train_dataloader.dataset.pipeline.99.x=1"),
]


@pytest.mark.parametrize("option", IMPOSSIBLE, ids=[repr(each[:30]) for each in IMPOSSIBLE])
def test_options_that_cannot_be_are_one_line(tmp_path, option):
    try:
        opened(tmp_path, OURS, (option,))
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017


# --- the table --------------------------------------------------------------------------------------------------------


def test_table_names_what_there_is():
    """Every type is registered, or looked up by name in mmcv; every kind is defined."""
    load_config("retinanet_shvit-s1_fpn_1x_coco")
    assert TYPES - registered() <= {"RoIAlign", "RoIPool", "nms", "soft_nms"}
    assert SECTIONS.count("\n[") == len(PARTS) + 1
    entries = [*DICTS.values(), *(arguments for types in PARTS.values() for arguments in types.values())]
    for kind in {each for arguments in entries for kinds in arguments.values() for each in kinds.split(",")}:
        name = kind.strip("{}")
        known = name in CHECKS or "|" in name or name == "priority" or name[1:] in (PARTS if name[0] == "@" else DICTS)
        assert known or any(name[1:] in types for types in PARTS.values()), kind
    assert "HIGH" in PRIORITIES
