"""The embedded ViT, pretrained from scratch on CIFAR-10.

Commands:  python scripts/fetch_cifar10.py downloads/cifar10
           python -m vision_jax.main --config=configs/vit_pretrain_cifar10.py
Hardware:  2 CPU cores with bfloat16 matrix units, 36 minutes
Expected:  top-1 0.784 on the CIFAR-10 test images at the last step
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("classification")
    config.batch_size = 128
    config.total_steps = 3_000
    config.checkpoint_every = 500
    config.log_every = 50

    config.model.variant = "vit"
    config.model.arguments = (
        ("width", 128),
        ("depth", 6),
        ("num_heads", 4),
        ("mlp_width", 256),
        ("patch_size", 4),
        ("class_token", False),
        ("position_prefix", 0),
        ("pool", "avg"),
        ("norm_after_pool", True),
    )
    config.model.image_size = 32
    config.model.dtype = "bfloat16"

    config.optim.name = "muon"
    config.optim.lr = 3e-3
    config.optim.warmup_steps = 200
    config.optim.weight_decay = 0.1
    config.optim.b2 = 0.99
    config.optim.momentum = 0.95
    config.optim.ema_decay = 0.999

    config.data.train = "cifar10:downloads/cifar10/train"
    config.data.eval = "cifar10:downloads/cifar10/test"
    config.data.crop = "pad"
    config.data.crop_pct = 1.0
    config.data.threads = 1

    config.evaluate.every = 500
    config.evaluate.batch_size = 500
    return config
