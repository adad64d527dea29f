"""ResNet-18 for CIFAR-10 trained with TRADES, in the settings of its paper's code.

Commands:  python scripts/fetch_cifar10.py downloads/cifar10
           python -m vision_jax.main --config=configs/resnet18_cifar10_trades.py
Hardware:  one GPU; each step is 10 forward passes with input gradients and a training pass of two
Expected:  not run to its end here

Zhang et al. 2019 (https://arxiv.org/abs/1901.08573), train_trades_cifar10.py: SGD, rate 0.1 falling
to a tenth at epoch 75 of 76, batch 128, weight decay 2e-4, epsilon 0.031, 10 steps of 0.007, beta
6, images as they are (no normalization). The network is that code's ResNet-18, whose stem is one
3 x 3 convolution without a pool. The paper's table has a WRN-34-10.
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("classification")
    config.batch_size = 128
    config.total_steps = 29_700
    config.checkpoint_every = 391
    config.log_every = 50
    config.recipes = ("adversarial",)

    config.model.variant = "resnet18"
    config.model.arguments = (("stem_size", 3), ("stem_pool", False))
    config.model.image_size = 32
    config.model.mean = (0.0, 0.0, 0.0)
    config.model.std = (1.0, 1.0, 1.0)

    config.adversarial.method = "trades"
    config.adversarial.epsilon = 0.031
    config.adversarial.steps = 10
    config.adversarial.step_size = 0.007 / 0.031
    config.adversarial.watch = 500

    config.optim.name = "sgd"
    config.optim.lr = 0.1
    config.optim.schedule = "step"
    config.optim.drop_at = 75 / 76
    config.optim.warmup_steps = 0
    config.optim.weight_decay = 2e-4
    config.optim.clip_norm = 0.0

    config.data.train = "cifar10:downloads/cifar10/train"
    config.data.eval = "cifar10:downloads/cifar10/test"
    config.data.crop = "pad"
    config.data.crop_pct = 1.0
    config.data.threads = 8

    config.augment.label_smoothing = 0.0

    config.evaluate.every = 0
    config.evaluate.batch_size = 500
    return config
