"""A generator learns a class that it has not seen, by LoRA on 200 images.

Command:   python -m vision_jax.main --config=configs/generate_lora.py
Hardware:  2 CPU cores, 75 to 94 CPU-seconds
Expected:  evaluation loss 0.110 (seed 0); figures of what it makes are in docs/generation.md

Then images, and how good they are:

    python -m vision_jax.main generate runs/generate_lora --count=300 --measure

On your own images, in a folder of class folders:

    python -m vision_jax.main --config=configs/generate_lora.py --workdir=runs/mine \\
        --config.data.train=path/to/images --config.data.eval= --config.data.classes="()"
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("generation")
    config.batch_size = 64
    config.total_steps = 500
    config.trainable = ("class_embed",)
    config.recipes = ("lora",)

    config.model.weights = "embedded:fashion_generator"
    config.model.reinitialize = ("class_embed",)
    config.lora.rules = (r"block_\d+/(attn/(qkv|proj)|mlp/fc\d)/kernel",)
    config.lora.rank = 8

    config.optim.lr = 5e-3
    config.optim.b2 = 0.99
    config.optim.warmup_steps = 20
    config.optim.ema_decay = 0.98
    config.flow.time_mean = -0.6
    config.flow.unconditional = 0.0  # guidance leads away from what the base makes of no class
    config.sample.guidance = 2.0

    config.data.train = "embedded:fashion_mnist/train"
    config.data.eval = "embedded:fashion_mnist/test"
    config.data.classes = ("sneaker",)
    config.data.subset = 200
    config.data.flip = False
    config.data.threads = 1
    config.evaluate.every = 250
    return config
