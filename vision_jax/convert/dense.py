"""What torchvision's files of RetinaNet and FCOS have in common.

Source: torchvision 0.29 models/detection/retinanet.py and fcos.py. The heads' convolutions stand in
Sequentials, whose numbers are each table's to say.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from vision_jax.convert.engine import CONV, Rules, affine, norm, one
from vision_jax.convert.pyramid import BODIES, BODY, FPN, level_rules, said_epsilon
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.models.families import FAMILIES
from vision_jax.models.retinanet import GROUPS

TOWERS = {"class": "head.classification_head", "box": "head.regression_head"}
KEYWORDS = {  # arguments of torchvision's builders that no tensor shows
    "topk_candidates": "candidates",
    "score_thresh": "least_score",
    "detections_per_img": "most",
}
WIDTH, DEPTH = 256, 4  # of all of torchvision's
_OF_THE_BODY = ("block", "depths", "widths", "stem_width")


def dense_rules(
    arguments: Arguments,
    heads: Mapping[str, str],
    numbered: bool,
    use_bias: bool,
    layer: Callable[[int], tuple[str, str]],
) -> Rules:
    """Rules of all tensors.

    Args:
      arguments: of the model.
      heads: its predictions -> the source's module of each.
      numbered: convolutions of the pyramid stand in a Sequential.
      use_bias: convolutions of the towers have one.
      layer: index -> the numbers of a tower's convolution and of its norm.
    """
    rules = BODIES["resnet"].rules(arguments)
    rules += level_rules(len(arguments["depths"]) - arguments["first_map"], False, numbered)
    for name in ("p6", "p7"):
        rules += affine(f"{FPN}extra_blocks.{name}", f"fpn/{name}", CONV)
    for tower, name in TOWERS.items():
        for index in range(arguments["head_depth"]):
            conv, scale = layer(index)
            kernel, own = f"{name}.conv.{conv}", f"{tower}_tower/conv_{index}"
            if use_bias:
                rules += affine(kernel, own, CONV)
            else:
                rules += one(f"{kernel}.weight", f"{own}/kernel", CONV)
            if arguments["head_groups"]:
                rules += norm(f"{name}.conv.{scale}", f"{tower}_tower/norm_{index}")
    for head, name in heads.items():
        rules += affine(name, f"{head}_head", CONV)
    return rules


def dense_arguments(
    shapes: Shapes,
    config: Metadata,
    what: str,
    numbered: bool,
    known: Arguments,
    keywords: Mapping[str, str],
) -> dict[str, Any]:
    """The arguments that both have, of a file; without its epsilon and its number of classes.

    Args:
      shapes: of the file's tensors, by name.
      config: config.json's.
      what: the model, for messages.
      numbered: convolutions of the pyramid stand in a Sequential.
      known: the builder's arguments, for what no tensor shows.
      keywords: the builder's name of an argument -> ours, of what no tensor shows.
    """
    first = ".0" if numbered else ""
    tower = re.escape(f"{TOWERS['class']}.conv.")
    convs = [name for name in shapes if re.fullmatch(rf"{tower}.*weight", name)]
    depth = sum(len(shapes[name]) == 4 for name in convs)
    body = BODIES["resnet"].read(shapes, {}, what)
    levels = sum(
        re.fullmatch(rf"{re.escape(FPN)}inner_blocks\.\d+{first}\.weight", name) is not None
        for name in shapes
    )
    width = shapes[f"{FPN}inner_blocks.0{first}.weight"][0]
    given = config.get("kwargs") or {}
    return {
        **body,
        "first_map": len(body["depths"]) - levels,
        "width": width,
        "coarse_of_map": shapes[f"{FPN}extra_blocks.p6.weight"][1] != width,
        "head_depth": depth,
        "head_groups": GROUPS if len(convs) > depth else 0,
        **{ours: known[ours] for ours in keywords.values()},
        **{ours: given[name] for name, ours in keywords.items() if name in given},
    }


def dense_tables(
    family: str,
    variants: Mapping[str, Arguments],
    *,
    arguments: Callable[[bool, Shapes, Metadata], dict[str, Any]],
    rules: Callable[[bool, Arguments], Rules],
    anchors: Callable[[str], tuple[str, ...]],
    keywords: Mapping[str, str],
    also: Sequence[str],
    **more: Any,
) -> tuple[Table, ...]:
    """The table of today's files, and that of files from before 0.13.

    Args:
      family: of the model.
      variants: torchvision's builder -> arguments, where they are not the family's own.
      arguments: (the pyramid's convolutions stand in Sequentials, ...) -> as a Table's.
      rules: (the same, ...) -> as a Table's.
      anchors: ".0" or "", what stands behind such a convolution -> tensors of the heads.
      keywords: the builder's name of an argument -> ours, of what no tensor shows.
      also: arguments that a builder fixes, beside those of body and pyramid.
      more: fields of a Table.
    """

    def config(given: Arguments) -> dict[str, Any]:
        builder = _named(family, variants, given, also)
        known = {**FAMILIES[family].defaults, **variants[builder]}
        said = {name: given[ours] for name, ours in keywords.items() if given[ours] != known[ours]}
        return {
            "model": builder,
            "kwargs": {"num_classes": given["num_classes"], "weights_backbone": None, **said},
            **said_epsilon(given),
        }

    def table(numbered: bool) -> Table:
        first = ".0" if numbered else ""
        pyramid = (f"{FPN}inner_blocks.0{first}.weight", f"{FPN}extra_blocks.p6.weight")
        return Table(
            "torchvision",
            family,
            "numbered" if numbered else "before 0.13",
            (f"{BODY}conv1.weight", *pyramid, *anchors(first)),
            arguments=partial(arguments, numbered),
            rules=partial(rules, numbered),
            holds=lambda given: numbered and _named(family, variants, given, also) != "",
            config=config,
            modules=dense_modules,
            **more,
        )

    return table(True), table(False)


def dense_zoo(title: str, variants: Mapping[str, Arguments]) -> tuple[Entry, ...]:
    """Each builder, as the zoo has it; `title`: the family's name for people."""
    return tuple(
        Entry(
            f"torchvision/{name}",
            title,
            name,
            image_size=128,
            published=f"torchvision://{name}",
            license="BSD-3-Clause",
        )
        for name in variants
    )


def _named(
    family: str, variants: Mapping[str, Arguments], arguments: Arguments, also: Sequence[str]
) -> str:
    """torchvision's builder of such a model; "" for none."""
    defaults = FAMILIES[family].defaults
    names = (*_OF_THE_BODY, "first_map", "coarse_of_map", "head_groups", *also)
    for name, sizes in variants.items():
        wanted = {key: {**defaults, **sizes}[key] for key in names}
        wanted |= {"width": WIDTH, "head_depth": DEPTH}
        if {key: arguments[key] for key in wanted} == wanted:
            return name
    return ""


def dense_modules(arguments: Arguments) -> dict[str, str]:
    """The source's modules of named intermediates."""
    maps = len(arguments["depths"]) - arguments["first_map"]
    extra = {maps: "extra_blocks.p6", maps + 1: "extra_blocks.p7"}
    return {
        **BODIES["resnet"].modules(arguments),
        **{f"level_{index}": f"{FPN}layer_blocks.{index}" for index in range(maps)},
        **{f"level_{index}": f"{FPN}{name}" for index, name in extra.items()},
    }
