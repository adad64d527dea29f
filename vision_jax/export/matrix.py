"""docs/exports.md: every family in every format, run by its runtime beside the model itself.

python -m vision_jax.export.matrix            # what docs/exports.json has not yet, cell by cell
python -m vision_jax.export.matrix --again
python -m vision_jax.export.matrix yolox unet --again
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.errors import UserError, nearest
from vision_jax.export import certificate
from vision_jax.export.files import FORMATS, view_alone
from vision_jax.export.samples import INSIDE, SAMPLES, VIEWS, make_sample
from vision_jax.export.serving import Serving, serving_function
from vision_jax.files import write_whole

RECORDS, TABLE = Path("docs/exports.json"), Path("docs/exports.md")
LEVELS = "largest_difference_in_255ths"
NAMES = {"stablehlo": "StableHLO", "onnx": "ONNX", "tflite": "LiteRT", "openvino": "OpenVINO"}


def main() -> int:
    """Measures and renders; returns 1 where something is beyond the bar."""
    parser = argparse.ArgumentParser(prog="python -m vision_jax.export.matrix", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="NAME", help="of the table; all by default")
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    flags = parser.parse_args()
    known = [*SAMPLES, *VIEWS]
    for name in flags.rows:
        if name not in known:
            parser.error(f"no row {name!r}{nearest(name, known)}")
    records = json.loads(RECORDS.read_text()) if RECORDS.is_file() else {}
    for name in flags.rows or known:
        record = records.get(name, {})
        missing = [format_ for format_ in FORMATS if flags.again or format_ not in record]
        if not missing:
            continue
        for format_, found in (measure_view if name in VIEWS else measure)(name, missing):
            record = records[name] = record | {format_: found}
            print(name, format_, found, flush=True)
            ordered = {row: records[row] for row in known if row in records}
            write_whole((json.dumps(ordered, indent=1) + "\n").encode(), RECORDS)
            write_whole(render(ordered).encode(), TABLE)
    return int(any(_fails(one) for record in records.values() for one in record.values()))


def measure(
    name: str, formats: Sequence[str], seed: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of a sample, format by format: the largest relative error and the runtime, or a reason."""
    loaded = certificate.as_float32(make_sample(name, seed))
    height, width = loaded.preprocessing.image_size
    takes_as_it_is = getattr(loaded.preprocessing, "view", "squash") != "squash"
    size = (height, width) if takes_as_it_is else (height * 5 // 4, width * 3 // 2)
    serving = serving_function(loaded)
    images = certificate.fresh_images(np.random.default_rng(seed), 2, [size], serving.channels)
    pipeline = certificate.host_pipeline(loaded, serving.kind)
    ours = [pipeline(image) for image in images]
    for format_ in formats:
        of = serving if FORMATS[format_].any_size else serving_function(loaded, image_size=size)
        try:
            (ran,) = _run(format_, [(of, images)])
        except UserError as error:
            yield format_, {"reason": str(error)}
            continue
        compared = certificate.compare(serving.kind, ours, ran.outputs)
        found = {"error": float(f"{max(compared['relative_error'].values()):.3g}")}
        found |= {name: compared[name] for name in ("agreement", "compared")}
        yield format_, found | _runtime(ran)


def measure_view(
    name: str, formats: Sequence[str], seed: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of a way to prepare images, format by format: how many grey levels the graph is off."""
    loaded = replace(make_sample("vit"), preprocessing=VIEWS[name])
    rng = np.random.default_rng(seed)
    images = certificate.fresh_images(rng, 3, certificate.sizes_around(rng, 60, 3), 3)
    ours = [certificate.host_view(loaded, image) for image in images]
    of_any = serving_function(loaded)
    any_size = of_any.image_size is None and VIEWS[name].interpolation != "nearest"
    for format_ in formats:
        given = [(view_alone(of_any), images)]
        if not (any_size and FORMATS[format_].any_size):
            given = [
                (view_alone(serving_function(loaded, image_size=image.shape[1:3])), [image])
                for image in images
            ]
        try:
            ran = _run(format_, given)
        except UserError as error:
            yield format_, {"reason": str(error)}
            continue
        views = [outputs["view"][0] for one in ran for outputs in one.outputs]
        yield format_, dict(certificate.compare_views(ours, views)) | _runtime(ran[0])


def _run(
    format_: str, given: Sequence[tuple[Serving, Sequence[np.ndarray]]]
) -> list[certificate.Ran]:
    """Files of these functions, each run on its images, in one process of the format's runtime."""
    with tempfile.TemporaryDirectory() as folder:
        written = []
        for number, (serving, images) in enumerate(given):
            place = Path(folder, str(number))
            place.mkdir()
            written.append((FORMATS[format_].write(serving, None, place)[0], images))
        return certificate.run_files(format_, written)


def _runtime(ran: certificate.Ran) -> dict[str, str]:
    return {"runtime": f"{ran.runtime['runtime']} {ran.runtime['version']}"}


def render(records: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """docs/exports.md from the records alone."""
    formats = [name for name in NAMES if any(name in record for record in records.values())]
    runtimes = {
        name: next(
            (r[name]["runtime"] for r in records.values() if "runtime" in r.get(name, {})), ""
        )
        for name in formats
    }
    lines = [
        "# Families and formats",
        "",
        "Made by `python -m vision_jax.export.matrix`; not edited by hand.",
        "",
        "Small models of each family with random arrays, every statistic among them, exported"
        " whole: uint8 images in, answers out. The figure is the largest difference from what"
        " `predict` computes here, relative to the largest value of an output (logits and"
        " probabilities, scores and boxes, scores of pixels); the bar is 1e-5. StableHLO and ONNX"
        " are of any size and number of images, the others of one. What is exported, and how a file"
        " of your own is certified: [export.md](export.md).",
        "",
        *_table("model", records, SAMPLES, runtimes),
        "",
        f"Of {', '.join(INSIDE)} the ViT inside is exported, as `vit` is: it gives features.",
        "",
        "How images are prepared, in the graph and by Pillow on the host: the largest difference in"
        " grey levels of three images, and the share of values that differ; the bar is 1. Files of"
        " any size were of one for `nearest` and for segmenters that don't squash their images.",
        "",
        *_table("preprocessing", records, VIEWS, runtimes),
    ]
    reasons = [
        f"- {name}, {NAMES[format_]}: {one['reason']}"
        for name, record in records.items()
        for format_, one in record.items()
        if "reason" in one
    ]
    return "\n".join([*lines, *([""] if reasons else []), *reasons]) + "\n"


def _table(
    title: str,
    records: Mapping[str, Mapping[str, Mapping[str, Any]]],
    rows: Collection[str],
    runtimes: Mapping[str, str],
) -> list[str]:
    """Those of the rows that there are records of."""
    heads = " | ".join(f"{NAMES[name]} ({runtime})" for name, runtime in runtimes.items())
    lines = [f"| {title} | {heads} |", "|---|" + "--:|" * len(runtimes)]
    for name in rows:
        if name in records:
            cells = (_cell(records[name].get(format_, {})) for format_ in runtimes)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(one: Mapping[str, Any]) -> str:
    if not one:
        return ""
    if "reason" in one:
        return "no, see below"
    text = f"{one['error']:.1e}" if "error" in one else str(one[LEVELS])
    if one.get(LEVELS):
        text += f" ({one['share_that_differs']:.2%})"
    return text + (" **fails**" if _fails(one) else "")


def _fails(one: Mapping[str, Any]) -> bool:
    if "reason" in one:
        return False
    if "error" not in one:
        return one[LEVELS] > certificate.PIXELS_APART
    good = one["error"] <= certificate.BAR and one["agreement"] >= 0.999 and one["compared"]
    return not good


if __name__ == "__main__":
    sys.exit(main())
