"""PyTorch checkpoints in and out."""

from vision_jax.convert.load import (
    class_names_of,
    export_vit,
    import_vit,
    infer_vit_arguments,
    write_safetensors,
)
from vision_jax.convert.read import Weights, read_weights

__all__ = [
    "Weights",
    "class_names_of",
    "export_vit",
    "import_vit",
    "infer_vit_arguments",
    "read_weights",
    "write_safetensors",
]
