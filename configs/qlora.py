"""QLoRA: LoRA adapters on a base in 4 bits, the embedded ViT on Fashion-MNIST.

Command:   python -m vision_jax.main --config=configs/qlora.py
Hardware:  2 CPU cores, under 3 minutes
Expected:  see docs/compression.md, which has it beside LoRA over 3 seeds

The base is frozen in 4-bit NormalFloat with double quantization, half a byte a weight. The model
that the run leaves has the adapters merged into the float kernels of that base.
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("classification")
    config.total_steps = 200
    config.trainable = ("head(_dist)?/.*",)
    config.recipes = ("quantize", "lora")

    config.model.weights = "embedded:vit_cifar10"
    config.model.image_size = 32
    config.lora.rules = (r"block_\d+/attn/(qkv|proj)/kernel", r"block_\d+/mlp/fc\d/kernel")

    config.optim.lr = 5e-3
    config.optim.warmup_steps = 20
    config.optim.weight_decay = 0.01

    config.data.train = "embedded:fashion_mnist/train"
    config.data.eval = "embedded:fashion_mnist/test"
    config.data.crop = "pad"
    config.data.crop_pct = 1.0
    return config
