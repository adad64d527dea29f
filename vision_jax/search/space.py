"""A search space, and the trials that a sampler draws from it: no array, no JAX.

    space file --read_space--> {field: Range} --draw_trials--> {field: value} of each trial

A space file is Python:

    from vision_jax.search import choice, log_uniform

    def get_space():
        return {"optim.lr": log_uniform(1e-4, 1e-2), "lora.rank": choice(4, 8, 16)}

A draw is a function of (seed, trial), so that more trials leave the first ones as they are. What is
drawn between two floats is a number that float32 holds, since a step computes with such.
"""

import itertools
import math
import runpy
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vision_jax import files
from vision_jax.config import cast, check_values, fields, fields_of, unknown
from vision_jax.errors import UserError, UserErrors

SAMPLERS = ("random", "sobol", "grid")
MOST_TRIALS = 10_000
MOST_FIELDS = 64
# What a search itself decides, or what changes no update.
KEPT = (
    "task", "total_steps", "log_every", "checkpoint_every", "mesh.", "sharding_rules", "evaluate.",
    "robustness.", "ptq.", "probe.", "data.threads", "data.workers", "data.eval", "data.holdout",
)  # fmt: skip


@dataclass(frozen=True)
class Uniform:
    """A number between two, both within.

    Attributes:
      low, high: the ends; of whole numbers both are drawn too.
      log: uniform in its logarithm.
    """

    low: float
    high: float
    log: bool = False

    def at(self, share: float) -> float | int:
        """The number at a share in [0, 1)."""
        if isinstance(self.low, int):  # each whole number has an equal part of the range
            found = round(_between(self.low - 0.5, self.high + 0.5, share, self.log))
            return int(min(max(found, self.low), self.high))
        return self.held(_between(self.low, self.high, share, self.log))

    def held(self, number: float) -> float:
        """The number as float32 holds it, within the range."""
        return min(max(float(np.float32(number)), self.low), self.high)

    def ends(self) -> Sequence[float]:
        """Both."""
        return self.low, self.high


