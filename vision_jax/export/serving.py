"""One function from images as they come to what a person asks for; every format is written of it.

serving = serving_function(load("runs/vit_lora"))
outputs = jax.jit(serving.function)(images)        # u8[B, H, W, C], of any H and W
outputs = jax.jit(serving.function)(images, sizes) # each image at the top left of its canvas
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from vision_jax.data.segmentation_transforms import SegmentationPreprocessing
from vision_jax.errors import UserError
from vision_jax.export.preprocessing import make_view
from vision_jax.loaded import Loaded
from vision_jax.ops.detection_outputs import POSTPROCESS
from vision_jax.tasks.segmentation.objective import PREDICTIONS as SEGMENTERS
from vision_jax.tasks.segmentation.objective import unpad_scores
from vision_jax.trees import factored, quantize

CLASSES = {
    "logits": "f32[B, K]",
    "probabilities": "f32[B, K], their softmax",
}
BOXES = {
    "score": "f32[B, N], 0 of what is no box",
    "label": "i32[B, N], a place in class_names",
    "boxes_xyxy_px": "f32[B, N, 4], left, top, right and bottom in pixels of the image that came",
}
PIXELS = {
    "label": "i32[B, H, W], for each pixel of the image that came a place in class_names",
    "scores": "f32[B, h, w, K], on the model's own grid",
}
FEATURES = {"features": "f32[B, D], of the image"}


@dataclass(frozen=True)
class Serving:
    """A model from images to answers.

    Attributes:
      function: (images u8[B, H, W, C], sizes i32[B, 2] = None) -> {name: array}, by `outputs`. It
        holds the parameters. With `sizes`, (height, width), images of several sizes lie at the top
        left of a canvas; what is outside does not count.
      view: the same -> f32[B, h, w, C] in [0, 1], what the model sees.
      outputs: name -> what it is.
      image_size: (height, width) that H and W must be; None: any.
      channels: C.
      class_names: by label; () for features.
      kind: "classes", "boxes", "pixels" or "features".
      int8: the kernels that are quantized to it, by path.
    """

    function: Callable[..., dict[str, jax.Array]]
    view: Callable[..., jax.Array]
    outputs: Mapping[str, str]
    image_size: tuple[int, int] | None
    channels: int
    class_names: tuple[str, ...]
    kind: str
    int8: Mapping[str, quantize.Integers] = field(default_factory=dict)

    @property
    def rounds_inputs(self) -> bool:
        """Whether products of kernels in int8 are of integers."""
        return any(kernel.inputs != "float" for kernel in self.int8.values())

    def images_spec(self, batch: int | None, image_size: tuple[int, int] | None = None) -> Any:
        """The images that the function is traced with.

        Args:
          batch: images at once; None: any number.
          image_size: (height, width); None: `self.image_size`, and without it any.
        """
        size = image_size or self.image_size
        sides = ["h", "w"] if size is None else [str(side) for side in size]
        shape = ["b" if batch is None else str(batch), *sides, str(self.channels)]
        return jax.ShapeDtypeStruct(jax.export.symbolic_shape(", ".join(shape)), jnp.uint8)


def serving_function(
    loaded: Loaded,
    variables: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    *,
    integers: bool = True,
) -> Serving:
    """The model with preprocessing and postprocessing around it, all of them pure.

    Traced inside of `platform.traced_for(platform.ANY)` it is of operations that every format has.

    Args:
      loaded: a model that classifies images, finds boxes or segments; others give features.
      variables: its arrays, or trained ones; adapters and kernels in 4 bits are merged.
      image_size: (height, width) of the images that will come; None: any. A segmenter that takes
        images as they are, by their short side or padded must know: its own size by default.
      integers: kernels in int8 multiply as they do in the model. Else the function has them in
        float, for a format that gets `Serving.int8` by other means.

    Raises:
      UserError: a segmenter of windows, an image_size that is none.
    """
    own = loaded.preprocessing
    if image_size is not None and min(image_size) < 1:
        raise UserError(f"image_size {image_size}: give (height, width) in pixels")
    if isinstance(own, SegmentationPreprocessing):
        if own.view == "windows":
            raise UserError(
                f"{loaded.origin}: it sees images in windows, as many as an image needs, and a "
                "graph has a fixed number: train it with config.data.view=squash to export it"
            )
        if own.view != "squash" and image_size is None:
            image_size = own.image_size
    given = loaded.variables if variables is None else variables
    int8, statistics = quantize.int8_kernels(given["params"]), given.get("batch_stats", {})
    params = (quantize.merge_but_int8 if integers else factored.merge)(given["params"])
    run = {name: False for name in ("scan", "remat") if hasattr(loaded.model, name)}
    loaded = replace(loaded, model=loaded.model.clone(dtype=jnp.float32, **run))
    kind, outputs, answer = _answers(loaded)

    def function(images: jax.Array, sizes: jax.Array | None = None) -> dict[str, jax.Array]:
        view = make_view(images, own, sizes)
        masks = []
        if loaded.family.pixel_mask:
            masks = [jnp.broadcast_to(view.inside, view.images.shape[:3])]
        found = loaded.apply({"params": params, "batch_stats": statistics}, view.images, *masks)
        return answer(found, images, sizes)

    return Serving(
        function,
        lambda images, sizes=None: make_view(images, own, sizes).images,
        outputs,
        image_size,
        loaded.model.in_channels,
        loaded.class_names,
        kind,
        int8,
    )


def _answers(loaded: Loaded) -> tuple[str, Mapping[str, str], Callable[..., Any]]:
    """(kind, outputs, (the model's outputs, images, sizes) -> these)."""
    predicts = loaded.family.predicts
    if predicts in POSTPROCESS:
        return "boxes", BOXES, lambda found, *given: POSTPROCESS[predicts](found, _sizes(*given))
    if predicts in SEGMENTERS:
        own = loaded.preprocessing
        scores_of = whole = SEGMENTERS[predicts].scores
        if isinstance(own, SegmentationPreprocessing) and own.view == "pad":
            whole = unpad_scores(scores_of, own.image_size[0])

        def segment(found, images, sizes):
            if sizes is not None:
                raise UserError("sizes: of a segmenter's batch all images have one: leave them out")
            grid = found["mask_logits"].shape[-2:] if "mask_logits" in found else None
            grid = grid or found["logits"].shape[1:3]
            large = whole(found, images.shape[1:3])
            label = jnp.argmax(large, axis=-1).astype(jnp.int32)
            return {"label": label, "scores": scores_of(found, grid)}

        return "pixels", PIXELS, segment
    if predicts == "classes" and loaded.class_names:
        return (
            "classes",
            CLASSES,
            lambda found, *_: {
                "logits": found["logits"],
                "probabilities": jax.nn.softmax(found["logits"], axis=-1),
            },
        )
    return "features", FEATURES, lambda found, *_: {"features": found["logits"]}


def _sizes(images: jax.Array, sizes: jax.Array | None) -> jax.Array:
    """i32[B, 2] of the images that came."""
    if sizes is not None:
        return sizes.astype(jnp.int32)
    sides = jnp.stack([jnp.asarray(side, jnp.int32) for side in images.shape[1:3]])
    return jnp.broadcast_to(sides[None], (images.shape[0], 2))
