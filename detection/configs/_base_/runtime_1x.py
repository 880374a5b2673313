# The schedule of 12 epochs that the paper's detectors were trained with, and what every run writes.
_base_ = ["mmdet::_base_/schedules/schedule_1x.py", "mmdet::_base_/default_runtime.py"]

custom_imports = dict(imports=["shvit.detection", "shvit.detection.plugin.reading"])

# lr is for a batch of 16: 8 GPUs with 2 images each; --auto-scale-lr fits it to another batch.
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05))
vis_backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
visualizer = dict(vis_backends=vis_backends)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
