"""A model's parameters from PyTorch weights, and back into a file that PyTorch programs read."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.convert import engine
from vision_jax.convert.fields import check_values
from vision_jax.convert.files import Tensors, held
from vision_jax.convert.files import write_safetensors as write_safetensors
from vision_jax.convert.processors import shown
from vision_jax.convert.read import Weights, read_weights, timm_cfg
from vision_jax.convert.table import Table
from vision_jax.convert.tables import find_table, infer_arguments, naming_for_export, shapes_of
from vision_jax.errors import UserError
from vision_jax.logging import say
from vision_jax.models.families import FAMILIES, RUN_ARGUMENTS, build_model, check_arguments
from vision_jax.trees import paths


def recognize(weights: Weights) -> tuple[str, dict[str, Any]]:
    """(family, arguments for `build_model`) of the model that the weights are.

    With these arguments the model computes what the weights did where they came from; num_classes
    (0 without a head), in_channels, and mean and std where the weights bring them are among them.

    Raises:
      UserError: no architecture that is known, or a relative that the model cannot be.
    """
    table, arguments = _recognize(weights)
    arguments = {name: value for name, value in arguments.items() if name not in RUN_ARGUMENTS}
    preprocessing = weights.preprocessing or {}
    arguments |= {name: preprocessing[name] for name in ("mean", "std") if preprocessing.get(name)}
    for name in ("mean", "std"):
        arguments[name] = adapt_values(arguments[name], arguments["in_channels"])
    return table.family, arguments


def table_of(weights: Weights) -> Table:
    """The table that the weights are named by.

    Raises:
      UserError: none.
    """
    return _recognize(weights)[0]


def assumptions(weights: Weights) -> tuple[str, ...]:
    """What was assumed of weights without a config, of what their tensors don't show.

    Other networks have such tensors too, whose configs say what they compute.
    """
    if weights.metadata.get("vision_jax"):
        return ()
    table, arguments = _recognize(weights)
    if weights.metadata.get("config"):
        defaults = FAMILIES[table.family].defaults
        told = (name for name in table.by_name if arguments[name] != defaults[name])
        return tuple(f"{name}={arguments[name]}, by the weights' name" for name in told)
    name = _named(weights, table)
    if name and FAMILIES[table.family].variant(name) is not None:
        named = f"{table.source}'s {name}, by the name of the file"
        return (named, *_prediction(weights, table))
    unseen = [it for it in table.unseen if it != "predicts"]
    shown = tuple(f"{it}={arguments[it]}" if it in arguments else it for it in unseen)
    return (*shown, *_prediction(weights, table))


def unknown_fields(weights: Weights) -> tuple[str, ...]:
    """Names of the fields of config.json that its source ignores, and so does this reader."""
    fields = _recognize(weights)[0].fields
    return tuple(check_values(weights.metadata.get("config", {}), fields)) if fields else ()


def remarks(weights: Weights, assumed: Sequence[str] | None = None) -> list[str]:
    """Lines for whoever uses the weights: their license, what was assumed, fields nobody knows.

    Args:
      weights: as they were read.
      assumed: of them; None: all `assumptions`.
    """
    lines = []
    if license := table_of(weights).license:
        lines.append(f"license of the published weights of this kind: {license}")
    if assumed := assumptions(weights) if assumed is None else assumed:
        lines.append(f"assumed, since no config came with them: {', '.join(assumed)}")
    if ignored := unknown_fields(weights):
        lines.append(f"fields of its config.json that nobody knows: {', '.join(ignored[:8])}")
    return lines


def _prediction(weights: Weights, table: Table) -> tuple[str, ...]:
    """What a generator is taken to predict, where only the file's name can tell."""
    if "predicts" not in table.unseen or weights.metadata.get("config"):
        return ()
    predicts = _recognize(weights)[1]["predicts"]
    other = "velocity" if predicts == "noise" else "noise"
    return (
        f"that it predicts {predicts}; if it is {other}, call the file sit-xl-2.pt or dit-xl-2.pt, "
        f'or model.safetensors with {{"predicts": "{other}"}} in a config.json beside it, or give '
        f"predicts={other!r} to load_model",
    )


def _named(weights: Weights, table: Table) -> str:
    """timm's architecture that a lone file is called by, if its tensors are of such sizes."""
    match = weights.files and re.match(table.file_names, weights.files[0].name.lower())
    if not table.file_names or not match:
        return ""
    sizes = FAMILIES[table.family].variant(match[0]) or {}
    config = {"architecture": match[0]}
    try:
        found = infer_arguments(table, shapes_of(weights.tensors), {"config": config})
    except UserError as error:
        raise UserError(
            f"{error}. So says the name of the file; if it is wrong, rename the file"
        ) from None
    told = ("width", "widths", "depth", "depths")
    agree = all(found[key] == sizes[key] for key in told if key in found and key in sizes)
    return match[0] if agree else ""


