"""Boxes as annotation files state them: one `Annotations` for all formats, and nothing repaired.

`read_annotations` is the one entry. It recognizes a specification by what the file or folder holds:

    FILE.json               COCO: images, annotations, categories
    FILE.json               plain: each entry of `images` holds file_name, width, height, xmin,
                            ymin, xmax, ymax and category_id; entries of one file are merged
    FOLDER                  Pascal VOC: Annotations/*.xml with JPEGImages/, or XML beside images
    ImageSets/Main/FILE.txt Pascal VOC: the part that the file lists
    FOLDER                  YOLO: images/ and labels/, or .txt beside images; names from data.yaml
                            or classes.txt
    data.yaml[:SPLIT]       YOLO: `train` unless SPLIT says otherwise
    FOLDER                  that holds one of the JSON files above
    tfds:NAME/SPLIT[@DIR]   COCO and its like, prepared as array_record; read without TensorFlow
    embedded:aerial/SPLIT   98 aerial photos with boxes of trees in the package; test has 20
    composites:SPLIT/SEED/COUNT[/SIZE]  generated, train or test; see composites.py
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vision_jax.data.annotation_formats.coco import read_coco
from vision_jax.data.annotation_formats.json_file import outline, read_json, without_collector
from vision_jax.data.annotation_formats.plain import read_plain
from vision_jax.data.annotation_formats.reading import (
    IMAGES,
    Problem,
    Reading,
    find_files,
    one_line,
    read_lines,
)
from vision_jax.data.annotation_formats.tfds import read_tfds
from vision_jax.data.annotation_formats.voc import read_voc
from vision_jax.data.annotation_formats.yolo import labels_of, read_yolo_folder, read_yolo_yaml
from vision_jax.data.composites import read_composites
from vision_jax.data.folders import Inside, splits_of
from vision_jax.data.sources import ASSETS, ArrayReader, FileReader, TfdsReader
from vision_jax.errors import UserError
from vision_jax.files import expand, open_regular

_YAMLS = ("data.yaml", "dataset.yaml")


@dataclass(frozen=True)
class Annotations:
    """N images, C categories and M boxes, in the order of the files. Picklable.

    Attributes:
      name: the specification, for messages.
      folder: of the images; `paths` are relative to it, and lie inside it.
      sizes: i32[N, 2] (height, width) as the file states them, 0 where it states none. YOLO and
        tfds state shares of the image: there it is the size in the image's header, upright.
      image_ids, category_ids: as the file writes them, unique.
      supercategories: "" where there is none.
      box_image, box_category: i32[M] positions in `paths` and in `category_ids`.
      boxes_xywh_px: f64[M, 4] (left, top, width, height) as written; formats that are defined
        otherwise (corners, shares of the image) are converted, and nothing else is done to them.
      area: f64[M] in pixels, w · h where the file gives none.
      crowd: bool[M]; Pascal VOC's `difficult`, which its evaluation ignores likewise.
      files, entries, entry_form: how `place` names a box.
      records: what reads the images, where they are no files.
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
    records: TfdsReader | ArrayReader | None = None

    def place(self, box: int) -> str:
        """What to call box `box` in messages: its file and entry."""
        file = self.files[self.box_image[box] if len(self.files) > 1 else 0]
        return self.entry_form.format(file=file, entry=self.entries[box])

    @property
    def reader(self) -> FileReader | TfdsReader | ArrayReader:
        """Decodes image i: `reader.read(i)` uint8[H, W, C], upright; `reader.example_name(i)`."""
        return self.records or FileReader(self.folder, self.paths)


def read_annotations(spec: str, images: Path | None = None) -> Annotations:
    """Read the boxes that `spec` (see the top of this file) names, but no image's pixels.

    `images` is the folder that the paths are relative to; by default the annotation file's own, or
    where its format keeps them. For data.yaml it replaces `path`. Raises UserError, one line with
    the first few of all that is wrong; annotations are never partly read.
    """
    annotations, found = examine_annotations(spec, images)
    problems = [problem for problem in found if problem.kind != "unreadable"]
    if problems:
        first = "; ".join(f"{p.place}: {p.text}" for p in problems[:3])
        more = f"; and {len(problems) - 3:,} more problems" if len(problems) > 3 else ""
        raise one_line(f"{first}{more}: `python -m vision_jax.doctor {spec}` lists all")
    return annotations


def examine_annotations(
    spec: str, images: Path | None = None
) -> tuple[Annotations, tuple[Problem, ...]]:
    """(what could be read, what could not), for the doctor.

    Entries with problems are left out, but for boxes of undeclared categories (these are appended,
    named by their ids), and images whose files are missing. Raises UserError where nothing can be
    read at all.
    """
    if not spec:
        raise UserError("no annotations: set config.data.train to a COCO JSON file, for example")
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: no such folder of images")
    with without_collector():
        reading = _read(spec, images)
    annotations = _finish(reading)
    if not annotations.paths and not reading.problems:
        raise UserError(f"{spec}: lists no images")
    return annotations, tuple(reading.problems)


def _read(spec: str, images: Path | None) -> Reading:
    if spec.startswith("tfds:"):
        return read_tfds(spec)
    if spec.startswith("composites:"):
        return read_composites(spec)
    if spec.startswith("embedded:"):
        return _read_embedded(spec)
    path = expand(spec)
    if re.search(r"\.ya?ml(:\w+)?$", spec) and not path.is_dir():
        return read_yolo_yaml(spec, images)
    if path.is_dir():
        return _read_folder(spec, path, images)
    if path.is_file():
        return _read_file(spec, path, images)
    raise UserError(
        f"{spec}: no such file or folder: give COCO or plain JSON, a Pascal VOC or YOLO"
        " folder, data.yaml:SPLIT, tfds:NAME/SPLIT, embedded:aerial/train or composites:..."
    )


