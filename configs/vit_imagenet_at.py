"""A ViT-S/16 made robust on ImageNet: pretrained on clean images, then PGD with 2 steps at 4/255.

Command:   python -m vision_jax.main --config=configs/vit_imagenet_at.py
Hardware:  8 GPUs of 80 GB or a TPU pod slice
Expected:  not run here

After Singh et al. 2023 (https://arxiv.org/abs/2303.01870) and their training script: 2 attack steps
at 4/255, AdamW at 1e-3 with 20 epochs of warm-up, label smoothing 0.1, strong augmentation, an
average of the weights, from a model trained on clean images; they train a ViT-S for 300 epochs. Not
theirs here: PGD stands in for APGD, the stem is the patch embedding and not their convolutions, the
weights are of ImageNet-21k, and the batch is 1,024.
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
    config.recipes = ("adversarial",)

    config.model.weights = "hf://timm/vit_small_patch16_224.augreg_in21k"
    config.model.image_size = 224
    config.model.dtype = "bfloat16"
    config.model.drop_path = 0.1

    config.adversarial.steps = 2
    config.adversarial.watch = 1000

    config.optim.warmup_steps = 25_000
    config.optim.ema_decay = 0.9999

    config.data.train = "tfds:imagenet2012/train"
    config.data.eval = "tfds:imagenet2012/validation"
    config.data.threads = 8
    config.data.workers = 16

    config.augment.policy = "rand"
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.augment.erasing = 0.25

    config.evaluate.every = 0
    config.evaluate.batch_size = 1024
    return config