def _recognize(weights: Weights) -> tuple[Table, dict[str, Any]]:
    shapes = shapes_of(weights.tensors)
    metadata = weights.metadata
    try:
        table = find_table(shapes, weights.family)
        bare = not (metadata.get("config") or metadata.get("vision_jax"))
        if bare and (name := _named(weights, table)):
            metadata = {**metadata, "config": {"architecture": name}}
        inferred = infer_arguments(table, shapes, metadata)
    except UserError as error:
        raise UserError(f"{weights.origin}: {error}") from None
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{weights.origin}: what its config or header says makes no sense ({reason})"
        ) from None
    try:
        check_arguments(table.family, inferred)
    except UserError as error:
        raise UserError(f"{weights.origin}: its config or header: {error}") from None
    stages = inferred.get("depths", inferred.get("depth", 0))
    # Before anything is built by it: a block has at least a tensor.
    if sum(stages if isinstance(stages, tuple) else (stages,)) > len(shapes):
        raise UserError(
            f"{weights.origin}: its header or config says {stages!r} blocks, of {len(shapes)} "
            "tensors in all; download it again"
        )
    return table, {**FAMILIES[table.family].defaults, **inferred}


def import_weights(
    weights: Weights,
    target: Mapping[str, Any],
    arguments: Mapping[str, Any],
    *,
    reinitialized: Sequence[str] = (),
    dropped: Sequence[str] = (),
    place: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> dict[str, Any]:
    """Parameters and BatchNorm statistics by path, all of them, or an error.

    Another image size resamples what depends on it, and another number of channels sums or repeats
    the first convolution's, both as timm does.

    Args:
      weights: those that `read_weights` found.
      target: path -> `jax.ShapeDtypeStruct`, of parameters and statistics together.
      arguments: of the model that `target` belongs to.
      reinitialized: paths that the caller initializes itself, a head for other classes, say. They
        are not in the result, and the file may have them in any shape or not at all.
      dropped: regular expressions of whole tensor names to leave out on purpose (`pooler\\..*`).
      place: see engine.import_tensors; numpy arrays without it, which are views into the file
        wherever they can be.

    Raises:
      UserError: the weights and the model differ; lists the tensors on both sides.
    """
    table, own = _recognize(weights)
    adapt = _adapter(table, own, arguments)
    try:
        return engine.import_tensors(
            weights.tensors,
            table.rules(own),
            target,
            skip=set(reinitialized),
            dropped=(*table.dropped, *dropped),
            adapt=adapt,
            place=place,
        )
    except UserError as error:
        raise UserError(f"{weights.origin} ({table.source}): {error}") from None


def load_model(
    spec: str, *, allow_pickle: bool = False, family: str = "", **arguments: Any
) -> tuple[Any, dict[str, Any]]:
    """A model and its variables, from wherever its weights are: generators, and what trains none.

    `vision_jax.load` gives classifiers, detectors and segmenters, with preprocessing and classes.

    Args:
      spec: as `read_weights` takes it.
      allow_pickle: read pickled files too.
      family: what to take the weights for, where they could be more than one.
      **arguments: of the model, instead of the weights' own: dtype, image_size, predicts, ...

    What was assumed of them and their license are said on the screen.

    Returns:
      (flax module, {"params": nested dicts of arrays}, with BatchNorm "batch_stats" too)

    Raises:
      UserError: no such weights, no known architecture, or arguments that don't fit them.
    """
    weights = read_weights(spec, allow_pickle=allow_pickle, family=family)
    name, own = recognize(weights)
    for line in remarks(weights):
        say(line)
    model = build_model(name, **{**own, **arguments})
    return model, variables_of(weights, model)


def variables_of(weights: Weights, model: Any) -> dict[str, Any]:
    """{"params": nested dicts of arrays} of weights for a model, with BatchNorm "batch_stats" too.

    Raises:
      UserError: the weights and the model differ.
    """
    size = getattr(model, "image_size", (8 * getattr(model, "size_divisor", 8),) * 2)
    images = jnp.zeros((1, *size, model.in_channels))
    like = jax.eval_shape(model.init, jax.random.key(0), images)
    target = {path: leaf for tree in like.values() for path, leaf in paths.flatten(tree).items()}
    flat = import_weights(
        weights, target, arguments_of(model), place=lambda path, array: jnp.asarray(array)
    )
    return {
        collection: paths.unflatten(tree, {path: flat[path] for path in paths.flatten(tree)})
        for collection, tree in like.items()
    }


def import_lazily(
    weights: Weights, target: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Tensors:
    """What `import_weights` gives, checked as a whole, and then computed array by array.

    Raises:
      UserError: the weights and the model differ; lists the tensors on both sides.
    """
    import_weights(weights, target, arguments, place=lambda path, array: None)
    table, own = _recognize(weights)
    tensors = weights.tensors
    if not isinstance(tensors, Tensors):
        tensors = Tensors({name: held(array) for name, array in tensors.items()})
    adapt = _adapter(table, own, arguments)
    return engine.import_lazily(tensors, table.rules(own), target, adapt)


def _adapter(
    table: Table, own: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Callable[[str, np.ndarray], np.ndarray]:
    """(path, array) -> array for the image size and channels of the model that is wanted."""
    known = FAMILIES[table.family].arguments  # the model may be one around it
    wanted = {**own, **{name: x for name, x in arguments.items() if name in known}}
    stem = build_model(table.family, **wanted).stem

    def adapt(path: str, array: np.ndarray) -> np.ndarray:
        if path == stem:
            return adapt_channels(array, wanted["in_channels"])
        return table.adapt(path, array, own, wanted)

    return adapt


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """The first convolution's kernel f[h, w, in, out] for images of another number of channels.

    One channel takes the sum over the old ones. Others repeat the old channels in turn, scaled so
    that the sum over channels keeps its size. timm/models/_manipulate.py adapt_input_conv.
    """
    if kernel.ndim != 4 or kernel.shape[2] == channels:
        return kernel
    old = kernel.shape[2]
    if channels == 1:
        return kernel.sum(2, keepdims=True, dtype=kernel.dtype)
    repeated = np.concatenate([kernel] * -(-channels // old), axis=2)[:, :, :channels]
    return repeated * kernel.dtype.type(old / channels)


def adapt_values(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A mean or std of three channels for another number: their mean for one, else in turn."""
    if len(values) == 1:
        return tuple(values) * channels
    if len(values) != 3:
        return tuple(values)
    if channels == 1:
        return (sum(values) / 3,)
    return tuple(values[index % 3] for index in range(channels))


def export_weights(
    params: Mapping[str, Any],
    family: str,
    arguments: Mapping[str, Any],
    *,
    to: str = "timm",
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    """Tensors by name and a header for `write_safetensors`; bit-identical on the way back.

    Args:
      params: plain arrays by path, BatchNorm statistics among them (adapters merged). Of `Tensors`
        the result is computed tensor by tensor when it is written.
      family: of the model.
      arguments: all of the model's; they go into the header, so the file loads by itself.
      to: "timm", "torchvision" or "transformers".
      class_names: names of the classes, for the header.
      preprocessing: how images were prepared, for the header.

    Raises:
      UserError: the naming has no place for such a model.
    """
    table = naming_for_export(to, family, arguments)
    rules = table.rules(arguments)
    tensors: Mapping[str, np.ndarray]
    if isinstance(params, Tensors):
        tensors = engine.export_lazily(params, rules)
    else:
        tensors = engine.export_tensors(params, rules)
    lasting = {name: value for name, value in arguments.items() if name not in RUN_ARGUMENTS}
    ours = {
        "family": family,
        "arguments": lasting,
        "preprocessing": dict(preprocessing) if preprocessing else None,
        "class_names": list(class_names) if class_names else None,
    }
    return tensors, {"format": "pt", "vision_jax": json.dumps(ours)}


def arguments_of(model: Any) -> dict[str, Any]:
    """All arguments of a built model, by name."""
    return {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("parent", "name")
    }


def ranks_of(weights: Weights) -> dict[str, int]:
    """The rank of each kernel that the weights had as two factors, by path; {} of all others."""
    ranks = weights.metadata.get("vision_jax", {}).get("ranks")
    return dict(ranks) if isinstance(ranks, dict) else {}


def class_names_of(weights: Weights) -> list[str] | None:
    """Names of the classes: our header's, the source's config's, or those of all such files.

    A name keeps its number; numbers without a name are called LABEL_0 and so on, as transformers
    calls them.

    Raises:
      UserError: names by something that is no number, or too large a one.
    """
    ours = weights.metadata.get("vision_jax", {}).get("class_names")
    if isinstance(ours, list):
        return [str(name) for name in ours]
    config = weights.metadata.get("config", {})
    timm = (timm_cfg(config) or {}).get("label_names")
    for field, names in (
        ("class_names", config.get("class_names")),  # of torchvision's folders
        ("label_names", timm),
        ("id2label", config.get("id2label")),
        ("id2label", weights.metadata.get("pipeline")),  # of a DiT, in the folder around its own
    ):
        if isinstance(names, list) and names:
            return [str(name) for name in names]
        if isinstance(names, dict) and names:
            return _names_by_number(names, f"{weights.origin}: config.json: {field}")
    known = list(find_table(shapes_of(weights.tensors), weights.family).class_names)
    if not known or len(known) != _recognize(weights)[1]["num_classes"]:
        return None
    return known


def _names_by_number(names: Mapping[str, Any], what: str) -> list[str]:
    numbers: dict[int, str] = {}
    for key, name in names.items():
        if not re.fullmatch(r"[0-9]{1,6}", str(key)) or int(key) in numbers:
            raise UserError(f"{what} has the key {shown(key)}: use each class's number, once")
        numbers[int(key)] = str(name)
    return [numbers.get(i, f"LABEL_{i}") for i in range(max(numbers) + 1)]
