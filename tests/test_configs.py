"""Each config trains at small size, and each of its fields is read by something."""

import ast
import inspect
from pathlib import Path

import detection_runs
import generators
import numpy as np
import pytest
import runs

from vision_jax import figures, train
from vision_jax.config import TASKS, fields, load_config, updates_a_step
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.run.prepare import Run

CONFIGS = sorted((runs.ROOT / "configs").glob("*.py"))
LOADED = [load_config(str(path), {}) for path in CONFIGS]
SMALLER_RESNET = {"depths": (1, 1), "widths": (8, 16), "stem_width": 8}
SMALLER_DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2}
SMALLER_HEAD = {"prototypes": 16, "head_width": 8, "bottleneck": 4}
SMALLER_PROJECTION = {"head_width": 8, "projection": 4}
SMALLER_UNET = {
    "model.arguments": '(("encoder_arguments", (("widths", (4, 8)),)), ("decoder_widths", (4,)))'
}
SMALLER_EOMT = '(("num_queries", 20), ("num_blocks", 1), ("upscale_blocks", 1))'
SMALLER_TEXT = {
    "vocab_size": 300, "text_length": 8, "text_width": 16, "text_depth": 1, "text_num_heads": 2,
    "text_mlp_width": 16,
}  # fmt: skip
GENERATOR = {
    "width": 32, "depth": 1, "num_heads": 2, "mlp_width": 64, "patch_size": 8, "in_channels": 3,
    "predicts": "image",
}  # fmt: skip
SMALLER = {"width": 32, "depth": 1, "num_heads": 2, "mlp_width": 64, "patch_size": 8}


def small(path: Path):
    """The config itself, but for sizes and paths."""
    if load_config(str(path), {}).task == "detection":
        others = {
            "rf_detr": detection_runs.RF_DETR,
            "yolox": detection_runs.YOLOX,
            "fasterrcnn": detection_runs.FASTER_RCNN,
            "retinanet": detection_runs.RETINANET,
        }
        model = others.get(path.stem.removesuffix("_finetune"), {})
        changes = detection_runs.overrides(total_steps=2, **model)
        return load_config(str(path), {n: v for n, v in changes.items() if n != "trainable"})
    if load_config(str(path), {}).task == "segmentation":  # on the embedded nuclei, which are few
        sizes = {"model.image_size": "16", "batch_size": "8", "evaluate.batch_size": "1"}
        counts = {"total_steps": "2", "checkpoint_every": "2", "evaluate.every": "2"}
        once = {"log_every": "1", "optim.warmup_steps": "1"}
        changes = sizes | counts | once | SMALLER_UNET
        if load_config(str(path), {}).data.targets != "semantic":
            changes |= {"model.arguments": SMALLER_EOMT, "loss.points": "64"}
        if not load_config(str(path), {}).data.train.startswith("embedded:"):
            changes |= {"data.train": "embedded:nuclei/train", "data.eval": "embedded:nuclei/test"}
            changes |= {"model.weights": "", "model.variant": "unet_plain"}
            changes |= {"evaluate.background": "", "evaluate.window": "0", "data.threads": "1"}
        return load_config(str(path), changes)
    keep = ("batch_size", "total_steps", "checkpoint_every", "log_every", "evaluate.every")
    keep += ("evaluate.batch_size", "optim.warmup_steps", "data.train", "data.eval")
    keep += ("model.image_size",)
    if load_config(str(path), {}).model.weights:
        keep += ("model.weights",)
    changes = {name: value for name, value in runs.overrides().items() if name in keep}
    changes["total_steps"] = "2"
    changes["data.workers"] = "0"  # tests/data/test_pipeline.py has them
    if load_config(str(path), {}).distill.teachers:
        changes["distill.teachers"] = str(runs.teacher())
        matches = load_config(str(path), {}).distill.features
        # Both models have one block here
        moved = tuple((kind, "block_0", "block_0", weight) for kind, _, _, weight in matches)
        changes["distill.features"] = repr(moved)
    arguments = load_config(str(path), {}).model.arguments
    if load_config(str(path), {}).task == "pretraining":
        changes["model.arguments"] = repr(tuple((SMALLER | SMALLER_DECODER).items()))
    elif load_config(str(path), {}).task == "self_distillation":
        changes["model.arguments"] = repr(tuple((SMALLER | SMALLER_HEAD).items()))
        changes |= {"dino.view_size": "0", "dino.local_size": "8"}
    elif load_config(str(path), {}).task == "contrastive":
        changes["model.arguments"] = repr(tuple((SMALLER | SMALLER_PROJECTION).items()))
    elif load_config(str(path), {}).task == "image_text":
        changes["model.arguments"] = repr(tuple((dict(arguments) | SMALLER | SMALLER_TEXT).items()))
        changes |= {"text.length": "8", "text.vocab_size": "300"}
        changes["text.zero_shot"] = changes["data.eval"]
    elif load_config(str(path), {}).task == "generation":
        sizes = GENERATOR if changes.pop("model.weights", "") else dict(arguments) | SMALLER
        changes["model.arguments"] = repr(tuple(sizes.items()))
        changes |= {"data.classes": "()", "data.subset": "0", "sample.steps": "2"}
        if sizes is GENERATOR:  # of a run that there is none of here
            changes |= {"model.weights": "", "model.variant": "dit", "model.reinitialize": "()"}
        if load_config(str(path), {}).latents.autoencoder:
            latent = GENERATOR | {"in_channels": 4, "patch_size": 4, "predicts": "velocity"}
            changes["model.arguments"] = repr(tuple(latent.items()))
            changes["latents.autoencoder"] = str(generators.autoencoder())
            changes["latents.cache"] = str(generators.autoencoder() / "latents")
    elif "width" in dict(arguments):
        changes["model.arguments"] = repr(tuple((dict(arguments) | SMALLER).items()))
    elif load_config(str(path), {}).model.variant.startswith("deit"):
        changes["model.arguments"] = repr(tuple(SMALLER.items()))
    elif "stem_size" in dict(arguments):
        changes["model.arguments"] = repr(tuple((dict(arguments) | SMALLER_RESNET).items()))
    if path.stem == "compress":  # whose weights have the data's classes already
        changes["model.reinitialize"] = "('head/.*',)"
    if path.stem == "continue_pretraining":  # the ViT's own sizes are its weights'
        changes["model.arguments"] = repr(tuple(SMALLER_HEAD.items()))
        changes["dino.local_crops"] = "2"
    if "probe" in load_config(str(path), {}) and load_config(str(path), {}).probe.data:
        changes |= {"probe.data": changes["data.train"], "probe.subset": "0"}
    return load_config(str(path), changes)


