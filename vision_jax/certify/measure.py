"""One certificate: everything that is measured of one imported model."""

import importlib.metadata
import platform
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vision_jax
from vision_jax import convert
from vision_jax.certify import preprocessing, random_weights, references
from vision_jax.certify.conditions import sample_conditions
from vision_jax.certify.references import Reference
from vision_jax.certify.texts import sample_tokens
from vision_jax.convert.detectors import is_detector
from vision_jax.convert.read import Weights
from vision_jax.convert.table import Entry, Table
from vision_jax.convert.tables import find_table, table_for_export
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES, GENERATION, build_model
from vision_jax.trees import paths

BARS = {"float32": 1e-5, "float64": 1e-12}
LIBRARIES = ("torch", "timm", "torchvision", "transformers", "jax", "flax", "numpy", "pillow")
BESIDE = {
    "yolox": ("pixeltable-yolox",),
    "diffusers": ("diffusers",),
}  # libraries of one source alone
APART = 2e-6  # of the largest score: what keeps two proposals in their order in float32
PIXELS_APART = 1  # of 255: RF-DETR's processor computes in floats


def certify(entry: Entry, weights: str | None = None, *, seed: int = 0) -> dict[str, Any]:
    """The certificate of one variant.

    Args:
      entry: which.
      weights: a file with weights for the reference, or None for random ones.
      seed: of the random weights, images and statistics.

    Raises:
      UserError: the source library has no such model.
    """
    reference = references.build_reference(entry)
    size = (entry.image_size,) * 2
    if weights is None:
        random_weights.randomize(reference.module, seed)
        random_weights.randomize_statistics(reference, size, channels_of(entry), seed)
    else:
        references.load_weights(reference, Path(weights))
    certificate = {
        "name": entry.name,
        "title": entry.title,
        "source": entry.source,
        "build": entry.build,
        "reduced": dict(entry.reduced),
        "published": entry.published,
        "license": entry.license or references.license_of(entry),
        "versions": {"vision_jax": vision_jax.__version__, "python": platform.python_version()}
        | {
            name: importlib.metadata.version(name)
            for name in (*LIBRARIES, *BESIDE.get(entry.source, ()))
        },
        "weights": "random, every statistic randomized" if weights is None else Path(weights).name,
        "seed": seed,
        "image_size": entry.image_size,
    }
    # One long chain of shapes that do not recur in other models.
    whole = entry.source == "yolox" or is_detector(entry.build)
    measured = certify_reference(reference, size, seed=seed, of_entry=entry, whole=whole)
    full_size = _full_size(entry, measured["family"], measured.pop("arguments"))
    return certificate | measured | full_size


def channels_of(entry: Entry) -> int:
    """Channels of the images that the reference takes."""
    given = dict(entry.arguments)
    return int(given.get("in_chans", given.get("num_channels", given.get("in_channels", 3))))


@dataclass(frozen=True)
class Imported:
    """A reference's file, read and imported.

    Attributes:
      weights: the file's tensors, which are read when they are asked for.
      sha256: of the file.
      family: what was recognized, with
      arguments: those of the family's model.
      target: path -> the shape that the model wants there.
      flat: path -> array, what was imported.
      dropped: names of tensors that have no use in the model.
      exporting: the table that writes the source's names.
    """

    weights: Weights
    sha256: str
    family: str
    arguments: Mapping[str, Any]
    target: Mapping[str, Any]
    flat: Mapping[str, np.ndarray]
    dropped: list[str]
    exporting: Table

    @property
    def kept(self) -> list[str]:
        """Names of the file's tensors without the dropped ones."""
        return [name for name in self.weights.tensors if name not in self.dropped]


