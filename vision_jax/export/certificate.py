"""A certificate: what an exported file computes in its runtime, beside what the model does here.

The model is run as `predict` runs it: images are prepared on the host, by Pillow, and the model is
applied to them. So a certificate is of preprocessing, model and postprocessing, all three.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vision_jax.errors import UserError
from vision_jax.export import runtimes
from vision_jax.loaded import Loaded, Padded

BAR = 1e-5  # relative error in float32
PIXELS_APART = 1  # grey levels
LEAST_SCORE = 0.02  # of the largest: boxes below are not compared
OVERLAP = 0.99  # of the same box
LEAST_COSINE = 0.98  # of an image's features in both
LEAST_AGREEMENT = {"float32": 0.999, "int8": 0.95}
SECONDS = 900  # that a runtime may take

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Ran:
    """What a runtime made of images.

    Attributes:
      outputs: of each of the images, {name: array}.
      seconds: of CPU, for the last of them.
      runtime: its package, version and Python's.
    """

    outputs: Sequence[Arrays]
    seconds: float
    runtime: Mapping[str, str]


class RunFailedError(UserError):
    """The runtime can't run the file, or dies of it."""


def run_files(
    format_: str,
    given: Sequence[tuple[Path, Sequence[np.ndarray]]],
    python: str = sys.executable,
) -> list[Ran]:
    """Runs files of one format in a process of its own, each on its images, one after the other.

    Args:
      format_: a key of runtimes.RUNTIMES.
      given: (file, images u8[B, H, W, C] of sizes that it takes).
      python: whose packages have the runtime.

    Raises:
      RunFailedError: it ends otherwise than well; says how.
    """
    with tempfile.TemporaryDirectory() as directory:
        files: list[Path] = []
        for number, (path, images) in enumerate(given):
            inputs, outputs = (
                Path(directory) / f"{number}_{what}.npz" for what in ("inputs", "outputs")
            )
            np.savez(inputs, **{str(index): image for index, image in enumerate(images)})  # type: ignore[arg-type]
            files += [path, inputs, outputs]
        command = [python, str(runtimes.__file__), format_, *map(str, files)]
        name = files[0].name
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except OSError as error:
            raise RunFailedError(f"--python={python}: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise RunFailedError(f"{name} ran for more than {SECONDS} s") from None
        if done.returncode:
            raise RunFailedError(f"{name} can't be run: {_reason(done)}")
        runtime = json.loads(done.stdout.splitlines()[-1])
        return [_read(path, runtime) for path in files[2::3]]


def _read(path: Path, runtime: Mapping[str, str]) -> Ran:
    with np.load(path) as arrays:
        outputs: dict[int, dict[str, np.ndarray]] = {}
        for key in arrays.files:
            index, _, name = key.partition("/")
            if name:
                outputs.setdefault(int(index), {})[name] = arrays[key]
        return Ran(list(outputs.values()), float(arrays["seconds"]), runtime)


def _reason(done: subprocess.CompletedProcess) -> str:
    if done.returncode < 0:
        return f"its runtime died of signal {-done.returncode}"
    # A traceback ends with the error, of one line or more.
    last = re.split(r"^(?=[\w.]+: )", done.stderr, flags=re.MULTILINE)[-1]
    reason = " ".join(last.split())[:300]
    if reason.startswith("ModuleNotFoundError"):
        return f"{reason.partition(': ')[2]}: install its runtime, or name a --python that has it"
    return reason or f"exit code {done.returncode}"


# Images -------------------------------------------------------------------------------------------


def fresh_images(
    rng: np.random.Generator, count: int, sizes: Sequence[tuple[int, int]], channels: int
) -> list[np.ndarray]:
    """Pictures of noise of all scales, u8[1, H, W, C], the sizes one after the other."""
    images = []
    for index in range(count):
        height, width = sizes[index % len(sizes)]
        total = np.zeros((height, width, channels))
        for cells in (2, 5, 12, 40):
            grid = rng.integers(0, 256, (cells, cells, channels), dtype=np.uint8)
            planes = [
                np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))
                for plane in grid.transpose(2, 0, 1)
            ]
            total += np.stack(planes, -1) * rng.uniform(0.3, 1)
        total += rng.normal(0, 20, total.shape)
        low, high = total.min(), total.max()
        images.append(((total - low) / (high - low) * 255.99).astype(np.uint8)[None])
    return images


