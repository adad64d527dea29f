"""LowRank: a frozen kernel with a low-rank update, and a gradient that leaves the kernel out.

The layer multiplies by the merged kernel W + s·A·B, one dense product as without adapters.
Backward, dx goes through the merged kernel and the factors get

    dA = s · xᵀ (dy Bᵀ)        dB = s · (x A)ᵀ dy

so the dense gradient xᵀ dy of the frozen W is never formed. (LoRA: Hu et al. 2021,
https://arxiv.org/abs/2106.09685; DoRA: Liu et al. 2024, https://arxiv.org/abs/2402.09353.)

Many adapters of one W side by side (vmap, see search/) that meet one x multiply it by W once, and
by the factors of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from vision_jax.trees import products
from vision_jax.trees.leaf import Kernel, Leaf, merge_leaf, multiply
from vision_jax.trees.products import Product

Array = jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "magnitude"],
    meta_fields=["scale", "parts", "dropout"],
)
@dataclass(frozen=True)
class LowRank(Leaf):
    """A kernel W [..., in, out] with a low-rank update: W + scale · A·B.

    Attributes:
      base: the frozen kernel, [in, out] of a dense layer or [h, w, in, out] of a convolution; it
        may be a structured leaf itself.
      a: [in, r] or [h, w, in, r]; with `parts`, [len(chosen), in, r].
      b: [r, out]; with `parts`, [len(chosen), r, out / total].
      magnitude: None, or DoRA's [out]: the kernel is magnitude · (W + sAB) / ‖W + sAB‖, where the
        norm is taken over each output's inputs and held constant in the gradient, as PEFT does.
      scale: s, usually alpha / r; with `parts` it may be a tuple with one for each.
      parts: None, or (total, chosen): the output columns of a fused kernel split into `total` equal
        parts, of which `chosen` have adapters of their own; (3, (0, 2)) is q and v of a fused qkv.
      dropout: rate on the adapter's input, in training only.
    """

    trains: ClassVar[Mapping[str, bool]] = {"base": False, "a": True, "b": True, "magnitude": True}
    like_kernel: ClassVar[tuple[str, ...]] = ("base",)

    base: Kernel
    a: Array
    b: Array
    magnitude: Array | None = None
    scale: float | tuple[float, ...] = field(default=1.0)
    parts: tuple[int, tuple[int, ...]] | None = None
    dropout: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this leaf stands in for."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the kernel that this leaf stands in for."""
        return self.base.dtype

    @property
    def supports_groups(self) -> bool:
        """A group has inputs of its own, and one A is for all of them."""
        return False

    def merge(self) -> Array:
        """W + s·A·B, with DoRA rescaled to the magnitudes."""
        kernel = _updated(self)
        if self.magnitude is None:
            return kernel
        return _scale_outputs(kernel, self.magnitude / lax.stop_gradient(output_norm(kernel)))

    def multiply(self, product: Product, x: Array, dropout_key: Array | None) -> Array:
        """By the merged kernel; with dropout on the adapter's input alone, on two paths."""
        if dropout_key is None or self.dropout == 0:
            return _low_rank_product(product, x, self)
        # The two paths see different inputs, so the merged kernel cannot serve both. PEFT does the
        # same, with the same keep probability.
        keep = jax.random.bernoulli(dropout_key, 1 - self.dropout, x.shape)
        dropped = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        update = _factored_update(product, dropped, self)
        gain = None
        if self.magnitude is not None:
            gain = self.magnitude / lax.stop_gradient(output_norm(_updated(self)))
        plain = multiply(product, x, lax.stop_gradient(self.base), None) + update
        return plain if gain is None else _scale_outputs(plain, gain)


def low_rank_delta(leaf: LowRank) -> Array:
    """The update s·A·B as a dense array of the kernel's shape."""
    product = leaf.a @ leaf.b  # with parts [P, in, out / total]
    if isinstance(leaf.scale, tuple):
        blocks = jnp.array(leaf.scale, product.dtype)[:, None, None] * product
    else:
        blocks = leaf.scale * product
    if leaf.parts is None:
        return blocks
    total, chosen = leaf.parts
    rows, columns = blocks.shape[1:]
    delta = jnp.zeros((rows, total, columns), blocks.dtype)
    delta = delta.at[:, jnp.array(chosen)].set(blocks.swapaxes(0, 1))  # [in, total, out / total]
    return delta.reshape(rows, total * columns)


def part_scales(leaf: LowRank) -> tuple[float, ...]:
    """The scale of each of the chosen parts; one scale of a leaf without parts."""
    count = 1 if leaf.parts is None else len(leaf.parts[1])
    return leaf.scale if isinstance(leaf.scale, tuple) else (leaf.scale,) * count


