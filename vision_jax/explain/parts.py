"""Parts of images, a detector's boxes or a segmenter's regions, explained by several methods.

images --model--> parts --methods--> a map of each part --> does it point into the part?

Up to AT_ONCE parts of an image are explained at once, by vmap over their targets: what does not
depend on the part, the forward pass above all, is computed once an image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from vision_jax.attacks.examples import keys_of
from vision_jax.errors import UserError, nearest
from vision_jax.explain import detections, measures, regions
from vision_jax.explain.boxes import box_relevance
from vision_jax.explain.detections import Boxes
from vision_jax.explain.forward import Forward, Target, Variables
from vision_jax.explain.methods import METHODS
from vision_jax.explain.regions import Regions
from vision_jax.models import families
from vision_jax.tasks.detection.objective import pixel_mask

Array = jax.Array
Parts = Boxes | Regions
Found = dict[str, Array]

RELEVANCE = "attention_relevance"  # of a DETR, box_relevance
PERTURBING = ("occlusion", "feature_ablation", "rise")
AT_ONCE = 8  # parts of an image: each has a backward pass of its own in memory
FAST = (RELEVANCE, "layer_cam", "grad_cam", "saliency")  # unless others are asked for


@dataclass(frozen=True)
class Wanted:
    """Which parts of an image are explained.

    Attributes:
      most: of the highest scores, of classes of pixels those of most pixels.
      least: score below which a part is none.
      label: the only class, if any.
    """

    most: int = 5
    least: float = 0.3
    label: int | None = None


def choose_methods(model: Any, asked: Sequence[str]) -> list[str]:
    """The methods asked for, "all" of those that fit the model, or the fast ones.

    Raises:
      UserError: a method that there is not, or not for this model.
    """
    family = families.family_of(model)
    known = [name for name in METHODS if not name.startswith("attention")]
    known = [RELEVANCE, *known] if family == "detr" else known
    if list(asked) == ["all"]:
        return known
    for name in asked:
        if name not in known:
            raise UserError(
                f"--methods: there is no method {name!r} of parts that a {family} finds"
                f"{nearest(name, known)}: take {', '.join(known)}"
            )
    return list(dict.fromkeys(asked)) or [name for name in FAST if name in known]


def make_find_parts(model: Any, wanted: Wanted) -> Callable[..., Parts]:
    """A compiled function (variables, images f[B, H, W, C], sizes i32[B, 2]) -> parts [B, N].

    `sizes` are (height, width) of the images without padding.
    """
    family = families.FAMILIES[families.family_of(model)]
    most, least, label = wanted.most, wanted.least, wanted.label

    def find(variables: Variables, images: Array, sizes: Array) -> Parts:
        valid = pixel_mask(sizes, images.shape[1:3])
        outputs, _ = Forward(model, valid if family.pixel_mask else None)(variables, images)
        if family.task == "detection":
            return detections.find_boxes(
                family.predicts, outputs, sizes, most=most, least=least, label=label
            )
        return regions.find_regions(
            family.predicts, outputs, valid, most=most, least=least, label=label
        )

    return jax.jit(find)


def make_explain_parts(model: Any, name: str, **options: Any) -> Callable[..., Array]:
    """A compiled function (variables, images, sizes, parts [B, N], keys[B]) -> f[B, N, H, W].

    Maps at the size of the images; one compile for each shape of images and number of parts.

    Args:
      model: a detector or a segmenter.
      name: of methods.METHODS; of a DETR "attention_relevance" is boxes.box_relevance.
      **options: of the method.
    """
    family = families.FAMILIES[families.family_of(model)]
    if name in METHODS and METHODS[name].takes_baseline:
        mean = jnp.asarray(model.mean, jnp.float32).reshape(1, 1, 1, -1)
        options = {"baseline": mean, **options}

    def explain(
        variables: Variables, images: Array, sizes: Array, parts: Parts, keys: Array
    ) -> Array:
        valid = pixel_mask(sizes, images.shape[1:3])
        forward = Forward(model, valid if family.pixel_mask else None)

        def of_one(part: Parts) -> Array:  # one of each image, f[B, h, w]
            if name == RELEVANCE and isinstance(part, Boxes):
                return box_relevance(forward, variables, images, part.place, part.label)
            target = _target(family.predicts, name, part, sizes)
            found = METHODS[name].function(forward, variables, images, target, keys, **options)
            return METHODS[name].to_map(found)

        maps = of_each(of_one, parts)  # [B, N, h, w]
        size = images.shape[1], images.shape[2]
        flat = measures.to_pixels(maps.reshape(-1, *maps.shape[2:]), size)
        return flat.reshape(*maps.shape[:2], *size)

    return jax.jit(explain)


def of_each(of_one: Callable[[Any], Array], parts: Any) -> Array:
    """f[B, N, ...]: a function of arrays [B, ...] of each of [B, N, ...], AT_ONCE at a time."""
    along = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), parts)
    if len(jax.tree.leaves(along)[0]) <= AT_ONCE:
        found = jax.vmap(of_one)(along)
    else:
        found = jax.lax.map(of_one, along, batch_size=AT_ONCE)
    return jnp.moveaxis(found, 0, 1)


def _target(predicts: str, name: str, part: Parts, sizes: Array) -> Target:
    """What a method explains of a part of each image."""
    if isinstance(part, Boxes):
        make = detections.box_score if name in PERTURBING else detections.box_logit
        return make(predicts, part, sizes)
    of_probability = METHODS[name].of_probability
    return (regions.region_probability if of_probability else regions.region_score)(predicts, part)


def inside_of(parts: Parts, sizes: Array, canvas: tuple[int, int]) -> Array:
    """bool[B, N, H, W]: the pixels of parts [B, N]."""
    if isinstance(parts, Regions):
        return parts.inside
    sides = jnp.tile(sizes[:, None, ::-1].astype(parts.xyxy_01.dtype), 2)  # width, height, twice
    boxes = (parts.xyxy_01 * sides).reshape(-1, 4)
    return measures.box_pixels(boxes, canvas).reshape(*parts.score.shape, *canvas)


@jax.jit
def measure(maps: Array, inside: Array, sizes: Array) -> Found:
    """Whether the largest value is inside, and the share of the heat that is, f[B, N] each.

    Args:
      maps: f[B, N, H, W].
      inside: bool[B, N, H, W].
      sizes: i32[B, 2], of the images without padding, which does not count.
    """
    batch, count, *canvas = maps.shape
    valid = pixel_mask(sizes, canvas)[:, None]
    lowest = jnp.where(valid, maps, -jnp.inf).reshape(-1, *canvas)
    flat = inside.reshape(-1, *canvas)
    found = {
        "pointing": measures.pointing(lowest, flat).astype(jnp.float32),
        "inside": measures.share_inside(jnp.where(valid, maps, 0).reshape(-1, *canvas), flat),
    }
    return {name: values.reshape(batch, count) for name, values in found.items()}


@jax.jit
def chance(inside: Array, sizes: Array) -> Found:
    """The same of maps that say nothing: the share of the image that is inside."""
    share = inside.sum((2, 3)) / sizes.prod(1)[:, None]
    return {"pointing": share, "inside": share}


def make_explain(model: Any, names: Sequence[str], seed: int) -> Callable[..., dict[str, Found]]:
    """A function (variables, shuffled, images, sizes, parts, inside, index) -> by method.

    {method: {"map": f[B, N, H, W], and figures f[B, N] each}}, of device arrays: those of `measure`
    and, of the same part's map by the model with shuffled weights, "shuffled_pointing" and
    "rank_correlation". A place sees what is around it whatever it has learned, and so do these.

    Args:
      model: a detector or a segmenter.
      names: of `choose_methods`.
      seed: of all that is drawn, with the index i32[B] of each image.
    """
    explain = {name: make_explain_parts(model, name) for name in names}

    @jax.jit
    def compare(maps, others, sizes):
        batch, count, *canvas = maps.shape
        valid = pixel_mask(sizes, canvas)[:, None]
        first, second = (jnp.where(valid, x, 0).reshape(-1, *canvas) for x in (maps, others))
        return measures.rank_correlation(first, second).reshape(batch, count)

    def run(variables, shuffled, images, sizes, parts, inside, index):
        keys = keys_of(jax.random.key(seed), index)
        found: dict[str, Found] = {}
        for name in names:
            maps = explain[name](variables, images, sizes, parts, keys)
            others = explain[name](shuffled, images, sizes, parts, keys)
            found[name] = {
                "map": maps,
                **measure(maps, inside, sizes),
                "shuffled_pointing": measure(others, inside, sizes)["pointing"],
                "rank_correlation": compare(maps, others, sizes),
            }
        return found

    return run
