"""Distillation: the student also learns the outputs of teachers on the view that it is shown.

    prepare    the view, and beside it the teacher outputs: logits, boxes, features
    criterion  (1 - share) · loss of the labels + share · loss of the logits + losses of features

A detector's "logits" are queries, detections or cells: what stands in its outputs or is read from
them.

Teachers see the very view that the student is shown, each at its own resolution ("patient and
consistent": Beyer et al. 2022, https://arxiv.org/abs/2106.05237), and before anything attacks it.
So the targets of an adversarial example are the teacher outputs of the plain image: adversarial
training of a distilling objective is robust distillation (Goldblum et al. 2020, 1905.09747).
Teachers are frozen: their arrays are among the frozen ones and get no gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vision_jax.errors import UserError
from vision_jax.objective import Objective, Outputs, View, after, zero_after
from vision_jax.ops import distillation as ops
from vision_jax.ops.boxes import clip_xyxy
from vision_jax.ops.detection_outputs import Postprocess
from vision_jax.ops.distillation import TopLogits
from vision_jax.ops.images import to_float
from vision_jax.ops.resize import resize_bilinear
from vision_jax.steps import Flat
from vision_jax.trees import paths

Array = jax.Array

PROJECTED = ("hint", "patch_tokens")  # these compare channel by channel
TEACHER, PROJECTION = "teacher_", "projection_"  # how paths of arrays that are no student's begin
AVERAGE = "ema"  # the teacher that is the student's own moving average
AVERAGE_PREFIX = f"{TEACHER}{AVERAGE}/"
WAIT = "wait"  # the name of a zero in a view, known once the teachers have run
TEACHER_OUTPUT = "teacher/"  # how names of teacher outputs begin, in a view and in a cache

# forward(frozen, model_state, view) -> {"logits": f[B, C], "features": {layer: f[B, ...]}, ...}
TeacherForward = Callable[[Flat, Any, View], Outputs]
# The loss of one of the teacher outputs: (trainable, outputs, view) -> f[B].
Term = Callable[[Flat, Outputs, View], Array]
# What is kept of a detector's outputs: (outputs, view) -> f[B, ...] by name.
Read = Callable[[Outputs, View], Mapping[str, Array]]
# Outputs of a model with maps that say it all of each cell.
CELLS = ("logits", "object_logits", "box_deltas")


def is_beside(path: str) -> bool:
    """Whether an array is a recipe's and not the model's."""
    return path.startswith((TEACHER, PROJECTION))


def distill(
    objective: Objective,
    *,
    teacher_outputs: Callable[[Flat, Any, View], Mapping[str, Array]],
    terms: Mapping[str, tuple[float, Term]],
    share: float,
    image_size: tuple[int, int] | None = None,
    label_head: str = "",
    sharded: bool = False,
    counted: Sequence[str] = (),
) -> Objective:
    """An objective whose student also learns the teacher outputs.

    Args:
      objective: of the labels.
      teacher_outputs: (frozen, model_state, view) -> what is added to the view, f[B, ...] by name.
        Its gradient is stopped. It is not called where the batch brings cached teacher outputs.
      terms: by name, for the metrics: (weight, loss).
      share: in [0, 1], taken from the loss of the labels (the terms have weights of their own).
      image_size: (height, width) of the student, where a teacher takes larger views.
      label_head: of two heads (DeiT) the one that learns the labels; "" for the logits of both.
      sharded: the student's parameters are, and are gathered only once the teachers have run. It
        takes one more copy of a device's part of them.
      counted: terms that are sums, divided by the same count as the labels' (Objective.counted), so
        that micro-batches add up to their batch.
    """

    def prepare(trainable, frozen, model_state, batch, key):
        view = objective.prepare(trainable, frozen, model_state, batch, key)
        learned = {name: array for name, array in batch.items() if name.startswith(TEACHER_OUTPUT)}
        if not learned:
            # Compiled as if alone, so that cached teacher outputs are bit-identical to live ones.
            seen = lax.optimization_barrier({n: x for n, x in view.items() if n != "step"})
            learned = lax.optimization_barrier(dict(teacher_outputs(frozen, model_state, seen)))
            learned = lax.stop_gradient(learned)
        # Of cached ones too, for the student to be compiled as it is beside a live teacher.
        zero = zero_after(*learned.values())
        # The index too: attacks draw by it.
        held = {name: after(zero, view[name]) for name in ("image", "index")}
        view = {**view, **learned, **held}
        if sharded:
            view[WAIT] = zero
        if image_size is not None:
            view = {**view, "image": resize(view["image"], image_size)}
        return view

    def forward(trainable, frozen, model_state, view, key, *, train):
        if WAIT in view:
            own = {path: leaf for path, leaf in frozen.items() if not path.startswith(TEACHER)}
            trainable, own = jax.tree.map(partial(after, view[WAIT]), (trainable, own))
            frozen = {**frozen, **own}
        return objective.forward(trainable, frozen, model_state, view, key, train=train)

    def criterion(trainable, outputs, view):
        labelled = outputs
        if label_head:
            labelled = {**outputs, "logits": outputs["features"][label_head]}
        losses, metrics = objective.criterion(trainable, labelled, view)
        total = (1 - share) * losses
        for name, (weight, term) in terms.items():
            term_losses = term(trainable, outputs, view)
            if name in counted:
                term_losses *= len(losses) / jnp.maximum(metrics[objective.counted], 1)
            total += weight * term_losses
            metrics = {**metrics, name: term_losses.mean()}
        return total, metrics

    return Objective(prepare, forward, criterion)


# Teachers -----------------------------------------------------------------------------------------


def make_teacher_forward(
    apply: Callable[..., tuple[Outputs, Any]],
    prefix: str,
    like: Mapping[str, Any],
    image_size: tuple[int, int] | None,
    channels: int,
) -> TeacherForward:
    """A model as a teacher.

    Args:
      apply: the model (see objective.Apply).
      prefix: of its arrays' paths among the frozen ones.
      like: its abstract "params" and "batch_stats".
      image_size: that it takes, (height, width) in pixels; None leaves images as they are.
      channels: that it takes.
    """

    def forward(frozen, model_state, view):
        del model_state
        own = {
            name: paths.unflatten(tree, taken_from(frozen, f"{prefix}{name}/"))
            for name, tree in like.items()
        }
        images = to_channels(view["image"], channels)
        mask = [view["pixel_mask"][..., 0]] if "pixel_mask" in view else []
        if image_size is not None:
            images = resize(images, image_size)
            mask = [_nearest(one, image_size) for one in mask]
        return apply(
            own["params"], own.get("batch_stats", {}), images, *mask, train=False, keys={}
        )[0]

    return forward


def make_average_forward(objective: Objective) -> TeacherForward:
    """The student's moving average as a teacher; steps.make_train_step puts it into `frozen`.

    Its BatchNorm statistics are the average's own.
    """

    def forward(frozen, model_state, view):
        average = taken_from(frozen, AVERAGE_PREFIX)
        statistics, average = paths.partition(average, set(paths.flatten(model_state)))
        rest = {path: leaf for path, leaf in frozen.items() if not path.startswith(AVERAGE_PREFIX)}
        key = jax.random.key(0)  # nothing is drawn
        model_state = paths.unflatten(model_state, statistics)
        return objective.forward(average, rest, model_state, view, key, train=False)[0]

    return forward


def make_teacher_outputs(
    forwards: Sequence[TeacherForward],
    *,
    logits: str,
    temperature: float,
    weights: Sequence[float] = (),
    top_k: int = 0,
    layers: Sequence[str] = (),
    read: Read | None = None,
) -> Callable[[Flat, Any, View], dict[str, Array]]:
    """The outputs of all teachers together on a view, in the form in which they may be cached.

    Args:
      forwards: of the teachers.
      logits: kind of the loss of the logits, as config.distill.logits.
      temperature: of the loss of the logits, at which several teachers' probabilities are averaged.
      weights: of the teachers; () for equal ones.
      top_k: so many logits are kept (see ops.distillation.compress_logits); 0 for all.
      layers: features of the first teacher, by name.
      read: of a detector, the one teacher, what is kept in place of logits.
    """

    def teacher_outputs(frozen, model_state, view):
        outputs = [forward(frozen, model_state, view) for forward in forwards]
        found = {f"{TEACHER_OUTPUT}{name}": outputs[0]["features"][name] for name in layers}
        if read is not None:
            found |= {TEACHER_OUTPUT + name: x for name, x in read(outputs[0], view).items()}
        elif logits != "none":
            together = outputs[0]["logits"]
            if len(outputs) > 1:
                together = ops.ensemble_logits(
                    jnp.stack([own["logits"] for own in outputs]),
                    weights or [1.0] * len(outputs),
                    1.0 if logits == "hard" else temperature,
                )
            if top_k:
                top = ops.compress_logits(together, top_k, temperature)
                found |= {TEACHER_OUTPUT + name: array for name, array in top._asdict().items()}
            else:
                found[f"{TEACHER_OUTPUT}logits"] = together.astype(
                    np.promote_types(together.dtype, np.float32)
                )
        return found

    return teacher_outputs


def read_queries(outputs: Outputs, view: View) -> dict[str, Array]:
    """A DETR's queries, of the last decoder layer."""
    del view
    return {name: outputs[name][-1] for name in ("logits", "boxes_cxcywh_01")}


