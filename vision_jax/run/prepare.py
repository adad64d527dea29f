"""config -> Run: everything that a step needs, and no array yet.

    description -> model -> recipes, checked -> layout of the parameters -> optimizer -> state

Training, restoring, planning and caching teacher outputs all begin here. A ConfigDict goes no
deeper than this folder, the tasks' task.py and what these share: what lies below takes named
arguments.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax import convert, optim, sharding, steps
from vision_jax.config import fields, replaced, updates_a_step
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import UserError
from vision_jax.models import families
from vision_jax.models.families import FAMILIES
from vision_jax.objective import Objective, make_loss
from vision_jax.ops.traced import is_on
from vision_jax.recipes.distillation import objective as distillation
from vision_jax.recipes.recipe import Recipe, Student, make_recipes
from vision_jax.run.description import Description, build_model, describe, read_weights
from vision_jax.run.parameters import Flat, Parameters, make_parameters, plan_parameters
from vision_jax.tasks.api import Task, Trained, find_task
from vision_jax.trees import factored, paths


@dataclass(frozen=True)
class Run:
    """A prepared run.

    Attributes:
      config: all fields, locked.
      task: the module of config.task (tasks/api.py).
      mesh: of the devices.
      weights: what a new run's parameters come from; None: random initialization, or another run.
      description: of the model.
      model: the flax module.
      student: what recipes know of it.
      recipes: in the order in which they are applied.
      parameters: which there are, trainable and frozen, with their shardings.
      schedule: learning rate by update.
      tx: the optimizer of what trains, an optax.GradientTransformation.
      abstract_state: ShapeDtypeStructs of the state with shardings: the target of a restore.
      shardings: of the state.
    """

    config: ConfigDict
    task: Task
    mesh: Mesh
    weights: convert.Weights | None
    description: Description
    model: Any
    student: Student
    recipes: tuple[Recipe, ...]
    parameters: Parameters
    schedule: optim.Schedule
    tx: Any
    abstract_state: steps.TrainState
    shardings: Any

    # The objective and the step -------------------------------------------------------------------

    @cached_property
    def plain_objective(self) -> Objective:
        """The objective of the task, before recipes change it."""
        names = dict.fromkeys(name for recipe in self.recipes for name in recipe.features)
        model = self.model.clone(scan=self.enter_block) if self.looped else self.model
        assemble = partial(self.parameters.assemble_used, but=self.looped)
        apply = families.make_apply(model, tuple(names))
        return self.task.make_objective(
            self.config, self.model, self.student.predicts, apply, assemble, self.mesh
        )

    @cached_property
    def looped(self) -> str:
        """Regular expression of the parameters that are laid out for use in a loop; "" for none."""
        plain = all(place.is_fully_replicated for place in self.parameters.shardings.values())
        return self.model.looped if getattr(self.model, "scan", False) and not plain else ""

    @cached_property
    def enter_block(self) -> Callable[[Any, str], Any]:
        """(a block's parameters, its path with a slash) -> as layers use them, inside of a loop."""
        gather, tensor = sharding.make_gather(self.parameters.shardings), self.parameters.tensor

        def enter(params: Any, prefix: str) -> Any:
            whole = paths.unflatten(params, gather(paths.flatten(params), prefix))
            return tensor.enter(whole, prefix)

        return enter

    @cached_property
    def loss_fn(self) -> steps.LossFn:
        """The loss of a training step: the task's objective, changed by each recipe in turn."""

        def change(objective: Objective, recipe: Recipe) -> Objective:
            return recipe.transform(objective, self.student)

        loss_fn = make_loss(reduce(change, self.recipes, self.plain_objective))
        keep = bool(self.looped) and self.model.remat
        return sharding.gather_in(loss_fn, self.parameters.shardings, self.looped, keep=keep)

    def make_train_step(self) -> Any:
        """(state, frozen, batch) -> (state, metrics), compiled; see steps.make_train_step."""
        options = [recipe.step for recipe in self.recipes]
        average = self.plain_objective.average
        prefixes = [average.prefix] if average else [o.average_prefix for o in options]
        return steps.make_train_step(
            self.loss_fn,
            self.tx,
            seed=self.config.seed,
            schedule=self.schedule,
            accumulate=self.config.optim.accumulate,
            whole=self.task.whole,
            counted=self.plain_objective.counted,
            ema_decay=self.config.optim.ema_decay,
            replay=next((o.replay for o in options if o.replay is not None), None),
            average_decay=average.decay if average else None,
            average_prefix=next((prefix for prefix in prefixes if prefix), ""),
            shardings=self.shardings,
        )

    def at(self, numbers: Mapping[str, Any]) -> "Run":
        """The run with fields at other values, traced ones too, that change no array's shape.

        Whoever gives them has checked them.
        """
        config = replaced(self.config, numbers)
        rates = ("dropout", "drop_path")  # a model is not built anew: it would check a number
        changed = {name: config.model[name] for name in rates if f"model.{name}" in numbers}
        model = self.model.clone(**changed) if changed else self.model
        schedule = make_schedule(config)
        tx = make_optimizer(config, model, self.parameters.abstract()[0], schedule)
        return replace(
            self,
            config=config,
            model=model,
            student=replace(self.student, model=model),
            recipes=_make_recipes(config, self.adapter),
            schedule=schedule,
            tx=tx,
        )

    # Arrays ---------------------------------------------------------------------------------------

    def attach(self, params: Any, key: jax.Array) -> Any:
        """The model's tree with the recipes' structured leaves."""
        return _attach(self.recipes, self.model, self.description.ranks, params, key)

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter that it begins with."""
        return next((r.adapter for r in self.recipes if r.adapter is not None), None)

    def make_arrays(self) -> tuple[steps.TrainState, Flat, list[str]]:
        """(the first state, frozen parameters, paths drawn at random though there are weights)."""
        size = self.description.preprocessing.image_size
        trainable, frozen, model_state, fresh = make_parameters(
            self.config, self.model, size, self.parameters, self.mesh, self.weights, self.attach
        )
        return self.make_state(trainable, model_state), frozen, fresh

    def make_state(self, trainable: Flat, model_state: Any) -> steps.TrainState:
        """The state before the first step, with its shardings; the arrays given are donated."""
        make = _state_maker(self.config, self.tx, self.model)
        made = jax.jit(make, out_shardings=self.shardings, donate_argnums=(0, 1))
        return made(trainable, model_state)

    def place_beside(self) -> Flat:
        """The frozen arrays that recipes bring: teachers."""
        return {p: leaf for recipe in self.recipes for p, leaf in recipe.place(self.mesh).items()}

    def abstract_beside(self) -> Flat:
        """ShapeDtypeStructs of the frozen arrays that recipes bring, by path."""
        return {p: leaf for r in self.recipes for p, leaf in r.abstract(self.mesh).items()}

    # Data -----------------------------------------------------------------------------------------

    @cached_property
    def views(self) -> Any:
        """The preprocessing of the images that are read, as large as a recipe wants them."""
        own = self.description.preprocessing
        size = own.image_size
        for recipe in self.recipes:
            size = recipe.view_size(size)
        return own if size == own.image_size else replace(own, image_size=size)

    @cached_property
    def stored(self) -> Callable[[int], dict[str, np.ndarray]] | None:
        """From the number of a step to arrays that recipes add to its batch; None without any."""
        opened = [recipe.open_stored(self.views) for recipe in self.recipes]
        found = [read for read in opened if read is not None]
        if not found:
            return None
        return lambda step: {name: x for read in found for name, x in read(step).items()}

    def training_data(self, source: Any, damage: DamageLog, first_batch: int = 0) -> Any:
        """Endless batches of this process, from `first_batch` on."""
        return self.task.training_data(self.config, source, self.views, damage, first_batch)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch's ShapeDtypeStructs, over all processes and split among the devices."""
        split = sharding.batch_sharding(self.mesh)
        shapes = self.task.batch_shapes(self.config, self.views)
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split)
            for name, leaf in shapes.items()
        }

    # Evaluation -----------------------------------------------------------------------------------

    @cached_property
    def outputs_fn(self) -> Callable[..., Mapping[str, jax.Array]]:
        """(trainable, frozen, model_state, batch) -> what evaluation needs of the batch."""
        apply = families.make_apply(self.model)
        return self.task.make_outputs(
            self.config, self.model, self.student.predicts, apply, self.parameters.assemble_used
        )

    def make_evaluate(self, source: Any) -> Callable[..., Any]:
        """A function (trainable, frozen, model_state) -> Evaluation over the whole source."""
        return self.task.make_evaluate(
            self.config, self.outputs_fn, self.mesh, source, self.description.preprocessing
        )

    def trained(self, state: steps.TrainState, frozen: Flat) -> Trained:
        """The model with these arrays, as tasks use it."""
        exact = self.config.copy_and_resolve_references()
        exact.model.dtype = "float32"
        trainable, model_state = steps.averaged(state)
        return Trained(
            mesh=self.mesh,
            model=self.model,
            predicts=self.student.predicts,
            apply=families.make_apply(self.model),
            exact_apply=families.make_apply(build_model(exact, self.description)),
            assemble=self.parameters.assemble,
            arguments=(trainable, frozen, model_state),
            step=int(state.step),
            preprocessing=self.description.preprocessing,
            class_names=self.description.class_names,
        )


