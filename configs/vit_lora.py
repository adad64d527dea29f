"""A ViT pretrained on CIFAR-10, fine-tuned on Fashion-MNIST with LoRA, all from the package itself.

Command:   python -m vision_jax.main --config=configs/vit_lora.py
Hardware:  2 CPU cores, under 3 minutes
Expected:  see README.md, which has the mean and spread over 5 seeds

On your own images (a folder of class folders) and somebody's PyTorch weights:

    python -m vision_jax.main --config=configs/vit_lora.py --workdir=runs/mine \\
        --config.model.weights=hf://timm/vit_base_patch16_224.augreg_in21k_ft_in1k \\
        --config.model.image_size=224 --config.data.train=path/to/images --config.data.eval= \\
        --config.data.crop=random_resized --config.data.crop_pct=0 \\
        --config.model.dtype=bfloat16

Other recipes are overrides of this one:

    linear probe       --config.recipes="()" --config.optim.lr=5e-2
    full fine-tuning   --config.recipes="()" --config.trainable=".*" --config.optim.lr=3e-4
    DoRA               --config.lora.dora=True
    token merging      --config.model.merge=4 (docs/compression.md)
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("classification")
    config.total_steps = 200
    config.trainable = ("head(_dist)?/.*",)
    config.recipes = ("lora",)

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
