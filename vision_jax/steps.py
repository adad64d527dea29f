"""The one compiled step: gradient, optimizer, moving average, metrics.

    train_step(state, frozen, batch) -> (state, metrics)

Only `trainable` has gradients and optimizer state. `frozen` is an argument of its
own, so that it is neither donated nor copied and a checkpoint of the state stays small.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vision_jax import machine, optim
from vision_jax.trees import paths

Flat = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# loss_fn(trainable, frozen, model_state, batch, key) -> (loss, (model_state, metrics))
# The batch it gets also has "step" i32[], updates done, and perhaps "whole" (make_train_step).
LossFn = Callable[[Flat, Flat, Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, Any]]

REPLAY = 1_000_003  # folded into a step's key, which its updates share


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "trainable", "opt_state", "model_state", "ema"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
      step: i32[], updates done.
      trainable: {path: array}.
      opt_state: optax's state for `trainable`.
      model_state: collections that the model updates by itself, {} without: BatchNorm's running
        statistics, which are buffers in PyTorch.
      ema: moving average of `trainable` and of the arrays of `model_state`, by path, or None.
        Averaged weights beside the last weights' BatchNorm statistics would be a model that never
        was. Where the state is of averaged weights already, it is not averaged.
    """

    step: jax.Array
    trainable: Flat
    opt_state: Any
    model_state: Any
    ema: Flat | None


@dataclass(frozen=True)
class Replay:
    """Several updates on one batch, its images perturbed further by the gradient of each.

    Attributes:
      times: updates a batch.
      start: (batch, key) -> the first perturbation, f[B, H, W, C]; the batch has "step".
      move: (perturbation, its gradient, step) -> the next one.
    """

    times: int
    start: Callable[[Mapping[str, jax.Array], jax.Array], jax.Array]
    move: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def make_state(
    trainable: Flat,
    model_state: Any,
    *,
    tx: optax.GradientTransformation,
    ema: bool,
    averages_state: bool = True,
) -> TrainState:
    """The state before the first step; `averages_state`: the average is of `model_state` too."""
    averages = _averages(trainable, model_state if averages_state else {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=tx.init(trainable),
        model_state=model_state,
        # A copy, because all are donated.
        ema=jax.tree.map(jnp.copy, averages) if ema else None,
    )


def averaged(state: TrainState) -> tuple[Flat, Any]:
    """(trainable, model_state) that evaluation uses: the moving average if there is one."""
    if state.ema is None:
        return state.trainable, state.model_state
    trainable, statistics = paths.partition(state.ema, set(state.trainable))
    last = paths.flatten(state.model_state)
    return trainable, paths.unflatten(state.model_state, last | statistics)


def _averages(trainable: Flat, model_state: Any) -> Flat:
    """What the moving average is of; the paths of statistics are no parameters'."""
    return {**trainable, **paths.flatten(model_state)}


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    seed: int,
    schedule: Callable[[Any], Any],
    accumulate: int = 1,
    whole: Sequence[str] = (),
    counted: str = "",
    ema_decay: float = 0.0,
    average_decay: Callable[[Any], jax.Array] | None = None,
    replay: Replay | None = None,
    average_prefix: str = "",
    shardings: Any = None,
) -> Callable[[TrainState, Flat, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """Compiles the step. `state` is donated: the arrays passed in are gone afterwards.

    A step whose loss or gradient is not finite changes nothing but reports `finite` = False, so the
    caller can stop with the last good state in hand. It reports so too if an update of finite
    numbers leaves the range of float32, which takes a rate beyond all sense; that one is done.

    Args:
      loss_fn: see `LossFn`; transforms of the loss wrap it before it comes here.
      tx: the optimizer of `trainable`.
      seed: the step's key is fold_in(key(seed), step), so any step can be replayed alone.
      schedule: learning rate by update, for the metrics only.
      accumulate: micro-batches per update; the batch is split among them, and losses, metrics and
        gradients are averaged.
      whole: names of the batch's arrays that micro-batches also get as they are, under "whole": a
        loss that is divided by a count, of boxes, say, must count over all of the update.
      counted: name of a metric that says by which count the batch's loss and all other metrics are
        divided (0 as 1), where only the model tells it. Micro-batches weigh by it then, and it is
        their sum.
      ema_decay: of the moving average; 0 keeps none.
      average_decay: its decay by update instead, which is not warmed up then.
      replay: instead of one update a step; the loss function finds "perturbation" in the batch. Its
        metrics are means over the updates. Not with `accumulate`.
      average_prefix: under which the loss function finds the moving average among the frozen
        arrays; "" if it needs none.
      shardings: of the state that goes in and comes out; None leaves it to the compiler.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    assert replay is None or accumulate == 1

    tx = optax.with_extra_args_support(tx)

    def updated(state, number, model_state, gradients, grad_norm):
        """The state after an update, the `number`-th of all."""
        updates, opt_state = tx.update(
            gradients, state.opt_state, state.trainable, grad_norm=grad_norm
        )
        trainable = optax.apply_updates(state.trainable, updates)
        ema = state.ema
        if ema is not None:
            arrays = _averages(trainable, model_state)
            if average_decay is not None:
                ema = optim.move_average(ema, arrays, average_decay(number))
            else:
                ema = optim.update_ema(ema, arrays, ema_decay, number)
        return replace(
            state, trainable=trainable, opt_state=opt_state, model_state=model_state, ema=ema
        )

    def update(state, number, loss, model_state, metrics, gradients):
        """The state after an update of finite numbers, and the metrics of the one before."""
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        make = partial(updated, state, number, model_state, gradients, grad_norm)
        new = _where(finite, make, state)
        finite &= jnp.isfinite(optax.tree.norm(new.trainable))
        return new, {
            **metrics,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(number), jnp.float32),
            "finite": finite,
        }

    def train_step(state: TrainState, frozen: Flat, batch: Mapping[str, jax.Array]):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        beside = partial(_with_average, frozen, average_prefix)
        if replay is not None:
            new, metrics = _replayed(loss_fn, replay, update, state, beside, batch, key)
        else:
            frozen = beside(state)
            if accumulate == 1:
                (loss, (model_state, metrics)), gradients = gradient(
                    state.trainable, frozen, state.model_state, {**batch, "step": state.step}, key
                )
            else:
                loss, model_state, metrics, gradients = _accumulated(
                    gradient, accumulate, whole, counted, state, frozen, batch, key
                )
            new, metrics = update(state, state.step, loss, model_state, metrics, gradients)
        return replace(new, step=state.step + 1), metrics

    if shardings is None:
        return machine.jit(train_step, donate_argnums=0)
    return machine.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def _where(condition: jax.Array, make: Callable[[], TrainState], old: TrainState) -> TrainState:
    """`make()` where the condition holds, else `old`, whose memory the result takes.

    On a CPU it is a branch, in which an update is written over the old arrays: a selection reads
    and writes all of them again, and needs room for both. On a GPU a branch would wait for the
    host, and the selection is a part of the update.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.cond(condition, make, lambda: old)
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), make(), old)