def certify_reference(
    reference: Reference,
    image_size: tuple[int, int],
    *,
    seed: int = 0,
    of_entry: Entry | None = None,
    whole: bool = False,
    as_family: str = "",
) -> dict[str, Any]:
    """What is measured of a reference that is saved, read, imported, compared, exported, rebuilt.

    Args:
      reference: with its weights.
      image_size: (height, width) of the compared images in pixels.
      seed: of the images.
      of_entry: for the preprocessing of a published variant; None leaves it out.
      whole: our model is compiled as one program, not operation by operation.
      as_family: what to take its file for, where it could be more than one; an entry says it.
    """
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        as_family = of_entry.family if of_entry is not None else as_family
        imported = _import(reference, image_size, folder / "source", as_family)
        family, arguments = imported.family, imported.arguments
        images = _sample_images(reference, family, arguments, image_size, seed + 1)
        errors, agreement = _compare(reference, imported, images, whole)
        identical = _round_trip_is_identical(reference, imported)
        record, pixels = None, None
        if of_entry is not None:
            record, pixels = preprocessing.measure(of_entry, reference, seed)
        strict, rebuilt = _rebuild(reference, imported, images, record, folder / "back")

    measured = {
        "family": family,
        "arguments": arguments,
        "sha256": imported.sha256,
        "errors": errors,
        "worst": {dtype: max(values.values()) for dtype, values in errors.items()},
        "top1_agreement": agreement,
        "tensors": len(imported.weights.tensors),
        "tensors_consumed": len(imported.kept),
        "tensors_dropped": sorted(imported.dropped),
        "parameters_filled": len(imported.flat),
        "parameters_in_model": len(imported.target),
        "round_trip_identical": identical,
        "strict_load": strict,
        "rebuilt_logits_error": rebuilt,
        "preprocessing": pixels,
    }
    reasons = _reasons(measured)
    return {**measured, "pass": not reasons, "reasons": reasons}


def _import(
    reference: Reference, image_size: tuple[int, int], folder: Path, as_family: str
) -> Imported:
    """What the library saves, as our reader reads it."""
    folder.mkdir()
    weights = convert.read_weights(reference.save(folder), family=as_family)
    sha256 = weights.sha256  # while the file is there
    family, arguments = convert.recognize(weights)
    table = find_table({name: x.shape for name, x in weights.tensors.items()}, as_family)
    target = _target(family, arguments, image_size)
    flat = convert.import_weights(weights, target, arguments)
    dropped = [
        name for name in weights.tensors if any(re.fullmatch(rule, name) for rule in table.dropped)
    ]
    exporting = table_for_export(reference.source, family, arguments)
    return Imported(weights, sha256, family, arguments, target, flat, dropped, exporting)


