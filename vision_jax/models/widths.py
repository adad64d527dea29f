"""What a model's arguments say of the sizes of its arrays, for families that can be pruned.

    widths_of(family, arguments)     -> Width for each argument, or each entry of one
    read_arguments(widths, shapes)   the arguments of a model with arrays of these shapes

Which axes are one is not said here: trees/groups.py finds that in the model itself. A Width only
names one place where a size can be read.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vision_jax.errors import UserError
from vision_jax.models.resnet import BOTTLENECK

Arguments = Mapping[str, Any]
KINDS = ("channels", "inner", "mlp", "heads")


@dataclass(frozen=True)
class Width:
    """Where the arrays show the value of an argument.

    Attributes:
      kind: one of KINDS: of what runs through blocks ("channels"), of a convolution inside a block,
        of an MLP's hidden layer, of attention.
      argument: its name.
      path: a regular expression over whole paths; all arrays that it matches have the same size.
      axis: of these.
      unit: entries of the axis for each one of the argument.
      index: which entry of a tuple it is; None: the argument is a number.
    """

    kind: str
    argument: str
    path: str
    axis: int
    unit: int = 1
    index: int | None = None

    def matches(self, path: str, axis: int) -> bool:
        """Whether it is the size of this axis."""
        return axis == self.axis and re.fullmatch(self.path, path) is not None


def widths_of(family: str, arguments: Arguments) -> list[Width]:
    """The widths of a model.

    Raises:
      UserError: a family that can't be pruned, with those that can.
    """
    if family not in _WIDTHS:
        raise UserError(f"a {family} can't be pruned: {', '.join(sorted(_WIDTHS))} can")
    return list(_WIDTHS[family](arguments))


def read_arguments(
    widths: Sequence[Width], arguments: Arguments, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The arguments with the widths that arrays of these shapes have.

    Raises:
      UserError: no argument says them: places of one argument have several sizes.
    """
    found = dict(arguments)
    for width in widths:
        sizes = {
            shape[width.axis] for path, shape in shapes.items() if width.matches(path, width.axis)
        }
        values = {size // width.unit for size in sizes}
        if len(values) > 1 or any(size % width.unit for size in sizes):
            raise UserError(
                f"{width.argument}: {width.path} would have sizes of {sorted(sizes)}, and no "
                "argument of the model says that"
            )
        for value in values:
            if width.index is None:
                found[width.argument] = value
            else:
                before = found[width.argument]
                found[width.argument] = (*before[: width.index], value, *before[width.index + 1 :])
    return found


def explicit(family: str, arguments: Arguments) -> dict[str, Any]:
    """The arguments with those told that follow from others unless a model is pruned."""
    a = dict(arguments)
    if family in ("resnet", "detr") and not a["mid_widths"]:
        inner = a.get("base_width", 64) * a.get("groups", 1)
        scale = (inner, 64) if a["block"] == BOTTLENECK else (1, 1)
        a["mid_widths"] = tuple(width * scale[0] // scale[1] for width in a["widths"])
    if family == "convnext" and not a["mlp_widths"]:
        a["mlp_widths"] = tuple(a["mlp_ratio"] * width for width in a["widths"])
    if family == "swin" and not a["mlp_widths"]:
        widths = (a["width"] * 2**stage for stage in range(len(a["depths"])))
        a["mlp_widths"] = tuple(int(width * a["mlp_ratio"]) for width in widths)
    if family == "detr":
        a["decoder_heads"] = a["decoder_heads"] or a["num_heads"]
        a["decoder_mlp_width"] = a["decoder_mlp_width"] or a["mlp_width"]
    if "head_size" in a and not a["head_size"]:
        heads = a["num_heads"]
        a["head_size"] = a["width"] // (heads[0] if isinstance(heads, tuple) else heads)
    return a


# What `explicit` tells, and what it is where it follows from others. PRUNED are of pruned models.
PRUNED: Mapping[str, Any] = {"mid_widths": (), "mlp_widths": (), "head_size": None}
IMPLIED: Mapping[str, Any] = {
    **PRUNED,
    "decoder_heads": None,
    "decoder_mlp_width": None,
}


def _vit(a: Arguments) -> Iterator[Width]:
    blocks = r"(block_\d+|attn_pool)"
    yield Width("channels", "width", "patch_embed/kernel", 3)
    yield Width("channels", "width", "attn_pool/latent", 2)
    yield Width("channels", "width", "attn_pool/proj/kernel", 1)
    yield Width("heads", "num_heads", rf"{blocks}(/attn)?/proj/kernel", 0, a["head_size"])
    yield Width("mlp", "mlp_width", rf"{blocks}/mlp/fc2/kernel", 0)


def _resnet(a: Arguments, prefix: str = "") -> Iterator[Width]:
    deep = a.get("stem_widths", ())
    unit, last = (4, 3) if a["block"] == BOTTLENECK else (1, 2)
    stem = f"conv1_{len(deep)}" if deep else "conv1"
    yield Width("channels", "stem_width", f"{prefix}{stem}/kernel", 3)
    for i in range(len(deep)):
        yield Width("inner", "stem_widths", f"{prefix}conv1_{i}/kernel", 3, index=i)
    for i in range(len(a["depths"])):
        stage = f"{prefix}stage_{i}"
        yield Width("channels", "widths", rf"{stage}/block_\d+/conv{last}/kernel", 3, unit, i)
        inside = rf"{stage}/block_\d+/conv[1-{last - 1}]/kernel"
        yield Width("inner", "mid_widths", inside, 3, index=i)


def _swin(a: Arguments) -> Iterator[Width]:
    yield Width("channels", "width", "patch_embed/kernel", 3)
    for i in range(len(a["depths"])):
        stage = f"stage_{i}"
        yield Width("channels", "width", f"{stage}/downsample/reduction/kernel", 1, 2**i)
        block = rf"{stage}/block_\d+"
        yield Width("heads", "num_heads", f"{block}/attn/proj/kernel", 0, a["head_size"], i)
        yield Width("mlp", "mlp_widths", f"{block}/mlp/fc2/kernel", 0, index=i)


def _convnext(a: Arguments) -> Iterator[Width]:
    for i in range(len(a["stem_widths"])):
        yield Width("inner", "stem_widths", f"stem_conv_{i}/kernel", 3, index=i)
    for i in range(len(a["depths"])):
        block = rf"stage_{i}/block_\d+"
        yield Width("channels", "widths", f"{block}/conv_dw/kernel", 3, index=i)
        yield Width("mlp", "mlp_widths", f"{block}/mlp/fc2/kernel", 0, index=i)


def _detr(a: Arguments) -> Iterator[Width]:
    yield from _resnet(a, "backbone/")
    for part, heads, mlp in (
        ("encoder", "num_heads", "mlp_width"),
        ("decoder", "decoder_heads", "decoder_mlp_width"),
    ):
        attention = rf"{part}_\d+/\w+_attn/out/kernel"
        yield Width("heads", heads, attention, 0, a["head_size"])
        yield Width("mlp", mlp, rf"{part}_\d+/fc2/kernel", 0)


_WIDTHS: Mapping[str, Callable[[Arguments], Iterator[Width]]] = {
    "vit": _vit,
    "resnet": _resnet,
    "swin": _swin,
    "convnext": _convnext,
    "detr": _detr,
}