def output_norm(kernel: Array) -> Array:
    """Euclidean norm of each output's weights: [..., in, out] -> [out]."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(range(kernel.ndim - 1))))


def _updated(leaf: LowRank) -> Array:
    """W + s·A·B, before DoRA's rescaling."""
    base = merge_leaf(leaf.base)
    return base + low_rank_delta(leaf).astype(base.dtype)


def _scale_outputs(x: Array, gain: Array) -> Array:
    """x[..., out] · gain[out], in x's dtype."""
    return x * gain.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _factored_update(product: Product, x: Array, leaf: LowRank) -> Array:
    """(s · x·A)·B by the skinny products; the merged form is cheaper wherever it applies.

    s stands where the arrays are narrow, in the gradient too.
    """
    dense = products.dense(x)
    scales = part_scales(leaf)
    if leaf.parts is None:
        return dense(scales[0] * product(x, leaf.a), leaf.b)
    total, chosen = leaf.parts
    columns = [jnp.zeros((*x.shape[:-1], leaf.b.shape[-1]), x.dtype)] * total
    for position, (part, scale) in enumerate(zip(chosen, scales, strict=True)):
        columns[part] = dense(scale * product(x, leaf.a[position]), leaf.b[position])
    return jnp.concatenate(columns, axis=-1)  # [..., out]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_rank_product(product: Product, x: Array, leaf: LowRank) -> Array:
    return product(x, leaf.merge())


def _low_rank_forward(product: Product, x: Array, leaf: LowRank) -> tuple[Array, Any]:
    if leaf.magnitude is None:
        return _times_updated(product, x, leaf), (x, leaf, None)
    direction = _times_updated(product, x, leaf)  # kept: the magnitude's gradient needs it
    gain = leaf.magnitude / output_norm(_updated(leaf))
    return _scale_outputs(direction, gain), (x, leaf, direction)


def _times_updated(product: Product, x: Array, leaf: LowRank) -> Array:
    """x by W + s·A·B: by the sum, but where several A and B share W and x, by each alone."""

    def by_sum(x: Array, leaf: LowRank) -> Array:
        return product(x, _updated(leaf))

    batched_times = jax.custom_batching.custom_vmap(by_sum)

    @batched_times.def_vmap
    def times_all(axis_size: int, batched: Any, x: Array, leaf: LowRank) -> tuple[Array, bool]:
        del axis_size
        axes = jax.tree.map(lambda own: 0 if own else None, batched)
        if any(jax.tree.leaves((batched[0], batched[1].base))):
            return jax.vmap(by_sum, in_axes=axes)(x, leaf), True
        update = jax.vmap(partial(_factored_update, product, x), in_axes=(axes[1],))(leaf)
        return multiply(product, x, leaf.base, None)[None] + update, True

    # What is batched so has no derivative of its own: second ones of the layer are the sum's.
    times = jax.custom_jvp(batched_times)

    @times.defjvp
    def times_derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
        return times(*primals), jax.jvp(by_sum, primals, tangents)[1]

    return times(x, leaf)


def _low_rank_backward(product: Product, residuals: Any, dy: Array) -> tuple[Array, LowRank]:
    x, leaf, direction = residuals
    # The merged kernel is computed again, which is cheap. The barrier (as in jax.checkpoint) hides
    # from XLA that it has been computed before: kept from the forward pass, it would take as much
    # memory as the dense gradient. XLA on the CPU drops barriers and keeps it all the same.
    factors, dy = lax.optimization_barrier(((leaf.a, leaf.b), dy))
    leaf = _with_factors(leaf, *factors)
    dmagnitude = None
    if leaf.magnitude is not None:
        norm = output_norm(_updated(leaf))
        rows = tuple(range(dy.ndim - 1))
        dmagnitude = jnp.sum(dy * direction, axis=rows, dtype=leaf.magnitude.dtype) / norm
    # dx passes the merged kernel, gain included; the factors' own dy is scaled by the gain.
    (dx,) = jax.vjp(lambda x: product(x, leaf.merge()), x)[1](dy)
    if leaf.magnitude is not None:
        dy = _scale_outputs(dy, leaf.magnitude / norm)
    update = partial(_factored_update, product)
    _, pull = jax.vjp(lambda a, b: update(x, _with_factors(leaf, a, b)), *factors)
    da, db = pull(dy)
    # None is a symbolic zero: no array of the frozen kernel's shape comes to be.
    return dx, LowRank(None, da, db, dmagnitude, leaf.scale, leaf.parts, leaf.dropout)  # type: ignore[arg-type]


def _with_factors(leaf: LowRank, a: Array, b: Array) -> LowRank:
    return LowRank(leaf.base, a, b, leaf.magnitude, leaf.scale, leaf.parts, leaf.dropout)


_low_rank_product.defvjp(_low_rank_forward, _low_rank_backward)
