"""Boxes: conversions, areas and overlaps; float[..., 4] in the format that each name carries.

xyxy is (left, top, right, bottom), cxcywh is (center x, center y, width, height). The unit is the
caller's: pixels, or shares of the image.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
Sides = tuple[Array, Array, Array, Array]  # left, top, right, bottom, f[...] each


def cxcywh_to_xyxy(boxes: Array) -> Array:
    """Corners from centers and sides, f[..., 4] -> f[..., 4].

    Examples:
      >>> cxcywh_to_xyxy(jnp.array([2.0, 2.0, 4.0, 2.0])).tolist()
      [0.0, 1.0, 4.0, 3.0]
    """
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.concatenate([center - half, center + half], axis=-1)


def xyxy_to_cxcywh(boxes: Array) -> Array:
    """Centers and sides from corners, f[..., 4] -> f[..., 4].

    Examples:
      >>> xyxy_to_cxcywh(jnp.array([0.0, 1.0, 4.0, 3.0])).tolist()
      [2.0, 2.0, 4.0, 2.0]
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def targets_in_pixels(
    boxes_cxcywh_01: Array, target_mask: Array, size: Array
) -> tuple[Array, Array]:
    """Padded targets as (boxes_xyxy_px f[B, T, 4], bool[B, T] which are some).

    What has no area is none: all anchors overlap it as much as the closest one does.

    Args:
      boxes_cxcywh_01: f[B, T, 4], relative to the images without padding.
      target_mask: bool[B, T].
      size: i32[B, 2], (height, width) of the images without padding, in pixels.
    """
    sides = jnp.tile(size[:, ::-1], 2)[:, None].astype(boxes_cxcywh_01.dtype)
    some = target_mask & jnp.all(boxes_cxcywh_01[..., 2:] > 0, axis=-1)
    return cxcywh_to_xyxy(boxes_cxcywh_01 * sides), some


def clip_xyxy(boxes: Array, size: Array) -> Array:
    """Boxes cut at the borders of their image; one wholly outside gets no area.

    Examples:
      >>> clip_xyxy(jnp.array([-1.0, 1.0, 9.0, 3.0]), jnp.array([2, 8])).tolist()
      [0.0, 1.0, 8.0, 2.0]

    Args:
      boxes: f[..., 4].
      size: [..., 2], (height, width) in the unit of the boxes, of as many axes as `boxes`.
    """
    limit = jnp.tile(size[..., ::-1].astype(boxes.dtype), 2)  # width, height, width, height
    return jnp.clip(boxes, 0, limit)


def area_xyxy(boxes: Array) -> Array:
    """Width times height, f[..., 4] -> f[...].

    Examples:
      >>> area_xyxy(jnp.array([0.0, 1.0, 4.0, 3.0])).item()
      8.0
    """
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou_xyxy(boxes: Array, others: Array) -> Array:
    """Intersection over union of each box with its partner; 0 where neither has an area.

    Examples:
      >>> iou_xyxy(jnp.array([0.0, 0.0, 2.0, 2.0]), jnp.array([1.0, 0.0, 3.0, 2.0])).item()
      0.3333333432674408

    Args:
      boxes: f[..., 4].
      others: f[..., 4], of as many axes; axes of length 1 are broadcast.

    Returns:
      f[...] in [0, 1].
    """
    return iou_of_sides(sides_of(boxes), sides_of(others))


def sides_of(boxes: Array) -> Sides:
    """f[..., 4] xyxy -> left, top, right and bottom, f[...] each.

    A loop that asks for overlaps again and again does so several times as fast on a CPU with these
    arrays as with one of boxes, in which what is read together lies four numbers apart.
    """
    left, top, right, bottom = (boxes[..., i] for i in range(4))
    return left, top, right, bottom


def iou_of_sides(sides: Sides, others: Sides) -> Array:
    """`iou_xyxy` of boxes whose sides are arrays of their own.

    Examples:
      >>> iou_of_sides((0.0, 0.0, 2.0, 2.0), (1.0, 0.0, 3.0, 2.0)).item()
      0.3333333432674408
    """
    return _ratio(*_overlap(sides, others))


def giou_xyxy(boxes: Array, others: Array) -> Array:
    """Generalized IoU of each box with its partner: IoU less the share of the hull neither covers.

    Rezatofighi et al. 2019, https://arxiv.org/abs/1902.09630. Equal to torchvision 0.29 and
    transformers 5.23, except that it and its gradient stay finite where a box is a point or a line
    (0 for two of them at one place).

    Examples:
      >>> giou_xyxy(jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.array([3.0, 0.0, 4.0, 1.0])).item()
      -0.5

    Args:
      boxes: f[..., 4].
      others: f[..., 4], of as many axes; axes of length 1 are broadcast.

    Returns:
      f[...] in [-1, 1].
    """
    sides, other_sides = sides_of(boxes), sides_of(others)
    intersection, union = _overlap(sides, other_sides)
    left, top, right, bottom = zip(sides, other_sides, strict=True)
    hull = _positive_area(
        jnp.maximum(*right) - jnp.minimum(*left), jnp.maximum(*bottom) - jnp.minimum(*top)
    )
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def pairwise_iou_xyxy(boxes: Array, others: Array) -> Array:
    """IoU of each of N boxes with each of M others, f[..., N, 4], f[..., M, 4] -> f[..., N, M].

    Examples:
      >>> box = jnp.array([[0.0, 0.0, 1.0, 1.0]])
      >>> pairwise_iou_xyxy(box, jnp.concatenate([box, 2 * box, box + 1])).tolist()
      [[1.0, 0.25, 0.0]]
    """
    return iou_xyxy(boxes[..., :, None, :], others[..., None, :, :])


def pairwise_giou_xyxy(boxes: Array, others: Array) -> Array:
    """GIoU of each of N boxes with each of M others, f[..., N, 4], f[..., M, 4] -> f[..., N, M].

    Examples:
      >>> box = jnp.array([[0.0, 0.0, 1.0, 1.0]])
      >>> pairwise_giou_xyxy(box, jnp.concatenate([box, box + 1])).tolist()
      [[1.0, -0.5]]
    """
    return giou_xyxy(boxes[..., :, None, :], others[..., None, :, :])


def _overlap(sides: Sides, others: Sides) -> tuple[Array, Array]:
    """Areas of intersection and union."""
    left, top, right, bottom = zip(sides, others, strict=True)
    intersection = _positive_area(
        jnp.minimum(*right) - jnp.maximum(*left), jnp.minimum(*bottom) - jnp.maximum(*top)
    )
    area, other = ((right - left) * (bottom - top) for left, top, right, bottom in (sides, others))
    return intersection, area + other - intersection


def _positive_area(width: Array, height: Array) -> Array:
    # Not maximum: a NaN must come through, and boxes that touch pull on each other as in torch.
    return jnp.where(width < 0, 0, width) * jnp.where(height < 0, 0, height)


def _ratio(part: Array, whole: Array) -> Array:
    """part / whole, and 0 with a finite gradient where `whole` is too small to be squared."""
    smallest = float(jnp.finfo(whole.dtype).tiny) ** 0.5
    valid = whole > smallest
    return jnp.where(valid | jnp.isnan(whole), part / jnp.where(valid, whole, 1), 0)
