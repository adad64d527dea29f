"""Each thing by itself, with a mask: EoMT, a ViT that finds masks, on a micrograph of nuclei.

Command:   python -m vision_jax.main --config=configs/segment_instances.py
Hardware:  2 CPU cores, about 7 CPU-minutes
Expected:  on 4 held-out squares with 34 nuclei, whole or cut: mask AP 0.19, AP50 0.44 (seed 0);
           after half of the updates 0.20 and 0.44, and with seed 1 0.12 and 0.28. It shows that it
           works: 12 squares to train on are few, and nuclei that touch are often found as one

The ViT inside is the embedded one, which knows CIFAR-10. For your own things, COCO instances or
another format of docs/segmentation_data.md that tells them apart, begin with a model that knows
COCO's, whose heads for other classes begin anew:

    --config.data.train=instances.json --config.data.eval= --config.data.turn=False
    --config.model.weights=hf://tue-mps/coco_instance_eomt_large_640 --config.model.variant=
    --config.model.arguments="()" --config.model.image_size=640 --config.optim.lr=1e-4
    --config.data.max_segments=100 --config.loss.points=12544 --config.data.scale="(0.5, 2.0)"

Things and stuff together are --config.data.targets=panoptic; docs/segmentation.md has the rest.
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config


def get_config() -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    config = default_config("segmentation")
    config.model.variant = "eomt"
    config.model.weights = "embedded:vit_cifar10"
    config.model.arguments = (("num_queries", 30), ("num_blocks", 2), ("upscale_blocks", 2))
    config.model.image_size = 64
    config.batch_size = 8
    config.total_steps = 250
    config.checkpoint_every = 125
    config.log_every = 20

    config.optim.lr = 1e-3
    config.optim.warmup_steps = 40
    config.optim.ema_decay = 0.98
    config.optim.lr_multipliers = ()
    config.loss.points = 400

    config.data.train = "embedded:nuclei/train"
    config.data.eval = "embedded:nuclei/test"
    config.data.targets = "instance"
    config.data.max_segments = 20
    config.data.scale = (0.5, 0.8)
    config.data.turn = True
    config.data.brightness = 0.3
    config.data.contrast = 0.3
    config.data.threads = 1

    config.evaluate.every = 125
    config.evaluate.score = 0.5
    return config
