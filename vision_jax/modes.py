"""What a trained model is asked for: numbers over a dataset, predictions for files, results."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax import convert, setup, sharding, steps
from vision_jax.checkpoints import Checkpoints, last_complete_step
from vision_jax.config import write_json
from vision_jax.convert import peft
from vision_jax.data.decode import DamagedImageError
from vision_jax.data.pipeline import DamageLog, make_eval_batches
from vision_jax.data.sources import IMAGE_SUFFIXES, FileReader, Source
from vision_jax.data.transforms import Preprocessing, eval_transform
from vision_jax.errors import UserError
from vision_jax.evaluate import figures
from vision_jax.evaluate.classification import confusion_matrix, summarize
from vision_jax.evaluate.frozen import few_shot_predict, knn_predict
from vision_jax.logging import RunLog, read_metrics
from vision_jax.tasks import classification
from vision_jax.trees import lora, paths

GRID = 40  # pictures in predictions.png


@dataclass(frozen=True)
class Evaluation:
    """Logits over a whole dataset, in its order, and their summary.

    Attributes:
      logits: f32[N, C].
      labels: i32[N].
      index: i32[N], rows in the source.
      summary: see evaluate.classification.summarize.
      damaged: names of images that could not be read and are not among the N.
    """

    logits: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    summary: dict[str, Any]
    damaged: tuple[str, ...]

    def line(self) -> str:
        """The summary for the screen."""
        text = "  ".join(
            f"{name} {self.summary[name]:.4f}" for name in ("top1", "top5", "loss", "ece")
        )
        skipped = f"  ({len(self.damaged)} damaged skipped)" if self.damaged else ""
        return f"evaluation on {self.summary['count']} images: {text}{skipped}"


def make_evaluate(
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    source: Source,
    *,
    preprocessing: Preprocessing,
    batch_size: int,
    num_threads: int,
) -> Callable[..., Evaluation]:
    """A function (trainable, frozen, model_state) -> Evaluation over the whole source.

    The batch is rounded up to what the devices divide; padding rows are dropped by their mask, so
    each image counts once and the result does not depend on the batch size.
    """
    run_over = make_run_over(
        outputs_fn,
        mesh,
        preprocessing=preprocessing,
        batch_size=batch_size,
        num_threads=num_threads,
    )

    def evaluate(trainable, frozen, model_state) -> Evaluation:
        found, damaged = run_over(source, trainable, frozen, model_state)
        summary = summarize(found["logits"], found["label"], source.class_names)
        return Evaluation(found["logits"], found["label"], found["index"], summary, damaged)

    return evaluate


def make_run_over(
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    *,
    preprocessing: Preprocessing,
    batch_size: int,
    num_threads: int,
) -> Callable[..., tuple[dict[str, np.ndarray], tuple[str, ...]]]:
    """A function (source, trainable, frozen, model_state) -> (outputs, names of damaged images).

    Outputs are those of `outputs_fn` for each image that can be read, in the source's order.
    """
    devices = jax.device_count()
    batch_size = -(-batch_size // devices) * devices
    eval_step = steps.make_eval_step(outputs_fn, shardings=sharding.replicated(mesh))
    place = sharding.make_batch_placer(mesh)

    def run_over(source: Source, trainable, frozen, model_state):
        damage = DamageLog()
        batches = make_eval_batches(
            source,
            batch_size=batch_size // jax.process_count(),
            preprocessing=preprocessing,
            num_threads=num_threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            damage_log=damage,
        )
        outputs: list[dict[str, np.ndarray]] = []
        pending = None  # computed while the next batch is decoded
        for batch in batches:
            computed = eval_step(trainable, frozen, model_state, place(batch))
            if pending is not None:
                outputs.append(jax.device_get(pending))
            pending = computed
        outputs.append(jax.device_get(pending))
        whole = {name: np.concatenate([part[name] for part in outputs]) for name in outputs[0]}
        kept = whole["mask"]
        if not kept.any():
            raise UserError(f"{source.name}: not one of its {len(source)} images could be read")
        order = np.argsort(whole["index"][kept], kind="stable")
        return {name: array[kept][order] for name, array in whole.items()}, damage.names

    return run_over


def write_results(
    workdir: Path,
    log: RunLog,
    model: Any,
    description: setup.Description,
    params: Any,
    model_state: Any,
    result: Evaluation,
    *,
    mesh: Mesh,
    plan: setup.Parameters,
    eval_source: Source,
) -> None:
    """Figures, the adapter in PEFT's layout, and the merged model in timm's naming."""
    # Every process gathers, the first one writes.
    gather = jax.jit(lambda *trees: trees, out_shardings=sharding.replicated(mesh))
    whole = gather(params, model_state)
    if jax.process_index():
        return
    host, statistics = jax.device_get(whole)
    arguments = convert.arguments_of(model)

    figures.draw_curves(read_metrics(workdir / "metrics.jsonl"), workdir / "curves.png")
    log.wrote(workdir / "curves.png", "loss, learning rate and evaluation by step")
    _draw_predictions(workdir / "predictions.png", description, result, eval_source)
    log.wrote(workdir / "predictions.png", "images with true and predicted class and probability")
    matrix = confusion_matrix(result.logits.argmax(-1), result.labels, len(description.class_names))
    figures.draw_confusion(matrix, description.class_names, workdir / "confusion.png")
    log.wrote(workdir / "confusion.png", "counts by true and predicted class")

    if any(lora.is_adapter_path(path) for path in plan.trainable):
        whole_leaves = {path for path in plan.trainable if not lora.is_adapter_path(path)}
        peft.write_adapter(
            workdir / "adapter",
            host,
            base_model_name=description.weights,
            family=description.family,
            arguments=arguments,
            naming="timm",
            modules_to_save=whole_leaves,
        )
        log.wrote(workdir / "adapter", "the adapter, for peft.PeftModel.from_pretrained")
    tensors, metadata = convert.export_weights(
        {**paths.flatten(lora.merge(host)), **paths.flatten(statistics)},
        description.family,
        arguments,
        to="timm",
        class_names=description.class_names,
        preprocessing=dataclasses.asdict(description.preprocessing),
    )
    convert.write_safetensors(workdir / "model.safetensors", tensors, metadata)
    log.wrote(workdir / "model.safetensors", "the merged model, in timm's naming")


@dataclass(frozen=True)
class Trained:
    """A finished run's model, ready to compute."""

    mesh: Mesh
    description: setup.Description
    outputs_fn: Callable[..., Mapping[str, jax.Array]]
    state: steps.TrainState
    frozen: dict[str, jax.Array]
    assemble: Callable[[Mapping[str, Any]], Any]  # arrays by path -> the parameter tree

    @property
    def arguments(self) -> tuple[Any, Any, Any]:
        """What `outputs_fn` takes before the batch."""
        return steps.averaged(self.state), self.frozen, self.state.model_state


