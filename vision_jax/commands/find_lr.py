"""find-lr: a learning rate for a config, from one short run of exponentially rising rates.

The rate of update t of n is low · (high / low)^(t / (n - 1)) (Smith 2017, arXiv:1506.01186). The
loss is averaged exponentially over updates (decay 0.9, bias corrected). The run ends when that
average is more than four times its least, or a number is not finite. The suggestion is the rate at
which the average falls fastest by the logarithm of the rate, among updates before its least:
slopes are central differences over five updates to each side.

WORKDIR/find_lr.json    rates, losses and the suggestion
WORKDIR/find_lr.png     the same drawn
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vision_jax import sharding
from vision_jax.config import check_ranges, fields, updates_a_step, write_json
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import UserError
from vision_jax.logging import say, show_progress
from vision_jax.run.prepare import make_optimizer, prepare
from vision_jax.tasks.api import find_task

LOW, HIGH = 1e-6, 1.0
UPDATES = 100
DECAY = 0.9
DIVERGED = 4.0  # times the least averaged loss
REACH = 5  # updates to each side of a slope


def run(config: ConfigDict, workdir: Path) -> int:
    """Prints the suggestion; returns the exit code.

    Raises:
      UserError: a config that cannot be trained, or losses that never fall.
    """
    check_ranges(config)
    source = find_task(config.task).read_sources(config)[0]
    prepared = prepare(config, source.class_names)

    updates = UPDATES * updates_a_step(fields(config))

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        share = jnp.minimum(jnp.asarray(step, jnp.float32) / (updates - 1), 1)
        return LOW * (HIGH / LOW) ** share

    trainable = prepared.parameters.abstract()[0]
    tx = make_optimizer(config, prepared.model, trainable, schedule)
    rising = replace(prepared, schedule=schedule, tx=tx)
    state, frozen, _ = rising.make_arrays()
    fixed = {**frozen, **rising.place_beside()}
    step, place, stored = (
        rising.make_train_step(),
        sharding.make_batch_placer(rising.mesh),
        rising.stored,
    )
    data = rising.training_data(source, DamageLog())
    rates: list[float] = []
    losses: list[float] = []
    with show_progress(UPDATES, what="updates") as (advance, _):
        for number in range(UPDATES):
            batch = place({**next(data), **(stored(number) if stored else {})})
            state, metrics = step(state, fixed, batch)
            advance()
            rates.append(float(metrics["learning_rate"]))
            losses.append(float(metrics["loss"]))
            if not bool(metrics["finite"]) or has_diverged(losses):
                break
    found = suggest_rate(rates, losses)
    workdir.mkdir(parents=True, exist_ok=True)
    record = {"suggestion": found, "rates": rates, "losses": [_or_none(x) for x in losses]}
    write_json(record, workdir / "find_lr.json")
    _draw(rates, losses, found, workdir / "find_lr.png")
    if found is not None:
        say(f"suggestion: --config.optim.lr={found:.2g} (now {config.optim.lr:g})")
    say(f"wrote {workdir / 'find_lr.json'}, rates and losses")
    say(f"wrote {workdir / 'find_lr.png'}, the same drawn")
    if found is None:
        raise UserError(
            "find-lr: the loss does not fall at any rate: check the data and what trains "
            "(config.trainable), or take a larger config.batch_size"
        )
    return 0


def _or_none(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def average(losses: Sequence[float]) -> np.ndarray:
    """The exponential average of the losses up to each, bias corrected.

    Examples:
      >>> average([2.0, 2.0, 2.0]).round(6).tolist()
      [2.0, 2.0, 2.0]
    """
    total, found = 0.0, []
    for number, loss in enumerate(losses, 1):
        total = DECAY * total + (1 - DECAY) * loss
        found.append(total / (1 - DECAY**number))
    return np.array(found)


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the last averaged loss is far above the least one."""
    smooth = average(losses)
    return bool(smooth[-1] > DIVERGED * smooth.min())


def suggest_rate(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which the averaged loss falls fastest by the logarithm of the rate.

    None where it falls nowhere.
    """
    smooth = average([loss for loss in losses if math.isfinite(loss)])
    if not len(smooth):
        return None
    logs = np.log(rates[: len(smooth)])
    least = int(smooth.argmin())
    places = range(REACH, min(least, len(smooth) - 1 - REACH) + 1)
    slopes = {
        n: (smooth[n + REACH] - smooth[n - REACH]) / (logs[n + REACH] - logs[n - REACH])
        for n in places
    }
    if not slopes or min(slopes.values()) >= 0:
        return None
    return float(rates[min(slopes, key=lambda n: slopes[n])])


def _draw(rates: Sequence[float], losses: Sequence[float], found: float | None, path: Path) -> None:
    from matplotlib.figure import Figure

    from vision_jax.figures import BLUE, ORANGE, save_figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color=BLUE, alpha=0.3, linewidth=1)
    axes.plot(rates, average(losses), color=BLUE, linewidth=2, label="averaged")
    if found is not None:
        axes.axvline(found, color=ORANGE, label=f"suggestion {found:.2g}")
    axes.set_xscale("log")
    if finite := [loss for loss in losses if math.isfinite(loss)]:
        axes.set_ylim(0, 1.1 * max(finite[: max(len(finite) // 2, 1)]))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)
