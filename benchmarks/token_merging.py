"""What token merging costs and saves: multiplications, CPU time here and in exported files.

python -m benchmarks.token_merging                          # ViT-S/16 at 224 pixels, random weights
python -m benchmarks.token_merging --weights=embedded:vit_cifar10 --merge=0,2,4 --files=
python -m benchmarks.token_merging --files=onnx

Every form runs on one thread, by turns; times are the least of all rounds, beside the first form's.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

if "NPROC" not in os.environ:  # of XLA's threads on a CPU, before JAX is imported
    os.environ["NPROC"] = "1"

import jax
import jax.numpy as jnp

import vision_jax
from vision_jax.data.transforms import Preprocessing
from vision_jax.export import certificate
from vision_jax.export.files import FORMATS
from vision_jax.export.serving import serving_function
from vision_jax.models.families import build_model, find_variant, initialize

VARIANT, CLASSES, IMAGES = "vit_small_patch16_224", 1000, 4


def main() -> int:
    """Prints a table for JAX and each format."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.token_merging", description=__doc__)
    parser.add_argument(
        "--weights", default="", help=f"as of vision_jax.load; random {VARIANT} else"
    )
    parser.add_argument("--merge", default="0,8,13,16", help="tokens a block, or shares of them")
    parser.add_argument("--batch", type=int, default=8, help="images at once in JAX")
    parser.add_argument("--rounds", type=int, default=5, help="of JAX; 0 leaves it out")
    parser.add_argument("--files", default="onnx,tflite", help="formats, each of one image at once")
    flags = parser.parse_args()
    loaded = vision_jax.load(flags.weights) if flags.weights else random_model()
    forms = {merge: merging(loaded, float(merge)) for merge in flags.merge.split(",")}
    if flags.rounds:
        measure_jax(forms, flags.batch, flags.rounds)
    for format_ in filter(None, flags.files.split(",")):
        measure_files(format_, forms)
    return 0


def random_model() -> vision_jax.Loaded:
    """All arrays random, so that tokens differ as they do in a trained one."""
    family, arguments = find_variant(VARIANT)
    model = build_model(family, **arguments, num_classes=CLASSES)
    shapes = jax.eval_shape(lambda: initialize(model, jax.random.key(0), model.image_size))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: (rng.normal(size=x.shape) * (x.shape[0] if x.ndim == 2 else 400) ** -0.5).astype(
            np.float32
        ),
        shapes,
    )
    names = tuple(map(str, range(CLASSES)))
    preprocessing = Preprocessing(
        image_size=model.image_size,
        mean=model.mean,
        std=model.std,
        crop_pct=1.0,
        interpolation="bilinear",
        crop_mode="center",
    )
    return vision_jax.Loaded(model, variables, names, preprocessing, VARIANT)


def merging(loaded: vision_jax.Loaded, merge: float) -> vision_jax.Loaded:
    """The model, merging so many tokens."""
    return replace(loaded, model=loaded.model.clone(merge=merge))


def measure_jax(forms: dict[str, vision_jax.Loaded], batch: int, rounds: int) -> None:
    """Prints products, as XLA counts them, and CPU time of a batch, forward and with gradients."""
    first = next(iter(forms.values()))
    size = (batch, *first.preprocessing.image_size, first.model.in_channels)
    images = jnp.asarray(np.random.default_rng(1).random(size), jnp.float32)

    def compiled(model: Any, gradient: bool) -> Any:
        def loss(variables, images):
            logits = model.apply(variables, images)
            return (logits * jnp.arange(logits.shape[1], dtype=logits.dtype)[None]).sum()

        function = jax.grad(loss) if gradient else model.apply
        return jax.jit(function).lower(first.variables, images).compile()

    for gradient in (False, True):
        programs = {name: compiled(one.model, gradient) for name, one in forms.items()}
        least = dict.fromkeys(programs, float("inf"))
        for _ in range(rounds):
            for name, program in programs.items():
                begin = time.process_time()
                jax.block_until_ready(program(first.variables, images))
                least[name] = min(least[name], time.process_time() - begin)
        base = next(iter(forms))
        flops = {name: program.cost_analysis()["flops"] for name, program in programs.items()}
        print(f"JAX {jax.__version__}, {batch} images{', with gradients' if gradient else ''}")
        for name, seconds in least.items():
            print(
                f"  merge {name:5} GFLOPs an image {flops[name] / batch / 1e9:7.3f} "
                f"{flops[name] / flops[base]:.3f}  CPU {1e3 * seconds / batch:7.1f} ms an image "
                f"{seconds / least[base]:.3f}",
                flush=True,
            )


def measure_files(format_: str, forms: dict[str, vision_jax.Loaded]) -> None:
    """Prints CPU time of each form's file, and how far it is from JAX."""
    known, files = FORMATS[format_], []
    rng = np.random.default_rng(2)
    first = next(iter(forms.values()))
    size = first.preprocessing.image_size
    images = [rng.integers(0, 256, (1, *size, first.model.in_channels), np.uint8)] * IMAGES
    with tempfile.TemporaryDirectory() as folder:
        for number, one in enumerate(forms.values()):
            own = Path(folder) / str(number)
            own.mkdir()
            serving = serving_function(certificate.as_float32(one), image_size=size)
            files.append(known.write(serving, 1, own)[0])
        ran = certificate.run_files(format_, [(path, images) for path in files])
    runtime = ran[0].runtime
    print(f"{format_}, {runtime['runtime']} {runtime['version']}, one image")
    for (name, one), run in zip(forms.items(), ran, strict=True):
        view = jnp.asarray(one.preprocess(list(images[0])))
        ours = np.asarray(jax.jit(one.apply)(one.variables, view)["logits"])
        error = np.abs(run.outputs[0]["logits"] - ours).max() / np.abs(ours).max()
        print(
            f"  merge {name:5} CPU {1e3 * run.seconds:7.1f} ms {run.seconds / ran[0].seconds:.3f}  "
            f"logits off by {error:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
