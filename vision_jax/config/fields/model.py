"""The model: its weights, layout and precision."""

from vision_jax.config.fields.field import (
    ANY,
    BELOW_1,
    CHANNELS,
    FROM_0,
    MERGED,
    PAIRS,
    ROWS,
    RULES,
    field,
    one_of,
)

FIELDS = (
    field(
        "model.weights",
        "",
        ANY,
        "pretrained: embedded:NAME, a file, a Hugging Face folder, hf://owner/name; empty: random",
    ),
    field(
        "model.allow_pickle",
        False,
        ANY,
        "read .pth and .bin files too (needs torch; only if you trust them)",
    ),
    field(
        "model.variant",
        "",
        ANY,
        "such as b/16, resnet50, detr_resnet50; empty: the weights' own architecture",
    ),
    field("model.arguments", (), PAIRS, "further arguments of the model, as ((name, value), ...)"),
    field(
        "model.layers",
        (),
        ROWS,
        "what a smaller student keeps of bigger weights; docs/distillation.md",
    ),
    field(
        "model.width",
        0,
        FROM_0,
        "channels of a narrower ViT, cut out of wider weights; 0 keeps the weights' own",
    ),
    field(
        "model.mlp_width",
        0,
        FROM_0,
        "hidden units of its MLPs, cut out of wider weights; 0 keeps the weights' own",
    ),
    field(
        "model.reinitialize",
        ("head(_dist)?/.*",),
        RULES,
        "parameters that start anew, such as the head of other classes: regexes over whole paths",
        detection=(r"((proposals|head)_\d+/)?class_head/.*",),
        segmentation=(r"(auxiliary_)?class_head/.*",),
        pretraining=("decoder/.*",),
        self_distillation=("(dino|ibot)_head/.*|mask_token|(patch_)?center",),
        contrastive=("contrastive_head/.*",),
        image_text=("text/.*|logit_(scale|bias)",),
    ),
    field(
        "model.drop",
        (),
        RULES,
        "tensors of the weights to leave out: regexes over the file's own names",
    ),
    field(
        "model.image_size", 0, FROM_0, "pixels a side of square images; 0 takes the weights' own"
    ),
    field(
        "model.mean",
        (),
        CHANNELS,
        "mean of images in [0, 1] per channel; () takes the weights' own, or 0.5",
    ),
    field(
        "model.std",
        (),
        CHANNELS,
        "standard deviation of images in [0, 1] per channel; () takes the weights' own, or 0.5",
    ),
    field(
        "model.dtype",
        "float32",
        one_of("float32", "bfloat16"),
        "dtype of the computation; parameters are float32. bfloat16 is for GPU and TPU",
    ),
    field("model.dropout", 0.0, BELOW_1, "probability of dropout"),
    field(
        "model.drop_path",
        0.0,
        BELOW_1,
        "probability of stochastic depth in the last block; it grows linearly up to it",
    ),
    field(
        "model.merge",
        -1.0,
        MERGED,
        "of a ViT, tokens that merge in each block, or below 1 the share of them; 0 none, -1 the "
        "weights' own; docs/compression.md",
    ),
    field(
        "model.freeze_norm",
        False,
        ANY,
        "BatchNorm uses its running statistics in training and never updates them",
    ),
    field(
        "model.remat",
        False,
        ANY,
        "recompute activations in the backward pass: less memory, more time",
    ),
    field(
        "model.scan",
        False,
        ANY,
        "one compiled block in a loop: quicker to compile, slightly slower to run",
    ),
)
