"""What a run's model is: architecture, preprocessing and classes, from weights, config and data.

A run keeps it as WORKDIR/model.json, so that its workdir alone rebuilds the model.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vision_jax import convert
from vision_jax.config import read_json, write_json
from vision_jax.convert import load
from vision_jax.errors import UserError, nearest
from vision_jax.models import families
from vision_jax.models.families import DTYPES, FAMILIES, RUN_ARGUMENTS, find_variant, initialize
from vision_jax.run import shrink
from vision_jax.tasks.api import find_task
from vision_jax.trees import paths


@dataclass(frozen=True)
class Description:
    """What a workdir must remember to rebuild its model without the weights: WORKDIR/model.json.

    Attributes:
      task: a key of config.TASKS.
      family: the architecture's name in models.families.FAMILIES.
      arguments: of the model, without RUN_ARGUMENTS.
      preprocessing: of the images.
      class_names: by label.
      weights: where the parameters came from, "" for random initialization.
      sha256: of the weights' file or files, "" without.
      teachers: (origin, sha256) of each teacher, and of an autoencoder around the model.
      projections: shapes of the arrays that train beside the model's own, by path.
      ranks: of the kernels that are two factors (trees/factored.py), by path.
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
    ranks: dict[str, int] = field(default_factory=dict)
    started_from: str = ""
    assumed: tuple[str, ...] = ()


def read_weights(config: ConfigDict) -> convert.Weights | None:
    """The weights that the config names, or None for random initialization."""
    if not config.model.weights:
        return None
    return convert.read_weights(
        config.model.weights,
        allow_pickle=config.model.allow_pickle,
        dropped=config.model.drop,
        family=families.for_task(config.task, "vit", {})[0],
    )


def _architecture(
    config: ConfigDict, weights: convert.Weights | None
) -> tuple[str, dict[str, Any]]:
    """(family, arguments) of the weights' model, with what the config names beside or instead."""
    model = config.model
    family = ""
    arguments: dict[str, Any] = {}
    if weights is not None:
        family, arguments = families.for_task(config.task, *convert.recognize(weights))
    if model.variant:
        named, sizes = families.for_task(config.task, *find_variant(model.variant))
        if family and families.takes_backbone(named, family):  # see parameters.backbone_prefix
            family, arguments = named, {"in_channels": arguments["in_channels"]}
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
    if families.GENERATION == FAMILIES[family].task != config.task:
        raise UserError(
            f"{model.variant or model.weights} is a {family}, which makes images: config.task "
            f"{config.task} has no use for it"
        )
    return family, arguments | _checked_arguments(model.arguments, FAMILIES[family].arguments)


def own_image_size(
    weights: convert.Weights, arguments: Mapping[str, Any]
) -> tuple[int, int] | None:
    """(height, width) of the images that weights were used with, if anything tells.

    Args:
      weights: as they were read.
      arguments: of the model that was recognized in them.
    """
    size = arguments.get("image_size") or (weights.preprocessing or {}).get("image_size")
    return tuple(size) if size else None


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
        own_size = old.preprocessing.image_size
    else:
        own_size = own_image_size(weights, convert.recognize(weights)[1]) if weights else None
        family, arguments = _architecture(config, weights)
        own = (weights.preprocessing if weights is not None else None) or {}
    known = FAMILIES[family]
    own = {**known.preprocessing, **own}
    if "in_channels" not in arguments:
        arguments["in_channels"] = known.defaults["in_channels"]
    for name, given in (("mean", model.mean), ("std", model.std)):
        values = tuple(given or own.get(name) or arguments.get(name) or known.defaults[name])
        arguments[name] = _per_channel(f"config.model.{name}", values, arguments["in_channels"])
    preprocessing = find_task(config.task).make_preprocessing(config, own, arguments)
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
    arguments |= _merging(model.merge, family)
    head_of = arguments.get("num_classes")
    arguments["num_classes"] = 0 if headless else len(class_names)
    arguments = {name: value for name, value in arguments.items() if name not in RUN_ARGUMENTS}
    if preprocessing.image_size != own_size:
        built = families.build_model(family, **arguments)
        families.check_image_size(built, preprocessing.image_size, "config.model.image_size")
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
        ranks=_ranks(weights, family, shrinking is not None) if old is None else old.ranks,
        assumed=convert.assumptions(weights) if weights is not None and not model.variant else (),
    )