@dataclass(frozen=True)
class Choice:
    """One of several values, which are taken as they stand."""

    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """The value at a share in [0, 1)."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]

    def ends(self) -> Sequence[Any]:
        """All."""
        return self.values


@dataclass(frozen=True)
class When:
    """What a field may be where another one has some values; elsewhere it stays as it is.

    Attributes:
      field: the other one, a choice that stands before this one in the space.
      values: of it.
      one: the range there.
      otherwise: the config's own value.
    """

    field: str
    values: tuple[Any, ...]
    one: Uniform | Choice
    otherwise: Any = None


Range = Uniform | Choice | When


def ends(one: Range) -> Sequence[Any]:
    """The smallest and largest values of a field, or all of a choice."""
    return (*one.one.ends(), one.otherwise) if isinstance(one, When) else one.ends()


def _between(low: float, high: float, share: float, log: bool) -> float:
    if log:
        return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return low + share * (high - low)


def uniform(low: float, high: float) -> Uniform:
    """A number between two; a whole one where both are.

    Examples:
      >>> uniform(0.0, 0.5).at(0.5), uniform(1, 4).at(0.99)
      (0.25, 4)

    Raises:
      UserError: no range.
    """
    return _uniform("uniform", low, high, log=False)


def log_uniform(low: float, high: float) -> Uniform:
    """A number between two, its logarithm uniform; a whole one where both are.

    Examples:
      >>> round(log_uniform(1e-4, 1e-2).at(0.5), 9)
      0.001

    Raises:
      UserError: no range above 0.
    """
    return _uniform("log_uniform", low, high, log=True)


def _uniform(name: str, low: Any, high: Any, *, log: bool) -> Uniform:
    numbers = all(type(x) in (int, float) and math.isfinite(x) for x in (low, high))
    if not numbers or not low < high or (log and low <= 0):
        above = " above 0" if log else ""
        raise UserError(
            f"{name}({low!r}, {high!r}): it takes two numbers{above}, the smaller first"
        )
    whole = type(low) is int and type(high) is int
    return Uniform(low if whole else float(low), high if whole else float(high), log)


def choice(*values: Any) -> Choice:
    """One of several values.

    Examples:
      >>> choice("adamw", "lion").at(0.7)
      'lion'

    Raises:
      UserError: no values, or one twice.
    """
    if not values or any(value in values[:index] for index, value in enumerate(values)):
        raise UserError(f"choice{values!r}: it takes different values, at least one")
    return Choice(values)


def when(field: str, values: Any, one: Uniform | Choice) -> When:
    """A range that is drawn from where another field has this value, or one of these.

    Args:
      field: the other one, a `choice` that stands before in the space.
      values: one, or a tuple of them.
      one: the range.

    Examples:
      >>> momentum = when("optim.name", "sgd", uniform(0.8, 0.99))

    Raises:
      UserError: no range.
    """
    if not isinstance(one, Uniform | Choice):
        raise UserError(f"when({field!r}, {values!r}, {one!r}): it takes a range at the end")
    return When(field, values if isinstance(values, tuple) else (values,), one)


# Space files ------------------------------------------------------------------------------------


def read_space(path: str, config: ConfigDict) -> dict[str, Range]:
    """The space of a file, checked against a config: each end of a range is tried in it.

    Raises:
      UserError: no such file, no get_space in it, or one that fails.
      UserErrors: all fields that there are not (with the nearest ones), that a search does not
        vary, and ranges that reach beyond what their fields may be.
    """
    file = files.expand(path)
    if not file.is_file():
        raise UserError(f"--space: there is no file {path}")
    try:
        namespace = runpy.run_path(str(file))
        if "get_space" not in namespace:
            raise UserError(f"--space: {path} defines no get_space()")
        space = namespace["get_space"]()
    except UserError as error:
        raise UserError(_named(path, error)) from error
    except SyntaxError as error:
        raise UserError(f"--space: {path} is no Python file: {error}") from error
    except (Exception, SystemExit) as error:  # whatever the file does wrong is its author's to mend
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        place = f"{path}:{frames[-1].lineno}" if frames else path
        raise UserError(f"--space: {place}: {type(error).__name__}: {error}") from error
    return check_space(space, config, path)


def _named(path: str, error: UserError) -> str:
    text = str(error)
    return text if text.startswith("--space") else f"--space: {path}: {text}"


def check_space(space: Any, config: ConfigDict, path: str = "space") -> dict[str, Range]:
    """The space with its values in their fields' types; see `read_space`."""
    if not isinstance(space, dict) or not 0 < len(space) <= MOST_FIELDS:
        raise UserError(
            f"--space: get_space() of {path} must return a dict of 1 to {MOST_FIELDS} fields, "
            'such as {"optim.lr": log_uniform(1e-4, 1e-2)}'
        )
    table, values, problems = fields_of(config.task), fields(config), []
    found: dict[str, Range] = {}
    for name, given in space.items():
        if name not in table:
            problems.append(f"--space: {path}: {unknown(str(name), table)}")
            continue
        if name.startswith(KEPT):
            problems.append(
                f"--space: {path}: {name} is the same for all trials of a search: set it with "
                f"--config.{name}=VALUE"
            )
            continue
        if not isinstance(given, Range):
            problems.append(
                f"--space: {path}: {name} is {given!r}: write choice(...), uniform(low, high) or "
                "log_uniform(low, high)"
            )
            continue
        there = values
        if isinstance(given, When):
            other = space.get(given.field)
            if not isinstance(other, Choice) or given.field not in found:
                problems.append(
                    f"--space: {path}: {name} is there when {given.field} has some value: that "
                    "must be a choice(...) before it"
                )
                continue
            if missing := [value for value in given.values if value not in other.values]:
                problems.append(
                    f"--space: {path}: {name} is there when {given.field} is {missing[0]!r}, "
                    "which is none of its choices (several values are a tuple, and a value that is "
                    "a tuple itself is written (value,))"
                )
                continue
            there = {**values, given.field: given.values[0]}
        inner = given.one if isinstance(given, When) else given
        try:
            ends = [cast(table[name], value) for value in inner.ends()]
        except UserError as error:
            problems.append(f"--space: {path}: {error}")
            continue
        wrong = [text for end in ends for text in check_values({**there, name: end})]
        problems += [f"--space: {path}: {text}" for text in dict.fromkeys(wrong)]
        whole = (
            Choice(tuple(ends))
            if isinstance(inner, Choice)
            else Uniform(ends[0], ends[1], inner.log)
        )
        found[name] = (
            When(given.field, given.values, whole, values[name])
            if isinstance(given, When)
            else whole
        )
    if problems:
        raise UserErrors(problems)
    return found


