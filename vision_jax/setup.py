"""From a config to values: data, model, parameters. Nothing called from here sees the config.

The order is DESIGN's: shapes by `eval_shape`, shardings on the abstract tree, weights imported
strictly, the rest initialized where it will live, adapters attached, then trainable and frozen.
"""

import dataclasses
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from vision_jax import classify, convert, detect, optim, sharding, shrink, steps, teach
from vision_jax.checksums import verify_checksums
from vision_jax.config import read_json, write_json
from vision_jax.convert import load, peft
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import UserError, nearest
from vision_jax.logging import RunLog
from vision_jax.models import families
from vision_jax.models.families import (
    DTYPES,
    FAMILIES,
    RUN_ARGUMENTS,
    find_variant,
    initialize,
)
from vision_jax.recipes import adversarial, distillation, objective
from vision_jax.recipes.objective import Objective
from vision_jax.tasks.classification import Apply
from vision_jax.trees import lora, paths
from vision_jax.trees.leaf import trainable_paths

Flat = dict[str, Any]

ADAPTER_COPY = "initial_adapter"  # in the workdir


@dataclass(frozen=True)
class Description:
    """What a workdir must remember to rebuild its model without the weights: WORKDIR/model.json.

    Attributes:
      task: a key of TASKS.
      family: the architecture's name in models.families.FAMILIES.
      arguments: of the model, without RUN_ARGUMENTS.
      preprocessing: of the images.
      class_names: by label.
      weights: where the parameters came from, "" for random initialization.
      sha256: of the weights' file or files, "" without.
      teachers: (origin, sha256) of each teacher.
      projections: shapes of the arrays that train beside the model's own, by path.
      started_from: the run and its step that this one began with (--from), "" without.
      assumed: of weights that no config came with, what their tensors don't show.
    """

    task: str
    family: str
    arguments: dict[str, Any]
    preprocessing: Any
    class_names: tuple[str, ...]
    weights: str
    sha256: str
    teachers: tuple[tuple[str, str], ...] = ()
    projections: dict[str, tuple[int, int]] = field(default_factory=dict)
    started_from: str = ""
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameters:
    """The layout of a run's parameters, before any array exists.

    Attributes:
      like: the tree with adapters attached, of ShapeDtypeStructs.
      model_state: the BatchNorm statistics' tree, {} without.
      shardings: of the parameters, by path.
      trainable: paths that the optimizer changes.
      projections: ShapeDtypeStructs of what trains besides, by path.
    """

    like: Any
    model_state: Any
    shardings: dict[str, NamedSharding]
    trainable: frozenset[str]
    projections: dict[str, jax.ShapeDtypeStruct]

    def assemble(self, flat: Mapping[str, Any]) -> Any:
        """The model's tree from all its arrays by path; those of recipes are left out."""
        own = {path: leaf for path, leaf in flat.items() if not distillation.is_beside(path)}
        return paths.unflatten(self.like, own)

    def abstract(self) -> tuple[Flat, Flat]:
        """(trainable, frozen) ShapeDtypeStructs with shardings: targets for a restore."""
        flat = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.shardings[path])
            for path, leaf in (paths.flatten(self.like) | self.projections).items()
        }
        return paths.partition(flat, set(self.trainable))


@dataclass(frozen=True)
class Trained:
    """A finished run's model, ready to compute.

    Attributes:
      mesh: of the devices.
      description: of the model.
      model: the flax module.
      apply: the model as tasks call it (see tasks.classification.Apply).
      exact_apply: the same in float32, whatever the run computes in.
      assemble: arrays by path -> the parameter tree.
      outputs_fn: what evaluation needs of a batch.
      state: of its last or best step.
      frozen: parameters that were not trained, by path.
    """

    mesh: Mesh
    description: Description
    model: Any
    apply: Apply
    exact_apply: Apply
    assemble: Callable[[Mapping[str, Any]], Any]
    outputs_fn: Callable[..., Mapping[str, jax.Array]]
    state: steps.TrainState
    frozen: Flat

    @property
    def arguments(self) -> tuple[Any, Any, Any]:
        """What `outputs_fn` takes before the batch."""
        trainable, model_state = steps.averaged(self.state)
        return trainable, self.frozen, model_state


# Task -------------------------------------------------------------------------------------------


