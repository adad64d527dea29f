"""A run as a function of its numbers, and which trials can share one.

    config with traced numbers --Run.at--> recipes, objective, optimizer --> the ordinary step

A number of the config that only the step looks at, such as a rate, may be an argument of the step's
program: trials that differ in such numbers alone are one group, with one program. Which ones can is
found by tracing the step with each of them: where its code must know the number to decide
something, tracing raises, and the field is one of the program, like the optimizer's name. So is a
number that is 0 in a trial, for 0 turns things off.

Adapters of several ranks have the shapes of the largest. A trial's own A and B are drawn as its run
alone draws them, and filled up with columns and rows of zeros: their gradients are products with
each other's zeros, so they stay zero, with every optimizer here. The scale alpha / rank of the
leaves is the group's; a trial's own enters as a factor of B.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vision_jax.config import check_ranges, fields, replaced
from vision_jax.run.parameters import Parameters
from vision_jax.run.prepare import Run
from vision_jax.trees import lora

# Fields of numbers that the step alone looks at, neither data nor evaluation.
OF_THE_STEP = (
    "optim.", "augment.", "loss.", "model.dropout", "model.drop_path", "lora.alpha", "lora.rank",
    "adversarial.beta", "adversarial.step_size", "adversarial.weight_epsilon", "distill.weight",
    "distill.temperature",
)  # fmt: skip
RANK, ALPHA = "lora.rank", "lora.alpha"
# What tracing raises where code must know a number.
NEEDED = (jax.errors.JAXTypeError, TypeError)

Values = Mapping[str, Any]  # of a trial, by field
Numbers = dict[str, jax.Array]  # of a trial, or of several: with an axis before


@dataclass(frozen=True)
class Group:
    """Trials that share a program.

    Attributes:
      config: of the first one, with the largest rank; what is no number of the program is the same
        in all.
      numbers: the fields that are arguments of the program.
      trials: their numbers in the search.
    """

    config: ConfigDict
    numbers: tuple[str, ...]
    trials: tuple[int, ...]


def make_groups(
    config: ConfigDict,
    trials: Sequence[Values],
    prepare: Callable[[ConfigDict], Run],
    most_rank: int | None = None,
    known: MutableMapping[Any, set[str]] | None = None,
) -> list[Group]:
    """The groups of the trials, in the order of their first ones.

    Args:
      config: what trials change.
      trials: the values of each, by field.
      prepare: run.prepare.prepare of this search's classes.
      most_rank: the largest rank of adapters there may be; None for that of these trials.
      known: what tracing has found before, by what was traced; added to.

    Raises:
      UserError: a trial that cannot be trained, with the reason.
    """
    groups, known = [], {} if known is None else known
    for candidates, members in _split(trials, range(len(trials)), _candidates(config, trials)):
        shared = _shared_config(config, trials, members, most_rank if RANK in candidates else None)
        key = candidates, repr(fields(shared))
        if key not in known:
            known[key] = _needed(prepare(shared), candidates)
        rest = tuple(name for name in candidates if name not in known[key])
        for numbers, part in _split(trials, members, rest):
            own = _shared_config(config, trials, part, most_rank if RANK in numbers else None)
            groups.append(Group(own, numbers, tuple(part)))
    return sorted(groups, key=lambda group: group.trials)


def _candidates(config: ConfigDict, trials: Sequence[Values]) -> tuple[str, ...]:
    """The fields of numbers that may be arguments of a step."""
    now = fields(config)
    new_adapters = "lora" in now["recipes"] and not now["lora.init_from"]
    return tuple(
        name
        for name in trials[0]
        if name.startswith(OF_THE_STEP)
        and type(now[name]) in (int, float)
        and (new_adapters or name != RANK)
    )


def _split(
    trials: Sequence[Values], members: Sequence[int], candidates: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], list[int]]]:
    """(candidates that aren't 0, trials) of those that are alike in everything else."""
    parts: dict[Any, list[int]] = {}
    for trial in members:
        values = trials[trial]
        on = tuple(name for name in candidates if values[name] != 0)
        fixed = tuple((name, repr(value)) for name, value in values.items() if name not in on)
        parts.setdefault((on, fixed), []).append(trial)
    for (on, _), part in parts.items():
        yield on, part


def _shared_config(
    config: ConfigDict, trials: Sequence[Values], members: Sequence[int], most_rank: int | None
) -> ConfigDict:
    """The first one's, with the largest rank of all."""
    values = dict(trials[members[0]])
    if RANK in values:
        values[RANK] = most_rank or max(trials[trial][RANK] for trial in members)
    return trial_config(config, values)


def trial_config(config: ConfigDict, values: Values) -> ConfigDict:
    """The config of a trial as a run alone has it.

    Raises:
      UserErrors: fields that do not go together.
    """
    changed = replaced(config, values)
    check_ranges(changed)
    return changed


def _needed(run: Run, candidates: Sequence[str]) -> set[str]:
    """The candidates that the step's code must know, found by tracing it with each of them."""
    found = set()
    for name in candidates:
        try:
            _trace(run, [name])
        except NEEDED:
            found.add(name)
    _trace(run, [name for name in candidates if name not in found])  # all of them together
    return found


def _trace(run: Run, names: Sequence[str]) -> None:
    frozen = run.parameters.abstract()[1] | run.abstract_beside()
    jax.eval_shape(
        partial(step, run), run.abstract_state, frozen, run.abstract_batch(),
        abstract_numbers(run.config, names),
    )  # fmt: skip


# One trial --------------------------------------------------------------------------------------


def step(run: Run, state: Any, frozen: Any, batch: Any, numbers: Numbers) -> Any:
    """The ordinary step of a run with these numbers: (state, metrics)."""
    return with_numbers(run, numbers).make_train_step().__wrapped__(state, frozen, batch)


def outputs(run: Run, own: Mapping[str, Any], frozen: Any, model_state: Any, batch: Any) -> Any:
    """What evaluation needs of a batch; `own` has the trial's "trainable" and "numbers"."""
    changed = with_numbers(run, own["numbers"])
    return changed.outputs_fn(own["trainable"], frozen, model_state, batch)


def with_numbers(run: Run, numbers: Numbers) -> Run:
    """The run with these numbers, traced ones too."""
    own = {name: value for name, value in numbers.items() if name not in (RANK, ALPHA)}
    changed = run.at(own) if own else run
    if not {RANK, ALPHA} & numbers.keys():
        return changed
    settings = run.config.lora
    alpha, rank = numbers.get(ALPHA, settings.alpha), numbers.get(RANK, settings.rank)
    factor = _scale(alpha, rank, settings) / _scale(settings.alpha, settings.rank, settings)
    return dataclasses.replace(
        changed, parameters=ScaledParameters(**vars(changed.parameters), factor=factor)
    )


def _scale(alpha: Any, rank: Any, settings: ConfigDict) -> Any:
    """Of an adapter's update, as trees.lora.attach has it."""
    if isinstance(rank, jax.Array):
        rank = rank.astype(jnp.float32)
        return alpha / (jnp.sqrt(rank) if settings.rank_stabilized else rank)
    return alpha / (math.sqrt(rank) if settings.rank_stabilized else rank)


@dataclass(frozen=True)
class ScaledParameters(Parameters):
    """Parameters whose adapters' updates are multiplied by a factor.

    Attributes:
      factor: f32[].
    """

    factor: Any

    def assemble(self, flat: Mapping[str, Any]) -> Any:
        """The model's tree from all its arrays by path, each B multiplied by the factor."""
        scaled = {
            path: flat[path] * self.factor.astype(flat[path].dtype)
            for path in lora.adapter_paths(self.like)
            if path.endswith("/b")
        }
        return super().assemble({**flat, **scaled})


# Numbers and rows -------------------------------------------------------------------------------


def dtype_of(config: ConfigDict, name: str) -> Any:
    """The dtype that a step has a field's number in."""
    return jnp.int32 if type(fields(config)[name]) is int else jnp.float32


def abstract_numbers(
    config: ConfigDict, names: Sequence[str], *axes: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """ShapeDtypeStructs of the numbers of one trial, or of several by an axis."""
    return {name: jax.ShapeDtypeStruct(axes, dtype_of(config, name)) for name in names}


def pad(state: Any, like: Any) -> Any:
    """A trial's state with its adapters filled up with zeros to the shapes of `like`."""

    def fill(array: jax.Array, target: Any) -> jax.Array:
        ends = [(0, most - own) for own, most in zip(array.shape, target.shape, strict=True)]
        return jnp.pad(array, ends) if any(end for _, end in ends) else array

    return jax.tree.map(fill, state, like)


def cut(state: Any, like: Any) -> Any:
    """The inverse of `pad`: what a run alone has the shapes `like` of."""
    return jax.tree.map(lambda x, to: x[tuple(map(slice, to.shape))], state, like)


def trained_bytes(run: Run) -> int:
    """Bytes of what trains, the adapter and head that a result must hold."""
    trainable, _ = run.parameters.abstract()
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in trainable.values())
