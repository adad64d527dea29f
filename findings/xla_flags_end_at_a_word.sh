#!/usr/bin/env bash
# XLA_FLAGS with a word that has no dashes, as the widely copied pair for one thread
# "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" has: what stands after the word is
# left out without a word said, while a flag that XLA doesn't know ends the process. Four devices that are
# asked for behind that pair are one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$folder/check.py" <<'PYTHON'
import os
import subprocess
import sys
from importlib.metadata import version

print(f"jax {version('jax')}, jaxlib {version('jaxlib')}")
COUNT, DASHED = "--xla_force_host_platform_device_count=4", "--xla_cpu_multi_thread_eigen=false"
WORD = "intra_op_parallelism_threads=1"
found = {}
for flags in (f"{DASHED} {COUNT}", f"{COUNT} {DASHED} {WORD}", f"{DASHED} {WORD} {COUNT}"):
    done = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.device_count())"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    found[flags] = int(done.stdout)
    said = [line for line in done.stderr.splitlines() if WORD.split("=")[0] in line]
    print(f"{flags}: {found[flags]} devices, {len(said)} lines said of the word")
    found[flags] = (found[flags], len(said))
as_seen = list(found.values()) == [(4, 0), (4, 0), (1, 0)]
print("as seen in December 2026" if as_seen else "CHANGED")
sys.exit(not as_seen)
PYTHON
cd "$folder"
"$folder/venv/bin/python" "$folder/check.py"
