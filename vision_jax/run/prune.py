"""A smaller model out of a trained one: channels, heads and layers that weigh least are cut out.

    Scores                 of each weight: its square, or what the loss would change without it
    prune(model, ...)      -> Pruned: an ordinary model of its family with other widths

Every group of one kind loses the same share, each its own least, so that the family's arguments say
what is left.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax import convert, cost, platform, sharding
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import UserError
from vision_jax.models import families
from vision_jax.models.widths import IMPLIED, Width, explicit, read_arguments, widths_of
from vision_jax.run import shrink
from vision_jax.run.description import model_shapes
from vision_jax.run.prepare import Run
from vision_jax.trees import groups, paths, surgery
from vision_jax.trees.groups import Group

Flat = dict[str, Any]
LAYERS = "layers"


@dataclass(frozen=True)
class Scores:
    """How much each channel counts, out of a number for each weight.

    Attributes:
      values: arrays in the shapes of the weights, by path; several are of several batches.
      squared: a channel's score is the square of the sum over its weights, and not the sum.
    """

    values: Sequence[Mapping[str, np.ndarray]]
    squared: bool

    def of(self, group: Group) -> np.ndarray:
        """f64[count]: the mean over the batches for each channel of a group."""
        found = np.stack([groups.sums(values, group) for values in self.values])
        return (np.square(found) if self.squared else found).mean(0)

    def of_part(self, prefix: str) -> float:
        """Of all weights whose paths begin so, as if they were one channel."""
        found = np.array(
            [
                sum(float(x.sum()) for path, x in values.items() if path.startswith(prefix))
                for values in self.values
            ]
        )
        return float((np.square(found) if self.squared else found).mean())


def magnitude(params: Any) -> Scores:
    """The squared L2 norm of all weights that a channel takes part in."""
    flat = paths.flatten(params)
    return Scores([{path: np.square(np.asarray(x, np.float64)) for path, x in flat.items()}], False)


def taylor(params: Any, gradients: Sequence[Any]) -> Scores:
    """The square of gradient · weight: what the loss changes without a channel, to first order.

    Molchanov et al. 2019, https://arxiv.org/abs/1906.10771, equation 8.

    Args:
      params: the parameters.
      gradients: of the loss with respect to them, for each batch.
    """
    flat = {path: np.asarray(x, np.float64) for path, x in paths.flatten(params).items()}
    return Scores(
        [{p: flat[p] * np.asarray(g) for p, g in paths.flatten(one).items()} for one in gradients],
        True,
    )


def taylor_of_run(run: Run, variables: Mapping[str, Any], count: int) -> Scores:
    """`taylor` by the loss of a run's task, without its recipes, on batches of its training data.

    Args:
      run: of any task.
      variables: of its model, adapters merged.
      count: how many batches.
    """
    apply, state = families.make_apply(run.model), variables.get("batch_stats", {})
    objective = run.task.make_objective(
        run.config, run.model, run.student.predicts, apply, paths.nest, run.mesh
    )

    def loss(flat: Flat, batch: Any, key: jax.Array) -> jax.Array:
        view = objective.prepare(jax.lax.stop_gradient(flat), {}, state, batch, key)
        outputs, _ = objective.forward(flat, {}, state, view, key, train=False)
        return objective.criterion(flat, outputs, view)[0].mean()

    gradient = jax.jit(jax.grad(loss))
    place, data = sharding.make_batch_placer(run.mesh), run.task.read_sources(run.config)[0]
    batches = run.training_data(data, DamageLog())
    key, flat = jax.random.key(run.config.seed), paths.flatten(variables["params"])
    return taylor(
        variables["params"],
        [
            jax.device_get(gradient(flat, place(next(batches)), jax.random.fold_in(key, index)))
            for index in range(count)
        ],
    )


def count(variables: Mapping[str, Any]) -> int:
    """Parameters of a model, without statistics."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def macs(model: Any, variables: Mapping[str, Any], image_size: tuple[int, int]) -> int:
    """Multiplications of one image's products and convolutions, of the compiled program."""
    images = jax.ShapeDtypeStruct((1, *image_size, model.in_channels), jnp.float32)
    with platform.traced_for(platform.ANY):
        compiled = jax.jit(model.apply).lower(dict(variables), images).compile()
    return round(cost.count(compiled).flops / 2)


