_base_ = "./_base_/mask-rcnn_shvit_fpn_1x_coco.py"

model = dict(
    backbone=dict(model="shvit_s2", init_cfg=dict(type="Pretrained", checkpoint="shvit_s2.in1k")),
    neck=dict(in_channels=[128, 308, 448]),
)
