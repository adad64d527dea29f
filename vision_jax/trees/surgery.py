"""A student's parameters out of its teacher's: fewer layers, and a narrower ViT.

    take_layers(tree, {"block": (0, 2, 4)})                 blocks 0, 2, 4 become blocks 0, 1, 2
    narrow_vit(params, num_heads=12, width=384, mlp_width=1536)     ViT-B -> ViT-S

Both are pure, and work on arrays, on traced and on abstract values alike. Adapters are merged
first.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.errors import UserError, nearest
from vision_jax.trees import paths

Params = Any  # nested dicts of arrays
Array = jax.Array


def spread_layers(depth: int, count: int) -> tuple[int, ...]:
    """`count` of `depth` layers, the first and the last among them, as evenly as can be.

    Examples:
      >>> spread_layers(12, 4)
      (0, 4, 7, 11)
      >>> spread_layers(12, 1)
      (0,)

    Raises:
      UserError: more layers than there are, or none.
    """
    if not 0 < count <= depth:
        raise UserError(f"student: {count} layers of a teacher of {depth}: take 1 to {depth}")
    gaps = max(count - 1, 1)
    return tuple((2 * index * (depth - 1) + gaps) // (2 * gaps) for index in range(count))


def take_layers(tree: Params, layers: Mapping[str, Sequence[int]]) -> Params:
    """The tree with chosen layers only, numbered anew from 0; all else stays.

    Initializing a student with every so-many-th layer is DistilBERT's (Sanh et al. 2019,
    https://arxiv.org/abs/1910.01108, section 3).

    Examples:
      >>> teacher = {"block_0": {"kernel": 1}, "block_1": {"kernel": 2}, "head": {"bias": 3}}
      >>> take_layers(teacher, {"block": (1,)})
      {'head': {'bias': 3}, 'block_0': {'kernel': 2}}

    Args:
      tree: parameters, or another collection with their names, such as "batch_stats".
      layers: from a row of layers to the indices that are kept, in their new order. The row
        "block" is block_0, block_1 ...; "stage_2/block" is that of a ResNet's stage, "decoder" of a
        DETR. A layer may be taken twice.

    Raises:
      UserError: a row or an index that the tree has not, or a row without a layer.
    """
    for row, chosen in layers.items():
        tree = _take(tree, row.split("/"), row, chosen)
    return tree


def _take(tree: Params, parts: Sequence[str], row: str, chosen: Sequence[int]) -> Params:
    if len(parts) > 1:
        if parts[0] not in tree:
            raise UserError(f"student: the teacher has no {row!r}{nearest(parts[0], list(tree))}")
        return {**tree, parts[0]: _take(tree[parts[0]], parts[1:], row, chosen)}
    named = re.compile(rf"{re.escape(parts[0])}_(\d+)")
    own = {int(match[1]): name for name in tree if (match := named.fullmatch(name))}
    if not own:
        known = sorted({name.rpartition("_")[0] for name in tree if re.search(r"_\d+$", name)})
        raise UserError(
            f"student: the teacher has no layers {row}_0, {row}_1 ...; it has {', '.join(known)}"
        )
    missing = [index for index in chosen if index not in own]
    if missing or not chosen:
        wrong = f"no {row}_{missing[0]}" if missing else f"{row} without a layer"
        raise UserError(f"student: {wrong}: take some of 0 to {max(own)}")
    rest = {name: layer for name, layer in tree.items() if name not in own.values()}
    return rest | {f"{parts[0]}_{new}": tree[own[old]] for new, old in enumerate(chosen)}


# What the axes of a ViT's arrays run over. WIDTH is the residual stream, the same channels in all
# blocks; HEADS and MLP are a block's own. An axis that is left out stays.
WIDTH, HEADS, MLP = "width", "heads", "mlp"
_AXES: dict[str, dict[int, str]] = {
    r"patch_embed/kernel": {3: WIDTH},
    r"(cls|dist|reg)_token|pos_embed|attn_pool/latent": {2: WIDTH},
    r"(.*/)?norm\w*/(scale|bias)|.*/layer_scale\d": {0: WIDTH},
    r"patch_embed/bias|.*/(proj|fc2)/bias": {0: WIDTH},
    r".*/(qkv|q|kv)/kernel": {0: WIDTH, 1: HEADS},
    r".*/(qkv|q|kv)/bias": {0: HEADS},
    r".*/proj/kernel": {0: HEADS, 1: WIDTH},
    r".*/fc1/kernel": {0: WIDTH, 1: MLP},
    r".*/fc1/bias": {0: MLP},
    r".*/fc2/kernel": {0: MLP, 1: WIDTH},
    r"head(_dist)?/kernel": {0: WIDTH},
    r"head(_dist)?/bias|.*/[qk]_norm/(scale|bias)": {},
}
_SCALES = re.compile(r"(.*/)?norm\w*/(scale|bias)|.*/layer_scale\d")  # neither read nor write


def narrow_vit(params: Params, *, num_heads: int, width: int, mlp_width: int) -> Params:
    """A narrower ViT out of the channels, heads and hidden units of a wide one that weigh most.

    A head has the size that it had, so their number follows from the width. What is kept has the
    largest product of two norms: of the weights that write it and of those that read it. All else
    in the order that it had, so that the whole width gives a bit-identical teacher.

    Taking away heads or hidden units that are zero changes no output. Taking away channels does,
    even those that are zero: LayerNorm's mean and variance are then of those that remain.

    Args:
      params: the teacher's; any `ViT` of models/vit.py.
      num_heads: of the teacher.
      width: of the student, a multiple of a head's size.
      mlp_width: of the student.

    Raises:
      UserError: a width or hidden width that the teacher cannot give, or an array that no ViT has.
    """
    flat = paths.flatten(params)
    if "patch_embed/kernel" not in flat:
        raise UserError("student: narrower is made of a ViT only; take the teacher's layers")
    axes = {path: _axes_of(path) for path in flat}
    old_width = flat["patch_embed/kernel"].shape[-1]
    size = old_width // num_heads
    if width % size or not 0 < width <= old_width:
        raise UserError(
            f"student: width {width}: take a multiple of {size}, the size of a teacher's head, up "
            f"to {old_width}"
        )
    # What is kept of each kind of axis, and its size now, by the layer that it belongs to.
    channels = (_largest(_channel_weights(flat, axes), width), old_width)
    inner: dict[tuple[str, str], tuple[Array, int]] = {}
    for path, leaf in flat.items():
        block, _, layer = path.removesuffix("/kernel").rpartition("/")
        if layer == "proj":
            inner[block, HEADS] = (_kept_heads(flat, block, size, width // size), old_width)
        elif layer == "fc2" and path.endswith("kernel"):
            if not 0 < mlp_width <= leaf.shape[0]:
                raise UserError(f"student: mlp_width {mlp_width}: take 1 to {leaf.shape[0]}")
            inner[block, MLP] = (_kept_hidden(flat, block, mlp_width), leaf.shape[0])

    def narrow(path: str, leaf: Array) -> Array:
        block = re.sub(r"/\w+/(kernel|bias)$", "", path)
        for axis, kind in axes[path].items():
            kept, total = channels if kind == WIDTH else inner[block, kind]
            # An axis may hold several of it one after another: q, k, v; gate and value; two pools.
            starts = total * jnp.arange(leaf.shape[axis] // total, dtype=kept.dtype)
            leaf = jnp.take(leaf, (starts[:, None] + kept[None]).reshape(-1), axis=axis)
        return leaf

    return paths.unflatten(params, {path: narrow(path, leaf) for path, leaf in flat.items()})


def _axes_of(path: str) -> Mapping[int, str]:
    for rule, axes in _AXES.items():
        if re.fullmatch(rule, path):
            return axes
    raise UserError(f"student: {path} is no array of a ViT: merge adapters first")


def _largest(weights: Array, count: int) -> Array:
    """Indices of the largest weights, in ascending order."""
    return jnp.sort(jax.lax.top_k(weights, count)[1])


def _squares(leaf: Array, axis: int) -> Array:
    """Sum of squares over all axes but one."""
    others = tuple(index for index in range(leaf.ndim) if index != axis)
    return jnp.square(leaf.astype(np.promote_types(leaf.dtype, np.float32))).sum(others)


def _channel_weights(flat: Mapping[str, Array], axes: Mapping[str, Mapping[int, str]]) -> Array:
    """For each channel of the residual stream, squared: what writes it times what reads it."""
    width = flat["patch_embed/kernel"].shape[-1]
    written = read = jnp.zeros(width)
    for path, leaf in flat.items():
        for axis, kind in axes[path].items():
            if kind != WIDTH or _SCALES.fullmatch(path):
                continue
            squares = _squares(leaf, axis).reshape(-1, width).sum(0)
            if path.endswith("kernel") and axis == 0:
                read = read + squares
            else:
                written = written + squares
    return written * read


def _kept_heads(flat: Mapping[str, Array], block: str, size: int, count: int) -> Array:
    """Inner channels of the heads whose values and projection weigh most."""
    values = next(f"{block}/{name}" for name in ("qkv", "kv") if f"{block}/{name}/kernel" in flat)
    inner = flat[f"{block}/proj/kernel"].shape[0]
    last = _written(flat, values)[-inner:]  # of q, k, v
    read = _squares(flat[f"{block}/proj/kernel"], 0)
    weights = _by_group(last, size) * _by_group(read, size)
    kept = _largest(weights, count)
    return (size * kept[:, None] + jnp.arange(size, dtype=kept.dtype)[None]).reshape(-1)


def _kept_hidden(flat: Mapping[str, Array], block: str, count: int) -> Array:
    read = _squares(flat[f"{block}/fc2/kernel"], 0)
    written = _written(flat, f"{block}/fc1").reshape(-1, len(read)).sum(0)  # gate and value
    return _largest(written * read, count)


def _written(flat: Mapping[str, Array], layer: str) -> Array:
    """Squares of what makes each output of a dense layer."""
    squares = _squares(flat[f"{layer}/kernel"], 1)
    bias = f"{layer}/bias"
    return squares + _squares(flat[bias], 0) if bias in flat else squares


def _by_group(squares: Array, size: int) -> Array:
    return squares.reshape(-1, size).sum(-1)