def restore(config: ConfigDict, workdir: Path, checkpoint: str) -> Trained:
    """Rebuilds a run from its workdir alone.

    Args:
      config: the run's own, from WORKDIR/config.json.
      workdir: the run's folder.
      checkpoint: "last" or "best".

    Raises:
      UserError: no run in `workdir`, or no complete checkpoint.
    """
    description = setup.load_description(workdir / "model.json")
    mesh = sharding.make_mesh(**config.mesh)
    model = setup.build_model(config, description)
    adapter = setup.kept_adapter(config, workdir)
    image_size = description.preprocessing.image_size
    plan = setup.plan_parameters(config, model, image_size, mesh, adapter)
    abstract_trainable, abstract_frozen = plan.abstract()
    _, tx = setup.make_optimizer(config, model, abstract_trainable)
    abstract, _ = setup.abstract_state(config, tx, plan, mesh)
    if last_complete_step(workdir) is None:
        raise UserError(f"{workdir} has no complete checkpoint yet: train first")
    with closing(Checkpoints(workdir, setup.BEST_METRIC, read_only=True)) as checkpoints:
        step = checkpoints.last_step() if checkpoint == "last" else checkpoints.best_step()
        if step is None:
            raise UserError(f"{workdir} has no evaluation yet, and so no best checkpoint")
        state = checkpoints.restore(step, abstract)
        frozen = checkpoints.restore_frozen(abstract_frozen)
    outputs_fn = classification.make_outputs(setup.make_apply(model), plan.assemble)
    return Trained(mesh, description, outputs_fn, state, frozen, plan.assemble)


def evaluate(config: ConfigDict, workdir: Path, checkpoint: str) -> int:
    """--mode=evaluate: the numbers of a finished run's checkpoint, computed again."""
    trained = restore(config, workdir, checkpoint)
    source = setup.read_eval_source(config, trained.description.class_names)
    result = make_evaluate(
        trained.outputs_fn,
        trained.mesh,
        source,
        preprocessing=trained.description.preprocessing,
        batch_size=config.evaluate.batch_size,
        num_threads=config.data.threads,
    )(*trained.arguments)
    if jax.process_index() == 0:
        print(f"step {int(trained.state.step)}: {result.line()}")
        for name in result.damaged:
            print(f"skipped a damaged image: {name}")
        rows = result.summary["per_class"].items()
        width = max(len(name) for name, _ in rows)
        for name, accuracy in rows:
            print(f"  {name:{width}}  {'no images' if accuracy is None else f'{accuracy:.4f}'}")
    return 0


