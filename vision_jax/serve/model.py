"""A model as a server runs it: views of images in batches of fixed shapes, compiled at start.

The host prepares images as `predict` does, by the same functions, so they may have any size and
answers are predict's. A batch has as many rows as one of a few sizes, the last ones empty; a
detector's has one of its canvases too. Each pair is one program.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax import limits, machine, platform
from vision_jax.data.decode import DamagedImageError, Picture, TooManyPixelsError
from vision_jax.data.detection_transforms import (
    DetectionPreprocessing,
    bounded_size,
    choose_bucket,
    detection_eval_transform,
    resized_size,
)
from vision_jax.data.segmentation_transforms import (
    SegmentationPreprocessing,
    segmentation_eval_transform,
)
from vision_jax.data.transforms import eval_transform, size_of, to_channels
from vision_jax.errors import UserError
from vision_jax.loaded import Loaded
from vision_jax.ops.detection_outputs import POSTPROCESS
from vision_jax.ops.resize import bilinear_weights
from vision_jax.tasks.detection.objective import pixel_mask
from vision_jax.tasks.segmentation.inference import PredictOne, make_predict_one
from vision_jax.tasks.segmentation.objective import PREDICTIONS as SEGMENTERS
from vision_jax.trees import factored, winograd

TILE = 256  # pixels a side of what is decided at once of a mask
STRIP_BYTES = 200_000_000  # of the scores of a row of windows, or as many as `AT_ONCE` windows have
AT_ONCE = 4  # windows of an image
AS_THEY_ARE = ("original", "short")  # a segmenter's views whose size depends on the image's

Size = tuple[int, int]  # height, width
Found = Mapping[str, np.ndarray]  # of one image


class View(NamedTuple):
    """An image as it waits for its batch.

    Attributes:
      canvas: its place in Servable.canvases.
      pixels: u8[h, w, C], as large as the canvas or, a detector's, smaller.
      size: (height, width) of the image that came, upright.
    """

    canvas: int
    pixels: np.ndarray
    size: Size


@dataclass(frozen=True)
class Servable:
    """What is served, before it is compiled.

    Attributes:
      kind: "classes", "boxes", "pixels" or "features".
      class_names: by label; () of features.
      channels: of a view.
      canvases: (height, width) of the batches.
      look: an image -> its view. Raises DamagedImageError for what the model can't see.
      outputs: (variables, {"image": u8[B, h, w, C], "size": i32[B, 2] within the canvas,
        "original_size": i32[B, 2]}) -> {name: [B, ...]}, a pure function.
      variables: of the model, on the device.
      by_windows: of a segmenter that sees images in windows, (view, scores_of) -> labels u8[H, W];
        outputs are of windows then, {"scores": f[B, h, w, K]}, and a view is the whole image.
      only: (height, width) of the images that it was compiled for, of a segmenter that sees them as
        they are; () where images of any size are answered.
      make_read: {name: shape} of the outputs of one image -> a function (these outputs, size of the
        image that came) -> Found. It compiles when it is made, and not later.
    """

    kind: str
    class_names: tuple[str, ...]
    channels: int
    canvases: tuple[Size, ...]
    look: Callable[[Picture], View]
    outputs: Callable[[Any, Mapping[str, Any]], Mapping[str, jax.Array]]
    variables: Any
    make_read: Callable[[Mapping[str, jax.ShapeDtypeStruct]], Callable[[Found, Size], Found]]
    by_windows: PredictOne | None = None
    only: tuple[Size, ...] = ()


def make_servable(
    loaded: Loaded, image_sizes: Sequence[Size] = (), window: int = 0, stride: int = 0
) -> Servable:
    """What `loaded` is served as.

    Args:
      loaded: a model that classifies images, finds boxes or segments; others give features. Its
        adapters are merged.
      image_sizes: (height, width) of the images that will come, for a segmenter that takes them as
        they are: it is compiled for each. Its own size by default.
      window: pixels a side of the windows in which such a segmenter sees images of any size; 0: it
        sees them whole.
      stride: pixels between windows; 0 is two thirds of a window.

    Raises:
      UserError: sizes or windows for a model that takes images of any size without.
    """
    params = factored.merge(loaded.variables["params"])
    variables = jax.device_put({**loaded.variables, "params": params})
    run = {name: False for name in ("scan", "remat") if hasattr(loaded.model, name)}
    loaded = replace(loaded, model=loaded.model.clone(**run))
    own = loaded.preprocessing
    view = own.view if isinstance(own, SegmentationPreprocessing) else ""
    for flag, given, views in (
        ("--image-size", image_sizes, AS_THEY_ARE),
        ("--window", window, AS_THEY_ARE[:1]),
    ):
        if given and view not in views:
            raise UserError(f"{flag}: {loaded.origin} takes images of any size: leave it out")
    if window and (image_sizes or stride > window):
        what = "--image-size beside --window" if image_sizes else f"a stride of {stride}"
        raise UserError(f"{what}: windows of {window} pixels are for images of any size, all of it")
    by_windows: PredictOne | None = None
    only: tuple[Size, ...] = ()
    if isinstance(own, DetectionPreprocessing):
        canvases, look = own.buckets, _look_for_boxes(own)
    elif isinstance(own, SegmentationPreprocessing) and (window or view == "windows"):
        side = window or own.image_size[0]
        canvases, look = ((side, side),), _look_at_all(own, side, len(loaded.class_names))
        stride = stride or -(-window * 2 // 3)
        by_windows = make_predict_one(own, window=window, stride=stride, at_once=AT_ONCE)
    elif isinstance(own, SegmentationPreprocessing):
        if view in AS_THEY_ARE:
            only = tuple(image_sizes) or (own.image_size,)
        canvases = _sizes_seen(own, only) if only else (own.image_size,)
        look = _look_at_pixels(own, canvases)
    else:
        canvases, look = (
            (own.image_size,),
            lambda picture: View(0, eval_transform(picture, own), size_of(picture)),
        )
    kind, outputs, make_read = _answers(loaded, view, by_windows is not None)
    return Servable(
        kind,
        loaded.class_names if kind != "features" else (),
        loaded.model.in_channels,
        canvases,
        look,
        outputs,
        variables,
        make_read,
        by_windows,
        only,
    )


def faster(servable: Servable, rows: int) -> Servable:
    """The same with kernels in the form that a CPU multiplies fastest: other last bits.

    Args:
      servable: what is served.
      rows: of its batches, by which kernels are chosen, so last bits depend on it.
    """
    if platform.current() != "cpu":
        return servable
    batch = _batch([], rows, max(servable.canvases, key=math.prod), servable.channels)

    def apply(params: Any, batch: Mapping[str, Any]) -> Any:
        return servable.outputs({**servable.variables, "params": params}, batch)

    params = winograd.transform(servable.variables["params"], apply, batch)
    return replace(servable, variables={**servable.variables, "params": params})


# Views --------------------------------------------------------------------------------------------


def _look_for_boxes(own: DetectionPreprocessing) -> Callable[[Picture], View]:
    no_boxes = np.zeros((0, 4))

    def look(picture: Picture) -> View:
        image = np.asarray(picture)
        size = (image.shape[0], image.shape[1])
        canvas = choose_bucket(resized_size(size, own), own.buckets)
        pixels, _ = detection_eval_transform(image, no_boxes, own, own.buckets[canvas])
        return View(canvas, pixels, size)

    return look


def _look_at_pixels(
    own: SegmentationPreprocessing, canvases: Sequence[Size]
) -> Callable[[Picture], View]:
    place = {size: canvas for canvas, size in enumerate(canvases)}

    def look(picture: Picture) -> View:
        _check_sides(size_of(picture))
        pixels = segmentation_eval_transform(np.asarray(picture), own)
        seen, size = (pixels.shape[0], pixels.shape[1]), size_of(picture)
        if seen not in place:
            known = ", ".join(f"{height} x {width}" for height, width in canvases)
            raise DamagedImageError(
                f"the image has {size[0]} x {size[1]} pixels: this model sees images as they are, "
                f"and the server compiled views of {known}: resize it, or start the server with "
                f"--image-size={size[0]},{size[1]}"
            )
        return View(place[seen], pixels, size)

    return look


def _look_at_all(
    own: SegmentationPreprocessing, window: int, classes: int
) -> Callable[[Picture], View]:
    most = max(AT_ONCE * window, STRIP_BYTES // (window * classes * 4))

    def look(picture: Picture) -> View:
        size = size_of(picture)
        _check_sides(size)
        if own.view == "original" and size[1] > most:
            raise TooManyPixelsError(
                f"the image has {size[1]} columns: at most {most} by windows of {window} pixels "
                f"and {classes} classes: shrink it"
            )
        return View(0, to_channels(np.asarray(picture), len(own.mean)), size)

    return look


def _check_sides(size: Size) -> None:
    """Of masks, which are interpolated to the image's size: a thin line costs as a square does."""
    if max(size) > limits.SIDE:
        raise TooManyPixelsError(
            f"{size[0]} x {size[1]} pixels: at most {limits.SIDE} a side: shrink it"
        )


