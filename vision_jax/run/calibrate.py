"""What quantization, or any other change of kernels, does to a run's model, on its own images.

    ranges of the layers' inputs -> the error of each layer alone -> which stay in float
    evaluate_each(run, trees, ...)    the task's numbers before and after

Errors are of the model's outputs, logits and boxes: the square root of the squared differences over
the squares, of the output that suffers most. One compiled program measures them all: each kernel is
switched between what it was and what it would be (trees.quantize).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax import sharding
from vision_jax.data.pipeline import DamageLog
from vision_jax.models import families
from vision_jax.ops import ranges
from vision_jax.run.prepare import Run
from vision_jax.tasks.api import Calibrated
from vision_jax.trees import paths, quantize

# Outputs whose rows are in the order of their scores: detections, and what is said of proposals.
DETECTED = ("score", "boxes_xyxy_01")
PROPOSED = ("proposals_xyxy_px", "logits", "deltas")
Batch = Mapping[str, jax.Array]
Error = Callable[..., float]  # of the kernels that are quantized, see `make_error`


def read_batches(run: Run, count: int) -> list[Batch]:
    """`count` training images, spread over the classes, as evaluation sees them; on the mesh."""
    source = run.task.read_sources(run.config)[0]
    if count < len(source):
        fewer = run.config.copy_and_resolve_references()
        fewer.data.subset = count
        source = run.task.read_sources(fewer)[0]
    devices = jax.device_count()
    size = -(-min(run.config.evaluate.batch_size, len(source)) // devices) * devices
    make_batches = cast(Calibrated, run.task).make_batches
    batches = make_batches(run.config, run.description.preprocessing)(
        source, batch_size=size, process_index=0, process_count=1, damage_log=DamageLog()
    )
    place = sharding.make_batch_placer(run.mesh)
    return [place(batch) for batch in batches]


def through_task(run: Run, call: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """(params, model_state, batch) -> what `call` gives beside the outputs.

    `call(params, model_state, *inputs) -> (outputs, aside)` stands for the model where the task's
    evaluation calls it, with the inputs that it makes of a batch.
    """

    def compute(params: Any, model_state: Any, batch: Batch) -> Any:
        kept = []

        def apply(params, model_state, *inputs, train, keys):
            del train, keys
            outputs, aside = call(params, model_state, *inputs)
            kept.append(aside)
            return outputs, model_state

        outputs_fn = run.task.make_outputs(
            run.config, run.model, run.student.predicts, apply, lambda params: params
        )
        outputs_fn(params, {}, model_state, batch)
        return kept[0]

    return compute


def input_ranges(
    run: Run,
    params: Any,
    model_state: Any,
    batches: Sequence[Batch],
    observer: str,
    percentile: float,
) -> dict[str, float]:
    """The magnitude of each kernel's inputs that level 127 stands for, by the kernel's path.

    Args:
      run: prepared.
      params: of its model, plain.
      model_state: BatchNorm's statistics.
      batches: of `read_batches`.
      observer: see ops.ranges.find_range.
      percentile: of the observer of that name.
    """
    model = families.unrolled(run.model)

    def call(params, model_state, *inputs):
        variables = {"params": params, **({"batch_stats": model_state} if model_state else {})}
        outputs, seen = families.apply_with_inputs(model, variables, *inputs)
        return families.as_outputs(outputs), seen

    inputs_of = through_task(run, call)

    @jax.jit
    def largest_of(params, model_state, batch):
        seen = inputs_of(params, model_state, batch)
        return {p: jnp.stack([jnp.abs(x).max() for x in xs]).max() for p, xs in seen.items()}

    @jax.jit
    def counts_of(params, model_state, batch, largest):
        seen = inputs_of(params, model_state, batch)
        return {
            p: jnp.stack([ranges.count_magnitudes(x, largest[p]) for x in xs]).sum(0)
            for p, xs in seen.items()
        }

    each = [largest_of(params, model_state, batch) for batch in batches]
    largest = jax.tree.map(lambda *values: jnp.stack(values).max().astype(jnp.float32), *each)
    if observer == "absmax":
        return {path: float(value) for path, value in largest.items()}
    counts = [jax.device_get(counts_of(params, model_state, batch, largest)) for batch in batches]
    return {
        path: ranges.find_range(
            np.stack([one[path] for one in counts]).sum(0),
            float(value),
            observer,
            percentile,
        )
        for path, value in largest.items()
    }


def make_error(
    run: Run,
    plain: Any,
    quantized: Any,
    model_state: Any,
    batches: Sequence[Batch],
    milder: Any = None,
) -> Error:
    """The error of the model's outputs by which kernels are quantized; compiled once.

    It is a function of the paths of kernels as in `quantized`, and of those as in `milder`.

    Args:
      run: prepared.
      plain: its parameters, in float.
      quantized: those with every candidate quantized.
      model_state: BatchNorm's statistics.
      batches: of `read_batches`.
      milder: with every candidate quantized so that it is off by less; None if there is no such.
    """
    apply = families.make_apply(families.unrolled(run.model))

    def call(params, model_state, *inputs):
        outputs, _ = apply(params, model_state, *inputs, train=False, keys={})
        return outputs, _compared(outputs)

    outputs_of = through_task(run, call)
    references = [jax.jit(outputs_of)(plain, model_state, batch) for batch in batches]

    @jax.jit
    def squares(params, model_state, batch, reference):
        def compare(x, y):
            sound = jnp.isfinite(x) & jnp.isfinite(y)
            pair = jnp.where(sound, x - y, 0), jnp.where(sound, y, 0)
            return jnp.stack([jnp.square(part.astype(jnp.float32)).sum() for part in pair])

        return jax.tree.map(compare, outputs_of(params, model_state, batch), reference)

    def error(on: Collection[str], mildly: Collection[str] = ()) -> float:
        full = quantized if milder is None else quantize.switch(milder, quantized, on)
        tree = quantize.switch(plain, full, {*on, *mildly})
        found = [
            squares(tree, model_state, batch, reference)
            for batch, reference in zip(batches, references, strict=True)
        ]
        sums = jax.tree.map(lambda *parts: np.sum(parts, 0, dtype=np.float64), *found)
        return max(float(np.sqrt(off / max(all_, 1e-30))) for off, all_ in sums.values())

    return error


def _compared(outputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The float outputs by path, but for those in an order that a small difference turns round."""
    left_out = {*(DETECTED if "score" in outputs else ())}
    left_out |= {*(PROPOSED if "proposals_xyxy_px" in outputs else ())}
    kept = {name: x for name, x in outputs.items() if name not in left_out}
    flat = paths.flatten(kept)
    return {p: x for p, x in flat.items() if jnp.issubdtype(x.dtype, jnp.floating)}


