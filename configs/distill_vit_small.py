"""A small ViT that learns Fashion-MNIST from a bigger one, all from the package itself.

Commands:  python -m vision_jax.main --config=configs/vit_lora.py --workdir=runs/teacher \\
               --config.recipes="()" --config.trainable=".*" --config.optim.lr=1e-3 \\
               --config.total_steps=400
           python -m vision_jax.main --config=configs/distill_vit_small.py
Hardware:  2 CPU cores, about 5 minutes each
Expected:  top-1 0.763, mean of 3 seeds, where the student alone has 0.745 and the teacher 0.831

The teacher, fine-tuned from the package's weights, has 6 blocks of width 128; the student has 3 of
width 64, and begins at random. Alone: --config.recipes="()".
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("classification")
    config.checkpoint_every = 500
    config.recipes = ("distill",)

    config.model.variant = "vit"
    config.model.arguments = (
        ("width", 64),
        ("depth", 3),
        ("num_heads", 2),
        ("mlp_width", 128),
        ("patch_size", 4),
        ("class_token", False),
        ("position_prefix", 0),
        ("pool", "avg"),
        ("norm_after_pool", True),
    )
    config.model.image_size = 32

    config.distill.teachers = ("runs/teacher",)
    config.distill.weight = 1.0
    config.distill.features = (("patch_tokens", "block_2", "block_5", 1.0),)

    config.optim.lr = 3e-3
    config.optim.warmup_steps = 50

    config.data.train = "embedded:fashion_mnist/train"
    config.data.eval = "embedded:fashion_mnist/test"
    config.data.crop = "pad"
    config.data.crop_pct = 1.0

    config.evaluate.every = 500
    return config
