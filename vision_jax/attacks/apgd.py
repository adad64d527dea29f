"""Auto-PGD: an attack without a step size to choose (Croce & Hein 2020; for L1 their 2021 paper).

It starts with steps eta of twice the radius. At checkpoints that lie ever closer, the eta of an
example is halved if its loss rose in less than a share rho of the steps or its f_max stood still,
and the example goes back to x_max. Names are those of the paper's algorithm 1. APGD-CE, APGD-DLR
and APGD-T are this with the losses of `losses.make_untargeted` and `losses.make_targeted_dlr`.

From the same noise each point is the published code's, in all norms and to the rounding of the
model. But where the label is not even the runner-up, the plain DLR loss is flat, at 1: there L2's
steps follow a gradient that is rounding and no more. Such examples are fooled already.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vision_jax.attacks import norms
from vision_jax.attacks.examples import where
from vision_jax.attacks.gradient import input_gradient
from vision_jax.attacks.norms import Norm

Array = jax.Array

ALPHA = 0.75  # share of the new step, the momentum's being 1 - alpha
RHO = 0.75  # share of a window's steps that has to increase the loss
SPARSER = 1.5  # L1: entries of the best point per entry of the next step
SHRINKING = ((3, 0.3), (2, 0.3), (1, 0.4))  # L1: (radius over epsilon, share of the steps)


class SingleRun(NamedTuple):
    """What one run found; B examples, S steps.

    `x_adv` is the last point that fooled, or the start where `fooled` is False; `losses` and
    `etas` are those of each step, before its own checkpoint halves them.
    """

    x_max: Array  # f[B, H, W, C], the point of the highest loss
    f_max: Array  # f[B], the loss there
    x_adv: Array  # f[B, H, W, C]
    fooled: Array  # bool[B]
    losses: Array  # f[S, B]
    etas: Array  # f[S, B]


def checkpoints(steps: int, norm: Norm = "linf") -> tuple[int, ...]:
    """Numbers of steps after which eta may be halved, the paper's w_j, each at most `steps`.

    Examples:
      >>> checkpoints(100)
      (22, 41, 57, 70, 80, 87, 93, 99)
    """
    window, least, shorter = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    if norm == "l1":
        window = least = max(int(0.04 * steps), 1)
    found = []
    after = window
    while after <= steps:
        found.append(after)
        window = max(window - shorter, least)
        after += window
    return tuple(found)


def apgd(
    loss_of_images: Callable[..., tuple[Array, Array]],
    images: Array,
    keys: Array,
    *,
    epsilon: ArrayLike,
    norm: Norm = "linf",
    steps: int = 100,
    restarts: int = 1,
    expectation: int = 0,
    shrinking: bool = False,
) -> Array:
    """The worst point of each example: one that fools, otherwise the one of the highest loss.

    Costs `steps` + 1 forward passes with the input's gradient for each restart.

    Args:
      loss_of_images: what is maximized; see the package. With an `expectation` it takes
        (images, keys), one key an example, for a model that draws.
      images: f[B, H, W, C] in [0, 1].
      keys: key[B].
      epsilon: the radius, a scalar or f[B], in units of the pixels; may be traced.
      norm: of the ball.
      steps: of each restart.
      restarts: from random points.
      expectation: draws whose gradients are averaged; 0 for a model that draws nothing.
      shrinking: L1 only: the first 60 % of the steps in balls of 3 and 2 times the radius, as
        the standard AutoAttack does in L1.

    Returns:
      f[B, H, W, C] within epsilon of images and in [0, 1].
    """
    images = images.astype(np.promote_types(images.dtype, np.float32))

    def keep_worst(best: tuple[Array, Array, Array], restart: Array):
        kept, highest, solved = best
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, restart)
        begin = random_start(own, images, epsilon * (3 if shrinking else 1), norm)
        run = single_run(
            loss_of_images,
            images,
            own,
            begin=begin,
            epsilon=epsilon,
            norm=norm,
            steps=steps,
            expectation=expectation,
            shrinking=shrinking,
        )
        worse = ~solved & (run.fooled | (run.f_max > highest))
        ends = where(run.fooled, run.x_adv, run.x_max)
        best = where(worse, ends, kept), jnp.where(worse, run.f_max, highest), solved | run.fooled
        return best, None

    lowest = jnp.full(len(images), -jnp.inf, images.dtype)
    nothing = images, lowest, jnp.zeros(len(images), bool)
    return jax.lax.scan(keep_worst, nothing, jnp.arange(restarts))[0][0]


def random_start(keys: Array, images: Array, epsilon: ArrayLike, norm: Norm) -> Array:
    """A point on the sphere around each image, not inside it as for PGD, then in [0, 1].

    L-infinity: uniform noise stretched until its largest entry is epsilon. L2: normal noise. L1:
    normal noise put back into the ball.
    """
    shape, dtype = images.shape[1:], images.dtype
    if norm == "linf":
        noise = jax.vmap(lambda key: jax.random.uniform(key, shape, dtype, -1, 1))(keys)
    else:
        noise = jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)
    return start_from(noise, images, epsilon, norm)


def start_from(noise: Array, images: Array, epsilon: ArrayLike, norm: Norm) -> Array:
    """The point that noise f[B, H, W, C] leads to; see `random_start`."""
    if norm == "l1":
        return norms.project(images + noise, images, epsilon, norm)
    radius = norms.per_example(epsilon, images)
    return jnp.clip(images + radius * _normalize(noise, norm), 0, 1)


def single_run(
    loss_of_images: Callable[..., tuple[Array, Array]],
    images: Array,
    keys: Array | None = None,
    *,
    begin: Array,
    epsilon: ArrayLike,
    norm: Norm = "linf",
    steps: int = 100,
    expectation: int = 0,
    shrinking: bool = False,
) -> SingleRun:
    """One run from `begin` f[B, H, W, C]; the rest as in `apgd`.

    In balls that shrink, each run starts where the one before was highest and only the last one
    counts. `keys` key[B] are for an `expectation`.
    """
    if not shrinking:
        iterations = _iterations(steps, norm, images.dtype)
        return _scan(loss_of_images, images, keys, begin, epsilon, norm, iterations, expectation)
    lengths = [int(np.ceil(share * steps)) for _, share in SHRINKING[:-1]]
    lengths.append(steps - sum(lengths))
    runs = [
        _iterations(length, norm, images.dtype, factor)
        for (factor, _), length in zip(SHRINKING, lengths, strict=True)
    ]
    iterations = _Iteration(*map(jnp.concatenate, zip(*runs, strict=True)))
    run = _scan(loss_of_images, images, keys, begin, epsilon, norm, iterations, expectation, True)
    last = lengths[-1]
    return run._replace(losses=run.losses[-last:], etas=run.etas[-last:])


class _Iteration(NamedTuple):
    """What steps of a run do; the first of a run, number 0, only evaluates its start."""

    number: Array  # i[S + 1]
    alpha: Array  # f[S + 1], of the new step
    window: Array  # i[S + 1], steps since the last checkpoint
    checked: Array  # bool[S + 1], a checkpoint comes after it
    factor: Array  # f[S + 1], of the radius


def _iterations(steps: int, norm: Norm, dtype: jnp.dtype, factor: float = 1) -> _Iteration:
    points = np.array((0, *checkpoints(steps, norm)))
    windows, checked = np.zeros(steps + 1, int), np.zeros(steps + 1, bool)
    windows[points[1:]], checked[points[1:]] = np.diff(points), True
    numbers = np.arange(steps + 1)
    shares = np.where(numbers > 1, ALPHA, 1).astype(dtype)
    factors = np.full(steps + 1, factor, dtype)
    return _Iteration(*map(jnp.asarray, (numbers, shares, windows, checked, factors)))


class _State(NamedTuple):
    x: Array  # f[B, H, W, C]
    x_last: Array  # f[B, H, W, C], the point of one step earlier
    gradient: Array  # f[B, H, W, C]
    x_max: Array  # f[B, H, W, C]
    gradient_at_x_max: Array  # f[B, H, W, C]
    f_max: Array  # f[B], the loss at x_max
    x_adv: Array  # f[B, H, W, C]
    fooled: Array  # bool[B]
    eta: Array  # f[B]
    f_last: Array  # f[B]
    rises: Array  # i32[B], since the last checkpoint
    f_max_checked: Array  # f[B], at the last checkpoint
    halved: Array  # bool[B], there
    entries: Array  # i32[B], L1: entries that x_max changed there
    still: Array  # i32[B], L1: entries that a step leaves, but for ties


def _scan(
    loss_of_images, images, keys, begin, epsilon, norm, iterations, expectation, shrinking=False
) -> SingleRun:
    """The model is compiled once, for the beginnings of runs as for their steps."""

    def evaluate(at: Array, number: ArrayLike) -> tuple[Array, Array, Array]:
        """(gradient, loss, fooled); of a model that draws the mean gradient and the last draw."""
        if not expectation:
            return input_gradient(loss_of_images, at)

        def draw(total, draw_number):
            own = jax.vmap(lambda key: fold(fold(key, number), draw_number))(keys)
            gradient, *rest = input_gradient(lambda x: loss_of_images(x, own), at)
            return total + gradient, rest

        fold = jax.random.fold_in
        total, (loss, fooled) = jax.lax.scan(draw, jnp.zeros_like(at), jnp.arange(expectation))
        return total / expectation, loss[-1], fooled[-1]

    dtype, size, count = images.dtype, images[0].size, len(images)
    epsilon = jnp.broadcast_to(jnp.asarray(epsilon, dtype), (count,))
    widest = 1 if norm == "l1" else 2  # step, in radii

    def start(begin: Array, eta_0: Array) -> _State:
        nothing = jnp.zeros(count, dtype)
        entries = _entries(begin - images) if shrinking else jnp.full(count, size, jnp.int32)
        dense = jnp.full(count, _rest(0.2, size), jnp.int32)
        return _State(
            x=begin,
            x_last=begin,
            gradient=jnp.zeros_like(begin),
            x_max=begin,
            gradient_at_x_max=jnp.zeros_like(begin),
            f_max=nothing - jnp.inf,
            x_adv=begin,
            fooled=jnp.zeros(count, bool),
            eta=eta_0,
            f_last=nothing,
            rises=jnp.zeros(count, jnp.int32),
            f_max_checked=nothing,
            halved=jnp.ones(count, bool),
            entries=entries,
            still=_still(entries, size, dtype) if shrinking else dense,
        )

    def step(state: _State, now: _Iteration):
        first = now.number == 0
        radius = now.factor * epsilon
        eta_0 = widest * radius
        if shrinking:
            fresh = start(norms.project(state.x_max, images, radius, norm), eta_0)
            state = jax.tree.map(functools.partial(jnp.where, first), fresh, state)
        length = norms.per_example(state.eta, images)
        if norm == "l1":
            direction = _sparse_signs(state.gradient, state.still)
            moved = norms.project(state.x + length * direction, images, radius, norm)
        else:
            ascent = jnp.sign(state.gradient)
            if norm == "l2":
                ascent = _normalize(state.gradient, norm)
            aim = _project(state.x + length * ascent, images, radius, norm)
            last = state.x - state.x_last
            moved = state.x + (aim - state.x) * now.alpha + last * (1 - now.alpha)
            moved = _project(moved, images, radius, norm)
        moved = jnp.where(first, state.x, moved)
        gradient, loss, fooled = evaluate(moved, now.number)
        higher = loss > state.f_max
        next_state = state._replace(
            x=moved,
            x_last=state.x,
            gradient=gradient,
            x_max=where(higher, moved, state.x_max),
            gradient_at_x_max=where(higher, gradient, state.gradient_at_x_max),
            f_max=jnp.where(higher, loss, state.f_max),
            x_adv=where(fooled, moved, state.x_adv),
            fooled=state.fooled | fooled,
            # The first window compares its first loss with 0, as the published code does.
            f_last=jnp.where(first, 0, loss),
            rises=state.rises + (~first & (loss > state.f_last)).astype(jnp.int32),
            f_max_checked=jnp.where(first, loss, state.f_max_checked),
        )
        checking = _check_sparsity if norm == "l1" else _check
        return checking(next_state, now, images, eta_0), (loss, state.eta)

    begin = jnp.clip(begin.astype(dtype), 0, 1)
    state, (losses, etas) = jax.lax.scan(step, start(begin, widest * epsilon), iterations)
    return SingleRun(state.x_max, state.f_max, state.x_adv, state.fooled, losses[1:], etas[1:])


def _check(state: _State, now: _Iteration, images: Array, eta_0: Array) -> _State:
    """At a checkpoint: half the step, from x_max, where conditions 1 or 2 of the paper hold."""
    seldom = state.rises.astype(float) <= RHO * now.window.astype(float)
    stuck = ~state.halved & (state.f_max_checked >= state.f_max)
    halve = now.checked & (seldom | stuck)
    return state._replace(
        x=where(halve, state.x_max, state.x),
        gradient=where(halve, state.gradient_at_x_max, state.gradient),
        eta=jnp.where(halve, state.eta / 2, state.eta),
        rises=jnp.where(now.checked, 0, state.rises),
        f_max_checked=jnp.where(now.checked, state.f_max, state.f_max_checked),
        halved=jnp.where(now.checked, halve, state.halved),
    )


def _check_sparsity(state: _State, now: _Iteration, images: Array, eta_0: Array) -> _State:
    """L1: as x_max changes fewer entries, so do the steps (Croce & Hein 2021, 3.2)."""
    entries = _entries(state.x_max - images)
    fewer = entries / state.entries < 0.95
    eta = jnp.where(fewer, eta_0, state.eta / SPARSER)
    eta = jnp.clip(eta, eta_0 / 10, eta_0)
    return state._replace(
        x=where(now.checked & fewer, state.x_max, state.x),
        gradient=where(now.checked & fewer, state.gradient_at_x_max, state.gradient),
        eta=jnp.where(now.checked, eta, state.eta),
        entries=jnp.where(now.checked, entries, state.entries),
        still=jnp.where(now.checked, _still(entries, images[0].size, images.dtype), state.still),
    )


def _normalize(delta: Array, norm: Norm) -> Array:
    # The published code's 1e-12: without it L2 trajectories part after some 20 steps.
    return delta / (norms.size(delta, norm) + 1e-12)


def _project(points: Array, images: Array, epsilon: ArrayLike, norm: Norm) -> Array:
    if norm != "l2":
        return norms.project(points, images, epsilon, norm)
    delta = points - images
    radius = jnp.minimum(norms.per_example(epsilon, images), norms.size(delta, norm))
    return jnp.clip(images + _normalize(delta, norm) * radius, 0, 1)


def _sparse_signs(gradient: Array, still: Array) -> Array:
    """Signs of all but the `still` smallest entries, over their number: of L1 norm 1."""
    flat = jnp.abs(gradient).reshape(len(gradient), -1)
    least = jnp.take_along_axis(jnp.sort(flat), still[:, None], axis=1)
    signs = jnp.sign(gradient) * (flat >= least).astype(flat.dtype).reshape(gradient.shape)
    # The published code's 1e-10: without it float64 brings entries exactly to 0 that there stay at
    # 1e-11 and are counted.
    return signs / (norms.size(signs, "l1") + 1e-10)


def _entries(delta: Array) -> Array:
    """How many entries of each example are not 0, i32[B]."""
    return jnp.count_nonzero(delta.reshape(len(delta), -1), axis=1).astype(jnp.int32)


def _still(entries: Array, size: int, dtype: jnp.dtype) -> Array:
    """How many of `size` entries a step leaves where x_max changed `entries`.

    From a table that numpy computes: compiled, the divisions by constants become products, whose
    rounding makes it one entry more or less than in the published code.
    """
    counts = np.arange(size + 1, dtype=dtype)
    return jnp.asarray(_rest(counts / size / SPARSER, size))[entries]


def _rest(density: np.ndarray | float, size: int) -> np.ndarray:
    return np.clip((1 - density) * size, 0, size - 1).astype(np.int32)
