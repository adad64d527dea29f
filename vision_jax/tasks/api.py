"""What a task must offer to the one loop, and what it is given of a trained model.

A task is a folder with the same file names as the others: task.py (this protocol: data, loss,
evaluation, results), objective.py, metrics.py and, where it has its own, figures.py and
robustness.py. config/fields/field.py has the list of them.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import jax
from jax.sharding import Mesh

from vision_jax.config import TASKS
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import UserError, nearest
from vision_jax.logging import RunLog
from vision_jax.objective import Apply, Objective

Config = Any  # a ConfigDict, which task.py alone of a task's files reads


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to compute.

    Attributes:
      mesh: of the devices.
      model: the flax module.
      predicts: what its head computes (see models.families.Family).
      apply: the model as tasks call it (see objective.Apply).
      exact_apply: the same in float32, whatever the run computes in.
      assemble: arrays by path -> the parameter tree.
      arguments: (trainable, frozen, model_state) of its last or best step, the averages if it has
        any; what `Task.make_outputs` takes before a batch.
      step: updates done.
      preprocessing: of the images.
      class_names: by label.
    """

    mesh: Mesh
    model: Any
    predicts: str
    apply: Apply
    exact_apply: Apply
    assemble: Callable[[Mapping[str, Any]], Any]
    arguments: tuple[Any, Any, Any]
    step: int
    preprocessing: Any
    class_names: tuple[str, ...]


class Evaluation(Protocol):
    """What a task finds out over a dataset."""

    @property
    def summary(self) -> dict[str, Any]:
        """Figures by name, for JSON; None where there is no figure."""

    @property
    def damaged(self) -> tuple[str, ...]:
        """Names of images that could not be read."""

    def line(self) -> str:
        """The summary for the screen."""

    def lines(self) -> list[str]:
        """The details for the screen, class by class."""

    def warnings(self, step: int, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """What the user should know; `history` are the records of metrics.jsonl up to `step`."""


class Task(Protocol):
    """What the module task.py of a task offers; classification/task.py explains each by doing it.

    Attributes:
      best_is: whether the best checkpoint has the highest or the lowest `best_metric`.
      reported: of an evaluation's summary, what goes to metrics.jsonl.
      curves: of those, what curves.png shows.
      whole: of a batch, what losses count over a whole update (see steps.make_train_step).
      labels_images: whether a label is an image's, so that logits are f[B, C].
    """

    @property
    def best_is(self) -> Literal["highest", "lowest"]: ...
    @property
    def reported(self) -> tuple[str, ...]: ...
    @property
    def curves(self) -> tuple[str, ...]: ...
    @property
    def whole(self) -> tuple[str, ...]: ...
    @property
    def labels_images(self) -> bool: ...
    def best_metric(self, config: Config) -> str: ...
    def read_sources(self, config: Config) -> tuple[Any, Any]: ...
    def read_eval_source(self, config: Config, class_names: tuple[str, ...]) -> Any: ...
    def announce(self, log: RunLog, workdir: Path, train: Any, held_out: Any) -> None: ...
    def make_preprocessing(
        self, config: Config, own: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> Any: ...
    def load_preprocessing(self, record: Mapping[str, Any]) -> Any: ...
    def training_data(
        self,
        config: Config,
        source: Any,
        preprocessing: Any,
        damage: DamageLog,
        first_batch: int = 0,
    ) -> Any: ...
    def batch_shapes(
        self, config: Config, preprocessing: Any
    ) -> dict[str, jax.ShapeDtypeStruct]: ...
    def make_objective(
        self, config: Config, model: Any, predicts: str, apply: Apply, assemble: Any, mesh: Mesh
    ) -> Objective: ...
    def make_outputs(
        self, config: Config, model: Any, predicts: str, apply: Apply, assemble: Any
    ) -> Callable[..., Mapping[str, jax.Array]]: ...
    def make_evaluate(
        self, config: Config, outputs_fn: Any, mesh: Mesh, source: Any, preprocessing: Any
    ) -> Callable[..., Evaluation]: ...
    def write_results(
        self, config: Config, workdir: Path, result: Any, source: Any, preprocessing: Any
    ) -> dict[str, str]: ...
    def predict(
        self, config: Config, names: Sequence[str], trained: Trained, out: Path
    ) -> None: ...
    def robustness(
        self,
        config: Config,
        workdir: Path,
        trained: Trained,
        restore_other: Callable[[Path], Trained],
    ) -> dict[str, Any]: ...


class Calibrated(Task, Protocol):
    """A task whose models `vision_jax quantize` can measure: it gives evaluation's batches alone.

    They are an evaluation.MakeBatches.
    """

    def make_batches(
        self, config: Config, preprocessing: Any
    ) -> Callable[..., Iterator[Mapping[str, Any]]]: ...


@runtime_checkable
class Sampled(Protocol):
    """A task whose evaluations are to be seen while it trains, before the first update too."""

    def write_samples(self, workdir: Path, step: int, result: Any) -> dict[str, str]: ...


def find_task(name: str) -> Task:
    """The module of a task.

    Raises:
      UserError: no such task.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise UserError(f"unknown task {str(name)!r}{nearest(str(name), list(TASKS))}")
    return cast(Task, importlib.import_module(TASKS[name]))
