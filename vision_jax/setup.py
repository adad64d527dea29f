"""From a config to values: data, model, parameters. Nothing called from here sees the config.

The order is DESIGN's: shapes by `eval_shape`, shardings on the abstract tree, weights imported
strictly, the rest initialized where it will live, adapters attached, then trainable and frozen.
"""

import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from vision_jax import convert, optim, sharding, steps
from vision_jax.config import nearest, read_json, write_json
from vision_jax.convert import peft
from vision_jax.data.sources import Source, read_source, split_source
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError
from vision_jax.models.vit import ViT, build_vit, layer_of, variant_arguments
from vision_jax.trees import lora, paths

Flat = dict[str, Any]

# ViT's arguments that say how to compute and not what; the config decides them for each run.
RUN_ARGUMENTS = ("dtype", "remat", "scan", "dropout", "drop_path")
ADAPTER_COPY = "initial_adapter"  # in the workdir
BEST_METRIC = "top1"  # what the best checkpoint is best at
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Description:
    """What a workdir must remember to rebuild its model without the weights: WORKDIR/model.json.

    Attributes:
      arguments: of `build_vit`, without RUN_ARGUMENTS.
      preprocessing: of the images.
      class_names: by label.
      weights: where the parameters came from, "" for random initialization.
      sha256: of the weights' file or files, "" without.
    """

    arguments: dict[str, Any]
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    weights: str
    sha256: str


@dataclass(frozen=True)
class Parameters:
    """The layout of a run's parameters, before any array exists.

    Attributes:
      like: the tree with adapters attached, of ShapeDtypeStructs.
      shardings: by path.
      trainable: paths that the optimizer changes.
    """

    like: Any
    shardings: dict[str, NamedSharding]
    trainable: frozenset[str]

    def assemble(self, flat: Mapping[str, Any]) -> Any:
        """The model's tree from all its arrays by path."""
        return paths.unflatten(self.like, flat)

    def abstract(self) -> tuple[Flat, Flat]:
        """(trainable, frozen) ShapeDtypeStructs with shardings: targets for a restore."""
        flat = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.shardings[path])
            for path, leaf in paths.flatten(self.like).items()
        }
        return paths.partition(flat, set(self.trainable))


# Data -------------------------------------------------------------------------------------------


def read_sources(config: ConfigDict) -> tuple[Source, Source]:
    """The training and the evaluation data, with the same class names."""
    train = read_source(config.data.train)
    if config.data.eval:
        return train, read_source(config.data.eval, class_names=train.class_names)
    return split_source(train, config.data.holdout, config.seed)


def read_eval_source(config: ConfigDict, class_names: tuple[str, ...]) -> Source:
    """The evaluation data alone, for a finished run."""
    if config.data.eval:
        return read_source(config.data.eval, class_names=class_names)
    train = read_source(config.data.train, class_names=class_names)
    return split_source(train, config.data.holdout, config.seed)[1]


# Model ------------------------------------------------------------------------------------------


def read_weights(config: ConfigDict) -> convert.Weights | None:
    """The weights that the config names, or None for random initialization."""
    if not config.model.weights:
        return None
    return convert.read_weights(config.model.weights, allow_pickle=config.model.allow_pickle)


def describe(
    config: ConfigDict, weights: convert.Weights | None, class_names: tuple[str, ...]
) -> Description:
    """Architecture and preprocessing: the weights' own, changed where the config says so.

    Raises:
      UserError: neither the weights nor the config name an architecture, an unknown argument, or a
        number of classes that differs from the weights' while the head is not re-initialized.
    """
    model = config.model
    arguments: dict[str, Any] = {}
    if weights is not None:
        try:
            arguments |= convert.infer_vit_arguments(weights)
        except UserError as error:
            raise UserError(f"{weights.origin}: {error}") from error
    if model.variant:
        arguments |= variant_arguments(model.variant)
    arguments |= _checked_arguments(model.arguments)
    if model.image_size:
        arguments["image_size"] = (model.image_size, model.image_size)
    own = (weights.preprocessing if weights is not None else None) or {}
    arguments["mean"] = tuple(model.mean or own.get("mean") or (0.5, 0.5, 0.5))
    arguments["std"] = tuple(model.std or own.get("std") or (0.5, 0.5, 0.5))
    _check_head(model.reinitialize, arguments.get("num_classes"), len(class_names))
    arguments["num_classes"] = len(class_names)

    needed = ("image_size", "patch_size", "width", "depth", "num_heads", "mlp_width")
    missing = [name for name in needed if name not in arguments]
    if missing:
        raise UserError(
            f"the architecture is unknown ({', '.join(missing)}): set config.model.variant, for "
            "example 'b/16', and config.model.image_size, or take weights that carry them"
        )
    preprocessing = Preprocessing(
        image_size=tuple(arguments["image_size"]),
        mean=arguments["mean"],
        std=arguments["std"],
        crop_pct=config.data.crop_pct or own.get("crop_pct") or 0.875,
        interpolation=config.data.interpolation or own.get("interpolation") or "bicubic",
        crop_mode=own.get("crop_mode") or "center",
    )
    arguments = {name: value for name, value in arguments.items() if name not in RUN_ARGUMENTS}
    return Description(
        arguments,
        preprocessing,
        class_names,
        weights.origin if weights is not None else "",
        weights.sha256 if weights is not None else "",
    )


