"""Fields for people: a config's values and where they come from, and what a field may be."""

import difflib
from collections.abc import Mapping
from typing import Any

from vision_jax.config.fields import FIELDS, TASKS, Field, fields_of
from vision_jax.config.hints import suggest
from vision_jax.config.load import Reading, fields
from vision_jax.errors import UserError


def show(reading: Reading) -> list[str]:
    """A line for each field of a config: its value, where it comes from, its help."""
    values = fields(reading.config)
    table = fields_of(values["task"])
    spelled = {name: f"{name} = {values[name]!r}" for name in table}
    widest = max(map(len, reading.origins.values()))
    return [
        f"{spelled[name]:44}  {reading.origins[name]:{widest}}  # {field.help}"
        for name, field in table.items()
    ]


def explain(name: str) -> list[str]:
    """What a field may be, all those of a section, or of "" all there are.

    Raises:
      UserError: no such field or section, with the nearest one.
    """
    found = [
        field
        for field in FIELDS
        if not name or field.name == name or field.name.startswith(f"{name}.")
    ]
    if not found:
        known = list(dict.fromkeys(field.name for field in FIELDS))
        sections = {one.partition(".")[0] for one in known if "." in one}
        near = difflib.get_close_matches(name, sections, n=1, cutoff=0.75)
        hint = f": did you mean `{near[0]}`?" if near else suggest(name, known)
        raise UserError(f"--help-config: there is no field or section `{name}`{hint}")
    return [line for field in found for line in _block(field)]


def _block(field: Field) -> list[str]:
    kind = type(field.default).__name__
    limits = "" if field.check.wanted == "anything" else f", {field.check.wanted}"
    tasks = ", ".join(field.tasks or TASKS)
    return [
        field.name,
        f"  help     {field.help}",
        f"  default  {_defaults(field.default, field.instead)}",
        f"  type     {kind}{limits}",
        f"  tasks    {tasks}",
    ]


def _defaults(default: Any, instead: Mapping[str, Any]) -> str:
    """One default, and those of tasks that have another.

    Examples:
      >>> _defaults(0.001, {"detection": 0.0001})
      '0.001; of detection 0.0001'
    """
    return "; of ".join([repr(default), *(f"{task} {value!r}" for task, value in instead.items())])
