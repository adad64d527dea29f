"""In float64 a trial side by side is its run alone to ten digits: the mathematics is the same.

In float32 sums in another order make last bits differ, and training at a high rate enlarges them.
"""

import jax
import numpy as np
import pytest
import runs

from vision_jax.data.pipeline import DamageLog
from vision_jax.run import description
from vision_jax.search import log_uniform, uniform
from vision_jax.search.search import Search, Settings
from vision_jax.search.space import check_space
from vision_jax.search.stack import Stack, begin
from vision_jax.search.trial import trial_config
from vision_jax.sharding import make_batch_placer

pytestmark = pytest.mark.long


def widened(tree):
    """Float arrays in float64."""

    def widen(leaf):
        if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            return jax.numpy.asarray(np.asarray(leaf, np.float64))
        return leaf

    return jax.tree.map(widen, tree)


def test_curves_in_float64_agree_to_ten_digits_at_high_rates(rng, monkeypatch):
    monkeypatch.setitem(description.DTYPES, "float32", jax.numpy.float64)
    with jax.enable_x64(True):
        compare(runs.tiny_config(batch_size=16), rng)


def compare(config, rng):
    space = {"optim.lr": log_uniform(1e-2, 5e-2), "optim.weight_decay": uniform(0.01, 0.1)}
    settings = Settings(trials=3, seed=int(rng.integers(2**32)))
    search = Search(config, check_space(space, config), settings, None)
    (group,) = search.groups
    stack = Stack(search.prepare(group.config), group.numbers)
    state, frozen = begin(stack, {None: stack.run}, [None] * 3)
    data = stack.run.training_data(search.sources(config)[0], DamageLog())
    place = make_batch_placer(stack.run.mesh)
    batches = [place(next(data)) for _ in range(20)]
    state, frozen = widened(state), widened(frozen)
    numbers = stack.numbers(search.values)
    together = []
    for batch in batches:
        state, metrics = stack.step(state, frozen, batch, numbers)
        together.append(np.asarray(metrics["loss"]))
    assert together[0].dtype == np.float64
    for trial, values in enumerate(search.values):
        run = search.prepare(trial_config(config, values))
        own, step = widened(run.make_arrays()[0]), run.make_train_step()
        for number, batch in enumerate(batches):
            own, metrics = step(own, frozen, batch)
            loss = float(metrics["loss"])
            assert abs(together[number][trial] - loss) <= 1e-10 * abs(loss), (number, trial)
