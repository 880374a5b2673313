_base_ = "./_base_/retinanet_shvit_fpn_1x_coco.py"

model = dict(
    backbone=dict(model="shvit_s4", init_cfg=dict(type="Pretrained", checkpoint="shvit_s4.in1k")),
    neck=dict(in_channels=[224, 336, 448]),
)
