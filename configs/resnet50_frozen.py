"""The classic transfer recipe: an ImageNet ResNet-50, frozen, and a new head trained by SGD.

Command:   python -m vision_jax.main --config=configs/resnet50_frozen.py \\
               --config.data.train=path/to/folder_of_class_folders
Hardware:  one GPU or TPU; 2 CPU cores take about 0.1 s an image
Expected:  depends on the data; `probe` tells beforehand what the features are worth

The frozen backbone needs no backward pass, and BatchNorm keeps ImageNet's statistics. Afterwards,
all of it, from where the head stopped, at a smaller rate:

    python -m vision_jax.main --config=configs/resnet50_frozen.py --workdir=runs/unfrozen \\
        --config.data.train=path/to/folder_of_class_folders \\
        --config.model.weights=runs/resnet50_frozen/model.safetensors \\
        --config.model.reinitialize="()" --config.trainable=".*" --config.optim.lr=0.01

On ImageNet itself, prepared as array_record by tfds:

    --config.data.train=tfds:imagenet2012/train --config.data.eval=tfds:imagenet2012/validation
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("classification")
    config.batch_size = 256
    config.trainable = ("head(_dist)?/.*",)

    config.model.weights = "hf://timm/resnet50.tv_in1k"
    config.model.image_size = 224
    config.model.freeze_norm = True

    config.optim.name = "sgd"
    config.optim.lr = 0.1
    config.optim.warmup_steps = 0
    config.optim.weight_decay = 1e-4
    config.optim.clip_norm = 0.0

    config.augment.label_smoothing = 0.0
    return config
