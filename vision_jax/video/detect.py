"""Frames to boxes, in batches of fixed shapes, by any detector.

One `Detector` serves as many streams as there are: its programs are compiled once, at start.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vision_jax.errors import UserError
from vision_jax.generate.samples import digest
from vision_jax.loaded import Loaded
from vision_jax.serve.model import Found, compile_programs, faster, make_servable


class Detections(NamedTuple):
    """What was found in one frame, by falling score.

    Attributes:
      boxes_xyxy_px: f32[N, 4], within the frame.
      scores: f32[N].
      labels: i32[N], places in the detector's class_names.
    """

    boxes_xyxy_px: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Detector:
    """A detector, compiled.

    Attributes:
      origin: of the model, with a digest of its parameters.
      class_names: by label.
      rows: frames of a batch.
      run: any number of frames u8[H, W, 3], of any sizes -> what was found in each.
    """

    origin: str
    class_names: tuple[str, ...]
    rows: int
    run: Callable[[Sequence[np.ndarray]], list[Detections]]


def make_detector(loaded: Loaded, rows: int, least: float) -> Detector:
    """Compiles a detector for batches of `rows` frames.

    Args:
      loaded: the model.
      rows: frames of a batch; a batch with fewer is filled up with black.
      least: boxes of a lower score are left out.

    Raises:
      UserError: a model that finds no boxes.
    """
    servable = make_servable(loaded)
    if servable.kind != "boxes":
        raise UserError(f"{loaded.origin} finds no boxes: watching takes a detector")
    programs = compile_programs(faster(servable, rows), [rows])
    servable = programs.servable

    def run(frames: Sequence[np.ndarray]) -> list[Detections]:
        views = [servable.look(pixels) for pixels in frames]
        found: list[Detections] = [no_detections()] * len(views)
        for canvas in sorted({view.canvas for view in views}):
            places = [place for place, view in enumerate(views) if view.canvas == canvas]
            for start in range(0, len(places), rows):
                batch = places[start : start + rows]
                outputs = programs.run(canvas, [views[place] for place in batch])
                for place, one in zip(batch, outputs, strict=True):
                    found[place] = _kept(one, views[place].size, least)
        return found

    origin = f"{loaded.origin} ({digest(loaded.variables)[:16]})"
    return Detector(origin, servable.class_names, rows, run)


def no_detections() -> Detections:
    """Of a frame in which nothing was found."""
    empty = np.zeros(0)
    return Detections(
        np.zeros((0, 4), np.float32), empty.astype(np.float32), empty.astype(np.int32)
    )


def _kept(found: Found, size: tuple[int, int], least: float) -> Detections:
    kept = np.flatnonzero(found["score"] >= least)
    order = kept[np.argsort(-found["score"][kept], kind="stable")]
    height, width = size
    boxes = np.clip(found["boxes_xyxy_px"][order], 0, [width, height, width, height])
    return Detections(
        boxes.astype(np.float32),
        found["score"][order].astype(np.float32),
        found["label"][order].astype(np.int32),
    )
