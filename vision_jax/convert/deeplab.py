"""Tables for DeepLabV3: torchvision's files.

Source: torchvision 0.29 models/segmentation/deeplabv3.py and fcn.py. The backbone has the names of
torchvision's ResNet; its dilation is in no tensor.
"""

from typing import Any

from vision_jax.convert import resnet
from vision_jax.convert.backbone import Backbone, table_of
from vision_jax.convert.engine import CONV, Rule, Rules, affine, batch_norm, one
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.models.deeplab import VARIANTS
from vision_jax.models.families import FAMILIES

FAMILY = "deeplab"
_STRUCTURE = ("depths", "block", "widths", "stem_width")
_RESNET = Backbone(table_of(resnet.TABLES, "torchvision"), "backbone.", _STRUCTURE)
_AUXILIARY = "aux_classifier"


def _rules(arguments: Arguments) -> Rules:
    rules = _RESNET.rules(arguments)

    def conv_norm(name: str, conv: int, path: str) -> tuple[Rule, ...]:
        return (
            *one(f"{name}{conv}.weight", f"{path}/conv/kernel", CONV),
            *batch_norm(f"{name}{conv + 1}", f"{path}/bn"),
        )

    branches = len(arguments["rates"]) + 1
    for index in range(branches):
        rules += conv_norm(f"classifier.0.convs.{index}.", 0, f"aspp_{index}")
    rules += conv_norm(f"classifier.0.convs.{branches}.", 1, "aspp_pool")  # after the pooling
    rules += conv_norm("classifier.0.project.", 0, "project")
    rules += conv_norm("classifier.", 1, "head_conv")
    rules += affine("classifier.4", "class_head", CONV)
    if arguments["auxiliary_head"]:
        rules += conv_norm(f"{_AUXILIARY}.", 0, "auxiliary_conv")
        rules += affine(f"{_AUXILIARY}.4", "auxiliary_class_head", CONV)
    return rules


def _arguments(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    classes, width = shapes["classifier.4.weight"][:2]
    return {
        "num_classes": classes,
        "width": width,
        "auxiliary_head": f"{_AUXILIARY}.4.weight" in shapes,
        **_RESNET.read(shapes, {}, "DeepLab"),
    }


def _named(arguments: Arguments) -> str:
    """torchvision's builder of such a model; "" for none."""
    defaults = FAMILIES[FAMILY].defaults
    names = (*_STRUCTURE, "dilation", "rates", "width")
    own = {name: arguments[name] for name in names}
    known = ((n, {**defaults, **sizes}) for n, sizes in VARIANTS.items())
    return next((n for n, sizes in known if {k: sizes[k] for k in names} == own), "")


def _config(arguments: Arguments) -> dict[str, Any]:
    given = {"aux_loss": arguments["auxiliary_head"], "weights_backbone": None}
    return {"model": _named(arguments), "kwargs": given}


def _modules(arguments: Arguments) -> dict[str, str]:
    return {**_RESNET.modules(arguments), "context": "classifier.0"}


TABLES = (
    Table(
        "torchvision",
        FAMILY,
        "deeplabv3",
        (
            "backbone.conv1.weight",
            "classifier.0.convs.1.0.weight",
            "classifier.0.project.0.weight",
            "classifier.4.weight",
        ),
        arguments=_arguments,
        rules=_rules,
        holds=lambda arguments: _named(arguments) != "",
        config=_config,
        modules=_modules,
        unseen=("dilation", "rates"),
    ),
)
ZOO = tuple(
    Entry(
        f"torchvision/{name}",
        "DeepLabV3",
        name,
        (("aux_loss", True),),
        image_size=224,
        published=f"torchvision://{name}",
        license="BSD-3-Clause",
    )
    for name in VARIANTS
)
