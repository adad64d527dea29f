"""The tables of Inception v3: torchvision's file, and the one that an FID is measured with.

Both name alike. Sources: torchvision 0.29 models/inception.py; pytorch-fid 0.3 inception.py, whose
file pt_inception-2015-12-05-6726825d.pth torch-fidelity and torchmetrics read too.
"""

from typing import Any

from vision_jax.convert.engine import CONV, Rule, affine, batch_norm, one
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.errors import UserError
from vision_jax.models.inception import BLOCKS, FID, STEM, UNIT

FID_CLASSES = 1008  # TensorFlow's, of which 1,000 are ImageNet's
_AS_IS = (0.5, 0.5, 0.5)
_STEM_NAMES = {
    name: f"Conv2d_{name.removeprefix('conv_')}_{kernel[0]}x{kernel[1]}"
    for name, _, kernel, _ in STEM
}
_CONVOLUTIONS = {  # ours -> theirs
    **_STEM_NAMES,
    **{
        f"{block}/{layer[0]}": f"{block.capitalize()}.{layer[0]}"
        for block, branches in BLOCKS.items()
        for branch in branches
        for layer in branch
    },
}


def _rules(arguments: Arguments) -> list[Rule]:
    rules: list[Rule] = []
    for path, name in _CONVOLUTIONS.items():
        rules += one(f"{name}.conv.weight", f"{path}/conv/kernel", CONV)
        rules += batch_norm(f"{name}.bn", f"{path}/bn")
    return [*rules, *affine("fc", "head")]


def _arguments(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    """Raises UserError where the stem is not that of an Inception v3."""
    width, channels = shapes[f"{_STEM_NAMES['conv_1a']}.conv.weight"][:2]
    unit = width * UNIT // STEM[0][1]
    if unit * STEM[0][1] != width * UNIT:
        raise UserError(f"an Inception v3 whose first convolution has {width} outputs is not known")
    return {
        "num_classes": shapes.get("fc.weight", (0,))[0],
        "in_channels": channels,
        "unit": unit,
        "mean": _AS_IS,
        "std": _AS_IS,
    }


def _is_fid(shapes: Shapes) -> bool:
    return shapes.get("fc.weight", (0,))[0] == FID_CLASSES


def _modules(arguments: Arguments) -> dict[str, str]:
    return {
        **_STEM_NAMES,
        **{block: block.capitalize() for block in BLOCKS},
        "pooled": "avgpool",
    }


_ANCHORS = ("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch3x3dbl_3b.conv.weight")
TABLES = (
    Table(
        "fid",
        "inception",
        "Inception of the FID",
        _ANCHORS,
        arguments=lambda shapes, metadata: {**_arguments(shapes, metadata), **FID},
        rules=_rules,
        recognizes=_is_fid,
        holds=lambda a: a["fid"] and a["num_classes"] == FID_CLASSES,
        modules=_modules,
        unseen=("fid", "mean", "std"),
    ),
    Table(
        "torchvision",
        "inception",
        "torchvision",
        _ANCHORS,
        arguments=_arguments,
        rules=_rules,
        dropped=(r"AuxLogits\..*",),  # a second head, which is of training alone
        recognizes=lambda shapes: not _is_fid(shapes),
        holds=lambda a: not a["fid"] and a["unit"] == UNIT,
        config=lambda a: {
            "model": "inception_v3",
            "kwargs": {"aux_logits": False, "transform_input": False, "init_weights": False},
        },
        modules=_modules,
        unseen=("mean", "std"),
    ),
)
ZOO = (
    Entry(
        "fid/inception-2015-12-05",
        "Inception of the FID",
        "fid",
        image_size=299,
        license="apache-2.0",
    ),
    Entry(
        "torchvision/inception_v3",
        "Inception",
        "inception_v3",
        (("aux_logits", False), ("transform_input", False), ("init_weights", False)),
        image_size=299,
        published="torchvision://inception_v3",
        license="BSD-3-Clause",
    ),
)
