"""A generator learns a class that it has not seen, by LoRA on 200 images.

Command:   python -m vision_jax.main --config=configs/generate_embedded.py
           python -m vision_jax.main --config=configs/generate_lora.py
Hardware:  2 CPU cores, 75 CPU-seconds for the second
Expected:  evaluation loss 0.199; of 100 images a classifier takes 0.88 for bags (seed 0)

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
    config.batch_size = 32
    config.total_steps = 400
    config.trainable = ("class_embed",)
    config.recipes = ("lora",)

    config.model.weights = "runs/generate_embedded"
    config.model.reinitialize = ("class_embed",)
    config.lora.rules = (r"block_\d+/(attn/(qkv|proj)|mlp/fc\d)/kernel",)
    config.lora.rank = 8

    config.optim.lr = 5e-3
    config.optim.warmup_steps = 20
    config.optim.ema_decay = 0.98

    config.data.train = "embedded:fashion_mnist/train"
    config.data.eval = "embedded:fashion_mnist/test"
    config.data.classes = ("sneaker",)
    config.data.subset = 200
    config.data.flip = False
    config.data.threads = 1
    config.evaluate.every = 200
    return config
