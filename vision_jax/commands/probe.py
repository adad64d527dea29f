"""probe: what the weights' frozen features are worth on a data set, without any training.

Nearest neighbours and few-shot regression on the pooled features.
"""

from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from vision_jax import sharding
from vision_jax.config import write_json
from vision_jax.data.pipeline import make_eval_batches
from vision_jax.errors import UserError
from vision_jax.evaluation import make_run_over, say_damaged
from vision_jax.logging import say
from vision_jax.models.families import make_apply
from vision_jax.ops.probe import few_shot_predict, knn_predict
from vision_jax.run.description import build_model, describe, read_weights
from vision_jax.run.parameters import headless_parameters
from vision_jax.tasks.api import find_task


def run(config: ConfigDict, workdir: Path) -> int:
    """Prints top-1 by k and by shots; also WORKDIR/probe.json. Returns the exit code.

    Raises:
      UserError: no weights in the config, or bad input.
    """
    weights = read_weights(config)
    if weights is None:
        raise UserError("probe: set config.model.weights to the weights to evaluate")
    task = find_task(config.task)
    if not task.labels_images:
        raise UserError(f"probe is for tasks with a label an image, and this one is {config.task}")
    train, held_out = task.read_sources(config)
    description = describe(config, weights, train.class_names, headless=True)
    model = build_model(config, description)
    mesh = sharding.make_mesh(**config.mesh)
    size = description.preprocessing.image_size
    params, model_state = headless_parameters(config, model, size, mesh, weights)
    run_over = make_run_over(
        task.make_outputs(config, model, "classes", make_apply(model), lambda params: params),
        mesh,
        partial(
            make_eval_batches,
            preprocessing=description.preprocessing,
            num_threads=config.data.threads,
        ),
        batch_size=config.evaluate.batch_size,
    )
    say(f"features: {weights.origin} on {len(train)} + {len(held_out)} images of {train.name}")
    (found, _), (test, damage) = (
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
    say_damaged(damage.lines)
    workdir.mkdir(parents=True, exist_ok=True)
    record = {"weights": weights.origin, "sha256": weights.sha256, "data": train.name}
    write_json({**record, "features": features.shape[1], "top1": results}, workdir / "probe.json")
    say(f"wrote {workdir / 'probe.json'}")
    return 0
