"""Runs small enough for tests: a ViT of one block, 48 random images, six updates."""

import functools
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from vision_jax import convert, cost, sharding, train
from vision_jax.config import load_config
from vision_jax.data.pipeline import DamageLog
from vision_jax.models import families
from vision_jax.models.vit import build_vit
from vision_jax.run.prepare import prepare
from vision_jax.tasks.api import find_task
from vision_jax.trees import paths

# With 8 devices orbax would cut each array in 8 to write it, and compile a program for each shape.
ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False), override=True
)

ROOT = Path(__file__).parents[1]


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a child: this process's, but for the number of devices."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"


def python(*arguments, devices=1, **keywords):
    """A child that runs Python, on so many virtual devices."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(devices),
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **keywords,
    )


def start_two(config, workdir, fields, program=("-m", "vision_jax.main"), others=None, devices=1):
    """Two processes of a run of configs/CONFIG; `others` are fields of the second one alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = f"--config={ROOT / 'configs' / config}"
    return [
        python(
            *(*program, config, f"--workdir={workdir}"),
            *(f"--config.{name}={value}" for name, value in {**fields, **more}.items()),
            *(f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process={process}"),
            devices=devices,
        )
        for process, more in enumerate(({}, others or {}))
    ]


STEPS = 6
DEPTH = 1
FULL = {
    "batch_size": 16,
    "optim__ema_decay": 0.5,
    "optim__accumulate": 2,
    "lora__dropout": 0.1,
}
CLASSES = ("ant", "bee", "cat", "dog")


def write_weights(path: Path, num_classes: int = 3) -> None:
    """A random ViT in timm's naming."""
    model = build_vit(
        width=32,
        depth=DEPTH,
        num_heads=2,
        mlp_width=64,
        patch_size=8,
        image_size=(16, 16),
        num_classes=num_classes,
    )
    images = np.zeros((1, 16, 16, 3), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)  # the head starts at zero otherwise, and tests would see little
    params = jax.tree.map(
        lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape, np.float32), params
    )
    preprocessing = {
        "image_size": (16, 16),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.3, 0.2, 0.25),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "crop_mode": "center",
    }
    tensors, header = convert.export_weights(
        paths.flatten(params), "vit", convert.arguments_of(model), preprocessing=preprocessing
    )
    convert.write_safetensors(path, tensors, header)


