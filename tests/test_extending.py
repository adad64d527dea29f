"""What CONTRIBUTING.md says, done: a task, a recipe, each a file and one line in one list."""

import importlib
import json
import sys
import textwrap

import numpy as np
import pytest
import runs

from vision_jax import train
from vision_jax.checkpoints import best_step
from vision_jax.config import RECIPES, TASKS, load_config
from vision_jax.logging import read_metrics

# The distance between the label and its expectation: a task whose best figure is the lowest.
TASK = '''
"""Labels in order, such as grades: squared error of the expected label."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.data.pipeline import make_eval_batches, make_train_iterator
from vision_jax.evaluation import make_run_over
from vision_jax.tasks.classification import objective as classes
from vision_jax.tasks.classification.task import (  # noqa: F401
    announce,
    batch_shapes,
    load_preprocessing,
    read_eval_source,
    read_sources,
)
from vision_jax.data.transforms import Preprocessing

best_is = "lowest"
reported = curves = ("error",)
whole = ()
labels_images = True


def best_metric(config):
    return "error"


def make_preprocessing(config, own, arguments):
    size = (config.model.image_size,) * 2
    return Preprocessing(
        image_size=size, mean=arguments["mean"], std=arguments["std"],
        interpolation="bilinear", crop_pct=1.0, crop_mode="center",
    )


def training_data(config, source, preprocessing, damage, first_batch=0):
    return make_train_iterator(
        source, batch_size=config.batch_size, preprocessing=preprocessing, crop="none",
        flip=False, seed=config.seed, num_threads=1, first_batch=first_batch,
        max_damaged=config.data.max_damaged, damage_log=damage,
    )


def expected(logits):
    return jax.nn.softmax(logits) @ jnp.arange(logits.shape[-1], dtype=logits.dtype)


def make_objective(config, model, predicts, apply, assemble, mesh):
    plain = classes.make_objective(apply, assemble, num_classes=model.num_classes)

    def criterion(trainable, outputs, view):
        return (expected(outputs["logits"]) - view["label"]) ** 2, {}

    return replace(plain, criterion=criterion)


def make_outputs(config, model, predicts, apply, assemble):
    return classes.make_outputs(apply, assemble)


@dataclass(frozen=True)
class Evaluation:
    summary: Mapping
    damaged: tuple = ()

    def line(self):
        return f"error {self.summary['error']:.4f}"

    def lines(self):
        return []

    def warnings(self, step, history):
        return []


def make_evaluate(config, outputs_fn, mesh, source, preprocessing):
    batches = partial(make_eval_batches, preprocessing=preprocessing, num_threads=1)
    run_over = make_run_over(outputs_fn, mesh, batches, batch_size=config.evaluate.batch_size)

    def evaluate(trainable, frozen, model_state):
        found, damage = run_over(source, trainable, frozen, model_state)
        error = float(np.mean((expected(found["logits"]) - found["label"]) ** 2))
        return Evaluation({"error": error}, damage.lines)

    return evaluate


def write_results(config, workdir, result, source, preprocessing):
    return {}
'''

RECIPE = '''
"""Confident predictions cost more: the negative entropy joins the losses."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from vision_jax.recipes.recipe import Recipe


@dataclass(frozen=True)
class Confidence(Recipe):
    weight: float = 0.1

    def transform(self, objective, student):
        def criterion(trainable, outputs, view):
            losses, metrics = objective.criterion(trainable, outputs, view)
            log_p = jax.nn.log_softmax(outputs["logits"])
            entropy = -(jnp.exp(log_p) * log_p).sum(-1)
            return losses - self.weight * entropy, {**metrics, "entropy": entropy.mean()}

        return replace(objective, criterion=criterion)


def make(fields):
    return Confidence()
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with both, forgotten afterwards."""
    folder = tmp_path / "somebodys"
    folder.mkdir()
    for name, text in (("__init__", ""), ("ordinal", TASK), ("confidence", RECIPE)):
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "somebodys"]:
        del sys.modules[name]


def test_a_task_and_a_recipe_are_a_file_and_a_line_each(package, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "ordinal", "somebodys.ordinal")
    monkeypatch.setitem(RECIPES, "confidence", "somebodys.confidence")
    fields = runs.overrides(recipes=("lora", "confidence"), total_steps=8, evaluate__every=2)
    known = {**fields, "task": "ordinal", "trainable": "head/.*", "lora.rules": ".*qkv/kernel"}
    config = tmp_path / "ordinal.json"
    config.write_text(json.dumps({"task": "ordinal"}))
    del known["task"]
    workdir = tmp_path / "run"
    assert train.run(load_config(str(config), known), workdir) == 0
    records = read_metrics(workdir / "metrics.jsonl")
    errors = {r["step"]: r["eval/error"] for r in records if "eval/error" in r}
    losses = [r for r in records if "train/entropy" in r]
    assert len(errors) == 4
    assert len(losses) == 8
    assert all(0 < r["train/entropy"] <= np.log(len(runs.CLASSES)) + 1e-6 for r in losses)
    kept = best_step(workdir, "error", "lowest")
    assert kept == min(errors, key=lambda step: (errors[step], -step))