def _sizes_seen(own: SegmentationPreprocessing, given: Sequence[Size]) -> tuple[Size, ...]:
    """Sizes of the views of images of the sizes given."""
    seen = []
    for height, width in given:
        line = np.zeros((height, width, len(own.mean)), np.uint8)
        seen.append(segmentation_eval_transform(line, own).shape[:2])
    return tuple(dict.fromkeys(seen))


# Answers ------------------------------------------------------------------------------------------


def _answers(loaded: Loaded, view: str, windows: bool) -> tuple[str, Any, Any]:
    """(kind, outputs, make_read) of Servable; `view` is a segmenter's."""
    predicts = loaded.family.predicts

    def as_it_is(like):
        return lambda found, size: found

    if predicts in POSTPROCESS:

        def boxes(variables, batch):
            inside = pixel_mask(batch["size"], batch["image"].shape[1:3])
            found = loaded.apply(variables, batch["image"], inside)
            return POSTPROCESS[predicts](found, batch["original_size"])

        return "boxes", boxes, as_it_is
    if windows:
        scores_of = SEGMENTERS[predicts].scores

        def scores(variables, batch):
            found = loaded.apply(variables, batch["image"])
            return {"scores": scores_of(found, batch["image"].shape[1:3])}

        return "pixels", scores, as_it_is
    if predicts in SEGMENTERS:
        padded = view == "pad"  # images fill a part of a square
        return "pixels", _maps_of(loaded, padded), _make_make_read(loaded, padded)

    def logits(variables, batch):
        return {"logits": loaded.apply(variables, batch["image"])["logits"].astype(jnp.float32)}

    classifies = predicts == "classes" and loaded.class_names
    return ("classes" if classifies else "features"), logits, as_it_is


