"""Masks as a recipe: weights that are small when training begins are zero, and stay so."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from vision_jax.recipes.recipe import Recipe
from vision_jax.trees import quantize
from vision_jax.trees.leaf import Leaf
from vision_jax.trees.masked import to_masked, to_n_of_m


@dataclass(frozen=True)
class Mask(Recipe):
    """What is masked, and how.

    Attributes:
      form: "magnitude", anywhere in a kernel; or "2:4", two of four inputs of an output.
      share: of a kernel's weights that are zero, by magnitude.
      rules: of kernels, see trees.quantize.choose.
      keep: of kernels that stay whole. So does the one that sees the image.
    """

    form: str
    share: float
    rules: tuple[str, ...]
    keep: tuple[str, ...]

    def attach(self, params: Any, model: Any, key: jax.Array) -> Any:
        """Kernels -> kernels with zeros.

        Raises:
          UserError: rules that match no kernel or leave none, or inputs that 4 does not divide.
        """
        del key
        keep = (*self.keep, re.escape(getattr(model, "stem", "")))
        chosen = quantize.choose(params, self.rules, keep, field="config.mask.rules")

        def make(kernel: jax.Array) -> Leaf:
            return to_n_of_m(kernel) if self.form == "2:4" else to_masked(kernel, self.share)

        return quantize.quantize(params, chosen, make)


def make(fields: Mapping[str, Any]) -> Mask:
    """The recipe of a config's section mask."""
    return Mask(*(fields[f"mask.{name}"] for name in ("form", "share", "rules", "keep")))
