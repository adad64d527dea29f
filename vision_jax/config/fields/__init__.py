"""Every field of a config once: its default, what it must be, and a line of help.

A config is these fields with what its file changes. `vision_jax --help-config` prints them, in this
order.
"""

from dataclasses import replace

from vision_jax.config.fields import (
    compression,
    data,
    evaluation,
    generation,
    losses,
    model,
    optimizer,
    pretraining,
    recipes,
    run,
)
from vision_jax.config.fields.field import (
    FEATURES,
    FILTERS,
    HEADS,
    RECIPES,
    TASKS,
    Check,
    Field,
    Value,
)

FIELDS = (
    *run.FIELDS,
    *model.FIELDS,
    *compression.FIELDS,
    *recipes.FIELDS,
    *optimizer.FIELDS,
    *data.FIELDS,
    *losses.FIELDS,
    *pretraining.FIELDS,
    *generation.FIELDS,
    *evaluation.FIELDS,
)


def fields_of(task: str) -> dict[str, Field]:
    """The fields of a task by name, each with the default that it has there."""
    table = {
        one.name: replace(one, default=one.instead.get(task, one.default))
        for one in FIELDS
        if one.tasks is None or task in one.tasks
    }
    return table | {"task": replace(table["task"], default=task)}


__all__ = [
    "FEATURES",
    "FIELDS",
    "FILTERS",
    "HEADS",
    "RECIPES",
    "TASKS",
    "Check",
    "Field",
    "Value",
    "fields_of",
]
