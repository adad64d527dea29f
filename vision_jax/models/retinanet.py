"""RetinaNet (Lin et al. 2017, https://arxiv.org/abs/1708.02002): anchors of five levels, at once.

The structure is that of torchvision 0.29 (models/detection/retinanet.py) in two versions: the
paper's, and v2 with GroupNorms in the heads, P6 of the body's last map, and boxes trained by GIoU
(Zhang et al. 2020, https://arxiv.org/abs/1912.02424).

Exactness, where ports go wrong:
  - each image has a canvas of its own (models/pyramid.py), over which the GroupNorms take their
    means too; torchvision's results depend on the padding of a batch;
  - three stages give a level, of stride 8, 16 and 32; P6 and P7 follow by convolutions, P7's of
    relu(P6), though P6 itself has none;
  - anchors have sides 32 to 512, each once, times 2^(1/3) and 2^(2/3), the fraction cut off before
    the three ratios are taken and rounded; they step by the canvas's side // the cells of a level;
  - channels of a cell are anchor by anchor, and within one class by class;
  - a class is a sigmoid. torchvision's 91 COCO classes are the numbers of its categories, of which
    the first, the background, is trained to be nowhere, and is a class here as well;
  - convolutions of v2's heads have no bias;
  - the published v1 weights (COCO_V1) are for a BatchNorm whose epsilon is 0 (`batch_norm_eps`), in
    no file; others for 1e-5;
  - of each level the 1,000 best pairs of anchor and class above 0.05 are considered, and of all of
    them the 300 best are kept that no better one of their class covers.
"""

from typing import Any, Literal

from flax import linen as nn

from vision_jax.errors import UserError
from vision_jax.models.dense import DenseDetector, detect, joined
from vision_jax.models.resnet import VARIANTS as RESNETS
from vision_jax.ops import anchors

RATIOS = (0.5, 1.0, 2.0)  # heights over widths of anchors
OVERLAP = 0.5  # IoU of suppression
GROUPS = 32  # of v2's norms
VARIANTS: dict[str, dict[str, Any]] = {
    "retinanet_resnet50_fpn": RESNETS["resnet50"],
    "retinanet_resnet50_fpn_v2": {
        **RESNETS["resnet50"],
        "head_groups": GROUPS,
        "coarse_of_map": True,
        "box_loss": "giou",
    },
}


def octaves(side: int) -> tuple[int, int, int]:
    """Three sides from one to its double, in pixels.

    Examples:
      >>> octaves(32)
      (32, 40, 50)
    """
    return side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("retinanet_resnet50_fpn_v2"), or None."""
    return VARIANTS.get(name)


class RetinaNet(DenseDetector):
    """Images f32[B, H, W, in_channels] in [0, 1] -> classes and boxes of anchors.

    Attributes:
      anchor_sizes: sides in pixels of a square anchor on each level, one or as many.
      box_loss: of the deltas' L1 distance, or of the boxes' generalized IoU.

    The others are `DenseDetector`'s.
    """

    anchor_sizes: tuple[int | tuple[int, ...], ...] = tuple(
        octaves(side) for side in (32, 64, 128, 256, 512)
    )
    box_loss: Literal["l1", "giou"] = "l1"

    @nn.compact
    def __call__(
        self, images, pixel_mask=None, *, train: bool = False, return_features: bool = False
    ):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of any size, padded at the bottom and right.
          pixel_mask: bool[B, H, W], True where the image is; None if nothing is padded.
          train: BatchNorm updates unless frozen.
          return_features: also return a dict of named intermediates as f[B, h, w, C]: the body's,
            "stem", "stage_0" ..., and the pyramid's "level_0" ...

        Returns:
          Of A anchors "logits" f32[B, A, C], "box_deltas" f32[B, A, 4], "anchors_xyxy_px"
          f32[B, A, 4], and "inside" bool[B, A], which of them are on the image's own canvas; of D
          detections "score" f32[B, D], 0 of what is none, "label" i32[B, D] and
          "boxes_xyxy_01" f32[B, D, 4], relative to the image without its padding.
          Or (that, features).

        Raises:
          UserError: other than one size of anchors, or as many, for each level; groups that the
            channels can't be put in.
        """
        self._check("anchor_sizes", self.anchor_sizes)
        images, sizes, extents, masks = self._canvas(images, pixel_mask)
        levels, features = self._levels(images, masks, train)
        counts = {len(RATIOS) * (1 if isinstance(s, int) else len(s)) for s in self.anchor_sizes}
        if len(counts) > 1:
            raise UserError(f"anchor_sizes {self.anchor_sizes}: give as many for each level")
        (count,) = counts
        heads = {"class": {"class": (count, self.num_classes)}, "box": {"box": (count, 4)}}
        said = self._say(levels, masks[1:], heads, use_bias=not self.head_groups)
        boxes, inside = self._anchors(levels, extents, self.anchor_sizes, RATIOS)
        outputs = {
            "logits": joined(said["class"]),
            "box_deltas": joined(said["box"]),
            "anchors_xyxy_px": joined(boxes),
            "inside": joined(inside),
        }
        outputs |= detect(
            said["class"],
            said["box"],
            boxes,
            inside,
            sizes,
            decode=anchors.decode,
            overlap=OVERLAP,
            candidates=self.candidates,
            least=self.least_score,
            most=self.most,
        )
        return (outputs, features) if return_features else outputs
