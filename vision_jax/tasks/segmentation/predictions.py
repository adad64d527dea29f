"""What `predict` writes: of images masks and overlays, of volumes labels and a report."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from vision_jax.config import write_json
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.segmentation import SegmentationSource, images_to_segment, slices_to_segment
from vision_jax.data.volumes.source import volume_alone, write_labels
from vision_jax.data.volumes.volume import from_plane
from vision_jax.errors import UserError, printable
from vision_jax.evaluation import none_read, say_damaged
from vision_jax.logging import say
from vision_jax.tasks import images
from vision_jax.tasks.segmentation import cases
from vision_jax.tasks.segmentation.cases import CaseTally
from vision_jax.tasks.segmentation.inference import Predicted

SHOWN = 5  # classes of an image on the screen

PredictAll = Callable[[SegmentationSource, DamageLog], Iterator[Predicted]]  # by one model


def predict_images(
    names: Sequence[str],
    class_names: Sequence[str],
    predict_all: PredictAll,
    out: Path,
    count_objects: Callable[[np.ndarray], int] | None,
) -> None:
    """OUT/masks/, OUT/overlays/ and OUT/predictions.json of image files.

    Args:
      names: of the files.
      class_names: by label.
      predict_all: predicts a source.
      out: where to write.
      count_objects: of a mask, None to count none.

    Raises:
      UserError: none of the files can be read.
    """
    from vision_jax.tasks.segmentation import figures  # matplotlib, only where something is drawn

    source, damage = images_to_segment(names, class_names), DamageLog()
    colors = figures.palette(len(class_names))
    record: dict[int, dict[str, Any]] = {}
    writes = not jax.process_index()
    if writes:
        for folder in ("masks", "overlays"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    for row, prediction, _ in predict_all(source, damage):
        record[row] = describe(prediction, class_names, count_objects)
        if not writes:
            continue
        name = images.file_name(row, Path(names[row]).stem)
        record[row]["mask"] = f"masks/{name}"
        mask = Image.fromarray(prediction)
        mask.putpalette(colors.tobytes())
        mask.save(out / "masks" / name)
        picture = figures.overlay(source[row]["image"], prediction, colors)
        Image.fromarray(picture).save(out / "overlays" / name)
    if not record:
        raise none_read(source, damage)
    if not writes:
        return
    _say_shares(names, record)
    say_damaged(damage.lines)
    classes = {str(k): name for k, name in enumerate(class_names)}
    listed = images.list_files(names, record, damage)
    write_json({"classes": classes, "images": listed}, out / "predictions.json")
    say(f"wrote {out / 'predictions.json'}")
    say(f"wrote {out / 'masks'}, whose values are the classes of predictions.json")
    say(f"wrote {out / 'overlays'}")


def describe(
    prediction: np.ndarray,
    class_names: Sequence[str],
    count_objects: Callable[[np.ndarray], int] | None,
) -> dict[str, Any]:
    """What is said of one image, for JSON.

    Args:
      prediction: u8[H, W], classes.
      class_names: by label.
      count_objects: of a mask, None to count none.

    Returns:
      "height" and "width" in pixels, "shares": {name: share of the pixels}, and "objects" if they
      are counted.
    """
    shares = np.bincount(prediction.reshape(-1), minlength=len(class_names)) / prediction.size
    return {
        "height": prediction.shape[0],
        "width": prediction.shape[1],
        "shares": {name: float(shares[k]) for k, name in enumerate(class_names)},
    } | ({} if count_objects is None else {"objects": count_objects(prediction)})


def _say_shares(names: Sequence[str], record: Mapping[int, Mapping[str, Any]]) -> None:
    """The files in the order given, of each the classes that have most pixels."""
    width = max(len(printable(name)) for name in names)
    for row, found in sorted(record.items()):
        largest = sorted(found["shares"].items(), key=lambda one: -one[1])[:SHOWN]
        text = ", ".join(f"{printable(name)} {share:.1%}" for name, share in largest if share)
        objects = f"  {found['objects']} objects" if "objects" in found else ""
        say(f"{printable(names[row]):{width}}  {text}{objects}")


def predict_volumes(
    names: Sequence[str],
    class_names: Sequence[str],
    predict_all: PredictAll,
    out: Path,
    trained_on: str,
) -> None:
    """OUT/masks/ and OUT/cases/ of volumes.

    Args:
      names: of the files, or of folders of DICOM.
      class_names: by label.
      predict_all: predicts a source.
      out: where to write.
      trained_on: the source of volumes whose window, plane and neighbors are taken.

    Raises:
      UserError: one can't be read, or the model was trained on images.
    """
    reports = [
        _predict_volume(number, name, class_names, predict_all, out, trained_on)
        for number, name in enumerate(names)
    ]
    if jax.process_index():
        return
    cases.write_cases(reports, out / "cases")
    say(f"wrote {out / 'masks'}, whose values are the classes' places in model.json")
    say(f"wrote {out / 'cases'}: {cases.SENTENCE}")


def _predict_volume(
    number: int,
    name: str,
    class_names: Sequence[str],
    predict_all: PredictAll,
    out: Path,
    trained_on: str,
) -> dict[str, Any]:
    """Writes the labels of a volume; returns its report."""
    reader = volume_alone(Path(name), trained_on)
    source = slices_to_segment(reader, class_names)
    tally, damage = CaseTally(source, truth=False), DamageLog()
    for row, prediction, _ in predict_all(source, damage):
        tally.add(row, prediction, prediction)
    if damage.count:
        raise UserError(f"{name}: can't be read: its header is sound, and its voxels are not")
    [report] = tally.reports()
    report["pictures"] = [source.reader.read(place) for *_, place in report["strip"]]
    labels = from_plane(report.pop("labels"), reader.options.plane)
    if not jax.process_index():
        (out / "masks").mkdir(parents=True, exist_ok=True)
        stem = images.file_name(number, reader.cases[0].name, "")
        write_labels(out / "masks", stem, reader, labels)
        for kind, found in report["classes"].items():
            ml = found["volume_ml"]
            amount = f"{found['voxels']:,} voxels" if ml is None else f"{ml:.1f} ml"
            say(f"{printable(name)}  {printable(kind)} {amount}")
    return report
