"""Prototypes: the training images that a model finds most like an image, over all and by class.

    training images --model without its head--> features, a file --cosine--> the nearest of an image

The features are computed once: their file has the hash of weights, data and preprocessing in its
name. It is read through the system's cache of files, as a whole for each image, and not held. While
an image is looked for, a training image takes 38 bytes besides: its distance, and ranks.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.format import write_array_header_1_0

from vision_jax.data.fingerprint import hash_of_images as hash_of_images
from vision_jax.data.pipeline import DamageLog, make_eval_batches
from vision_jax.data.sources import Source
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError, utf8
from vision_jax.evaluation import say_damaged
from vision_jax.explain import page
from vision_jax.explain.page import Picture
from vision_jax.files import own_draft_folder
from vision_jax.logging import say, show_progress
from vision_jax.models import families
from vision_jax.ops.images import to_float
from vision_jax.ops.probe import unit
from vision_jax.tasks.images import read_views

BATCH = 64  # training images at once
THREADS = 2
CHUNK = 2**16  # training images that are compared at once
NAME = "features-{}.npy"
PIXELS = "pixels-{}.npy"  # beside them: of each image as the model sees it, a hash of 8 bytes

KINDS = (("<f4", 2), ("<u8", 1))  # of the two files: dtype and number of axes

FeaturesOf = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Neighbor:
    """A training image near another.

    Attributes:
      row: in the training source.
      label: its class.
      distance: 1 - cosine of the features, from 0 to 2.
    """

    row: int
    label: int
    distance: float


@dataclass(frozen=True)
class Neighbors:
    """Those of one image.

    Attributes:
      nearest: of all training images, the nearest first.
      of_classes: of each class the nearest one, the nearest class first.
      same: the first training image that the model sees the very same pixels of, near or not; None
        if there is none.
    """

    nearest: tuple[Neighbor, ...]
    of_classes: tuple[Neighbor, ...]
    same: Neighbor | None


@dataclass(frozen=True)
class Prototypes:
    """Training images and their features.

    Attributes:
      source: the training images.
      preprocessing: of the model.
      features: f32[M, D], of length 1 each, NaN where an image can't be read.
      pixels: u64[M], `hash_of_pixels` of each view, 0 where an image can't be read.
      features_of: views u8[B, H, W, C] -> f32[B, D] of length 1.
      count: neighbors of each image, and classes that have their nearest shown.
    """

    source: Source
    preprocessing: Preprocessing
    features: np.ndarray
    pixels: np.ndarray
    features_of: FeaturesOf
    count: int

    def find(self, view: np.ndarray) -> Neighbors:
        """The neighbors of an image u8[H, W, C], as the model sees it."""
        wanted = self.features_of(view[None])[0]
        rows, distances, of_classes = nearest(
            self.features, self.source.labels, wanted, count=self.count
        )

        def neighbor(row: int) -> Neighbor:
            return Neighbor(row, int(self.source.labels[row]), float(distances[row]))

        found = tuple(map(neighbor, rows.tolist()))
        by_class = tuple(map(neighbor, of_classes[: self.count].tolist()))
        same = np.flatnonzero(self.pixels == hash_of_pixels(view))
        return Neighbors(found, by_class, neighbor(int(same[0])) if len(same) else None)

    def view(self, row: int) -> np.ndarray:
        """A training image u8[H, W, C], as the model sees it."""
        return read_views(self.source, np.array([row]), self.preprocessing)[0]


def nearest(
    features: np.ndarray, labels: np.ndarray, wanted: np.ndarray, *, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows that are nearest by the cosine.

    Args:
      features: f32[M, D], of length 1; rows that are not finite are nobody's neighbors.
      labels: i[M].
      wanted: f32[D], of length 1.
      count: of neighbors.

    Returns:
      (rows i[count] or as many as there are, distances f32[M], the nearest row of each class that
      has any), the nearest first, of equals the first.
    """
    parts = [features[i : i + CHUNK] @ wanted for i in range(0, len(features), CHUNK)]
    distances = np.maximum(1 - np.concatenate(parts), 0)
    order = np.argsort(distances, kind="stable")  # NaN is last
    order = order[: int(np.isfinite(distances).sum())]
    _, first = np.unique(labels[order], return_index=True)
    return order[:count], distances, order[np.sort(first)]


def make_prototypes(
    model: Any,
    variables: Mapping[str, Any],
    source: Source,
    preprocessing: Preprocessing,
    folder: Path,
    *,
    count: int,
) -> Prototypes:
    """Reads the training images' features from `folder`, or computes them and writes them there.

    Args:
      model: a classifier's flax module.
      variables: its arrays.
      source: the training images.
      preprocessing: of the model.
      folder: which is there.
      count: neighbors of each image.

    Raises:
      UserError: none of the images can be read; features that are not finite.
    """
    features_of = make_features(model, variables)
    said = (hash_of(variables), repr(model), hash_of_images(source), repr(preprocessing))
    name = hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]
    paths = folder / NAME.format(name), folder / PIXELS.format(name)
    if not all(path.is_file() for path in paths):
        _write_features(features_of, source, preprocessing, *paths)
        say(
            f"wrote {paths[0]}, the features of {len(source):,} training images, and "
            f"{paths[1].name}, for the next time"
        )
    features, pixels = (_load(path, *kind) for path, kind in zip(paths, KINDS, strict=True))
    if not len(features) == len(pixels) == len(source):
        raise UserError(f"{paths[0]}: damaged, not of {len(source)} images: remove it")
    return Prototypes(source, preprocessing, features, pixels, features_of, count)


def _load(path: Path, dtype: str, ndim: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}): remove it") from error
    if (array.dtype, array.ndim) != (np.dtype(dtype), ndim):
        raise UserError(f"{path}: damaged, it holds {array.dtype}{list(array.shape)}: remove it")
    return array


