"""A student out of bigger weights: chosen layers of them, or a narrower ViT, cut on import.

config.model's layers, width, mlp_width -> Shrinking -> the student's arguments, its arrays
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vision_jax import convert, sharding
from vision_jax.errors import UserError, nearest
from vision_jax.models import families
from vision_jax.models.families import FAMILIES
from vision_jax.trees import paths, surgery

Flat = dict[str, Any]

# Rows of layers by the argument that counts them; `depths` has one for each stage.
ROWS = {
    "depth": "block",
    "encoder_depth": "encoder",
    "decoder_depth": "decoder",
    "text_depth": "text/block",
}
# Where the first block of a stage changes width and stride: the others can't take its place.
OPENED = (
    *("resnet", "regnet", "efficientnet", "deeplab", "detr", "faster_rcnn", "fcos", "retinanet"),
)


@dataclass(frozen=True)
class Shrinking:
    """What is left of a bigger model.

    Attributes:
      layers: indices of the layers that are kept, by row (see surgery.take_layers).
      before: arguments of the weights' model that the student has otherwise.
      after: the student's.
    """

    layers: Mapping[str, tuple[int, ...]]
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    def line(self) -> str:
        """What is kept, and each argument before and after, as a line of the log."""
        kept = [f"{row} {', '.join(map(str, chosen))}" for row, chosen in self.layers.items()]
        pairs = [(name, self.before[name], new) for name, new in self.after.items()]
        return "; ".join(
            [*kept, *(f"{name} {old} -> {new}" for name, old, new in pairs if old != new)]
        )


def plan_shrinking(
    family: str,
    arguments: Mapping[str, Any],
    *,
    layers: Sequence[tuple[str, int | tuple[int, ...]]],
    width: int,
    mlp_width: int,
) -> Shrinking:
    """What is left of a model.

    Args:
      family: of the model.
      arguments: of the model, before.
      layers: (row, indices or how many, evenly spread) of each row that gets shorter.
      width: of a narrower ViT; 0 leaves it. Heads keep their size.
      mlp_width: of its MLPs; 0 leaves it.

    Raises:
      UserError: layers or sizes that the model cannot give.
    """
    known = {**FAMILIES[family].defaults, **arguments}
    stages = f"{FAMILIES[family].backbone}stage_"
    depths = rows_of(family, known)
    kept = {row: _chosen(family, row, chosen, depths) for row, chosen in layers}
    depths |= {row: len(chosen) for row, chosen in kept.items()}
    after: dict[str, Any] = {name: depths[row] for name, row in _rows(family, known).items()}
    if "depths" in known:
        after["depths"] = tuple(depths[f"{stages}{i}/block"] for i in range(len(known["depths"])))
    if any(isinstance(ratio, tuple) for ratio in known.get("expansions", ())):  # of each block
        after["expansions"] = tuple(
            tuple(ratio[block] for block in kept.get(f"{stages}{i}/block", range(len(ratio))))
            if isinstance(ratio, tuple)
            else ratio
            for i, ratio in enumerate(known["expansions"])
        )
    if width or mlp_width:
        after |= _narrower(family, known, width, mlp_width)
    return Shrinking(kept, {name: known[name] for name in after}, after)


def rows_of(family: str, arguments: Mapping[str, Any]) -> dict[str, int]:
    """How many layers each row of a model has; `arguments` are all of them."""
    depths = {row: arguments[name] for name, row in _rows(family, arguments).items()}
    stages = f"{FAMILIES[family].backbone}stage_"
    return depths | {f"{stages}{i}/block": n for i, n in enumerate(arguments.get("depths", ()))}


def _rows(family: str, arguments: Mapping[str, Any]) -> dict[str, str]:
    """The row of layers that each argument counts."""
    rows = {name: row for name, row in ROWS.items() if name in arguments}
    if "decoder_depth" in arguments and FAMILIES[family].wraps:  # a part of its own
        rows["decoder_depth"] = "decoder/block"
    return rows


def _chosen(
    family: str, row: str, chosen: int | tuple[int, ...], depths: Mapping[str, int]
) -> tuple[int, ...]:
    if row not in depths:
        raise UserError(
            f"config.model.layers: {family} has no row {row!r} of {', '.join(depths) or 'none'}"
            f"{nearest(row, list(depths))}"
        )
    if isinstance(chosen, int):
        return surgery.spread_layers(depths[row], chosen)
    if not chosen or not set(chosen) <= set(range(depths[row])):
        raise UserError(f"config.model.layers: {row} {chosen}: take some of 0 to {depths[row] - 1}")
    if family in OPENED and "stage_" in row and (chosen[0] != 0 or 0 in chosen[1:]):
        raise UserError(
            f"config.model.layers: {row} {chosen}: the first block of a stage changes width and "
            "stride: begin with 0, and take it once"
        )
    return chosen


def _narrower(family: str, known: Mapping[str, Any], width: int, mlp_width: int) -> dict[str, int]:
    field = "config.model.width" if width else "config.model.mlp_width"
    if family != "vit":
        raise UserError(f"{field}: narrower is made of a ViT only, not of a {family}: set it to 0")
    if known["head_size"]:
        raise UserError(
            f"{field}: this ViT has lost heads already: prune it further with `vision_jax prune`"
        )
    size = known["width"] // known["num_heads"]
    if width % size or width > known["width"]:
        raise UserError(
            f"config.model.width {width}: take a multiple of {size}, the size of a head, up to "
            f"{known['width']}"
        )
    if mlp_width > known["mlp_width"]:
        raise UserError(f"config.model.mlp_width {mlp_width}: take 1 to {known['mlp_width']}")
    width = width or known["width"]
    mlp_width = mlp_width or known["mlp_width"]
    return {"width": width, "num_heads": width // size, "mlp_width": mlp_width}


def import_student(
    weights: convert.Weights,
    model: Any,
    shrinking: Shrinking,
    image_size: tuple[int, int],
    *,
    reinitialized: Collection[str],
    shardings: Mapping[str, NamedSharding],
    mesh: Mesh,
) -> Flat:
    """Parameters and BatchNorm statistics of a student by path, but for those re-initialized.

    The weights must fill the whole bigger model; what is not taken of it is placed nowhere.

    Args:
      weights: of the bigger model.
      model: the student.
      shrinking: how it came about.
      image_size: in pixels.
      reinitialized: paths of the student that the caller initializes itself.
      shardings: of the student's arrays.
      mesh: of the devices.

    Raises:
      UserError: the weights and the bigger model differ; lists the tensors on both sides.
    """
    bigger = model.clone(**shrinking.before)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda key: families.initialize(bigger, key, image_size), key)
    whole = {p: leaf for tree in shapes.values() for p, leaf in paths.flatten(tree).items()}
    # From the student's paths to those that they have in the bigger model.
    named = paths.nest({path: path for path in whole})
    sources = paths.flatten(surgery.take_layers(named, shrinking.layers))
    taken = {path: source for path, source in sources.items() if path not in reinitialized}
    wide = {path: whole[source] for path, source in sources.items()}
    narrower = "width" in shrinking.after
    places = sharding.parameter_shardings(wide, mesh) if narrower else shardings

    def place(source: str, array: np.ndarray) -> Flat:  # a layer may be taken twice
        names = [path for path, one in taken.items() if one == source]
        return {path: sharding.place(array, places[path]) for path in names}

    imported = convert.import_weights(
        weights,
        whole,
        convert.arguments_of(bigger),
        reinitialized=sorted({sources.get(p, p) for p in reinitialized} - set(taken.values())),
        place=place,
    )
    placed = {path: array for arrays in imported.values() for path, array in arrays.items()}
    if not narrower:
        return placed
    narrow = partial(
        surgery.narrow_vit,
        num_heads=shrinking.before["num_heads"],
        width=shrinking.after["width"],
        mlp_width=shrinking.after["mlp_width"],
    )

    def cut(placed: Flat) -> Flat:  # what is re-initialized weighs nothing in the choice
        flat = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in wide.items()} | placed
        narrowed = paths.flatten(narrow(paths.nest(flat)))
        return {path: narrowed[path] for path in placed}

    return jax.jit(cut, out_shardings={path: shardings[path] for path in placed})(placed)
