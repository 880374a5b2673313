"""The recipes, as values that differ by `replace`."""

from dataclasses import replace

from shvit.img_size import ImgSize

from .recipe import Augment, Compute, Distill, Optim, Recipe, Save

# The paper's runs on ImageNet-1k: 300 epochs, global batch 2048 (8 × 256), 224 px (S4: 256); weight decay differs.
# Expected top-1 72.8, 75.2, 77.4 and 79.4 %. Source: the paper, and main.py of ysj9909/SHViT.
S1 = Recipe()
S2 = replace(S1, model="shvit_s2", optim=replace(S1.optim, weight_decay=0.032))
S3 = replace(S1, model="shvit_s3", optim=replace(S1.optim, weight_decay=0.035))
S4 = replace(S1, model="shvit_s4", img_size=ImgSize.of(256), optim=replace(S1.optim, weight_decay=0.03))

# Higher resolution, from the 300-epoch weights (--checkpoint): 30 epochs, weight decay 1e-8. Expected top-1 of S4 at
# 512 px: 82.0 %. The learning rate is that of the authors' log at 512 px, 4e-5 (the paper prints 0.004); their batch
# is not known, so the rate is tied to a batch of 512.
FINETUNE_512 = replace(
    S4,
    img_size=ImgSize.of(512),
    epochs=30,
    batch_size=512,
    optim=replace(S4.optim, lr=4e-5, weight_decay=1e-8, min_lr=1e-6),
    compute=replace(S4.compute, device_batch_size=64),
)
FINETUNE_384 = replace(FINETUNE_512, img_size=ImgSize.of(384), compute=replace(S4.compute, device_batch_size=128))

# Distillation as in DeiT, from RegNetY-16GF. Expected top-1 74.0, 76.2, 78.3 and 80.2 %. The reference used DeiT's file
# regnety_160-a5fe301d.pth, which timm publishes under this tag.
REGNET = Distill(teacher="regnety_160.deit_in1k")
DISTILL_S1, DISTILL_S2, DISTILL_S3, DISTILL_S4 = (replace(recipe, distill=REGNET) for recipe in (S1, S2, S3, S4))

# Published weights fine-tuned on your own folder, on one GPU or patiently on a CPU.
FINETUNE = Recipe(
    pretrained=True,
    epochs=20,
    batch_size=64,
    ema_decay=0.999,
    augment=Augment(scale=(0.35, 1.0), mixup=0.0, cutmix=0.0, random_erasing=0.1, repeats=1),
    optim=Optim(lr=4e-3, weight_decay=0.05, warmup_epochs=2, min_lr=1e-6, layer_decay=0.85),
    compute=Compute(device_batch_size=64),
)

# A few thousand images from scratch: images grow from 96 to 128 px, so that the same minutes hold more epochs.
# Rate and augmentation were chosen at 96 px on a sixth of the training images of clothing10: there a peak rate of
# 3.75e-3 was better than 1.5e-3 and 6.3e-3, AdamW as good as Muon and quicker, and little mixing better than much.
# Trained on all of its 3,068 images and held against 341 others after the last epoch: 80.5 % (standard deviation
# 0.7, three seeds), EMA weights 79.8 %; plain AdamW, cosine, RandAugment at 128 px for as long: 74.8 % (0.3) and
# 75.1 %.
SCRATCH = Recipe(
    img_size=ImgSize.of(128),
    first_img_size=ImgSize.of(96),
    epochs=66,
    batch_size=64,
    ema_decay=0.998,
    augment=Augment(
        scale=(0.3, 1.0), auto_augment="rand-m7-mstd0.5-inc1", random_erasing=0.0, mixup=0.2, mixup_prob=0.5, repeats=1
    ),
    optim=Optim(lr=0.03, weight_decay=0.05, clip_grad=1.0, clip_mode="norm"),
    save=Save(eval_epochs=11),
)

# Real images in a minute or two on two cores: mono- and polycrystalline solar cells from the PyPI package
# elpv-dataset. Color says nothing in grayscale images, so it is left alone; a cell has no up and down.
DEMO = Recipe(
    img_size=ImgSize.of(96),
    epochs=8,
    batch_size=64,
    ema_decay=0.98,
    augment=Augment(
        scale=(0.35, 1.0), interpolation="bilinear", vflip=0.5, auto_augment=None, color_jitter=0.0, random_erasing=0.0,
        mixup=0.0, cutmix=0.0, repeats=1,
    ),
    optim=Optim(lr=8e-3, warmup_epochs=1),
)  # fmt: skip

# Several hundred images in half a minute, checkpoints often: a smoke test.
DEBUG = replace(DEMO, img_size=ImgSize.of(64), epochs=3, batch_size=32, save=Save(every_minutes=0.05))

RECIPES = {
    "s1": S1,
    "s2": S2,
    "s3": S3,
    "s4": S4,
    "finetune_384": FINETUNE_384,
    "finetune_512": FINETUNE_512,
    "distill_s1": DISTILL_S1,
    "distill_s2": DISTILL_S2,
    "distill_s3": DISTILL_S3,
    "distill_s4": DISTILL_S4,
    "finetune": FINETUNE,
    "scratch": SCRATCH,
    "demo": DEMO,
    "debug": DEBUG,
}
DESCRIPTIONS = {
    **{f"s{i}": f"Train the paper's S{i} on ImageNet-1k: 300 epochs, batch 2048." for i in (1, 2, 3, 4)},
    "finetune_384": "Fine-tune S4's weights (--checkpoint) at 384 px: 30 epochs.",
    "finetune_512": "Fine-tune S4's weights (--checkpoint) at 512 px: 30 epochs.",
    **{f"distill_s{i}": f"Train S{i} with a second head that learns from RegNetY-16GF." for i in (1, 2, 3, 4)},
    "finetune": "Fine-tune S1's published weights on your own images: 20 epochs.",
    "scratch": "Train S1 from scratch at 128 px on a few thousand images of your own: 66 epochs.",
    "demo": "Train S1 from scratch at 96 px on images of solar cells, or on yours, in a minute or two.",
    "debug": "Smoke test: S1 at 64 px for three epochs.",
}
