"""DeiT-S on ImageNet, taught by a RegNetY-16GF through its distillation token.

Command:   python -m vision_jax.main --config=configs/distill_imagenet.py
Hardware:  8 GPUs of 80 GB or a TPU pod slice
Expected:  not run here; 81.2 % top-1 in the paper

Touvron et al. 2020 (https://arxiv.org/abs/2012.12877), table 9: 300 epochs, batches of 1,024, AdamW
at 5e-4 x 1,024 / 512, 5 epochs of warm-up, hard labels of the teacher for half of the loss. Not
theirs here: there is no repeated augmentation.
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("classification")
    config.batch_size = 1024
    config.total_steps = 375_000
    config.checkpoint_every = 1250
    config.log_every = 100
    config.recipes = ("distill",)

    config.model.variant = "deit_small_distilled_patch16_224"
    config.model.reinitialize = ()
    config.model.image_size = 224
    config.model.dtype = "bfloat16"
    config.model.drop_path = 0.1

    config.distill.teachers = ("hf://timm/regnety_160.deit_in1k",)
    config.distill.dtype = "bfloat16"
    config.distill.logits = "hard"
    config.distill.temperature = 1.0
    config.distill.token = True
    config.adversarial.steps = 2  # with ("distill", "adversarial")
    config.adversarial.watch = 1000

    config.optim.warmup_steps = 6_250
    config.optim.clip_norm = 0.0

    config.data.train = "tfds:imagenet2012/train"
    config.data.eval = "tfds:imagenet2012/validation"
    config.data.crop_pct = 0.875
    config.data.interpolation = "bicubic"
    config.data.threads = 8
    config.data.workers = 16

    config.augment.policy = "rand"
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.augment.erasing = 0.25

    config.evaluate.every = 0
    config.evaluate.batch_size = 1024
    return config