def build_model(config: ConfigDict, description: Description) -> ViT:
    """The described model, computing as the config says."""
    if config.model.dtype not in DTYPES:
        raise UserError(f"config.model.dtype: {config.model.dtype!r} is none of {list(DTYPES)}")
    return build_vit(
        **description.arguments,
        dtype=DTYPES[config.model.dtype],
        remat=config.model.remat,
        scan=config.model.scan,
        dropout=config.model.dropout,
        drop_path=config.model.drop_path,
    )


def make_apply(model: ViT) -> Callable[..., tuple[jax.Array, Any]]:
    """The model as tasks call it (see tasks.classification.Apply)."""

    def apply(params, model_state, images, *, train, keys):
        return model.apply({"params": params}, images, train=train, rngs=keys), model_state

    return apply


def save_description(description: Description, path: Path) -> None:
    """Writes model.json."""
    write_json(dataclasses.asdict(description), path)


def load_description(path: Path) -> Description:
    """Reads model.json."""
    if not path.is_file():
        raise UserError(f"{path.parent} holds no run: there is no {path.name} in it")
    record = read_json(path)
    try:
        preprocessing = Preprocessing(**record.pop("preprocessing"))
        return Description(**record, preprocessing=preprocessing)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, or of another version: {error}") from error


# Parameters -------------------------------------------------------------------------------------


def plan_parameters(config: ConfigDict, model: ViT, mesh: Mesh, adapter: Path | None) -> Parameters:
    """Shapes, shardings and the choice of what trains, by the config's rules.

    `adapter` is the folder of the adapter to start from, if any.
    """
    key = jax.random.key(0)
    try:
        base_like = jax.eval_shape(lambda key: _initialize(model, key), key)
    except UserError:
        raise
    except Exception as error:  # sizes that don't fit each other fail anywhere in the model
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise UserError(
            f"there is no such ViT ({reason}): check config.model.image_size and arguments"
        ) from error
    like = jax.eval_shape(lambda base, key: _attach(config, base, key, adapter), base_like, key)
    flat = paths.flatten(like)
    candidates = [path for path in flat if not path.endswith("/base")]  # an adapter's base is fixed
    trainable = {path for path in candidates if lora.is_adapter_path(path)}
    trainable |= paths.select(candidates, config.trainable, field="config.trainable")
    if not trainable:
        raise UserError("nothing trains: set config.trainable or config.lora.rules")
    shardings = sharding.parameter_shardings(flat, mesh, config.sharding_rules)
    return Parameters(like, shardings, frozenset(trainable))


def make_parameters(
    config: ConfigDict,
    model: ViT,
    plan: Parameters,
    weights: convert.Weights | None,
    adapter: Path | None,
) -> tuple[Flat, Flat, list[str]]:
    """The arrays of a new run: (trainable, frozen, paths initialized at random though imported)."""
    key = jax.random.key(config.seed)
    base_like = jax.eval_shape(lambda key: _initialize(model, key), key)
    base_shapes = paths.flatten(base_like)
    base_shardings = {
        path: plan.shardings.get(path) or plan.shardings[f"{path}/base"] for path in base_shapes
    }

    imported: dict[str, np.ndarray] = {}
    fresh = set(base_shapes)
    if weights is not None:
        fresh = paths.select(
            base_shapes, config.model.reinitialize, field="config.model.reinitialize"
        )
        paths.select(weights.tensors, config.model.drop, field="config.model.drop")
        imported = convert.import_vit(
            weights, base_like, reinitialized=sorted(fresh), model=model, dropped=config.model.drop
        )
    names = sorted(fresh)

    def initialize(key):  # what is imported is not computed: the compiler drops it
        flat = paths.flatten(_initialize(model, key))
        return {path: flat[path] for path in names}

    made = jax.jit(initialize, out_shardings={path: base_shardings[path] for path in names})(key)
    placed = {
        path: sharding.place(np.asarray(array, base_shapes[path].dtype), base_shardings[path])
        for path, array in imported.items()
    }
    params = paths.unflatten(base_like, {**placed, **made})

    out = jax.tree.unflatten(jax.tree.structure(plan.like), list(plan.shardings.values()))
    attached = jax.jit(
        lambda params, key: _attach(config, params, key, adapter),
        donate_argnums=0,
        out_shardings=out,
    )(params, jax.random.fold_in(key, 1))
    flat = paths.flatten(attached)
    trainable, frozen = paths.partition(flat, set(plan.trainable))
    return trainable, frozen, names if weights is not None else []


