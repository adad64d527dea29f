"""SegFormer-B0 on Cityscapes, for those who own the data: 19 classes of driving scenes.

Command:   python -m vision_jax.main --config=configs/cityscapes.py \\
               --config.data.train=cityscapes:DIR/train --config.data.eval=cityscapes:DIR/val
Hardware:  one GPU with 24 GB or more; more devices share the batch
Expected:  not run here, where the data is not; the paper's B0 has mIoU 76.2 at 160,000 steps from
           ImageNet weights (Xie et al. 2021, table 1)

DIR holds leftImg8bit/ and gtFine/, as unpacked from https://www.cityscapes-dataset.com, whose terms
are not ours to give. Look at it first: `python -m vision_jax.doctor cityscapes:DIR/train
--segmentation --against=cityscapes:DIR/val`. Images are segmented by windows of the training's
size, so memory does not grow with the image. Other recipes are overrides of this one:

    other weights                --config.model.weights=FOLDER
    rare classes                 --config.loss.balance=frequency
    LoRA                         --config.recipes=lora --config.trainable="(?!backbone).*"
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("segmentation")
    config.model.weights = "hf://nvidia/segformer-b0-finetuned-ade-512-512"
    config.model.image_size = 1024
    config.total_steps = 160_000
    config.checkpoint_every = 4_000

    config.optim.lr = 6e-5
    config.optim.schedule = "linear"
    config.optim.warmup_steps = 1_500
    config.optim.weight_decay = 0.01

    config.data.train = "cityscapes:data/cityscapes/train"
    config.data.eval = "cityscapes:data/cityscapes/val"
    config.data.threads = 8

    config.evaluate.every = 16_000
    config.evaluate.window = 1024
    config.evaluate.stride = 768
    return config
