"""A model's predictions of every image of a source, at its own size: whole, or by windows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from vision_jax import sharding, steps
from vision_jax.data.decode import DamagedImageError
from vision_jax.data.pipeline import Damaged
from vision_jax.data.segmentation_transforms import (
    SegmentationPreprocessing,
    segmentation_eval_transform,
)
from vision_jax.tasks.segmentation.windows import (
    ScoresOf,
    predict_by_spread_windows,
    predict_by_windows,
)

# An image's row in the source, its prediction and its label, u8[H, W] both.
Predicted = tuple[int, np.ndarray, np.ndarray]
# (source, damage log, trainable, frozen, model_state) -> predictions, one by one
PredictAll = Callable[..., Iterator[Predicted]]
# (image u8[H, W, C], scores_of) -> the class of each pixel u8[H, W]
PredictOne = Callable[[np.ndarray, ScoresOf], np.ndarray]


def predict_whole(run: Callable[..., Iterator[Mapping[str, np.ndarray]]]) -> PredictAll:
    """Of whole images.

    Args:
      run: likewise to outputs of each batch, those of objective.PixelOutputs.
    """

    def predict_all(source, damage, *arguments) -> Iterator[Predicted]:
        for batch in run(source, damage, *arguments):
            for place in np.flatnonzero(batch["mask"]):
                yield (
                    int(batch["index"][place]),
                    batch["prediction"][place],
                    batch["label"][place],
                )

    return predict_all


def predict_window_by_window(
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    preprocessing: SegmentationPreprocessing,
    *,
    window: int,
    stride: int,
    batch_size: int,
) -> PredictAll:
    """Of images that are seen in parts.

    Args:
      outputs_fn: of windows, an objective.PixelOutputs.
      mesh: of the devices.
      preprocessing: of the images.
      window: pixels a side; 0 for the windows of the view "windows".
      stride: pixels between windows.
      batch_size: windows at a time, rounded up to what the devices divide.
    """
    devices = jax.device_count()
    at_once = -(-batch_size // devices) * devices
    step = steps.make_eval_step(outputs_fn, shardings=sharding.replicated(mesh))
    place = sharding.make_batch_placer(mesh)
    share = at_once // jax.process_count()
    own = slice(share * jax.process_index(), share * (jax.process_index() + 1))
    predict_one = make_predict_one(preprocessing, window=window, stride=stride, at_once=at_once)

    def predict_all(source, damage, *arguments) -> Iterator[Predicted]:
        def scores_of(windows):
            return jax.device_get(step(*arguments, place({"image": windows[own]}))["scores"])

        for row in range(len(source)):
            try:
                example = source[row]
                prediction = predict_one(example["image"], scores_of)
            except DamagedImageError as error:
                damage.record(0, [Damaged(row, source.example_name(row), str(error))])
                continue
            damage.record(1, [])
            yield row, prediction, example["mask"]

    return predict_all


def make_predict_one(
    preprocessing: SegmentationPreprocessing, *, window: int, stride: int, at_once: int
) -> PredictOne:
    """How an image of any size is predicted by a program of one size.

    Args:
      preprocessing: of the images.
      window: pixels a side; 0 for the windows of the view "windows".
      stride: pixels between windows.
      at_once: windows that `scores_of` is called with.

    Returns:
      A function that raises DamagedImageError for what the model can't see.
    """
    whole = replace(preprocessing, view="original" if window else "short")
    fill = [round(255 * value) for value in preprocessing.mean]

    def predict_one(image: np.ndarray, scores_of: ScoresOf) -> np.ndarray:
        seen = segmentation_eval_transform(image, whole)
        if window:
            return predict_by_windows(
                seen, scores_of, window=window, stride=stride, at_once=at_once, fill=fill
            )
        size = (image.shape[0], image.shape[1])
        return predict_by_spread_windows(seen, scores_of, at_once=at_once, size=size)

    return predict_one
