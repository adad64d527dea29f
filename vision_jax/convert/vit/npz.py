"""Tables for the Vision Transformers of AugReg's and big_vision's .npz files.

Sources: https://github.com/google-research/vision_transformer (AugReg,
https://arxiv.org/abs/2106.10270) and https://github.com/google-research/big_vision (SigLIP,
https://arxiv.org/abs/2303.15343), whose models are flax's: GELU by tanh, LayerNorm epsilon 1e-6,
and one kernel [D, K, d] for each of query, key and value. Such a file says all there is to know by
its names and shapes, the number of heads K among them; the images are square.

timm reads these files too (vision_transformer.py, _load_weights) and computes GELU exactly unless
it is told otherwise (act_layer="gelu_tanh").
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vision_jax.convert.engine import Arrays, Layout, Rule, Rules, one, tree_shapes
from vision_jax.convert.table import Arguments, Metadata, Shapes, Table
from vision_jax.convert.vit.arguments import from_shapes
from vision_jax.convert.vit.config import EPSILON, timm_config
from vision_jax.convert.vit.names import adapt, modules
from vision_jax.errors import UserError

ACTIVATION = "gelu_tanh"


@dataclass(frozen=True)
class Names:
    """What one kind of file calls the modules of a block, and where its positions are."""

    block: str
    attention: str
    norms: tuple[str, str]
    mlp: str
    positions: str


_AUGREG = Names(
    "{p}Transformer/encoderblock_{i}/",
    "MultiHeadDotProductAttention_1/",
    ("LayerNorm_0", "LayerNorm_2"),
    "MlpBlock_3/",
    "{p}Transformer/posembed_input/pos_embedding",
)
_BIG_VISION = Names(
    "{p}Transformer/encoderblock_{i}/",
    "MultiHeadDotProductAttention_0/",
    ("LayerNorm_0", "LayerNorm_1"),
    "MlpBlock_0/",
    "{p}pos_embedding",
)
_SCANNED = Names(  # every tensor of the blocks has the depth as its first axis
    "{p}Transformer/encoderblock/",
    _BIG_VISION.attention,
    _BIG_VISION.norms,
    _BIG_VISION.mlp,
    _BIG_VISION.positions,
)


def _join(heads: int, count: int) -> Layout:
    """`count` kernels [D, K, d] side by side in one of ours [D, count·K·d]."""
    return Layout(
        lambda xs: [np.concatenate([x.reshape(len(x), -1) for x in xs], axis=1)],
        lambda xs: [x.reshape(len(x), heads, -1) for x in np.split(xs[0], count, axis=1)],
    )


def _join_bias(heads: int, count: int) -> Layout:
    """`count` biases [K, d] one after another in one of ours [count·K·d]."""
    return Layout(
        lambda xs: [np.concatenate([x.reshape(-1) for x in xs])],
        lambda xs: [x.reshape(heads, -1) for x in np.split(xs[0], count)],
    )


def _merge(heads: int) -> Layout:
    """The kernel [K, d, D] of the attention's output, ours [K·d, D]."""
    return Layout(
        lambda xs: [xs[0].reshape(-1, xs[0].shape[-1])],
        lambda xs: [xs[0].reshape(heads, -1, xs[0].shape[-1])],
    )


def _stack(layout: Layout, depth: int) -> Layout:
    """A block's layout for the tensors of all blocks, stacked in the file and apart in the tree."""

    def to_tree(xs: Arrays) -> Arrays:
        if any(len(x) != depth for x in xs):
            raise ValueError("another depth")
        return [y for i in range(depth) for y in layout.to_tree([x[i] for x in xs])]

    def to_file(ys: Arrays) -> Arrays:
        return [np.stack(parts) for parts in zip(*(layout.to_file([y]) for y in ys), strict=True)]

    return Layout(to_tree, to_file)


def _attention(
    name: str, parts: Mapping[str, tuple[str, ...]], path: str, heads: int
) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for ours, theirs in parts.items():
        for kind, layout in (("kernel", _join), ("bias", _join_bias)):
            names = tuple(f"{name}{part}/{kind}" for part in theirs)
            rules.append(Rule(names, (f"{path}/{ours}/{kind}",), layout(heads, len(theirs))))
    return (
        *rules,
        *one(f"{name}out/kernel", f"{path}/proj/kernel", _merge(heads)),
        *one(f"{name}out/bias", f"{path}/proj/bias"),
    )


def _same(name: str, path: str, *leaves: str) -> tuple[Rule, ...]:
    return tuple(Rule((f"{name}/{leaf}",), (f"{path}/{leaf}",)) for leaf in leaves)


def _mlp(name: str, path: str) -> tuple[Rule, ...]:
    return (
        *_same(f"{name}Dense_0", f"{path}/fc1", "kernel", "bias"),
        *_same(f"{name}Dense_1", f"{path}/fc2", "kernel", "bias"),
    )


