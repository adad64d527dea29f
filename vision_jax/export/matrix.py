"""docs/exports.md: every family in every format, run by its runtime beside the model itself.

python -m vision_jax.export.matrix            # what docs/exports.json has not yet
python -m vision_jax.export.matrix --again
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.errors import UserError
from vision_jax.export import certificate
from vision_jax.export.files import FORMATS
from vision_jax.export.samples import INSIDE, SAMPLES, make_sample
from vision_jax.export.serving import serving_function
from vision_jax.files import write_whole

RECORDS, TABLE = Path("docs/exports.json"), Path("docs/exports.md")
NAMES = {"stablehlo": "StableHLO", "onnx": "ONNX", "tflite": "LiteRT", "openvino": "OpenVINO"}


def main() -> int:
    """Measures and renders; returns 1 where something is beyond the bar."""
    parser = argparse.ArgumentParser(prog="python -m vision_jax.export.matrix", description=__doc__)
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    flags = parser.parse_args()
    records = {} if flags.again or not RECORDS.is_file() else json.loads(RECORDS.read_text())
    for name in SAMPLES:
        missing = [format_ for format_ in FORMATS if format_ not in records.get(name, {})]
        if not missing:
            continue
        records[name] = records.get(name, {}) | measure(name, missing)
        write_whole((json.dumps(records, indent=1) + "\n").encode(), RECORDS)
        print(name, records[name], flush=True)
        TABLE.write_text(render(records))
    errors = [one.get("error", 0.0) for record in records.values() for one in record.values()]
    return int(max(errors) > certificate.BAR)


def measure(name: str, formats: Sequence[str], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Of a sample, by format: the largest relative error and the runtime, or a reason."""
    loaded = certificate.as_float32(make_sample(name, seed))
    height, width = loaded.preprocessing.image_size
    takes_as_it_is = getattr(loaded.preprocessing, "view", "squash") != "squash"
    size = (height, width) if takes_as_it_is else (height * 5 // 4, width * 3 // 2)
    serving = serving_function(loaded)
    images = certificate.fresh_images(np.random.default_rng(seed), 2, [size], serving.channels)
    pipeline = certificate.host_pipeline(loaded, serving.kind)
    ours = [pipeline(image) for image in images]
    found: dict[str, dict[str, Any]] = {}
    for format_ in formats:
        known = FORMATS[format_]
        of = serving if known.any_size else serving_function(loaded, image_size=size)
        try:
            with tempfile.TemporaryDirectory() as folder:
                path, _ = known.write(of, None, Path(folder))
                (ran,) = certificate.run_files(format_, [(path, images)])
        except UserError as error:
            found[format_] = {"reason": str(error)}
            continue
        compared = certificate.compare(serving.kind, ours, ran.outputs)
        found[format_] = {
            "error": float(f"{max(compared['relative_error'].values()):.3g}"),
            "agreement": compared["agreement"],
            "runtime": f"{ran.runtime['runtime']} {ran.runtime['version']}",
        }
    return found


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
        "| model | " + " | ".join(f"{NAMES[name]} ({runtimes[name]})" for name in formats) + " |",
        "|---|" + "--:|" * len(formats),
    ]
    for name, record in records.items():
        cells = [_cell(record.get(format_, {})) for format_ in formats]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    inside = ", ".join(INSIDE)
    lines += ["", f"Of {inside} the ViT inside is exported, as `vit` is: it gives features."]
    reasons = [
        f"- {name}, {NAMES[format_]}: {one['reason']}"
        for name, record in records.items()
        for format_, one in record.items()
        if "reason" in one
    ]
    return "\n".join([*lines, *([""] if reasons else []), *reasons]) + "\n"


def _cell(one: Mapping[str, Any]) -> str:
    if "error" not in one:
        return "no, see below" if one else ""
    failed = one["error"] > certificate.BAR or (one["agreement"] or 1.0) < 0.999
    return f"{one['error']:.1e}" + (" **fails**" if failed else "")


if __name__ == "__main__":
    sys.exit(main())
