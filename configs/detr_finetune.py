"""DETR, pretrained on COCO, fine-tuned on your own boxes: a COCO JSON file, and more formats.

Command:   python -m vision_jax.main --config=configs/detr_finetune.py \\
               --config.data.train=annotations.json --config.data.images=path/to/images
Hardware:  one GPU with 24 GB at batch 8; more devices share the batch
Expected:  depends on the data; some hundred images with boxes reach a usable AP in 50 epochs

`python -m vision_jax.doctor annotations.json --images=path/to/images` first: it finds what makes AP
stay at 0. Other recipes are overrides of this one:

    the whole paper's schedule   --config.total_steps=... --config.optim.schedule=step
    a frozen backbone            --config.trainable="(?!backbone).*"
                                 --config.optim.lr_multipliers="()"
    LoRA                         --config.recipes=lora --config.lora.rules=".*attn/(q|v)/kernel"
                                 --config.trainable="(class_head|box_head)/.*"
                                 --config.optim.lr_multipliers="()"
    dilated C5                   --config.model.weights=hf://facebook/detr-resnet-50-dc5
    smaller, faster              --config.data.short=480 --config.data.longest=800
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("detection")
    # The paper freezes the stem and the first stage, and every BatchNorm of the backbone.
    config.trainable = (
        r"backbone/stage_[1-3]/.*(conv\d?|downsample_conv)/kernel",
        "(?!backbone).*",
    )

    config.model.weights = "hf://facebook/detr-resnet-50"
    config.model.dropout = 0.1
    config.model.freeze_norm = True

    config.optim.lr_multipliers = (("backbone/.*", 0.1),)

    config.data.shorts = (480, 544, 608, 672, 736, 800)
    config.data.threads = 4
    return config
