"""The tensors of a backbone inside a larger model's file, by the table of the backbone's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vision_jax.convert.engine import Fixed, Rule
from vision_jax.convert.table import Arguments, Metadata, Shapes, Table
from vision_jax.errors import UserError
from vision_jax.models.backbone import FIXED
from vision_jax.models.families import FAMILIES

_IMAGES = ("in_channels", "mean", "std")
_HEADS = ("head/", "pre_logits/")


@dataclass(frozen=True)
class Backbone:
    """How a backbone is called in files of the models that have it.

    Attributes:
      table: of the backbone's own files.
      name: how its tensors begin, such as "backbone.".
      structure: those of its arguments that the model has too, beside those that it keeps as
        `encoder_arguments`; others have their defaults.
      bare: how they begin in its own files, which `name` takes the place of.
      fixed: its arguments -> more that it has in such models and not by default.
    """

    table: Table
    name: str
    structure: tuple[str, ...] = ()
    bare: str = ""
    fixed: Callable[[Arguments], Mapping[str, Any]] = lambda arguments: {}

    def arguments(self, arguments: Arguments) -> dict[str, Any]:
        """Its arguments, of those of the model."""
        defaults = FAMILIES[self.table.family].defaults
        pairs = dict(arguments.get("encoder_arguments", ()))
        own = {name: arguments[name] for name in (*self.structure, *_IMAGES)} | pairs
        shared = {name: value for name, value in FIXED.items() if name in defaults}
        return {**defaults, **shared, **self.fixed(own), **own, "num_classes": 0}

    def rules(self, arguments: Arguments) -> list[Rule | Fixed]:
        """Rules of all of its tensors, none of a head."""

        def named(name: str) -> str:
            return self.name + name.removeprefix(self.bare)

        rules: list[Rule | Fixed] = []
        for rule in self.table.with_prefix("").rules(self.arguments(arguments)):
            if isinstance(rule, Fixed):
                rules.append(replace(rule, name=named(rule.name)))
            elif not rule.paths[0].startswith(_HEADS):
                paths = tuple(f"backbone/{path}" for path in rule.paths)
                rules.append(replace(rule, names=tuple(map(named, rule.names)), paths=paths))
        return rules

    def modules(self, arguments: Arguments) -> dict[str, str]:
        """The source's modules of its named intermediates."""
        modules = self.table.with_prefix("").modules(self.arguments(arguments))
        return {
            own: self.name + name.removeprefix(self.bare)
            for own, name in modules.items()
            if own != "pooled"
        }

    def shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Of a file's tensors those of the backbone, by the names of its own files."""
        return {
            self.bare + name.removeprefix(self.name): shape
            for name, shape in shapes.items()
            if name.startswith(self.name)
        }

    def read(self, shapes: Shapes, metadata: Metadata, what: str) -> dict[str, Any]:
        """The arguments that its tensors say; `what` it is inside of, for messages.

        Raises:
          UserError: a backbone that the model can't have.
        """
        found = self.table.arguments(self.shapes(shapes), metadata)
        names = (*self.structure, "in_channels")
        fixed = {**FAMILIES[self.table.family].defaults, **self.fixed(found)}
        for name, value in found.items():
            if name not in (*names, "num_classes") and value != fixed.get(name, value):
                raise UserError(
                    f"the backbone is a {self.table.family} with {name} {value}: not supported in"
                    f" a {what}"
                )
        return {name: found[name] for name in names if name in found}


def table_of(tables: tuple[Table, ...], source: str) -> Table:
    """The first table of a source."""
    return next(table for table in tables if table.source == source)
