"""MAE's ViT-B on ImageNet without its labels, in the paper's settings.

Command:   python -m vision_jax.main --config=configs/mae_vit_base.py
Hardware:  a TPU pod slice or tens of GPUs; the paper: 31 hours of 128 TPU-v3 cores for a ViT-L
Expected:  not run here; in the paper 83.6 % top-1 of ViT-B once fine-tuned on all labels, 68.0 %
           of a linear probe

He et al. 2022 (https://arxiv.org/abs/2111.06377), table 8: AdamW at 1.5e-4 x batch / 256, momenta
0.9 and 0.95, weight decay 0.05, batches of 4,096, 40 epochs of warm-up, then a cosine; 1,600 epochs
of 312 batches. 75 % of the patches are hidden; 8 decoder blocks of 512 channels; normalized pixels.
Images are cropped to 20 to 100 % of their area and flipped. Of a ViT-B and the paper's decoder a
step costs 0.56 of the supervised one's FLOPs, of a ViT-L 0.34: see docs/pretraining.md.

On images of your own: --config.data.train=FOLDER --config.data.eval= and, from anybody's ViT,
--config.model.variant= --config.model.weights=timm://vit_base_patch16_224.augreg_in21k
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config

STEPS_AN_EPOCH = 1_281_167 // 4_096


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("pretraining")
    config.batch_size = 4_096
    config.total_steps = 1_600 * STEPS_AN_EPOCH
    config.checkpoint_every = 1_000
    config.log_every = 100

    config.model.variant = "b/16"
    config.model.image_size = 224
    config.model.mean = (0.485, 0.456, 0.406)
    config.model.std = (0.229, 0.224, 0.225)
    config.model.dtype = "bfloat16"

    config.optim.lr = 1.5e-4 * 4_096 / 256
    config.optim.warmup_steps = 40 * STEPS_AN_EPOCH
    config.optim.clip_norm = 0.0

    config.data.train = "tfds:imagenet2012/train"
    config.data.eval = "tfds:imagenet2012/validation"
    config.data.crop_pct = 0.875
    config.data.threads = 8
    config.data.workers = 16

    config.evaluate.every = 10 * STEPS_AN_EPOCH
    config.evaluate.batch_size = 1_024
    return config
