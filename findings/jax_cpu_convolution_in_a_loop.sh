#!/usr/bin/env bash
# The input gradient of a convolution on a CPU: outside of a loop XLA turns the kernel's axes around
# and multiplies by its fast kernels; in the body of a loop (the steps of an attack, micro-batches) it
# keeps the kernel as autodiff writes it, H W out in, and takes a slow convolution, more than 1.5 times
# the time. A tangent that is written as H W out in has a gradient in the usual order, fast in both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cd "$folder" && JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

STEPS = 10
print(f"jax {jax.__version__}")
random = np.random.default_rng(0)
images = random.normal(size=(4, 32, 32, 64)).astype(np.float32)
kernel = jnp.asarray(random.normal(size=(3, 3, 64, 64)).astype(np.float32) / 24)


def convolve(x, kernel, axes):
    axes = ("NHWC", axes, "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)


def usual(x):
    return convolve(x, kernel, "HWIO")


@jax.custom_jvp
def turned(x):
    return usual(x)


@turned.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return usual(x), convolve(dx, kernel.swapaxes(2, 3), "HWOI")


def steps(convolution):
    gradient = jax.grad(lambda x: jnp.square(jnp.tanh(convolution(x))).sum())
    once = jax.jit(lambda x: x + 0.01 * gradient(x))
    loop = jax.jit(lambda x: lax.fori_loop(0, STEPS, lambda _, x: x + 0.01 * gradient(x), x))
    return once, loop


def seconds(run):
    times = []
    for _ in range(7):
        start = time.process_time()
        jax.block_until_ready(run())
        times.append(time.process_time() - start)
    return float(np.median(times))


def calls(once):
    x = images
    for _ in range(STEPS):
        x = once(x)
    return x


found = {}
for name, convolution in (("autodiff's gradient", usual), ("that of a turned tangent", turned)):
    once, loop = steps(convolution)
    np.testing.assert_allclose(calls(once), loop(images), rtol=1e-3, atol=1e-3)
    text = loop.lower(images).compile().as_text()
    kept = "01oi->" in text
    found[name] = (kept, seconds(lambda: loop(images)) / seconds(lambda: calls(once)))
    print(f"{name}: kernel stays H W out in: {kept}; a loop takes {found[name][1]:.2f} of the single steps")
(kept, slow), (turned_kept, even) = found.values()
as_seen = kept and not turned_kept and slow > 1.3 and even < 1.3
print("as seen in November 2026" if as_seen else "CHANGED")
sys.exit(not as_seen)
PYTHON
