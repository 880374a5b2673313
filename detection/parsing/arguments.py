"""Parts that a config may build, and their arguments: not all that MMDetection can build is harmless.

An entry is a type, or several that take the same, and its arguments with their kinds. What is not here is not taken
from a config unless it is trusted: among the rest are arguments that are files to write, folders to delete, programs
to run, texts that are evaluated and addresses that are asked.

Kinds: `num`, `size`, `ratio` and `few` are numbers, or lists of them; `a|b` is one of these texts; `data` and `json`
are files to read, `line` is any text of one line, `off` is no more than False, `weights` is a checkpoint; `@part` is
something to build of that section; `.fields` is a dict with the fields of that entry; `{…}` is a dict with any names. A
comma stands between kinds of which a value has one.
`vocabulary.py` says what a value of each kind may be.
"""

SECTIONS = """
[detector]
MaskRCNN FasterRCNN CascadeRCNN: backbone=@backbone neck=@neck rpn_head=@dense_head roi_head=@roi_head
  train_cfg=.learn test_cfg=.detect data_preprocessor=@preprocessor init_cfg=@init
RetinaNet: backbone=@backbone neck=@neck bbox_head=@dense_head
  train_cfg=.learn test_cfg=.detect data_preprocessor=@preprocessor init_cfg=@init

[preprocessor]
DetDataPreprocessor: mean=num std=num pad_size_divisor=size pad_value=num pad_mask=num mask_pad_value=num pad_seg=num
  seg_pad_value=num bgr_to_rgb=num rgb_to_bgr=num boxtype2tensor=num non_blocking=num batch_augments=@batch_augment

[batch_augment]
BatchFixedSizePad: size=size img_pad_value=num pad_mask=num mask_pad_value=num pad_seg=num seg_pad_value=num
BatchSyncRandomResize: random_size_range=size interval=num size_divisor=size

[backbone]
SHViT: model=word out_indices=size frozen_stages=num norm_eval=num drop_path_rate=num with_cp=num init_cfg=@init
  in_chans=size embed_dim=size depth=size partial_dim=size qk_dim=size use_attn=num drop_rate=num
TimmBackbone: model=word out_indices=num norm_eval=num init_cfg=@init pretrained=num drop_path_rate=num drop_rate=num
  in_chans=size output_stride=size img_size=size
ResNet ResNeXt ResNetV1d: depth=size in_channels=size stem_channels=size base_channels=size num_stages=size strides=size
  dilations=size out_indices=size style=pytorch|caffe deep_stem=num avg_down=num frozen_stages=num conv_cfg=@conv
  norm_cfg=@norm norm_eval=num dcn=@conv stage_with_dcn=num with_cp=num zero_init_residual=num init_cfg=@init
  groups=size base_width=size

[neck]
FPN PAFPN: in_channels=size out_channels=size num_outs=size start_level=num end_level=num
  add_extra_convs=num,on_input|on_lateral|on_output relu_before_extra_convs=num no_norm_on_lateral=num conv_cfg=@conv
  norm_cfg=@norm act_cfg=@act upsample_cfg=@upsample,.interpolate init_cfg=@init
TransposedFPN: in_channels=size out_channels=size num_outs=size num_extra_trans_convs=size init_cfg=@init

[dense_head]
RPNHead RetinaHead: in_channels=size num_classes=size num_convs=size stacked_convs=size feat_channels=size
  anchor_generator=@anchors bbox_coder=@coder reg_decoded_bbox=num loss_cls=@loss loss_bbox=@loss conv_cfg=@conv
  norm_cfg=@norm init_cfg=@init train_cfg=.learn test_cfg=.detect
FCOSHead: in_channels=size num_classes=size stacked_convs=size feat_channels=size strides=size regress_ranges=num
  center_sampling=num center_sample_radius=num norm_on_bbox=num centerness_on_reg=num dcn_on_last_conv=num
  conv_bias=num,auto| bbox_coder=@coder loss_cls=@loss loss_bbox=@loss loss_centerness=@loss conv_cfg=@conv
  norm_cfg=@norm init_cfg=@init train_cfg=.learn test_cfg=.detect

[roi_head]
StandardRoIHead CascadeRoIHead: bbox_roi_extractor=@extractor bbox_head=@bbox_head mask_roi_extractor=@extractor
  mask_head=@mask_head shared_head=@shared_head num_stages=size stage_loss_weights=num train_cfg=.learn test_cfg=.detect
  init_cfg=@init

[shared_head]
ResLayer: depth=size stage=size stride=size dilation=size style=pytorch|caffe norm_cfg=@norm norm_eval=num with_cp=num
  init_cfg=@init

[bbox_head]
BBoxHead Shared2FCBBoxHead Shared4Conv1FCBBoxHead ConvFCBBoxHead: fc_out_channels=size num_shared_convs=size
  num_shared_fcs=size num_cls_convs=size num_cls_fcs=size num_reg_convs=size num_reg_fcs=size conv_out_channels=size
  conv_cfg=@conv norm_cfg=@norm init_cfg=@init with_avg_pool=num with_cls=num with_reg=num roi_feat_size=size
  in_channels=size num_classes=size bbox_coder=@coder predict_box_type=hbox| reg_class_agnostic=num
  reg_decoded_bbox=num reg_predictor_cfg=@linear cls_predictor_cfg=@linear loss_cls=@loss loss_bbox=@loss

[mask_head]
FCNMaskHead: num_convs=size roi_feat_size=size in_channels=size conv_kernel_size=size conv_out_channels=size
  num_classes=size class_agnostic=num upsample_cfg=@upsample conv_cfg=@conv norm_cfg=@norm predictor_cfg=@conv
  loss_mask=@loss init_cfg=@init

[extractor]
SingleRoIExtractor GenericRoIExtractor: roi_layer=@roi_layer out_channels=size featmap_strides=size finest_scale=num
  aggregation=sum|concat init_cfg=@init

[roi_layer]
RoIAlign RoIPool: output_size=size sampling_ratio=size pool_mode=avg|max aligned=num use_torchvision=num

[anchors]
AnchorGenerator LegacyAnchorGenerator: strides=size ratios=num scales=num base_sizes=num scale_major=num
  octave_base_scale=num scales_per_octave=size centers=num center_offset=num use_box_type=num

[coder]
DeltaXYWHBBoxCoder LegacyDeltaXYWHBBoxCoder: target_means=num target_stds=num clip_border=num add_ctr_clamp=num
  ctr_clamp=num use_box_type=num
DistancePointBBoxCoder: clip_border=num use_box_type=num

[loss]
CrossEntropyLoss FocalLoss QualityFocalLoss: use_sigmoid=num use_mask=num reduction=none|mean|sum class_weight=num
  ignore_index=num loss_weight=num avg_non_ignore=num gamma=num alpha=num beta=num activated=num
L1Loss SmoothL1Loss MSELoss BalancedL1Loss: beta=num alpha=num gamma=num reduction=none|mean|sum loss_weight=num
IoULoss GIoULoss DIoULoss CIoULoss EIoULoss BoundedIoULoss: linear=num mode=linear|square|log eps=num beta=num
  reduction=none|mean|sum loss_weight=num
SeesawLoss: use_sigmoid=num p=num q=num num_classes=size eps=num reduction=none|mean|sum loss_weight=num return_dict=num

[assigner]
MaxIoUAssigner: pos_iou_thr=num neg_iou_thr=num min_pos_iou=num gt_max_assign_all=num ignore_iof_thr=num
  ignore_wrt_candidates=num match_low_quality=num gpu_assign_thr=num iou_calculator=@iou
ATSSAssigner: topk=size alpha=num iou_calculator=@iou ignore_iof_thr=num

[iou]
BboxOverlaps2D: scale=num dtype=fp16|

[roi_sampler]
RandomSampler PseudoSampler OHEMSampler InstanceBalancedPosSampler IoUBalancedNegSampler: num=num pos_fraction=num
  neg_pos_ub=num add_gt_as_proposals=num floor_thr=num floor_fraction=num num_bins=size loss_key=loss_cls|
CombinedSampler: num=num pos_fraction=num neg_pos_ub=num add_gt_as_proposals=num pos_sampler=@roi_sampler
  neg_sampler=@roi_sampler

[nms]
nms soft_nms: iou_threshold=num class_agnostic=num split_thr=num min_score=num sigma=num method=naive|linear|gaussian
  max_num=num offset=num score_threshold=num

[conv]
Conv Conv1d Conv2d DCN DCNv2: deform_groups=size fallback_on_stride=num padding_mode=zeros|reflect|replicate|circular

[linear]
Linear: bias=num

[norm]
BN BN2d SyncBN GN LN: requires_grad=num eps=num momentum=num affine=num num_groups=size track_running_stats=num

[act]
ReLU GELU SiLU LeakyReLU: inplace=num negative_slope=num approximate=none|tanh

[upsample]
nearest bilinear deconv: scale_factor=few mode=nearest|bilinear align_corners=num

[init]
Pretrained: checkpoint=weights prefix=word map_location=cpu|
Xavier Normal TruncNormal Uniform Kaiming Caffe2Xavier Constant: layer=word gain=num distribution=uniform|normal
  mode=fan_in|fan_out nonlinearity=relu|leaky_relu mean=num std=num a=num b=num val=num bias=num bias_prob=num
  override=@override,.override

[override]
Xavier Normal TruncNormal Uniform Kaiming Caffe2Xavier Constant: name=word gain=num distribution=uniform|normal
  mode=fan_in|fan_out nonlinearity=relu|leaky_relu mean=num std=num a=num b=num val=num bias=num bias_prob=num

[tta]
DetTTAModel: tta_cfg=.detect data_preprocessor=@preprocessor

[dataset]
CocoDataset: ann_file=json metainfo=.metainfo data_root=data data_prefix=.data_prefix filter_cfg=.filter_cfg indices=num
  serialize_data=num pipeline=@transform test_mode=num lazy_init=num max_refetch=size return_classes=num
  backend_args=.backend seg_map_suffix=word
RepeatDataset: dataset=@dataset times=size
ClassBalancedDataset: dataset=@dataset oversample_thr=num
MultiImageMixDataset: dataset=@dataset pipeline=@transform skip_type_keys=word max_refetch=size

[sampler]
DefaultSampler InfiniteSampler: shuffle=num seed=num round_up=num
ClassAwareSampler: seed=num num_sample_class=size

[batch_sampler]
AspectRatioBatchSampler: drop_last=num

[collate]
pseudo_collate default_collate:

[transform]
LoadImage LoadImageFromFile: to_float32=num ignore_empty=num imdecode_backend=cv2|pillow backend_args=.backend
  color_type=color|grayscale|unchanged|color_ignore_orientation|grayscale_ignore_orientation
LoadAnnotations: with_bbox=num with_label=num with_mask=num with_seg=off poly2mask=num box_type=hbox|
  imdecode_backend=cv2|pillow backend_args=.backend
Resize: scale=size scale_factor=ratio keep_ratio=num clip_object_border=num backend=cv2|pillow
  interpolation=nearest|bilinear|bicubic|area|lanczos
FixShapeResize: width=size height=size pad_val=num keep_ratio=num clip_object_border=num backend=cv2|pillow
  interpolation=nearest|bilinear|bicubic|area|lanczos
RandomResize RandomChoiceResize: scale=size scales=size ratio_range=ratio resize_type=Resize|mmdet.Resize
  keep_ratio=num clip_object_border=num backend=cv2|pillow interpolation=nearest|bilinear|bicubic|area|lanczos
RandomFlip: prob=num direction=horizontal|vertical|diagonal
RandomCrop: crop_size=size crop_type=absolute|absolute_range|relative|relative_range allow_negative_crop=num
  recompute_bbox=num bbox_clip_border=num
RandomCenterCropPad: crop_size=size ratios=ratio border=size mean=num std=num to_rgb=num test_mode=num
  bbox_clip_border=num
RandomAffine: max_rotate_degree=num max_translate_ratio=num scaling_ratio_range=ratio max_shear_degree=num border=num
  border_val=num bbox_clip_border=num
RandomChoice TestTimeAug: transforms=@transform prob=num
RandomShift: prob=num max_shift_px=size filter_thr_px=num
RandomErasing: n_patches=few ratio=num squared=num bbox_erased_thr=num img_border_value=num mask_border_value=num
CutOut: n_holes=few cutout_shape=size cutout_ratio=num fill_in=num
Pad Border: size=size size_divisor=size pad_to_square=num pad_val=num
  padding_mode=constant|edge|reflect|symmetric
Expand: mean=num to_rgb=num ratio_range=ratio seg_ignore_label=num prob=num
PhotoMetricDistortion: brightness_delta=num contrast_range=num saturation_range=num hue_delta=num
YOLOXHSVRandomAug: hue_delta=num saturation_delta=num value_delta=num
MinIoURandomCrop: min_ious=num min_crop_size=num bbox_clip_border=num
FilterAnnotations: min_gt_bbox_wh=num min_gt_mask_area=num by_box=num by_mask=num keep_empty=num
Mosaic MixUp CachedMosaic CachedMixUp: img_scale=size center_ratio_range=ratio ratio_range=ratio flip_ratio=num
  bbox_clip_border=num pad_val=num prob=num max_iters=few max_cached_images=few random_pop=num
AutoContrast Brightness Color Contrast Equalize Invert Posterize Sharpness Solarize ColorTransform: prob=num level=num
  min_mag=num max_mag=num
Rotate ShearX ShearY TranslateX TranslateY: prob=num level=num min_mag=num max_mag=num reversal_prob=num
  img_border_value=num mask_border_value=num seg_ignore_label=num interpolation=nearest|bilinear|bicubic|area|lanczos
AutoAugment: policies=@transform prob=num
RandAugment: aug_space=@transform aug_num=few prob=num
CopyPaste: max_num_pasted=few bbox_occluded_thr=num mask_occluded_thr=num selected=num paste_by_box=num
PackDetInputs: meta_keys=word

[train_loop]
EpochBasedTrainLoop IterBasedTrainLoop: max_epochs=num max_iters=num val_begin=num val_interval=num
  dynamic_intervals=num

[eval_loop]
ValLoop TestLoop: fp16=num

[optim_wrapper]
OptimWrapper AmpOptimWrapper: optimizer=@optimizer accumulative_counts=num clip_grad=.clip_grad
  paramwise_cfg=.paramwise loss_scale=num,dynamic|,.loss_scale dtype=float16|bfloat16|float32

[optimizer]
SGD Adam AdamW Adamax NAdam RAdam RMSprop Adagrad Adadelta: lr=num momentum=num dampening=num weight_decay=num
  nesterov=num betas=num eps=num amsgrad=num alpha=num rho=num lr_decay=num centered=num maximize=num foreach=num
  fused=num capturable=num differentiable=num momentum_decay=num decoupled_weight_decay=num
  initial_accumulator_value=num

[scheduler]
LinearLR QuadraticWarmupLR QuadraticWarmupMomentum
  MultiStepLR StepLR CosineAnnealingLR ConstantLR PolyLR ExponentialLR OneCycleLR CosineRestartLR LinearMomentum
  MultiStepMomentum CosineAnnealingMomentum ReduceOnPlateauLR: begin=num end=num by_epoch=num last_step=num verbose=num
  start_factor=num end_factor=num milestones=num gamma=num step_size=num T_max=num eta_min=num eta_min_ratio=num
  factor=num power=num eta_max=num total_steps=num pct_start=num anneal_strategy=cos|linear div_factor=num
  final_div_factor=num three_phase=num periods=num restart_weights=num convert_to_iter_based=num monitor=metric
  rule=less|greater patience=num threshold=num threshold_rule=rel|abs cooldown=num min_value=num eps=num

[metric]
CocoMetric: ann_file=json metric=bbox|segm|proposal|proposal_fast classwise=num proposal_nums=size iou_thrs=num
  metric_items=metric format_only=num collect_device=cpu|gpu prefix=word sort_categories=num use_mp_eval=num
  backend_args=.backend

[hook]
IterTimerHook ParamSchedulerHook DistSamplerSeedHook NumClassCheckHook SyncBuffersHook SetEpochInfoHook:
  priority=priority
LoggerHook: interval=num ignore_last=num interval_exp_name=num log_metric_by_epoch=num priority=priority
CheckpointHook: interval=num by_epoch=num save_optimizer=num save_param_scheduler=num max_keep_ckpts=num save_last=num
  save_best=metric rule=greater|less greater_keys=metric less_keys=metric filename_tmpl=template save_begin=num
  published_keys=word priority=priority
DetVisualizationHook: draw=num interval=num score_thr=num show=off wait_time=num priority=priority
EMAHook:
  ema_type=ExpMomentumEMA|mmdet.ExpMomentumEMA|ExponentialMovingAverage|StochasticWeightAverage|MomentumAnnealingEMA
  strict_load=num begin_iter=num begin_epoch=num momentum=num gamma=num interval=num update_buffers=num
  priority=priority
EarlyStoppingHook: monitor=metric rule=greater|less min_delta=num strict=num check_finite=num patience=num
  stopping_threshold=num priority=priority
CheckInvalidLossHook MemoryProfilerHook: interval=num priority=priority
EmptyCacheHook: before_epoch=num after_epoch=num after_iter=num priority=priority
PipelineSwitchHook: switch_epoch=num switch_pipeline=@transform priority=priority

[log_processor]
LogProcessor: window_size=num by_epoch=num num_digits=few log_with_hierarchy=num custom_cfg=.logged

[visualizer]
DetLocalVisualizer: name=line vis_backends=@vis_backend bbox_color=num,word text_color=num,word mask_color=num,word
  line_width=num alpha=num

[vis_backend]
LocalVisBackend TensorboardVisBackend:

[fields]
config: model=@detector work_dir=folder train_dataloader=.loader val_dataloader=.loader test_dataloader=.loader
  train_cfg=@train_loop,.loop val_cfg=@eval_loop,.eval_loop test_cfg=@eval_loop,.eval_loop
  auto_scale_lr=.auto_scale_lr optim_wrapper=@optim_wrapper,.OptimWrapper param_scheduler=@scheduler
  val_evaluator=@metric test_evaluator=@metric default_hooks={@hook} custom_hooks=@hook
  data_preprocessor=@preprocessor load_from=weights resume=num launcher=none|pytorch|slurm|mpi env_cfg=.env_cfg
  log_processor=@log_processor,.LogProcessor log_level=CRITICAL|ERROR|WARNING|INFO|DEBUG visualizer=@visualizer
  default_scope=mmdet|mmengine|mmcv randomness=.randomness experiment_name=word custom_imports=.imports
  train_pipeline=@transform test_pipeline=@transform tta_pipeline=@transform tta_model=@tta vis_backends=@vis_backend
  data_root=data dataset_type=word backend_args=.backend find_unused_parameters=num sync_bn=torch|mmcv
imports: imports=word allow_failed_imports=num
loader: batch_size=size num_workers=few persistent_workers=num pin_memory=num drop_last=num prefetch_factor=few
  timeout=num num_batch_per_epoch=num multiprocessing_context=fork|spawn|forkserver
  sampler=@sampler batch_sampler=@batch_sampler dataset=@dataset
  collate_fn=@collate
loop: by_epoch=num max_epochs=num max_iters=num val_begin=num val_interval=num dynamic_intervals=num
eval_loop: fp16=num
auto_scale_lr: enable=num base_batch_size=num
randomness: seed=num deterministic=num diff_rank_seed=num
env_cfg: cudnn_benchmark=num mp_cfg=.mp_cfg dist_cfg=.dist_cfg resource_limit=num
mp_cfg: mp_start_method=fork|spawn|forkserver opencv_num_threads=few
dist_cfg: backend=nccl|gloo|mpi timeout=num
logged: data_src=word method_name=mean|min|max|current window_size=num,epoch|global log_name=word
metainfo: classes=names palette=num
data_prefix: img=data img_path=data seg=data
filter_cfg: filter_empty_gt=num min_size=num bbox_min_size=num
backend: backend=local|
interpolate: mode=nearest|bilinear|bicubic scale_factor=few align_corners=num
override: name=word
clip_grad: type=norm|value max_norm=num norm_type=num clip_value=num error_if_nonfinite=num foreach=num
paramwise: custom_keys={.multiples} bias_lr_mult=num bias_decay_mult=num norm_decay_mult=num flat_decay_mult=num
  dwconv_decay_mult=num dcn_offset_lr_mult=num bypass_duplicate=num
multiples: lr_mult=num decay_mult=num
loss_scale: init_scale=num growth_factor=num backoff_factor=num growth_interval=num enabled=num
learn: rpn=.learn rpn_proposal=.detect rcnn=.learn assigner=@assigner sampler=@roi_sampler allowed_border=num
  pos_weight=num debug=num mask_size=size mask_thr_binary=num center_ratio=num ignore_ratio=num
detect: rpn=.detect rcnn=.detect nms=@nms,.nms nms_pre=num nms_post=num nms_across_levels=num nms_thr=num max_num=num
  max_per_img=num score_thr=num min_bbox_size=num mask_thr_binary=num
"""