def sizes_around(rng: np.random.Generator, side: int, count: int) -> list[tuple[int, int]]:
    """Sizes (height, width) of photos that come to a model of this side."""
    longer, ratio = rng.uniform(0.8, 2.2, count) * side, rng.uniform(0.5, 1, count)
    sides = [(round(a), round(a * b)) for a, b in zip(longer, ratio, strict=True)]
    return [pair if index % 2 else (pair[1], pair[0]) for index, pair in enumerate(sides)]


# What the model says ------------------------------------------------------------------------------


def host_pipeline(loaded: Loaded, kind: str) -> Callable[[np.ndarray], Arrays]:
    """The model as `predict` runs it, from u8[1, H, W, C] to what `serving_function` gives."""
    from vision_jax.tasks.segmentation.objective import PREDICTIONS

    apply = jax.jit(loaded.apply)

    def run(images: np.ndarray) -> Arrays:
        seen = loaded.preprocess(images)
        if isinstance(seen, Padded):
            found = apply(loaded.variables, seen.images, seen.pixel_mask)
            return _arrays(loaded.postprocess(found, seen.sizes))
        found = apply(loaded.variables, seen)
        if kind == "classes":
            return _arrays(
                {"logits": found["logits"], "probabilities": jax.nn.softmax(found["logits"])}
            )
        if kind == "features":
            return _arrays({"features": found["logits"]})
        answer = loaded.postprocess(found, [images.shape[1:3]])
        masks = found.get("mask_logits")
        own = masks.shape[-2:] if masks is not None else found["logits"].shape[1:3]
        scores = PREDICTIONS[loaded.family.predicts].scores(found, own)
        return _arrays({"label": answer["label"], "scores": scores})

    return run


def host_view(loaded: Loaded, images: np.ndarray) -> np.ndarray:
    """f32[h, w, C] of u8[1, H, W, C]: prepared on the host; of a detector without padding."""
    seen = loaded.preprocess(images)
    if not isinstance(seen, Padded):
        return seen[0]
    rows, columns = (int(seen.pixel_mask[0].any(axis).sum()) for axis in (1, 0))
    return seen.images[0, :rows, :columns]


def _arrays(outputs: Mapping[str, jax.Array]) -> Arrays:
    return {name: np.asarray(jax.device_get(value)) for name, value in outputs.items()}


# How far apart ------------------------------------------------------------------------------------


def compare(kind: str, ours: Sequence[Arrays], theirs: Sequence[Arrays]) -> dict[str, Any]:
    """How far a file's outputs are from the model's: errors by output, and agreement.

    Args:
      kind: of the outputs (Serving.kind).
      ours: the model's.
      theirs: the file's.

    Returns:
      "relative_error": {output: the largest difference relative to the largest value}; of boxes, in
      shares of the longest coordinate; "agreement": the share of images, boxes or pixels of which
      both say the same, or whose features point the same way; "compared": how many. Where two
      answers of the model are as near to each other as float32 rounds, either is right.
    """
    if kind == "boxes":
        return _compare_boxes(ours, theirs)
    names = {"classes": ("logits", "probabilities"), "pixels": ("scores",)}.get(kind, ("features",))
    errors = {
        name: max(_relative(a[name], b[name]) for a, b in zip(ours, theirs, strict=True))
        for name in names
    }
    found: dict[str, Any] = {"relative_error": errors}
    if kind == "features":
        alike = [
            _cosine(a["features"], b["features"]) >= LEAST_COSINE
            for a, b in zip(ours, theirs, strict=True)
        ]
        return found | {"agreement": float(np.mean(alike)), "compared": len(alike)}
    same, count = 0, 0
    for a, b in zip(ours, theirs, strict=True):
        if kind == "classes":
            agree, margin = a["logits"].argmax(-1) == b["logits"].argmax(-1), _margin(a["logits"])
            agree = agree[margin > 2 * BAR]
        else:
            agree = (a["label"] == b["label"]).reshape(-1)
        same, count = same + int(agree.sum()), count + agree.size
    return found | {"agreement": same / max(count, 1), "compared": count}


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape or not np.isfinite(theirs).all():
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(np.abs(ours).max(), 1e-30))


