"""The teachers of a run: found, placed among the frozen arrays, and run on views."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vision_jax import convert, sharding
from vision_jax.errors import UserError
from vision_jax.models import families
from vision_jax.models.families import FAMILIES
from vision_jax.recipes.distillation import objective as distillation
from vision_jax.recipes.distillation.objective import TeacherForward
from vision_jax.trees import paths


@dataclass(frozen=True)
class Teacher:
    """A frozen model that a run learns from.

    Attributes:
      weights: the file that its arrays come from.
      family: its architecture's name.
      model: the flax module, computing in config.distill.dtype.
      image_size: (height, width) in pixels that images are read at for it; None for one that takes
        padded images or gives masks: it sees the student's canvas, resampled where it has a size
        (RF-DETR).
      prefix: of its arrays' paths.
    """

    weights: convert.Weights
    family: str
    model: Any
    image_size: tuple[int, int] | None
    prefix: str

    @cached_property
    def like(self) -> dict[str, Any]:
        """Its abstract "params", in its own dtype, and "batch_stats"."""
        size = self.image_size or (64, 64)
        key = jax.random.key(0)
        shapes = jax.eval_shape(lambda key: families.initialize(self.model, key, size), key)
        narrow = lambda x: jax.ShapeDtypeStruct(x.shape, self.model.dtype)  # noqa: E731
        return {**shapes, "params": jax.tree.map(narrow, shapes["params"])}

    def abstract(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """ShapeDtypeStructs by path, sharded as the student's parameters are by default."""
        flat = self._flat()
        places = sharding.parameter_shardings(flat, mesh)
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])
            for path, leaf in flat.items()
        }

    def _flat(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            f"{self.prefix}{name}/{path}": leaf
            for name, tree in self.like.items()
            for path, leaf in paths.flatten(tree).items()
        }

    def place(self, mesh: Mesh) -> dict[str, jax.Array]:
        """Its arrays on the mesh, by path, sharded as `abstract` says."""
        abstract = self._flat()
        places = sharding.parameter_shardings(abstract, mesh)
        own = {path.removeprefix(self.prefix).partition("/")[2]: path for path in abstract}

        def put(path: str, array: np.ndarray) -> jax.Array:
            leaf = abstract[own[path]]
            narrow = np.asarray(array).astype(leaf.dtype)
            return sharding.place(narrow, places[own[path]])

        placed = convert.import_weights(
            self.weights,
            {path: _whole(abstract[full]) for path, full in own.items()},
            convert.arguments_of(self.model),
            place=put,
        )
        return {own[path]: array for path, array in placed.items()}

    def make_forward(self, features: Sequence[str]) -> TeacherForward:
        """The teacher as a function of a view, with these of its features."""
        apply = families.make_apply(self.model, features)
        return distillation.make_teacher_forward(
            apply, self.prefix, self.like, self.own_size, self.model.in_channels
        )

    @property
    def own_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels that it computes at; None: those of the student's canvas."""
        return self.image_size or getattr(self.model, "image_size", None)

    @property
    def predicts(self) -> str:
        """What its head computes (see models.families.Family)."""
        return FAMILIES[self.family].predicts


def _whole(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """In float32, in which weights are imported: they are narrowed on the way to the device."""
    floats = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if floats else leaf.dtype)


def find_teachers(
    names: Sequence[str], *, task: str, dtype: str, allow_pickle: bool
) -> tuple[Teacher, ...]:
    """The models that are named as teachers; no array is read yet.

    Args:
      names: of finished runs or weights, as `convert.read_weights` takes them.
      task: of the run; theirs must be the same.
      dtype: of families.DTYPES, in which they compute.
      allow_pickle: as of `convert.read_weights`.

    Raises:
      UserError: no such weights, of another task, or whose architecture is unknown.
    """
    found = []
    for number, name in enumerate(names):
        weights = convert.read_weights(name, allow_pickle=allow_pickle)
        family, arguments = convert.recognize(weights)
        known = FAMILIES[family]
        if known.task != task:
            raise UserError(
                f"config.distill.teachers: {name} is for {known.task}, and config.task is {task}"
            )
        size = arguments.get("image_size") or (weights.preprocessing or {}).get("image_size")
        missing = {field for field in known.required if field not in arguments}
        sees_canvas = known.pixel_mask or known.task == "segmentation"
        if missing or (not sees_canvas and not size):
            lacks = ", ".join(sorted(missing | ({"image_size"} if not size else set())))
            raise UserError(f"config.distill.teachers: {name} does not say its {lacks}")
        model = families.build_model(family, **arguments, dtype=families.DTYPES[dtype])
        own_size = tuple(size) if size and not sees_canvas else None
        prefix = f"{distillation.TEACHER}{number}/"
        found.append(Teacher(weights, family, model, own_size, prefix))
    return tuple(found)
