"""How good made images are, beside real ones: by features and classes of models that a user names.

images --features--> Fréchet distance, precision, recall, nearest training images
images --judge--> classes, which are those that were asked for or not
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from vision_jax.errors import UserError
from vision_jax.figures import draw_rows
from vision_jax.loaded import Loaded
from vision_jax.ops import fidelity
from vision_jax.ops.images import to_float
from vision_jax.ops.resize import resize_from_corner

SHOWN = 8  # images with their nearest training images in nearest.png
BATCH = 100
FEW = 25  # images of 299 pixels at once, 250 MB a layer


FID_FILE = "6726825d"  # how the sha256 of the published Inception begins, as its name says


def is_inception(loaded: Loaded) -> bool:
    """Whether it is a network as an FID is measured with, whatever its weights."""
    return getattr(loaded.model, "fid", False)


def distance_name(loaded: Loaded, sha256: str) -> str:
    """What a Fréchet distance of its features is called: "fid" of the published weights alone."""
    return "fid" if is_inception(loaded) and sha256.startswith(FID_FILE) else "frechet"


def make_features(
    loaded: Loaded, preprocess: Callable[[Sequence[np.ndarray]], Any]
) -> Callable[[Iterable[np.ndarray]], np.ndarray]:
    """A function from images u8[H, W, C] to features f32[N, D]: what goes into the head.

    Of the FID's Inception images are first what the generator's `preprocess` makes of them, f32 in
    [0, 1] of one size, and then resized as TensorFlow did it.

    Raises:
      UserError: a model that has no such vector.
    """
    if "pooled" not in loaded.feature_names:
        raise UserError(
            f"--features: {loaded.origin} has no vector of an image: take a classifier, say "
            "embedded:vit_cifar10"
        )

    def run(variables: Any, images: Any) -> Any:
        if is_inception(loaded):
            images = resize_from_corner(to_float(images), loaded.preprocessing.image_size)
        return loaded.features(variables, images, ["pooled"])["pooled"]

    def views(images: Sequence[np.ndarray]) -> np.ndarray:
        seen = np.asarray(preprocess(images))
        return np.broadcast_to(seen, (*seen.shape[:3], 3))  # of gray, too

    prepare, size = (views, FEW) if is_inception(loaded) else (loaded.preprocess, BATCH)
    program = jax.jit(run)

    def features(images: Iterable[np.ndarray]) -> np.ndarray:
        with jax.default_matmul_precision("highest"):  # accelerators round products otherwise
            return _over(loaded, program, images, prepare, size)

    return features


def make_judge(
    loaded: Loaded, class_names: Sequence[str]
) -> Callable[[Iterable[np.ndarray]], np.ndarray]:
    """A function from images u8[H, W, C] to labels i64[N] of `class_names`, -1 for other classes.

    Raises:
      UserError: a judge that knows none of the classes.
    """
    own = {name: label for label, name in enumerate(class_names)}
    labels = np.array([own.get(name, -1) for name in loaded.class_names])
    if (labels < 0).all():
        raise UserError(
            f"--judge: {loaded.origin} knows none of {', '.join(class_names)}: take a classifier "
            "of these classes"
        )
    run = jax.jit(lambda v, x: loaded.apply(v, x)["logits"])
    return lambda images: labels[_over(loaded, run, images, loaded.preprocess, BATCH).argmax(1)]


def _over(
    loaded: Loaded,
    run: Any,
    images: Iterable[np.ndarray],
    prepare: Callable[[Sequence[np.ndarray]], Any],
    size: int,
) -> np.ndarray:
    """What a compiled function (variables, images) gives for all images, in batches of one size."""
    found: list[np.ndarray] = []
    batch: list[np.ndarray] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            found.append(np.asarray(run(loaded.variables, prepare(batch))))
            batch = []
    if batch:
        full = batch + [batch[-1]] * (size - len(batch))
        found.append(np.asarray(run(loaded.variables, prepare(full)))[: len(batch)])
    return np.concatenate(found)


@dataclass(frozen=True)
class Measured:
    """What is found.

    Attributes:
      figures: by name, for JSON.
      copies: the nearest training images.
    """

    figures: dict[str, Any]
    copies: fidelity.Copies


def measure(
    made: np.ndarray, real: np.ndarray, train: np.ndarray, distance: str = "frechet"
) -> Measured:
    """By features f[N, D] of made, f[M, D] of held-out, and f[T, D] of training images.

    "frechet" to the held-out images, and "frechet_train", of the training images to these: what
    real images would have. "precision" and "recall" beside the held-out images. `distance` is what
    the former is called: "fid" of the FID's own features alone.

    Raises:
      UserError: too few images for the neighborhoods.
    """
    copies = fidelity.find_copies(made, train, real)
    try:
        precision, recall = fidelity.precision_recall(made, real)
    except ValueError as error:
        raise UserError(f"--measure: {error}: make more by --count") from None
    figures = {
        "images": len(made),
        "held_out": len(real),
        distance: fidelity.frechet_distance(made, real),
        f"{distance}_train": fidelity.frechet_distance(train, real),
        "precision": precision,
        "recall": recall,
        "nearest": copies.ratio,
        "copies": int(copies.flagged.sum()),
        "copies_of_held_out": copies.flagged_held_out,
    }
    return Measured(figures, copies)


def draw_nearest(made: Sequence[np.ndarray], train: Sequence[np.ndarray], path: Path) -> Path:
    """Made images, and below each its nearest training image, as a PNG."""
    height, width = made[0].shape[:2]

    def same(image: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(image).convert("RGB").resize((width, height))
        return np.asarray(picture) / 255

    rows = {"made": [same(x) for x in made], "nearest training image": [same(x) for x in train]}
    return draw_rows({title: np.stack(row) for title, row in rows.items()}, path)
