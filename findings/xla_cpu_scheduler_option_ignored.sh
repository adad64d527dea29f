#!/usr/bin/env bash
# XLA's order of operations on a CPU can be chosen for one program or for all of a process. The switch
# xla_cpu_enable_concurrency_optimized_scheduler is heeded in XLA_FLAGS; as an option of one program
# (compiler_options of jax.jit) it is accepted and changes nothing. xla_cpu_scheduler_type works there.
# Who measures with the first believes that the order makes no difference.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$folder/check.py" <<'PYTHON'
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp


def ten_wide_products(x, kernel):  # independent of one another: all could start at once
    return sum((jnp.sin(x + shift) @ kernel).sum() for shift in range(10))


def megabytes(**options):
    program = jax.jit(ten_wide_products, compiler_options=options or None)
    compiled = program.lower(jnp.ones((1000, 1000)), jnp.ones((1000, 8))).compile()
    return round(compiled.memory_analysis().temp_size_in_bytes / 1e6)


switch = "xla_cpu_enable_concurrency_optimized_scheduler"
found = {
    "as it is": megabytes(),
    f"{switch}=True of the program": megabytes(**{switch: True}),
    f"{switch}=False of the program": megabytes(**{switch: False}),
    "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED": megabytes(
        xla_cpu_scheduler_type="CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    ),
}
print(f"{sys.argv[1]} (jax {version('jax')}), megabytes of temporaries:")
for name, size in found.items():
    print(f"  {size:4} {name}")
usual, on, off, least = found.values()
if sys.argv[1] == "no flags":
    raise SystemExit(not (usual == on == off >= 2 * least))
raise SystemExit(not (usual <= 1.1 * least))
PYTHON
as_seen=yes
"$folder/venv/bin/python" "$folder/check.py" "no flags" || as_seen=no
XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false \
    "$folder/venv/bin/python" "$folder/check.py" "XLA_FLAGS with =false" || as_seen=no
if [ $as_seen = yes ]; then echo "as seen in November 2026"; else echo CHANGED; exit 1; fi
