"""YOLOX, pretrained on COCO, fine-tuned on your own boxes.

Command:   python -m vision_jax.main --config=configs/yolox_finetune.py \\
               --config.model.weights=yolox_s.pth --config.data.train=annotations.json \\
               --config.data.images=path/to/images
           python -m vision_jax.main --config=configs/yolox_finetune.py:composites
Hardware:  one GPU with 16 GB at batch 16; the second command 2 CPU cores, minutes
Expected:  depends on the data; of the second see README.md

The weights are the original repository's (release 0.1.1: yolox_nano, tiny, s, m, l or x.pth), which
are pickles: they are read by torch's weights-only reader. The recipe is the paper's (section 2),
shorter: SGD at 0.01 for 64 images, decay of kernels alone, a moving average, mosaics of four images
mixed with a fifth until the last updates, which add an L1 loss, and another size of images each
batch, one compilation for each. The warm-up is linear and the momentum plain, and colors change by
brightness, contrast and saturation, where the paper's have squares, Nesterov's and hue.

The second command trains a YOLOX-nano from nothing on garments pasted on aerial tiles: it says that
the detector works, and nothing about photographs. Other recipes are overrides of the first:

    416 pixels, of nano and tiny --config.model.image_size=416 --config.data.shorts="(352,416,480)"
    one size, one compilation    --config.data.shorts="()"
    no mosaics                   --config.data.mosaic=0
    a frozen backbone            --config.trainable="(?!backbone).*"
    frozen up to a stage         --config.trainable="(?!backbone/(stem|stage_[01])/).*"
    LoRA on the backbone         --config.recipes=lora --config.trainable="(?!backbone).*"
                                 --config.lora.rules="backbone/stage_.*conv/kernel"
                                 --config.model.freeze_norm=True (not of nano)
    taught by another detector   --config.recipes=distill --config.distill.teachers="('runs/detr',)"
    against attacks              --config.recipes=adversarial --config.adversarial.epsilon=0.0157
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config, learn_composites
from vision_jax.errors import UserError


def get_config(data_set: str = "") -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    if data_set not in ("", "composites"):
        raise UserError(f"configs/yolox_finetune.py:{data_set}: use composites, or nothing")
    config = default_config("detection")
    config.distill.logits = "detections"
    config.loss.l1_weight = 1.0
    if data_set == "composites":  # by AdamW, images as they are
        config.model.variant = "yolox_nano"
        config.optim.warmup_steps = 40
        config.data.plain_steps = 50
        return learn_composites(config, steps=450, lr=5e-3, jitter=0.0)
    config.batch_size = 16
    config.total_steps = 10_000
    config.model.weights = "yolox_s.pth"
    config.model.allow_pickle = True
    config.optim.name = "sgd"
    config.optim.lr = 0.0025
    config.optim.warmup_steps = 500
    config.optim.weight_decay = 5e-4
    config.optim.clip_norm = 0.0
    config.optim.ema_decay = 0.9998
    config.data.crop = 0.0
    config.data.max_boxes = 120
    config.data.plain_steps = 1_000
    config.data.shorts = tuple(range(480, 801, 32))
    config.data.mosaic = 1.0
    config.data.mixup = 1.0
    config.data.brightness = 0.3
    config.data.contrast = 0.3
    config.data.saturation = 0.5
    config.data.threads = 4
    return config