def _read_embedded(spec: str) -> Reading:
    path = ASSETS / f"{spec.partition(':')[2]}.json"
    known = sorted(ASSETS.glob("*/*.json"))
    if path not in known:
        names = ", ".join(f"embedded:{p.parent.name}/{p.stem}" for p in known)
        raise UserError(f"{spec}: not embedded: use one of {names}")
    return _read_file(spec, path, None)


def _read_folder(spec: str, path: Path, images: Path | None) -> Reading:
    if (path / "Annotations").is_dir():
        default = next((path / n for n in ("JPEGImages", "images") if (path / n).is_dir()), path)
        return read_voc(
            spec,
            find_files(path / "Annotations", {".xml"}),
            path / "Annotations",
            images or default,
        )
    labelled = (path / "images").is_dir() and (path / "labels").is_dir()
    xml, json = find_files(path, {".xml"}), find_files(path, {".json"})
    texts = find_files(path / "labels" if labelled else path, {".txt"})
    nested = [name for name in texts if "/" in name]  # a README lies beside the splits
    _refuse_splits(spec, path, "images" if labelled else "", xml or nested or json)
    if labelled:
        return read_yolo_folder(spec, images or path / "images", path / "labels", path)
    if xml:
        usual = path.parent / "JPEGImages"
        usual = usual if path.name == "Annotations" and usual.is_dir() else path
        return read_voc(spec, xml, path, images or usual)
    files = [name for name in json if "/" not in name]
    if len(files) == 1:
        return _read_file(spec, path / files[0], images)
    if images is not None and texts:
        return read_yolo_folder(spec, images, path, path)
    labels, pictures = (
        labels_of(path) if labels_of(path).is_dir() else path,
        find_files(path, IMAGES),
    )
    stems = {os.path.splitext(name)[0] for name in texts}
    beside = any(os.path.splitext(name)[0] in stems for name in pictures)
    if pictures and (labels != path or beside):
        return read_yolo_folder(spec, path, labels, path)
    advice = ", ".join(str(path / name) for name in (files or json)[:5])
    advice = f": give one of {advice}" if advice else ""
    for name in _YAMLS:
        if (path / name).is_file():
            advice = f": give {path / name}:train or another split of it"
    raise UserError(
        f"{spec}: holds no annotations that are known here{advice}; looked for Pascal VOC"
        " (Annotations/*.xml, or .xml beside images), YOLO (images/ and labels/, or .txt beside"
        " images) and one .json of COCO or plain form"
    )


def _refuse_splits(spec: str, path: Path, images: str, files: Sequence[str]) -> None:
    """A root whose annotations lie in train/ and val/ is no one set; the line names the parts."""
    splits = splits_of(files)
    yaml = next((path / name for name in _YAMLS if (path / name).is_file()), None)
    if splits and yaml is not None:
        raise UserError(f"{spec}: holds several splits: give {yaml}:train, or another split of it")
    if splits:
        parts = ", ".join(str(path / images / split) for split in splits)
        raise UserError(f"{spec}: holds the splits {', '.join(splits)}: give one of {parts}")


def _read_file(spec: str, path: Path, images: Path | None) -> Reading:
    with open_regular(path) as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n")  # a mark of any encoding
    if start[:1] in (b"{", b"["):
        content = read_json(path)
        if isinstance(content, dict) and isinstance(content.get("images"), list):
            if isinstance(content.get("annotations"), list):
                return read_coco(spec, path, content, images)
            if any(isinstance(e, dict) and "xmin" in e for e in content["images"]):
                return read_plain(spec, path, content, images)
        raise UserError(
            f"{path}: not annotations: COCO has the lists `images`, `annotations` and `categories`;"
            " the plain form has `images` with file_name, width, height, xmin, ymin, xmax, ymax and"
            f" category_id; this has {outline(content)}"
        )
    if start[:1] == b"<":
        return read_voc(spec, [path.name], path.parent, images or path.parent)
    root = next((p for p in path.resolve().parents if (p / "Annotations").is_dir()), None)
    if path.suffix == ".txt" and root is not None:
        names = [_listed_xml(line.strip(), root / "Annotations") for line in read_lines(path)]
        return read_voc(spec, names, root / "Annotations", images or root / "JPEGImages")
    raise UserError(
        f"{path}: not annotations that are known here: looked for JSON (COCO or plain), Pascal VOC"
        " (XML, or a list in a folder beside Annotations/) and YOLO's data.yaml"
    )


def _listed_xml(line: str, folder: Path) -> str:
    """A line of ImageSets/Main is a name, which may hold spaces; lists of a class add 1 or -1."""
    names = [name for name in (line, re.sub(r"\s+-?[01]$", "", line)) if "\0" not in name]
    inside = Inside(folder)
    return next((f"{n}.xml" for n in names if inside.find(f"{n}.xml")), f"{names[-1]}.xml")


def _finish(reading: Reading) -> Annotations:
    return Annotations(
        reading.spec,
        Path(reading.folder),
        tuple(reading.paths),
        np.array(reading.sizes, np.int32).reshape(-1, 2),
        tuple(reading.images),
        tuple(reading.categories),
        tuple(name for name, _ in reading.names),
        tuple(parent for _, parent in reading.names),
        np.array(reading.box_image, np.int32),
        np.array(reading.box_category, np.int32),
        np.array(reading.boxes, np.float64).reshape(-1, 4),
        np.array(reading.area, np.float64),
        np.array(reading.crowd, np.bool_),
        tuple(reading.files),
        np.array(reading.entries, np.int32),
        reading.entry_form,
        reading.records,
    )
