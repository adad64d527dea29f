"""What detectors and segmenters minimize."""

from vision_jax.config.fields.field import (
    CLASSIFICATION,
    COUNT,
    DETECTION,
    NOT_NEGATIVE,
    SEGMENTATION,
    WEIGHTS,
    field,
    one_of,
)

FIELDS = (
    # A detector's loss: of pairs of query and box, to match them, then to train.
    field(
        "loss.class_cost", 1.0, NOT_NEGATIVE, "weight of the class term in the matching", DETECTION
    ),
    field(
        "loss.l1_cost",
        5.0,
        NOT_NEGATIVE,
        "weight of the L1 distance of boxes in the matching",
        DETECTION,
    ),
    field(
        "loss.giou_cost",
        2.0,
        NOT_NEGATIVE,
        "weight of the generalized IoU in the matching",
        DETECTION,
    ),
    field(
        "loss.class_weight",
        1.0,
        NOT_NEGATIVE,
        "weight of the class term in the loss, and in the matching of masks",
        DETECTION,
        SEGMENTATION,
        segmentation=2.0,
    ),
    field(
        "loss.l1_weight",
        5.0,
        NOT_NEGATIVE,
        "weight of the L1 distance of boxes in the loss",
        DETECTION,
    ),
    field(
        "loss.giou_weight",
        2.0,
        NOT_NEGATIVE,
        "weight of the generalized IoU in the loss",
        DETECTION,
    ),
    field(
        "loss.no_object_weight",
        0.1,
        NOT_NEGATIVE,
        "weight of queries without a target in DETR's and EoMT's class term; RF-DETR's has none",
        DETECTION,
        SEGMENTATION,
    ),
    # A segmenter's loss, a mean over all pixels of an update that have a class.
    field(
        "loss.pixel_weight",
        1.0,
        NOT_NEGATIVE,
        "weight of the cross-entropy of pixels, or of their focal loss",
        SEGMENTATION,
    ),
    field("loss.dice_weight", 0.0, NOT_NEGATIVE, "weight of Dice in the loss", SEGMENTATION),
    field(
        "loss.focal_gamma",
        0.0,
        NOT_NEGATIVE,
        "gamma of the focal loss of pixels; 0 is cross-entropy",
        SEGMENTATION,
    ),
    field(
        "loss.class_weights",
        (),
        WEIGHTS,
        "weights of the classes in the loss of images or pixels, by label; () for equal ones",
        CLASSIFICATION,
        SEGMENTATION,
    ),
    field(
        "loss.balance",
        "none",
        one_of("none", "frequency"),
        "weigh classes by how rare they are in an update's labels (frequency)",
        SEGMENTATION,
    ),
    field(
        "loss.auxiliary_weight",
        0.4,
        NOT_NEGATIVE,
        "weight of the loss of an auxiliary head, where the model has one",
        SEGMENTATION,
    ),
    # Of models that find a set of masks, in the matching and in the loss.
    field(
        "loss.mask_weight",
        5.0,
        NOT_NEGATIVE,
        "weight of the cross-entropy of a query's mask (EoMT)",
        SEGMENTATION,
    ),
    field(
        "loss.mask_dice_weight",
        5.0,
        NOT_NEGATIVE,
        "weight of Dice of a query's mask (EoMT)",
        SEGMENTATION,
    ),
    field(
        "loss.points",
        12_544,
        COUNT,
        "points at which a query's mask is compared (EoMT)",
        SEGMENTATION,
    ),
)
