"""Our sides of the tables: the trainer's own step, the model alone, an attack on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import beside
from benchmarks.beside import Side
from vision_jax import cost, load, machine
from vision_jax.attacks import gradient, losses
from vision_jax.config import default_config
from vision_jax.explain.forward import Forward, class_logit
from vision_jax.explain.gradients import integrated_gradients
from vision_jax.ops import nms as suppression
from vision_jax.run.prepare import prepare
from vision_jax.trees import products

SIDE = 1536  # of the matrices that measure the machine's peak

_PROGRAMS: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: (
        _PROGRAMS.append(event) if event.endswith("backend_compile_duration") else None
    )
)


class Program:
    """A jitted function, compiled at its first call, and what XLA says of it."""

    def __init__(self, jitted: Any):
        self._jitted = jitted
        self._compiled: Any = None
        self._programs = 0
        self._flops = 0.0

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            lowered = self._jitted.lower(*arguments)
            self._compiled = lowered.compile()
            machine.give_back_memory()  # what compiling has used, as the trainer does
            # A GPU's program calls libraries for its products: XLA counts the program before that,
            # in which a loop counts once.
            on_cpu = jax.default_backend() == "cpu"
            self._flops = (
                cost.count(self._compiled).flops if on_cpu else lowered.cost_analysis()["flops"]
            )
        found = self._compiled(*arguments)
        self._programs = self._programs or len(_PROGRAMS)
        return found

    def facts(self) -> dict[str, Any]:
        memory, analysis = self._compiled.memory_analysis(), self._compiled.cost_analysis()
        return {
            "flops": self._flops,
            "flops_xla": analysis.get("flops"),
            "bytes_accessed": analysis.get("bytes accessed"),
            "temporary_bytes": memory.temp_size_in_bytes,
            "programs": self._programs,  # up to the first step
            "programs_later": len(_PROGRAMS) - self._programs,
            **_device_peak(),
        }


def _device_peak() -> dict[str, Any]:
    found = jax.devices()[0].memory_stats() or {}
    return {"device_bytes": found["peak_bytes_in_use"]} if "peak_bytes_in_use" in found else {}


def train(
    folder: Path,
    *,
    batch_size: int,
    image_size: int,
    classes: int,
    task: str = "classification",
    fields: dict[str, Any] | None = None,
    teacher: str = "",
    switches: Sequence[str] = (),
) -> Side:
    """The trainer's step from the weights in the folder; what `fields` leaves out is the default.

    Args:
      folder: with the weights.
      batch_size: images of a step.
      image_size: pixels a side.
      classes: of the weights' own head.
      task: of the config.
      fields: of the config.
      teacher: the folder beneath `folder` with a teacher's weights, for the recipe "distill".
      switches: of SWITCHES.
    """
    for name in switches:
        SWITCHES[name]()
    config = default_config(task)
    about = {
        "model.weights": str(folder),
        "model.image_size": image_size,
        "model.reinitialize": (),
        "batch_size": batch_size,
        **({"distill.teachers": (str(folder / teacher),)} if teacher else {}),
    }
    config.update_from_flattened_dict({**about, **(fields or {})})
    prepared = prepare(config, tuple(map(str, range(classes))))
    state, frozen, _ = prepared.make_arrays()
    frozen = {**frozen, **prepared.place_beside()}
    step = Program(prepared.make_train_step())
    batch = jax.device_put(_batch(prepared.abstract_batch(), classes))
    held, memory = [state], machine.MemoryWatch()
    trainable = sum(leaf.size for leaf in state.trainable.values())
    del state

    def run() -> float:
        state, metrics = step(held.pop(), frozen, batch)
        held.append(state)
        memory.check()
        return float(metrics["loss"])

    return Side(run, lambda: {**step.facts(), "trainable": trainable})


def _batch(like: dict[str, Any], classes: int) -> dict[str, np.ndarray]:
    """A batch of these shapes; of a detector's padded targets the first few are boxes."""
    batch = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in like.items()}
    count, size, _, channels = like["image"].shape
    batch["image"], batch["mask"] = beside.images(count, size, channels), np.ones(count, bool)
    if like["label"].ndim == 3:  # of pixels
        label = beside.labels(like["label"].size, classes).reshape(like["label"].shape)
        return {**batch, "label": label.astype(like["label"].dtype)}
    if "target_mask" not in like:
        return {**batch, "label": beside.labels(count, classes).astype(np.int32)}
    found = beside.boxes(count)
    each = found.shape[1]
    batch["size"][:] = size
    batch["boxes_cxcywh_01"][:, :each] = found
    batch["label"][:, :each] = beside.labels(count * each, classes).reshape(count, each)
    batch["target_mask"][:, :each] = True
    return batch