def _compare(
    reference: Reference, imported: Imported, images: np.ndarray, whole: bool
) -> tuple[dict[str, dict[str, float]], float | None]:
    """(dtype -> name of an output -> its error, share of images with the same top class).

    The latter is None of what has no classes.
    """
    arguments = imported.arguments
    views: list[tuple[np.ndarray, np.ndarray | None]] = [(images, None)]
    if "mask_padding" in arguments:  # a padded batch, and another size by itself
        views = [(images, _padding_mask(images)), (images[:, : images.shape[1] * 5 // 7], None)]
    errors: dict[str, dict[str, float]] = {}
    agreement = 1.0
    for dtype in BARS:
        errors[dtype] = {}
        for view, mask in views:
            normalized = _normalized(view, arguments, dtype)
            if mask is not None:
                normalized *= mask[..., None]
            theirs = reference.outputs(normalized, imported.exporting.modules(arguments), mask)
            ours = _outputs(imported, view, dtype, theirs, mask, whole)
            for name in theirs:
                error = relative_error(ours[name], theirs[name])
                errors[dtype][name] = max(error, errors[dtype].get(name, 0.0))
            if _has_classes(imported.family):
                agreement = min(agreement, _agreement(ours["logits"], theirs["logits"]))
    return errors, agreement if _has_classes(imported.family) else None


def _has_classes(family: str) -> bool:
    return family != "mae" and FAMILIES[family].task != GENERATION


def _agreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of images, queries or pixels with the same top class.

    Of a map's thousands of pixels some have two best classes that are nearer to each other than
    float32 rounds: those don't count.
    """
    theirs = aligned(theirs, ours.shape)
    same = ours.argmax(-1) == theirs.argmax(-1)
    if ours.ndim == 4 and ours.shape[-1] > 1:
        second, first = np.moveaxis(np.partition(theirs, -2, axis=-1)[..., -2:], -1, 0)
        same = same[first - second > 2 * BARS["float32"] * np.abs(theirs).max()]
    return float(same.mean())


def _round_trip_is_identical(reference: Reference, imported: Imported) -> bool:
    """Whether the exported tensors are those of the file, bit by bit, while it is there."""
    tensors, _ = convert.export_weights(
        imported.flat, imported.family, imported.arguments, to=reference.source
    )
    file = ((name, imported.weights.tensors[name]) for name in imported.kept)
    return set(imported.kept) <= set(tensors) and all(
        tensors[name].dtype == x.dtype and np.array_equal(tensors[name], x) for name, x in file
    )


def _rebuild(
    reference: Reference,
    imported: Imported,
    images: np.ndarray,
    record: Mapping[str, Any] | None,
    folder: Path,
) -> tuple[bool | str, float | None]:
    """(whether the source loads our export strictly or why not, the error of its logits then)."""
    try:
        again = references.rebuild(
            imported.exporting, imported.family, imported.arguments, imported.flat, record, folder
        )
        normalized = _normalized(images, imported.arguments, "float32")
        back, first = (_main(made.outputs(normalized)) for made in (again, reference))
        return True, relative_error(back, first)
    except (RuntimeError, UserError, TypeError, ValueError) as error:
        return str(error).splitlines()[0], None


def _main(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The output that all the rest is for."""
    return next(
        outputs[name] for name in ("logits", "reconstruction", "prediction") if name in outputs
    )


def _reasons(measured: Mapping[str, Any]) -> list[str]:
    """Why a certificate fails; empty where it passes."""
    worst, strict, rebuilt = (
        measured[name] for name in ("worst", "strict_load", "rebuilt_logits_error")
    )
    reasons = [
        f"{dtype} error {worst[dtype]:.1e} is over {bar:.0e}"
        for dtype, bar in BARS.items()
        if not worst[dtype] <= bar
    ]
    reasons += [] if measured["top1_agreement"] in (1, None) else ["top-1 differs"]
    identical = measured["round_trip_identical"]
    reasons += [] if identical else ["the round trip is not bit-identical"]
    reasons += [] if strict is True else [f"the source cannot load the export: {strict}"]
    pixels = measured["preprocessing"]
    apart = pixels["largest_difference_in_255ths"] if pixels else 0
    reasons += [] if apart <= PIXELS_APART else [f"preprocessing differs by {apart:g} grey levels"]
    reasons += [] if rebuilt is None or rebuilt <= BARS["float32"] else ["rebuilt logits differ"]
    return reasons


def _sample_images(
    reference: Reference,
    family: str,
    arguments: Mapping[str, Any],
    size: tuple[int, int],
    seed: int,
) -> np.ndarray:
    """Two images f64[2, H, W, C].

    RF-DETR ranks its proposals, and queries go by rank: where two scores differ by no more than
    float32 rounds, either order is right, and everything that follows differs. So its images are
    the first two that leave no such pair.
    """
    channels = arguments["in_channels"]
    if family != "rf_detr":
        return random_weights.sample_images(2, size, channels, seed)
    kept: list[np.ndarray] = []
    while len(kept) < 2:
        image = random_weights.sample_images(1, size, channels, seed)
        scores = reference.outputs(_normalized(image, arguments, "float64"))["encoder_logits"]
        scores = scores.max(-1)
        if np.diff(np.sort(scores)).min() > APART * np.abs(scores).max():
            kept.append(image)
        seed += 1
    return np.concatenate(kept)


def _padding_mask(images: np.ndarray) -> np.ndarray:
    """bool[B, H, W]: the last image's bottom and right are padding."""
    height, width = images.shape[1:3]
    mask = np.ones(images.shape[:3], bool)
    mask[-1, height * 3 // 4 + 1 :] = mask[-1, :, width * 2 // 3 + 1 :] = False
    return mask


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference relative to the largest value; infinite for other shapes or no numbers.

    Of a map with as many channels as rows and columns the shape doesn't say which axis is which:
    either order counts.
    """
    readings = [aligned(theirs, ours.shape)]
    if theirs.ndim == 4 and len({*theirs.shape[1:]}) == 1:
        readings.append(theirs.transpose(0, 2, 3, 1))
    if ours.shape != readings[0].shape or not np.isfinite(theirs).all():
        return float("inf")
    return float(min(np.abs(ours - x).max() for x in readings) / np.abs(theirs).max())


def aligned(theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A source's [B, C, h, w], [B, C, 1, 1] or [B, h·w, C] in the shape [B, h, w, C] or [B, C]."""
    if theirs.shape == shape:
        return theirs
    if theirs.ndim == 4 and len(shape) == 4 and theirs.shape[1] == shape[3]:
        theirs = theirs.transpose(0, 2, 3, 1)
    if theirs.shape != shape and theirs.size == np.prod(shape):
        theirs = theirs.reshape(shape)
    return theirs


def _target(family: str, arguments: Mapping[str, Any], image_size: tuple[int, int]) -> Any:
    """Paths of parameters and statistics with their shapes."""
    model = build_model(family, **arguments)
    images = jnp.zeros((1, *image_size, arguments["in_channels"]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return {path: leaf for tree in shapes.values() for path, leaf in paths.flatten(tree).items()}


def _normalized(images: np.ndarray, arguments: Mapping[str, Any], dtype: str) -> np.ndarray:
    mean, std = (np.asarray(arguments[name]) for name in ("mean", "std"))
    return ((images - mean) / std).astype(dtype)


def _outputs(
    imported: Imported,
    images: np.ndarray,
    dtype: str,
    wanted: Mapping[str, Any],
    mask: np.ndarray | None,
    whole: bool,
) -> dict[str, np.ndarray]:
    """Our logits and named intermediates, those that the reference has too.

    Padded batches are computed as the reference does.

    Operation by operation: the same shapes recur in block after block and model after model, and
    each is compiled once, while a jitted model is compiled whole. That is faster where models are
    small and shapes do not recur.
    """
    arguments = {**imported.arguments, **({} if mask is None else {"mask_padding": False})}
    with jax.enable_x64(dtype == "float64"):
        model = build_model(imported.family, **arguments, dtype=jnp.dtype(dtype))
        like = jax.eval_shape(
            model.init, jax.random.key(0), jnp.zeros((1, *images.shape[1:]), dtype)
        )
        variables = {
            collection: paths.unflatten(
                tree,
                {
                    path: jnp.asarray(
                        imported.flat[path],
                        dtype if np.issubdtype(leaf.dtype, np.floating) else None,
                    )
                    for path, leaf in paths.flatten(tree).items()
                },
            )
            for collection, tree in like.items()
        }
        given = [jnp.asarray(images, dtype), *([] if mask is None else [jnp.asarray(mask)])]
        if imported.family == "mae":  # the reference hides the last patches
            given.append(_first_patches(model.grid, len(images)))
        if imported.family == "siglip":
            given.append(_texts(imported.arguments, len(images)))
        if imported.family == "dit":
            given += _conditions(imported.arguments, len(images), dtype)
        apply = partial(model.apply, return_features=True)
        result, features = (jax.jit(apply) if whole else apply)(variables, *given)
        if imported.family == "siglip":
            alike = result["image"] @ result["text"].T
            result["logits"] = jnp.exp(result["logit_scale"]) * alike + result["logit_bias"]
        # Of a detector's layers the last is the prediction.
        if isinstance(result, dict):
            beside = [name for name in ("boxes_cxcywh_01", "mask_logits") if name in result]
            layered = ["logits", *beside] if beside and result["logits"].ndim == 4 else []
            last = {name: result[name][-1] for name in layered}
            outputs = {**features, **result, **last}
        else:
            outputs = {**features, "logits": result}
        return {name: np.asarray(outputs[name]) for name in wanted}


def _first_patches(grid: tuple[int, int], images: int) -> jax.Array:
    """i32[B, n]: the quarter that an MAE sees by default, of patches in their order."""
    count = grid[0] * grid[1] // 4
    return jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (images, count))


def _texts(arguments: Mapping[str, Any], count: int) -> jax.Array:
    """i32[B, L]: those that the reference is given."""
    length, vocab_size = arguments["text_length"], arguments["vocab_size"]
    return jnp.asarray(sample_tokens(count, length, vocab_size), jnp.int32)


def _conditions(arguments: Mapping[str, Any], count: int, dtype: str) -> list[jax.Array]:
    """(times, classes) that the reference is given."""
    time, labels = sample_conditions(count, arguments["num_classes"], arguments["predicts"])
    return [jnp.asarray(time, dtype), jnp.asarray(labels, jnp.int32)]


def _full_size(entry: Entry, family: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters and GFLOPs of the whole variant, also where its certificate is of fewer blocks."""
    if entry.reduced:
        family, arguments = references.full_arguments(entry)
    model = build_model(family, **arguments)
    size = (entry.image_size,) * 2
    images = jnp.zeros((1, *size, arguments["in_channels"]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    texts = [_texts(arguments, 1)] if family == "siglip" else []
    cost = jax.jit(model.apply).lower(shapes, images, *texts).cost_analysis() or {}
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])),
        "gflops": round(float(cost["flops"]) / 1e9, 3),
    }
