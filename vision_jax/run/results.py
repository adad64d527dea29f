"""What a finished run leaves: pictures, the adapter in PEFT's layout, the merged model."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from vision_jax import convert, sharding, steps
from vision_jax.convert import peft
from vision_jax.convert.quantized import write_quantized
from vision_jax.logging import RunLog, read_metrics
from vision_jax.run import workdirs
from vision_jax.run.parameters import Flat
from vision_jax.run.prepare import Run
from vision_jax.tasks.api import Evaluation
from vision_jax.trees import factored, lora, paths


def write_results(
    run: Run,
    workdir: Path,
    log: RunLog,
    state: steps.TrainState,
    frozen: Flat,
    result: Evaluation,
    eval_source: Any,
) -> None:
    """Figures, the adapter in PEFT's layout, and the merged model in its source's naming."""
    trained, statistics = steps.averaged(state)
    params = run.parameters.assemble({**trained, **frozen})
    whole = (params, statistics)
    if jax.process_count() > 1:  # every process gathers, the first one writes
        whole = jax.jit(lambda *trees: trees, out_shardings=sharding.replicated(run.mesh))(*whole)
    if jax.process_index():
        return
    host, statistics = jax.device_get(whole)
    _draw(run, workdir, log, result, eval_source)
    with workdirs.writing(workdir, "model.safetensors", "adapter/"):
        _write_adapter(run, workdir, log, host)
        _write_model(run, workdir, log, host, statistics)


def _draw(run: Run, workdir: Path, log: RunLog, result: Evaluation, eval_source: Any) -> None:
    from vision_jax import figures  # matplotlib, only where something is drawn

    records = read_metrics(workdir / "metrics.jsonl")
    figures.draw_curves(records, workdir / "curves.png", run.task.curves)
    log.wrote(workdir / "curves.png", "loss, learning rate and evaluation by step")
    preprocessing = run.description.preprocessing
    files = run.task.write_results(run.config, workdir, result, eval_source, preprocessing)
    for name, what in files.items():
        log.wrote(workdir / name, what)


def _write_adapter(run: Run, workdir: Path, log: RunLog, params: Any) -> None:
    adapters = lora.adapter_paths(run.parameters.like)
    if not adapters:
        return
    trained = run.parameters.trainable - run.parameters.projections.keys()
    peft.write_adapter(
        workdir / "adapter",
        params,
        base_model_name=run.description.weights,
        family=run.description.family,
        arguments=convert.arguments_of(run.model),
        naming=convert.own_naming(run.description.family),
        modules_to_save=trained - adapters,
    )
    log.wrote(workdir / "adapter", "the adapter, for peft.PeftModel.from_pretrained")


def _write_model(run: Run, workdir: Path, log: RunLog, params: Any, statistics: Any) -> None:
    merged, path = factored.merge(params), workdir / "model.safetensors"
    if factored.ranks_of(merged):
        write_quantized(
            path,
            {"params": jax.device_get(merged), "batch_stats": statistics},
            family=run.description.family,
            arguments=convert.arguments_of(run.model),
            preprocessing=dataclasses.asdict(run.description.preprocessing),
            class_names=run.description.class_names,
        )
        log.wrote(path, "the merged model with its factors, which `convert` multiplies out")
        return
    naming = convert.own_naming(run.description.family)
    tensors, metadata = convert.export_weights(
        {**paths.flatten(merged), **paths.flatten(statistics)},
        run.description.family,
        convert.arguments_of(run.model),
        to=naming,
        class_names=run.description.class_names,
        preprocessing=dataclasses.asdict(run.description.preprocessing),
    )
    convert.write_safetensors(path, tensors, metadata)
    held = convert.is_held(naming, run.description.family, convert.arguments_of(run.model))
    whose = (
        f"{naming}'s naming"
        if held
        else "names of its own, which vision_jax.load and config.model.weights read"
    )
    log.wrote(path, f"the merged model, in {whose}")