def make_features(model: Any, variables: Mapping[str, Any]) -> FeaturesOf:
    """A function views u8[B, H, W, C] -> what the head is given, f32[B, D] of length 1."""
    apply = families.make_apply(model.clone(num_classes=0))
    given = jax.tree.map(jnp.asarray, dict(variables))

    @jax.jit
    def compute(variables: Mapping[str, Any], views: jax.Array) -> jax.Array:
        outputs, _ = apply(
            variables["params"],
            variables.get("batch_stats", {}),
            to_float(views),
            train=False,
            keys={},
        )
        return outputs["logits"].astype(jnp.float32)

    return lambda views: unit(np.asarray(compute(given, jnp.asarray(views))))


def hash_of(variables: Mapping[str, Any]) -> str:
    """sha256 of all arrays with their paths, and of what the leaves that hold them are set to.

    64 hexadecimal digits.
    """
    found = hashlib.sha256(str(jax.tree.structure(dict(variables))).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(variables)):
        array = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def hash_of_pixels(view: np.ndarray) -> int:
    """64 bits of an image u8[H, W, C], 1 and up: equal by chance for one pair in 10¹⁹."""
    found = hashlib.blake2b(np.ascontiguousarray(view).tobytes(), digest_size=8).digest()
    return int.from_bytes(found, "little") or 1


def _write_features(
    features_of: FeaturesOf,
    source: Source,
    preprocessing: Preprocessing,
    path: Path,
    pixels_path: Path,
) -> None:
    """Batch by batch, in the source's order, in which images that can't be read have a row."""
    damage = DamageLog()
    size = min(BATCH, len(source))
    batches = make_eval_batches(
        source,
        batch_size=size,
        preprocessing=preprocessing,
        num_threads=THREADS,
        damage_log=damage,
    )
    pixels = np.zeros(len(source), "<u8")
    with own_draft_folder(path) as folder:
        draft = folder / path.name
        with draft.open("wb") as file, show_progress(-(-len(source) // size)) as (advance, _):
            for number, batch in enumerate(batches):
                mask, found = batch["mask"], features_of(batch["image"])
                if not np.isfinite(found[mask]).all():
                    raise UserError(
                        "the features of the training images are not finite: the weights are "
                        "damaged or training diverged"
                    )
                if number == 0:
                    shape = (len(source), found.shape[1])
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    write_array_header_1_0(file, header)
                rows = slice(number * size, min((number + 1) * size, len(source)))
                found = np.where(mask[:, None], found, np.nan).astype("<f4")
                file.write(found[: rows.stop - rows.start].tobytes())
                for place in np.flatnonzero(mask).tolist():
                    pixels[rows.start + place] = hash_of_pixels(batch["image"][place])
                advance()
        if damage.count == len(source):
            raise UserError(f"{source.name}: none of the training images could be read")
        np.save(folder / pixels_path.name, pixels)
        (folder / pixels_path.name).replace(pixels_path)
        draft.replace(path)
    say_damaged(damage.lines)


# What is shown of them ---------------------------------------------------------------------------


class Near:
    """The training images nearest to those that are explained, for the JSON and the pages."""

    def __init__(self, prototypes: Prototypes | None, class_names: Sequence[str]) -> None:
        self._prototypes, self._names = prototypes, class_names
        self._asked = 0
        self._same: list[tuple[str, str]] = []  # images that are training images

    def find(self, name: str, view: np.ndarray) -> tuple[dict[str, Any], dict[str, list[Picture]]]:
        """(what the JSON has, rows of pictures) of the image u8[H, W, C]; both may be empty."""
        if self._prototypes is None:
            return {}, {}
        self._asked += 1
        prototypes, found = self._prototypes, self._prototypes.find(view)
        if found.same is not None:
            self._same.append((name, prototypes.source.example_name(found.same.row)))
        shown = found.nearest
        if found.same is not None and found.same not in shown:  # more than N are equally near
            shown = (found.same, *shown)
        rows = {"Nearest training images": shown, "Nearest of a class": found.of_classes}
        record = {
            "nearest": [self._record(one) for one in found.nearest],
            "nearest_of_classes": [self._record(one) for one in found.of_classes],
            "is_training_image": found.same is not None,
        }
        pictures = {
            title: [self._picture(one, one == found.same) for one in own]
            for title, own in rows.items()
        }
        return {"prototypes": record}, pictures

    def record(self) -> dict[str, Any]:
        """What the JSON has of all."""
        if self._prototypes is None:
            return {}
        source = self._prototypes.source
        record = {
            "data": source.name,
            "count": len(source),
            "distance": "1 - cosine of the features that the head is given",
            "training_images": [utf8(name) for name, _ in self._same],
        }
        return {"prototypes": record}

    def warn(self) -> None:
        """Says which images the model was trained on."""
        if self._same:
            name, trained = self._same[0]
            say(
                f"warning: {len(self._same)} of {self._asked} images are training images, the same "
                f"pixels, first {name}: {trained}. What the model says of them is no evidence"
            )

    def _record(self, one: Neighbor) -> dict[str, Any]:
        assert self._prototypes is not None
        return {
            "image": utf8(self._prototypes.source.example_name(one.row)),
            "class": utf8(self._names[one.label]),
            "distance": one.distance,
        }

    def _picture(self, one: Neighbor, same: bool) -> Picture:
        assert self._prototypes is not None
        name = Path(self._prototypes.source.example_name(one.row)).name
        lines = [f"distance {one.distance:.4f}", name]
        lines += ["THE SAME IMAGE: the model was trained on it"] if same else []
        return Picture(self._names[one.label], lines, page.to_rgb(self._prototypes.view(one.row)))