def write_data(folder: Path) -> None:
    """cifar10.npz with 48 training and 20 test images of noise whose color tells the class."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"class_names": np.array(CLASSES)}
    for split, count in (("train", 48), ("test", 20)):
        labels = np.arange(count) % len(CLASSES)
        noise = rng.integers(0, 128, (count, 16, 16, 3))
        colors = np.array([[0, 0, 0], [90, 0, 0], [0, 90, 0], [0, 0, 90]])
        arrays[f"{split}_images"] = (noise + colors[labels][:, None, None]).astype(np.uint8)
        arrays[f"{split}_labels"] = labels.astype(np.int64)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "cifar10.npz", **arrays)


@functools.cache
def inputs() -> Path:
    """A folder with weights.safetensors and cifar10.npz, made once."""
    keep = tempfile.TemporaryDirectory(prefix="vision_jax_tests_")
    inputs.keep = keep  # type: ignore[attr-defined]  # removed when Python ends
    folder = Path(keep.name)
    write_weights(folder / "weights.safetensors")
    write_data(folder)
    return folder


@functools.cache
def teacher() -> Path:
    """A file with a random ViT of all classes."""
    path = inputs() / "teacher.safetensors"
    write_weights(path, len(CLASSES))
    return path


def overrides(**more: Any) -> dict[str, str]:
    """Fields of configs/vit_lora.py for a tiny run; `optim__lr=1` sets optim.lr."""
    fields = {
        "model.weights": inputs() / "weights.safetensors",
        "model.image_size": 16,
        "data.train": f"cifar10:{inputs()}/train",
        "data.eval": f"cifar10:{inputs()}/test",
        "batch_size": 8,
        "total_steps": STEPS,
        "checkpoint_every": 2,
        "log_every": 1,
        "lora.rank": 2,
        "optim.warmup_steps": 1,
        "optim.lr": 0.01,
        "evaluate.every": 3,
        "evaluate.batch_size": 8,
    }
    fields |= {name.replace("__", "."): value for name, value in more.items()}
    return {name: str(value) for name, value in fields.items()}


def tiny_config(**more: Any):
    """configs/vit_lora.py as a tiny run."""
    return load_config(str(ROOT / "configs/vit_lora.py"), overrides(**more))


def full_config(**more: Any):
    """The tiny run that the tests look at closely: average, accumulation and dropout are on."""
    return tiny_config(**FULL, **more)


@functools.cache
def finished() -> Path:
    """The workdir of a finished run of `full_config`; not to be changed."""
    workdir = inputs() / "finished"
    assert train.run(full_config(), workdir) == 0
    assert (workdir / "model.safetensors").is_file()
    return workdir


def write_teacher(path: Path, family: str, classes: int, side: int, **arguments) -> str:
    """A random model, its BatchNorm statistics random too."""
    model = families.build_model(family, num_classes=classes, in_channels=3, **arguments)
    variables = jax.jit(lambda key: families.initialize(model, key, (side, side)))(
        jax.random.key(1)
    )
    flat, rng = {}, np.random.default_rng(0)
    for tree in variables.values():
        for name, leaf in paths.flatten(tree).items():
            noise = 0.1 * rng.standard_normal(leaf.shape, np.float32)
            flat[name] = np.float32(leaf) + (abs(noise) if name.endswith("var") else noise)
    preprocessing = {
        "image_size": (side, side),
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.3, 0.25),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "crop_mode": "center",
    }
    tensors, header = convert.export_weights(
        flat,
        family,
        convert.arguments_of(model),
        to=convert.own_naming(family),
        preprocessing=preprocessing,
    )
    convert.write_safetensors(path, tensors, header)
    return str(path)


class Prepared:
    """A prepared tiny run without a workdir: `run`, `state`, `frozen`, `batch`, `step`.

    `frozen` has the teachers' arrays among it.
    """

    def __init__(self, devices: int = 1, fsdp: int = 1, config: Any = None, **fields: Any):
        self.config = config = config or tiny_config(**fields)
        config.mesh.fsdp = fsdp
        grid = np.array(jax.devices()[:devices]).reshape(devices // fsdp, fsdp)
        mesh = Mesh(grid, ("data", "fsdp"))
        source, _ = find_task(config.task).read_sources(config)
        self.run = run = prepare(config, source.class_names, mesh=mesh)
        self.model, self.plan, self.loss_fn = run.model, run.parameters, run.loss_fn
        self.image_size = run.description.preprocessing.image_size
        self.state, frozen, _ = run.make_arrays()
        self.frozen = {**frozen, **run.place_beside()}
        self.apply = families.make_apply(run.model)
        self.step = run.make_train_step()
        self.batch = sharding.make_batch_placer(mesh)(next(run.training_data(source, DamageLog())))

    def compiled(self) -> Any:
        return self.step.lower(self.state, self.frozen, self.batch).compile()

    def forward_and_input_gradient(self) -> float:
        """FLOPs of one."""

        def loss(images, trainable, frozen):
            params = self.plan.assemble({**trainable, **frozen})
            state = self.state.model_state
            outputs, _ = self.apply(params, state, images, train=False, keys={})
            return -jax.nn.log_softmax(outputs["logits"])[:, 0].sum()

        images = jnp.zeros((len(self.batch["image"]), *self.image_size, self.model.in_channels))
        program = jax.jit(jax.value_and_grad(loss)).lower(images, self.state.trainable, self.frozen)
        return cost.count(program.compile()).flops
