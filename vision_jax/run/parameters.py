"""A run's parameters: their layout before any array exists, and the arrays of a new run.

The order is DESIGN's: shapes by `eval_shape`, shardings on the abstract tree, weights imported
strictly, the rest initialized where it will live, adapters attached, then trainable and frozen.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from vision_jax import convert, sharding
from vision_jax.errors import UserError
from vision_jax.models import families
from vision_jax.models.families import FAMILIES, initialize
from vision_jax.recipes.distillation import objective as distillation
from vision_jax.run import shrink
from vision_jax.run.description import (
    Description,
    find_head,
    find_shrinking,
    model_shapes,
    rules_of,
)
from vision_jax.trees import lora, paths
from vision_jax.trees.leaf import roles, trainable_paths

Flat = dict[str, Any]
Attach = Callable[[Any, jax.Array], Any]  # (params, key) -> params with structured leaves


@dataclass(frozen=True)
class Parameters:
    """The layout of a run's parameters, before any array exists.

    Attributes:
      like: the tree with adapters attached, of ShapeDtypeStructs.
      model_state: the BatchNorm statistics' tree, {} without.
      shardings: of the parameters, by path.
      trainable: paths that the optimizer changes.
      projections: ShapeDtypeStructs of what trains besides, by path.
      tensor: what a mesh's axis `tensor` splits.
    """

    like: Any
    model_state: Any
    shardings: dict[str, NamedSharding]
    trainable: frozenset[str]
    projections: dict[str, jax.ShapeDtypeStruct]
    tensor: sharding.TensorLayout

    def assemble(self, flat: Mapping[str, Any]) -> Any:
        """The model's tree from all its arrays by path; those of recipes are left out."""
        own = {path: leaf for path, leaf in flat.items() if not distillation.is_beside(path)}
        return paths.unflatten(self.like, own)

    def assemble_used(self, flat: Mapping[str, Any], but: str = "") -> Any:
        """`assemble`, as layers use it on this mesh, inside of a compiled function.

        `but`: regular expression of paths that a loop over layers takes as they are.
        """
        return self.tensor.enter(self.assemble(flat), but=but)

    def abstract(self) -> tuple[Flat, Flat]:
        """(trainable, frozen) ShapeDtypeStructs with shardings: targets for a restore."""
        flat = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.shardings[path])
            for path, leaf in (paths.flatten(self.like) | self.projections).items()
        }
        return paths.partition(flat, set(self.trainable))


def plan_parameters(
    model: Any,
    image_size: tuple[int, int],
    mesh: Mesh,
    *,
    attach: Attach,
    rules: Sequence[str],
    sharding_rules: Sequence[tuple[str, Any]] = (),
    projections: Mapping[str, tuple[int, int]] | None = None,
) -> Parameters:
    """Shapes, shardings and the choice of what trains.

    Args:
      model: the flax module.
      image_size: (height, width) in pixels.
      mesh: of the devices.
      attach: of the recipes, kernels -> structured leaves.
      rules: regular expressions over whole paths: what trains beside adapters.
      sharding_rules: see sharding.parameter_shardings.
      projections: shapes of what trains besides (see Description).

    Raises:
      UserError: nothing trains, or a rule that matches nothing.
    """
    shapes = model_shapes(model, image_size)
    like = jax.eval_shape(attach, shapes["params"], jax.random.key(0))
    model_state = shapes.get("batch_stats", {})
    trainable = trainable_paths(like, rules, field="config.trainable")
    if not trainable:
        raise UserError("nothing trains: set config.trainable, or config.recipes=lora")
    beside = {
        path: jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
        for path, shape in (projections or {}).items()
    }
    tensor = sharding.tensor_layout(like, mesh, getattr(model, "tensor_rules", None))
    shardings = sharding.parameter_shardings(like, mesh, sharding_rules, tensor=tensor)
    shardings |= sharding.parameter_shardings(beside, mesh)
    if lora.adapter_paths(like) and model_state and not getattr(model, "freeze_norm", True):
        raise UserError(
            "adapters leave BatchNorm's statistics alone: set config.model.freeze_norm=True"
        )
    trains = frozenset(trainable | beside.keys())
    return Parameters(like, model_state, shardings, trains, beside, tensor)


