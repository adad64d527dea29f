"""What quantizing the embedded ViT costs, on crops of real photographs.

    python -m benchmarks.quantization
    python -m benchmarks.quantization --files=onnx,tflite,openvino

For each form: bytes of the parameters beside float32, how often the most probable class is that of
float32, the relative error of the logits. The crops are those of the embedded aerial photographs,
16 of each tile, of 64 pixels a side, made smaller to the model's 32. Of exported files the same, of
each in its runtime, and its CPU time for an image on one thread, all files by turns.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vision_jax
from vision_jax.data.detection import read_detection_source
from vision_jax.errors import UserError
from vision_jax.export import certificate
from vision_jax.export.files import FORMATS, file_bytes
from vision_jax.export.serving import serving_function
from vision_jax.models.families import apply_with_inputs
from vision_jax.run.calibrate import scales_of
from vision_jax.trees import quantize

CROPS, SIDE = 16, 64  # of a tile
CALIBRATION = 128


def main() -> int:
    """Prints a line for each form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, help="of each split at most so many")
    parser.add_argument("--files", default="", help="formats to export to as well")
    flags = parser.parse_args()
    loaded = vision_jax.load("embedded:vit_cifar10")
    crops = read_crops(flags.tiles)
    images = np.concatenate([loaded.preprocess(crop) for crop in crops])
    calibration, images = images[:CALIBRATION], images[CALIBRATION:]
    plain = loaded.variables["params"]
    chosen = quantize.choose(plain, [".*kernel"], ["head/.*", "patch_embed/.*"])
    int8, nf4 = quantize.FORMS["int8"], quantize.FORMS["nf4"]
    forms = {
        "int8 weights": quantize.quantize(plain, chosen, int8),
        "int8, dynamic inputs": quantize.quantize(
            plain, chosen, lambda kernel: int8(kernel, dynamic=True)
        ),
        "int8, static inputs": quantize.quantize_static(
            plain, chosen, scales_of(largest_inputs(loaded, calibration))
        ),
        "4-bit blocks": quantize.quantize(plain, chosen, nf4),
    }
    apply = jax.jit(lambda params, images: loaded.apply({"params": params}, images)["logits"])
    expected = np.asarray(apply(plain, images))
    size = sum(array.nbytes for array in jax.tree.leaves(plain))
    print(f"{len(images)} crops; float32 has {size:,} bytes")
    for name, params in forms.items():
        found = np.asarray(apply(params, images))
        agreement = (found.argmax(-1) == expected.argmax(-1)).mean()
        share = sum(array.nbytes for array in jax.tree.leaves(params)) / size
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        print(f"{name:22} bytes {share:.3f}  agreement {agreement:.4f}  logits off by {error:.2e}")
    for format_ in filter(None, flags.files.split(",")):
        measure_files(format_, loaded, {"float32": plain, **forms}, crops[CALIBRATION:])
    return 0


def measure_files(
    format_: str, loaded: vision_jax.Loaded, forms: dict[str, Any], crops: list[np.ndarray]
) -> None:
    """Prints a line for each form that the format has."""
    known, files = FORMATS[format_], {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, params) in enumerate(forms.items()):
            one = certificate.as_float32(replace(loaded, variables={"params": params}))
            serving = serving_function(one, image_size=(SIDE, SIDE), integers=known.integers)
            if name != "float32" and not serving.int8:
                continue
            try:
                own = Path(folder) / str(number)
                own.mkdir()
                files[name] = known.write(serving, 1, own)[0]
            except UserError as error:
                print(f"{format_}: {name}: {error}")
        images = [crop[None] for crop in crops]
        ran = certificate.run_files(format_, [(path, images) for path in files.values()])
        logits = [np.concatenate([one["logits"] for one in run.outputs]) for run in ran]
        sizes = [file_bytes(path) for path in files.values()]
    print(f"{format_}, {ran[0].runtime['runtime']} {ran[0].runtime['version']}, {len(crops)} crops")
    for name, run, found, size in zip(files, ran, logits, sizes, strict=True):
        agreement = (found.argmax(-1) == logits[0].argmax(-1)).mean()
        error = np.linalg.norm(found - logits[0]) / np.linalg.norm(logits[0])
        seconds = run.seconds / ran[0].seconds
        print(
            f"  {name:20} bytes {size:,} {size / sizes[0]:.4f}  agreement {agreement:.4f}  "
            f"logits off by {error:.2e}  CPU {1e3 * run.seconds:.3f} ms {seconds:.2f}"
        )


def read_crops(most: int | None) -> list[np.ndarray]:
    """u8[SIDE, SIDE, 3] of the embedded tiles, of `most` a split, always the same."""
    rng = np.random.default_rng(0)
    crops = []
    for split in ("train", "test"):
        source = read_detection_source(f"embedded:aerial/{split}", "")
        for index in range(len(source))[:most]:
            tile = source[index]["image"]
            for _ in range(CROPS):
                top, left = (rng.integers(0, side - SIDE) for side in tile.shape[:2])
                crops.append(tile[top : top + SIDE, left : left + SIDE])
    rng.shuffle(crops)
    return crops


def largest_inputs(loaded: vision_jax.Loaded, images: np.ndarray) -> dict[str, float]:
    """The largest magnitude of each kernel's inputs."""

    @jax.jit
    def measure(variables, images):
        seen = apply_with_inputs(loaded.model, variables, images)[1]
        return {path: jnp.abs(jnp.stack(xs)).max() for path, xs in seen.items()}

    return {path: float(x) for path, x in measure(loaded.variables, images).items()}


if __name__ == "__main__":
    sys.exit(main())
