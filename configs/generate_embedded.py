"""A generator of images from scratch, on the embedded images of eight classes.

Command:   python -m vision_jax.main --config=configs/generate_embedded.py
Hardware:  2 CPU cores, about 12 CPU-minutes
Expected:  evaluation loss 0.128 (seed 0)

The embedded generator, `embedded:fashion_generator`, is what seed 0 ends with (docs/assets.md).
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "ankle boot")


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("generation")
    config.batch_size = 64
    config.total_steps = 6000
    config.model.variant = "dit"
    config.model.image_size = 28
    config.model.arguments = (
        ("patch_size", 7),
        ("width", 96),
        ("depth", 4),
        ("num_heads", 4),
        ("mlp_width", 384),
        ("in_channels", 3),
        ("predicts", "image"),
    )
    config.optim.lr = 5e-3
    config.optim.b2 = 0.99
    config.optim.warmup_steps = 200
    config.flow.time_mean = -0.6
    config.data.train = "embedded:fashion_mnist/train"
    config.data.eval = "embedded:fashion_mnist/test"
    config.data.classes = CLASSES
    config.data.flip = False
    config.data.threads = 1
    config.evaluate.every = 1500
    config.evaluate.batch_size = 400
    config.checkpoint_every = 500
    config.log_every = 100
    return config
