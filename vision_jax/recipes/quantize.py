"""Quantization as a recipe: a frozen base in few bits under adapters (QLoRA), or training for int8.

QLoRA is recipes=("quantize", "lora"): Dettmers et al. 2023, https://arxiv.org/abs/2305.14314. The
base is frozen, and what a run leaves is merged into its float kernels. With `train` the kernels
train as ever and are rounded in the forward pass (see trees.quantized).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

from vision_jax.recipes.recipe import Recipe
from vision_jax.trees import quantize


@dataclass(frozen=True)
class Quantize(Recipe):
    """What is quantized, and how.

    Attributes:
      form: a key of trees.quantize.FORMS.
      rules: of kernels, see trees.quantize.choose.
      keep: of kernels that stay in float. So does the one that sees the image.
      settings: of the form.
    """

    form: str
    rules: tuple[str, ...]
    keep: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def attach(self, params: Any, model: Any, key: jax.Array) -> Any:
        """Kernels -> quantized leaves.

        Raises:
          UserError: rules that match no kernel, or leave none to quantize.
        """
        del key
        stem = re.escape(getattr(model, "stem", ""))
        keep = (*self.keep, stem)
        chosen = quantize.choose(params, self.rules, keep, field="config.quantize.rules")
        return quantize.quantize(
            params, chosen, partial(quantize.FORMS[self.form], **self.settings)
        )


def make(fields: Mapping[str, Any]) -> Quantize:
    """The recipe of a config's section quantize."""
    form, dynamic = fields["quantize.form"], fields["quantize.activations"] == "int8"
    settings = {"dynamic": dynamic}
    if form == "nf4":
        settings = {
            "block_size": fields["quantize.block_size"],
            "double": fields["quantize.double"],
        }
    elif fields["quantize.train"]:
        form = f"fake_{form}"
    return Quantize(form, fields["quantize.rules"], fields["quantize.keep"], settings)
