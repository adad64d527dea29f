"""A pruned ViT learns back what it lost, from the one that it was cut out of.

Commands:  python -m vision_jax.main --config=configs/vit_lora.py --workdir=runs/whole \\
               --config.recipes="()" --config.trainable=".*" --config.optim.lr=1e-3 \\
               --config.total_steps=400
           python -m vision_jax.main prune runs/whole --keep=0.5 --score=taylor --to=runs/pruned
           python -m vision_jax.main --config=configs/compress.py
           python -m vision_jax.main quantize --workdir=runs/compress
Hardware:  2 CPU cores, minutes each
Expected:  half of the multiplications; in a short trial (one seed, 120 and 150 updates) top-1
           0.750 on 1,000 images, where the whole model has 0.747

The pruned model has half of the heads and hidden units, and half of the multiplications. The last
command writes it in 8 bits, with its most sensitive layers in float; docs/compression.md says more.
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("classification")
    config.total_steps = 400
    config.checkpoint_every = 200
    config.recipes = ("distill",)
    config.trainable = (".*",)

    config.model.weights = "runs/pruned/model.safetensors"

    config.distill.teachers = ("runs/whole",)
    config.distill.weight = 1.0

    config.optim.lr = 1e-3
    config.optim.warmup_steps = 40

    config.data.train = "embedded:fashion_mnist/train"
    config.data.eval = "embedded:fashion_mnist/test"
    config.data.crop = "pad"
    config.data.crop_pct = 1.0

    config.evaluate.every = 200
    return config