# Samplers ---------------------------------------------------------------------------------------


def draw_trials(
    space: Mapping[str, Range], count: int, sampler: str = "random", seed: int = 0
) -> list[dict[str, Any]]:
    """The values of each trial, by field.

    - random: independent draws.
    - sobol: a scrambled Sobol sequence (Owen), which fills the space more evenly; best a power of
      two trials.
    - grid: all combinations of the choices and of equally spaced points of each range, as many
      points as give at most `count` trials.

    Raises:
      UserError: no such sampler or count, or a grid of more trials than `count`.
    """
    if not 1 <= count <= MOST_TRIALS:
        raise UserError(f"--trials is {count}: it must be between 1 and {MOST_TRIALS}")
    if sampler == "grid":
        return _grid(space, count)
    if sampler == "sobol":
        from scipy.stats import qmc  # a second to import

        rng = np.random.default_rng([seed, len(space)])
        sequence = qmc.Sobol(len(space), scramble=True, rng=rng)
        shares = sequence.random_base2((count - 1).bit_length())[:count]
    else:
        shares = np.stack(
            [np.random.default_rng([seed, trial]).random(len(space)) for trial in range(count)]
        )
    return [_at(space, list(map(float, row))) for row in shares]


def _at(space: Mapping[str, Range], shares: Sequence[float]) -> dict[str, Any]:
    """The values at shares in [0, 1), one for each field."""
    own = dict(zip(space, shares, strict=True))
    return draw(space, lambda name, one: one.at(own[name]))


def draw(
    space: Mapping[str, Range], pick: Callable[[str, Uniform | Choice], Any]
) -> dict[str, Any]:
    """The values of a trial, by field, each as `pick(field, its range)` has it."""
    values: dict[str, Any] = {}
    for name, one in space.items():
        if not isinstance(one, When):
            values[name] = pick(name, one)
        elif values[one.field] in one.values:
            values[name] = pick(name, one.one)
        else:
            values[name] = one.otherwise
    return values


def _grid(space: Mapping[str, Range], count: int) -> list[dict[str, Any]]:
    inner = [one.one if isinstance(one, When) else one for one in space.values()]
    ranges = [one for one in inner if isinstance(one, Uniform)]
    choices = math.prod(len(one.ends()) for one in inner if isinstance(one, Choice))
    points = 1
    while ranges and choices * (points + 1) ** len(ranges) <= count:
        points += 1
    if choices * points ** len(ranges) > count:
        raise UserError(f"--trials is {count}, and the grid has {choices} points: give as many")

    def points_of(one: Uniform | Choice) -> Sequence[Any]:
        if isinstance(one, Choice):
            return one.values
        shares = np.linspace(0, 1, points) if points > 1 else [0.5]
        return list(dict.fromkeys(one.at(float(share)) for share in shares))

    drawn: list[dict[str, Any]] = []
    for point in itertools.product(*map(points_of, inner)):
        own = dict(zip(space, point, strict=True))
        if (values := _of(space, own)) not in drawn:  # some differ in what is not there alone
            drawn.append(values)
    return drawn


def _of(space: Mapping[str, Range], own: Mapping[str, Any]) -> dict[str, Any]:
    return draw(space, lambda name, one: own[name])


def describe_space(space: Mapping[str, Range]) -> dict[str, str]:
    """Each field's range in words, for people and to compare."""

    def words(one: Range) -> str:
        if isinstance(one, When):
            there = " or ".join(map(repr, one.values))
            return f"{words(one.one)}, where {one.field} is {there}"
        if isinstance(one, Choice):
            return f"one of {', '.join(map(repr, one.values))}"
        return f"{one.low!r} to {one.high!r}{', logarithmic' if one.log else ''}"

    return {name: words(one) for name, one in space.items()}
