"""FCOS (Tian et al. 2019, https://arxiv.org/abs/1904.01355): a box of each point, no anchors.

The structure is that of torchvision 0.29 (models/detection/fcos.py): RetinaNet's pyramid, one point
at each cell, which says classes, how far away the four sides of its box are, and how central it is
in it. It is as in the authors' later version (https://arxiv.org/abs/2006.09214): points near the
center of a box learn it, centrality is predicted beside the box, boxes are trained by GIoU, and
distances are in units of the level.

Exactness, where ports go wrong:
  - each image has a canvas of its own (models/pyramid.py), over which the GroupNorms take their
    means too; torchvision's results depend on the padding of a batch;
  - P6 is of the level P5, not of the body's map; the epsilon of the published weights is 1e-5;
  - a point is a square of 8, 16 ... 128 pixels around the cell's upper left corner, not its middle,
    and steps by the canvas's side // the cells of a level, which need not be that side;
  - distances are of a ReLU, in sides of that square;
  - convolutions of the heads have a bias, though a norm follows;
  - the score is √(class · centrality): of each level the 1,000 best pairs of point and class above
    0.2 are considered, and of all of them the 100 best are kept that no better one of their class
    covers by more than 0.6;
  - a class is a sigmoid, the background one of torchvision's 91, as in RetinaNet.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from vision_jax.models.dense import DenseDetector, detect, joined
from vision_jax.models.resnet import VARIANTS as RESNETS
from vision_jax.ops import anchors

OVERLAP = 0.6  # IoU of suppression
# Distances to the farthest side of a box that a point learns, in sides of its square.
LEAST, MOST = 4.0, 8.0
ENDLESS = 1e8  # pixels, more than any image has
VARIANTS: dict[str, dict[str, Any]] = {"fcos_resnet50_fpn": RESNETS["resnet50"]}


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("fcos_resnet50_fpn"), or None."""
    return VARIANTS.get(name)


class Fcos(DenseDetector):
    """Images f32[B, H, W, in_channels] in [0, 1] -> classes and boxes of points.

    Attributes:
      point_sizes: side in pixels of the square that a point of each level is.
      radius: how far from a box's center a point may be that learns it, along either axis, in sides
        of its square.

    The others are `DenseDetector`'s.
    """

    head_groups: int = 32
    least_score: float = 0.2
    most: int = 100
    point_sizes: tuple[int, ...] = (8, 16, 32, 64, 128)
    radius: float = 1.5

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
          Of A points "logits" f32[B, A, C], "center_logits" f32[B, A], "distances" f32[B, A, 4] to
          the left, top, right and bottom side of a box, in sides of the point's square,
          "points_xyxy_px" f32[B, A, 4], those squares, "inside" bool[B, A], which of them are on
          the image's own canvas, and "reach_px" f32[B, A, 2], between which the distance to the
          farthest side of a box is that a point learns; of D detections "score"
          f32[B, D], 0 of what is none, "label" i32[B, D] and "boxes_xyxy_01" f32[B, D, 4], relative
          to the image without its padding. Or (that, features).

        Raises:
          UserError: other than one size of points for each level; groups that the channels can't be
            put in.
        """
        self._check("point_sizes", self.point_sizes)
        images, sizes, extents, masks = self._canvas(images, pixel_mask)
        levels, features = self._levels(images, masks, train)
        heads = {
            "class": {"class": (1, self.num_classes)},
            "box": {"box": (1, 4), "center": (1, 1)},
        }
        said = self._say(levels, masks[1:], heads, use_bias=True)
        distances = [nn.relu(x) for x in said["box"]]
        central = [x[..., 0] for x in said["center"]]
        points, inside = self._anchors(levels, extents, self.point_sizes, (1.0,))
        outputs = {
            "logits": joined(said["class"]),
            "center_logits": joined(central),
            "distances": joined(distances),
            "points_xyxy_px": joined(points),
            "inside": joined(inside),
            "reach_px": joined([_reach(x, i, len(points)) for i, x in enumerate(points)]),
        }
        outputs |= detect(
            said["class"],
            distances,
            points,
            inside,
            sizes,
            decode=anchors.decode_distances,
            overlap=OVERLAP,
            candidates=self.candidates,
            least=self.least_score,
            most=self.most,
            centered=central,
        )
        return (outputs, features) if return_features else outputs


def _reach(points, index: int, count: int):
    """f[B, N, 2] of points f[B, N, 4] of a level: of the first from 0, of the last to no end."""
    side = points[..., 2] - points[..., 0]
    least = jnp.zeros_like(side) if index == 0 else LEAST * side
    return jnp.stack(
        [least, jnp.full_like(side, ENDLESS) if index == count - 1 else MOST * side], -1
    )