def _maps_of(loaded: Loaded, padded: bool) -> Callable[..., dict[str, jax.Array]]:
    """{"maps": f32[B, h, w, M]}, from which scores are interpolated, and what these need beside.

    Of a model that finds masks these are its queries', "logits" beside them; of images on a square
    the scores of its pixels.
    """
    scores_of = SEGMENTERS[loaded.family.predicts].scores

    def maps(variables, batch):
        found = loaded.apply(variables, batch["image"])
        if padded:
            return {"maps": scores_of(found, loaded.preprocessing.image_size).astype(jnp.float32)}
        if "mask_logits" in found:
            masks = found["mask_logits"][-1].astype(jnp.float32)
            return {"maps": masks.transpose(0, 2, 3, 1), "logits": found["logits"][-1]}
        return {"maps": found["logits"].astype(jnp.float32)}

    return maps


def _make_make_read(loaded: Loaded, padded: bool) -> Callable[..., Any]:
    """Masks of any size by programs of one: tile by tile, the same products as in `predict`."""
    scores_of = SEGMENTERS[loaded.family.predicts].scores
    side = loaded.preprocessing.image_size[0]

    def decide(found, rows, columns):  # f32[h, w, M], f32[TILE, h], f32[TILE, w] -> u8[TILE, TILE]
        tile = jnp.einsum("Hh,hwc,Ww->HWc", rows, found["maps"], columns, precision="highest")
        if "logits" in found:
            masks = tile.transpose(2, 0, 1)[None, None]  # [1, 1, Q, TILE, TILE]
            whole = {"logits": found["logits"][None, None], "mask_logits": masks}
            tile = scores_of(whole, (TILE, TILE))[0]
        return jnp.argmax(tile, axis=-1).astype(jnp.uint8)

    def make_read(like: Mapping[str, jax.ShapeDtypeStruct]) -> Callable[[Found, Size], Found]:
        sides = like["maps"].shape[:2]
        weights = [jax.ShapeDtypeStruct((TILE, length), np.float32) for length in sides]
        program = machine.jit(decide).lower(like, *weights).compile()

        def read(found: Found, size: Size) -> Found:
            content = sides
            if padded:  # on a square, of which the image fills a part
                content = bounded_size(size, side, side)
            rows, columns = (
                _padded(bilinear_weights(old, new), length)
                for old, new, length in zip(content, size, sides, strict=True)
            )
            label = np.empty((len(rows), len(columns)), np.uint8)
            for top in range(0, len(rows), TILE):
                for left in range(0, len(columns), TILE):
                    part = program(found, rows[top : top + TILE], columns[left : left + TILE])
                    label[top : top + TILE, left : left + TILE] = part
            return {"label": label[: size[0], : size[1]]}

        return read

    return make_read


