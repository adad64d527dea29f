"""The trials of one group side by side: a state with an axis of trials before each array.

    vmap(step of a trial) over (state, numbers), the frozen arrays and the batch shared

What is computed from the frozen arrays and the batch alone has no axis of trials, so it is computed
once for all: the frozen trunk up to the first array that trains. The number of the step has none
either, and with it the keys: trials see the same augmentation and draw the same dropout, as their
runs alone do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vision_jax import machine, steps
from vision_jax.errors import DivergedError
from vision_jax.memory import is_out_of_memory
from vision_jax.run.prepare import Run
from vision_jax.search import trial
from vision_jax.search.trial import Values

Flat = dict[str, jax.Array]
# Over all parts of a state, but for the number of the step, which trials share.
AXES = steps.TrainState(step=None, trainable=0, opt_state=0, model_state=0, ema=0)  # type: ignore[arg-type]
MOST_LOGITS = 2**28  # of all trials over a data set at once


@dataclass(frozen=True)
class Stack:
    """The program of a group.

    Attributes:
      run: prepared, of the group's config.
      names: the fields that are numbers of the program.
    """

    run: Run
    names: tuple[str, ...]

    def numbers(self, trials: Sequence[Values]) -> dict[str, np.ndarray]:
        """The numbers of these trials, [T] each."""
        return {
            name: np.asarray([own[name] for own in trials], trial.dtype_of(self.run.config, name))
            for name in self.names
        }

    # States ---------------------------------------------------------------------------------------

    def abstract(self, count: int) -> steps.TrainState:
        """ShapeDtypeStructs with shardings of the state of so many trials."""

        def grow(leaf: Any) -> jax.ShapeDtypeStruct:
            place = NamedSharding(self.run.mesh, PartitionSpec(None, *leaf.sharding.spec))
            return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=place)

        own = self.run.abstract_state
        parts = {n: jax.tree.map(grow, getattr(own, n)) for n in vars(own) if n != "step"}
        return steps.TrainState(step=own.step, **parts)

    @cached_property
    def shardings(self) -> Any:
        """Of the state of any number of trials."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract(1))

    def stack(self, rows: Sequence[steps.TrainState]) -> steps.TrainState:
        """The state of several trials from that of each."""

        def join(*rows: steps.TrainState) -> steps.TrainState:
            parts = {n: [getattr(row, n) for row in rows] for n in vars(rows[0]) if n != "step"}
            joined = {n: jax.tree.map(lambda *x: jnp.stack(x), *own) for n, own in parts.items()}
            return steps.TrainState(step=rows[0].step, **joined)

        return jax.jit(join, out_shardings=self.shardings)(*rows)

    def take(self, state: steps.TrainState, rows: Sequence[int]) -> steps.TrainState:
        """The state of some of the trials, by their places; a place may occur several times."""

        def pick(state: steps.TrainState, rows: jax.Array) -> steps.TrainState:
            parts = _parts(state)
            picked = {n: jax.tree.map(lambda x: x[rows], own) for n, own in parts.items()}
            return steps.TrainState(step=state.step, **picked)

        picked = jax.jit(pick, out_shardings=self.shardings)
        return picked(state, np.asarray(rows, np.int32))

    def row(self, state: steps.TrainState, place: int) -> steps.TrainState:
        """One trial's state, with the shapes of the group."""
        parts = _parts(state)
        return steps.TrainState(step=state.step, **_row(parts, place))

    # Programs -------------------------------------------------------------------------------------

    @cached_property
    def step(self) -> Any:
        """(state, frozen, batch, numbers) -> (state, metrics [T] each), compiled; donates it."""
        every = jax.vmap(
            partial(trial.step, self.run), in_axes=(AXES, None, None, 0), out_axes=(AXES, 0)
        )
        return machine.jit(every, donate_argnums=0, out_shardings=(self.shardings, None))

    def step_by(self, most: int) -> Any:
        """The same with at most so many trials at once, one part after the other."""

        def by_parts(
            state: steps.TrainState, frozen: Flat, batch: Flat, numbers: Flat
        ) -> tuple[steps.TrainState, Flat]:
            def one(own: tuple[Any, Flat]) -> tuple[Any, jax.Array, Flat]:
                parts, numbers = own
                state_of_one = steps.TrainState(step=state.step, **parts)
                new, metrics = trial.step(self.run, state_of_one, frozen, batch, numbers)
                return _parts(new), new.step, metrics

            parts, step, metrics = jax.lax.map(one, (_parts(state), numbers), batch_size=most)
            return steps.TrainState(step=step[0], **parts), metrics

        return machine.jit(by_parts, donate_argnums=0, out_shardings=(self.shardings, None))

    def lower(self, count: int) -> Any:
        """The step of so many trials, lowered from shapes."""
        run = self.run
        frozen = run.parameters.abstract()[1] | run.abstract_beside()
        numbers = trial.abstract_numbers(run.config, self.names, count)
        return self.step.lower(self.abstract(count), frozen, run.abstract_batch(), numbers)

    def make_evaluate(self, source: Any) -> Callable[..., list[Any]]:
        """A function (state, frozen, numbers, places) -> the Evaluation of each of these trials.

        None stands for one whose model's numbers are not finite.

        A task whose evaluation takes the outputs of all trials at once gets them so, and the frozen
        trunk is shared here too; others evaluate one after another.
        """
        run, task = self.run, self.run.task
        settings = (run.mesh, source, run.description.preprocessing)
        one = partial(trial.outputs, run)
        alone = task.make_evaluate(run.config, one, *settings)
        together = None
        if make := getattr(task, "make_evaluate_all", None):
            every = jax.vmap(one, in_axes=(0, None, 0, None), out_axes=1)
            together = make(run.config, every, *settings)

        def evaluate(
            state: steps.TrainState, frozen: Flat, numbers: Mapping[str, Any], places: Sequence[int]
        ) -> list[Any]:
            nonlocal together
            trained, statistics = steps.averaged(state)
            own = {"trainable": trained, "numbers": dict(numbers)}
            outputs = len(source) * len(run.description.class_names) * _count(trained)
            if together is not None and outputs <= MOST_LOGITS:
                try:
                    every = together(own, frozen, statistics, places)
                except jax.errors.JaxRuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    together = None  # from now on one after another
                else:
                    return list(map(_unless_diverged, every))
            rows = (_row((own, statistics), place) for place in places)
            return [
                _unless_diverged(partial(alone, own, frozen, statistics))
                for own, statistics in rows
            ]

        return evaluate


def begin(
    stack: Stack, runs: Mapping[Any, Run], keys: Sequence[Any]
) -> tuple[steps.TrainState, Flat]:
    """(the first state of trials, the frozen arrays).

    Args:
      stack: of their group.
      runs: by rank, a run alone of the group's config at that rank.
      keys: the rank of each trial.
    """
    rows: dict[Any, steps.TrainState] = {}
    frozen: Flat = {}
    for key, run in runs.items():
        state, frozen, _ = run.make_arrays()
        rows[key] = trial.pad(state, stack.run.abstract_state)
    return stack.stack([rows[key] for key in keys]), frozen


def _parts(state: steps.TrainState) -> dict[str, Any]:
    """All of a state that trials have of their own."""
    return {name: part for name, part in vars(state).items() if name != "step"}


def _unless_diverged(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except DivergedError:
        return None


def _row(tree: Any, place: int) -> Any:
    return jax.tree.map(lambda x: x[place], tree)


def _count(tree: Any) -> int:
    return len(jax.tree.leaves(tree)[0])
