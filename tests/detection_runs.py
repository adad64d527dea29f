"""Detection runs small enough for tests: a DETR of a few thousand parameters, 24 composites."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import runs
from PIL import Image

from vision_jax import convert, train
from vision_jax.commands import predict
from vision_jax.config import load_config
from vision_jax.data.composites import write_composites
from vision_jax.models import families
from vision_jax.run.prepare import Run
from vision_jax.run.restore import restore
from vision_jax.tasks.detection.task import Evaluation
from vision_jax.trees import paths

CONFIG = runs.ROOT / "configs/detr_finetune.py"
STEPS = 6
ARGUMENTS = (
    ("depths", (1, 1)),
    ("block", "basic"),
    ("widths", (8, 16)),
    ("stem_width", 8),
    ("num_queries", 8),
    ("width", 16),
    ("num_heads", 2),
    ("mlp_width", 16),
    ("encoder_depth", 1),
    ("decoder_depth", 2),
)
# In place of DETR.
RF_DETR = {
    "model__variant": "rf_detr",
    "model__arguments": (
        ("image_size", (48, 48)),
        ("position_grid", 4),
        ("decoder_depth", 1),
        ("patch_size", 8),
        ("feature_depths", (1, 2)),
        ("global_blocks", (1,)),
        ("backbone_width", 24),
        ("backbone_depth", 2),
        ("backbone_heads", 2),
        ("backbone_mlp_width", 48),
        ("width", 16),
        ("projector_width", 8),
        ("projector_blocks", 1),
        ("num_queries", 8),
        ("num_groups", 2),
        ("num_heads", 2),
        ("cross_heads", 4),
        ("mlp_width", 32),
    ),
}
YOLOX = {
    "model__variant": "yolox",
    "model__arguments": (("csp_depth", 1), ("width", 8)),
    "data__short": 64,
    "data__longest": 64,
}
FASTER_RCNN = {
    "model__variant": "faster_rcnn",
    "model__arguments": (
        ("depths", (1, 1)),
        ("block", "basic"),
        ("widths", (8, 16)),
        ("stem_width", 8),
        ("width", 8),
        ("anchor_sizes", (12, 20, 32)),
        ("proposals", 12),
        ("train_proposals", 24),
        ("rpn_samples", 16),
        ("box_samples", 8),
        ("head_width", 16),
        ("candidates", 40),
        ("most", 8),
    ),
    "data__short": 64,
    "data__longest": 64,
}

_DENSE = (
    ("depths", (1, 1)),
    ("block", "basic"),
    ("widths", (8, 16)),
    ("stem_width", 8),
    ("first_map", 0),
    ("width", 8),
    ("head_depth", 1),
    ("head_groups", 4),
    ("candidates", 20),
    ("least_score", 0.001),
    ("most", 8),
)
RETINANET = {
    "model__variant": "retinanet",
    "model__arguments": (*_DENSE, ("anchor_sizes", (8, 16, 32, 48)), ("box_loss", "giou")),
    "data__short": 64,
    "data__longest": 64,
}
FCOS = {
    "model__variant": "fcos",
    "model__arguments": (*_DENSE, ("point_sizes", (4, 8, 16, 32))),
    "data__short": 64,
    "data__longest": 64,
}


@functools.cache
def data() -> Path:
    """A folder with train/train.json, test/test.json and their images, of 64 pixels a side."""
    folder = runs.inputs() / "composites"
    write_composites(folder / "train", "train", count=24, seed=0, size=64, plain=False)
    write_composites(folder / "test", "test", count=9, seed=0, size=64, plain=False)
    return folder


def overrides(**more: Any) -> dict[str, str]:
    """Fields of configs/detr_finetune.py for a tiny run; `optim__lr=1` sets optim.lr."""
    fields = {
        "model.weights": "",
        "model.variant": "detr",
        "model.arguments": ARGUMENTS,
        "model.reinitialize": (),
        "trainable": (".*",),
        "data.train": data() / "train/train.json",
        "data.eval": data() / "test/test.json",
        "data.eval_images": data() / "test",
        "data.short": 48,
        "data.longest": 48,
        "data.shorts": (),
        "data.buckets": 1,
        "data.max_boxes": 6,
        "data.threads": 2,
        "batch_size": 8,
        "total_steps": STEPS,
        "checkpoint_every": 2,
        "log_every": 1,
        "optim.warmup_steps": 1,
        "evaluate.every": 3,
        "evaluate.batch_size": 8,
    }
    fields |= {name.replace("__", "."): value for name, value in more.items()}
    return {name: str(value) for name, value in fields.items()}


def tiny_config(**more: Any):
    """configs/detr_finetune.py as a tiny run."""
    return load_config(str(CONFIG), overrides(**more))


@functools.cache
def finished() -> Path:
    """The workdir of a finished tiny run; not to be changed."""
    workdir = runs.inputs() / "detection_finished"
    assert train.run(tiny_config(), workdir) == 0
    return workdir


def write_detector(
    path: Path, num_classes: int = 3, family: str = "detr", arguments: Any = ARGUMENTS
) -> str:
    """A random detector for images of 32 to 64 pixels a side; a YOLOX is sure of what it finds."""
    model = families.build_model(family, num_classes=num_classes, **dict(arguments))
    make = jax.jit(lambda key: families.initialize(model, key, (64, 64)))
    trees = jax.device_get(make(jax.random.key(0))).values()
    flat = {name: leaf for tree in trees for name, leaf in paths.flatten(tree).items()}
    for name in flat if family == "yolox" else ():
        if name.endswith(("object_head/bias", "class_head/bias")):
            flat[name] = flat[name] + 5
    tensors, header = convert.export_weights(
        flat,
        family,
        convert.arguments_of(model),
        to=convert.own_naming(family),
        preprocessing={"short": 32, "longest": 64, "mean": (0.5,) * 3, "std": (0.5,) * 3},
    )
    convert.write_safetensors(path, tensors, header)
    return str(path)


def interrupt(self: Any) -> None:
    """In place of a method, a user who stops the run there."""
    raise KeyboardInterrupt


def check_resume(config: Any, folder: Path) -> list[int]:
    """A run and one that was stopped at its first evaluation end with the same state, bit by bit.

    Returns how many programs of a step each of the three trainings compiled; the first one's
    workdir is FOLDER/once.
    """
    made: list[Any] = []
    make = Run.make_train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "make_train_step", lambda run: made.append(make(run)) or made[-1])
        assert train.run(config, folder / "once") == 0
        with pytest.MonkeyPatch.context() as stop:
            stop.setattr(Evaluation, "line", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train.run(config, folder / "twice")
        assert train.run(config, folder / "twice") == 0
    states = [restore(config, folder / name, "last").state for name in ("once", "twice")]
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(states))
    return [step._cache_size() for step in made]


def check_predictions(config: Any, workdir: Path, folder: Path) -> int:
    """`predict` on JPEG and PNG of three sizes: boxes as JSON and pictures, in a batch as alone.

    Returns how many boxes the first image has.
    """
    photos, found = folder / "photos", []
    photos.mkdir()
    for name, size in (("a.png", (40, 90)), ("b.jpg", (64, 48)), ("c.png", (64, 64))):
        pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(photos / name)
    for given in ([photos], sorted(photos.iterdir())[:1]):
        out = folder / f"found_{len(found)}"
        config.evaluate.score = 0.0
        assert predict.run(config, workdir, "last", [*map(str, given)], out) == 0
        found.append(json.loads((out / "predictions.json").read_text()))
    assert [Path(entry["file"]).name for entry in found[0]] == ["a.png", "b.jpg", "c.png"]
    assert len(list((folder / "found_0/predictions").glob("*.png"))) == 3
    batch, alone = (entries[0]["boxes"] for entries in found)
    assert [box["label"] for box in batch] == [box["label"] for box in alone]
    for name in ("score", "box_xyxy_px"):
        both = ([box[name] for box in boxes] for boxes in (batch, alone))
        np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-4)
    return len(batch)
