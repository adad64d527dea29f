"""What a recipe may change of a run. One that does not care inherits what changes nothing.

    check        refuses what it cannot be combined with
    attach       the parameter tree: kernels -> structured leaves
    beside       arrays that train beside the model's own
    abstract     frozen arrays that it brings, and place, which makes them
    view_size    of the images that are read
    features     of the model, that it compares
    transform    the objective: Objective -> Objective
    step         how the compiled step differs

Recipes are applied in the order of config.recipes; config/fields/field.py has the list of them.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vision_jax.config import RECIPES
from vision_jax.objective import Objective
from vision_jax.steps import Flat, Replay


@dataclass(frozen=True)
class Student:
    """What recipes know of the model that trains.

    Attributes:
      task: its name, a key of TASKS.
      labels_images: whether a label is an image's, so that logits are f[B, C].
      model: the flax module.
      family: its architecture's name.
      predicts: what its head computes (see models.families.Family).
      image_size: (height, width) in pixels.
      class_names: name of each label, in their order.
    """

    task: str
    labels_images: bool
    model: Any
    family: str
    predicts: str
    image_size: tuple[int, int]
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class StepOptions:
    """What a recipe asks of the compiled step (see steps.make_train_step).

    Attributes:
      replay: several updates on one batch.
      average_prefix: where it finds the moving average among the frozen arrays.
    """

    replay: Replay | None = None
    average_prefix: str = ""


class Recipe:
    """A recipe that changes nothing."""

    step = StepOptions()
    features: tuple[str, ...] = ()
    adapter: Path | None = None  # the folder that it begins with, of which a workdir keeps a copy

    def check(self, student: Student) -> None:
        """Raises UserError, with the reason and what to do, if it can't be applied."""

    def attach(self, params: Any, model: Any, key: jax.Array) -> Any:
        """The model's tree with structured leaves; also called with abstract values."""
        del model, key
        return params

    def beside(self, student: Student) -> dict[str, tuple[int, int]]:
        """Shapes of the arrays that train beside the model's own, by path."""
        del student
        return {}

    def abstract(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """ShapeDtypeStructs with shardings of the frozen arrays that it brings, by path."""
        del mesh
        return {}

    def place(self, mesh: Mesh) -> Flat:
        """The arrays of `abstract` on the mesh, by path."""
        del mesh
        return {}

    def view_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The least (height, width) of the images that are read; `image_size` is the student's."""
        return image_size

    def open_stored(self, views: Any) -> Callable[[int], dict[str, np.ndarray]] | None:
        """From the number of a step to arrays that join its batch; `views` is the preprocessing."""
        del views
        return None

    def transform(self, objective: Objective, student: Student) -> Objective:
        """The objective that training minimizes, out of the one that the recipes before left."""
        del student
        return objective

    def lines(self) -> list[str]:
        """Lines of the log about the recipe."""
        return []

    def sources(self) -> tuple[tuple[str, str], ...]:
        """(origin, sha256) of each file of weights that it reads: the same for all of a run."""
        return ()


def mixed_targets(fields: Mapping[str, Any], *names: str) -> str:
    """The first field of augment.NAME that is on and makes a target of several classes, or ""."""
    return next((f"augment.{n}" for n in names if fields.get(f"augment.{n}")), "")


def make_recipes(names: Sequence[str], fields: Mapping[str, Any]) -> tuple[Recipe, ...]:
    """The recipes of a run, in the order in which they are applied.

    Args:
      names: of recipes, keys of RECIPES.
      fields: all of the config, by dotted name; each recipe takes what it needs.
    """
    return tuple(importlib.import_module(RECIPES[name]).make(fields) for name in names)