def prepare(
    config: ConfigDict,
    class_names: tuple[str, ...] | None = None,
    *,
    weights: convert.Weights | None = None,
    description: Description | None = None,
    adapter: Path | None = None,
    mesh: Mesh | None = None,
    training: bool = True,
) -> Run:
    """Prepares a run, so that nothing is left but arrays, data and steps.

    Args:
      config: the run's.
      class_names: of the data; None reads the data for them.
      weights: those of the config, if they have been read already.
      description: of a model that there is already: of a run's workdir, or one planned without its
        weights. None describes what the config names.
      adapter: the folder of the adapter that the run began with, where it is not the one that
        config.lora.init_from names: a workdir's copy.
      mesh: of the devices; None takes the config's.
      training: whether it is to train. Else its recipes are not checked, and no teacher is read.

    Raises:
      UserError: what the config asks for cannot be made or trained, with the reason.
    """
    task = find_task(config.task)
    mesh = mesh or sharding.make_mesh(**config.mesh)
    if training:
        _check_batch(config, mesh)
    if description is None:
        names = class_names
        if names is None:
            names = task.read_sources(config)[0].class_names
        weights = weights or read_weights(config)
        description = describe(config, weights, names)
    model = build_model(config, description)
    recipes = _make_recipes(config, adapter)
    family = FAMILIES[description.family]
    student = Student(
        config.task,
        task.labels_images,
        model,
        description.family,
        family.predicts,
        description.preprocessing.image_size,
        description.class_names,
    )
    if training:
        for recipe in recipes:
            recipe.check(student)
        description = _with_recipes(description, recipes, student, _made_with(task, config))
    parameters = plan_parameters(
        model,
        student.image_size,
        mesh,
        attach=partial(_attach, recipes, model, description.ranks),
        rules=config.trainable,
        sharding_rules=config.sharding_rules,
        projections=description.projections,
    )
    trainable, _ = parameters.abstract()
    schedule = make_schedule(config)
    tx = make_optimizer(config, model, trainable, schedule)
    abstract_state, shardings = _abstract_state(_state_maker(config, tx, model), parameters, mesh)
    return Run(
        config,
        task,
        mesh,
        weights,
        description,
        model,
        student,
        recipes,
        parameters,
        schedule,
        tx,
        abstract_state,
        shardings,
    )


