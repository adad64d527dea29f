"""Writes a model as one file that other programs run, and certifies what it computes there.

    vision_jax export runs/vit_lora --to=onnx
    vision_jax export embedded:vit_cifar10 --to=stablehlo --out=exported
    vision_jax export runs/segment_nuclei --to=tflite --image-size=256,256 --batch=1
    vision_jax export runs/vit_lora --to=onnx --images photos/*.jpg
    vision_jax export runs/vit_lora/quantized --to=tflite             # kernels in int8, as they are
    vision_jax export embedded:vit_cifar10 --to=onnx --quantize=dynamic

The file takes uint8 images as they come and gives names with probabilities, boxes in pixels, or a
class for each pixel. SOURCE is a run's folder, or weights as `predict --weights` takes them. Beside
the file lies its description with the certificate: a runtime has run the file, in a process of its
own, on images that nobody has seen. docs/export.md says what each format can.
"""

import argparse
import re
import secrets
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vision_jax.commands.source import check_folder, check_keeps, is_run, load_source
from vision_jax.errors import UserError
from vision_jax.files import expand, read_json
from vision_jax.flags import image_size, make_parser, run, seed

TARGETS = ("stablehlo", "onnx", "tflite", "openvino", "safetensors")
FAILED = 1  # exit code
PATIENCE = 60  # seconds for a --python to start
QUANTIZED_FILE = "quantization.json"
WEIGHTS, DYNAMIC = "weights", "dynamic"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 for a failed certificate, 2 for bad input."""
    return run(lambda: _run(_parse(arguments)), "such a model")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("vision_jax export", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="what to export")
    parser.add_argument("--to", choices=TARGETS, required=True, help="the format")
    parser.add_argument(
        "--out", type=expand, metavar="DIR", help="where; RUN/export by default, or ./export"
    )
    parser.add_argument(
        "--image-size",
        type=image_size,
        metavar="H,W",
        help="of the images that will come; any else",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="images at once; any number else")
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="FILE", help="photos to certify on, too"
    )
    parser.add_argument("--checkpoint", choices=("last", "best"), help="of a run; its end else")
    parser.add_argument(
        "--quantize",
        choices=(WEIGHTS, DYNAMIC),
        help="kernels to int8, all but heads and the first: alone, or with the layers' inputs by "
        "the range of each; `vision_jax quantize` measures what a run's can bear, and calibrates",
    )
    parser.add_argument(
        "--merge",
        type=float,
        metavar="R",
        help="of a ViT: patch tokens that merge in each block, or below 1 the share of them; the "
        "model's own else",
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pickles, by torch's weights-only reader"
    )
    parser.add_argument(
        "--import-certificate",
        type=expand,
        metavar="FILE",
        help="of `certify`, of the weights that the run began with: the chain goes on from it",
    )
    parser.add_argument(
        "--python", default=sys.executable, metavar="PATH", help="whose packages run the file"
    )
    parser.add_argument("--seed", type=seed, help="of the generated images; drawn else")
    flags = parser.parse_args(arguments)
    if flags.batch is not None and flags.batch < 1:
        raise UserError(f"--batch={flags.batch}: give 1 or more")
    if flags.to == "safetensors":
        names = (
            "image_size",
            "batch",
            "images",
            "quantize",
            "import_certificate",
            "python",
            "seed",
        )
        if given := [name for name in names if getattr(flags, name) != parser.get_default(name)]:
            flag = given[0].replace("_", "-")
            raise UserError(f"--{flag}: --to=safetensors saves the weights alone: leave it out")
    return flags


def _check_python(python: str) -> None:
    """Raises UserError where it can't be run; whether it has the runtime, the certificate says."""
    if python == sys.executable:
        return
    try:
        done = subprocess.run([python, "-c", ""], capture_output=True, timeout=PATIENCE)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--python={python}: can't be run ({reason})") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"--python={python}: did nothing for {PATIENCE} s") from None
    if done.returncode:
        raise UserError(f"--python={python}: is no Python (exit code {done.returncode})")


def _run(flags: argparse.Namespace) -> int:
    from vision_jax.export.files import Request, check_pixels, export, written

    folder = expand(flags.source)
    workdir = folder if is_run(folder) else None
    report = _read_report(folder)
    out = flags.out or (folder / "export" if workdir or report else Path("export"))
    check_folder("--out", out)
    if flags.to == "safetensors":
        check_keeps("--out", out, folder)
    else:
        check_pixels(flags.image_size or (1, 1), flags.batch)
        _check_python(flags.python)
    loaded = load_source(
        flags.source, folder, checkpoint=flags.checkpoint, allow_pickle=flags.allow_pickle
    )
    if flags.merge is not None:
        loaded = _merging(loaded, flags.merge)
    if flags.to == "safetensors":
        return _save(loaded, out)
    float32 = _before(report)
    if flags.quantize:
        loaded, float32 = _quantized(loaded, flags.quantize), loaded
    request = Request(
        format=flags.to,
        image_size=flags.image_size,
        batch=flags.batch,
        photos=_photos(flags.images),
        python=flags.python,
        seed=secrets.randbelow(2**32) if flags.seed is None else flags.seed,
        continues=_continues(loaded, workdir, flags.import_certificate)
        | ({"quantized": report} if report else {}),
        float32=float32,
    )
    path, record = export(loaded, out, request)
    _, *others = written(path, record)
    print(f"wrote {path} ({record['bytes'] / 1e6:.1f} MB)")
    print(f"wrote {', '.join(map(str, others))}")
    found = record["certificate"]
    if not found["pass"]:
        print(f"FAILED {path.name}: {'; '.join(found['reasons'])}", file=sys.stderr)
        return FAILED
    print(_line(found))
    if "int8" in found:
        print(_int8_line(found["int8"]))
    return 0


