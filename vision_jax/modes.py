"""What a trained model is asked for: numbers over a dataset, predictions for files, results."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax import classify, convert, setup, sharding, teach, workdirs
from vision_jax.checkpoints import best_step, restore_frozen, restore_newest, restore_state
from vision_jax.config import check_ranges, load_config, write_json
from vision_jax.convert import peft
from vision_jax.data.folders import list_files
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.sources import IMAGE_SUFFIXES
from vision_jax.data.teacher_cache import write_teacher_cache
from vision_jax.errors import UserError
from vision_jax.evaluate import figures
from vision_jax.evaluate.frozen import few_shot_predict, knn_predict
from vision_jax.evaluate.run import make_run_over
from vision_jax.files import expand
from vision_jax.logging import RunLog, human_size, read_metrics, say, show_progress
from vision_jax.models.families import make_apply
from vision_jax.tasks import classification
from vision_jax.trees import lora, paths


def write_results(
    workdir: Path,
    log: RunLog,
    model: Any,
    description: setup.Description,
    params: Any,
    model_state: Any,
    result: setup.Evaluation,
    *,
    config: ConfigDict,
    mesh: Mesh,
    plan: setup.Parameters,
    eval_source: Any,
) -> None:
    """Figures, the adapter in PEFT's layout, and the merged model in its source's naming."""
    # Every process gathers, the first one writes.
    gather = jax.jit(lambda *trees: trees, out_shardings=sharding.replicated(mesh))
    whole = gather(params, model_state)
    if jax.process_index():
        return
    host, statistics = jax.device_get(whole)
    arguments = convert.arguments_of(model)
    naming = convert.own_naming(description.family)

    task = setup.find_task(config)
    records = read_metrics(workdir / "metrics.jsonl")
    figures.draw_curves(records, workdir / "curves.png", task.curves)
    log.wrote(workdir / "curves.png", "loss, learning rate and evaluation by step")
    files = task.write_results(config, workdir, result, eval_source, description.preprocessing)
    for name, what in files.items():
        log.wrote(workdir / name, what)

    with workdirs.writing(workdir, "model.safetensors", "adapter/"):
        if adapters := lora.adapter_paths(plan.like):
            peft.write_adapter(
                workdir / "adapter",
                host,
                base_model_name=description.weights,
                family=description.family,
                arguments=arguments,
                naming=naming,
                modules_to_save=plan.trainable - plan.projections.keys() - adapters,
            )
            log.wrote(workdir / "adapter", "the adapter, for peft.PeftModel.from_pretrained")
        tensors, metadata = convert.export_weights(
            {**paths.flatten(lora.merge(host)), **paths.flatten(statistics)},
            description.family,
            arguments,
            to=naming,
            class_names=description.class_names,
            preprocessing=dataclasses.asdict(description.preprocessing),
        )
        convert.write_safetensors(workdir / "model.safetensors", tensors, metadata)
        log.wrote(workdir / "model.safetensors", f"the merged model, in {naming}'s naming")


def restore(config: ConfigDict, workdir: Path, checkpoint: str) -> setup.Trained:
    """`read_run`, which says on the error output what its user should know."""

    def warn(notes: Sequence[str]) -> None:
        for note in notes if jax.process_index() == 0 else ():
            print(f"warning: {note}", file=sys.stderr, flush=True)

    warn(workdirs.check_records(workdir))  # first: they may be why the rest fails
    trained, notes = read_run(config, workdir, checkpoint)
    warn(notes)
    return trained


def read_run(config: ConfigDict, workdir: Path, checkpoint: str) -> tuple[setup.Trained, list[str]]:
    """Rebuilds a run from its workdir alone, also while it trains.

    Args:
      config: the run's own, from WORKDIR/config.json.
      workdir: the run's folder.
      checkpoint: "last" or "best".

    Returns:
      (the run, what its user should know: a damaged checkpoint that was passed over, say)

    Raises:
      UserError: no run in `workdir`, or no whole checkpoint.
    """
    description = setup.load_description(workdir / "model.json")
    mesh = sharding.make_mesh(**config.mesh)
    model = setup.build_model(config, description)
    adapter = setup.kept_adapter(config, workdir)
    image_size = description.preprocessing.image_size
    plan = setup.plan_parameters(config, model, image_size, mesh, adapter, description.projections)
    abstract_trainable, abstract_frozen = plan.abstract()
    _, tx = setup.make_optimizer(config, model, abstract_trainable)
    abstract, _ = setup.abstract_state(config, tx, plan, mesh)
    task = setup.find_task(config)
    if checkpoint == "last":
        _, state, said = restore_newest(workdir, abstract)
    else:
        step = best_step(workdir, task.best_metric)
        if step is None:
            raise UserError(f"{workdir} has no evaluation yet, and so no best checkpoint")
        state, said = restore_state(workdir, step, abstract)
    frozen, of_frozen = restore_frozen(workdir, abstract_frozen)
    exact = config.copy_and_resolve_references()
    exact.model.dtype = "float32"
    apply = make_apply(model)
    trained = setup.Trained(
        mesh=mesh,
        description=description,
        model=model,
        apply=apply,
        exact_apply=make_apply(setup.build_model(exact, description)),
        assemble=plan.assemble,
        outputs_fn=task.make_outputs(config, model, apply, plan.assemble),
        state=state,
        frozen=frozen,
    )
    return trained, [*said, *of_frozen]


def evaluate(config: ConfigDict, workdir: Path, checkpoint: str) -> int:
    """evaluate: the numbers of a finished run's checkpoint, computed again."""
    trained = restore(config, workdir, checkpoint)
    task = setup.find_task(config)
    source = task.read_eval_source(config, trained.description.class_names)
    result = task.make_evaluate(
        config, trained.outputs_fn, trained.mesh, source, trained.description.preprocessing
    )(*trained.arguments)
    if jax.process_index() == 0:
        say(f"step {int(trained.state.step)}: {result.line()}")
        for name in result.damaged:
            say(f"skipped a damaged image: {name}")
        for line in result.lines():
            say(line)
    return 0