def _check_batch(config: ConfigDict, mesh: Mesh) -> None:
    parts = sharding.batch_parts(mesh)
    if config.batch_size % (parts * config.optim.accumulate):
        raise UserError(
            f"config.batch_size {config.batch_size} does not divide among {parts} "
            f"{'devices' if parts == mesh.size else 'groups of devices'} and "
            f"config.optim.accumulate {config.optim.accumulate}"
        )


def _make_recipes(config: ConfigDict, adapter: Path | None) -> tuple[Recipe, ...]:
    values = fields(config)
    if adapter is not None:
        values["lora.init_from"] = str(adapter)
    return make_recipes(config.recipes, values)


def _made_with(task: Task, config: ConfigDict) -> tuple[tuple[str, str], ...]:
    """(origin, sha256) of frozen weights that the task reads by itself: an autoencoder's, say."""
    return getattr(task, "made_with", lambda config: ())(config)


def _with_recipes(
    description: Description,
    recipes: tuple[Recipe, ...],
    student: Student,
    beside: tuple[tuple[str, str], ...],
) -> Description:
    """The description of a run with these recipes: their teachers, and what trains beside."""
    return replace(
        description,
        teachers=(*(pair for recipe in recipes for pair in recipe.sources()), *beside),
        projections={p: s for recipe in recipes for p, s in recipe.beside(student).items()},
    )