@dataclass(frozen=True)
class Pruned:
    """What is left.

    Attributes:
      model: of the same family.
      variables: {"params": ...} and, with BatchNorm, {"batch_stats": ...}.
      lines: what was cut out, for people.
      exact: nothing but what has no influence by itself was touched: no norm took a mean over it.
    """

    model: Any
    variables: dict[str, Any]
    lines: tuple[str, ...]
    exact: bool


def prune(
    model: Any,
    variables: Mapping[str, Any],
    image_size: tuple[int, int],
    scores: Scores,
    *,
    keep: float,
    what: Sequence[str],
    multiple: int = 8,
) -> Pruned:
    """Cuts out of a model what scores least.

    Args:
      model: of a family that models.widths knows.
      variables: its arrays, adapters merged.
      image_size: (height, width) in pixels.
      scores: `magnitude` or `taylor`.
      keep: the share of each group that stays, above 0 up to 1.
      what: some of models.widths.KINDS that the family has, and "layers".
      multiple: that widths are rounded to, but heads.

    Raises:
      UserError: a family without widths, a kind that it hasn't, or sizes that it can't have.
    """
    if not 0 < keep <= 1 or multiple < 1:
        raise UserError(f"keep {keep}, multiple {multiple}: keep a share up to 1 of 1 or more")
    family = families.family_of(model)
    arguments = explicit(family, convert.arguments_of(model))
    widths = widths_of(family, arguments)
    has = (*dict.fromkeys(width.kind for width in widths), LAYERS)
    if unknown := [kind for kind in what if kind not in has] or not what:
        raise UserError(
            f"{unknown if what else 'nothing'} to prune: a {family} has {', '.join(has)}"
        )
    lines: list[str] = []
    flats = {name: paths.flatten(tree) for name, tree in variables.items()}
    flat = {path: leaf for one in flats.values() for path, leaf in one.items()}
    cut, exact = dict(flat), True
    for group, width in _chosen(model, variables, flat, image_size, widths, what):
        count = _count(group, widths, keep, multiple)
        if count < group.count:
            kept = np.sort(np.argsort(-scores.of(group), kind="stable")[:count])
            cut = groups.take(cut, group, kept)
            exact &= group.exact
            lines.append(f"{_name(group)}: {width.kind} {group.count} -> {count}")
    shapes = {path: leaf.shape for path, leaf in cut.items()}
    arguments = read_arguments(widths, arguments, shapes)
    trees = {name: paths.nest({path: cut[path] for path in one}) for name, one in flats.items()}
    if LAYERS in what:
        arguments, trees = _fewer_layers(family, arguments, trees, scores, keep, lines)
    smaller = _build(family, arguments, trees, image_size)
    return Pruned(smaller, trees, tuple(lines), exact and LAYERS not in what)


def free_kinds(
    model: Any, variables: Mapping[str, Any], image_size: tuple[int, int]
) -> tuple[str, ...]:
    """The kinds of channels whose removal changes nothing where they were zero: Group.exact."""
    family = families.family_of(model)
    widths = widths_of(family, explicit(family, convert.arguments_of(model)))
    exact: dict[str, bool] = {}
    for group in find_groups(model, variables, image_size):
        for width in _widths(group, widths):
            exact[width.kind] = exact.get(width.kind, True) and group.exact
    return tuple(kind for kind, free in exact.items() if free)


def find_groups(
    model: Any, variables: Mapping[str, Any], image_size: tuple[int, int]
) -> list[Group]:
    """The groups of a model's channels, of parameters and statistics by path."""
    flats = {name: paths.flatten(tree) for name, tree in variables.items()}
    # Neither a loop over stacked blocks nor merging of tokens changes what the parameters are.
    off = {name: 0 for name in ("scan", "merge") if getattr(model, name, 0)}
    model = model.clone(**off)

    def outputs(arrays: Flat, images: jax.Array) -> Any:
        trees = {name: paths.nest({p: arrays[p] for p in flat}) for name, flat in flats.items()}
        return model.apply(trees, images, train=False)

    images = jax.ShapeDtypeStruct((1, *image_size, model.in_channels), jnp.float32)
    with platform.traced_for(platform.ANY):
        flat = {path: leaf for one in flats.values() for path, leaf in one.items()}
        return groups.find_groups(outputs, flat, images)


