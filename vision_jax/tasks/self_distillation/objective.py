"""Self-distillation: the student learns from other views what its own average says of an image.

DINO (Caron et al. 2021, https://arxiv.org/abs/2104.14294), its algorithm 1; iBOT's masked patches
and DINOv2's spread of features beside it (see ops.self_distillation). Batches are
{"image": uint8[B, H, W, C], "index": i32[B], "mask": bool[B]}; "label", if it is there, is not
looked at.

The teacher is the run's moving average (see objective.Average): it sees the global crops whole and
without dropout, the student all crops, the global ones with masked patches if there are any. The
centers are the model's state.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vision_jax.models.dino import HEAD, PATCH_HEAD
from vision_jax.objective import Apply, Average, Batch, Objective, forward_keys
from vision_jax.ops import multi_crop
from vision_jax.ops import self_distillation as ops
from vision_jax.ops.images import to_float
from vision_jax.ops.multi_crop import Crop
from vision_jax.optim import half_cosine
from vision_jax.tasks.collapse import Watch, Watching, spread

Flat = Mapping[str, jax.Array]

TEACHER = "teacher_ema/"  # how paths of the moving average begin among the frozen arrays
PROTOTYPES = (f"{HEAD}/prototypes", f"{PATCH_HEAD}/prototypes")
GLOBAL = 2  # crops


@dataclass(frozen=True)
class Settings:
    """What the loss is of; the names are those of the section `dino` of a config.

    Attributes:
      global_crops: two of an image.
      local_crops: of an image, None for none.
      grid: (rows, columns) of a global crop's patches.
      student_temperature: of its softmax.
      teacher_temperature: of its softmax, before and after the warm-up.
      temperature_steps: updates of the warm-up.
      momentum: of the teacher, at the first update and at the end.
      total_steps: of the run.
      centering: "center" or "sinkhorn".
      center_momentum: of the moving center.
      frozen_steps: updates before the prototypes train.
      patch_weight: of the masked patches' loss; 0 masks none.
      masked_images: share of the global crops that are masked.
      mask_ratio: smallest and largest share of a masked crop's patches.
      koleo_weight: of the spread of features.
    """

    global_crops: Crop
    local_crops: Crop | None
    grid: tuple[int, int]
    student_temperature: float
    teacher_temperature: tuple[float, float]
    temperature_steps: int
    momentum: tuple[float, float]
    total_steps: int
    centering: str
    center_momentum: float
    frozen_steps: int
    patch_weight: float
    masked_images: float
    mask_ratio: tuple[float, float]
    koleo_weight: float

    def temperature(self, step: jax.Array) -> jax.Array:
        """The teacher's at an update."""
        first, last = self.teacher_temperature
        return ops.teacher_temperature(
            step, first=first, last=last, warmup_steps=self.temperature_steps
        )

    def keeps(self, step: Any) -> jax.Array:
        """The teacher's momentum at an update."""
        first, last = self.momentum
        return half_cosine(step, first=first, last=last, total_steps=self.total_steps)