def _attach(
    recipes: tuple[Recipe, ...], model: Any, ranks: Mapping[str, int], params: Any, key: jax.Array
) -> Any:
    params = factored.factorize(params, ranks)
    for recipe in recipes:
        params = recipe.attach(params, model, key)
    return params


def make_schedule(config: ConfigDict) -> optim.Schedule:
    """The learning rate by the index of the update, of which a step may make several."""
    settings = config.optim
    updates = updates_a_step(fields(config))
    return optim.make_schedule(
        settings.schedule,
        peak=settings.lr,
        total_steps=config.total_steps * updates,
        warmup_steps=settings.warmup_steps,
        drop_at=settings.drop_at,
    )


def _decay_schedule(config: ConfigDict) -> optim.Schedule | None:
    """Weight decay by the index of the update; None where it stays."""
    settings = config.optim
    if not is_on(settings.final_weight_decay):
        return None
    return partial(
        optim.half_cosine,
        first=settings.weight_decay,
        last=settings.final_weight_decay,
        total_steps=config.total_steps * updates_a_step(fields(config)),
    )


def make_optimizer(
    config: ConfigDict, model: Any, trainable: Flat, schedule: optim.Schedule
) -> Any:
    """The optax transformation of the config at these learning rates, for these arrays."""
    settings = config.optim
    return optim.make_optimizer(
        settings.name,
        schedule=schedule,
        params=trainable,
        weight_decay=settings.weight_decay,
        decay_schedule=_decay_schedule(config),
        b1=settings.b1,
        b2=settings.b2,
        momentum=settings.momentum,
        clip_norm=settings.clip_norm,
        # What brings features to the teacher's learns at the head's rate.
        layer_of=lambda path: (
            model.num_layers - 1 if distillation.is_beside(path) else model.layer_of(path)
        ),
        num_layers=model.num_layers,
        layer_decay=settings.layer_decay,
        lr_multipliers=settings.lr_multipliers,
    )


def _state_maker(
    config: ConfigDict, tx: Any, model: Any
) -> Callable[[Flat, Any], steps.TrainState]:
    """(trainable, model_state) -> the state before the first step."""
    return partial(
        steps.make_state,
        tx=tx,
        ema=is_on(config.optim.ema_decay),
        averages_state=getattr(model, "averages_state", True),
    )


def _abstract_state(
    make: Callable[[Flat, Any], steps.TrainState], parameters: Parameters, mesh: Mesh
) -> tuple[steps.TrainState, Any]:
    """(ShapeDtypeStructs with shardings: the target of a restore, the shardings alone)."""
    trainable, _ = parameters.abstract()
    shapes = jax.eval_shape(make, trainable, parameters.model_state)
    shardings = sharding.state_shardings(shapes, parameters.shardings, mesh)
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )
    return target, shardings
