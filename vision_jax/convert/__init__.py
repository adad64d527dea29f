"""PyTorch checkpoints in and out."""

from vision_jax.convert.load import (
    arguments_of,
    assumptions,
    class_names_of,
    export_weights,
    import_weights,
    load_model,
    ranks_of,
    recognize,
    remarks,
    unknown_fields,
    variables_of,
    write_safetensors,
)
from vision_jax.convert.read import Weights, read_weights
from vision_jax.convert.tables import is_held, own_naming

__all__ = [
    "Weights",
    "arguments_of",
    "assumptions",
    "class_names_of",
    "export_weights",
    "import_weights",
    "is_held",
    "load_model",
    "own_naming",
    "ranks_of",
    "read_weights",
    "recognize",
    "remarks",
    "unknown_fields",
    "variables_of",
    "write_safetensors",
]
