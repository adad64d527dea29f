"""A model's outputs over a whole dataset, batch by batch, each example once and in order."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from vision_jax import sharding, steps
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import UserError, printable
from vision_jax.logging import say

Outputs = dict[str, np.ndarray]
# make_batches(source, batch_size=, process_index=, process_count=, damage_log=) -> batches
MakeBatches = Callable[..., Iterator[Mapping[str, np.ndarray]]]


class Examples(Protocol):
    """What is asked of a source here."""

    @property
    def name(self) -> str:
        """The name of the data in messages."""

    @property
    def note(self) -> str:
        """What is to be known of the data, or nothing."""

    def __len__(self) -> int: ...


def announce(source: Examples) -> None:
    """Lines on the screen: which data, how much of it, and what is to be known of it."""
    say(f"data: {source.name}, {len(source)} images")
    if source.note:
        say(f"data: {source.note}")


def none_read(source: Examples, damage: DamageLog) -> UserError:
    """The error of a source in which everything is damaged."""
    return UserError(
        f"{source.name}: not one of its {len(source)} images could be read, first {damage.lines[0]}"
    )


def say_damaged(lines: Sequence[str]) -> None:
    """A line on the screen of each image that was left out, with the reason."""
    for line in lines:
        say(f"skipped a damaged image: {printable(line)}")


def make_run_batches(
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    make_batches: MakeBatches,
    *,
    batch_size: int,
    read: Callable[..., Mapping[str, jax.Array]] | None = None,
) -> Callable[..., Iterator[Outputs]]:
    """A function (source, damage log, trainable, frozen, model_state) -> outputs, batch by batch.

    Outputs are those of `outputs_fn`, on the host, of all processes' rows. The batch is rounded up
    to what the devices divide.

    With `read`, a function of (what `outputs_fn` gives, rows i32[n], these rows of the batch), the
    outputs are that function's, which is compiled by itself and applied to as many rows at a time
    as there are devices; `outputs_fn` gets the batch's images alone then.
    """
    devices, processes = jax.device_count(), jax.process_count()
    batch_size = -(-batch_size // devices) * devices
    whole = sharding.replicated(mesh)
    eval_step = steps.make_eval_step(outputs_fn, shardings=whole)
    read_step = read and steps.make_eval_step(read, shardings=whole)
    place = sharding.make_batch_placer(mesh)

    def start(arguments: tuple[Any, ...], batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        seen = batch if read_step is None else {"image": batch["image"]}
        return eval_step(*arguments, place(seen))

    def finish(computed: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> Iterator[Outputs]:
        if read_step is None:
            yield jax.device_get(computed)
            return
        own, at_once = len(batch["image"]), devices // processes  # rows of this process
        for first in range(0, own, at_once):
            places = np.arange(first, first + at_once, dtype=np.int32)
            rows = (own * np.arange(processes, dtype=np.int32)[:, None] + places).reshape(-1)
            some = {name: array[places] for name, array in batch.items() if name != "image"}
            yield jax.device_get(read_step(computed, rows, place(some)))

    def run_batches(source: Examples, damage: DamageLog, *arguments: Any) -> Iterator[Outputs]:
        batches = make_batches(
            source,
            batch_size=batch_size // processes,
            process_index=jax.process_index(),
            process_count=processes,
            damage_log=damage,
        )
        pending = None  # computed while the next batch is decoded
        for batch in batches:
            computed = start(arguments, batch)
            if pending is not None:
                yield from finish(*pending)
            pending = computed, batch
        if pending is not None:
            yield from finish(*pending)

    return run_batches


def make_run_over(
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    make_batches: MakeBatches,
    *,
    batch_size: int,
) -> Callable[..., tuple[Outputs, DamageLog]]:
    """A function (source, trainable, frozen, model_state) -> (outputs, the damaged images).

    Outputs are those of `outputs_fn` for each image that can be read, in the source's order;
    "mask" and "index" must be among them. The batch is rounded up to what the devices divide.
    """
    run_batches = make_run_batches(outputs_fn, mesh, make_batches, batch_size=batch_size)

    def run_over(source: Examples, trainable: Any, frozen: Any, model_state: Any):
        damage = DamageLog()
        outputs = list(run_batches(source, damage, trainable, frozen, model_state))
        whole = {name: np.concatenate([part[name] for part in outputs]) for name in outputs[0]}
        kept = whole["mask"]
        if not kept.any():
            raise none_read(source, damage)
        order = np.argsort(whole["index"][kept], kind="stable")
        return {name: array[kept][order] for name, array in whole.items()}, damage

    return run_over


def distinct_names(class_names: Sequence[str]) -> list[str]:
    """The names, those that occur twice with their index: keys of a dict.

    Examples:
      >>> distinct_names(["crane", "heron", "crane"])
      ['crane (0)', 'heron', 'crane (2)']
    """
    occurrences = Counter(class_names)
    return [
        name if occurrences[name] == 1 else f"{name} ({index})"
        for index, name in enumerate(class_names)
    ]
