"""What matching costs: sequential steps and time beside optax's Hungarian algorithm.

    python -m benchmarks.matching
    python -m benchmarks.matching --step  # and what share of a training step the whole loss takes

96 problems (6 layers of 16 images) with 100 queries and 100 padded targets, of which few are real,
as COCO has them: 7.3 boxes an image on average. optax solves the padded problem, as a fixed shape
leaves it no choice: zeros on the padded rows. Every assignment is checked against scipy's.

The share of a step is taken where it is largest: small models at their random start, whose queries
all say the same, so that targets compete for them.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import linear_sum_assignment

from vision_jax.models.detr import Detr
from vision_jax.ops import matching
from vision_jax.ops.detection_losses import detr_loss


def make_problems(rng, problems: int, targets: int, queries: int, mean: float):
    """Costs as an untrained and as a trained detector give them, and the mask of real targets."""
    real = np.clip(rng.geometric(1 / mean, problems), 1, targets)
    mask = np.arange(targets) < real[:, None]
    untrained = rng.normal(size=(problems, 1, queries)) + 0.1 * rng.normal(
        size=(problems, targets, queries)
    )
    trained = rng.uniform(2, 9, (problems, targets, queries))
    trained[:, np.arange(targets), rng.permutation(queries)[:targets]] = -2
    random = rng.normal(size=(problems, targets, queries))
    costs = {"random": random, "all want the same queries": untrained, "trained": trained}
    return {name: cost.astype(np.float32) for name, cost in costs.items()}, mask


def seconds(function, *arguments) -> float:
    """The best of five runs, compiled before."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(5):
        start = time.process_time()
        jax.block_until_ready(function(*arguments))
        times.append(time.process_time() - start)
    return min(times)


def worst_error(cost, mask, query) -> float:
    """How much more than scipy's total cost the worst matching costs."""
    errors = [0.0]
    for c, m, q in zip(cost.astype(np.float64), mask, np.asarray(query), strict=True):
        real = c[m]
        best = real[linear_sum_assignment(real)].sum()
        errors.append(real[np.arange(len(real)), q[m]].sum() - best)
    return max(errors)


STEPS = {
    "ResNet-18 DETR, 2 images of 480x640, 100 queries, 100 targets": (
        {"depths": (2, 2, 2, 2), "block": "basic"},
        (2, 480, 640),
        100,
    ),
    "tiny DETR, 16 images of 128x128, 30 queries, 12 targets": (
        {
            "depths": (1, 1, 1, 1), "block": "basic", "widths": (16, 32, 64, 128), "stem_width": 16,
            "num_queries": 30, "width": 64, "num_heads": 4, "mlp_width": 128,
            "encoder_depth": 2, "decoder_depth": 2,
        },
        (16, 128, 128),
        12,
    ),
}  # fmt: skip


def print_share(name: str, rng) -> None:
    """CPU seconds of forward, backward and loss, and of the loss and its gradient alone."""
    arguments, shape, targets = STEPS[name]
    model = Detr(num_classes=80, freeze_norm=True, **arguments)
    images = rng.random((*shape, 3), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    corners = np.sort(rng.random((shape[0], targets, 2, 2), np.float32), axis=2)
    boxes = np.concatenate([corners.mean(2), corners[:, :, 1] - corners[:, :, 0]], axis=-1)
    real = np.clip(rng.geometric(1 / min(7.3, targets / 2), shape[0]), 1, targets)
    label = rng.integers(0, 80, (shape[0], targets)).astype(np.int32)
    mask = np.arange(targets) < real[:, None]

    def loss_of(outputs):
        everything = np.ones(shape[0], bool)
        predictions = outputs["logits"], outputs["boxes_cxcywh_01"]
        return detr_loss(*predictions, label, boxes, mask, everything)[0].mean()

    def loss_fn(params, images):
        return loss_of(model.apply({**variables, "params": params}, images))

    outputs = jax.jit(model.apply)(variables, images)
    step = seconds(jax.jit(jax.value_and_grad(loss_fn)), variables["params"], images)
    alone = seconds(jax.jit(jax.value_and_grad(loss_of)), outputs)
    print(f"{name}: loss {alone:.4f} s of a step of {step:.3f} s, {alone / step:.1%}", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=96)
    parser.add_argument("--targets", type=int, default=100)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--mean", type=float, default=7.3, help="real targets an image")
    parser.add_argument("--step", action="store_true")
    flags = parser.parse_args()
    rng = np.random.default_rng(0)
    costs, mask = make_problems(rng, flags.problems, flags.targets, flags.queries, flags.mean)
    solve = jax.jit(jax.vmap(matching.solve))
    hungarian = jax.jit(jax.vmap(optax.assignment.hungarian_algorithm))
    print(
        f"{flags.problems} problems, {flags.queries} queries, {flags.targets} targets of which"
        f" {mask.sum(1).mean():.1f} real (at most {mask.sum(1).max()}); CPU-s a batch"
    )
    for name, cost in costs.items():
        query, steps = solve(cost, mask)
        ours = seconds(solve, cost, mask)
        padded = np.where(mask[..., None], cost, 0)
        rows, columns = hungarian(padded)
        theirs = seconds(hungarian, padded)
        peer = np.empty_like(np.asarray(columns))
        np.put_along_axis(peer, np.asarray(rows), np.asarray(columns), axis=1)
        errors = worst_error(cost, mask, query), worst_error(cost, mask, peer)
        print(
            f"{name:26}{int(jnp.max(steps)):5} steps {ours:.4f} s, optax {theirs:.4f} s:"
            f" {theirs / ours:.0f}x; above scipy's cost: {errors[0]}, {errors[1]}"
        )
    if flags.step:
        for name in STEPS:
            print_share(name, rng)


if __name__ == "__main__":
    main()
