"""What matching costs: sequential steps and time beside optax's Hungarian algorithm.

    python -m benchmarks.matching

96 problems (6 layers of 16 images) with 100 queries and 100 padded targets, of which few are real,
as COCO has them: 7.3 boxes an image on average. optax solves the padded problem, as a fixed shape
leaves it no choice: zeros on the padded rows. Every assignment is checked against scipy's.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import linear_sum_assignment

from vision_jax.ops import matching


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


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=96)
    parser.add_argument("--targets", type=int, default=100)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--mean", type=float, default=7.3, help="real targets an image")
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


if __name__ == "__main__":
    main()
