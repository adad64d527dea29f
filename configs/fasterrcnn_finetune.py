"""Faster R-CNN, pretrained on COCO, fine-tuned on your own boxes.

Command:   python -m vision_jax.main --config=configs/fasterrcnn_finetune.py \\
               --config.data.train=annotations.json --config.data.images=path/to/images
           python -m vision_jax.main --config=configs/fasterrcnn_finetune.py:composites
Hardware:  one GPU with 24 GB at batch 8; the second command 2 CPU cores, minutes
Expected:  depends on the data; the second AP50 0.969 to 0.986, AP 0.573 to 0.603 after 400 updates
           (seeds 0 to 4)

The weights are torchvision's of a ResNet-50 and its pyramid, v2 (AP 46.7 on COCO); a `.pth` file of
them is read as well, with --config.model.allow_pickle=True. The recipe is that of torchvision's
references (references/detection): SGD at 0.02 for 16 images, linear warm-up, a tenth of the rate at
16 and 22 of 26 epochs; the stem and the first stage are frozen, and so are the norms, whose
statistics of a few images would say little.

The second command trains a small one from nothing on garments pasted on aerial tiles: it says that
the detector works, and nothing about photographs. Other recipes are overrides of the first:

    v1 (AP 37.0)                 --config.model.weights=torchvision://fasterrcnn_resnet50_fpn
    v1 of another origin, if its norms had no epsilon, which is in no file
                                 --config.model.arguments="(('batch_norm_eps', 0.0),)"
    a MobileNetV3 (AP 32.8), or of images of 320 pixels (AP 22.8), for small machines
                --config.model.weights=torchvision://fasterrcnn_mobilenet_v3_large_fpn
                --config.model.weights=torchvision://fasterrcnn_mobilenet_v3_large_320_fpn
                --config.data.shorts="()"
    a frozen backbone            --config.trainable="(?!backbone).*"
    LoRA on the backbone         --config.recipes=lora --config.trainable="(?!backbone).*"
                                 --config.lora.rules="backbone/stage_.*conv[123]/kernel"
    against attacks              --config.recipes=adversarial --config.adversarial.epsilon=0.0157
    smaller, faster              --config.data.short=480 --config.data.longest=800
"""

from ml_collections import ConfigDict

from vision_jax.config import default_config, learn_composites
from vision_jax.errors import UserError


def get_config(data_set: str = "") -> ConfigDict:
    """What differs from the defaults; see `--help-config`."""
    if data_set not in ("", "composites"):
        raise UserError(f"configs/fasterrcnn_finetune.py:{data_set}: use composites, or nothing")
    config = default_config("detection")
    if data_set == "composites":
        config.model.variant = "faster_rcnn"
        config.model.arguments = (
            ("depths", (1, 1)),  # two stages: maps of a quarter and an eighth of the image's side
            ("block", "basic"),
            ("widths", (32, 64)),
            ("stem_width", 32),
            ("width", 48),
            ("anchor_sizes", (12, 20, 32)),
            ("proposals", 48),
            ("train_proposals", 96),
            ("rpn_samples", 64),
            ("box_samples", 32),
            ("head_width", 96),
            ("candidates", 200),
            ("most", 20),
        )
        return learn_composites(config, steps=400, lr=2e-3, jitter=0.3)
    config.batch_size = 8
    config.total_steps = 10_000
    config.trainable = (
        # Kernels of a ResNet, and what a MobileNetV3 has beside its.
        r"backbone/(stage_[1-5]/.*(conv\d?|se/\w+)|last_conv)/(kernel|bias)",
        "(?!backbone).*",
    )
    config.model.weights = "torchvision://fasterrcnn_resnet50_fpn_v2"
    config.model.freeze_norm = True
    config.optim.name = "sgd"
    config.optim.lr = 0.01
    config.optim.weight_decay = 1e-4
    config.optim.warmup_steps = 500
    config.optim.schedule = "step"
    config.optim.clip_norm = 0.0
    config.data.crop = 0.0
    config.data.shorts = (640, 672, 704, 736, 768, 800)
    config.data.threads = 4
    return config
