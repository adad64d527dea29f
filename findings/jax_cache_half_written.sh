#!/usr/bin/env bash
# JAX's persistent compilation cache after a process died while it wrote a program into it, which a
# disk that was full for a moment leaves too: the part stays. Each later run reads it, warns, compiles
# anew and doesn't replace it. With a bound on the cache's size, a program whose time of use was not
# noted yet keeps every other program from being written, until something reads that one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 filelock==4.3.1
cat > "$folder/compile.py" <<'PYTHON'
import sys
import warnings

import jax
import numpy as np

folder, bound, add = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
jax.config.update("jax_compilation_cache_dir", folder)
jax.config.update("jax_compilation_cache_max_size", bound)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    jax.jit(lambda x: x @ x + add)(np.ones((3, 3), np.float32))
print(" ".join(sorted({str(w.message).split(" persistent")[0] for w in seen})) or "no warning")
PYTHON
cat > "$folder/check.py" <<'PYTHON'
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

print(f"jax {version('jax')}")
base = Path(sys.argv[1])


def compile(folder, bound, add):
    command = [sys.executable, str(base / "compile.py"), str(folder), str(bound), str(add)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


found = {}
plain = base / "unbounded"
compile(plain, -1, 1.0)
(program,) = plain.glob("*-cache")
part = program.read_bytes()[:200]
program.write_bytes(part)
found["half a program, first run"] = compile(plain, -1, 1.0)
found["half a program, second run"] = compile(plain, -1, 1.0)
found["it is replaced"] = program.read_bytes() != part

bounded = base / "bounded"
compile(bounded, 10**9, 1.0)
(program,) = bounded.glob("*-cache")
program.with_name(program.name.removesuffix("-cache") + "-atime").unlink()
found["another program beside one without its time"] = compile(bounded, 10**9, 2.0)
found["programs then"] = len(list(bounded.glob("*-cache")))
for what, seen in found.items():
    print(f"{what}: {seen}")
as_seen = list(found.values()) == [
    "Error reading", "Error reading", False, "Error writing", 1,
]  # fmt: skip
print("as seen in November 2026" if as_seen else "CHANGED")
sys.exit(not as_seen)
PYTHON
cd "$folder" && "$folder/venv/bin/python" check.py "$folder"
