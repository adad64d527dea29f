#!/usr/bin/env bash
# A softmax subtracts the largest number, so that none overflows. Of numbers that are multiplied, or
# divided by a temperature, before, jax.jit on a CPU rounds the largest and, for few numbers, computes
# the product once more together with the difference, which is rounded once: of the largest number the
# rounding error is left, and not 0. Where that is beyond 88, rows are NaN, and log-sum-exp is infinite;
# operation by operation, and of more rows, they are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$folder/check.py" <<'PYTHON'
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np


def softmax(x, temperature):
    return jax.nn.softmax(x / temperature, axis=-1)


def log_sum_exp(x, temperature):
    return jax.nn.logsumexp(x / temperature, axis=-1, keepdims=True)


def share(function, rows, temperature):
    """Of rows of 16 normal numbers, those whose result is not finite."""
    x = np.random.default_rng(0).normal(size=(rows, 16)).astype(np.float32)
    found = function(jnp.asarray(x), jnp.float32(temperature))
    return f"{float(1 - jnp.isfinite(found).all(-1).mean()):4.0%}"


print(f"jax {version('jax')}, rows that are not finite: operation by operation, and jitted")
for rows, temperature in ((100, 1e-6), (100, 1e-12), (1000, 1e-12)):
    for function in (softmax, log_sum_exp):
        shares = [share(one, rows, temperature) for one in (function, jax.jit(function))]
        print(f"  {rows:4} rows, temperature {temperature:g}, {function.__name__:11}", *shares)
raise SystemExit(share(jax.jit(softmax), 100, 1e-12) == share(softmax, 100, 1e-12))
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
