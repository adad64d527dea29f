"""Pretraining that goes on from anybody's ViT, on unlabelled images of your own, by adapters.

Command:   python -m vision_jax.main --config=configs/continue_pretraining.py \\
               --config.data.train=path/to/images --config.model.weights=path/to/vit_folder
Hardware:  one GPU for a ViT-S at 224 pixels
Expected:  depends on the images and was not measured; labels of a few tell, while it trains:

    --config.probe.data=path/to/folder_of_class_folders

The weights are a folder or file of timm's or transformers', hf://owner/name, timm://name, or a
run's workdir. After configs/continue_pretraining.py: stands what is learned, self_distillation
(DINO), contrastive (SimCLR) or pretraining (MAE); docs/pretraining.md tells of each. The ViT
changes by LoRA of its attention and MLPs; with self_distillation/full, say, all of it trains, at a
tenth of the rate.

What comes out: WORKDIR is a ViT's weights for configs/transfer.py, and
`python -m vision_jax.convert WORKDIR --out=DIR` writes it merged, for timm or transformers.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from vision_jax.config import default_config
from vision_jax.errors import UserError


class Settings(NamedTuple):
    """Of an objective: what it adds to the ViT, as a path regex, with its arguments; the batch."""

    added: str
    arguments: tuple[tuple[str, int], ...]
    batch_size: int


OBJECTIVES = {
    "self_distillation": Settings("dino_head/.*|mask_token", (("prototypes", 8_192),), 64),
    "contrastive": Settings("contrastive_head/.*", (("head_width", 2_048),), 256),
    "pretraining": Settings("decoder/(?!pos_embed).*", (("decoder_depth", 1),), 256),
}
RULES = (r"block_\d+/(attn|mlp)/.*/kernel",)


def get_config(objective: str = "self_distillation") -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    name, _, how = objective.partition("/")
    if name not in OBJECTIVES or how not in ("", "full"):
        raise UserError(
            f"configs/continue_pretraining.py:{objective}: use {', '.join(OBJECTIVES)}, each "
            "with /full to train all of the ViT"
        )
    settings = OBJECTIVES[name]
    config = default_config(name)
    config.model.weights = "timm://vit_small_patch16_224.augreg_in21k"
    config.model.arguments = settings.arguments
    config.batch_size = settings.batch_size
    config.total_steps = 5_000
    config.checkpoint_every = 500
    config.evaluate.every = 500
    config.optim.warmup_steps = 500
    config.optim.lr = 5e-4
    if how:
        config.optim.lr /= 10
    else:
        config.recipes = ("lora",)
        config.lora.rules = RULES
        config.trainable = (settings.added,)
    if name == "contrastive":
        config.contrastive.view_size = 256
        config.contrastive.scale = (0.2, 1.0)
        config.contrastive.temperature = 0.2
    if name == "self_distillation":
        config.dino.view_size = 256
        config.dino.local_crops = 4
        config.dino.frozen_steps = 100
    return config