def _with_average(frozen: Flat, prefix: str, state: TrainState) -> Flat:
    """The frozen arrays, and the moving average among them if it has a prefix."""
    if not prefix or state.ema is None:
        return frozen
    return {**frozen, **{prefix + path: leaf for path, leaf in state.ema.items()}}


def _accumulated(gradient, accumulate, whole, counted, state, frozen, batch, key):
    """Loss, metrics and gradients averaged over micro-batches, one in memory at a time."""

    def split(array):  # [B, ...] -> [accumulate, B / accumulate, ...]
        # Every micro-batch takes its rows from all devices, so nothing moves between them.
        rows = array.reshape(array.shape[0] // accumulate, accumulate, *array.shape[1:])
        return rows.swapaxes(0, 1)

    undivided = {"step": state.step}
    if whole:
        undivided["whole"] = {name: batch[name] for name in whole}

    def body(carry, micro):
        model_state, total = carry
        index, rows = micro
        # Sharded parameters are gathered for each micro-batch anew, and not kept whole for all.
        trainable, fixed, rows = jax.lax.optimization_barrier((state.trainable, frozen, rows))
        rows = {**rows, **undivided}
        (loss, (model_state, metrics)), gradients = gradient(
            trainable, fixed, model_state, rows, jax.random.fold_in(key, index)
        )
        own = (loss, metrics, gradients)
        if counted:
            count = metrics[counted]
            own = jax.tree.map(lambda x: x * jnp.maximum(count, 1).astype(x.dtype), own)
            own[1][counted] = count
        return (model_state, jax.tree.map(jnp.add, total, own)), None

    micro = (jnp.arange(accumulate), jax.tree.map(split, dict(batch)))
    first = jax.tree.map(lambda x: x[0], micro)
    (loss, (_, metrics)), gradients = jax.eval_shape(
        gradient,
        state.trainable,
        frozen,
        state.model_state,
        {**first[1], **undivided},
        key,
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, metrics, gradients))
    (model_state, total), _ = jax.lax.scan(body, (state.model_state, zeros), micro)
    count = total[1][counted] if counted else None
    divisor = accumulate if count is None else jnp.maximum(count, 1)
    loss, metrics, gradients = jax.tree.map(lambda x: x / divisor, total)
    if count is not None:
        metrics[counted] = count
    return loss, model_state, metrics, gradients


def _replayed(loss_fn, replay, update, state, beside, batch, key):
    """The state after `replay.times` updates on one batch, and their mean metrics.

    One backward pass gives the gradient of the parameters and that of the perturbation.
    """
    batch = {**batch, "step": state.step}

    def body(carry, turn):
        now, perturbation = carry

        def loss_of(trainable, perturbation):
            perturbed = {**batch, "perturbation": perturbation}
            return loss_fn(trainable, beside(now), now.model_state, perturbed, key)

        (loss, (model_state, metrics)), (gradients, ascent) = jax.value_and_grad(
            loss_of, argnums=(0, 1), has_aux=True
        )(now.trainable, perturbation)
        number = state.step * replay.times + turn
        now, metrics = update(now, number, loss, model_state, metrics, gradients)
        return (now, replay.move(perturbation, ascent, state.step)), metrics

    first = (state, replay.start(batch, jax.random.fold_in(key, REPLAY)))
    (new, _), metrics = jax.lax.scan(body, first, jnp.arange(replay.times))
    finite = metrics.pop("finite").all()
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    return new, {**{name: values.mean(0) for name, values in metrics.items()}, "finite": finite}


def make_eval_step(
    outputs_fn: Callable[[Flat, Flat, Any, Mapping[str, jax.Array]], Mapping[str, jax.Array]],
    *,
    shardings: Any = None,
) -> Callable[..., dict[str, jax.Array]]:
    """Compiles `outputs_fn(trainable, frozen, model_state, batch)`, its results laid out so."""
    return machine.jit(outputs_fn, out_shardings=shardings)
