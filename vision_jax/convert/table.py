"""What one source calls one architecture in its files, and how a file is recognized by it.

Each architecture has a module here with its `TABLES`, one for each way in which timm, torchvision,
transformers or somebody else's files name it. A table is data and three functions of the model's
arguments, which say all that importing, exporting and certifying need.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vision_jax.convert.engine import Fixed, Rule, Rules
from vision_jax.convert.fields import Fields
from vision_jax.errors import UserError

Arguments = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Metadata = Mapping[str, Any]


def _unchanged(path: str, array: np.ndarray, own: Arguments, wanted: Arguments) -> np.ndarray:
    return array


def _nothing(arguments: Arguments) -> dict[str, Any]:
    return {}


# What timm's models are trained, started and fed with; their arithmetic is the same.
_TIMM_FREE = {
    *("num_classes", "in_chans", "img_size", "strict_img_size", "dynamic_img_size"),
    *("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("patch_drop_rate", "drop_block_rate", "zero_init_last", "weight_init", "fix_init"),
    "head_init_scale",
}


def timm_arguments(
    metadata: Metadata, free: Collection[str], fixed: Mapping[str, Any] = {}
) -> tuple[str, dict[str, Any]]:
    """timm's architecture and the model_args of config.json, none of which is overlooked.

    Args:
      metadata: as `Table.arguments` takes it.
      free: names that the caller reads, or whose effect shows in the tensors.
      fixed: name -> the one value that the model here computes with.

    Raises:
      UserError: another argument, which may change the arithmetic and leave no trace.
    """
    config = metadata.get("config", {})
    given = config.get("model_args")
    given = dict(given) if isinstance(given, dict) else {}
    pool = {"global_pool": config["global_pool"]} if config.get("global_pool") else {}
    for name, value in {**pool, **given}.items():
        if name in fixed and value != fixed[name]:
            raise UserError(f"config.json: {name} {value!r}: this model has {fixed[name]!r}")
        if name not in {*_TIMM_FREE, *free, *fixed} and value not in (None, False):
            raise UserError(
                f"config.json: {name} {value!r} is not supported: the model may compute otherwise"
            )
    return str(config.get("architecture", "")).split(".")[0], given


def head_channels(inner: int, num_heads: Any) -> int:
    """Channels of each head.

    Raises:
      UserError: so many heads can't share `inner` channels of q, k or v.
    """
    if not isinstance(num_heads, int) or num_heads < 1 or inner % num_heads:
        raise UserError(f"{num_heads!r} heads can't share the {inner} channels of q, k and v")
    return inner // num_heads


@dataclass(frozen=True)
class Table:
    """How one kind of file names one architecture. `{p}` stands for the prefix of the file at hand.

    Attributes:
      source: "timm", "torchvision", "transformers", "npz", or "detr", "yolox", "nanodet" and "dit",
        their original repositories; "diffusers"; "fid", the file that an FID is measured with;
        "onnx" and "tfjs", whose tensors have numbers.
      family: the architecture's key in models.families.FAMILIES.
      kind: tells the tables of one source and family from each other.
      anchors: tensors that every such file has, and by which it is recognized.
      arguments: (shapes, metadata) -> the model's arguments with which the weights compute what
        they did where they came from, num_classes and in_channels included. `shapes` are the
        file's, by name without the prefix; `metadata["config"]` is config.json, where there.
        Raises UserError where the file is a relative that the model cannot be.
      rules: arguments -> all names of such a file, with `{p}` in them.
      prefixes: what may stand for `{p}`; the first is what an export writes.
      dropped: regular expressions of tensors that such files carry and the model has no use for.
      recognizes: (shapes without prefix) -> bool, where the anchors alone don't tell.
      holds: arguments -> whether this naming has a place for all of such a model; for exports.
      pruned: arguments of pruned models (models.widths.PRUNED) that `config` has a word for.
      config: arguments -> what config.json must say beside classes and preprocessing so that the
        source builds this very model: for timm {"architecture", "model_args"}, for torchvision
        {"model", "kwargs"} (a builder of torchvision.models and its arguments), for transformers
        the fields of its config, "architectures" and "model_type" among them.
      modules: arguments -> {named intermediate of ours: module of the source's whose output it is}.
      adapt: (path, array, own arguments, wanted arguments) -> array for another image size.
      fields: all that is known of config.json, where the source is transformers.
      unseen: what the tensors don't show and the model computes by: arguments, whose values
        `arguments` takes from config.json, and in words what the model has no argument for.
      by_name: arguments that no file shows and that the weights' published name tells.
      class_names: in the order of labels, of a kind of file that never says them.
      file_names: how timm's architectures of the family begin the names of files, which then say
        what no config does.
      license: of the published weights, where all of such files share it or it narrows their use;
        the converter says it.
    """

    source: str
    family: str
    kind: str
    anchors: tuple[str, ...]
    arguments: Callable[[Shapes, Metadata], dict[str, Any]]
    rules: Callable[[Arguments], Rules]
    prefixes: tuple[str, ...] = ("",)
    dropped: tuple[str, ...] = ()
    recognizes: Callable[[Shapes], bool] = lambda shapes: True
    holds: Callable[[Arguments], bool] = lambda arguments: True
    pruned: tuple[str, ...] = ()
    config: Callable[[Arguments], dict[str, Any]] = _nothing
    modules: Callable[[Arguments], dict[str, str]] = _nothing
    adapt: Callable[[str, np.ndarray, Arguments, Arguments], np.ndarray] = _unchanged
    fields: Fields | None = None
    unseen: tuple[str, ...] = ()
    by_name: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    file_names: str = ""
    license: str = ""

    def with_prefix(self, prefix: str) -> "Table":
        """The table with `{p}` filled in."""
        escaped = prefix.replace(".", r"\.")
        return replace(
            self,
            anchors=tuple(text.replace("{p}", prefix) for text in self.anchors),
            rules=lambda arguments: fill_prefix(self.rules(arguments), prefix),
            prefixes=(prefix,),
            dropped=tuple(text.replace("{p}", escaped) for text in self.dropped),
            modules=lambda arguments: {
                ours: name.replace("{p}", prefix) for ours, name in self.modules(arguments).items()
            },
        )

    def matches(self, shapes: Shapes) -> "Table | None":
        """The table with the prefix that makes it this file's, or None."""
        for prefix in self.prefixes:
            filled = self.with_prefix(prefix)
            anchored = all(anchor in shapes for anchor in filled.anchors)
            if anchored and self.recognizes(without_prefix(shapes, prefix)):
                return filled
        return None


def fill_prefix(rules: Rules, prefix: str) -> list[Rule | Fixed]:
    """The rules with `{p}` filled in."""

    def fill(rule: Rule | Fixed) -> Rule | Fixed:
        if isinstance(rule, Fixed):
            return replace(rule, name=rule.name.replace("{p}", prefix))
        names = tuple(name.replace("{p}", prefix) for name in rule.names)
        # Made anew only where needed: a model has many hundred rules.
        if names == rule.names:
            return rule
        return Rule(names, rule.paths, rule.layout, rule.default, rule.written)

    return [fill(rule) for rule in rules]


def without_prefix(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes by names from which the prefix is taken, where they have it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items()}


@dataclass(frozen=True)
class Entry:
    """One variant of the zoo: what is certified, and where its published weights are.

    Attributes:
      name: "SOURCE/NAME": "timm/resnet50d", "torchvision/regnet_y_400mf", "transformers/swin-tiny".
      title: the family's name for people, "ResNeXt"; the zoo's table counts and groups by it.
      build: for timm an architecture and for torchvision a builder; for transformers the class.
      arguments: keywords for the reference: of the builder, or of the transformers config.
      reduced: keywords that reduce the depth of a giant, for its certificate only.
      image_size: pixels a side.
      published: where weights are, as `read_weights` takes it ("hf://microsoft/resnet-50").
      license: of those weights; "" for timm, whose own metadata say it.
      family: what to take its files for, where they could be more than one (see `find_table`).
    """

    name: str
    title: str
    build: str
    arguments: tuple[tuple[str, Any], ...] = ()
    reduced: tuple[tuple[str, Any], ...] = ()
    image_size: int = 224
    published: str = ""
    license: str = ""
    family: str = ""

    @property
    def source(self) -> str:
        """The library that published the weights, such as "timm": how `name` begins."""
        return self.name.partition("/")[0]


def count_blocks(shapes: Shapes, pattern: str, first: int = 0) -> tuple[int, ...]:
    """Blocks of each stage, in order, from names that a pattern with (stage, block) matches.

    `first` is the number that the file gives to a stage's first block.
    """
    found: dict[int, int] = {}
    for name in shapes:
        if match := re.fullmatch(pattern, name):
            stage, block = int(match[1]), int(match[2])
            found[stage] = max(found.get(stage, 0), block + 1 - first)
    return tuple(found[stage] for stage in sorted(found))


def pair(size: Any, name: str) -> tuple[int, int]:
    """(height, width) from a config's one or two sizes in pixels."""
    both = (size, size) if isinstance(size, int) else size
    good = isinstance(both, Sequence) and len(both) == 2
    if not (good and all(isinstance(side, int) and side > 0 for side in both)):
        raise UserError(f"config.json: {name} {size!r} is not one or two sizes in pixels")
    return both[0], both[1]