def _cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of two arrays as vectors; NaN if one of them is 0 or not finite."""
    a, b = (x.astype(np.float64).ravel() for x in (ours, theirs))
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _margin(logits: np.ndarray) -> np.ndarray:
    """f[B]: the best less the second, relative to the largest value."""
    if logits.shape[-1] < 2:
        return np.full(len(logits), np.inf)
    best = np.sort(logits, -1)[..., -2:]
    return (best[..., 1] - best[..., 0]) / max(np.abs(logits).max(), 1e-30)


def _compare_boxes(ours: Sequence[Arrays], theirs: Sequence[Arrays]) -> dict[str, Any]:
    """Each box of the model beside the one of the file that is most like it, of its class."""
    score_error = box_error = 0.0
    same = count = 0
    for a, b in zip(ours, theirs, strict=True):
        if any(a[name].shape != b[name].shape for name in a):
            return {"relative_error": {"boxes_xyxy_px": float("inf")}, "agreement": 0.0,
                    "compared": 0}  # fmt: skip
        scores, others = a["score"][0], b["score"][0]
        counted = np.flatnonzero(scores > LEAST_SCORE * max(scores.max(), 1e-30))
        if not counted.size:
            continue
        scale = np.abs(a["boxes_xyxy_px"][0][counted]).max()
        for row in counted:
            candidates = np.flatnonzero((b["label"][0] == a["label"][0][row]) & (others > 0))
            count += 1
            if not candidates.size:
                continue
            apart = np.abs(b["boxes_xyxy_px"][0][candidates] - a["boxes_xyxy_px"][0][row]).max(-1)
            apart = apart / scale + np.abs(others[candidates] - scores[row])
            nearest = candidates[apart.argmin()]
            shift = np.abs(b["boxes_xyxy_px"][0][nearest] - a["boxes_xyxy_px"][0][row]).max()
            if apart.min() > 1 - OVERLAP:
                continue
            same += 1
            box_error = max(box_error, float(shift / scale))
            score_error = max(score_error, float(abs(others[nearest] - scores[row]) / scores.max()))
    return {
        "relative_error": {"boxes_xyxy_px": box_error, "score": score_error},
        "agreement": same / count if count else 1.0,
        "compared": count,
    }


def compare_views(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> dict[str, float]:
    """Grey levels between what the host prepares, f32[h, w, C], and what a file does."""
    largest, apart, count = 0, 0, 0
    for a, b in zip(ours, theirs, strict=True):
        levels = np.abs(np.rint(b[: a.shape[0], : a.shape[1]] * 255) - np.rint(a * 255))
        largest = max(largest, int(levels.max()))
        apart, count = apart + int((levels > 0).sum()), count + levels.size
    return {"largest_difference_in_255ths": largest, "share_that_differs": apart / count}


def reasons(found: Mapping[str, Any], form: str) -> list[str]:
    """Why a certificate fails; empty where it passes.

    Args:
      found: of `compare`, and "preprocessing" of `compare_views`.
      form: "float32", or "int8" of which agreement alone counts.
    """
    lines = []
    for name, error in found["relative_error"].items() if form == "float32" else ():
        if not error <= BAR:
            lines.append(f"{name}: relative error {error:.1e}, over {BAR:g}")
    agreement = found["agreement"]
    if form == "int8" and not found["compared"]:
        lines.append("there was nothing to compare: the model finds nothing in the images")
    if agreement < LEAST_AGREEMENT[form]:
        lines.append(f"agreement {agreement:.4f}, under {LEAST_AGREEMENT[form]}")
    levels = found["preprocessing"]["largest_difference_in_255ths"]
    if levels > PIXELS_APART:
        lines.append(f"preprocessing differs by {levels} grey levels")
    return lines


def as_float32(loaded: Loaded) -> Loaded:
    """The model as it is exported: it computes in float32."""
    from dataclasses import replace

    return replace(loaded, model=loaded.model.clone(dtype=jnp.float32))
