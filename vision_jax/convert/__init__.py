"""PyTorch checkpoints in and out."""

from vision_jax.convert.load import (
    arguments_of,
    class_names_of,
    export_weights,
    import_weights,
    recognize,
    write_safetensors,
)
from vision_jax.convert.read import Weights, read_weights

__all__ = [
    "Weights",
    "arguments_of",
    "class_names_of",
    "export_weights",
    "import_weights",
    "read_weights",
    "recognize",
    "write_safetensors",
]
