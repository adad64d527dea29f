"""A pruned ViT learns back what it lost, from the one that it was cut out of, and goes to int8.

Commands:  python -m vision_jax.main --config=configs/vit_lora.py --workdir=runs/whole \\
               --config.recipes="()" --config.trainable=".*" --config.optim.lr=1e-3 \\
               --config.total_steps=400
           python -m vision_jax.main compress --config=configs/compress.py
Hardware:  2 CPU cores, 7 CPU-minutes the second
Expected:  0.49 of the multiplications; as LiteRT 3.2 times faster and 5.6 times smaller; top-1
           83.1 %, in int8 82.8 %, of the whole 83.0 % (means of 3 seeds)

The first command trains the model that is made smaller. The second one does all the rest, and goes
on where it was stopped: half of the heads and a little more than half of the hidden units go, what
is left learns from the whole, goes on with kernels and inputs rounded to int8, and is exported in
float32 and in int8, beside the whole one. It ends with a table. For the second stage alone there is
python -m vision_jax.main --config=configs/compress.py --workdir=runs/recovered
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("classification")
    config.total_steps = 800
    config.checkpoint_every = 200
    config.recipes = ("distill",)
    config.trainable = (".*",)

    config.model.weights = "runs/compress/pruned/model.safetensors"
    config.model.reinitialize = ()  # its head is for these classes already

    config.distill.teachers = ("runs/whole",)
    config.distill.weight = 1.0

    config.compress.keep = 0.47  # of four heads two, of 256 hidden units 120
    config.ptq.activations = "dynamic"

    config.optim.lr = 1e-3
    config.optim.warmup_steps = 40

    config.data.train = "embedded:fashion_mnist/train"
    config.data.eval = "embedded:fashion_mnist/test"
    config.data.crop = "pad"
    config.data.crop_pct = 1.0

    config.evaluate.every = 200
    return config
