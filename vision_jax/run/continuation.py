"""A new run that begins with an old run's weights (--from): longer, at another rate, on more data.

It is a run of its own, in its own workdir, from step 0 of its own schedule. It has the old run's
parameters, live ones where that run averages, and BatchNorm statistics; and its optimizer's state
where the new optimizer is of the same form over the same parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vision_jax import steps
from vision_jax.config import fields, load_config
from vision_jax.errors import UserError
from vision_jax.run import description
from vision_jax.run.description import Description
from vision_jax.run.parameters import Flat
from vision_jax.run.prepare import Run
from vision_jax.run.restore import Restored, read_run

# What made the old run's parameters what they are, and must be the same for the new one's.
_MADE_BY = {"variant": "", "arguments": (), "layers": (), "width": 0, "mlp_width": 0}
_SAME = ("task", "quantize.", "lora.", *(f"model.{name}" for name in _MADE_BY))


@dataclass(frozen=True)
class Origin:
    """The run that a new one begins with.

    Attributes:
      folder: its workdir, absolute.
      config: its own, with the new run's mesh.
      restored: its last checkpoint.
      notes: what the user should know of that.
    """

    folder: Path
    config: ConfigDict
    restored: Restored
    notes: list[str]

    @property
    def name(self) -> str:
        """For model.json and the log."""
        return f"{self.folder}, step {int(self.restored.state.step)}"


def read_origin(config: ConfigDict, folder: Path, workdir: Path) -> Origin:
    """Reads the run in `folder`, to begin a run of `config` in `workdir` with it.

    Raises:
      UserError: no whole run in `folder`, or one that has other parameters.
    """
    if folder.resolve() == workdir.resolve():
        raise UserError(f"--from={folder} is the --workdir: a new run needs a new one")
    if not (folder / "config.json").is_file():
        raise UserError(f"--from: {folder} holds no run, there is no config.json in it")
    old = load_config(str(folder / "config.json"), {})
    before, now = (_relevant(one) for one in (old, config))
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise UserError(
                f"--from: the run in {folder} has config.{name} {before.get(name)!r}, and this one "
                f"{now.get(name)!r}: make them equal, or start from its merged weights with "
                f"--config.model.weights={folder}"
            )
    placed = old.copy_and_resolve_references()
    with placed.unlocked():
        placed.mesh, placed.sharding_rules = config.mesh, config.sharding_rules
    restored, notes = read_run(placed, folder, "last")
    return Origin(folder.resolve(), old, restored, notes)


def _relevant(config: ConfigDict) -> dict[str, Any]:
    leaves = ("quantize", "lora")  # recipes that change which parameters there are
    others = tuple(f"{name}." for name in leaves if name not in config.recipes)
    return {"recipes": tuple(name for name in config.recipes if name in leaves)} | {
        name: value
        for name, value in fields(config).items()
        if name.startswith(_SAME) and name != "lora.dropout" and not name.startswith(others)
    }


def describe(config: ConfigDict, origin: Origin, class_names: tuple[str, ...]) -> Description:
    """The old run's model, changed where the new config says so.

    Raises:
      UserError: other classes, or sizes that this model cannot have.
    """
    old = origin.restored.run.description
    if class_names != old.class_names:
        raise UserError(
            f"--from: the run in {origin.folder} has {len(old.class_names)} classes, and "
            f"config.data.train {len(class_names)}, or others: start from its merged weights with "
            f"--config.model.weights={origin.folder} and a new head (config.model.reinitialize)"
        )
    made = config.copy_and_resolve_references()
    with made.unlocked():
        made.model.update(_MADE_BY)
    return replace(
        description.describe(made, None, class_names, old=old),
        weights=old.weights,
        sha256=old.sha256,
        started_from=origin.name,
    )


def make_state(run: Run, origin: Origin) -> tuple[steps.TrainState, Flat, str]:
    """The first state of the new run `run`.

    Returns:
      (state, frozen parameters, what became of the optimizer's state)

    Raises:
      UserError: the new run has parameters that the old one hasn't, or of other shapes.
    """
    old = origin.restored.state
    have = {**old.trainable, **origin.restored.frozen}
    trainable, frozen = (_take(part, have, origin) for part in run.parameters.abstract())
    statistics = _take_tree(run.parameters.model_state, old.model_state, origin)
    before, differing = (
        old.opt_state,
        _first_difference(old.opt_state, run.abstract_state.opt_state),
    )
    state = run.make_state(trainable, statistics)
    if differing:
        return state, frozen, f"the optimizer's state begins anew: {differing}"
    # Moments and their counters go on, the schedule begins with its first update.
    moved = jax.tree.map(jax.device_put, before, run.shardings.opt_state)
    kept = optax.tree_utils.tree_set(moved, _of_schedule, count=jnp.zeros((), jnp.int32))
    kept = jax.tree.map(jax.device_put, kept, run.shardings.opt_state)
    return replace(state, opt_state=kept), frozen, "the optimizer's state goes on"


def _take(
    wanted: Mapping[str, jax.ShapeDtypeStruct], have: Mapping[str, jax.Array], origin: Origin
) -> Flat:
    for path, leaf in wanted.items():
        if path not in have or have[path].shape != leaf.shape:
            there = f"has {list(have[path].shape)}" if path in have else "lacks it"
            raise UserError(
                f"--from: {path} is {list(leaf.shape)} in the new run, and the run in "
                f"{origin.folder} {there}: start from its merged weights with "
                f"--config.model.weights={origin.folder}"
            )
    return {path: jax.device_put(have[path], leaf.sharding) for path, leaf in wanted.items()}


def _take_tree(wanted: Any, have: Any, origin: Origin) -> Any:
    ours, theirs = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (wanted, have))
    if ours != theirs:
        raise UserError(f"--from: the run in {origin.folder} has other BatchNorm statistics")
    return have


def _first_difference(before: Any, now: Any) -> str:
    """What keeps an optimizer's state from fitting another optimizer, "" if it does."""
    ours, theirs = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (now, before)
    )
    for name in sorted(ours.keys() ^ theirs.keys()):
        return f"the optimizers differ in {name}"
    return next(
        (f"{name} has another shape" for name in ours if ours[name].shape != theirs[name].shape), ""
    )


def _of_schedule(path: Any, _: Any) -> bool:
    names = [getattr(key, "tuple_name", "") for key in path]
    return not {"ScaleByScheduleState", "WeightDecaySchedule"}.isdisjoint(names)
