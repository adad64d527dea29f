"""What the tables of diffusers' models share: how it calls its files, and the fields of them all.

Source: diffusers 0.42, models/modeling_utils.py and configuration_utils.py.
"""

from typing import Any

from vision_jax.convert.fields import Fields
from vision_jax.convert.table import Shapes
from vision_jax.errors import UserError

SOURCE = "diffusers"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
PICKLE_FILE = "diffusion_pytorch_model.bin"
PIPELINE_FILE = "model_index.json"  # of a folder whose parts are folders of models


def fields(*classes: str, used: str, seen: str, free: str, only: dict[str, Any]) -> Fields:
    """The fields of the config of one of these classes, with those of each; see `Fields`."""
    free = f"_diffusers_version {free}"
    return Fields(used=used, seen=seen, free=free, only={"_class_name": classes, **only})


def count(shapes: Shapes, name: str) -> int:
    """How many of the names with `{i}` = 0, 1, ... are there."""
    found = 0
    while name.replace("{i}", str(found)) in shapes:
        found += 1
    return found


def number(config: Any, name: str, default: float) -> float:
    """A number of a config; null is what it is without one.

    Raises:
      UserError: something else.
    """
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"config.json: {name} {value!r} is no number")
    return float(value)