def choose_exceptions(
    errors: Mapping[str, float], error: Callable[[Collection[str]], float], max_error: float
) -> tuple[str, ...]:
    """The fewest kernels, those of the largest errors alone, without which the rest is in bounds.

    Args:
      errors: of each candidate, when it alone is quantized.
      error: of any set of them.
      max_error: of what is quantized together.
    """
    order = sorted(errors, key=lambda path: errors[path], reverse=True)
    fewest, enough = 0, len(order)
    while fewest < enough:
        middle = (fewest + enough) // 2
        if error(order[middle:]) <= max_error:
            enough = middle
        else:
            fewest = middle + 1
    return tuple(order[:enough])


def evaluate_each(run: Run, trees: Mapping[str, Any], model_state: Any) -> dict[str, Any]:
    """The task's numbers on the evaluation data for each tree of parameters, by their names.

    Of a classifier's each has also the share of images that it names as the first tree does.
    """
    task, config = run.task, run.config
    source = task.read_eval_source(config, run.description.class_names)
    model = families.unrolled(run.model)  # the trees' blocks need not be alike
    outputs_fn = task.make_outputs(
        config,
        model,
        run.student.predicts,
        families.make_apply(model),
        lambda params: params,
    )
    evaluate = task.make_evaluate(
        config, outputs_fn, run.mesh, source, run.description.preprocessing
    )
    results: dict[str, Any] = {
        name: evaluate(params, {}, model_state) for name, params in trees.items()
    }
    found: dict[str, Any] = {
        name: {key: x for key in task.reported if (x := result.summary.get(key)) is not None}
        for name, result in results.items()
    }
    if task.labels_images:
        first = next(iter(results.values())).logits.argmax(-1)
        for name, result in results.items():
            found[name]["agreement"] = float((result.logits.argmax(-1) == first).mean())
    return found


def scales_of(found: Mapping[str, float]) -> dict[str, jax.Array]:
    """The step between the levels of each kernel's inputs, f[]; 1 where they are all zero."""
    return {
        path: jnp.float32((top or ranges.LEVELS) / ranges.LEVELS) for path, top in found.items()
    }
