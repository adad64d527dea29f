"""plan: what a step of a config costs, known before anything runs.

The very step that training would run is compiled for the config's mesh from shapes alone: no
weights are placed and no image is read. For a mesh larger than this machine main.py asks for as
many virtual CPU devices; the compiler then is the CPU's, and so are its temporaries. What links and
failures take on machines of many devices is arithmetic (scaling.py), and `--scale` goes on by it
alone beyond what is worth compiling.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from ml_collections import ConfigDict

from vision_jax import convert, cost, scaling, sharding
from vision_jax.config import check_ranges
from vision_jax.errors import UserError
from vision_jax.logging import (
    PARAMETER_COLUMNS,
    human_size,
    print_table,
    show_progress,
    summarize_parameters,
)
from vision_jax.memory import device_bytes
from vision_jax.models.families import FAMILIES
from vision_jax.run.description import Description, describe, read_weights
from vision_jax.run.prepare import Run, prepare
from vision_jax.tasks.api import find_task

GIB = 2**30
MOST_COMPILATIONS = 7  # to find the largest batch
MOST_UNITS = 2**20
UNKNOWN_CLASSES = 1000  # when neither the data nor the weights can be read


@dataclass(frozen=True)
class Plan:
    """What a step costs on each device; bytes are XLA's for the backend that compiled it.

    Attributes:
      batch_size: images over all devices.
      devices: number of devices to plan for.
      flops: of matrix products and convolutions.
      state: bytes of what trains, the optimizer's state and the averages; donated, so that the new
        state takes the place of the old one.
      frozen: bytes of what does not train.
      batch: bytes of the images and targets.
      temporary: bytes of all that lives within a step.
      output: bytes of results that take nobody's place.
      collectives: see cost.Cost.
      parts: bytes of `state` by what they are.
      whole_state: bytes of the state over all devices, once: a checkpoint's.
      volume: what of the parameters a step moves.
    """

    batch_size: int
    devices: int
    flops: float
    state: int
    frozen: int
    batch: int
    temporary: int
    output: int
    collectives: dict[str, tuple[int, float]]
    parts: dict[str, int] = field(default_factory=dict)
    whole_state: int = 0
    volume: scaling.Volume = field(default_factory=scaling.Volume)

    @property
    def total(self) -> int:
        """Bytes that a device must have."""
        return self.state + self.frozen + self.batch + self.temporary + self.output


def run(config: ConfigDict, memory: float | None, scale: Sequence[int] | None = None) -> int:
    """Prints the plan, and with `memory` (GiB of a device) the largest batches that fit.

    With `scale` also what as many devices would take, each with the share of the batch that a
    device of this plan has.

    Raises:
      UserError: a config that could not be trained either.
    """
    check_ranges(config)
    description, notes = describe_planned(config)
    for note in notes:
        print(f"note: {note}")
    parameters = prepare(config, description=description).parameters
    for note in parameters.tensor.notes:
        print(f"note: {note}")
    print_table("Parameters", PARAMETER_COLUMNS, summarize_parameters(*parameters.abstract()))
    devices = jax.device_count()
    variants = [] if memory is None else _variants(config, description.family, devices)
    most = 1 + len(variants) * MOST_COMPILATIONS
    with show_progress(most, what="compilations") as (advance, say):
        plan = compile_step(config, description)
        advance()
        for line in [*lines(plan, config), *scaled(plan, config, scale or [plan.devices])]:
            say(line)
        if memory is not None:
            say(f"Largest batch in {memory:g} GiB a device, of the batch that all devices share:")
            for name, changed in variants:
                found = largest_batch(changed, description, memory * GIB, advance)
                say(f"  {name:24}  {_found(found, devices)}")
    return 0


def describe_planned(config: ConfigDict) -> tuple[Description, list[str]]:
    """The model that training would build, and notes on what had to be assumed for it.

    Data and weights that are not here are no obstacle as long as the config names an architecture.
    """
    notes: list[str] = []
    task = find_task(config.task)
    weights = None
    try:
        weights = read_weights(config)
    except (UserError, OSError) as error:
        if not config.model.variant:
            raise UserError(f"{error}; or set config.model.variant to plan without them") from error
        notes.append(f"planned without the weights: {error}")
    try:
        names = task.read_sources(config)[0].class_names
    except (UserError, OSError, ImportError) as error:
        arguments = dict(config.model.arguments)
        if weights is not None:
            arguments = convert.recognize(weights)[1] | arguments
        count = arguments["num_classes"] if arguments.get("num_classes") else UNKNOWN_CLASSES
        names = tuple(map(str, range(count)))
        notes.append(f"planned with {count} classes, without the data: {error}")
    return describe(config, weights, names), notes


def compile_step(config: ConfigDict, description: Description) -> Plan:
    """Compiles the step of `config` from shapes."""
    run = prepare(config, description=description)
    _, frozen = run.parameters.abstract()
    frozen |= run.abstract_beside()
    state, batch = run.abstract_state, run.abstract_batch()
    compiled = run.make_train_step().lower(state, frozen, batch).compile()
    memory = compiled.memory_analysis()
    counted = cost.count(compiled)
    return Plan(
        batch_size=config.batch_size,
        devices=jax.device_count(),
        flops=counted.flops,
        state=device_bytes(state),
        frozen=device_bytes(frozen),
        batch=device_bytes(batch),
        temporary=memory.temp_size_in_bytes,
        output=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collectives=counted.collectives,
        parts={
            "trainable": device_bytes(state.trainable),
            "optimizer": device_bytes(state.opt_state),
            "moving average": device_bytes(state.ema),
        },
        whole_state=sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(state)),
        volume=_volume(
            run, state.trainable, frozen, counted.collectives.get("all-reduce", (0, 0.0))[1]
        ),
    )


def _volume(run: Run, trainable: Any, frozen: Any, reduced: float) -> scaling.Volume:
    """Bytes of what a step moves, of the parameters by their shardings.

    `reduced`: bytes of all reductions of the compiled step. What are not gradients are activations.
    """
    mesh, times = run.mesh, run.config.optim.accumulate
    tensor = mesh.shape.get(sharding.TENSOR, 1)

    def held(leaf: Any, *axes: str) -> float:
        """Bytes of the part of an array that these axes of the mesh leave to a device."""
        parts = math.prod(mesh.shape[axis] for axis in axes if axis in leaf.sharding.spec)
        return leaf.dtype.itemsize * leaf.size / parts

    def of(tree: Any, split: bool) -> float:
        own = [leaf for leaf in tree.values() if (sharding.FSDP in leaf.sharding.spec) == split]
        return float(sum(held(leaf, sharding.TENSOR) for leaf in own))

    parted, whole = of(trainable, True), of(trainable, False)
    turned = summed = 0.0
    if tensor > 1:
        fused = run.parameters.tensor.parts
        arrays = trainable | frozen
        turned = sum(
            held(leaf, sharding.TENSOR)
            for path, leaf in arrays.items()
            if path in run.parameters.tensor.axes
            and (path in fused or path.rpartition("/")[0] in fused)
        )
        summed = max(reduced - times * (parted + whole), 0.0)
    return scaling.Volume(parted, whole, of(frozen, True), times, turned, summed)


def largest_batch(
    config: ConfigDict,
    description: Description,
    budget: float,
    advance: Callable[[], None] = lambda: None,
) -> tuple[int, float] | None:
    """The largest batch whose step fits `budget` bytes a device, and its bytes a device.

    Memory grows nearly linearly with the batch: two sizes give the line, the size where it meets
    the budget is compiled, and so on from there. None: not even the smallest batch fits.
    `advance` is called MOST_COMPILATIONS times: after each, and at the end for those not needed.
    """
    unit = jax.device_count() * config.optim.accumulate
    left = MOST_COMPILATIONS

    def bytes_of(units: int) -> int:
        nonlocal left
        changed = config.copy_and_resolve_references()
        changed.batch_size = units * unit
        size = compile_step(changed, description).total
        left -= 1
        advance()
        return size

    fits, last = 1, bytes_of(1)
    size = last
    if size <= budget:
        slope = max((bytes_of(4) - size) / 3, 1.0)
        units, too_many = 1, MOST_UNITS
        while left:
            units = int(units + (budget - last) / slope)
            units = min(max(units, fits + 1), too_many - 1)
            if units <= fits:
                break
            last = bytes_of(units)
            if last <= budget:
                fits, size = units, last
            else:
                too_many = units
    for _ in range(left):
        advance()
    return (fits * unit, size) if size <= budget else None


def lines(plan: Plan, config: ConfigDict) -> list[str]:
    """The plan for the screen."""
    sizes = sharding.make_mesh(**config.mesh).shape
    mesh = ", ".join(f"{name} {size}" for name, size in sizes.items())
    devices = f"{plan.devices} device{'s' * (plan.devices > 1)}"
    rows = [
        *((f"  {name}", size) for name, size in plan.parts.items() if size),
        ("what trains, together", plan.state),
        ("frozen", plan.frozen),
        ("batch", plan.batch),
        ("temporary", plan.temporary),
        ("results", plan.output),
        ("together", plan.total),
    ]
    collectives = [
        f"  {name:20} {number:6d} times {human_size(size):>12}"
        for name, (number, size) in plan.collectives.items()
    ]
    return [
        f"A step of {plan.batch_size} images on {devices} ({mesh}), "
        f"compiled for {jax.default_backend()}:",
        f"  {plan.flops / 1e9:,.2f} GFLOP a device, "
        f"{plan.flops * plan.devices / plan.batch_size / 1e9:,.3f} an image",
        "Memory of a device:",
        *(f"  {name:22} {human_size(size):>12}" for name, size in rows),
        "Communication of a device:" if collectives else "No communication.",
        *collectives,
    ]


def scaled(plan: Plan, config: ConfigDict, counts: Sequence[int]) -> list[str]:
    """What so many devices would take, by formula: links, efficiency, failures.

    Each device has its share of `plan`'s batch; all axes but `data`, which grows, are the plan's.
    """
    shape = sharding.make_mesh(**config.mesh).shape
    fsdp, tensor = shape[sharding.FSDP], shape.get(sharding.TENSOR, 1)
    groups = f"fsdp {fsdp}" + f", tensor {tensor}" * (tensor > 1)
    found = [""]
    gathered = plan.collectives.get("all-gather", (0, 0.0))[1]
    foreseen = 2 * plan.volume.times * (plan.volume.parted + plan.volume.frozen)
    if gathered > 1.1 * foreseen + 2**20:  # less is of metrics and targets
        found.append(
            f"note: the compiled step gathers {human_size(gathered)}, parameters are "
            f"{human_size(foreseen)} of it: activations move, and the figures below are too good"
        )
    for count in counts:
        if count % (fsdp * tensor):
            each = groups.replace(" ", "=").replace(",=", ", ")
            raise UserError(f"--scale: {count} devices do not divide into groups of {each}")
        moved = scaling.transfers(plan.volume, count // fsdp // tensor, fsdp, tensor)
        images = plan.batch_size * count // plan.devices
        found.append(f"By formula, {images} images on {count} devices ({groups}):")
        found += [
            f"  {one.what:22} {human_size(int(one.received)):>12} received by each, "
            f"in groups of {one.among}"
            for one in moved
        ]
        for machine in scaling.MACHINES:
            expected = scaling.expect(machine, plan.flops, moved)
            found.append(
                f"  {machine.name:8} {scaling.duration(expected.compute)} of products, "
                f"{scaling.duration(expected.links)} of links: efficiency "
                f"{expected.least:.0%} to {expected.most:.0%}"
                f"{' (does not fit)' * (plan.total > machine.memory)}"
            )
        failing = scaling.reliability(count, plan.whole_state)
        found.append(
            f"  a failure each {scaling.duration(failing.between)}; a checkpoint of "
            f"{human_size(plan.whole_state)} ({scaling.duration(failing.save)}) each "
            f"{scaling.duration(failing.young)} (Young), {scaling.duration(failing.daly)} (Daly): "
            f"{failing.goodput:.2%} of the time is work that lasts"
        )
        found.append(
            f"  the slowest of all devices takes {failing.slowest - 1:.1%} longer than one"
        )
    return [*found, *scaling.assumptions()]


def _variants(config: ConfigDict, family: str, devices: int) -> list[tuple[str, ConfigDict]]:
    """The config with and without recomputation and full sharding."""
    found = []
    for remat in (False, True):
        groups = devices // config.mesh.tensor
        for fsdp in (1, groups) if groups > 1 else (1,):
            changed = config.copy_and_resolve_references()
            changed.model.remat = remat
            if remat and "scan" in FAMILIES[family].arguments:
                changed.model.scan = True  # without the loop the CPU's compiler undoes it
            changed.mesh.update({"data": groups // fsdp, "fsdp": fsdp})
            words = [*(["remat"] * remat), *(["fsdp"] * (fsdp > 1))]
            found.append((", ".join(words) or "neither", changed))
    return found


def _found(found: tuple[int, float] | None, devices: int) -> str:
    if found is None:
        return "does not fit, not even the smallest batch"
    return f"{found[0]:6d} ({found[0] // devices} a device), {human_size(found[1])} compiled"
