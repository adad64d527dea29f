"""From a name and numbers to an optax transformation, and the average of the weights.

Parameters come as one flat dict of the trainable arrays, {path: array}, with '/'-joined paths such
as `block_0/attn/qkv/kernel`. A gradient passes, in this order: clipping by its global norm, the
optimizer's rule with weight decay and the learning rate, and the factor of its layer.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from vision_jax.errors import UserError
from vision_jax.ops.traced import is_known, is_on
from vision_jax.trees import paths

Array = jax.Array
Schedule = Callable[[jax.typing.ArrayLike], Array]

SCHEDULES = ("cosine", "linear", "constant", "step")
OPTIMIZERS = ("adamw", "sgd", "lars", "lamb", "lion", "muon")


def make_schedule(
    name: str,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
    drop_at: float = 2 / 3,
) -> Schedule:
    """The learning rate as a function of the 0-based index of the update.

    The n-th of `warmup_steps` updates, counted from 1, has the rate `peak · n / warmup_steps`: the
    first one changes something and the last one has the peak. From there the rate falls along half
    a cosine or a line, is the peak at update `warmup_steps` and would reach `peak · final_fraction`
    at update `total_steps`; the last update has index `total_steps - 1` and is one step above that.
    "constant" stays at `peak` and ignores `final_fraction`. "step" falls to a tenth once, at update
    `drop_at · total_steps`, as detectors' schedules do (DETR: 200 of 300 epochs), and ignores it
    too. Past `total_steps` the rate stays at its end.

    Examples:
      >>> rate = make_schedule("linear", peak=0.5, total_steps=6, warmup_steps=2)
      >>> [round(float(rate(step)), 3) for step in range(7)]
      [0.25, 0.5, 0.5, 0.375, 0.25, 0.125, 0.0]

    Raises:
      UserError: an unknown name, or numbers that make no schedule.
    """
    _check_name("schedule", name, SCHEDULES)
    if total_steps < 1:
        raise UserError(f"total_steps must be at least 1, not {total_steps}")
    if not 0 <= warmup_steps <= total_steps:
        raise UserError(
            f"warmup_steps must lie between 0 and total_steps = {total_steps}, not {warmup_steps}: "
            "shorten the warm-up or train longer"
        )
    if is_known(peak) and not (math.isfinite(peak) and peak >= 0):
        raise UserError(f"the peak learning rate must be finite and not negative, not {peak}")
    if not 0 <= final_fraction <= 1:
        raise UserError(f"final_fraction must lie between 0 and 1, not {final_fraction}")
    if is_known(drop_at) and not 0 < drop_at <= 1:
        raise UserError(f"drop_at must be above 0 and at most 1, not {drop_at}")
    decay_steps, drop = max(total_steps - warmup_steps, 1), drop_at * total_steps

    def schedule(step: jax.typing.ArrayLike) -> Array:
        step = jnp.asarray(step)
        progress = jnp.clip((step - warmup_steps) / decay_steps, 0.0, 1.0)
        warming = peak * ((step + 1) / max(warmup_steps, 1))
        if name == "cosine":
            remaining = (1 + jnp.cos(jnp.pi * progress)) / 2
        elif name == "linear":
            remaining = 1 - progress
        elif name == "step":
            return jnp.where(step < warmup_steps, warming, jnp.where(step < drop, peak, peak / 10))
        else:
            remaining = jnp.ones_like(progress)
        rate = peak * (final_fraction + (1 - final_fraction) * remaining)
        return jnp.where(step < warmup_steps, warming, rate)

    return schedule


def make_optimizer(
    name: str,
    *,
    schedule: Schedule,
    params: Mapping[str, Array],
    weight_decay: float = 0.0,
    decay_schedule: Schedule | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum: float = 0.9,
    clip_norm: float = 0.0,
    layer_of: Callable[[str], int] | None = None,
    num_layers: int = 1,
    layer_decay: float = 1.0,
    lr_multipliers: Sequence[tuple[str, float]] = (),
) -> optax.GradientTransformationExtraArgs:
    """The whole chain from a gradient to the number that is added to each parameter.

    With lr the schedule's rate and λ the weight decay of the arrays that `is_decayed` names:

    - adamw: Loshchilov and Hutter 2019, as torch.optim.AdamW: θ -= lr · (Adam(g) + λθ).
    - sgd: heavy-ball momentum with coupled decay, as torch.optim.SGD: the momentum sees g + λθ.
    - lars: You et al. 2017, https://arxiv.org/abs/1708.03888, eq. 6: coupled decay, g + λθ times
      0.001 · ‖θ‖ / (‖g‖ + λ‖θ‖), as in timm; arrays without decay get plain momentum SGD, as is
      customary for biases and norms.
    - lamb: You et al. 2020; arrays without decay get a trust ratio of 1, as in timm.
    - lion: Chen et al. 2023, decoupled decay. Its usual rate is a tenth of AdamW's.
    - muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon (Nesterov momentum without
      bias correction, five Newton-Schulz steps), as torch.optim.Muon in more precise arithmetic,
      with `momentum` for the kernels that `is_orthogonalized` names; Adam with `b1`, `b2`, `eps`
      for the rest, decoupled decay. Its updates are scaled to the size of AdamW's
      (0.2 · sqrt(max(in, out)), Liu et al. 2025, https://arxiv.org/abs/2502.16982, eq. 4), so that
      AdamW's rate and decay serve both.

    Args:
      name: one of the above.
      schedule: 0-based update index -> learning rate.
      params: the trainable arrays by path; only their paths and shapes are read.
      weight_decay: λ.
      decay_schedule: λ by the 0-based index of the update instead; not of lars, whose rule it is a
        part of.
      b1: decay of the first moment (adamw, lamb, lion, muon's Adam).
      b2: decay of the second moment (the same; Lion's usual value is 0.99).
      eps: added to the root of the second moment (adamw, lamb, muon's Adam).
      momentum: of sgd, lars and muon (whose usual value is 0.95).
      clip_norm: largest global norm of the gradient, scaled down to it before all else; 0 is off.
      layer_of: path -> layer, from 0 (embeddings) to num_layers - 1 (head).
      num_layers: how many layers `layer_of` counts.
      layer_decay: update and decay of layer l are multiplied by layer_decay^(num_layers - 1 - l),
        as timm's lr_scale does (param_groups_layer_decay); 1 is off.
      lr_multipliers: (regex over whole paths, factor of update and decay); the first that matches
        counts, a rule that matches nothing is an error. A detector's backbone:
        (("backbone/.*", 0.1),).

    Raises:
      UserError: an unknown name, a number out of range, or a layer out of range.
    """
    _check_name("optimizer", name, OPTIMIZERS)
    for field, value in (("b1", b1), ("b2", b2), ("momentum", momentum)):
        if is_known(value) and not 0 <= value < 1:
            raise UserError(f"{field} must be at least 0 and below 1, not {value}")
    for field, value in (("weight_decay", weight_decay), ("clip_norm", clip_norm), ("eps", eps)):
        if is_known(value) and not (math.isfinite(value) and value >= 0):
            raise UserError(f"{field} must be finite and not negative, not {value}")
    if is_known(layer_decay) and not 0 < layer_decay <= 1:
        raise UserError(f"layer_decay must be above 0 and at most 1, not {layer_decay}")

    decayed = {path: is_decayed(path, array) for path, array in params.items()}
    if decay_schedule is not None and name == "lars":
        raise UserError("config.optim.final_weight_decay: lars has one weight decay: set it to 0")
    decay = optax.add_decayed_weights(decay_schedule or weight_decay, mask=decayed)
    descend = optax.scale_by_learning_rate(schedule)
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if name == "adamw":
        rule = [adam, decay, descend]
    elif name == "sgd":
        rule = [decay, optax.trace(momentum), descend]
    elif name == "lars":
        # The rate enters before the momentum, as in the paper's algorithm 1.
        rule = [_lars_direction(decayed, weight_decay), descend, optax.trace(momentum)]
    elif name == "lamb":
        rule = [adam, decay, optax.masked(optax.scale_by_trust_ratio(), decayed), descend]
    elif name == "lion":
        rule = [optax.scale_by_lion(b1=b1, b2=b2), decay, descend]
    else:
        rule = [_muon_or_adam(params, momentum, adam), decay, descend]

    clip = [_clip(clip_norm)] if is_on(clip_norm) else []
    factors: dict[str, float] = {}
    if not is_known(layer_decay) or layer_decay < 1:
        if layer_of is None:
            raise UserError(f"layer_decay = {layer_decay} needs layer_of, which counts the layers")
        depths = {path: layer_of(path) for path in params}
        factors = _layer_factors(depths, num_layers, layer_decay)
    if lr_multipliers:
        patterns = [pattern for pattern, _ in lr_multipliers]
        field, kind = "config.optim.lr_multipliers", "parameter that is trained (config.trainable)"
        paths.select(params, patterns, field=field, kind=kind)
        for path in params:
            chosen = (factor for pattern, factor in lr_multipliers if re.fullmatch(pattern, path))
            factors[path] = factors.get(path, 1.0) * next(chosen, 1.0)
    scale = [_scale_paths(factors)] if factors else []
    return optax.chain(*clip, *rule, *scale)


def _clip(largest: float) -> optax.GradientTransformationExtraArgs:
    """Gradients times one number, so that their global norm is at most the largest.

    Who knows the norm already gives it as `grad_norm`. optax's own divides each array by the norm,
    which XLA's compiler for CPUs writes out for all of them before the optimizer reads them.
    """

    def update(
        updates: dict[str, Array],
        state: optax.EmptyState,
        params: object = None,
        *,
        grad_norm: Array | None = None,
        **others: object,
    ) -> tuple[dict[str, Array], optax.EmptyState]:
        del params, others
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        factor = jnp.where(norm > largest, largest / norm, 1)
        clipped = {path: update * factor.astype(update.dtype) for path, update in updates.items()}
        return clipped, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def half_cosine(
    step: jax.typing.ArrayLike, *, first: float, last: float, total_steps: int
) -> Array:
    """From `first` at update 0 to `last` at update `total_steps`, along half a cosine.

    Examples:
      >>> [round(float(half_cosine(t, first=0.9, last=1, total_steps=4)), 4) for t in (0, 2, 9)]
      [0.9, 0.95, 1.0]
    """
    progress = jnp.clip(jnp.asarray(step, jnp.float32) / total_steps, 0, 1)
    return last - (last - first) * (jnp.cos(jnp.pi * progress) + 1) / 2


def is_decayed(path: str, array: Array) -> bool:
    """Whether weight decay applies: to kernels, not to biases, norms, tokens or positions.

    Positions are tables, absolute or relative, and what computes them in Swin v2, whose attention's
    `logit_scale` does not decay either: as timm's `no_weight_decay` of each model has it.

    LoRA's factors count as kernels, as in the Hugging Face trainer: decay pulls the update, and not
    the merged weight, towards zero. DoRA's magnitude and LayerScale are vectors and do not decay.

    Examples:
      >>> vector, matrix = jnp.zeros(2), jnp.zeros((2, 2))
      >>> is_decayed("head/kernel", matrix), is_decayed("pos_embed", matrix)
      (True, False)
    """
    positions = ("_embed", "_token", "relative_position_bias_table", "logit_scale")
    return array.ndim >= 2 and not path.endswith(positions) and "/cpb_mlp/" not in path


def is_orthogonalized(path: str, array: Array) -> bool:
    """Whether Muon updates an array: a kernel, or a factor of one, between embedding and head."""
    names = path.split("/")
    outside = names[0].startswith("head") or "patch_embed" in names
    return array.ndim >= 2 and "kernel" in names and not outside


def update_ema(
    ema: Mapping[str, Array], arrays: Mapping[str, Array], decay: float, step: jax.typing.ArrayLike
) -> dict[str, Array]:
    """One step of the exponential moving average of weights and statistics, in the dtype of `ema`.

    Integers (BatchNorm's count of updates) are taken as they are, as timm's ModelEmaV3 does. The
    decay warms up as min(decay, (1 + t) / (10 + t)) with t the 0-based index of the update, so
    that the first weights are soon forgotten (tf.train.ExponentialMovingAverage, `num_updates`).
    """
    t = jnp.asarray(step, jnp.float32)
    return move_average(ema, arrays, jnp.minimum(decay, (1 + t) / (10 + t)))


def move_average(
    ema: Mapping[str, Array], arrays: Mapping[str, Array], decay: Array
) -> dict[str, Array]:
    """`update_ema` with the decay as it is."""
    rate = 1 - decay

    def follow(average: Array, array: Array) -> Array:
        array = array.astype(average.dtype)
        if not jnp.issubdtype(average.dtype, jnp.floating):
            return array
        return average + rate.astype(average.dtype) * (array - average)

    return {path: follow(average, arrays[path]) for path, average in ema.items()}


def _lars_direction(
    decayed: Mapping[str, bool], weight_decay: float
) -> optax.GradientTransformation:
    """The decayed arrays' g + λθ, as long as LARS has it; the gradient of the others."""

    def direct(path: str, gradient: Array, array: Array) -> Array:
        if not decayed[path]:
            return gradient
        size, steepness = jnp.linalg.norm(array), jnp.linalg.norm(gradient)
        trust = 0.001 * size / (steepness + weight_decay * size + 1e-8)
        trust = jnp.where((size > 0) & (steepness > 0), trust, 1.0)
        return trust * (gradient + weight_decay * array)

    def update(updates: dict[str, Array], params: dict[str, Array]) -> dict[str, Array]:
        return {path: direct(path, update, params[path]) for path, update in updates.items()}

    return optax.stateless(update)


def _muon_or_adam(
    params: Mapping[str, Array], momentum: float, adam: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Muon's direction for the kernels inside, Adam's for the rest.

    optax.contrib.muon itself cannot be used: it decays all of its Adam's arrays or none, and
    corrects the bias of its momentum, which shifts the weight between gradient and momentum.
    """
    labels = {
        path: "muon" if is_orthogonalized(path, array) else "adam" for path, array in params.items()
    }
    axes = {path: _input_axes(a) for path, a in params.items() if labels[path] == "muon"}
    fans = {
        path: max(params[path].shape[-1], math.prod(params[path].shape[axis] for axis in inputs))
        for path, inputs in axes.items()
    }

    def dimensions(updates: dict[str, Any]) -> dict[str, Any]:
        # Adam's arrays are placeholders in `updates` here, and stay so.
        return {
            path: contrib.MuonDimensionNumbers(axes[path], -1) if path in axes else update
            for path, update in updates.items()
        }

    def match_adam(updates: dict[str, Any], params: object) -> dict[str, Any]:
        del params
        return {
            path: 0.2 * math.sqrt(fans[path]) * update if path in fans else update
            for path, update in updates.items()
        }

    newton_schulz = contrib.scale_by_muon(
        beta=0.0, nesterov=False, eps=1e-7, weight_dimension_numbers=dimensions
    )

    def orthogonalize(updates: dict[str, Any], params: object) -> Any:
        del params
        return newton_schulz.update(updates, newton_schulz.init(updates))[0]

    muon = optax.chain(
        optax.trace(momentum, nesterov=True),
        optax.scale(1 - momentum),
        optax.stateless(orthogonalize),
        optax.stateless(match_adam),
    )
    return optax.partition({"muon": muon, "adam": adam}, labels)


def _input_axes(kernel: Array) -> tuple[int, ...]:
    """Of a kernel [in, out], [P, in, out] with P separate parts, or [h, w, in, out]."""
    return (0, 1, 2) if kernel.ndim == 4 else (kernel.ndim - 2,)


def _layer_factors(
    depths: Mapping[str, int], num_layers: int, layer_decay: float
) -> dict[str, float]:
    """layer_decay^(layers between a path's own and the last) by path."""
    for path, depth in depths.items():
        if not 0 <= depth < num_layers:
            raise UserError(f"layer_of: {path} is in layer {depth}, outside 0 to {num_layers - 1}")
    return {path: layer_decay ** (num_layers - 1 - depth) for path, depth in depths.items()}


def _scale_paths(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies each path's update by its factor."""

    def scale(updates: dict[str, Array], params: object) -> dict[str, Array]:
        del params
        return {path: factors[path] * update for path, update in updates.items()}

    return optax.stateless(scale)


def _check_name(kind: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UserError(
            f"unknown {kind} {name!r}: did you mean {near!r}? Known: {', '.join(known)}"
        )