def read_cells(outputs: Outputs, view: View) -> dict[str, Array]:
    """What a YOLOX says of each cell."""
    del view
    return {name: outputs[name] for name in CELLS}


def make_read_detections(postprocess: Postprocess, most: int) -> Read:
    """The best boxes of any detector on the view, `most` of them or as many as it gives.

    "score" f[B, N] by falling score, "label" i32[B, N] and "boxes_xyxy_px" f[B, N, 4] on the
    student's canvas, clipped to the image.
    """

    def read(outputs, view):
        found = postprocess(outputs, view["size"])
        score, best = lax.top_k(found["score"], min(most, found["score"].shape[1]))
        boxes = jnp.take_along_axis(found["boxes_xyxy_px"], best[..., None], axis=1)
        return {
            "score": score,
            "label": jnp.take_along_axis(found["label"], best, axis=1),
            "boxes_xyxy_px": clip_xyxy(boxes, view["size"][:, None]),
        }

    return read


def teacher_logits_of(view: View, num_classes: int) -> Array:
    """The teacher logits f[B, C] of a view, which holds all of them or the largest."""
    if f"{TEACHER_OUTPUT}logits" in view:
        return view[f"{TEACHER_OUTPUT}logits"]
    top = TopLogits(*(view[TEACHER_OUTPUT + name] for name in TopLogits._fields))
    return ops.expand_logits(top, num_classes)