def _merging(merge: float, family: str) -> dict[str, float]:
    """The argument that config.model.merge is; {}: the weights' own."""
    if merge == -1:
        return {}
    if "merge" in FAMILIES[family].arguments:
        return {"merge": float(merge)}
    if merge:
        raise UserError(f"config.model.merge: {family} has no tokens that merge: leave it out")
    return {}


def with_merging(config: ConfigDict, description: Description) -> Description:
    """The description of a finished run, whose model merges as many tokens as the config says."""
    merging = _merging(config.model.merge, description.family)
    return dataclasses.replace(description, arguments={**description.arguments, **merging})


def _ranks(weights: convert.Weights | None, family: str, partly: bool) -> dict[str, int]:
    """Of the weights' factored kernels, where the model has all of them: not as its backbone."""
    if weights is None or partly or convert.recognize(weights)[0] != family:
        return {}
    return convert.ranks_of(weights)


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


def save_description(description: Description, path: Path) -> None:
    """Writes a description as JSON, the model.json of a workdir."""
    write_json(dataclasses.asdict(description), path)


def load_description(path: Path) -> Description:
    """Reads a description from the model.json of a workdir.

    Raises:
      UserError: there is none, or a damaged one.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} holds no run: there is no {path.name} in it")
    record = read_json(path)
    try:
        preprocessing = find_task(record["task"]).load_preprocessing(record.pop("preprocessing"))
        description = Description(**record, preprocessing=preprocessing)
        families.check_arguments(description.family, description.arguments)
        names, shapes = description.class_names, description.projections
        if not all(isinstance(name, str) for name in names) or isinstance(names, str):
            raise TypeError("`class_names` is no list of texts")
        if not all(type(side) is int and side > 0 for pair in shapes.values() for side in pair):
            raise TypeError("`projections` is no map to shapes")
        if not all(type(rank) is int and rank > 0 for rank in description.ranks.values()):
            raise TypeError("`ranks` is no map to ranks")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged, or of another version: {error}") from error
    return description


# Heads --------------------------------------------------------------------------------------------


def model_shapes(model: Any, image_size: tuple[int, int]) -> Any:
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


def find_head(model: Any, image_size: tuple[int, int]) -> tuple[set[str], set[str]]:
    """(paths of what is made for a number of classes, all paths), whatever the architecture."""
    least = max(model.num_classes, 1)  # without classes there is no head
    one, two = (
        paths.flatten(model_shapes(model.clone(num_classes=count), image_size))
        for count in (least, least + 1)
    )
    every = {path.partition("/")[2]: leaf.shape != one[path].shape for path, leaf in two.items()}
    return {path for path, differs in every.items() if differs}, set(every)


def _check_head(
    reinitialize: tuple[str, ...], model: Any, image_size: tuple[int, int], own: int
) -> None:
    """What weights have that was made for `own` classes serves the model for no other number."""
    head, every = find_head(model, image_size)
    kept = sorted(head - paths.select(every, reinitialize, field="config.model.reinitialize"))
    if not kept:
        return
    have = f"a head of {own} classes" if own else "no head"
    raise UserError(
        f"the weights have {have} and config.data.train has {model.num_classes}: set "
        f"--config.model.reinitialize={rules_of(kept, reinitialize)} to begin with a new head "
        f"({', '.join(kept)})"
    )


def rules_of(names: Collection[str], others: Sequence[str] = ()) -> str:
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
    if len(values) == 1:
        return values * channels
    if len(values) != 3:
        raise UserError(f"{field}: {len(values)} numbers for images of {channels} channels")
    return load.adapt_values(values, channels)