def _int8_line(found: dict[str, Any]) -> str:
    """What int8 costs and saves, for the screen."""
    beside = found["beside_float32"]
    rounded = ", inputs too" if found["rounds_inputs"] else ""
    return (
        f"int8: {found['kernels']} kernels{rounded}; beside the file in float32 "
        f"{beside['bytes']:.3f} of the bytes, {beside['cpu_time']:.2f} of the CPU time, agreement "
        f"{beside['agreement']:.4f}"
    )


def _line(found: dict[str, Any]) -> str:
    """The certificate for the screen."""
    errors = ", ".join(f"{name} {error:.1e}" for name, error in found["relative_error"].items())
    runtime = found["runtime"]
    parts = [
        f"certified by {runtime['runtime']} {runtime['version']} on {found['images']} images",
        f"relative error {errors}",
        f"agreement {found['agreement']:.4f}",
        f"preprocessing {found['preprocessing']['largest_difference_in_255ths']}/255",
        f"{found['cpu_ms_an_image']:g} CPU-ms an image, {found['cpu_time_beside_jax']:g} of JAX's",
    ]
    return "; ".join(parts)


def _read_report(folder: Path) -> dict[str, Any] | None:
    """What `vision_jax quantize` measured, but for each kernel; None: the folder is none of its."""
    if not (folder / QUANTIZED_FILE).is_file():
        return None
    report = read_json(folder / QUANTIZED_FILE)
    if not isinstance(report, dict):
        raise UserError(f"{folder / QUANTIZED_FILE} is no report of `vision_jax quantize`")
    return {name: value for name, value in report.items() if name != "kernels"}


def _before(report: dict[str, Any] | None) -> Any:
    """The model that was quantized, if its run is still there."""
    from vision_jax.loaded import load

    run = str((report or {}).get("run", ""))
    if not run or not is_run(Path(run)):  # "" would be the current folder, whatever lies in it
        return None
    try:
        return load(Path(run))
    except UserError:  # it is another one by now, or damaged
        return None


def _merging(loaded: Any, merge: float) -> Any:
    """The model, merging so many tokens."""
    from dataclasses import replace

    from vision_jax.models.families import family_of
    from vision_jax.models.merging import merge_counts

    if not hasattr(loaded.model, "merge"):
        raise UserError(
            f"--merge: a {family_of(loaded.model)} has no tokens that merge: leave it out"
        )
    merge_counts(merge, 1, 1)
    return replace(loaded, model=loaded.model.clone(merge=merge))


def _quantized(loaded: Any, inputs: str) -> Any:
    """The model with its kernels in int8, all but those that quantization leaves in float."""
    from dataclasses import replace

    import jax

    from vision_jax.config.fields import HEADS
    from vision_jax.trees import quantize

    params = loaded.variables["params"]
    if quantize.is_quantized(quantize.describe(params)):
        raise UserError(f"--quantize: {loaded.origin} is quantized already: leave it out")
    keep = (*HEADS, re.escape(getattr(loaded.model, "stem", "")))
    chosen = quantize.choose(params, [".*kernel"], keep, field="--quantize")
    make = partial(quantize.FORMS["int8"], dynamic=inputs == DYNAMIC)
    params = jax.jit(lambda params: quantize.quantize(params, chosen, make))(params)
    return replace(loaded, variables={**loaded.variables, "params": params})


def _photos(names: Sequence[str]) -> list[Any]:
    from vision_jax.data.sources import FileReader

    reader = FileReader(Path(), tuple(map(str, map(expand, names))))
    return [reader.read(row)[None] for row in range(len(names))]


def _continues(loaded: Any, workdir: Path | None, certificate: Path | None) -> dict[str, Any]:
    """Where the weights came from, and the certificate of that import, if it is given."""
    found: dict[str, Any] = {"weights": loaded.origin}
    if workdir is not None:
        described = read_json(workdir / "model.json")
        found |= {
            "run": str(workdir),
            "weights": described["weights"],
            "sha256": described["sha256"],
        }
    if certificate is None:
        return found
    record = read_json(certificate)
    if not isinstance(record, dict) or "sha256" not in record or "worst" not in record:
        raise UserError(
            f"{certificate} is no certificate of an import: `vision_jax certify` writes one"
        )
    kept = ("name", "sha256", "pass", "worst", "versions", "weights")
    same = record["sha256"] == found.get("sha256")
    return found | {
        "import_certificate": {name: record.get(name) for name in kept},
        "of_the_same_file": same,
    }


def _save(loaded: Any, out: Path) -> int:
    """The folder that timm, torchvision or transformers load, read back and compared."""
    import numpy as np

    from vision_jax.loaded import load, save
    from vision_jax.trees import lora, paths

    for path in save(out, loaded, loaded.variables):
        print(f"wrote {path}")
    again = load(out)
    ours, theirs = (paths.flatten(lora.merge(one.variables["params"])) for one in (loaded, again))
    if ours.keys() != theirs.keys() or any(
        not np.array_equal(ours[path], theirs[path]) for path in ours
    ):
        print(f"FAILED {out}: read back, its parameters are others", file=sys.stderr)
        return FAILED
    print(f"read back: all {len(ours)} parameters are bit-identical")
    return 0


if __name__ == "__main__":
    sys.exit(main())
