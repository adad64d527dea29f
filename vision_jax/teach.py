"""The teachers of a run: found, checked against the student, placed, asked.

    config.distill -> Teacher ... -> arrays among the frozen ones, and an Objective that asks them

`vision_jax cache-teacher` asks them once for a whole run and stores what they say; a run of that
config with config.distill.cache reads it instead of asking, and has the same losses to the bit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax import convert, sharding
from vision_jax.config import fields
from vision_jax.data.teacher_cache import open_teacher_cache
from vision_jax.errors import UserError
from vision_jax.models import families
from vision_jax.models.families import FAMILIES
from vision_jax.recipes import distillation
from vision_jax.recipes.distillation import AVERAGE, Ask, Layout, Match
from vision_jax.recipes.objective import Objective
from vision_jax.steps import Flat
from vision_jax.trees import paths


@dataclass(frozen=True)
class Teacher:
    """A frozen model that a run learns from.

    Attributes:
      weights: its own.
      family: its architecture's name.
      model: the flax module, computing in config.distill.dtype.
      image_size: that it is asked at, (height, width) in pixels; None for a detector, which sees
        the student's canvas.
      prefix: of its arrays' paths.
    """

    weights: convert.Weights
    family: str
    model: Any
    image_size: tuple[int, int] | None
    prefix: str

    @cached_property
    def like(self) -> dict[str, Any]:
        """Its abstract "params", in its own dtype, and "batch_stats"."""
        size = self.image_size or (64, 64)
        key = jax.random.key(0)
        shapes = jax.eval_shape(lambda key: families.initialize(self.model, key, size), key)
        narrow = lambda x: jax.ShapeDtypeStruct(x.shape, self.model.dtype)  # noqa: E731
        return {**shapes, "params": jax.tree.map(narrow, shapes["params"])}

    def abstract(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """ShapeDtypeStructs by path, sharded as the student's parameters are by default."""
        flat = self._flat()
        places = sharding.parameter_shardings(flat, mesh)
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])
            for path, leaf in flat.items()
        }

    def _flat(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            f"{self.prefix}{name}/{path}": leaf
            for name, tree in self.like.items()
            for path, leaf in paths.flatten(tree).items()
        }

    def place(self, mesh: Mesh) -> dict[str, jax.Array]:
        """Its arrays."""
        abstract = self._flat()
        places = sharding.parameter_shardings(abstract, mesh)
        own = {path.removeprefix(self.prefix).partition("/")[2]: path for path in abstract}

        def put(path: str, array: np.ndarray) -> jax.Array:
            leaf = abstract[own[path]]
            narrow = np.asarray(array).astype(leaf.dtype)
            return sharding.place(narrow, places[own[path]])

        placed = convert.import_weights(
            self.weights,
            {path: _whole(abstract[full]) for path, full in own.items()},
            convert.arguments_of(self.model),
            place=put,
        )
        return {own[path]: array for path, array in placed.items()}

    def ask(self, features: Sequence[str]) -> Ask:
        """The teacher as a function."""
        apply = families.make_apply(self.model, features)
        return distillation.make_ask(
            apply, self.prefix, self.like, self.image_size, self.model.in_channels
        )


def _whole(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """In float32, in which weights are imported: they are narrowed on the way to the device."""
    floats = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if floats else leaf.dtype)


