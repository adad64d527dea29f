"""SiT learns your own images in the latents of Stable Diffusion's autoencoder, by LoRA.

Command:   python -m vision_jax.main --config=configs/sit_lora.py \\
               --config.data.train=path/to/images --config.model.weights=SiT-XL-2-256x256.pt
Hardware:  a GPU of 24 GB; the images are encoded before the first step, each once and mirrored
Expected:  not run here: neither SiT's weights nor the autoencoder's are in the package

path/to/images is a folder of class folders. SiT's weights are linked in github.com/willisma/SiT;
they are a pickle, which torch's weights-only reader reads. The autoencoder comes from the hub. Then
images, and how good they are:

    python -m vision_jax.main generate runs/sit_lora --count=64 --guidance=4 --measure

With a smaller batch, or recomputing blocks in the backward pass, it fits smaller GPUs:
--config.batch_size=8, --config.model.remat=True. --config.model.scan=True compiles one block
instead of 28. S/2's shape from nothing, in latents: --config.model.weights=
--config.model.variant=sit_s_2 --config.model.reinitialize="()" --config.recipes="()"
--config.trainable=".*" --config.optim.lr=1e-4.
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("generation")
    config.batch_size = 32
    config.total_steps = 2_000
    config.trainable = ("class_embed",)
    config.recipes = ("lora",)

    config.model.weights = "SiT-XL-2-256x256.pt"
    config.model.allow_pickle = True
    config.model.image_size = 256
    config.model.reinitialize = ("class_embed",)
    config.model.dtype = "bfloat16"
    config.latents.autoencoder = "hf://stabilityai/sd-vae-ft-mse"
    config.lora.rules = (r"block_\d+/(attn/(qkv|proj)|mlp/fc\d)/kernel",)
    config.lora.rank = 16

    config.optim.lr = 1e-3
    config.optim.warmup_steps = 100
    config.optim.ema_decay = 0.99

    config.data.train = "path/to/images"
    config.data.threads = 8
    config.sample.steps = 25
    config.sample.guidance = 4.0
    config.evaluate.every = 500
    config.evaluate.batch_size = 16
    return config
