"""A tumor in a head in MR, learned of one patient and measured on another: what two can show.

Command:   python scripts/fetch_tumours.py data/tumours
           python -m vision_jax.main --config=configs/segment_tumour.py
Hardware:  2 CPU cores, minutes
Expected:  IoU of the tumor 0.000 (one seed), also after three times as many updates; of the best
           window of intensities 0.007. Of chests 0.000 and 0.000

The data are four patients of PyRadiomics' tests, two heads and two chests, each with one tumor in 3
to 11 slices. One patient is trained on and the other is tested; chests by
--config.data.train="volumes:data/tumours/lung?window=-1000:400". It shows that volumes with masks
are read, split by patient, trained on and reported, and it shows how little one patient teaches. It
can't show how well tumors are found: no figure here holds for a third patient, nor is a difference
between two settings more than chance. It is not a diagnosis, and not fit for one.
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
    config.model.image_size = 128
    config.batch_size = 6
    config.total_steps = 100
    config.checkpoint_every = 100
    config.log_every = 25

    config.optim.lr = 3e-3
    config.optim.warmup_steps = 20
    config.optim.ema_decay = 0.95
    config.loss.dice_weight = 1.0
    config.loss.balance = "frequency"

    config.data.train = "volumes:data/tumours/brain?window=1%:99.5%"
    config.data.holdout = 0.5  # of two patients, one
    config.data.scale = (0.7, 1.4)
    config.data.threads = 1

    config.evaluate.every = 100
    config.evaluate.background = "around"
    return config
