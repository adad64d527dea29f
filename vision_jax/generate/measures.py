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

SHOWN = 8  # images with their nearest training images in nearest.png
BATCH = 100


def make_features(loaded: Loaded) -> Callable[[Iterable[np.ndarray]], np.ndarray]:
    """A function from images u8[H, W, C] to features f32[N, D]: what goes into the head.

    Raises:
      UserError: a model that has no such vector.
    """
    if "pooled" not in loaded.feature_names:
        raise UserError(
            f"--features: {loaded.origin} has no vector of an image: take a classifier, say "
            "embedded:vit_cifar10"
        )
    run = jax.jit(lambda v, x: loaded.features(v, x, ["pooled"])["pooled"])
    return lambda images: _over(loaded, run, images)


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
    return lambda images: labels[_over(loaded, run, images).argmax(1)]


def _over(loaded: Loaded, run: Any, images: Iterable[np.ndarray]) -> np.ndarray:
    """What a compiled function (variables, images) gives for all images, in batches of one size."""
    found, batch = [], []
    for image in images:
        batch.append(image)
        if len(batch) == BATCH:
            found.append(np.asarray(run(loaded.variables, loaded.preprocess(batch))))
            batch = []
    if batch:
        full = batch + [batch[-1]] * (BATCH - len(batch))
        found.append(np.asarray(run(loaded.variables, loaded.preprocess(full)))[: len(batch)])
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
    made: np.ndarray, real: np.ndarray, train: np.ndarray, copies: fidelity.Copies | None = None
) -> Measured:
    """By features f[N, D] of made, f[M, D] of held-out, and f[T, D] of training images.

    "frechet" to the held-out images, and "frechet_train", of the training images to these: what
    real images would have. "precision" and "recall" beside the held-out images.
    """
    copies = copies or fidelity.find_copies(made, train, real)
    precision, recall = fidelity.precision_recall(made, real)
    figures = {
        "images": len(made),
        "held_out": len(real),
        "frechet": fidelity.frechet_distance(made, real),
        "frechet_train": fidelity.frechet_distance(train, real),
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
