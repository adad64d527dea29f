"""SigLIP's base size from images and captions, in the paper's settings.

Command:   python -m vision_jax.main --config=configs/siglip_base.py \\
               --config.data.train=captions.csv --config.data.eval=held_out.csv
Hardware:  a TPU pod slice or tens of GPUs; the paper: 5 days of 32 TPU-v4 chips
Expected:  not run here; in the paper 73.4 % top-1 of ImageNet zero-shot (table 5, sigmoid, 32 k)

Zhai et al. 2023 (https://arxiv.org/abs/2303.15343), sections 4.2, 4.7, 4.9 and appendix C: 9
billion pairs of WebLI's English part in batches of 32,768; images resized to 224 pixels and nothing
else; 16 tokens of a vocabulary of 32,000; rate 0.001 and a cosine, weight decay 1e-4, second
momentum 0.95; scale and bias of the logits begin at 10 and -10. Not the paper's: AdamW for its
Adafactor, which is as good there (table 7); the warm-up, which it does not name; WebLI, which is
not published; and its tokenizer, of C4: config.text.tokenizer takes one. The published weights are
of 40 billion pairs, 64 tokens and 256 pixels: 76.7 % of ImageNet, recall@1 on COCO 65.1 % from
image to text and 47.4 % from text to image.

From anybody's ViT, at a tenth of the rate and without weight decay (section 4.5):
--config.model.variant= --config.model.weights=timm://vit_base_patch16_224.augreg_in21k
--config.model.arguments="(('text_length', 16),)" --config.optim.weight_decay=0
--config.optim.lr_multipliers="(('(?!text/|logit_).*', 0.1),)"
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config

PAIRS = 9_000_000_000


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("image_text")
    config.batch_size = 32_768
    config.total_steps = PAIRS // 32_768
    config.checkpoint_every = 5_000
    config.log_every = 100

    config.model.variant = "siglip_base_patch16_224"
    config.model.arguments = (("text_length", 16),)
    config.model.image_size = 224
    config.model.dtype = "bfloat16"

    config.optim.lr = 1e-3
    config.optim.b2 = 0.95
    config.optim.weight_decay = 1e-4
    config.optim.warmup_steps = 10_000

    config.data.crop_pct = 1.0
    config.data.threads = 8
    config.data.workers = 16

    config.text.length = 16
    config.text.zero_shot = "tfds:imagenet2012/validation"
    config.text.templates = ("a photo of a {}.", "a bad photo of a {}.", "a drawing of a {}.")

    config.evaluate.every = 5_000
    config.evaluate.batch_size = 1_024
    return config