@pytest.mark.long(but=["vit_lora"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_at_small_size(path, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: None)
    made, make = [], Run.make_train_step
    monkeypatch.setattr(Run, "make_train_step", lambda run: made.append(make(run)) or made[-1])
    assert train.run(small(path), tmp_path) == 0
    assert [step._cache_size() for step in made] == [1]  # compilations
    losses = [
        r["train/loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in r
    ]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert (tmp_path / "model.safetensors").is_file()


def test_all_configs_of_a_task_have_the_same_fields():
    for task in TASKS:
        every = [set(fields(config)) for config in LOADED if config.task == task]
        assert all(one == every[0] for one in every)


def reads(path: Path) -> set[str]:
    """Dotted names under `config` that a file reads, also through a local name for a part of it."""
    found: set[str] = set()
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        parts = {"config": ""}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = dotted(node.value, parts)
                if name:
                    parts[node.targets[0].id] = f"{name}."
        for node in ast.walk(function):
            name = dotted(node, parts)
            if name:
                found.add(name)
    return found


def dotted(node: ast.AST, parts: dict[str, str]) -> str:
    """`config.optim.lr` as "optim.lr"; "" for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id in parts and names:
        return parts[node.id] + ".".join(names)
    return ""


def test_every_field_is_read():
    found: set[str] = set()
    package = runs.ROOT / "vision_jax"
    patterns = ("train.py", "run/*.py", "commands/*.py", "tasks/*.py", "tasks/*/task.py")
    for pattern in patterns:
        for path in package.glob(pattern):
            found |= reads(path)
    declared = set().union(*(fields(config) for config in LOADED))
    # Recipes take them by name from all fields, those of their own section by the rest of it. How
    # many updates a step makes stands beside what checks the fields.
    sources = [path.read_text() for path in (package / "recipes").rglob("*.py")]
    said = {
        node.value
        for source in (*sources, inspect.getsource(updates_a_step))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    sections = ("lora", "distill", "adversarial", "mask", "quantize")
    found |= {n for n in declared if n.split(".")[0] in sections and n.split(".")[-1] in said}
    found |= declared & said
    dead = {n for n in declared if n not in found and n.split(".")[0] != "mesh"}  # **config.mesh
    assert "mesh" in found
    assert dead == set()


def test_docstrings_name_a_command_that_exists():
    for path in CONFIGS:
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert f"python -m vision_jax.main --config=configs/{path.name}" in text
        for word in ("Command", "Hardware:", "Expected:"):
            assert word in text


@pytest.mark.parametrize("name", ["vit-mae-base-pretraining", "siglip-base-patch16-224-pairs"])
def test_transfer_takes_a_pretraining_models_weights_for_its_vit(name):
    config = load_config(f"{runs.ROOT / 'configs/transfer.py'}:transformers/{name}", {})
    assert config.model.weights.startswith("hf://")
    assert config.optim.layer_decay == 0.75


def test_transfer_to_what_it_has_no_settings_for():
    with pytest.raises(UserError, match=r"fcos_resnet50_fpn is a fcos, .* one of vit, beit"):
        load_config(f"{runs.ROOT / 'configs/transfer.py'}:torchvision/fcos_resnet50_fpn", {})