def make_optimizer(config: ConfigDict, model: ViT, trainable: Flat) -> tuple[Any, Any]:
    """(schedule, optax transformation) of the config, for these trainable arrays."""
    settings = config.optim
    schedule = optim.make_schedule(
        settings.schedule,
        peak=settings.lr,
        total_steps=config.total_steps,
        warmup_steps=settings.warmup_steps,
    )
    tx = optim.make_optimizer(
        settings.name,
        schedule=schedule,
        params=trainable,
        weight_decay=settings.weight_decay,
        b1=settings.b1,
        b2=settings.b2,
        momentum=settings.momentum,
        clip_norm=settings.clip_norm,
        layer_of=lambda path: layer_of(path, model.depth),
        num_layers=model.depth + 2,
        layer_decay=settings.layer_decay,
    )
    return schedule, tx


def new_state(config: ConfigDict, tx: Any, trainable: Flat, shardings: Any) -> steps.TrainState:
    """The state before the first step, born with its shardings; `trainable` is donated."""
    make = partial(steps.make_state, model_state={}, tx=tx, ema=config.optim.ema_decay > 0)
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(trainable)


def abstract_state(
    config: ConfigDict, tx: Any, plan: Parameters, mesh: Mesh
) -> tuple[steps.TrainState, Any]:
    """(ShapeDtypeStructs with shardings: the target of a restore, the shardings alone)."""
    trainable, _ = plan.abstract()
    make = partial(steps.make_state, model_state={}, tx=tx, ema=config.optim.ema_decay > 0)
    shapes = jax.eval_shape(make, trainable)
    shardings = sharding.state_shardings(shapes, plan.shardings, mesh)
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )
    return target, shardings


def find_adapter(config: ConfigDict) -> Path | None:
    """The folder of the adapter that a new run starts from."""
    if not config.lora.init_from:
        return None
    if config.lora.rules:
        raise UserError("config.lora.init_from brings its own targets: set config.lora.rules=()")
    folder = Path(config.lora.init_from).expanduser()
    if not (folder / peft.CONFIG_FILE).is_file():
        raise UserError(f"config.lora.init_from: {folder} holds no {peft.CONFIG_FILE}")
    return folder


def keep_adapter(adapter: Path, workdir: Path) -> None:
    """Copies the adapter that a run starts from, so that its workdir needs nothing outside."""
    (workdir / ADAPTER_COPY).mkdir(exist_ok=True)
    for name in (peft.CONFIG_FILE, peft.TENSORS_FILE):
        shutil.copyfile(adapter / name, workdir / ADAPTER_COPY / name)


def kept_adapter(config: ConfigDict, workdir: Path) -> Path | None:
    """That copy, if the run started from an adapter."""
    return workdir / ADAPTER_COPY if config.lora.init_from else None


def _initialize(model: ViT, key: jax.Array) -> Any:
    images = jnp.zeros((1, *model.image_size, 3))
    return model.init(key, images)["params"]


def _attach(config: ConfigDict, params: Any, key: jax.Array, adapter: Path | None) -> Any:
    settings = config.lora
    if adapter is not None:
        return peft.read_adapter(adapter, params)
    if not settings.rules:
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


def _check_head(reinitialize: tuple[str, ...], own: int | None, wanted: int) -> None:
    """The weights' head serves as it is only for as many classes."""
    if own in (None, wanted) or any(re.fullmatch(rule, "head/kernel") for rule in reinitialize):
        return
    raise UserError(
        f"the weights have a head of {own} classes and config.data.train has {wanted}: set "
        "config.model.reinitialize='head/.*' to begin with a new head"
    )


def _checked_arguments(pairs: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """config.model.arguments as a dict; each must be an argument of ViT."""
    known = [
        field.name for field in dataclasses.fields(ViT) if field.name not in ("parent", "name")
    ]
    for name, _ in pairs:
        if name not in known or name in RUN_ARGUMENTS:
            raise UserError(f"config.model.arguments: unknown `{name}`{nearest(name, known)}")
    return dict(pairs)