def predict(
    config: ConfigDict, workdir: Path, checkpoint: str, images: Sequence[str], out: Path | None
) -> int:
    """--mode=predict: a table of the most probable classes of each file, and a grid of pictures.

    Raises:
      UserError: no images given, or none that can be read.
    """
    names = _image_files(images)
    trained = restore(config, workdir, checkpoint)
    preprocessing = trained.description.preprocessing
    reader = FileReader(Path(), tuple(names))
    views, kept, damaged = [], [], []
    for row, name in enumerate(names):
        try:
            views.append(eval_transform(reader.read(row), preprocessing))
            kept.append(name)
        except DamagedImageError as error:
            damaged.append(str(error))
    if not kept:
        raise UserError(f"--images: not one of {len(names)} files could be read: {damaged[0]}")

    size = -(-min(len(views), config.evaluate.batch_size) // jax.device_count())
    size *= jax.device_count()
    place = sharding.make_batch_placer(trained.mesh)
    step = steps.make_eval_step(trained.outputs_fn, shardings=sharding.replicated(trained.mesh))
    logits = []
    for start in range(0, len(views), size):
        part = np.stack(views[start : start + size])
        images_padded = np.zeros((size, *part.shape[1:]), np.uint8)
        images_padded[: len(part)] = part
        batch = {
            "image": images_padded,
            "label": np.zeros(size, np.int32),
            "index": np.arange(size, dtype=np.int32),
            "mask": np.arange(size) < len(part),
        }
        local = slice(*(size // jax.process_count() * (jax.process_index() + i) for i in (0, 1)))
        placed = place({name: array[local] for name, array in batch.items()})
        logits.append(jax.device_get(step(*trained.arguments, placed))["logits"][: len(part)])
    probabilities = softmax(np.concatenate(logits))

    if jax.process_index():
        return 0
    class_names = trained.description.class_names
    width = max(len(name) for name in kept)
    for name, row in zip(kept, probabilities, strict=True):
        best = np.argsort(-row, kind="stable")[:3]
        text = "  ".join(f"{class_names[index]} {row[index]:.3f}" for index in best)
        print(f"{name:{width}}  {text}")
    for reason in damaged:
        print(f"skipped: {reason}")
    path = (out or workdir) / "predict.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figures.draw_predictions(np.stack(views[:GRID]), None, probabilities[:GRID], class_names, path)
    print(f"wrote {path}")
    return 0


def frozen(config: ConfigDict, workdir: Path) -> int:
    """--mode=frozen: what the weights' features are worth on a data set without any training.

    Nearest neighbours and few-shot regression on the pooled features; also WORKDIR/frozen.json.

    Raises:
      UserError: no weights in the config, or bad input.
    """
    weights = setup.read_weights(config)
    if weights is None:
        raise UserError("--mode=frozen: set config.model.weights to the weights to evaluate")
    train, held_out = setup.read_sources(config)
    description = setup.describe(config, weights, train.class_names, headless=True)
    model = setup.build_model(config, description)
    mesh = sharding.make_mesh(**config.mesh)
    size = description.preprocessing.image_size
    params, model_state = setup.headless_parameters(config, model, size, mesh, weights)
    run_over = make_run_over(
        classification.make_outputs(setup.make_apply(model), lambda params: params),
        mesh,
        preprocessing=description.preprocessing,
        batch_size=config.evaluate.batch_size,
        num_threads=config.data.threads,
    )
    print(f"features: {weights.origin} on {len(train)} + {len(held_out)} images of {train.name}")
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
        print(f"  {name:24}  top1 {np.mean(accuracies):.4f}{spread}")
    for name in damaged:
        print(f"skipped a damaged image: {name}")
    workdir.mkdir(parents=True, exist_ok=True)
    record = {"weights": weights.origin, "sha256": weights.sha256, "data": train.name}
    write_json({**record, "features": features.shape[1], "top1": results}, workdir / "frozen.json")
    print(f"wrote {workdir / 'frozen.json'}")
    return 0


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities f64[N, C] of logits f[N, C]."""
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _image_files(given: Sequence[str]) -> list[str]:
    """The files given, and the images in the folders given, in order."""
    if not given:
        raise UserError("--mode=predict needs --images=FILE or --images FILE FOLDER ...")
    names: list[str] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            names += map(str, inside)
        elif path.is_file():
            names.append(name)
        else:
            raise UserError(f"--images: there is no file {name}")
    if not names:
        raise UserError(f"--images: no images in {', '.join(given)}")
    return names


def _draw_predictions(
    path: Path, description: setup.Description, result: Evaluation, source: Source
) -> None:
    """A grid of evenly spread examples of the evaluation data, as the model sees them."""
    rows = np.unique(np.linspace(0, len(result.labels) - 1, GRID).astype(int))
    views = [
        eval_transform(source[int(result.index[row])]["image"], description.preprocessing)
        for row in rows
    ]
    figures.draw_predictions(
        np.stack(views),
        result.labels[rows],
        softmax(result.logits[rows]),
        description.class_names,
        path,
    )
