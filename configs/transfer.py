"""Any model of the zoo on any folder of images, with its family's known fine-tuning settings.

Command:   python -m vision_jax.main --config=configs/transfer.py:timm/convnext_tiny.fb_in22k \\
               --config.data.train=path/to/folder_of_class_folders
Hardware:  one GPU or TPU for the larger ones; docs/zoo.md has each one's size and GFLOPs
Expected:  depends on the data; first ask what the frozen features are worth:

    python -m vision_jax.main probe \\
        --config=configs/transfer.py:timm/convnext_tiny.fb_in22k \\
        --config.data.train=path/to/folder_of_class_folders

The name after the colon is one of docs/zoo.md, with or without timm's tag: timm/NAME[.TAG],
torchvision/NAME, transformers/NAME. Weights of your own replace the published ones:
--config.model.weights=FILE. A linear probe is --config.trainable="head(_dist)?/.*"
--config.model.freeze_norm=True, LoRA on top of it --config.recipes=lora
--config.lora.rules=".*mlp/fc\\d/kernel".
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from vision_jax.config import default_config
from vision_jax.convert.tables import published
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES


class Settings(NamedTuple):
    """What fine-tuning a family has been found to want, at batch 64."""

    optimizer: str
    lr: float
    weight_decay: float
    layer_decay: float
    drop_path: float
    mixup: float


# Rates are scaled to batch 64, linearly for SGD and by the square root for AdamW.
SETTINGS = {
    # Transformers: MAE's and BEiT's fine-tuning (https://arxiv.org/abs/2111.06377, table 9).
    "vit": Settings("adamw", 1e-4, 0.05, 0.75, 0.1, 0.0),
    "beit": Settings("adamw", 1e-4, 0.05, 0.75, 0.1, 0.0),
    # Swin from ImageNet-22k (https://arxiv.org/abs/2103.14030, appendix A2.1).
    "swin": Settings("adamw", 5e-5, 1e-8, 0.9, 0.2, 0.0),
    # ConvNeXt from ImageNet-22k (https://arxiv.org/abs/2201.03545, table 5).
    "convnext": Settings("adamw", 5e-5, 1e-8, 0.8, 0.1, 0.0),
    # Networks with BatchNorm: BiT's HyperRule (https://arxiv.org/abs/1912.11370, section 3.3), its
    # mixup of 0.1 for middling data sets, and ImageNet's own weight decay.
    "resnet": Settings("sgd", 1e-2, 1e-4, 1.0, 0.0, 0.1),
    "regnet": Settings("sgd", 1e-2, 5e-5, 1.0, 0.0, 0.1),
    "efficientnet": Settings("sgd", 1e-2, 1e-5, 1.0, 0.0, 0.1),
}


def get_config(name: str = "timm/convnext_tiny.fb_in22k") -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    family, weights = published(name)
    family = FAMILIES[family].wraps or family  # of an MAE's or a SigLIP's weights, the ViT
    if family not in SETTINGS:
        raise UserError(
            f"configs/transfer.py:{name} is a {family}, for which no settings are known here: take "
            f"one of {', '.join(SETTINGS)}"
        )
    settings = SETTINGS[family]
    config = default_config("classification")
    config.total_steps = 2_000

    config.model.weights = weights
    config.model.drop_path = settings.drop_path

    config.optim.name = settings.optimizer
    config.optim.lr = settings.lr
    config.optim.weight_decay = settings.weight_decay
    config.optim.layer_decay = settings.layer_decay

    config.data.crop_scale = (0.2, 1.0)
    config.augment.mixup = settings.mixup
    return config