def find_teachers(config: ConfigDict) -> list[Teacher]:
    """The models that the config names as teachers; no array is read yet.

    Raises:
      UserError: no teachers, no such weights, or weights whose architecture is unknown.
    """
    if "distill" not in config.recipes:
        return []
    settings = config.distill
    if not settings.teachers:
        raise UserError(
            "config.recipes has distill: set config.distill.teachers to finished runs or weights, "
            f"or to {AVERAGE} for the student's own moving average"
        )
    named = [name for name in settings.teachers if name != AVERAGE]
    found = []
    for number, name in enumerate(named):
        weights = convert.read_weights(name, allow_pickle=config.model.allow_pickle)
        family, arguments = convert.recognize(weights)
        known = FAMILIES[family]
        if known.task != config.task:
            raise UserError(
                f"config.distill.teachers: {name} is for {known.task}, and config.task is "
                f"{config.task}"
            )
        size = arguments.get("image_size") or (weights.preprocessing or {}).get("image_size")
        missing = {field for field in known.required if field not in arguments}
        if missing or (known.task == "classification" and not size):
            lacks = ", ".join(sorted(missing | ({"image_size"} if not size else set())))
            raise UserError(f"config.distill.teachers: {name} does not say its {lacks}")
        model = families.build_model(family, **arguments, dtype=families.DTYPES[settings.dtype])
        found.append(
            Teacher(
                weights,
                family,
                model,
                tuple(size) if size and known.task == "classification" else None,
                f"{distillation.TEACHER}{number}/",
            )
        )
    return found


def place(teachers: Sequence[Teacher], mesh: Mesh) -> dict[str, jax.Array]:
    """The arrays of all teachers."""
    return {path: leaf for teacher in teachers for path, leaf in teacher.place(mesh).items()}


def by_average(config: ConfigDict) -> bool:
    """Whether the student's moving average is among the teachers."""
    return "distill" in config.recipes and AVERAGE in config.distill.teachers


def student_features(config: ConfigDict) -> tuple[str, ...]:
    """Names of the student's features that a run compares."""
    if "distill" not in config.recipes:
        return ()
    heads = ("head", "head_dist") if config.distill.token else ()
    return tuple(dict.fromkeys([*heads, *(layer for _, layer, *_ in config.distill.features)]))


def view_size(image_size: tuple[int, int], teachers: Sequence[Teacher]) -> tuple[int, int]:
    """Of the images that are read: the largest that student or teachers take."""
    sizes = [image_size, *(t.image_size for t in teachers if t.image_size)]
    return max(size[0] for size in sizes), max(size[1] for size in sizes)


def view_preprocessing(preprocessing: Any, teachers: Sequence[Teacher]) -> Any:
    """The student's, at that size."""
    if not any(teacher.image_size for teacher in teachers):
        return preprocessing
    return replace(preprocessing, image_size=view_size(preprocessing.image_size, teachers))


def projections(
    config: ConfigDict, model: Any, image_size: tuple[int, int], teachers: Sequence[Teacher]
) -> dict[str, tuple[int, int]]:
    """Shapes of the kernels that bring the student's features to the teacher's, by path."""
    if "distill" not in config.recipes or by_average(config):
        return {}
    found = {}
    for number, (kind, layer, teacher_layer, _) in enumerate(config.distill.features):
        if kind not in distillation.PROJECTED:
            continue
        own = _feature_shape(model, image_size, layer)[-1]
        size = teachers[0].image_size or image_size
        told = _feature_shape(teachers[0].model, size, teacher_layer)[-1]
        if own != told:
            found[f"{distillation.PROJECTION}{number}/kernel"] = (own, told)
    return found


def _feature_shape(model: Any, image_size: tuple[int, int], name: str) -> tuple[int, ...]:
    images = jax.ShapeDtypeStruct((1, *image_size, model.in_channels), jnp.float32)
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda: families.initialize(model, key, image_size))
    pixels = [jax.ShapeDtypeStruct((1, *image_size), jnp.bool_)]
    detector = FAMILIES[families.family_of(model)].task == "detection"
    _, found = jax.eval_shape(
        lambda variables, *inputs: families.apply_with_features(
            model, variables, *inputs, names=[name], train=False
        ),
        variables,
        images,
        *(pixels if detector else []),
    )
    return found[name].shape


