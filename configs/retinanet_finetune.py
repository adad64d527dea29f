"""RetinaNet or FCOS, pretrained on COCO, fine-tuned on your own boxes.

Command:   python -m vision_jax.main --config=configs/retinanet_finetune.py \\
               --config.data.train=annotations.json --config.data.images=path/to/images
           python -m vision_jax.main --config=configs/retinanet_finetune.py:composites
Hardware:  one GPU with 24 GB at batch 8; the second command 2 CPU cores, minutes
Expected:  depends on the data; the second AP50 0.960 after 400 updates (seed 0)

The weights are torchvision's of a ResNet-50 and its pyramid, v2 (AP 41.5 on COCO); a `.pth` file of
them is read as well, with --config.model.allow_pickle=True. The recipe is that of torchvision's
references (references/detection): SGD at 0.01 for 16 images, linear warm-up, a tenth of the rate at
16 and 22 of 26 epochs; the stem and the first stage are frozen, and so are the norms of the body,
whose statistics of a few images would say little.

The second command trains a small one from nothing on garments pasted on aerial tiles, with
`:composites_fcos` a small FCOS: they say that the detectors work, and nothing about photographs.
Other recipes are overrides of the first:

    v1 (AP 36.4)                 --config.model.weights=torchvision://retinanet_resnet50_fpn
    v1 of another origin, if its norms had no epsilon, which is in no file
                                 --config.model.arguments="(('batch_norm_eps', 0.0),)"
    FCOS (AP 39.2)               --config.model.weights=torchvision://fcos_resnet50_fpn
    a frozen backbone            --config.trainable="(?!backbone).*"
    LoRA on the backbone         --config.recipes=lora --config.trainable="(?!backbone).*"
                                 --config.lora.rules="backbone/stage_.*conv[123]/kernel"
    against attacks              --config.recipes=adversarial --config.adversarial.epsilon=0.0157
    smaller, faster              --config.data.short=480 --config.data.longest=800
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config, learn_composites
from vision_jax.errors import UserError

SMALL = (  # a body of two stages; levels of a quarter of the image's side to a 32nd
    ("depths", (1, 1)),
    ("block", "basic"),
    ("widths", (32, 64)),
    ("stem_width", 32),
    ("first_map", 0),
    ("width", 48),
    ("head_depth", 2),
    ("head_groups", 8),
    ("candidates", 100),
    ("least_score", 0.05),
    ("most", 20),
)
OWN = {
    "composites": (
        "retinanet",
        ("anchor_sizes", ((10, 14), (20, 26), (32, 40), (48, 56))),
        ("box_loss", "giou"),
    ),
    "composites_fcos": ("fcos", ("point_sizes", (4, 8, 16, 32))),
}


def get_config(data_set: str = "") -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    if data_set not in ("", *OWN):
        raise UserError(
            f"configs/retinanet_finetune.py:{data_set}: use {' or '.join(OWN)}, or nothing"
        )
    config = default_config("detection")
    if data_set:
        config.model.variant, *own = OWN[data_set]
        config.model.arguments = (*SMALL, *own)
        return learn_composites(config, steps=400, lr=2e-3, jitter=0.3)
    config.batch_size = 8
    config.total_steps = 10_000
    config.trainable = (r"backbone/stage_[1-3]/.*conv\d?/kernel", "(?!backbone).*")
    config.model.weights = "torchvision://retinanet_resnet50_fpn_v2"
    config.model.freeze_norm = True
    config.optim.name = "sgd"
    config.optim.lr = 0.005
    config.optim.weight_decay = 1e-4
    config.optim.warmup_steps = 500
    config.optim.schedule = "step"
    config.optim.clip_norm = 0.0
    config.data.crop = 0.0
    config.data.shorts = (640, 672, 704, 736, 768, 800)
    config.data.threads = 4
    return config
