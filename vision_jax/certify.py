"""Certificates: proof, number by number, that an imported model computes what its source computes.

    python -m vision_jax.certify timm/resnet50
    python -m vision_jax.certify timm/resnet50 --weights=model.safetensors
    python -m vision_jax.certify --all --jobs=2
    python -m vision_jax.certify --render

NAME is one of docs/zoo.md, or any timm/ARCHITECTURE or torchvision/BUILDER. The twin in PyTorch has
random weights with every statistic randomized, or those of --weights. docs/certificates.md says
what a certificate proves and how to read one. Needs pip install 'vision_jax[parity]'.
"""

import argparse
import difflib
import gc
import importlib.metadata
import importlib.util
import json
import math
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import vision_jax
from vision_jax import convert
from vision_jax.convert.table import Entry
from vision_jax.convert.tables import ZOO, find_table, table_for_export
from vision_jax.data.detection_transforms import DetectionPreprocessing, detection_eval_transform
from vision_jax.data.transforms import Preprocessing, eval_transform
from vision_jax.errors import UserError
from vision_jax.models.families import build_model
from vision_jax.trees import paths

if TYPE_CHECKING:
    from vision_jax.convert.twins import Twin

BARS = {"float32": 1e-5, "float64": 1e-12}
CERTIFICATES = Path("docs/certificates")
TABLE = Path("docs/zoo.md")
LIBRARIES = ("torch", "timm", "torchvision", "transformers", "jax", "flax", "numpy", "pillow")
APART = 2e-6  # of the largest score: what keeps two proposals in their order in float32
PIXELS_APART = 1  # of 255: RF-DETR's processor computes in floats
ODD_SIZES = ((301, 417), (233, 199), (97, 512))  # (height, width) of the preprocessing's images,
LEFT_OVER = 4  # and so many for each of which another number of pixels is left beside the crop


# One certificate ---------------------------------------------------------------------------------


