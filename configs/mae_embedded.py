"""A masked autoencoder on the embedded images, without their labels and without a download.

Command:   python -m vision_jax.main --config=configs/mae_embedded.py
Hardware:  2 CPU cores, 8 to 13 CPU-minutes
Expected:  evaluation loss 0.464 to 0.473; then, from 100 labels, top-1 0.651 to 0.731, from scratch
           0.503 to 0.574 (seeds 0 to 4)

Then 100 labels, ten of each class, from its weights or, without model.weights, from scratch:

    python -m vision_jax.main --config=configs/mae_embedded.py:few_labels \\
        --config.model.weights=runs/mae_embedded --workdir=runs/few_labels
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config
from vision_jax.errors import UserError

ENCODER = (
    ("width", 96),
    ("depth", 4),
    ("num_heads", 4),
    ("mlp_width", 192),
    ("patch_size", 4),
)
DECODER = (
    ("decoder_width", 48),
    ("decoder_depth", 1),
    ("decoder_num_heads", 3),
    ("decoder_mlp_width", 96),
)


def get_config(part: str = "pretraining") -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    if part not in ("pretraining", "few_labels"):
        raise UserError(f"configs/mae_embedded.py:{part}: use pretraining or few_labels")
    pretraining = part == "pretraining"
    config = default_config("pretraining" if pretraining else "classification")
    config.model.variant = "vit"
    config.model.image_size = 28
    config.data.train = "embedded:fashion_mnist/train"
    config.data.eval = "embedded:fashion_mnist/test"
    config.data.crop = "pad"
    config.data.crop_pct = 1.0
    config.data.threads = 1
    config.evaluate.every = 500
    config.evaluate.batch_size = 500
    config.checkpoint_every = 500
    config.log_every = 50
    if pretraining:
        config.model.arguments = (*ENCODER, *DECODER)
        config.batch_size = 128
        config.total_steps = 4_000
        config.optim.lr = 2e-3
        config.optim.warmup_steps = 200
        return config
    config.model.arguments = (*ENCODER, ("pool", "avg"), ("norm_after_pool", True))
    config.batch_size = 50
    config.total_steps = 500
    config.data.subset = 100
    config.optim.lr = 1e-3
    config.optim.warmup_steps = 50
    return config
