"""Exact assignment of targets to queries, on the device and batched.

Shortest augmenting paths with the targets on the rows (Jonker & Volgenant 1987; Crouse 2016, which
scipy.optimize.linear_sum_assignment implements too). What makes it cheap in a training step: padded
targets are never visited, targets that want different queries are all matched at once before the
first sequential step, and searches and path reversals of all problems of a batch run in one flat
loop, so that the batch waits for its longest problem and not for the longest search of each round.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vision_jax.errors import UserError

Array = jax.Array


def match(cost: Array, target_mask: Array) -> Array:
    """The query of each target, at the least total cost over the real targets.

    Costs that are not finite are avoided: they count as more than all others of their problem
    together. Ties are broken somehow. No gradient flows through it.

    Examples:
      >>> cost = jnp.array([[1.0, 2.0, 9.0], [1.0, 5.0, 9.0], [0.0, 0.0, 0.0]])
      >>> match(cost, jnp.array([True, True, False])).tolist()
      [1, 0, 3]

    Args:
      cost: f[..., T, Q], of targets on the rows and queries on the columns; T may be padded.
      target_mask: bool[..., T], which targets are real, anywhere among the T.

    Returns:
      i32[..., T]: distinct queries of the real targets; Q, one past the last, for the padded ones,
      so that a scatter with mode "drop" passes over them.

    Raises:
      UserError: T is larger than Q.
    """
    targets, queries = cost.shape[-2:]
    if targets > queries:
        raise UserError(
            f"an image may have {targets} boxes but the model only {queries} queries to find them:"
            " pad the targets to fewer, or give the model more queries"
        )
    solver = solve
    for _ in cost.shape[:-2]:  # not one flat axis: a sharded batch axis stays an axis
        solver = jax.vmap(solver)
    return solver(lax.stop_gradient(cost), target_mask)[0]


class _State(NamedTuple):
    """Between two steps. A target is free if it is real and has no query."""

    steps: Array  # i32[], taken so far
    query: Array  # i32[T], of each target; Q if it has none
    target: Array  # i32[Q], of each query; T if it has none
    price: Array  # f[Q], dual variables, at most 0; cost - price is tight on matched pairs
    distance: Array  # f[Q], length of the shortest path found from the free target to each query
    previous: Array  # i32[Q], the target before the query on that path
    reached: Array  # bool[Q], whose shortest path is final
    last: Array  # i32[], the query reached last; Q before the first
    reversing: Array  # bool[], a free query is found and the path to it is being reversed


def solve(cost: Array, target_mask: Array) -> tuple[Array, Array]:
    """One problem, f[T, Q] and bool[T]: the query of each target, and the sequential steps taken.

    A step extends a search by one query or reverses one edge of a path. The k-th search can take no
    more than k of each, which bounds the loop by T · (T + 1) whatever the costs.
    """
    targets, queries = cost.shape
    if not targets:
        return jnp.zeros(0, jnp.int32), jnp.int32(0)
    rows = jnp.arange(targets, dtype=jnp.int32)
    cost = _finite(cost, target_mask)

    # Each target takes its cheapest query unless an earlier one wants it too: the prices stay 0.
    query = jnp.argmin(cost, axis=-1).astype(jnp.int32)  # [T]
    target = jnp.full(queries, targets, jnp.int32)
    target = target.at[query].min(jnp.where(target_mask, rows, targets))  # [Q]
    query = jnp.where(target_mask & (target[query] == rows), query, queries)

    def is_free(query: Array) -> Array:
        return target_mask & (query == queries)

    def search(state: _State) -> _State:
        """Reaches the next query; the path to it goes through the one reached last."""
        first = state.last == queries
        free = jnp.argmax(is_free(state.query)).astype(jnp.int32)
        row = jnp.where(first, free, state.target[state.last])
        reduced = cost[row] - state.price
        start = jnp.where(first, 0, state.distance[state.last] - reduced[state.last])
        distance = start + reduced
        shorter = ~state.reached & (distance < state.distance)
        distance = jnp.where(shorter, distance, state.distance)
        previous = jnp.where(shorter, row, state.previous)
        last = jnp.argmin(jnp.where(state.reached, jnp.inf, distance)).astype(jnp.int32)
        found = state.target[last] == targets
        falls = jnp.where(found & state.reached, distance[last] - distance, 0)
        return state._replace(
            price=state.price - falls,
            distance=distance,
            previous=previous,
            reached=state.reached.at[last].set(True),
            last=last,
            reversing=found,
        )

    def reverse(state: _State) -> _State:
        """Gives the query to the target before it, which leaves its own; at the start it had none.

        `last` is then Q and everything is ready for the next search.
        """
        row = state.previous[state.last]
        left = state.query[row]
        done = left == queries
        return state._replace(
            query=state.query.at[row].set(state.last),
            target=state.target.at[state.last].set(row),
            distance=jnp.where(done, jnp.inf, state.distance),
            reached=~done & state.reached,
            last=left,
            reversing=~done,
        )

    def step(state: _State) -> _State:
        state = lax.cond(state.reversing, reverse, search, state)
        return state._replace(steps=state.steps + 1)

    def unfinished(state: _State) -> Array:
        bounded = state.steps < targets * (targets + 1)
        return bounded & (state.reversing | is_free(state.query).any())

    state = lax.while_loop(
        unfinished,
        step,
        _State(
            steps=jnp.int32(0),
            query=query,
            target=target,
            price=jnp.zeros(queries, cost.dtype),
            distance=jnp.full(queries, jnp.inf, cost.dtype),
            previous=jnp.zeros(queries, jnp.int32),
            reached=jnp.zeros(queries, bool),
            last=jnp.int32(queries),
            reversing=jnp.bool_(False),
        ),
    )
    return state.query, state.steps


def _finite(cost: Array, target_mask: Array) -> Array:
    """f[T, Q] at least f32, where what is not finite exceeds all that a matching can cost."""
    cost = cost.astype(np.promote_types(cost.dtype, np.float32))
    limit = float(jnp.finfo(cost.dtype).max) ** 0.5  # sums of such costs stay finite
    valid = jnp.isfinite(cost) & target_mask[:, None]
    cost = jnp.where(valid, jnp.clip(cost, -limit, limit), 0)
    low, high = cost.min(), cost.max()
    return jnp.where(valid, cost, high + (len(cost) + 1) * (high - low + 1))
