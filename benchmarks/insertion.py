"""Insertion AUC of integrated gradients by baseline, beside random order and a greedy one.

    python -m benchmarks.insertion                    # fine-tunes the embedded ViT first
    python -m benchmarks.insertion --run=runs/mine    # a run's own evaluation images

Insertion is that of the RISE paper (Petsiuk et al. 2018): the probability of the class that the
model finds, from the blurred image to the whole, the most relevant patches first; patches, since a
ViT sees whole ones. "over random" is the area less that of patches in random order, "of the whole"
the same with each image's curve divided by the probability that its whole image has, as the softmax
information curve has it (Kapishnikov et al. 2019, arXiv:1906.02825). An order whose curve never
rises above the whole image's probability reaches at most the row "whole image at once". The greedy
order chooses the patch that raises the probability most, by trying all of them at each step: no
method that looks at the whole image once knows as much. "deletion", the lower the better, is the
area while the most relevant patches go and leave the mean color.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import vision_jax
from vision_jax import train
from vision_jax.attacks.examples import keys_of
from vision_jax.config import load_config
from vision_jax.data.sources import subset
from vision_jax.explain import measures
from vision_jax.explain.explainer import BASELINES
from vision_jax.explain.forward import Forward, class_targets
from vision_jax.explain.gradients import noise_of
from vision_jax.explain.methods import make_explain, total
from vision_jax.logging import print_table
from vision_jax.tasks.api import find_task
from vision_jax.tasks.images import read_views

CONFIG = "configs/vit_lora.py"
FULL = {"total_steps": "400", "recipes": "()", "trainable": ".*", "optim.lr": "3e-4"}


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a finished run of a ViT")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--greedy", type=int, default=8, help="images of the greedy order")
    parser.add_argument("--nodes", type=int, default=50, help="of the integral")
    flags, others = parser.parse_known_args()
    if flags.run:
        measure(flags.run, flags.images, flags.greedy, flags.nodes)
        return 0
    given = dict(one.removeprefix("--config.").split("=", 1) for one in others)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(CONFIG, FULL | given)
        train.run(config, Path(folder))
        measure(Path(folder), flags.images, flags.greedy, flags.nodes)
    return 0


def measure(run: Path, count: int, few: int, nodes: int) -> None:
    """Prints the table of a run, over images of its evaluation data."""
    loaded = vision_jax.load(run)
    config = load_config(str(run / "config.json"), {})
    source = find_task(config.task).read_eval_source(config, loaded.class_names)
    source = subset(source, min(count, len(source)), 0)
    views = read_views(source, np.arange(len(source)), loaded.preprocessing)
    images = jnp.asarray(views, jnp.float32) / 255
    forward, variables = Forward(loaded.model), loaded.variables

    logits = jax.jit(lambda v, x: forward(v, x)[0]["logits"])(variables, images)
    labels = logits.argmax(-1).astype(jnp.int32)
    targets = class_targets(labels)
    whole = np.asarray(targets.probability({"logits": logits}))
    keys = keys_of(jax.random.key(0), jnp.arange(len(images)))
    mean = jnp.asarray(loaded.model.mean, jnp.float32).reshape(1, 1, 1, -1)

    @jax.jit
    def insert(variables, images, probability, maps, keys):
        order = measures.ranks(measures.to_patches(maps, forward.grid), keys)
        given = (forward, variables, images, probability, order, measures.blurred(images))
        return measures.area(measures.insertion(*given))

    @jax.jit
    def delete(variables, images, probability, maps, keys):
        order = measures.ranks(measures.to_patches(maps, forward.grid), keys)
        given = (forward, variables, images, probability, order, mean)
        return measures.area(measures.deletion(*given))

    def area(maps: jax.Array) -> np.ndarray:
        return np.asarray(insert(variables, images, targets.probability, maps, keys))

    def deletion(maps: jax.Array) -> str:
        areas = delete(variables, images, targets.probability, maps, keys)
        return f"{float(areas.mean()):.3f}"

    noise = noise_of(keys, 0, images)[..., 0]
    random = area(noise)
    rows = [[*_row("patches in random order", random, random, whole), deletion(noise)]]
    for name, baseline in BASELINES.items():
        explain = make_explain(
            forward,
            "integrated_gradients",
            baseline_of=lambda x, baseline=baseline: baseline(mean, x),
            nodes=nodes,
        )
        maps = total(explain(variables, images, targets.score, keys))
        found = area(maps)
        row = _row(f"integrated gradients, {name}", found, random, whole)
        rows.append([*row, deletion(maps)])
    rows.append([*_row("whole image at once", whole, random, whole), ""])
    if few:
        greedy = make_greedy(forward)
        orders = [greedy(variables, images[i], labels[i]) for i in range(min(few, len(images)))]
        maps = jnp.concatenate([jnp.stack(orders), jnp.zeros_like(images[len(orders) :, ..., 0])])
        chosen = slice(len(orders))
        for order, areas in (("greedy", area(maps)), (f"integrated gradients, {name}", found)):
            given = (areas[chosen], random[chosen], whole[chosen])
            rows.append([*_row(f"{order}, the first {len(orders)} images", *given), ""])
    print(f"{run}: {len(images)} images, top-1 {float((labels == source.labels).mean()):.3f}")
    print_table("Insertion", ["order", "area", "over random", "of the whole", "deletion"], rows)


def _row(name: str, area: np.ndarray, random: np.ndarray, whole: np.ndarray) -> list[str]:
    over = area - random
    error = over.std() / len(over) ** 0.5
    return [name, f"{area.mean():.3f}", f"{over.mean():.3f} ± {error:.3f}",
            f"{(over / whole).mean():.3f}"]  # fmt: skip


def make_greedy(forward: Forward) -> Callable[..., jax.Array]:
    """A function (variables, image f[H, W, C], label i32[]) -> map f[H, W], best patch first."""
    rows, columns = forward.grid or (8, 8)

    @jax.jit
    def order(variables, image, label):
        height, width = image.shape[:2]
        row, column = jnp.arange(height) * rows // height, jnp.arange(width) * columns // width
        cell = row[:, None] * columns + column[None]  # [H, W]
        empty = measures.blurred(image[None])[0]
        tried = jnp.eye(rows * columns, dtype=bool)  # [P, P]

        def body(step, state):
            inside, maps = state
            seen = (tried | inside[None])[:, cell]  # [P, H, W]
            logits = forward(variables, jnp.where(seen[..., None], image[None], empty[None]))[0]
            chances = jax.nn.softmax(logits["logits"])[:, label]
            best = jnp.where(inside, -1, chances).argmax()
            return inside.at[best].set(True), maps.at[best].set(-step)

        start = (jnp.zeros(rows * columns, bool), jnp.zeros(rows * columns))
        return jax.lax.fori_loop(0, rows * columns, body, start)[1][cell]

    return order


if __name__ == "__main__":
    raise SystemExit(main())
