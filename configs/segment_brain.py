"""A brain out of a head in MR, slice by slice: Colin27, one man's head, within which it is tested.

Command:   python scripts/fetch_colin27.py data/colin27
           python -m vision_jax.main --config=configs/segment_brain.py
Hardware:  2 CPU cores, about a minute (36 to 55 CPU-seconds on a busy machine)
Expected:  IoU of the brain 0.952 to 0.964 (three seeds) on a block of 22 slices, 44 mm of the head

Trained on the slices below and above it, 10 mm away from it. That is "within one head": it tells
nothing of other heads, other scanners or diseases. The best window of intensities, chosen on the
training slices, reaches 0.780; `evaluation.json` has it as `best_window`. Each case is reported in
cases/, volume in ml beside the true one. It is not a diagnosis, and not fit for one.
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("segmentation")
    config.model.variant = "unet_plain"
    config.model.arguments = (
        ("encoder_arguments", (("widths", (8, 16, 32, 64)),)),
        ("decoder_widths", (32, 16, 8)),
    )
    config.model.image_size = 96
    config.batch_size = 6
    config.total_steps = 130
    config.checkpoint_every = 130
    config.log_every = 25

    config.optim.lr = 5e-3
    config.optim.warmup_steps = 20
    config.optim.ema_decay = 0.95
    config.loss.dice_weight = 0.5

    config.data.train = "volumes:data/colin27?slices=0:38,70:90&neighbors=1"
    config.data.eval = "volumes:data/colin27?slices=43:65&neighbors=1"
    config.data.scale = (0.85, 1.2)
    config.data.threads = 1

    config.evaluate.every = 130
    config.evaluate.background = "outside"
    return config
