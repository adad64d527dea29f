"""A class for each pixel of your own images: a U-Net on a ResNet-50 that knows ImageNet.

Command:   python -m vision_jax.main --config=configs/segment_finetune.py \\
               --config.data.train=path/to/data
Hardware:  one GPU with 16 GB at batch 16
Expected:  depends on the data

The data are images/ and masks/ of the same names with classes.json, or one of the other formats of
docs/segmentation_data.md; without data.eval a tenth is held out. Look at it first: `python -m
vision_jax.doctor path/to/data --segmentation`. The encoder learns at a tenth of the decoder's rate.
Rare classes are helped by Dice, which is on. Other recipes are overrides of this one:

    a smaller model              --config.model.variant=unet_mobilenetv2_100
                                 --config.model.weights=timm://mobilenetv2_100.ra_in1k
    SegFormer                    --config.model.variant= --config.optim.lr=6e-5
                                 --config.model.weights=hf://nvidia/segformer-b0-finetuned-ade-512-512
    UPerNet on a Swin            --config.model.variant= --config.optim.lr=6e-5
                                 --config.model.weights=hf://openmmlab/upernet-swin-tiny
    a frozen encoder             --config.trainable="(?!backbone).*"
                                 --config.optim.lr_multipliers="()"
    LoRA on the encoder          --config.recipes=lora --config.model.freeze_norm=True
                                 --config.lora.rules="backbone/stage_.*conv[123]/kernel"
                                 --config.trainable="(?!backbone).*"
                                 --config.optim.lr_multipliers="()"
    large images by windows      --config.evaluate.window=512
    pictures without an upside   --config.data.turn=True
    ADE20K's masks               --config.data.reduce_zero=True
    taught by another segmenter  --config.recipes=distill --config.distill.teachers="('runs/big',)"
    against attacks              --config.recipes=adversarial --config.adversarial.epsilon=0.0157
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("segmentation")
    config.model.variant = "unet_resnet50"
    config.model.weights = "timm://resnet50.a1_in1k"
    config.model.image_size = 512
    config.batch_size = 16
    config.total_steps = 5_000
    config.checkpoint_every = 500

    config.optim.lr = 1e-3
    config.optim.lr_multipliers = (("backbone/.*", 0.1),)
    config.optim.warmup_steps = 250
    config.optim.ema_decay = 0.999
    config.loss.dice_weight = 1.0

    config.data.train = "path/to/data"
    config.data.brightness = 0.3
    config.data.contrast = 0.3
    config.data.saturation = 0.3
    config.data.threads = 4

    config.evaluate.every = 500
    return config