def _padded(weights: np.ndarray, side: int) -> np.ndarray:
    """f32[n · TILE, side] of f64[new, old], zeros beyond."""
    new, old = weights.shape
    whole = np.zeros((-(-new // TILE) * TILE, side), np.float32)
    whole[:new, :old] = weights
    return whole


# Programs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Programs:
    """A servable, compiled.

    Attributes:
      servable: what it is of.
      rows: sizes of batches, growing.
      run: (canvas, at most rows[-1] views of it) -> what was found in each. It compiles nothing.
    """

    servable: Servable
    rows: tuple[int, ...]
    run: Callable[[int, Sequence[View]], list[Found]]


def compile_programs(
    servable: Servable, rows: Sequence[int], check: Callable[[], None] = lambda: None
) -> Programs:
    """Compiles one program for each canvas and size of batches, and runs each once.

    Args:
      servable: what is served.
      rows: sizes of batches.
      check: called before each program; what it raises ends all.
    """
    rows = tuple(sorted(set(rows)))
    outputs = machine.jit(servable.outputs)
    compiled, reads = {}, {}
    for canvas, size in enumerate(servable.canvases):
        for count in rows:
            check()
            batch = _batch([], count, size, servable.channels)
            program = outputs.lower(servable.variables, batch).compile()
            compiled[canvas, count] = program
            found = jax.device_get(program(servable.variables, batch))
        like = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in found.items()}
        reads[canvas] = servable.make_read(like)

    def run(canvas: int, views: Sequence[View]) -> list[Found]:
        count = next(size for size in rows if size >= len(views))
        batch = _batch(views, count, servable.canvases[canvas], servable.channels)
        found = jax.device_get(compiled[canvas, count](servable.variables, batch))
        read = reads[canvas]
        return [read(_row_of(found, row), view.size) for row, view in enumerate(views)]

    return Programs(servable, rows, run)


def _batch(views: Sequence[View], rows: int, canvas: Size, channels: int) -> dict[str, np.ndarray]:
    """Views at the top left of canvases; rows without a view are black images of one pixel."""
    image = np.zeros((rows, *canvas, channels), np.uint8)
    size, original = np.ones((2, rows, 2), np.int32)
    for row, view in enumerate(views):
        height, width = view.pixels.shape[:2]
        image[row, :height, :width] = view.pixels
        size[row], original[row] = (height, width), view.size
    return {"image": image, "size": size, "original_size": original}


def _row_of(found: Mapping[str, np.ndarray], row: int) -> Found:
    return {name: array[row] for name, array in found.items()}
