"""Street scenes drawn from a seed: does a segmenter train at all? Its score measures no quality.

Command:   python -m vision_jax.main --config=configs/segment_driving.py
Hardware:  2 CPU cores, minutes (five on a busy machine)
Expected:  mIoU 0.82 over the eight classes of drawn scenes (one seed), and nothing of real ones

Road, lane, sidewalk, cars, persons, houses, trees and sky come as polygons of random colors
(vision_jax/data/driving.py). No driving scenes with labels are free to be shipped. A model that
does well here has shown nothing about streets: the figure says that loss, data and evaluation work,
and is to be quoted for nothing else. configs/cityscapes.py is for those who have real ones.
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
    config.batch_size = 8
    config.total_steps = 200
    config.checkpoint_every = 200
    config.log_every = 25

    config.optim.lr = 5e-3
    config.optim.warmup_steps = 20
    config.optim.ema_decay = 0.95
    config.loss.dice_weight = 0.5

    config.data.train = "driving:train/0/200"
    config.data.eval = "driving:test/0/40"
    config.data.scale = (0.8, 1.5)
    config.data.threads = 1

    config.evaluate.every = 200
    config.evaluate.boundaries = False
    return config