def check(
    config: ConfigDict, model: Any, teachers: Sequence[Teacher], class_names: Sequence[str]
) -> None:
    """What a student can't learn from these teachers, or by these means.

    Raises:
      UserError: such a combination, with the reason and what to do.
    """
    if "distill" not in config.recipes:
        return
    settings, logits = config.distill, f"config.distill.logits {config.distill.logits}"
    if settings.logits == "none" and not settings.features:
        raise UserError(f"{logits}: with no features either there is nothing to learn from")
    if by_average(config):
        if not config.optim.ema_decay:
            raise UserError(
                f"config.distill.teachers: {AVERAGE} is the moving average: set "
                "config.optim.ema_decay, for example to 0.999"
            )
        if len(settings.teachers) > 1:
            raise UserError(f"config.distill.teachers: {AVERAGE} teaches alone")
        if settings.cache:
            raise UserError(
                f"config.distill.cache: {AVERAGE} changes with each step and can't be stored"
            )
    if (config.task == "detection") != (settings.logits == "queries") and settings.logits != "none":
        wanted = "queries or none" if config.task == "detection" else "soft, hard or decoupled"
        raise UserError(f"{logits}: for {config.task} it is {wanted}")
    if settings.logits == "decoupled":
        for name in ("mixup", "cutmix"):
            if config.augment[name]:
                raise UserError(
                    f"{logits} sets the one true class apart, and config.augment.{name} makes "
                    "targets of several: set it to 0, or take soft"
                )
    if settings.token and not getattr(model, "distillation_token", False):
        raise UserError(
            "config.distill.token: the student has no distillation token: add "
            "('distillation_token', True) and ('position_prefix', 2) to config.model.arguments"
        )
    if settings.top_k and settings.logits == "queries":
        raise UserError("config.distill.top_k is for classes of whole images: set it to 0")
    if settings.teacher_weights and len(settings.teacher_weights) != len(settings.teachers):
        raise UserError(
            f"config.distill.teacher_weights: {len(settings.teacher_weights)} for "
            f"{len(settings.teachers)} teachers"
        )
    if settings.cache and config.optim.accumulate > 1:
        raise UserError(
            "config.distill.cache: what a teacher says depends, in its last bits, on how many "
            "images it sees at once: set config.optim.accumulate to 1"
        )
    if settings.logits == "none":
        return
    for teacher in teachers:
        count = teacher.model.num_classes
        if count != len(class_names):
            raise UserError(
                f"config.distill.teachers: {teacher.weights.origin} knows {count} classes and the "
                f"data has {len(class_names)}: take another teacher, or learn from its features "
                "with config.distill.logits=none"
            )


def make_objective(
    config: ConfigDict,
    goal: Objective,
    model: Any,
    image_size: tuple[int, int],
    teachers: Sequence[Teacher],
) -> Objective:
    """The objective of a student of these teachers; `image_size` is the student's."""
    settings = config.distill
    layers = tuple(dict.fromkeys(layer for _, _, layer, _ in settings.features))
    asked = [teacher.ask(layers if number == 0 else ()) for number, teacher in enumerate(teachers)]
    if by_average(config):
        asked = [distillation.make_ask_average(goal)]
    taught = distillation.make_teach(
        asked,
        logits=settings.logits,
        temperature=settings.temperature,
        weights=settings.teacher_weights,
        top_k=settings.top_k,
        layers=layers,
    )
    terms = _terms(config, model, image_size, teachers)
    return distillation.distill(
        goal,
        teach=taught,
        terms=terms,
        share=0.0 if settings.logits == "none" else settings.weight,
        image_size=image_size if view_size(image_size, teachers) != image_size else None,
        label_head="head" if settings.token else "",
        sharded=config.mesh.fsdp != 1,
    )


