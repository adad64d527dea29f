"""Ranks for a model's kernels out of one budget: what is left out where it is missed least.

    find_layers(model, ...)       each kernel's cost, and what each rank of it leaves out
    weigh(run, ...)               what that does to the model's outputs, on a run's own images
    choose_ranks(layers, saved)   the rank of each kernel that is factored
    factor(params, ranks, ...)    the tree with these factors

The error of a layer by rank is convex, so the budget is spent greedily: always the step that adds
the least error for what it saves. A kernel starts whole, and its first step leads to a rank from
which two factors are cheaper than it.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax import platform
from vision_jax.config.fields import HEADS
from vision_jax.models import families
from vision_jax.run.calibrate import Batch, make_error, through_task
from vision_jax.run.prepare import Run
from vision_jax.trees import paths
from vision_jax.trees.factored import is_smaller, to_factored
from vision_jax.trees.leaf import leaves, map_leaves
from vision_jax.trees.products import Product
from vision_jax.trees.watched import watch

Array = jax.Array

TRIED = 0.1  # of a layer's outputs, in length: what is left out to see what that does


def count_rows(
    model: Any,
    variables: Mapping[str, Any],
    image_size: tuple[int, int],
    chosen: Collection[str],
) -> dict[str, int]:
    """How many rows each of the chosen kernels multiplies for one image; nothing is computed.

    Kernels of convolutions in groups are left out, and those that nothing multiplies.

    Args:
      model: of any family.
      variables: its collections, of plain kernels.
      image_size: (height, width) in pixels.
      chosen: paths of kernels.
    """
    rows: dict[str, int] = {}

    def note(path: str, product: Product, x: Array, kernel: Array, y: Array) -> None:
        del product
        if x.shape[-1] == kernel.shape[-2]:  # not in groups
            rows[path] = rows.get(path, 0) + y.size // y.shape[-1]

    def call(variables: Mapping[str, Any], images: jax.Array) -> Any:
        watched = {**variables, "params": watch(variables["params"], chosen, note)}
        return families.unrolled(model).apply(watched, images)

    images = jax.ShapeDtypeStruct((1, *image_size, model.in_channels), jnp.float32)
    with platform.traced_for(platform.ANY):
        jax.eval_shape(call, dict(variables), images)
    return rows


def output_moments(
    run: Run, params: Any, model_state: Any, batches: Sequence[Batch], chosen: Collection[str]
) -> dict[str, np.ndarray]:
    """f64[out, out] of each chosen kernel: (xW)ᵀxW over all rows of the batches.

    Args:
      run: prepared.
      params: of its model, plain.
      model_state: BatchNorm's statistics.
      batches: of `calibrate.read_batches`.
      chosen: paths of kernels.
    """
    model = families.unrolled(run.model)

    def call(params: Any, model_state: Any, *inputs: Any) -> tuple[Any, dict[str, jax.Array]]:
        found: dict[str, jax.Array] = {}

        def note(path: str, product: Product, x: Array, kernel: Array, y: Array) -> None:
            del product, x, kernel
            rows = y.reshape(-1, y.shape[-1]).astype(jnp.float32)
            found[path] = found.get(path, 0) + jnp.matmul(rows.T, rows, precision="highest")

        variables = {"params": watch(params, chosen, note)}
        variables |= {"batch_stats": model_state} if model_state else {}
        return families.as_outputs(model.apply(variables, *inputs)), found

    moments_of = jax.jit(through_task(run, call))
    sums: dict[str, np.ndarray] = {}
    for batch in batches:  # of a ViT-L they are gigabytes: one batch's are held, and their sum
        for path, one in moments_of(params, model_state, batch).items():
            sums.setdefault(path, np.zeros(one.shape, np.float64))
            sums[path] += np.asarray(one)
    return sums


class Spectrum(NamedTuple):
    """What each rank of a kernel [..., in, out] is worth.

    Attributes:
      energy: f64[n], the square that each rank adds, the most first; n is the smaller side of the
        kernel as a matrix.
      basis: f[n, out] in the kernel's dtype, see trees.factored.to_factored.
    """

    energy: np.ndarray
    basis: np.ndarray

    def left_out(self, rank: int) -> float:
        """The share of all that factors of this rank leave out, a square."""
        return float(self.energy[rank:].sum() / max(self.energy.sum(), np.finfo(float).tiny))


def spectrum(kernel: np.ndarray, moment: np.ndarray | None = None) -> Spectrum:
    """The kernel's own singular values squared, or with the moment of its outputs theirs.

    Args:
      kernel: f[..., in, out].
      moment: f64[out, out], (xW)ᵀxW.
    """
    rows = kernel.reshape(-1, kernel.shape[-1]).astype(np.float64)
    if moment is None:
        _, values, basis = np.linalg.svd(rows, full_matrices=False)
        return Spectrum(np.square(values), basis.astype(kernel.dtype))
    values, vectors = np.linalg.eigh(moment)  # ascending
    most = min(rows.shape)
    basis = vectors.T[::-1][:most].astype(kernel.dtype)
    return Spectrum(np.maximum(values[::-1][:most], 0), basis)


@dataclass(frozen=True)
class Layer:
    """A kernel that may be factored.

    Attributes:
      shape: [..., in, out].
      rows: that it multiplies for one image.
      spectrum: of it.
      price: of one number of it: its rows, or 1 where parameters are counted.
      weight: what leaving out all of the spectrum would do, in the unit of the others' errors.
      error_alone: of the model's outputs with this kernel alone factored; None: not measured.
    """

    shape: tuple[int, ...]
    rows: int
    spectrum: Spectrum
    price: int
    weight: float = 1.0
    error_alone: float | None = None

    def cost(self, rank: int) -> int:
        """Of factors of this rank; of rank 0, of the whole kernel."""
        inputs, outputs = int(np.prod(self.shape[:-1])), self.shape[-1]
        return self.price * (rank * (inputs + outputs) if rank else inputs * outputs)

    def ranks(self, multiple: int) -> list[int]:
        """The multiples that make it smaller, the most first."""
        fitting = range(multiple, len(self.spectrum.energy) + 1, multiple)
        return [rank for rank in reversed(fitting) if is_smaller(self.shape, rank)]

    def steps(self, multiple: int) -> list[tuple[float, int, int]]:
        """(error added for each unit saved, rank, units saved) of each step, the cheapest first.

        They are the corners of the lower hull of (saved, error), which begins with (0, 0).
        """
        corners = [(0, 0.0, 0)]  # (saved, error, rank)
        for rank in self.ranks(multiple):
            error = self.weight * self.spectrum.left_out(rank)
            point = (self.cost(0) - self.cost(rank), error, rank)
            while len(corners) > 1 and _slope(corners[-2], point) <= _slope(*corners[-2:]):
                corners.pop()
            corners.append(point)
        return [(_slope(a, b), b[2], b[0] - a[0]) for a, b in itertools.pairwise(corners)]


def _slope(one: tuple[int, float, int], two: tuple[int, float, int]) -> float:
    return (two[1] - one[1]) / (two[0] - one[0])


def choose_ranks(layers: Mapping[str, Layer], saved: float, multiple: int) -> dict[str, int]:
    """The ranks that save so much, with the least error that a greedy choice finds.

    Args:
      layers: by path.
      saved: units of the layers' prices that must go, at least.
      multiple: of all ranks.

    Returns:
      The rank of each kernel that is factored; fewer than `saved` units go if no ranks save more.
    """
    steps = sorted(
        (slope, path, rank, units)
        for path, layer in layers.items()
        for slope, rank, units in layer.steps(multiple)
    )
    chosen: dict[str, int] = {}
    for _, path, rank, units in steps:  # a layer's own are in their order: its hull is convex
        if units >= saved:  # the last step: no longer than it must be
            layer = layers[path]
            most = layer.cost(chosen.get(path, 0)) - saved
            fitting = [rank for rank in layer.ranks(multiple) if layer.cost(rank) <= most]
            chosen[path] = min(fitting, key=lambda rank: (layer.spectrum.left_out(rank), rank))
            break
        chosen[path] = rank
        saved -= units
    return chosen


def factor(params: Any, ranks: Mapping[str, int], layers: Mapping[str, Layer]) -> Any:
    """The tree with the kernels of these paths as factors of these ranks."""

    def change(path: str, leaf: Any) -> Any:
        if path not in ranks:
            return leaf
        made = to_factored(np.asarray(leaf), ranks[path], layers[path].spectrum.basis)
        return jax.tree.map(jnp.asarray, made)

    return map_leaves(change, params)


# A whole model ------------------------------------------------------------------------------------


def find_layers(
    model: Any,
    variables: Mapping[str, Any],
    image_size: tuple[int, int],
    *,
    of_parameters: bool,
    moments_of: Callable[[Collection[str]], dict[str, np.ndarray]] = lambda chosen: {},
) -> dict[str, Layer]:
    """The kernels of a model that may be factored, by path: all but heads and groups.

    Args:
      model: of any family.
      variables: its collections, of plain kernels.
      image_size: (height, width) in pixels.
      of_parameters: parameters are counted, and not products.
      moments_of: paths -> see `output_moments`; without, the kernels themselves are what counts.
    """
    kernels = {
        path: leaf
        for path, leaf in leaves(variables["params"]).items()
        if path.rpartition("/")[2] == "kernel" and leaf.ndim in (2, 4)
    }
    heads = paths.select(kernels, HEADS, field="heads", strict=False)
    rows = count_rows(model, variables, image_size, kernels.keys() - heads)
    moments = moments_of(rows)
    found = {}
    for path in (path for path in kernels if path in rows):
        kernel = np.asarray(kernels[path])
        price = 1 if of_parameters else rows[path]
        known = spectrum(kernel, moments.pop(path, None))  # which is needed no more
        found[path] = Layer(kernel.shape, rows[path], known, price)
    return found


def weigh(
    run: Run,
    params: Any,
    model_state: Any,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    multiple: int,
) -> dict[str, Layer]:
    """The layers with the weight that the model's outputs give each of them.

    A layer's weight is the squared error that it makes there alone, over the share of its spectrum
    that is left out: both at the rank that comes closest to leaving out TRIED of its outputs.

    Args:
      run: prepared.
      params: of its model, plain.
      model_state: BatchNorm's statistics.
      batches: of `calibrate.read_batches`.
      layers: of `find_layers`.
      multiple: of all ranks.
    """
    trial = {
        path: min(known, key=lambda rank: abs(layer.spectrum.left_out(rank) ** 0.5 - TRIED))
        for path, layer in layers.items()
        if (known := layer.ranks(multiple))
    }
    tried = factor(params, trial, layers)
    error = make_error(run, params, tried, model_state, batches)
    found = dict(layers)
    for path, rank in trial.items():
        layer, alone = layers[path], error({path})
        share = max(layer.spectrum.left_out(rank), float(np.finfo(np.float32).eps))
        found[path] = replace(layer, weight=alone**2 / share, error_alone=alone)
    return found