class Evaluation(Protocol):
    """What a task finds out over a dataset."""

    @property
    def summary(self) -> dict[str, Any]:
        """Figures by name, for JSON."""

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
    """What a module must offer to be a task of the loop: classify.py explains each by doing it."""

    @property
    def best_metric(self) -> str: ...
    @property
    def reported(self) -> tuple[str, ...]: ...
    @property
    def curves(self) -> tuple[str, ...]: ...
    @property
    def whole(self) -> tuple[str, ...]: ...
    def read_sources(self, config: ConfigDict) -> tuple[Any, Any]: ...
    def read_eval_source(self, config: ConfigDict, class_names: tuple[str, ...]) -> Any: ...
    def announce(self, log: RunLog, workdir: Path, train: Any, held_out: Any) -> None: ...
    def make_preprocessing(
        self, config: ConfigDict, own: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> Any: ...
    def load_preprocessing(self, record: Mapping[str, Any]) -> Any: ...
    def training_data(
        self,
        config: ConfigDict,
        source: Any,
        preprocessing: Any,
        damage: DamageLog,
        first_batch: int = 0,
    ) -> Any: ...
    def batch_shapes(self, config: ConfigDict, preprocessing: Any) -> dict[str, Any]: ...
    def make_objective(
        self, config: ConfigDict, model: Any, apply: Any, assemble: Any
    ) -> Objective: ...
    def make_outputs(self, config: ConfigDict, model: Any, apply: Any, assemble: Any) -> Any: ...
    def make_evaluate(
        self, config: ConfigDict, outputs_fn: Any, mesh: Mesh, source: Any, preprocessing: Any
    ) -> Callable[..., Evaluation]: ...
    def write_results(
        self, config: ConfigDict, workdir: Path, result: Any, source: Any, preprocessing: Any
    ) -> dict[str, str]: ...
    def predict(
        self,
        config: ConfigDict,
        names: Sequence[str],
        outputs_fn: Any,
        arguments: tuple[Any, Any, Any],
        mesh: Mesh,
        preprocessing: Any,
        class_names: Sequence[str],
        out: Path,
    ) -> None: ...
    def robustness(
        self,
        config: ConfigDict,
        workdir: Path,
        trained: Trained,
        restore_other: Callable[[Path], Trained],
    ) -> dict[str, Any]: ...


TASKS: dict[str, Task] = {"classification": classify, "detection": detect}


def find_task(config: ConfigDict) -> Task:
    """The module of the config's task."""
    return TASKS[config.task]


# Model ------------------------------------------------------------------------------------------


def read_weights(config: ConfigDict) -> convert.Weights | None:
    """The weights that the config names, or None for random initialization."""
    if not config.model.weights:
        return None
    return convert.read_weights(
        config.model.weights,
        allow_pickle=config.model.allow_pickle,
        dropped=config.model.drop,
    )


def _architecture(
    config: ConfigDict, weights: convert.Weights | None
) -> tuple[str, dict[str, Any]]:
    """(family, arguments) of the weights' model, with what the config names beside or instead."""
    model = config.model
    family = ""
    arguments: dict[str, Any] = {}
    if weights is not None:
        family, arguments = convert.recognize(weights)
    if model.variant:
        named, sizes = find_variant(model.variant)
        if family not in ("", named):
            raise UserError(
                f"config.model.variant {model.variant!r} is a {named}, and "
                f"{config.model.weights} a {family}: leave the variant out"
            )
        family, arguments = named, arguments | sizes
    if not family:
        raise UserError(
            "the architecture is unknown: set config.model.variant, for example 'resnet50' or "
            "'b/16', or take weights that carry it"
        )
    return family, arguments | _checked_arguments(model.arguments, FAMILIES[family].arguments)


def find_shrinking(config: ConfigDict, weights: convert.Weights | None) -> shrink.Shrinking | None:
    """What the config leaves of a bigger model, whose weights it names; None: all.

    Raises:
      UserError: no weights, or layers or sizes that they cannot give.
    """
    model = config.model
    if not (model.layers or model.width or model.mlp_width):
        return None
    if not model.weights:
        raise UserError(
            "config.model.layers, width and mlp_width take a part of weights: set "
            "config.model.weights, or give a new model its sizes in config.model.arguments"
        )
    family, arguments = _architecture(config, weights)
    return shrink.plan_shrinking(
        family, arguments, layers=model.layers, width=model.width, mlp_width=model.mlp_width
    )


def describe(
    config: ConfigDict,
    weights: convert.Weights | None,
    class_names: tuple[str, ...],
    *,
    headless: bool = False,
    old: Description | None = None,
) -> Description:
    """Architecture and preprocessing: the weights' own, changed where the config says so.

    Of a run that begins with another one's parameters they are that one's, `old`.

    Of a part of the weights (see `find_shrinking`) the arguments are the smaller model's.
    `headless` leaves the head out: the model then gives its pooled features.

    Raises:
      UserError: neither the weights nor the config name an architecture, an unknown argument, or a
        number of classes that differs from the weights' while the head is not re-initialized.
    """
    model = config.model
    if old is not None:
        family, arguments, own = old.family, dict(old.arguments), asdict(old.preprocessing)
    else:
        family, arguments = _architecture(config, weights)
        own = (weights.preprocessing if weights is not None else None) or {}
    known = FAMILIES[family]
    if "in_channels" not in arguments:
        arguments["in_channels"] = known.defaults["in_channels"]
    for name, given in (("mean", model.mean), ("std", model.std)):
        values = tuple(given or own.get(name) or arguments.get(name) or known.defaults[name])
        arguments[name] = _per_channel(f"config.model.{name}", values, arguments["in_channels"])
    preprocessing = find_task(config).make_preprocessing(config, own, arguments)
    missing = [name for name in known.required if name not in arguments]
    if preprocessing is None or set(missing) - {"num_classes", "image_size"}:
        lacks = sorted(
            {*missing, "image_size"} - {"num_classes"} if preprocessing is None else missing
        )
        raise UserError(
            f"the architecture is not complete ({', '.join(lacks)}): set config.model.image_size, "
            "config.model.variant or config.model.arguments, or take weights that carry them"
        )
    if (shrinking := find_shrinking(config, weights)) is not None:
        arguments |= shrinking.after
    if "image_size" in known.arguments:
        arguments["image_size"] = preprocessing.image_size
    head_of = arguments.get("num_classes")
    arguments["num_classes"] = 0 if headless else len(class_names)
    arguments = {name: value for name, value in arguments.items() if name not in RUN_ARGUMENTS}
    if not headless and head_of not in (None, len(class_names)):
        built = families.build_model(family, **arguments)
        _check_head(model.reinitialize, built, preprocessing.image_size, head_of)
    return Description(
        config.task,
        family,
        arguments,
        preprocessing,
        class_names,
        weights.origin if weights is not None else "",
        weights.sha256 if weights is not None else "",
        assumed=convert.assumptions(weights) if weights is not None and not model.variant else (),
    )


def describe_teachers(
    config: ConfigDict, description: Description, model: Any, teachers: Sequence[teach.Teacher]
) -> Description:
    """The description of a student of these teachers."""
    return dataclasses.replace(
        description,
        teachers=tuple((t.weights.origin, t.weights.sha256) for t in teachers),
        projections=teach.projections(
            config, model, description.preprocessing.image_size, teachers
        ),
    )


def build_model(config: ConfigDict, description: Description) -> Any:
    """The described model, computing as the config says.

    Raises:
      UserError: a way of computing that the architecture hasn't, asked for.
    """
    if config.model.dtype not in DTYPES:
        raise UserError(f"config.model.dtype: {config.model.dtype!r} is none of {list(DTYPES)}")
    known = FAMILIES[description.family].arguments
    model = config.model
    run = {
        "dtype": DTYPES[model.dtype],
        "remat": model.remat,
        "scan": model.scan,
        "dropout": model.dropout,
        "drop_path": model.drop_path,
        "freeze_norm": model.freeze_norm,
    }
    for name in sorted(set(run) - set(known)):
        if run.pop(name) and name != "freeze_norm":  # without BatchNorm there is nothing to freeze
            raise UserError(f"config.model.{name}: {description.family} has no {name}")
    return families.build_model(description.family, **description.arguments, **run)


def make_loss(
    config: ConfigDict,
    model: Any,
    assemble: Callable[[Mapping[str, Any]], Any],
    teachers: Sequence[teach.Teacher] = (),
    image_size: tuple[int, int] = (0, 0),
) -> steps.LossFn:
    """The loss of a training step: the task's objective, changed by the config's recipes.

    Whatever is taught is attacked, and not the other way round. Of distillation there are the
    `teachers`, and `image_size` is the model's, (height, width) in pixels.
    """
    apply = families.make_apply(model, teach.student_features(config))
    goal = find_task(config).make_objective(config, model, apply, assemble)
    if "distill" in config.recipes:
        goal = teach.make_objective(config, goal, model, image_size, teachers)
    if "adversarial" in config.recipes:
        _check_adversarial(config)
        settings = config.adversarial
        goal = adversarial.harden(
            goal,
            settings.method,
            _threat(config),
            beta=settings.beta,
            weight_epsilon=settings.weight_epsilon,
        )
    return objective.make_loss(goal)


def _threat(config: ConfigDict) -> adversarial.Threat:
    """What attacks in training may do."""
    settings = config.adversarial
    steps = {"fast": 1, "free": 1}.get(settings.method, settings.steps)
    usual = {"fast": 1.25, "free": 1.0}.get(settings.method, 2.5 / steps)
    return adversarial.Threat(
        settings.norm,
        settings.epsilon,
        step=settings.step or usual,
        steps=steps,
        warmup_steps=settings.warmup_steps,
    )


def _check_adversarial(config: ConfigDict) -> None:
    """What methods can't be combined with.

    Raises:
      UserError: such a combination.
    """
    settings, method = config.adversarial, f"config.adversarial.method {config.adversarial.method}"
    if settings.norm == "linf" and settings.epsilon > 1:
        raise UserError(
            f"config.adversarial.epsilon is {settings.epsilon:g}, and images are in [0, 1]: 8 of "
            "255 levels are 0.0314"
        )
    if settings.method in ("trades", "mart") and config.task != "classification":
        raise UserError(
            f"{method} compares the classes' probabilities of whole images, and config.task is "
            f"{config.task}: use pgd"
        )
    if settings.method == "mart":
        for name in ("label_smoothing", "mixup", "cutmix"):
            if config.augment[name]:
                raise UserError(
                    f"{method} weighs the probability of the one true class, and "
                    f"config.augment.{name} makes targets of several: set it to 0, or use trades"
                )
    if settings.method == "free" and config.optim.accumulate > 1:
        raise UserError(
            f"{method} updates after each backward pass, and config.optim.accumulate is for one "
            "update after several: set it to 1"
        )


def replays(config: ConfigDict) -> int:
    """Updates a step: several in free adversarial training."""
    free = "adversarial" in config.recipes and config.adversarial.method == "free"
    return config.adversarial.replays if free else 1


def make_train_step(
    config: ConfigDict, loss_fn: steps.LossFn, tx: Any, schedule: Any, shardings: Any
) -> Any:
    """The one compiled step of a run."""
    times = replays(config)
    return steps.make_train_step(
        loss_fn,
        tx,
        seed=config.seed,
        schedule=schedule,
        accumulate=config.optim.accumulate,
        whole=find_task(config).whole,
        ema_decay=config.optim.ema_decay,
        replay=adversarial.make_replay(_threat(config), times) if times > 1 else None,
        average_prefix=distillation.AVERAGE_PREFIX if teach.by_average(config) else "",
        shardings=shardings,
    )


def save_description(description: Description, path: Path) -> None:
    """Writes model.json."""
    write_json(dataclasses.asdict(description), path)


def load_description(path: Path) -> Description:
    """Reads model.json."""
    if not path.is_file():
        raise UserError(f"{path.parent} holds no run: there is no {path.name} in it")
    record = read_json(path)
    try:
        preprocessing = TASKS[record["task"]].load_preprocessing(record.pop("preprocessing"))
        description = Description(**record, preprocessing=preprocessing)
        families.check_arguments(description.family, description.arguments)
        names, shapes = description.class_names, description.projections
        if not all(isinstance(name, str) for name in names) or isinstance(names, str):
            raise TypeError("`class_names` is no list of texts")
        if not all(type(side) is int and side > 0 for pair in shapes.values() for side in pair):
            raise TypeError("`projections` is no map to shapes")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged, or of another version: {error}") from error
    return description


# Parameters -------------------------------------------------------------------------------------


def plan_parameters(
    config: ConfigDict,
    model: Any,
    image_size: tuple[int, int],
    mesh: Mesh,
    adapter: Path | None,
    projections: Mapping[str, tuple[int, int]] | None = None,
) -> Parameters:
    """Shapes, shardings and the choice of what trains, by the config's rules.

    Args:
      config: the run's.
      model: the student, if there is a teacher.
      image_size: in pixels.
      mesh: of the devices.
      adapter: the folder of the adapter to start from, if any.
      projections: shapes of what trains besides (see Description).
    """
    shapes = _shapes(model, image_size)
    key = jax.random.key(0)
    attach = partial(_attach, config, model, adapter)
    like = jax.eval_shape(attach, shapes["params"], key)
    model_state = shapes.get("batch_stats", {})
    trainable = trainable_paths(like, config.trainable, field="config.trainable")
    if not trainable:
        raise UserError("nothing trains: set config.trainable, or config.recipes=lora")
    beside = {
        path: jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
        for path, shape in (projections or {}).items()
    }
    shardings = sharding.parameter_shardings(like, mesh, config.sharding_rules)
    shardings |= sharding.parameter_shardings(beside, mesh)
    if lora.adapter_paths(like) and model_state and not config.model.freeze_norm:
        raise UserError(
            "adapters leave BatchNorm's statistics alone: set config.model.freeze_norm=True"
        )
    return Parameters(like, model_state, shardings, frozenset(trainable | beside.keys()), beside)


def make_parameters(
    config: ConfigDict,
    model: Any,
    image_size: tuple[int, int],
    plan: Parameters,
    mesh: Mesh,
    weights: convert.Weights | None,
    adapter: Path | None,
) -> tuple[Flat, Flat, Any, list[str]]:
    """The arrays of a new run.

    Returns:
      (trainable, frozen, model_state, paths initialized at random though weights were imported)
    """
    key = jax.random.key(config.seed)
    params, model_state, fresh = _plain_parameters(config, model, image_size, mesh, weights)
    out = plan.assemble(plan.shardings)
    attached = jax.jit(
        partial(_attach, config, model, adapter), donate_argnums=0, out_shardings=out
    )(params, jax.random.fold_in(key, 1))
    flat = paths.flatten(attached)
    for number, (path, leaf) in enumerate(plan.projections.items()):
        begin = jax.jit(
            partial(distillation.project, shape=leaf.shape), out_shardings=plan.shardings[path]
        )
        flat[path] = begin(jax.random.fold_in(jax.random.fold_in(key, 2), number))
    trainable, frozen = paths.partition(flat, set(plan.trainable))
    return trainable, frozen, model_state, fresh if weights is not None else []


def headless_parameters(
    config: ConfigDict,
    model: Any,
    image_size: tuple[int, int],
    mesh: Mesh,
    weights: convert.Weights,
) -> tuple[Any, Any]:
    """(params, model_state) of a model without head, all from the weights."""
    params, model_state, _ = _plain_parameters(
        config, model, image_size, mesh, weights, headless=True
    )
    return params, model_state


def _plain_parameters(
    config: ConfigDict,
    model: Any,
    image_size: tuple[int, int],
    mesh: Mesh,
    weights: convert.Weights | None,
    headless: bool = False,
) -> tuple[Any, Any, list[str]]:
    """(params without adapters, model_state, paths that were initialized at random)."""
    key = jax.random.key(config.seed)
    shapes = _shapes(model, image_size)
    base, statistics = (paths.flatten(shapes.get(name, {})) for name in ("params", "batch_stats"))
    # A rule may be about adapters, which there are none of yet.
    shardings = sharding.parameter_shardings(base, mesh, config.sharding_rules, strict=False)
    shardings |= dict.fromkeys(statistics, sharding.replicated(mesh))
    target = base | statistics  # their paths differ: mean, var and count are no parameters' names

    placed: dict[str, jax.Array] = {}
    fresh = set(target)
    if weights is not None:
        rules = () if headless else config.model.reinitialize
        fresh = paths.select(target, rules, field="config.model.reinitialize")
        reinitialized = sorted(_find_head(model, image_size)[0] if headless else fresh)
        shrinking = find_shrinking(config, weights)
        if shrinking is None:
            placed = convert.import_weights(
                weights,
                target,
                convert.arguments_of(model),
                reinitialized=reinitialized,
                place=lambda path, array: sharding.place(array, shardings[path]),
            )
        else:
            placed = shrink.import_student(
                weights,
                model,
                shrinking,
                image_size,
                reinitialized=reinitialized,
                shardings=shardings,
                mesh=mesh,
            )
    names = sorted(fresh)

    def make(key):  # what is imported is not computed: the compiler drops it
        variables = initialize(model, key, image_size)
        flat = {
            path: leaf for tree in variables.values() for path, leaf in paths.flatten(tree).items()
        }
        return {path: flat[path] for path in names}

    made = jax.jit(make, out_shardings={path: shardings[path] for path in names})(key)
    everything = {**placed, **made}
    params = paths.unflatten(shapes["params"], {path: everything[path] for path in base})
    model_state = paths.unflatten(
        shapes.get("batch_stats", {}), {path: everything[path] for path in statistics}
    )
    return params, model_state, names


def head_warnings(
    weights: convert.Weights,
    model: Any,
    description: Description,
    fresh: Collection[str],
    plan: Parameters,
) -> list[str]:
    """What a user should know of the head of a new run from weights; `fresh` began anew."""
    warnings = []
    idle = [path for path in fresh if path in plan.shardings and path not in plan.trainable]
    if idle:
        warnings.append(
            f"{', '.join(idle)}: re-initialized, and not among what trains: it stays as it was "
            "drawn; add it to config.trainable"
        )
    own, names = convert.class_names_of(weights), description.class_names
    if own is None or len(own) != len(names) or all(re.fullmatch(r"LABEL_\d+", n) for n in own):
        return warnings
    others = [label for label, name in enumerate(names) if own[label] != name]
    head, _ = _find_head(model, description.preprocessing.image_size) if others else (set(), set())
    if head - set(fresh):
        label = others[0]
        warnings.append(
            f"the head is the weights' own, and {len(others)} of its {len(names)} classes have "
            f"other names there: label {label} is {own[label]!r} there and {names[label]!r} in the "
            f"data; --config.model.reinitialize={_rules_of(head)} begins with a new head"
        )
    return warnings


def make_schedule(config: ConfigDict) -> optim.Schedule:
    """The learning rate by the index of the update."""
    settings = config.optim
    return optim.make_schedule(
        settings.schedule,
        peak=settings.lr,
        total_steps=config.total_steps * replays(config),
        warmup_steps=settings.warmup_steps,
        drop_at=settings.drop_at,
    )


def make_optimizer(config: ConfigDict, model: Any, trainable: Flat) -> tuple[Any, Any]:
    """(schedule, optax transformation) of the config, for these trainable arrays."""
    settings = config.optim
    schedule = make_schedule(config)
    tx = optim.make_optimizer(
        settings.name,
        schedule=schedule,
        params=trainable,
        weight_decay=settings.weight_decay,
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
    return schedule, tx


def new_state(
    config: ConfigDict, tx: Any, trainable: Flat, model_state: Any, shardings: Any
) -> steps.TrainState:
    """The state before the first step, born with its shardings; the arrays given are donated."""
    make = partial(steps.make_state, tx=tx, ema=config.optim.ema_decay > 0)
    return jax.jit(make, out_shardings=shardings, donate_argnums=(0, 1))(trainable, model_state)


def abstract_state(
    config: ConfigDict, tx: Any, plan: Parameters, mesh: Mesh
) -> tuple[steps.TrainState, Any]:
    """(ShapeDtypeStructs with shardings: the target of a restore, the shardings alone)."""
    trainable, _ = plan.abstract()
    make = partial(steps.make_state, tx=tx, ema=config.optim.ema_decay > 0)
    shapes = jax.eval_shape(make, trainable, plan.model_state)
    shardings = sharding.state_shardings(shapes, plan.shardings, mesh)
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )
    return target, shardings


def find_adapter(config: ConfigDict) -> Path | None:
    """The folder of the adapter that a new run starts from."""
    if "lora" not in config.recipes or not config.lora.init_from:
        return None
    folder = Path(config.lora.init_from).expanduser()
    if not (folder / peft.CONFIG_FILE).is_file():
        raise UserError(f"config.lora.init_from: {folder} holds no {peft.CONFIG_FILE}")
    if folder.name == "adapter":  # of a run, whose folder has its checksums
        verify_checksums(folder.parent, only="adapter/")
    return folder


def keep_adapter(adapter: Path, workdir: Path) -> None:
    """Copies the adapter that a run starts from, so that its workdir needs nothing outside."""
    (workdir / ADAPTER_COPY).mkdir(exist_ok=True)
    for name in (peft.CONFIG_FILE, peft.TENSORS_FILE):
        shutil.copyfile(adapter / name, workdir / ADAPTER_COPY / name)


def kept_adapter(config: ConfigDict, workdir: Path) -> Path | None:
    """That copy, if the run started from an adapter."""
    kept = "lora" in config.recipes and config.lora.init_from
    return workdir / ADAPTER_COPY if kept else None


def _attach(
    config: ConfigDict, model: Any, adapter: Path | None, params: Any, key: jax.Array
) -> Any:
    settings = config.lora
    if adapter is not None:
        return peft.read_adapter(
            adapter, params, family=families.family_of(model), arguments=convert.arguments_of(model)
        )
    if "lora" not in config.recipes:
        return params
    return lora.attach(
        params,
        settings.rules,
        key=key,
        rank=settings.rank,
        alpha=settings.alpha,
        rank_stabilized=settings.rank_stabilized,
        dropout=settings.dropout,
        dora=settings.dora,
        qkv_parts=settings.qkv_parts,
    )


def _shapes(model: Any, image_size: tuple[int, int]) -> Any:
    """The model's variables as ShapeDtypeStructs.

    Raises:
      UserError: sizes that don't fit each other.
    """
    try:
        return jax.eval_shape(lambda key: initialize(model, key, image_size), jax.random.key(0))
    except UserError:
        raise
    except Exception as error:  # anywhere in the model
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise UserError(
            f"there is no such model ({reason}): check config.model.image_size and arguments"
        ) from error


def _find_head(model: Any, image_size: tuple[int, int]) -> tuple[set[str], set[str]]:
    """(paths of what is made for a number of classes, all paths), whatever the architecture."""
    one, two = (
        paths.flatten(_shapes(model.clone(num_classes=model.num_classes + more), image_size))
        for more in (1, 2)
    )
    every = {path.partition("/")[2]: leaf.shape != one[path].shape for path, leaf in two.items()}
    return {path for path, differs in every.items() if differs}, set(every)


def _check_head(
    reinitialize: tuple[str, ...], model: Any, image_size: tuple[int, int], own: int
) -> None:
    """What weights have that was made for `own` classes serves the model for no other number."""
    head, every = _find_head(model, image_size)
    kept = sorted(head - paths.select(every, reinitialize, field="config.model.reinitialize"))
    if not kept:
        return
    have = f"a head of {own} classes" if own else "no head"
    raise UserError(
        f"the weights have {have} and config.data.train has {model.num_classes}: set "
        f"--config.model.reinitialize={_rules_of(kept, reinitialize)} to begin with a new head "
        f"({', '.join(kept)})"
    )


def _rules_of(names: Collection[str], others: Sequence[str] = ()) -> str:
    """Path rules that match the parameters' modules, after others, as a command line takes them."""
    # Without backslashes: the words are the same to a shell, to Python and to a reader.
    modules = (re.sub(r"\d+", "[0-9]+", name.rpartition("/")[0]) for name in sorted(names))
    rules = dict.fromkeys([*others, *(f"{module}/.*" for module in modules)])
    said = ", ".join(f"'{rule}'" for rule in rules)
    return said if len(rules) == 1 else f'"({said})"'


def _checked_arguments(pairs: tuple[tuple[str, Any], ...], known: list[str]) -> dict[str, Any]:
    """config.model.arguments as a dict; each must be an argument of the model."""
    for name, _ in pairs:
        if name not in known or name in RUN_ARGUMENTS:
            raise UserError(f"config.model.arguments: unknown `{name}`{nearest(name, known)}")
    return dict(pairs)


def _per_channel(field: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Normalization for another number of channels: one takes the mean, more repeat them in turn.

    The first convolution's kernels are adapted in the same order (convert.load.adapt_channels).
    """
    if len(values) == channels:
        return values
    if len(values) != 3:
        raise UserError(f"{field}: {len(values)} numbers for images of {channels} channels")
    return load.adapt_values(values, channels)
