"""What a config may say without being trusted: a closed list, because what MMDetection can build is not all harmless.

Among what is registered there, some evaluates a text, unpickles a file, reads another config as a program, or writes
where it is told to. What is listed here does none of that.
"""

import ast

from mmengine.registry import Registry

CALLS = {"dict", "list", "tuple", "len", "range", "int", "float", "str"}
NODES = (
    *(ast.Module, ast.Assign, ast.Name, ast.Constant, ast.Dict, ast.List, ast.Tuple, ast.Set, ast.Call, ast.keyword),
    *(ast.Attribute, ast.Subscript, ast.Slice, ast.Starred, ast.JoinedStr, ast.FormattedValue, ast.IfExp, ast.Compare),
    *(ast.ListComp, ast.DictComp, ast.comprehension, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.cmpop, ast.boolop),
    *(ast.unaryop, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.expr_context),
)
SCOPES = ("mmdet", "mmengine", "mmcv")
"""Registries that a type may come from."""

FIELDS = (  # of mmengine's Runner, and what mmdet's configs add
    *("model", "work_dir", "train_dataloader", "val_dataloader", "test_dataloader", "train_cfg", "val_cfg", "test_cfg"),
    *("auto_scale_lr", "optim_wrapper", "param_scheduler", "val_evaluator", "test_evaluator", "default_hooks"),
    *("custom_hooks", "data_preprocessor", "load_from", "resume", "launcher", "env_cfg", "log_processor", "log_level"),
    *("visualizer", "default_scope", "randomness", "experiment_name", "custom_imports", "train_pipeline"),
    *("test_pipeline", "tta_pipeline", "tta_model", "vis_backends", "data_root", "dataset_type", "backend_args"),
)
UNSAFE_FIELDS = {
    *("runner_type", "constructor", "file_client_args", "backend_args"),  # imported and called
    *("proposal_file", "teacher_config", "teacher_ckpt", "checkpoint_path", "pretrained_cfg"),  # unpickled or run
    *("pretrained_cfg_overlay", "out_dir", "save_dir", "outfile_prefix", "dump_dir", "cache_dir"),  # written to
}

TYPES = {
    # detectors and their parts
    *("MaskRCNN", "FasterRCNN", "RetinaNet", "DetDataPreprocessor", "SHViT", "TimmBackbone", "ResNet"),
    *("TransposedFPN", "FPN", "RPNHead", "RetinaHead", "StandardRoIHead", "SingleRoIExtractor"),
    *("Shared2FCBBoxHead", "Shared4Conv1FCBBoxHead", "ConvFCBBoxHead", "FCNMaskHead", "AnchorGenerator"),
    *("DeltaXYWHBBoxCoder", "MaxIoUAssigner", "RandomSampler", "PseudoSampler", "BboxOverlaps2D"),
    *("CrossEntropyLoss", "FocalLoss", "L1Loss", "SmoothL1Loss", "IoULoss", "GIoULoss", "DIoULoss", "CIoULoss"),
    *("Conv", "Conv2d", "BN", "BN2d", "SyncBN", "GN", "LN", "ReLU", "GELU", "SiLU", "nearest", "bilinear", "deconv"),
    *("RoIAlign", "RoIPool", "nms", "soft_nms"),  # looked up, or evaluated, by mmdet and mmcv themselves
    *("Pretrained", "Xavier", "Normal", "TruncNormal", "Uniform", "Kaiming", "Caffe2Xavier", "Constant"),
    # data
    *("CocoDataset", "RepeatDataset", "ClassBalancedDataset", "DefaultSampler", "InfiniteSampler"),
    *("AspectRatioBatchSampler", "pseudo_collate", "default_collate", "CocoMetric"),
    *("LoadPhotograph", "LoadImageFromFile", "LoadAnnotations", "Resize", "RandomResize", "RandomChoiceResize"),
    *("FixShapeResize", "RandomFlip", "RandomCrop", "RandomAffine", "RandomChoice", "Pad", "Border", "Expand"),
    *("PhotoMetricDistortion", "MinIoURandomCrop", "FilterAnnotations", "PackDetInputs", "TestTimeAug", "DetTTAModel"),
    # the run
    *("EpochBasedTrainLoop", "IterBasedTrainLoop", "ValLoop", "TestLoop", "OptimWrapper", "AmpOptimWrapper"),
    *("AdamW", "Adam", "SGD", "LinearLR", "MultiStepLR", "StepLR", "CosineAnnealingLR", "ConstantLR", "PolyLR"),
    *("ExponentialLR", "OneCycleLR", "IterTimerHook", "LoggerHook", "ParamSchedulerHook", "CheckpointHook"),
    *("DistSamplerSeedHook", "DetVisualizationHook", "NumClassCheckHook", "EMAHook", "ExpMomentumEMA"),
    *("EarlyStoppingHook", "SyncBuffersHook", "DetLocalVisualizer", "LocalVisBackend", "TensorboardVisBackend"),
    "LogProcessor",
}


def registered() -> set[str]:
    """The names of everything that a config can have built."""
    import mmdet.registry
    import mmengine.registry

    registries = (each for module in (mmengine.registry, mmdet.registry) for each in vars(module).values())
    return {name for each in registries if isinstance(each, Registry) for name in each.module_dict}