# Terms --------------------------------------------------------------------------------------------


def make_logits_term(
    kind: Literal["soft", "hard", "decoupled"], *, temperature: float, head: str = ""
) -> Term:
    """The loss of the student's logits, or of the head that is named (DeiT), to the teacher's."""

    def term(trainable, outputs, view):
        del trainable
        logits = outputs["features"][head] if head else outputs["logits"]
        teacher_logits = teacher_logits_of(view, logits.shape[-1])
        if kind == "soft":
            return ops.soft_logits(logits, teacher_logits, temperature)
        if kind == "hard":
            return ops.hard_label(logits, teacher_logits)
        return ops.decoupled(logits, teacher_logits, view["label"], temperature=temperature)

    return term


def make_pixels_term(kind: Literal["soft", "hard"], *, temperature: float) -> Term:
    """The loss of the student's logits of pixels to the teacher's, a mean over all pixels.

    The teacher's are brought to the student's grid where theirs is another, bilinear.
    """

    def term(trainable, outputs, view):
        del trainable
        logits = outputs["logits"]  # [B, h, w, K]
        theirs = resize_bilinear(view[f"{TEACHER_OUTPUT}logits"], logits.shape[1:3])
        if kind == "soft":
            return ops.soft_logits(logits, theirs, temperature).mean((1, 2))
        return ops.hard_label(logits, theirs).mean((1, 2))

    return term


def make_queries_term(*, sigmoid: bool, temperature: float, num_queries: int) -> Term:
    """The loss of a detector's queries, of its first group if it has several, to the teacher's."""

    def term(trainable, outputs, view):
        del trainable
        last = (outputs[name][-1][:, :num_queries] for name in ("logits", "boxes_cxcywh_01"))
        theirs = (view[TEACHER_OUTPUT + name] for name in ("logits", "boxes_cxcywh_01"))
        return ops.detr_queries(*last, *theirs, sigmoid=sigmoid, temperature=temperature)

    return term


def make_detections_term(*, strides: Sequence[int], least_score: float) -> Term:
    """The loss of a YOLOX' cells to what the teacher has found; of `distill`'s `counted`."""

    def term(trainable, outputs, view):
        del trainable
        said = [outputs[name] for name in CELLS]
        told = [view[TEACHER_OUTPUT + name] for name in ("score", "label", "boxes_xyxy_px")]
        return ops.yolox_detections(
            *[*said, *told, view["mask"]],
            canvas=view["image"].shape[1:3],
            strides=strides,
            least_score=least_score,
        )

    return term


