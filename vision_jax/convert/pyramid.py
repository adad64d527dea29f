"""Names of a backbone and its pyramid inside a detector of torchvision's.

Source: torchvision 0.29 models/detection/backbone_utils.py and ops/feature_pyramid_network.py.
Files from before 0.13 call the pyramid's convolutions without the number of a Sequential. A frozen
BatchNorm has no count of updates, and its epsilon is in no file.
"""

from dataclasses import replace
from typing import Any

from vision_jax.convert import efficientnet, resnet
from vision_jax.convert.engine import CONV, Rule, affine, batch_norm, one
from vision_jax.convert.table import Arguments, Metadata, Shapes
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES
from vision_jax.models.faster_rcnn import MOBILE_HEAD, MOBILE_ONLY
from vision_jax.models.resnet import ResNet

BODY, FPN = "backbone.body.", "backbone.fpn."
STRUCTURE = ("depths", "widths", "stem_width", "batch_norm_eps")  # of the body
OF_BODY = {"resnet": ("block",), "mobilenet_v3": MOBILE_ONLY}
_FAMILY = {"resnet": "resnet", "mobilenet_v3": "efficientnet"}
_TABLES = {
    "resnet": next(table for table in resnet.TABLES if table.source == "torchvision"),
    "mobilenet_v3": next(table for table in efficientnet.TABLES if table.kind == "mobilenet_v3"),
}
_PREFIX = {"resnet": "", "mobilenet_v3": "features."}  # of the body in its own files


def body_rules(arguments: Arguments, kind: str = "resnet") -> list[Rule]:
    """Rules of the body, "resnet" or "mobilenet_v3"."""
    rules = []
    for rule in _TABLES[kind].rules(_body_arguments(arguments, kind)):
        assert isinstance(rule, Rule)
        if not rule.paths[0].startswith(("head/", "pre_logits/")):
            (name,), (path,) = rule.names, rule.paths
            name = BODY + name.removeprefix(_PREFIX[kind])
            rules.append(replace(rule, names=(name,), paths=(f"backbone/{path}",)))
    return rules


def body_modules(arguments: Arguments, kind: str = "resnet") -> dict[str, str]:
    """The source's modules of the body's named intermediates."""
    body = _TABLES[kind].modules(_body_arguments(arguments, kind))
    return {
        own: BODY + name.removeprefix(_PREFIX[kind])
        for own, name in body.items()
        if own != "pooled"
    }


def of_body(shapes: Shapes, what: str, kind: str = "resnet") -> dict[str, Any]:
    """The arguments that the tensors of the body say; `what` it is inside of, for messages.

    Raises:
      UserError: a body that the model can't have.
    """
    own = {
        _PREFIX[kind] + name.removeprefix(BODY): shape
        for name, shape in shapes.items()
        if name.startswith(BODY)
    }
    body = _TABLES[kind].arguments(own, {})
    names = (*STRUCTURE, *OF_BODY[kind], "in_channels")
    fixed = FAMILIES["resnet"].defaults
    if kind == "mobilenet_v3":
        fixed = {"head_width": MOBILE_HEAD * body["widths"][-1]}
    for name, value in body.items():
        if name not in (*names, "num_classes") and value != fixed.get(name, value):
            raise UserError(
                f"the backbone is a {_FAMILY[kind]} with {name} {value}: not supported in a {what}"
            )
    return {name: body[name] for name in names if name in body}


def _body_arguments(arguments: Arguments, kind: str) -> dict[str, Any]:
    """The body's, as its own tables take them."""
    names = (*STRUCTURE, *OF_BODY[kind], "in_channels", "mean", "std")
    own = {name: arguments[name] for name in names}
    fixed = {"hard_gate": True} if kind == "mobilenet_v3" else {}
    return {**FAMILIES[_FAMILY[kind]].defaults, **fixed, **own, "num_classes": 0}


def level_rules(count: int, norm: bool, numbered: bool) -> list[Rule]:
    """Rules of the convolutions of so many maps; `numbered`: they stand in a Sequential."""
    rules: list[Rule] = []
    for index in range(count):
        for kind in ("inner", "layer"):
            name, path = f"{FPN}{kind}_blocks.{index}", f"fpn/{kind}_{index}"
            rules += conv_norm(name, path, norm, numbered)
    return rules


def conv_norm(name: str, path: str, norm: bool, numbered: bool = True) -> tuple[Rule, ...]:
    """Rules of a convolution with a norm, or with a bias."""
    conv = f"{name}.0" if numbered else name
    if not norm:
        return affine(conv, f"{path}/conv", CONV)
    kernel = one(f"{conv}.weight", f"{path}/conv/kernel", CONV)
    return (*kernel, *batch_norm(f"{name}.1", f"{path}/bn"))


def epsilon_of(config: Metadata, published: tuple[str, str]) -> float:
    """BatchNorm's epsilon: what a config of ours says, or what the weights' name tells.

    Args:
      config: config.json's.
      published: (builder, how the file's name begins) of weights for an epsilon of 0.
    """
    builder, file = published
    by_name = (config.get("model"), config.get("weights")) == (builder, "COCO_V1")
    if by_name or config.get("architecture") == file:
        return 0.0
    return float(config.get("norm_eps", ResNet.batch_norm_eps))


def said_epsilon(arguments: Arguments) -> dict[str, float]:
    """`norm_eps` of a config of ours, what overwrite_eps must be told, if anything."""
    eps = arguments["batch_norm_eps"]
    return {"norm_eps": eps} if eps != ResNet.batch_norm_eps else {}