def make_objective(
    apply: Apply,
    assemble: Callable[[Mapping[str, jax.Array]], Any],
    settings: Settings,
    watch: Watch | None = None,
) -> Objective:
    """The loss f[B] of each image: of its pairs of crops, its masked patches, and its distance.

    The view has "image" f[2·B, S, S, C], an image's global crops one after the other, "local"
    f[L·B, s, s, C], what the teacher says of the former, "target" f[B, 2, K], and the next centers.
    Of masked patches also "masked" bool[2·B, N], "places" i32[2·B, M], "counted" f[2·B, M] and
    "patch_target" f[2·B, M, K']. All crops and masks follow from the step's key.
    """

    def prepare(trainable, frozen, model_state, batch: Batch, key):
        del trainable
        global_key, local_key, mask_key = jax.random.split(key, 3)
        images = to_float(batch["image"])
        crops = multi_crop.make_views(global_key, images, settings.global_crops)
        view = {**batch, "image": multi_crop.in_turn(crops)}
        if settings.local_crops is not None:
            crops = multi_crop.make_views(local_key, images, settings.local_crops)
            view["local"] = multi_crop.in_turn(crops)
        if settings.patch_weight:
            view |= _mask(mask_key, len(view["image"]), settings)
        average, own = _split(frozen)
        outputs, _ = apply(
            assemble({**own, **average}),
            model_state,
            view["image"],
            None,
            view.get("places"),
            train=False,
            keys={},
        )
        return view | jax.lax.stop_gradient(_targets(outputs, model_state, view, settings))

    def forward(trainable, frozen, model_state, view, key, *, train):
        _, own = _split(frozen)
        if settings.frozen_steps:
            trainable = _hold_prototypes(trainable, view["step"] < settings.frozen_steps)
        params = assemble({**trainable, **own})
        global_key, local_key = jax.random.split(key)
        outputs, _ = apply(
            params,
            model_state,
            view["image"],
            view.get("masked"),
            view.get("places"),
            train=train,
            keys=forward_keys(global_key) if train else {},
        )
        if settings.local_crops is not None:
            local, _ = apply(
                params,
                model_state,
                view["local"],
                train=train,
                keys=forward_keys(local_key) if train else {},
            )
            outputs = {**outputs, "local_logits": local["logits"]}
        centers = {name: view[f"next_{name}"] for name in ("center", "patch_center")}
        return outputs, (centers if train else model_state)

    def criterion(trainable, outputs, view):
        del trainable
        count, target = len(view["target"]), view["target"].swapaxes(0, 1)  # [2, B, K]
        student = [multi_crop.by_view(outputs["logits"], count)]  # [2, B, K]
        if settings.local_crops is not None:
            student.append(multi_crop.by_view(outputs["local_logits"], count))
        temperature = settings.student_temperature
        losses = ops.dino_losses(jnp.concatenate(student), target, temperature)
        metrics = {
            "dino": losses.mean(),
            "teacher_entropy": ops.entropy(target).mean(),
            "batch_entropy": ops.entropy(target.mean((0, 1))),
            "feature_spread": spread(multi_crop.by_view(outputs["token"], count)),
            "center_size": jnp.abs(view["next_center"]).max(),
        }
        if settings.patch_weight:
            patches = ops.masked_patch_losses(
                outputs["patch_logits"], view["patch_target"], view["counted"], temperature
            )
            patches = patches.reshape(count, GLOBAL).mean(1)
            losses += settings.patch_weight * patches
            metrics["patch"] = patches.mean()
        if settings.koleo_weight:
            koleo = jax.vmap(ops.koleo_losses)(multi_crop.by_view(outputs["token"], count)).sum(0)
            losses += settings.koleo_weight * koleo
            metrics["koleo"] = koleo.mean()
        return losses, metrics

    return Objective(
        prepare,
        forward,
        criterion,
        average=Average(prefix=TEACHER, decay=settings.keeps),
        make_watch=partial(Watching, watch) if watch is not None else None,
    )


def _split(frozen: Flat) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """(the teacher's arrays, the model's own that do not train)."""
    average = {p.removeprefix(TEACHER): x for p, x in frozen.items() if p.startswith(TEACHER)}
    return average, {p: x for p, x in frozen.items() if not p.startswith(TEACHER)}


def _mask(key: jax.Array, count: int, settings: Settings) -> dict[str, jax.Array]:
    """What is masked of so many crops: all of the patches, and the places of those that are."""
    masked = multi_crop.draw_masks(
        key, count, settings.grid, share=settings.masked_images, ratio=settings.mask_ratio
    )
    most = multi_crop.most_masked(settings.grid, settings.mask_ratio)
    places = jnp.argsort(~masked, axis=1)[:, :most]  # those that are masked first
    counted = jnp.take_along_axis(masked, places, axis=1).astype(jnp.float32)
    return {"masked": masked, "places": places.astype(jnp.int32), "counted": counted}


def _targets(
    outputs: Mapping[str, jax.Array],
    model_state: Mapping[str, jax.Array],
    view: Mapping[str, jax.Array],
    settings: Settings,
) -> dict[str, jax.Array]:
    """What the teacher chooses, by the centers from before this batch, and the centers after it."""
    temperature = settings.temperature(view["step"])
    found: dict[str, jax.Array] = {}

    def choose(logits, name, weights):  # [N, K]
        center = model_state[name]
        if settings.centering == "sinkhorn":
            found[f"next_{name}"] = center
            return ops.sinkhorn_knopp(logits, temperature, weights)
        moved = ops.update_center(center, logits, weights, settings.center_momentum)
        found[f"next_{name}"] = moved
        return ops.centered_probabilities(logits, center, temperature)

    logits = outputs["logits"]  # [2·B, K]
    target = choose(logits, "center", jnp.ones(len(logits), logits.dtype))
    found["target"] = target.reshape(-1, GLOBAL, target.shape[-1])
    if settings.patch_weight:
        logits = outputs["patch_logits"]  # [2·B, M, K']
        rows = logits.reshape(-1, logits.shape[-1])
        chosen = choose(rows, "patch_center", view["counted"].reshape(-1))
        found["patch_target"] = chosen.reshape(logits.shape)
    else:
        found["next_patch_center"] = model_state["patch_center"]
    return found


def _hold_prototypes(trainable: Flat, held: jax.Array) -> dict[str, jax.Array]:
    """Without a gradient while `held`."""
    return {
        path: jnp.where(held, jax.lax.stop_gradient(x), x) if path in PROTOTYPES else x
        for path, x in trainable.items()
    }