def _block(names: Names, path: str, heads: int) -> tuple[Rule, ...]:
    qkv = {"qkv": ("query", "key", "value")}
    return (
        *_same(names.block + names.norms[0], f"{path}/norm1", "scale", "bias"),
        *_attention(names.block + names.attention, qkv, f"{path}/attn", heads),
        *_same(names.block + names.norms[1], f"{path}/norm2", "scale", "bias"),
        *_mlp(names.block + names.mlp, f"{path}/mlp"),
    )


def _blocks(names: Names, heads: int, depth: int) -> list[Rule]:
    blocks = [
        [
            Rule(tuple(n.replace("{i}", str(i)) for n in rule.names), rule.paths, rule.layout)
            for rule in _block(names, f"block_{i}", heads)
        ]
        for i in range(depth)
    ]
    if "{i}" in names.block:
        return [rule for block in blocks for rule in block]
    return [
        Rule(rules[0].names, tuple(r.paths[0] for r in rules), _stack(rules[0].layout, depth))
        for rules in zip(*blocks, strict=True)
    ]


def _rules(names: Names, arguments: Arguments) -> Rules:
    heads = arguments["num_heads"]
    pool = "{p}MAPHead_0/"
    parts = {"q": ("query",), "kv": ("key", "value")}
    return (
        *_same("{p}embedding", "patch_embed", "kernel", "bias"),
        *one("{p}cls", "cls_token"),
        *one(names.positions, "pos_embed"),
        *_blocks(names, heads, arguments["depth"]),
        *_same("{p}Transformer/encoder_norm", "norm", "scale", "bias"),
        *one(f"{pool}probe", "attn_pool/latent"),
        *_attention(f"{pool}MultiHeadDotProductAttention_0/", parts, "attn_pool", heads),
        *_same(f"{pool}LayerNorm_0", "attn_pool/norm", "scale", "bias"),
        *_mlp(f"{pool}MlpBlock_0/", "attn_pool/mlp"),
        *_same("{p}head", "head", "kernel", "bias"),
    )


def _arguments(names: Names, shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    block = names.block.replace("{p}", "")
    query = f"{names.attention}query/kernel"
    if "{i}" in block:
        pattern = re.escape(block).replace(r"\{i\}", r"\d+") + re.escape(query)
        depth = sum(re.fullmatch(pattern, name) is not None for name in shapes)
        kernel = shapes.get(block.replace("{i}", "0") + query, ())
    else:
        depth, *rest = shapes.get(block + query, (0,))
        kernel = tuple(rest)
    if len(kernel) != 3:
        raise UserError(f"{block}{query} is no kernel of width x heads x channels: damaged")
    rules = _rules(names, {"num_heads": kernel[1], "depth": depth})
    bare = [
        Rule(tuple(n.replace("{p}", "") for n in rule.names), rule.paths, rule.layout)
        for rule in rules
        if isinstance(rule, Rule)
    ]
    said = {
        "num_heads": kernel[1],
        "activation": ACTIVATION,
        "layer_norm_eps": EPSILON,
        "position_prefix": int(names is _AUGREG and "cls" in shapes),
    }
    return from_shapes(tree_shapes(shapes, bare), depth, said)


def _holds(names: Names, a: Arguments) -> bool:
    """Whether such a file says all of the model: there is no config beside it."""
    plain = not (
        a["norm_after_pool"]
        or a["distillation_token"]
        or a["num_registers"]
        or a["qk_norm"]
        or a["layer_scale"] is not None
        or a["pre_norm"]
        or a["gated_mlp"]
    )
    biases = a["patch_bias"] and a["qkv_bias"] and (a["head_bias"] or not a["num_classes"])
    tall, wide = a["image_size"]
    pools = ("token",) if a["class_token"] else ("avg", "map")
    return (
        plain
        and biases
        and tall == wide
        and tall % a["patch_size"] == 0
        and a["pool"] in pools
        and a["position_prefix"] == int(names is _AUGREG)
        and (a["class_token"] or names is not _AUGREG)
        and (a["activation"], a["layer_norm_eps"]) == (ACTIVATION, EPSILON)
    )


# Text towers, the sigmoid loss's temperature and bias, and the state of the optimizer. Not
# `pre_logits`, the hidden layer before the heads of 2020: whoever drops it does so on purpose.
_DROPPED = (r"(params/)?(txt/.*|t|b)", r"opt/(?!target/).*")


_KINDS = {"augreg": _AUGREG, "big_vision": _BIG_VISION, "big_vision scanned": _SCANNED}

# The three ways in which the files name a ViT.
TABLES = tuple(
    Table(
        "npz",
        "vit",
        kind,
        (
            "{p}embedding/kernel",
            names.positions,
            f"{names.block.replace('{i}', '0')}{names.norms[0]}/scale",
        ),
        arguments=partial(_arguments, names),
        rules=partial(_rules, names),
        prefixes=("", "params/", "params/img/", "img/", "opt/target/"),
        dropped=_DROPPED,
        holds=partial(_holds, names) if names is not _SCANNED else lambda arguments: False,
        config=timm_config,
        modules=partial(modules, "norm_pre", "blocks.{}", "fc_norm"),
        adapt=adapt,
    )
    for kind, names in _KINDS.items()
)
