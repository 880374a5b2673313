# RetinaNet behind a SHViT: feature maps at strides 16, 32 and 64, a pyramid of strides 8 to 128.
_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "mmdet::_base_/datasets/coco_detection.py", "./runtime_1x.py"]

model = dict(
    backbone=dict(_delete_=True, type="SHViT"),
    neck=dict(_delete_=True, type="TransposedFPN", out_channels=256, num_outs=5, num_extra_trans_convs=1),
)

train_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImage"),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