def make_parameters(
    config: ConfigDict,
    model: Any,
    image_size: tuple[int, int],
    plan: Parameters,
    mesh: Mesh,
    weights: convert.Weights | None,
    attach: Attach,
) -> tuple[Flat, Flat, Any, list[str]]:
    """The arrays of a new run.

    Returns:
      (trainable, frozen, model_state, paths initialized at random though weights were imported)
    """
    key = jax.random.key(config.seed)
    params, model_state, fresh = _plain_parameters(config, model, image_size, mesh, weights)
    flat = paths.flatten(_attached(attach, params, jax.random.fold_in(key, 1), plan))
    for number, (path, leaf) in enumerate(plan.projections.items()):
        begin = jax.jit(
            partial(distillation.project, shape=leaf.shape), out_shardings=plan.shardings[path]
        )
        flat[path] = begin(jax.random.fold_in(jax.random.fold_in(key, 2), number))
    trainable, frozen = paths.partition(flat, set(plan.trainable))
    return trainable, frozen, model_state, fresh if weights is not None else []


def _attached(attach: Attach, params: Any, key: jax.Array, plan: Parameters) -> Any:
    """attach(params, key); what it leaves as it is keeps its memory, and is gone from `params`."""
    after, flat = paths.flatten(plan.like), paths.flatten(params)
    kept = {
        role.rule_path
        for path, role in roles(plan.like).items()
        if role.rule_path in flat
        and (after[path].shape, after[path].dtype)
        == (flat[role.rule_path].shape, flat[role.rule_path].dtype)
    }

    def make(kept: Flat, others: Flat, key: jax.Array) -> Any:
        return attach(paths.unflatten(params, kept | others), key)

    out = plan.assemble(plan.shardings)
    return jax.jit(make, donate_argnums=0, out_shardings=out)(*paths.partition(flat, kept), key)


def headless_parameters(
    config: ConfigDict,
    model: Any,
    image_size: tuple[int, int],
    mesh: Mesh,
    weights: convert.Weights,
) -> tuple[Any, Any]:
    """(params, model_state) of a model without head, all from the weights."""
    params, model_state, _ = _plain_parameters(
        config, model, image_size, mesh, weights, headless=True
    )
    return params, model_state


def _plain_parameters(
    config: ConfigDict,
    model: Any,
    image_size: tuple[int, int],
    mesh: Mesh,
    weights: convert.Weights | None,
    headless: bool = False,
) -> tuple[Any, Any, list[str]]:
    """(params without adapters, model_state, paths that were initialized at random)."""
    key = jax.random.key(config.seed)
    shapes = model_shapes(model, image_size)
    base, statistics = (paths.flatten(shapes.get(name, {})) for name in ("params", "batch_stats"))
    # A rule may be about adapters, which there are none of yet.
    tensor = sharding.tensor_layout(shapes["params"], mesh, getattr(model, "tensor_rules", None))
    shardings = sharding.parameter_shardings(
        base, mesh, config.sharding_rules, strict=False, tensor=tensor
    )
    shardings |= dict.fromkeys(statistics, sharding.replicated(mesh))
    target = base | statistics  # their paths differ: mean, var and count are no parameters' names

    placed: dict[str, jax.Array] = {}
    fresh = set(target)
    if weights is not None:
        rules = () if headless else config.model.reinitialize
        prefix = "" if headless else backbone_prefix(weights, model)
        fresh = paths.select(target, rules, field="config.model.reinitialize")
        if (
            not headless
            and FAMILIES[families.family_of(model)].wraps == convert.recognize(weights)[0]
        ):
            fresh |= {path for path in target if path.startswith(model.added)}
        reinitialized = sorted(find_head(model, image_size)[0] if headless else fresh)
        reinitialized += getattr(model, "left_out", ())
        shrinking = find_shrinking(config, weights)
        if prefix:
            placed = _import_backbone(weights, model, target, prefix, shardings)
            fresh |= {path for path in target if path not in placed}
            placed = {path: array for path, array in placed.items() if path not in fresh}
        elif shrinking is None:
            placed = convert.import_weights(
                weights,
                target,
                convert.arguments_of(model),
                reinitialized=reinitialized,
                place=lambda path, array: sharding.place(array, shardings[path]),
            )
        else:
            placed = shrink.import_student(
                weights,
                model,
                shrinking,
                image_size,
                reinitialized=reinitialized,
                shardings=shardings,
                mesh=mesh,
            )
    names = sorted(fresh)
    params, model_state = fill_parameters(model, image_size, shapes, placed, names, key, shardings)
    return params, model_state, names


