"""compress: a finished run made smaller: pruned, taught by itself, trained for int8, exported.

WORKDIR/pruned/           fewer hidden units and heads, as `vision_jax prune` leaves them; or
WORKDIR/factored/         narrow products, as `vision_jax factorize` leaves them
WORKDIR/recovered/        a run that learns from the whole model what was lost
WORKDIR/int8/             a run that goes on with kernels and inputs rounded to int8
WORKDIR/quantized/        what that leaves in int8, as `vision_jax quantize` writes it
WORKDIR/export/NAME/      the whole, the recovered and the quantized model as certified files
WORKDIR/compression.json  each one's size, products, accuracy and CPU time
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vision_jax import sharding, train
from vision_jax.commands import factorize as factorize_command
from vision_jax.commands import prune as prune_command
from vision_jax.commands import quantize as quantize_command
from vision_jax.config import check_ranges, write_json
from vision_jax.errors import UserError
from vision_jax.export import certificate
from vision_jax.export.files import Request, export
from vision_jax.files import expand
from vision_jax.loaded import Loaded, load, trained_of
from vision_jax.logging import human_size, print_table, say
from vision_jax.run import prune
from vision_jax.tasks.api import find_task
from vision_jax.trees import factored

WHOLE, RECOVERED, QUANTIZED = "whole", "recovered", "quantized"
TIMED = 4  # generated images that files are run on


def run(config: ConfigDict, workdir: Path) -> int:
    """Makes all of it, or goes on where it stopped; returns the exit code.

    Args:
      config: how the pruned model learns, and how much goes. Its one teacher is what is pruned.
      workdir: where.

    Raises:
      UserError: no finished run as the one teacher, or what a stage refuses.
    """
    check_ranges(config)
    source = _source(config)
    smaller, make, asked = (
        workdir / "pruned",
        prune_command.main,
        [f"--keep={config.compress.keep}"],
    )
    if config.compress.by == "factorize":
        smaller, make = workdir / "factored", factorize_command.main
    else:
        asked += [
            f"--what={','.join(config.compress.what)}",
            f"--score={config.compress.score}",
        ]
    if code := make([str(source), *asked, f"--to={smaller}"]):
        return code
    last = workdir / RECOVERED
    stage = _recovery(config, smaller / "model.safetensors")
    if code := train.run(stage, last):
        return code
    if config.compress.int8_steps:
        stage, last = _for_int8(config, last / "model.safetensors"), workdir / "int8"
        if code := train.run(stage, last):
            return code
    if code := quantize_command.run(stage, last, "last", workdir / QUANTIZED):
        return code
    models = {
        WHOLE: load(source),
        RECOVERED: load(workdir / RECOVERED),
        QUANTIZED: load(workdir / QUANTIZED),
    }
    found = {name: _measure(config, loaded) for name, loaded in models.items()}
    passed = True
    for format_ in config.compress.formats:
        passed &= _export(format_, models, workdir / "export", found)
    write_json(found, workdir / "compression.json")
    _print(found)
    say(f"wrote {workdir / 'compression.json'}")
    return int(not passed)


def _source(config: ConfigDict) -> Path:
    """The run that is pruned and teaches."""
    teachers = config.distill.teachers
    folders = [expand(name) for name in teachers]
    if len(folders) != 1 or "distill" not in config.recipes:
        raise UserError(
            "compress prunes the one teacher that its model then learns from: set "
            "config.recipes=distill and config.distill.teachers to the folder of a finished run"
        )
    if not (folders[0] / "model.safetensors").is_file():
        raise UserError(
            f"config.distill.teachers: {folders[0]} is no finished run: train it first, and give "
            "its folder"
        )
    return folders[0]


def _recovery(config: ConfigDict, weights: Path) -> ConfigDict:
    """The config itself, from these weights with their head."""
    stage = config.copy_and_resolve_references()
    stage.model.weights = str(weights)
    stage.model.reinitialize = ()
    return stage


def _for_int8(config: ConfigDict, weights: Path) -> ConfigDict:
    """Fewer updates with kernels rounded, and inputs where they will be."""
    stage = _recovery(config, weights)
    stage.recipes = ("quantize", *config.recipes)
    stage.quantize.form, stage.quantize.train = "int8", True
    stage.quantize.activations = "float" if config.ptq.activations == "float" else "int8"
    steps = stage.total_steps = config.compress.int8_steps
    stage.checkpoint_every = stage.evaluate.every = steps
    stage.optim.lr = config.compress.int8_lr
    stage.optim.warmup_steps = min(config.optim.warmup_steps, steps // 2)
    return stage


def _measure(config: ConfigDict, loaded: Loaded) -> dict[str, Any]:
    """Parameters, products and the task's numbers on the evaluation data, of the model here."""
    task, mesh = find_task(config.task), sharding.make_mesh(**config.mesh)
    trained = trained_of(loaded, mesh)
    outputs_fn = task.make_outputs(
        config, loaded.model, trained.predicts, trained.apply, trained.assemble
    )
    source = task.read_eval_source(config, loaded.class_names)
    evaluate = task.make_evaluate(config, outputs_fn, mesh, source, loaded.preprocessing)
    summary = evaluate(*trained.arguments).summary
    plain = {**loaded.variables, "params": jax.jit(factored.merge)(loaded.variables["params"])}
    return {
        "parameters": prune.count(plain),
        "macs": prune.macs(loaded.model, plain, loaded.preprocessing.image_size),
        "evaluation": {n: summary[n] for n in task.reported if summary.get(n) is not None},
        "files": {},
    }


def _export(
    format_: str, models: Mapping[str, Loaded], out: Path, found: Mapping[str, dict[str, Any]]
) -> bool:
    """Writes a file of each model and notes its size and CPU time; whether all are certified."""
    size = models[WHOLE].preprocessing.image_size
    channels = models[WHOLE].model.in_channels
    images = certificate.fresh_images(np.random.default_rng(0), TIMED, [size], channels)
    paths, passed = [], True
    for name, loaded in models.items():
        float32 = models[RECOVERED] if name == QUANTIZED else None
        request = Request(format_, image_size=size, batch=1, float32=float32)
        path, record = export(loaded, out / name, request)
        say(f"wrote {path} ({human_size(record['bytes'])})")
        for reason in record["certificate"]["reasons"]:
            say(f"FAILED {path.name}: {reason}")
        passed &= record["certificate"]["pass"]
        paths.append(path)
        found[name]["files"][format_] = {"bytes": record["bytes"]}
    if not passed:
        return False
    ran = certificate.run_files(format_, [(path, images) for path in paths])
    for name, one in zip(models, ran, strict=True):  # by turns, on one thread
        found[name]["files"][format_]["cpu_ms_an_image"] = 1e3 * one.seconds
        found[name]["files"][format_]["faster"] = ran[0].seconds / one.seconds
    return True


def _print(found: Mapping[str, Mapping[str, Any]]) -> None:
    formats = list(found[WHOLE]["files"])
    numbers = list(found[WHOLE]["evaluation"])
    columns = ("model", "parameters", "products", *numbers)
    columns += tuple(f"{what} {name}" for name in formats for what in ("size", "CPU"))
    rows = []
    for name, one in found.items():
        cells = [name, f"{one['parameters']:,}", f"{one['macs']:,}"]
        cells += [f"{one['evaluation'][number]:.4f}" for number in numbers]
        for file in one["files"].values():
            cells.append(human_size(file["bytes"]))
            time = file.get("cpu_ms_an_image")
            cells.append("" if time is None else f"{time:.3f} ms, {file['faster']:.2f} x")
        rows.append(tuple(cells))
    print_table("Compression", columns, rows)
