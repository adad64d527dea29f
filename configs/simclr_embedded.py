"""Contrastive learning on the embedded images, without their labels and without a download.

Command:   python -m vision_jax.main --config=configs/simclr_embedded.py
Hardware:  2 CPU cores, about 4.5 CPU-minutes
Expected:  of frozen features, untrained and at the end: nearest neighbors 54.2 and 67.1 %, linear
           probe 65.0 and 71.8 %, ten labels of each class 34.9 and 50.8 % (one seed)

Then 100 labels, ten of each class, from its weights:

    python -m vision_jax.main --config=configs/mae_embedded.py:few_labels \\
        --config.model.weights=runs/simclr_embedded --workdir=runs/few_labels
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config

ENCODER = (
    ("width", 96),
    ("depth", 4),
    ("num_heads", 4),
    ("mlp_width", 192),
    ("patch_size", 4),
)
HEAD = (("head_width", 192), ("projection", 64))


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("contrastive")
    config.model.variant = "vit"
    config.model.image_size = 28
    config.model.arguments = (*ENCODER, *HEAD)
    config.batch_size = 64
    config.total_steps = 400
    config.checkpoint_every = 200
    config.log_every = 10

    config.optim.lr = 1e-3
    config.optim.warmup_steps = 40

    config.data.train = "embedded:fashion_mnist/train"
    config.data.eval = "embedded:fashion_mnist/test"
    config.data.crop_pct = 1.0
    config.data.threads = 1

    config.contrastive.scale = (0.2, 1.0)
    config.contrastive.temperature = 0.2
    config.contrastive.blur = (0.1, 0.7)

    config.evaluate.every = 200
    config.evaluate.batch_size = 500
    config.probe.data = "embedded:fashion_mnist/train"
    return config
