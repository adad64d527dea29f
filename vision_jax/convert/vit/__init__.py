"""Vision Transformers: timm, torchvision, transformers, and AugReg's and big_vision's .npz files.

`TABLES` says how each names and configures them, `ZOO` which of them are certified.
"""

from vision_jax.convert.vit.tables import TABLES
from vision_jax.convert.vit.zoo import ZOO

__all__ = ["TABLES", "ZOO"]