def _terms(
    config: ConfigDict, model: Any, image_size: tuple[int, int], teachers: Sequence[Teacher]
) -> dict[str, tuple[float, distillation.Term]]:
    """The losses of what teachers say, by the name that their metric has."""
    settings = config.distill
    terms: dict[str, tuple[float, distillation.Term]] = {}
    if settings.logits == "queries":
        term = distillation.make_queries_term(
            sigmoid=families.family_of(model) != "detr",
            temperature=settings.temperature,
            num_queries=model.num_queries,
        )
        terms["taught_queries"] = (settings.weight, term)
    elif settings.logits != "none":
        term = distillation.make_logits_term(
            settings.logits,
            temperature=settings.temperature,
            head="head_dist" if settings.token else "",
        )
        terms[f"taught_{settings.logits}"] = (settings.weight, term)
    trained = projections(config, model, image_size, teachers)
    first = teachers[0].model if teachers else model
    for number, (kind, layer, teacher_layer, weight) in enumerate(settings.features):
        path = f"{distillation.PROJECTION}{number}/kernel"
        match = Match(kind, layer, teacher_layer, path if path in trained else "")
        term = distillation.make_features_term(match, _layout(model), _layout(first))
        terms[f"taught_{kind}_{layer}"] = (weight, term)
    return terms


def _layout(model: Any) -> Layout:
    """Of a transformer's tokens; maps say themselves how they lie."""
    if not hasattr(model, "patch_size") or FAMILIES[families.family_of(model)].task == "detection":
        return Layout(None, 0)
    rows, columns = (side // model.patch_size for side in model.image_size)
    return Layout((rows, columns), getattr(model, "num_prefix", 1))


# Stored teachers ----------------------------------------------------------------------------------


def identity(config: ConfigDict, teachers: Sequence[Teacher], views: Any) -> dict[str, Any]:
    """What a file of stored teachers belongs to: all that a view and their words depend on.

    `views` is the preprocessing of the images that are read.
    """
    settings = config.distill
    told = ("logits", "temperature", "teacher_weights", "top_k", "dtype")
    # Neither changes an image: how it is read.
    data = {k: v for k, v in fields(config.data).items() if k not in ("eval", "threads", "workers")}
    return {
        "teachers": [
            [teacher.weights.sha256, teacher.family, list(teacher.image_size or ())]
            for teacher in teachers
        ],
        "layers": [layer for _, _, layer, _ in settings.features],
        "distill": {name: settings[name] for name in told},
        "seed": config.seed,
        "batch_size": config.batch_size,
        "data": data,
        "augment": fields(config.augment) if "augment" in config else {},
        "views": asdict(views),
    }


def open_stored(
    config: ConfigDict, teachers: Sequence[Teacher], views: Any
) -> Callable[[int], dict[str, np.ndarray]] | None:
    """From the number of a step to what the teachers said of its images; None if they are asked.

    Raises:
      UserError: no such file, one of another run, or one of a shorter run.
    """
    if not teachers or not config.distill.cache:
        return None
    cache = open_teacher_cache(config.distill.cache, identity(config, teachers, views))
    needed = config.total_steps * config.batch_size
    if cache.count < needed:
        raise UserError(
            f"{cache.path}: has what the teachers say of {cache.count} images, and "
            f"config.total_steps {config.total_steps} need {needed}: store more with cache-teacher"
        )
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    own = config.batch_size // jax.process_count()
    return lambda step: cache.batch(step, own, **processes)


def make_asking(
    config: ConfigDict, goal: Objective, model: Any, image_size: tuple[int, int], teachers: Any
) -> Callable[[Flat, Mapping[str, Any], Any], dict[str, jax.Array]]:
    """(the teachers' arrays, batch, number of the step) -> what they say of the step's view."""
    taught = make_objective(config, goal, model, image_size, teachers)

    def ask(arrays, batch, step):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        look_key, _ = jax.random.split(key)  # as steps.make_train_step and objective.make_loss do
        view = taught.look({}, arrays, {}, {**batch, "step": step}, look_key)
        return {name: view[name] for name in view if name.startswith(distillation.SAID)}

    return ask
