"""RF-DETR, pretrained on COCO, fine-tuned on your own boxes in tens of epochs.

Command:   python -m vision_jax.main --config=configs/rf_detr_finetune.py \\
               --config.data.train=annotations.json --config.data.images=path/to/images
Hardware:  one GPU with 24 GB at batch 16; more devices share the batch
Expected:  depends on the data; rfdetr's own recipe, in which 10 to 50 epochs are usual

The recipe is that of the package rfdetr 1.11 (config.py, training/param_groups.py): AdamW, the
backbone at 1.5 · 0.7² of the rate and falling by 0.8 from block to block, the decoder at 0.7, a
moving average, losses of 13 groups of queries. It also trains at several image sizes, which this
one does not. Other recipes are overrides of this one:

    a larger model               --config.model.weights=hf://Roboflow/rf-detr-small (medium, large)
    a file of rfdetr's           --config.model.weights=rf-detr-nano.pth
                                 --config.model.allow_pickle=True
    other image size             --config.model.image_size=512 (a multiple of 32; base: of 56)
    a frozen backbone            --config.trainable="(?!backbone).*"
    LoRA on the backbone         --config.recipes=lora
                                 --config.lora.rules="backbone/.*(qkv|proj|fc\\d)/kernel"
                                 --config.trainable="(?!backbone).*"
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("detection")
    config.batch_size = 16
    config.total_steps = 5_000

    config.model.weights = "hf://Roboflow/rf-detr-nano"
    config.model.freeze_norm = True

    config.optim.schedule = "constant"
    config.optim.warmup_steps = 0
    config.optim.layer_decay = 0.8
    config.optim.lr_multipliers = (("backbone/.*", 0.735), (r"(decoder_|position_fc).*", 0.7))
    config.optim.ema_decay = 0.993

    config.data.buckets = 1  # all images are squares of model.image_size
    config.data.threads = 4

    config.loss.class_cost = 2.0
    return config
