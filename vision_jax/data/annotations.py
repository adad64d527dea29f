"""Boxes as annotation files state them: one `Annotations` for all formats, and nothing repaired."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vision_jax.data.sources import FileReader, TfdsReader


@dataclass(frozen=True)
class Annotations:
    """N images, C categories and M boxes, in the order of the files. Picklable.

    Attributes:
      name: the specification, for messages.
      folder: of the images; `paths` are relative to it, and lie inside it.
      sizes: i32[N, 2] (height, width) as the file states them, 0 where it states none.
      image_ids, category_ids: as the file writes them, unique.
      supercategories: "" where there is none.
      box_image, box_category: i32[M] positions in `paths` and in `category_ids`.
      boxes_xywh_px: f64[M, 4] (left, top, width, height) as written; formats that are defined
        otherwise (corners, shares of the image) are converted, and nothing else is done to them.
      area: f64[M] in pixels, w · h where the file gives none.
      crowd: bool[M].
      files, entries, entry_form: how `place` names a box.
      tfds: what reads the images, where they are records rather than files.
    """

    name: str
    folder: Path
    paths: tuple[str, ...]
    sizes: np.ndarray
    image_ids: tuple[int | str, ...]
    category_ids: tuple[int | str, ...]
    category_names: tuple[str, ...]
    supercategories: tuple[str, ...]
    box_image: np.ndarray
    box_category: np.ndarray
    boxes_xywh_px: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    files: tuple[str, ...]  # one for all, or one an image
    entries: np.ndarray  # i32[M]
    entry_form: str  # "{file}: annotations[{entry}]"
    tfds: TfdsReader | None = None

    def place(self, box: int) -> str:
        """What to call box `box` in messages: its file and entry."""
        file = self.files[self.box_image[box] if len(self.files) > 1 else 0]
        return self.entry_form.format(file=file, entry=self.entries[box])

    @property
    def reader(self) -> FileReader | TfdsReader:
        """Decodes image i: `reader.read(i)` uint8[H, W, C], upright; `reader.example_name(i)`."""
        return self.tfds or FileReader(self.folder, self.paths)


def read_annotations(spec: str, images: Path | None = None) -> Annotations:
    """Read the boxes that `spec` names, but no image's pixels.

    `images` is the folder that the paths are relative to; by default the annotation file's own, or
    where its format keeps them. Raises UserError, one line with the first few of all that is wrong.
    """
    raise NotImplementedError
