"""Images made by a generator, batch by batch, and written as class folders.

(label, index) of each --sample, one compiled program--> images --write--> CLASS/INDEX.png
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vision_jax.errors import utf8
from vision_jax.models import families
from vision_jax.ops.images import to_float
from vision_jax.tasks.generation import objective
from vision_jax.tasks.generation.autoencoder import Autoencoder
from vision_jax.tasks.images import file_name
from vision_jax.trees.paths import flatten

GRID = 8  # pictures a row of samples.png
ADAPTER = "adapter/adapter_model.safetensors"  # of a run


@dataclass(frozen=True)
class Generator:
    """A model that makes images, and how it does.

    Attributes:
      model: the flax module.
      variables: its arrays.
      names: of what it can be asked for, by label: classes, or captions.
      task: what the model has learned.
      sampling: how images are made.
      preprocess: files -> f32[N, H, W, C] in [0, 1], of images that it begins with.
      autoencoder: of what the model makes; None of pixels.
      embeddings: f32[N, 2, E] of the names and of no caption, where these are captions.
    """

    model: Any
    variables: Mapping[str, Any]
    names: Sequence[str]
    task: objective.Task
    sampling: objective.Sampling
    preprocess: Callable[[Any], Any]
    autoencoder: Autoencoder | None = None
    embeddings: np.ndarray | None = None


@dataclass(frozen=True)
class Wanted:
    """Images to be made.

    Attributes:
      labels: i32[N], rows of the generator's names, K for none of them.
      index: i32[N], whose noise each has: with a seed an index names an image.
      images: u8[N, H, W, C] to begin with, or None.
      fresh: bool[N, H, W, 1], what of these is made anew, or None.
    """

    labels: np.ndarray
    index: np.ndarray
    images: np.ndarray | None = None
    fresh: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


def make_images(generator: Generator, wanted: Wanted, batch_size: int) -> Iterator[np.ndarray]:
    """u8[n, H, W, C], batch by batch, in the order wanted; one program for all batches.

    The last batch is filled up by images that are made and thrown away: an image does not depend on
    its batch, but a program does on its size.
    """
    run = jax.jit(_make_program(generator))
    size = min(batch_size, len(wanted))
    around = {} if generator.autoencoder is None else generator.autoencoder.variables
    for start in range(0, len(wanted), size):
        rows = np.minimum(np.arange(start, start + size), len(wanted) - 1)
        given = [x if x is None else x[rows] for x in (wanted.images, wanted.fresh)]
        asked = wanted.labels[rows]
        if generator.embeddings is not None:
            asked = generator.embeddings[asked]
        made = run(generator.variables, around, asked, wanted.index[rows], *given)
        yield jax.device_get(made)[: len(wanted) - start]


def _make_program(generator: Generator) -> Callable[..., jax.Array]:
    """(variables, the autoencoder's, asked, index, images or None, fresh or None) -> u8[B, ...]."""
    apply, around = families.make_apply(generator.model), generator.autoencoder
    sample = objective.make_sample(apply, lambda params: params, generator.task, generator.sampling)

    def program(variables, arrays, asked, index, images, fresh):
        def encode(images):
            return objective.centered(images) if around is None else around.encode(arrays, images)

        def decode(x):
            return objective.shown(x) if around is None else around.decode(arrays, x)

        params, state = variables["params"], variables.get("batch_stats", {})
        images = None if images is None else to_float(images)
        clean = None if images is None else objective.one_by_one(encode, images)
        cells = None if fresh is None else _cells(fresh, 1 if around is None else around.cell)
        made = sample(params, {}, state, asked, index, clean, cells)
        made = objective.one_by_one(decode, made)
        if fresh is not None:  # a decoder changes all pixels a little
            made = jnp.where(fresh, made, images)
        return jnp.round(255 * made).astype(jnp.uint8)

    return program


def _cells(fresh: jax.Array, side: int) -> jax.Array:
    """bool[B, h, w, 1]: the cells in which there is any pixel of bool[B, H, W, 1]."""
    count, height, width, _ = fresh.shape
    return fresh.reshape(count, height // side, side, width // side, side, 1).any((2, 4))


def sample_paths(wanted: Wanted, names: Sequence[str]) -> list[str]:
    """Where each image is written: "class/000012.png", the class's name as a folder can have it.

    What is empty or of dots alone, as the text of no caption is, would be another folder: it gets a
    line before it.
    """
    names = [*names, "no class"]
    folders = [file_name(0, name, "")[5:] for name in names]
    folders = [folder if folder.strip(".") else f"_{folder}" for folder in folders]
    return [
        f"{folders[label]}/{index:06d}.png"
        for label, index in zip(wanted.labels, wanted.index, strict=True)
    ]


def write_images(batch: np.ndarray, paths: Sequence[str], out: Path) -> None:
    """Writes images u8[n, H, W, C] at paths below a folder."""
    for pixels, path in zip(batch, paths, strict=True):
        place = out / path
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(place)


def draw_grid(images: np.ndarray, path: Path) -> Path:
    """Images u8[N, H, W, C] beside and below each other, GRID in a row, as they are, as a PNG."""
    count, height, width, channels = images.shape
    rows = -(-count // GRID)
    whole = np.full((rows * GRID, height, width, channels), 255, np.uint8)
    whole[:count] = images
    whole = whole.reshape(rows, GRID, height, width, channels).transpose(0, 2, 1, 3, 4)
    whole = whole.reshape(rows * height, GRID * width, channels)
    times = max(1, 64 // max(height, width))  # so that tiny ones can be seen
    whole = whole.repeat(times, axis=0).repeat(times, axis=1)
    Image.fromarray(whole[..., 0] if channels == 1 else whole[..., :3]).save(path)
    return path


def draw_beside(before: Sequence[np.ndarray], made: Sequence[np.ndarray], path: Path) -> Path:
    """The first images of another generator, and below each what this made of its noise."""
    from vision_jax.figures import draw_rows  # matplotlib, only where something is drawn

    rows = {"beside, of all its classes": before[:GRID], "made of the same noise": made[:GRID]}
    return draw_rows({title: np.stack(row) / 255 for title, row in rows.items()}, path)


def origin_of(loaded: Any, folder: Path | None, checkpoint: str | None) -> dict[str, str]:
    """Of which weights images are, for the manifest: where from, and digests of what they hold.

    Args:
      loaded: the model, a Loaded.
      folder: of the run, if it is one's.
      checkpoint: of the run; None for its end, whose adapter's file is named by its sha256.
    """
    found = {"generator": loaded.origin, "checkpoint": checkpoint or "end"}
    found["weights_sha256"] = digest(loaded.variables["params"])
    adapter = None if checkpoint or folder is None else folder / ADAPTER
    if adapter is not None and adapter.is_file():
        found["adapter_sha256"] = hashlib.sha256(adapter.read_bytes()).hexdigest()
    return found


def digest(params: Any) -> str:
    """sha256 of all parameters: of path, dtype, shape and values, in the order of the paths."""
    whole = hashlib.sha256()
    for path, leaf in sorted(flatten(params).items()):
        array = np.ascontiguousarray(jax.device_get(leaf))
        whole.update(f"{path} {array.dtype} {array.shape}\n".encode())
        whole.update(array.tobytes())
    return whole.hexdigest()


def manifest(
    generator: Generator, wanted: Wanted, paths: Sequence[str], origin: Mapping[str, str]
) -> dict[str, Any]:
    """What tells how each image was made, for JSON: with it each can be made again."""
    names = [*generator.names, None]
    what = "caption" if generator.task.captions else "class"
    if generator.autoencoder is not None:
        weights = generator.autoencoder.weights
        origin = {**origin, "autoencoder": weights.origin, "autoencoder_sha256": weights.sha256}
    return {
        **origin,
        "sampling": vars(generator.sampling),
        "images": [
            {"file": path, what: names[label] and utf8(str(names[label])), "index": int(index)}
            for path, label, index in zip(paths, wanted.labels, wanted.index, strict=True)
        ],
    }