def predict(
    config: ConfigDict, workdir: Path, checkpoint: str, images: Sequence[str], out: Path | None
) -> int:
    """predict: what the model says of each file, as text, in files and as pictures.

    Raises:
      UserError: no images given, or none that can be read.
    """
    names = _image_files(images)
    out = out or workdir
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # before any work
        raise UserError(f"--out: {out} can't be a folder ({error.strerror})") from error
    trained = restore(config, workdir, checkpoint)
    setup.find_task(config).predict(
        config,
        names,
        trained.outputs_fn,
        trained.arguments,
        trained.mesh,
        trained.description.preprocessing,
        trained.description.class_names,
        out,
    )
    return 0


def frozen(config: ConfigDict, workdir: Path) -> int:
    """probe: what the weights' features are worth on a data set without any training.

    Nearest neighbours and few-shot regression on the pooled features; also WORKDIR/probe.json.

    Raises:
      UserError: no weights in the config, or bad input.
    """
    weights = setup.read_weights(config)
    if weights is None:
        raise UserError("probe: set config.model.weights to the weights to evaluate")
    if config.task != "classification":
        raise UserError(f"probe is for classification, and this config's task is {config.task}")
    train, held_out = classify.read_sources(config)
    description = setup.describe(config, weights, train.class_names, headless=True)
    model = setup.build_model(config, description)
    mesh = sharding.make_mesh(**config.mesh)
    size = description.preprocessing.image_size
    params, model_state = setup.headless_parameters(config, model, size, mesh, weights)
    run_over = make_run_over(
        classification.make_outputs(make_apply(model), lambda params: params),
        mesh,
        classify.make_batches(config, description.preprocessing),
        batch_size=config.evaluate.batch_size,
    )
    say(f"features: {weights.origin} on {len(train)} + {len(held_out)} images of {train.name}")
    (found, _), (test, damaged) = (
        run_over(source, params, {}, model_state) for source in (train, held_out)
    )
    features, labels, classes = found["logits"], found["label"], len(train.class_names)

    def top1(predicted: np.ndarray) -> float:
        return float((predicted == test["label"]).mean())

    nearest = knn_predict(
        features,
        labels,
        test["logits"],
        num_classes=classes,
        neighbors=config.evaluate.neighbors,
    )
    results = {f"{k} nearest neighbours": [top1(predicted)] for k, predicted in nearest.items()}
    for shots in config.evaluate.shots:
        choose = partial(few_shot_predict, features, labels, test["logits"], num_classes=classes)
        seeds = range(config.seed, config.seed + config.evaluate.repeats)
        results[f"{shots} images a class"] = [
            top1(choose(shots=shots, seed=seed)) for seed in seeds
        ]
    if jax.process_index():
        return 0
    for name, accuracies in results.items():
        spread = f" ± {np.std(accuracies):.4f}" if len(accuracies) > 1 else ""
        say(f"  {name:24}  top1 {np.mean(accuracies):.4f}{spread}")
    for name in damaged:
        say(f"skipped a damaged image: {name}")
    workdir.mkdir(parents=True, exist_ok=True)
    record = {"weights": weights.origin, "sha256": weights.sha256, "data": train.name}
    write_json({**record, "features": features.shape[1], "top1": results}, workdir / "probe.json")
    say(f"wrote {workdir / 'probe.json'}")
    return 0


