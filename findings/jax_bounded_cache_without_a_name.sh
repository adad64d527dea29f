#!/usr/bin/env bash
# A user id without an entry in /etc/passwd, as `runAsUser` gives a container: JAX's persistent
# compilation cache keeps programs, but as soon as jax_compilation_cache_max_size bounds it, it warns of
# each program after the first and keeps none of them, since it looks up the name of the owner of each file there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 755 "$folder"
python3 -m venv --copies "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 etils==1.15.0 filelock==4.3.1
mkdir -m 777 "$folder/home"
cat > "$folder/check.py" <<'PYTHON'
import os
import pwd
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

if os.getuid() == 0:
    os.setgroups([])
    os.setgid(54321)
    os.setuid(54321)
try:
    print("this user has a name:", pwd.getpwuid(os.getuid()).pw_name, "- run this as root")
    sys.exit(2)
except KeyError:
    print(f"jax {version('jax')}, etils {version('etils')}, user {os.getuid()} without a name")

import jax
import jax.numpy as jnp

home = Path(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
as_seen = True
for name, most in (("without a bound", -1), ("of at most 100 MB", 10**8)):
    cache = home / name.replace(" ", "_")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_compilation_cache_max_size", most)
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()
    kept = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for size in (3, 4, 5):
            jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((size, size)))
            kept = sorted(cache.glob("jit__lambda*-cache"))
    warned = [str(one.message) for one in said if "getpwuid" in str(one.message)]
    print(f"a cache {name}: {len(kept)} of 3 programs kept, {len(warned)} warnings", *warned[:1])
    as_seen &= (len(kept) == 3 and not warned) if most == -1 else (len(kept) <= 1 and bool(warned))
print("as seen in December 2026" if as_seen else "CHANGED")
sys.exit(not as_seen)
PYTHON
cd "$folder/home"
HOME="$folder/home" "$folder/venv/bin/python" "$folder/check.py" "$folder/home"