def make_cells_term(*, strides: Sequence[int], temperature: float) -> Term:
    """The loss of a YOLOX' cells to those of another; of `distill`'s `counted`."""

    def term(trainable, outputs, view):
        del trainable
        said = [outputs[name] for name in CELLS]
        told = [view[TEACHER_OUTPUT + name] for name in CELLS]
        return ops.yolox_cells(
            *[*said, *told, view["mask"]],
            canvas=view["image"].shape[1:3],
            strides=strides,
            temperature=temperature,
        )

    return term


class Layout(NamedTuple):
    """How a model's tokens lie: `num_prefix` in front, then a `grid` (rows, columns) of patches.

    None for models whose features are maps.
    """

    grid: tuple[int, int] | None
    num_prefix: int


@dataclass(frozen=True)
class Match:
    """A layer of the student and the layer of the first teacher whose features it learns.

    Attributes:
      kind: of FEATURES.
      layer, teacher_layer: names of features.
      projection: path of the kernel f[C, C'] among the trainable arrays, that brings the student's
        channels to the teacher's; "" where it needs none.
    """

    kind: str
    layer: str
    teacher_layer: str
    projection: str = ""


def make_features_term(match: Match, layout: Layout, teacher_layout: Layout) -> Term:
    """The loss of the features of a layer of the student to those of a layer of the teacher."""

    def term(trainable, outputs, view):
        features = outputs["features"][match.layer]
        theirs = view[TEACHER_OUTPUT + match.teacher_layer]
        if match.kind == "attention_maps":
            return ops.attention_maps(features, theirs)
        if match.kind.startswith("relational"):
            compare = getattr(ops, match.kind)
            return compare(*(_one_vector(x) for x in (features, theirs)))
        features, theirs = _on_grid(features, layout), _on_grid(theirs, teacher_layout)
        if features.ndim == 4:
            theirs = ops.to_grid(theirs, (features.shape[1], features.shape[2]))
        if match.projection:
            kernel = trainable[match.projection]
            features = jnp.matmul(features, kernel.astype(features.dtype))
        return getattr(ops, match.kind)(features, theirs)

    return term


def project(key: Array, shape: tuple[int, int]) -> Array:
    """The kernel of a projection before training: normal, the size of features kept."""
    return jax.random.normal(key, shape) / jnp.sqrt(shape[0])


def _on_grid(features: Array, layout: Layout) -> Array:
    """f[B, h, w, C] of maps, or of tokens without those in front."""
    if features.ndim != 3 or layout.grid is None:
        return features
    rows, columns = layout.grid
    if features.shape[1] != layout.num_prefix + rows * columns:
        raise UserError(
            f"config.distill.features: {features.shape[1]} tokens, some of which have merged, are "
            f"no grid of {rows} x {columns}: take a layer in front of that, or relational_distance"
        )
    return features[:, layout.num_prefix :].reshape(len(features), rows, columns, -1)


def _one_vector(features: Array) -> Array:
    """f[B, C]: the mean over places."""
    return features.mean(tuple(range(1, features.ndim - 1))) if features.ndim > 2 else features


# Parts --------------------------------------------------------------------------------------------


def taken_from(flat: Flat, prefix: str) -> Flat:
    """The arrays under a prefix, by the rest of their paths."""
    return {
        path.removeprefix(prefix): leaf for path, leaf in flat.items() if path.startswith(prefix)
    }


def resize(images: Array, size: tuple[int, int]) -> Array:
    """f[B, h, w, C] -> f[B, *size, C], cubic and antialiased, still in [0, 1]."""
    if images.shape[1:3] == size:
        return images
    shape = (len(images), *size, images.shape[-1])
    return jnp.clip(jax.image.resize(to_float(images), shape, "cubic", antialias=True), 0, 1)


def _nearest(mask: Array, size: tuple[int, int]) -> Array:
    """bool[B, h, w] -> bool[B, *size]."""
    shape = (len(mask), *size)
    return mask if mask.shape == shape else jax.image.resize(mask, shape, "nearest")


def to_channels(images: Array, channels: int) -> Array:
    """Grey to color; other numbers of channels must agree.

    Raises:
      UserError: they don't.
    """
    own = images.shape[-1]
    if own not in (1, channels):
        raise UserError(
            f"config.distill.teachers: a teacher takes {channels} channels, and images have {own}"
        )
    return jnp.repeat(images, channels // own, axis=-1)