def robustness(config: ConfigDict, workdir: Path, checkpoint: str) -> int:
    """robustness: what is left of a finished run's figures under attack, and more of what
    its task can tell. WORKDIR/robustness.json and .png.

    Raises:
      UserError: bad input.
    """
    check_ranges(config)

    def restore_other(folder: Path) -> setup.Trained:
        return restore(load_config(str(folder / "config.json"), {}), folder, "last")

    trained = restore(config, workdir, checkpoint)
    setup.find_task(config).robustness(config, workdir, trained, restore_other)
    return 0


def teach_once(config: ConfigDict) -> int:
    """cache-teacher: what the teachers say of each image, as the file config.distill.cache.

    Raises:
      UserError: no such file is named, several processes, or a config that could not be trained.
    """
    if "distill" not in config.recipes or not config.distill.cache:
        raise UserError("cache-teacher writes config.distill.cache: set it, with distill a recipe")
    if jax.process_count() > 1:
        raise UserError("cache-teacher runs in one process")
    check_ranges(config)
    task, mesh = setup.find_task(config), sharding.make_mesh(**config.mesh)
    source, _ = task.read_sources(config)
    description = setup.describe(config, setup.read_weights(config), source.class_names)
    model, teachers = setup.build_model(config, description), teach.find_teachers(config)
    teach.check(config, model, teachers, source.class_names)
    preprocessing = description.preprocessing
    views = teach.view_preprocessing(preprocessing, teachers)
    damage = DamageLog()
    data = task.training_data(config, source, views, damage)
    goal = task.make_objective(config, model, make_apply(model), dict)
    ask = jax.jit(
        teach.make_asking(config, goal, model, preprocessing.image_size, teachers),
        out_shardings=sharding.replicated(mesh),
    )
    arrays, place_batch = teach.place(teachers, mesh), sharding.make_batch_placer(mesh)
    path = Path(config.distill.cache)

    def answers(advance: Callable[[], None]) -> Iterator[dict[str, np.ndarray]]:
        for step in range(config.total_steps):
            yield jax.device_get(ask(arrays, place_batch(next(data)), np.int32(step)))
            advance()

    for teacher in teachers:
        say(f"teacher: {teacher.weights.origin} (sha256 {teacher.weights.sha256[:16]})")
    with show_progress(config.total_steps) as (advance, _):
        count = write_teacher_cache(path, answers(advance), teach.identity(config, teachers, views))
    size = human_size(path.stat().st_size)
    say(f"wrote {path}: what the teachers say of {count} images, {size}")
    return 0


def _image_files(given: Sequence[str]) -> list[str]:
    """The files given, and the images in the folders given, in order; there no hidden ones."""
    if not given:
        raise UserError("predict needs --images=FILE or --images FILE FOLDER ...")
    names: list[str] = []
    for name in map(str, map(expand, given)):
        if Path(name).is_dir():
            inside, _ = list_files(name, IMAGE_SUFFIXES)
            names += [str(Path(name, file)) for file in inside]
        elif Path(name).is_file():
            names.append(name)
        else:
            raise UserError(f"--images: there is no file {name}")
    if not names:
        raise UserError(f"--images: no images in {', '.join(given)}")
    return names