def backbone_prefix(weights: convert.Weights, model: Any) -> str:
    """Where a model keeps its backbone, if that is all that the weights are for; else ""."""
    family, own = families.family_of(model), convert.recognize(weights)[0]
    same = family == own or FAMILIES[family].wraps == own
    return "" if same or not families.takes_backbone(family, own) else FAMILIES[family].backbone


def _import_backbone(
    weights: convert.Weights,
    model: Any,
    target: Mapping[str, Any],
    prefix: str,
    shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
    """The arrays of the model's backbone, by path, from a classifier, whose head is left out.

    Raises:
      UserError: the backbone is not the classifier's.
    """
    inside = {
        path.removeprefix(prefix): leaf for path, leaf in target.items() if path.startswith(prefix)
    }
    family, own = convert.recognize(weights)
    size = own.get("image_size") or (64, 64)
    whole = model_shapes(families.build_model(family, **own), size)
    beyond = {path for tree in whole.values() for path in paths.flatten(tree)} - set(inside)
    placed = convert.import_weights(
        weights,
        inside,
        {"in_channels": model.in_channels},
        reinitialized=sorted(beyond),
        place=lambda path, array: sharding.place(array, shardings[prefix + path]),
    )
    return {prefix + path: array for path, array in placed.items()}


def fill_parameters(
    model: Any,
    image_size: tuple[int, int],
    shapes: Any,
    imported: Mapping[str, jax.Array],
    fresh: Sequence[str],
    key: jax.Array,
    shardings: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """(params, model_state) of what was imported and of what begins anew.

    Args:
      model: the flax module.
      image_size: (height, width) in pixels.
      shapes: of its variables, as `model_shapes` gives them.
      imported: arrays by path.
      fresh: the paths of all others, which are initialized.
      key: of the initialization.
      shardings: by path, of the fresh ones at least; None leaves them to JAX.
    """

    def make(key):  # what is imported is not computed: the compiler drops it
        variables = initialize(model, key, image_size)
        flat = {
            path: leaf for tree in variables.values() for path, leaf in paths.flatten(tree).items()
        }
        return {path: flat[path] for path in fresh}

    out = None if shardings is None else {path: shardings[path] for path in fresh}
    made = jax.jit(make, out_shardings=out)(key) if fresh else {}
    everything = {**imported, **made}

    def tree(name: str) -> Any:
        like = shapes.get(name, {})
        return paths.unflatten(like, {path: everything[path] for path in paths.flatten(like)})

    return tree("params"), tree("batch_stats")


def head_warnings(
    weights: convert.Weights,
    model: Any,
    description: Description,
    fresh: Collection[str],
    plan: Parameters,
) -> list[str]:
    """What a user should know of the head of a new run from weights; `fresh` began anew."""
    warnings = []
    computed = getattr(model, "computed", ())  # these need no training
    idle = [
        path
        for path in fresh
        if path in plan.shardings and path not in plan.trainable and path not in computed
    ]
    if idle:
        warnings.append(
            f"{', '.join(idle)}: re-initialized, and not among what trains: it stays as it was "
            "drawn; add it to config.trainable"
        )
    own, names = convert.class_names_of(weights), description.class_names
    if own is None or len(own) != len(names) or all(re.fullmatch(r"LABEL_\d+", n) for n in own):
        return warnings
    others = [label for label, name in enumerate(names) if own[label] != name]
    head, _ = find_head(model, description.preprocessing.image_size) if others else (set(), set())
    if head - set(fresh):
        label = others[0]
        warnings.append(
            f"the head is the weights' own, and {len(others)} of its {len(names)} classes have "
            f"other names there: label {label} is {own[label]!r} there and {names[label]!r} in the "
            f"data; --config.model.reinitialize={rules_of(head)} begins with a new head"
        )
    return warnings
