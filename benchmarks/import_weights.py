"""Importing a ViT-L file: time and peak memory beside safetensors.torch.load_file, in one run.

    python -m benchmarks.import_weights [--layout=timm|transformers] [--repeats=5] [--depth=24]

Writes a random ViT-L/16 (1.2 GB of float32) in timm's layout, or in transformers', whose queries,
keys and values have to be joined. Then, in turns, each in a process of its own, file in the page
cache:

    load_file            safetensors.torch.load_file, which maps the file and reads nothing yet
    load_file, read      ... and the sum over every tensor, so that each value has been read
    import               read_weights + recognize + import_weights: numpy arrays by path, which
                         are views into the mapped file where nothing has to be joined
    import, read         ... and the sum over every parameter
    load_file, copied    load_file and a copy of every tensor in memory of its own
    import, placed       import with `place=` that makes each a JAX array of its own, in our layout

The shapes that the parameters must have (the model's `eval_shape`) are a training's anyway and are
made before the clock starts, as are all imports of modules. Peak memory is the most that the
process has held above what it held before, by the kernel's count (VmHWM), in file sizes: mapped
pages that are in memory are in it. Each figure is the best of the repeats, since other programs
may take time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CASES = (
    "load_file",
    "import",
    "load_file, read",
    "import, read",
    "load_file, copied",
    "import, placed",
)
PAIRS = (("import", "load_file"), ("import, read", "load_file, read"))
PAIRS += (("import, placed", "load_file, copied"),)
WIDTH, MLP, PATCH, SIZE, CLASSES = 1024, 4096, 16, 224, 1000


def write_model(path: Path, layout: str, depth: int) -> None:
    """A random ViT-L/16 as the library names it."""
    from vision_jax.convert import export_weights, write_safetensors
    from vision_jax.models.families import FAMILIES

    arguments = {**FAMILIES["vit"].defaults, **vit(depth)}
    if layout == "transformers":
        arguments["layer_norm_eps"] = 1e-12
    rng = np.random.default_rng(0)
    params = {
        name: rng.standard_normal(leaf.shape, np.float32)
        for name, leaf in shapes("vit", arguments).items()
    }
    write_safetensors(path, *export_weights(params, "vit", arguments, to=layout))


def vit(depth: int) -> dict[str, Any]:
    return {
        "width": WIDTH,
        "depth": depth,
        "num_heads": 16,
        "mlp_width": MLP,
        "patch_size": PATCH,
        "image_size": (SIZE, SIZE),
        "num_classes": CLASSES,
    }


def shapes(family: str, arguments: dict[str, Any]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from vision_jax.models.families import build_model
    from vision_jax.trees import paths

    model = build_model(family, **arguments)
    images = (1, SIZE, SIZE, 3)
    trees = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(images)))
    return {path: leaf for tree in trees.values() for path, leaf in paths.flatten(tree).items()}


def peak() -> int:
    """Most bytes that this process has held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def held() -> int:
    """Bytes that this process holds."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def make_case(case: str, path: Path) -> Callable[[], Any]:
    """What is timed; everything before it is made here."""
    if case.startswith("load_file"):
        import torch
        from safetensors.torch import load_file

        torch.zeros(1).sum()

        def load():
            tensors = load_file(path)
            if case.endswith("read"):
                return [tensor.sum() for tensor in tensors.values()], tensors
            if case.endswith("copied"):
                return {name: tensor.clone() for name, tensor in tensors.items()}
            return tensors

        return load

    import jax
    import jax.numpy as jnp

    from vision_jax.convert import import_weights, read_weights, recognize

    family, arguments = recognize(read_weights(str(path)))
    target = shapes(family, arguments)
    jnp.zeros(1).block_until_ready()

    def on_device(path: str, array: np.ndarray) -> jax.Array:
        return jax.device_put(array).block_until_ready()

    def run():
        weights = read_weights(str(path))
        _, own = recognize(weights)
        if case.endswith("placed"):
            return import_weights(weights, target, own, place=on_device)
        params = import_weights(weights, target, own)
        if case.endswith("read"):
            return [array.sum() for array in params.values()], params
        return jax.tree.leaves(params)

    return run


def child(case: str, path: Path) -> None:
    run = make_case(case, path)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = held()
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": peak() - before}))
    del result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", choices=("timm", "transformers"), default="timm")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        child(flags.child[0], Path(flags.child[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_model(path, flags.layout, flags.depth)
        size = path.stat().st_size
        print(f"{size / 1e9:.2f} GB in {flags.layout}'s layout, best of {flags.repeats}")
        best: dict[str, dict[str, float]] = {}
        for _ in range(flags.repeats):
            for case in CASES:
                command = [sys.executable, "-m", "benchmarks.import_weights"]
                command += ["--child", case, str(path)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout)
                known = best.setdefault(case, found)
                best[case] = {name: min(known[name], found[name]) for name in found}
    for case in CASES:
        figures = best[case]
        print(f"{case:18} {figures['seconds']:8.3f} s  {figures['bytes'] / size:5.2f} x the file")
    for ours, theirs in PAIRS:
        ratio = best[ours]["seconds"] / best[theirs]["seconds"]
        print(f"{ours} / {theirs}: {ratio:.2f} x the time")


if __name__ == "__main__":
    main()