def _accumulate_in_half() -> None:
    """Products of half-precision inputs give half-precision results, their gradients too."""
    products.dense = lambda x: products._plain_dot


def _plain_attention() -> None:
    """XLA's attention where cuDNN's would be taken."""
    fused = jax.nn.dot_product_attention
    jax.nn.dot_product_attention = lambda *arguments, **keywords: fused(
        *arguments, **{**keywords, "implementation": "xla"}
    )


# What an accelerator might do better, or worse, with another form.
SWITCHES = {"half accumulation": _accumulate_in_half, "no cuDNN attention": _plain_attention}


def infer(folder: Path, *, batch_size: int, image_size: int, dtype: str = "float32") -> Side:
    """The model's outputs for a batch; the value is the mean square of its logits."""
    loaded = load(folder, image_size=image_size, dtype=dtype)
    program = Program(machine.jit(lambda v, x: loaded.apply(v, x)["logits"]))
    images = jnp.asarray(beside.images(batch_size, image_size))

    def run() -> float:
        logits = jax.block_until_ready(program(loaded.variables, images))
        layered = logits.ndim == 4 and loaded.family.task == "detection"
        last = logits[-1] if layered else logits  # a detector's last layer
        return float(np.square(np.asarray(last, np.float32)).mean())

    return Side(run, program.facts)


def detect(folder: Path, *, batch_size: int, image_size: int) -> Side:
    """From images to boxes; the value is the mean of the ten best scores of each image."""
    loaded = load(folder, image_size=image_size)
    sizes = np.full((batch_size, 2), image_size, np.int32)

    def find(variables: Any, images: Any) -> Any:
        return loaded.postprocess(loaded.apply(variables, images), sizes)

    program = Program(machine.jit(find))
    images = jnp.asarray(beside.images(batch_size, image_size)) / 255.0

    def run() -> float:
        found = jax.block_until_ready(program(loaded.variables, images))
        return float(-np.sort(-np.asarray(found["score"]))[:, :10].mean())

    return Side(run, program.facts)


def nms(folder: Path, *, batch_size: int, boxes: int, classes: int) -> Side:
    """NMS by class of a whole batch; the value is how many boxes are left."""
    del folder
    found, score, label = map(jnp.asarray, beside.crowd(batch_size, boxes, classes))
    everything = jnp.ones(score.shape, bool)
    program = Program(jax.jit(lambda b, s, g: suppression.nms(b, s, everything, 0.5, g).sum()))
    return Side(lambda: float(program(found, score, label)), program.facts)


def attack(
    folder: Path,
    *,
    batch_size: int,
    image_size: int,
    classes: int,
    steps: int,
    dtype: str = "float32",
) -> Side:
    """PGD of radius 4/255 from the images themselves; the value is the mean square change."""
    loaded = load(folder, image_size=image_size, dtype=dtype)
    images = jnp.asarray(beside.images(batch_size, image_size)) / 255.0
    labels = jnp.asarray(beside.labels(batch_size, classes))

    def ascend(variables: Any, images: Any) -> Any:
        loss = losses.make_untargeted(lambda x: loaded.apply(variables, x)["logits"], labels)
        return gradient.pgd(
            loss,
            images,
            None,
            epsilon=4 / 255,
            step_size=1 / 255,
            steps=steps,
            random_start=False,
        )

    program = Program(machine.jit(ascend))

    def run() -> float:
        found = jax.block_until_ready(program(loaded.variables, images))
        return float(np.square(np.asarray(found) - np.asarray(images)).mean() * 1e4)

    return Side(run, program.facts)


def integrate(folder: Path, *, batch_size: int, image_size: int, classes: int, nodes: int) -> Side:
    """Integrated gradients from black; the value is their mean square."""
    loaded = load(folder, image_size=image_size)
    images = jnp.asarray(beside.images(batch_size, image_size)) / 255.0
    target = class_logit(jnp.asarray(beside.labels(batch_size, classes)))
    forward = Forward(loaded.model)

    def explain(variables: Any, images: Any, target: Any) -> Any:
        return integrated_gradients(forward, variables, images, target, nodes=nodes)

    program = Program(machine.jit(explain))

    def run() -> float:
        found = jax.block_until_ready(program(loaded.variables, images, target))
        return float(np.square(np.asarray(found)).mean() * 1e4)

    return Side(run, program.facts)


def matmul(folder: Path, side: int = SIDE, dtype: str = "float32") -> Side:
    """A product of two square matrices: what this machine can do at this moment."""
    del folder
    square = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
    product = jax.jit(jnp.matmul)

    def run() -> float:
        jax.block_until_ready(product(square, square))
        return 0.0

    return Side(run, lambda: {"flops": 2.0 * side**3})
