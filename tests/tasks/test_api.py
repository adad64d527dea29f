"""Every task offers what the loop asks for, by the same names of parameters; every recipe too."""

import importlib
import inspect

import pytest

from vision_jax.config import RECIPES, TASKS, default_config
from vision_jax.errors import UserError
from vision_jax.recipes.recipe import Recipe
from vision_jax.tasks.api import Task, find_task

METHODS = [name for name, value in vars(Task).items() if inspect.isfunction(value)]
# Of each task; figures.py and robustness.py are there where a task has its own.
FILES = ("task", "objective", "metrics")


@pytest.mark.parametrize("name", TASKS)
def test_a_task_offers_what_the_protocol_asks_for(name):
    task = find_task(name)
    for method in METHODS:
        if method.startswith("_"):
            continue
        wanted = list(inspect.signature(getattr(Task, method)).parameters)[1:]  # without self
        assert list(inspect.signature(getattr(task, method)).parameters) == wanted, method
    assert task.best_metric(default_config(name)) in task.reported
    assert set(task.curves) <= set(task.reported)
    assert task.best_is in ("highest", "lowest")
    assert isinstance(task.labels_images, bool)
    assert isinstance(task.whole, tuple)


@pytest.mark.parametrize("name", TASKS)
def test_the_files_of_a_task_have_the_same_names(name):
    package = TASKS[name].rpartition(".")[0]
    for file in FILES:
        importlib.import_module(f"{package}.{file}")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_overrides_what_the_protocol_has_with_the_same_parameters(name):
    module = importlib.import_module(RECIPES[name])
    made = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Recipe) and value is not Recipe
    ]
    assert made
    assert list(inspect.signature(module.make).parameters) == ["fields"]
    for method, value in vars(Recipe).items():
        if inspect.isfunction(value):
            wanted = list(inspect.signature(value).parameters)
            for recipe in made:
                found = list(inspect.signature(getattr(recipe, method)).parameters)
                assert found == wanted, method


def test_an_unknown_task_is_one_line_with_the_nearest():
    with pytest.raises(UserError, match="did you mean `detection`"):
        find_task("detecton")
