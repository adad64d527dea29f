"""Swin Transformers: timm, Microsoft's own files, torchvision, and transformers.

`TABLES` says how each names and configures them, `ZOO` which of them are certified.
"""

from vision_jax.convert.swin.tables import TABLES
from vision_jax.convert.swin.zoo import ZOO

__all__ = ["TABLES", "ZOO"]
