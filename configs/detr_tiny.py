"""A small DETR from random initialization, on what the package brings: photos, or composites.

Command:   python -m vision_jax.main --config=configs/detr_tiny.py
           python -m vision_jax.main --config=configs/detr_tiny.py:composites
Hardware:  2 CPU cores, minutes; see README.md
Expected:  see README.md, which has AP50 by seed

The first trains on 98 aerial tiles with hand-drawn boxes of trees, and its AP is a real one, on
another photo. The second trains on garments pasted on such tiles, 8 classes that differ in hue:
a detector that works gets an AP50 above 0.8 there, and that says nothing about photographs.

On files of your own, such as the plain JSON of one class and one box an image that
`python -m vision_jax.data.composites --out=plain --count=1000 --plain` writes, with mean IoU after
each epoch:

    python -m vision_jax.main --config=configs/detr_tiny.py:composites --workdir=runs/plain \\
        --config.data.train=plain/train.json --config.data.eval= --config.evaluate.every=0

From COCO's weights, for real work: configs/detr_finetune.py.
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config
from vision_jax.errors import UserError

SETTINGS = {  # train, test, pixels a side, queries, batch, updates, rate, crop, no object's weight
    "aerial": ("embedded:aerial/train", "embedded:aerial/test", 160, 64, 8, 1_500, 1e-3, 0.7, 0.4),
    "composites": (
        "composites:train/0/4000", "composites:test/0/300", 64, 12, 16, 2_000, 1.5e-3, 0.0, 0.2,
    ),
}  # fmt: skip


def get_config(data_set: str = "aerial") -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    if data_set not in SETTINGS:
        raise UserError(f"configs/detr_tiny.py:{data_set}: use one of {', '.join(SETTINGS)}")
    train, test, side, queries, batch_size, steps, lr, crop, no_object = SETTINGS[data_set]
    jitter = 0.15 if data_set == "aerial" else 0.3
    config = default_config("detection")
    config.batch_size = batch_size
    config.total_steps = steps

    config.model.variant = "detr"
    config.model.arguments = (
        ("depths", (1, 2)),  # two stages: the last map has an eighth of the image's side
        ("block", "basic"),
        ("widths", (32, 96)),
        ("stem_width", 32),
        ("num_queries", queries),
        ("width", 64),
        ("num_heads", 4),
        ("mlp_width", 128),
        ("encoder_depth", 1),
        ("decoder_depth", 3),
        ("grid_queries", True),  # without it, nothing is found in this many updates
    )
    config.model.image_size = side

    config.optim.lr = lr
    config.optim.ema_decay = 0.998

    config.data.train = train
    config.data.eval = test
    config.data.max_boxes = queries
    config.data.crop = crop
    config.data.brightness = jitter
    config.data.contrast = jitter
    config.data.saturation = jitter

    config.loss.class_weight = 2.0
    config.loss.no_object_weight = no_object

    config.evaluate.every = 500
    config.evaluate.batch_size = 50
    config.robustness.images = 300
    config.robustness.batch_size = 50
    return config