def certify(entry: Entry, weights: str | None = None, *, seed: int = 0) -> dict[str, Any]:
    """The certificate of one variant.

    Args:
      entry: which.
      weights: a file with weights for the twin, or None for random ones.
      seed: of the random weights, images and statistics.

    Raises:
      UserError: the source library has no such model.
    """
    from vision_jax.convert import twins

    twin = twins.build_twin(entry)
    reduced = dict(entry.reduced)
    if weights is None:
        twins.randomize(twin.module, seed)
        twins.randomize_statistics(twin, (entry.image_size,) * 2, channels_of(entry), seed)
    else:
        twins.load_weights(twin, Path(weights))
    certificate = {
        "name": entry.name,
        "title": entry.title,
        "source": entry.source,
        "build": entry.build,
        "reduced": reduced,
        "published": entry.published,
        "license": entry.license or twins.license_of(entry),
        "versions": {"vision_jax": vision_jax.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
        "weights": "random, every statistic randomized" if weights is None else Path(weights).name,
        "seed": seed,
        "image_size": entry.image_size,
    }
    measured = certify_twin(twin, (entry.image_size,) * 2, seed=seed, of_entry=entry)
    size = _full_size(entry, measured["family"], measured.pop("arguments"))
    return certificate | measured | size


def channels_of(entry: Entry) -> int:
    """Channels of the images that the twin takes."""
    given = dict(entry.arguments)
    return int(given.get("in_chans", given.get("num_channels", 3)))


def certify_twin(
    twin: "Twin",
    image_size: tuple[int, int],
    *,
    seed: int = 0,
    of_entry: Entry | None = None,
    whole: bool = False,
) -> dict[str, Any]:
    """Everything that is measured: the twin saved, read, imported, compared, exported, rebuilt.

    Args:
      twin: with its weights.
      image_size: (height, width) of the compared images in pixels.
      seed: of the images.
      of_entry: for the preprocessing of a published variant; None leaves it out.
      whole: our model is compiled as one program, not operation by operation.
    """
    from vision_jax.convert import twins

    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        (folder / "source").mkdir()
        weights = convert.read_weights(twin.save(folder / "source"))
        sha256 = weights.sha256  # while the file is there
        family, arguments = convert.recognize(weights)
        table = find_table({name: x.shape for name, x in weights.tensors.items()})
        target = _target(family, arguments, image_size)
        flat = convert.import_weights(weights, target, arguments)
        dropped = [
            name
            for name in weights.tensors
            if any(re.fullmatch(rule, name) for rule in table.dropped)
        ]

        exporting = table_for_export(twin.source, family, arguments)
        images = _sample_images(twin, family, arguments, image_size, seed + 1)
        views: list[tuple[np.ndarray, np.ndarray | None]] = [(images, None)]
        if "mask_padding" in arguments:  # a padded batch, and another size by itself
            views = [(images, _padding_mask(images)), (images[:, : image_size[0] * 5 // 7], None)]
        errors: dict[str, dict[str, float]] = {}
        agreement = 1.0
        for dtype in BARS:
            errors[dtype] = {}
            for view, mask in views:
                normalized = _normalized(view, arguments, dtype)
                if mask is not None:
                    normalized *= mask[..., None]
                theirs = twin.outputs(normalized, exporting.modules(arguments), mask)
                ours = _run(family, arguments, flat, view, dtype, theirs, mask, whole)
                for name in theirs:
                    error = relative_error(ours[name], theirs[name])
                    errors[dtype][name] = max(error, errors[dtype].get(name, 0.0))
                top1 = ours["logits"].argmax(-1) == theirs["logits"].argmax(-1)
                agreement = min(agreement, float(top1.mean()))

        tensors, _ = convert.export_weights(flat, family, arguments, to=twin.source)
        kept = {name: x for name, x in weights.tensors.items() if name not in dropped}
        identical = set(kept) <= set(tensors) and all(
            tensors[name].dtype == x.dtype and np.array_equal(tensors[name], x)
            for name, x in kept.items()
        )
        preprocessing, pixels = None, None
        if of_entry is not None:
            preprocessing, pixels = _preprocessing_error(of_entry, twin, arguments, seed)
        strict: bool | str = True
        try:
            again = twins.rebuild(
                exporting, family, arguments, flat, preprocessing, folder / "back"
            )
            logits = again.outputs(_normalized(images, arguments, "float32"))["logits"]
            reference = twin.outputs(_normalized(images, arguments, "float32"))["logits"]
            rebuilt = relative_error(logits, reference)
        except (RuntimeError, UserError, TypeError, ValueError) as error:
            strict, rebuilt = str(error).splitlines()[0], None

    worst = {dtype: max(values.values()) for dtype, values in errors.items()}
    reasons = [
        f"{dtype} error {worst[dtype]:.1e} is over {bar:.0e}"
        for dtype, bar in BARS.items()
        if not worst[dtype] <= bar
    ]
    reasons += [] if agreement == 1 else ["top-1 differs"]
    reasons += [] if identical else ["the round trip is not identical to the bit"]
    reasons += [] if strict is True else [f"the source cannot load the export: {strict}"]
    apart = pixels["largest_difference_in_255ths"] if pixels else 0
    reasons += [] if apart <= PIXELS_APART else [f"preprocessing differs by {apart:g} grey levels"]
    reasons += [] if rebuilt is None or rebuilt <= BARS["float32"] else ["rebuilt logits differ"]
    return {
        "family": family,
        "arguments": arguments,
        "sha256": sha256,
        "errors": errors,
        "worst": worst,
        "top1_agreement": agreement,
        "tensors": len(weights.tensors),
        "tensors_consumed": len(kept),
        "tensors_dropped": sorted(dropped),
        "parameters_filled": len(flat),
        "parameters_in_model": len(target),
        "round_trip_identical": identical,
        "strict_load": strict,
        "rebuilt_logits_error": rebuilt,
        "preprocessing": pixels,
        "pass": not reasons,
        "reasons": reasons,
    }


def _sample_images(
    twin: "Twin", family: str, arguments: Mapping[str, Any], size: tuple[int, int], seed: int
) -> np.ndarray:
    """Two images f64[2, H, W, C].

    RF-DETR ranks its proposals, and queries go by rank: where two scores differ by no more than
    float32 rounds, either order is right, and everything that follows differs. So its images are
    the first two that leave no such pair.
    """
    from vision_jax.convert import twins

    channels = arguments["in_channels"]
    if family != "rf_detr":
        return twins.sample_images(2, size, channels, seed)
    kept: list[np.ndarray] = []
    while len(kept) < 2:
        image = twins.sample_images(1, size, channels, seed)
        scores = twin.outputs(_normalized(image, arguments, "float64"))["encoder_logits"].max(-1)
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
    """Largest difference relative to the largest value; infinite for other shapes or no numbers."""
    theirs = aligned(theirs, ours.shape)
    if ours.shape != theirs.shape or not np.isfinite(theirs).all():
        return float("inf")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def aligned(theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A source's [B, C, h, w], [B, C, 1, 1] or [B, h·w, C] in the shape [B, h, w, C] or [B, C]."""
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


def _run(
    family: str,
    arguments: Mapping[str, Any],
    flat: Mapping[str, np.ndarray],
    images: np.ndarray,
    dtype: str,
    wanted: Mapping[str, Any],
    mask: np.ndarray | None = None,
    whole: bool = False,
) -> dict[str, np.ndarray]:
    """Our logits and named intermediates, those that the twin has too; of padded batches its way.

    Operation by operation: the same shapes recur in block after block and model after model, and
    each is compiled once, while a jitted model is compiled whole. That is faster where models are
    small and shapes do not recur.
    """
    with jax.enable_x64(dtype == "float64"):
        if mask is not None:
            arguments = {**arguments, "mask_padding": False}
        model = build_model(family, **arguments, dtype=jnp.dtype(dtype))
        like = jax.eval_shape(
            model.init, jax.random.key(0), jnp.zeros((1, *images.shape[1:]), dtype)
        )
        variables = {
            collection: paths.unflatten(
                tree,
                {
                    path: jnp.asarray(
                        flat[path], dtype if np.issubdtype(leaf.dtype, np.floating) else None
                    )
                    for path, leaf in paths.flatten(tree).items()
                },
            )
            for collection, tree in like.items()
        }
        given = [jnp.asarray(images, dtype), *([] if mask is None else [jnp.asarray(mask)])]
        apply = partial(model.apply, return_features=True)
        result, features = (jax.jit(apply) if whole else apply)(variables, *given)
        # Of a detector's layers the last is the prediction.
        if isinstance(result, dict):
            last = {name: result[name][-1] for name in ("logits", "boxes_cxcywh_01")}
            outputs = {**features, **result, **last}
        else:
            outputs = {**features, "logits": result}
        return {name: np.asarray(outputs[name]) for name in wanted}


def _preprocessing_error(
    entry: Entry, twin: "Twin", arguments: Mapping[str, Any], seed: int
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """(our preprocessing, its largest difference from the source's own in steps of 1/255)."""
    from vision_jax.convert import twins

    reference = twins.preprocessing(entry, twin)
    if reference is None:
        return None, None
    transform, mean, std = _own_transform(reference.ours)
    rng = np.random.default_rng(seed)
    worst = 0.0
    sizes = (*ODD_SIZES, *_cropped_sizes(reference.ours))
    for height, width in sizes:
        ramp = np.linspace(0, 1, height)[:, None, None] * np.linspace(0, 1, width)[None, :, None]
        noise = rng.random((height, width, 3))
        image = (255 * (0.5 * ramp + 0.5 * noise)).astype(np.uint8)
        expected = reference.transform(image)  # f32[h, w, 3], normalized
        view = transform(image).astype(np.float32) / 255
        difference = np.abs((view - mean) / std - expected) * std * 255
        worst = max(worst, float(difference.max()))
    return reference.ours, {
        "against": reference.name,
        "largest_difference_in_255ths": round(worst, 4),
        "sizes": [list(size) for size in sizes],
        **reference.ours,
    }


def _cropped_sizes(record: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Images that are halved, and of which a crop then leaves any number of pixels modulo 4.

    Where the center is after an odd number depends on who rounds. Empty for a detector's record.
    """
    if "short" in record:
        return []
    height, width = (math.floor(n / record["crop_pct"]) for n in record["image_size"])
    return [(2 * height, 2 * (width + more)) for more in range(LEFT_OVER)]


def _own_transform(
    record: Mapping[str, Any],
) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray, np.ndarray]:
    """(what we do to an image uint8[H, W, 3] up to normalization, mean, std)."""
    mean, std = (np.asarray(record[name]) for name in ("mean", "std"))
    if "short" not in record:
        return partial(eval_transform, preprocessing=Preprocessing(**record)), mean, std
    canvas = (record["longest"],) * 2
    fields = {name: record[name] for name in ("short", "longest", "interpolation", "mean", "std")}
    ours = DetectionPreprocessing(**fields, square=record["square"], buckets=(canvas,))
    boxes = np.zeros((0, 4))
    return lambda image: detection_eval_transform(image, boxes, ours, canvas)[0], mean, std


def _full_size(entry: Entry, family: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters and GFLOPs of the whole variant, also where its certificate is of fewer blocks."""
    from vision_jax.convert import twins

    if entry.reduced:
        family, arguments = twins.full_arguments(entry)
    model = build_model(family, **arguments)
    size = (entry.image_size,) * 2
    images = jnp.zeros((1, *size, arguments["in_channels"]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    cost = jax.jit(model.apply).lower(shapes, images).cost_analysis() or {}
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])),
        "gflops": round(float(cost["flops"]) / 1e9, 3),
    }


# The zoo -----------------------------------------------------------------------------------------


def find_entry(name: str) -> Entry:
    """The zoo's entry, or one made for any other architecture of timm or builder of torchvision.

    Raises:
      UserError: no such name; with the nearest ones.
    """
    for entry in ZOO:
        if entry.name == name:
            return entry
    source, _, build = name.partition("/")
    if source == "timm":
        import timm

        if build in timm.list_models():
            size = timm.get_pretrained_cfg(build).input_size[-1]
            return Entry(name, "timm", build, image_size=size, published=f"timm://{build}")
    if source == "torchvision":
        import torchvision

        if build in torchvision.models.list_models():
            return Entry(name, "torchvision", build, published=f"torchvision://{build}")
    near = difflib.get_close_matches(name, [entry.name for entry in ZOO], n=3)
    hint = f": did you mean {', '.join(near)}?" if near else ""
    raise UserError(f"{name} is not in the zoo{hint}; docs/zoo.md lists it")


def write_certificate(certificate: Mapping[str, Any], folder: Path) -> Path:
    """Writes NAME.json, numbers rounded to what they mean."""
    path = folder / f"{certificate['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(certificate), indent=1, sort_keys=True) + "\n")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, Mapping):
        return {str(name): _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def certify_all(only: str, jobs: int, out: Path, again: bool) -> int:
    """Certificates of the whole zoo, each in a process of its own; returns how many failed."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    names = [entry.name for entry in ZOO if re.search(only, entry.name)]
    if not again:
        names = [name for name in names if not _is_current(out / f"{name}.json")]
    if not names:
        print("nothing to do: every certificate is there and of this version; --again repeats them")
        return 0
    # A process certifies several, so that it compiles what they share once, but not all, so that
    # memory is given back.
    chunks = [names[start : start + 8] for start in range(0, len(names), 8)]
    failed: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("certificates", total=len(names))

        def run(chunk: Sequence[str]) -> None:
            command = [sys.executable, "-m", "vision_jax.certify", *chunk, f"--out={out}"]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith(("PASS", "FAIL")):
                        progress.advance(task)
                        progress.console.print(
                            line.rstrip(), highlight=False, markup=False, soft_wrap=True
                        )
                        failed.extend([line] if line.startswith("FAIL") else [])
                    elif line.startswith("error:"):
                        progress.console.print(
                            line.rstrip(), highlight=False, markup=False, soft_wrap=True
                        )
                        failed.append(line)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, chunks))
    print(f"{len(names) - len(failed)} of {len(names)} pass; written under {out}")
    return len(failed)


def _is_current(path: Path) -> bool:
    if not path.is_file():
        return False
    record = json.loads(path.read_text())
    return record["pass"] and record["versions"]["vision_jax"] == vision_jax.__version__


# The table ---------------------------------------------------------------------------------------


def render(folder: Path) -> str:
    """docs/zoo.md from the certificates alone.

    Raises:
      UserError: there are none.
    """
    records = [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]
    if not records:
        raise UserError(f"{folder} has no certificates: make them with --all first")
    passed = sum(record["pass"] for record in records)
    titles = sorted({record["title"] for record in records}, key=str.lower)
    sources = sorted({record["source"] for record in records})
    lines = [
        "# The zoo",
        "",
        "Made by `python -m vision_jax.certify --all` and `--render`; not edited by hand.",
        "",
        f"{len(records)} variants over {len(titles)} families and {len(sources)} sources "
        f"({', '.join(sources)}); {passed} certificates pass.",
        "",
        "Errors are the worst over all named intermediates and the logits, relative to the scale "
        "of each, on random weights with every statistic randomized. Preprocessing is the largest "
        "difference from the source's own, in steps of 1/255. GFLOPs count two for a multiply and "
        "add. What the columns prove: [certificates.md](certificates.md).",
    ]
    for title in titles:
        lines += [
            "",
            f"## {title}",
            "",
            "| name | parameters | GFLOPs | pixels | float32 | float64 | preprocessing | weights | "
            "license |",
            "|---|--:|--:|--:|--:|--:|--:|---|---|",
        ]
        group = [record for record in records if record["title"] == title]
        for record in sorted(group, key=lambda r: (r["source"], r["parameters"])):
            lines.append(_row(record))
    reduced = [record["name"] for record in records if record["reduced"]]
    if reduced:
        lines += [
            "",
            "† certified at reduced depth (the certificate says which); parameters and GFLOPs are "
            "the whole model's.",
        ]
    return "\n".join(lines) + "\n"


def _row(record: Mapping[str, Any]) -> str:
    name = f"[{record['name']}](certificates/{record['name']}.json)"
    cells = (
        name + (" †" if record["reduced"] else "") + ("" if record["pass"] else " **fails**"),
        f"{record['parameters'] / 1e6:.2f} M",
        f"{record['gflops']:.2f}",
        str(record["image_size"]),
        f"{record['worst']['float32']:.1e}",
        f"{record['worst']['float64']:.1e}",
        "" if not record["preprocessing"] else _pixels(record["preprocessing"]),
        f"`{record['published']}`" if record["published"] else "",
        record["license"],
    )
    return f"| {' | '.join(cells)} |"


def _pixels(preprocessing: Mapping[str, Any]) -> str:
    return f"{preprocessing['largest_difference_in_255ths']:g}"


# The command line --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 if a certificate fails, 2 for bad input."""
    try:
        return _main(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vision_jax.certify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="for example timm/resnet50")
    parser.add_argument("--weights", help="a file with the twin's weights; random ones without")
    parser.add_argument(
        "--out", type=Path, help=f"where certificates go; {CERTIFICATES} by default"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights and images")
    parser.add_argument("--all", action="store_true", help="the whole zoo")
    parser.add_argument("--only", default="", help="with --all: names that this expression matches")
    parser.add_argument("--jobs", type=int, default=1, help="with --all: processes at a time")
    parser.add_argument(
        "--again", action="store_true", help="with --all: also those that are there"
    )
    parser.add_argument(
        "--render", action="store_true", help=f"write {TABLE} from the certificates"
    )
    flags = parser.parse_args(arguments)
    out = flags.out or CERTIFICATES
    if not (flags.names or flags.all or flags.render):
        raise UserError("name a variant, or give --all or --render; see --help")
    if flags.weights and len(flags.names) != 1:
        raise UserError("--weights goes with one NAME")
    failed = 0
    if flags.names or flags.all:
        _check_libraries()
    if flags.all:
        failed += certify_all(flags.only, flags.jobs, out, flags.again)
    for name in flags.names:
        entry = find_entry(name)
        try:
            certificate = certify(entry, flags.weights, seed=flags.seed)
        except UserError as error:
            print(f"FAIL {name}: {error}", flush=True)
            failed += 1
            continue
        path = write_certificate(certificate, out)
        worst = ", ".join(f"{dtype} {error:.1e}" for dtype, error in certificate["worst"].items())
        verdict = "PASS" if certificate["pass"] else "FAIL"
        reasons = "".join(f"; {reason}" for reason in certificate["reasons"])
        print(f"{verdict} {name}: {worst}{reasons}; wrote {path}", flush=True)
        failed += not certificate["pass"]
        gc.collect()
    if flags.render:
        TABLE.write_text(render(out))
        print(f"wrote {TABLE}")
    return 1 if failed else 0


def _check_libraries() -> None:
    for name in ("timm", "torch", "torchvision", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is missing: pip install 'vision_jax[parity]'")


if __name__ == "__main__":
    sys.exit(main())