def _chosen(
    model: Any,
    variables: Mapping[str, Any],
    flat: Flat,
    image_size: tuple[int, int],
    widths: Sequence[Width],
    what: Sequence[str],
) -> list[tuple[Group, Width]]:
    """The groups of the kinds that are asked for, all of a kind's or an error."""
    if set(what) == {LAYERS}:
        return []
    found = []
    for group in find_groups(model, variables, image_size):
        own = _widths(group, widths)
        if any(width.kind in what for width in own):
            found.append((group, next(width for width in own if width.kind in what)))
    free = {axis for group, _ in found for axis in group.members}
    for width in widths:
        if width.kind in what:
            held = [p for p in flat if width.matches(p, width.axis) and (p, width.axis) not in free]
            if held and flat[held[0]].shape[width.axis] > width.unit:
                raise UserError(
                    f"{width.kind}: nothing of {held[0]} can go: what the model does with its axis "
                    f"{width.axis} can't be done with a part of it"
                )
    return found


def _widths(group: Group, widths: Sequence[Width]) -> list[Width]:
    return [width for width in widths if any(width.matches(*axis) for axis in group.members)]


def _count(group: Group, widths: Sequence[Width], keep: float, multiple: int) -> int:
    """How many channels of a group stay: so many that each argument is a whole multiple."""
    own = _widths(group, widths)
    path, axis = next(place for place in group.members if own[0].matches(*place))
    size = len(group.members[path, axis])
    steps = [width.unit * (1 if width.kind == "heads" else multiple) for width in own]
    step = math.lcm(size // group.count, *steps)
    left = max(step, round(keep * size / step) * step)
    return group.count if left >= size else left * group.count // size


def _name(group: Group) -> str:
    """The shortest path of a layer of it."""
    layers = {path.rpartition("/")[0] or path for path, _ in group.members}
    return min(layers, key=lambda path: (len(path), path))


def _fewer_layers(
    family: str,
    arguments: Mapping[str, Any],
    trees: Mapping[str, Any],
    scores: Scores,
    keep: float,
    lines: list[str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments, arrays) with the layers of each row that score most."""
    rows = []
    for row, depth in shrink.rows_of(family, arguments).items():
        opened = family in shrink.OPENED and "stage_" in row
        score = [scores.of_part(f"{row}_{index}/") for index in range(depth)]
        order = sorted(
            range(depth), key=lambda i: (-(math.inf if opened and not i else score[i]), i)
        )
        kept = tuple(sorted(order[: max(1, round(keep * depth))]))
        if len(kept) < depth:
            rows.append((row, kept))
    plan = shrink.plan_shrinking(family, arguments, layers=rows, width=0, mlp_width=0)
    lines += [plan.line()] if rows else []
    taken = {name: surgery.take_layers(tree, plan.layers) for name, tree in trees.items()}
    return {**arguments, **plan.after}, taken


def _build(
    family: str, arguments: Mapping[str, Any], trees: Mapping[str, Any], size: tuple[int, int]
) -> Any:
    """The model of these arguments, but those that follow from others; its arrays must be these.

    Raises:
      UserError: the family has no such model.
    """
    wanted = _shapes(trees)

    def fits(arguments: Mapping[str, Any]) -> Any:
        built = families.build_model(family, **arguments)
        try:
            return built if _shapes(model_shapes(built, size)) == wanted else None
        except UserError:
            return None

    if (model := fits(arguments)) is None:
        raise UserError(
            f"no {family} has these widths, where heads, groups or shortcuts depend on each other: "
            "keep another share, or prune fewer kinds"
        )
    for name, implied in IMPLIED.items():
        if name in arguments and (shorter := fits({**arguments, name: implied})) is not None:
            model, arguments = shorter, {**arguments, name: implied}
    return model


def _shapes(trees: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {p: x.shape for tree in trees.values() for p, x in paths.flatten(tree).items()}
