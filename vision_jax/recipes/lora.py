"""LoRA and DoRA as a recipe: low-rank adapters on the kernels that rules choose, or somebody's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from vision_jax import convert
from vision_jax.checksums import verify_checksums
from vision_jax.convert import peft
from vision_jax.errors import UserError
from vision_jax.models import families
from vision_jax.recipes.recipe import Recipe
from vision_jax.trees import lora


@dataclass(frozen=True)
class Lora(Recipe):
    """Adapters of a run.

    Attributes:
      settings: of new ones, as `trees.lora.attach` takes them.
      adapter: the folder of those to start from, in PEFT's layout; None for new ones.
    """

    settings: Mapping[str, Any]
    adapter: Path | None = None

    def attach(self, params: Any, model: Any, key: jax.Array) -> Any:
        """Kernels -> low-rank leaves that compute the same at first, or what the adapter says.

        Raises:
          UserError: rules that match nothing, or a kernel whose adapter PEFT has no place for; or
            an adapter of another model.
        """
        family, arguments = families.family_of(model), convert.arguments_of(model)
        if self.adapter is not None:
            plain = lora.merge(params)
            read = peft.read_adapter(self.adapter, plain, family=family, arguments=arguments)
            return lora.move_adapters(read, params)
        attached = lora.attach(params, key=key, **self.settings)
        homeless = peft.without_module(lora.detach(attached)[1], family, arguments)
        if homeless:
            raise UserError(
                f"config.lora.rules: {homeless[0]} is no layer of its own in the files of "
                f"{family}, so that PEFT has no place for its adapter: take a rule that leaves it "
                f"out, such as (?!{homeless[0]}$).*kernel"
            )
        return attached

    def lines(self) -> list[str]:
        """Where an adapter comes from."""
        return [] if self.adapter is None else [f"adapter: {self.adapter}"]


def make(fields: Mapping[str, Any]) -> Lora:
    """The recipe of a config's section lora.

    Raises:
      UserError: lora.init_from holds no adapter, or a damaged one.
    """
    names = ("rules", "rank", "alpha", "rank_stabilized", "dropout", "dora", "qkv_parts")
    settings = {name: fields[f"lora.{name}"] for name in names}
    if not fields["lora.init_from"]:
        return Lora(settings)
    folder = Path(fields["lora.init_from"]).expanduser()
    if not (folder / peft.CONFIG_FILE).is_file():
        raise UserError(f"config.lora.init_from: {folder} holds no {peft.CONFIG_FILE}")
    if folder.name == "adapter":  # of a run, whose folder has its checksums
        verify_checksums(folder.parent, only="adapter/")
    return Lora(settings, folder)
