"""What memory of a device a step takes, said before it runs; what to do where it is not enough."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from vision_jax import machine
from vision_jax.errors import UserError
from vision_jax.logging import human_size

# How XLA says what it asked for: bytes, or with a unit.
_ASKED = re.compile(
    r"(?:allocat\w*|requested|Used)\s+(?P<size>[\d.]+)\s*(?P<unit>[KMGT]?)(?:i?B|bytes|\b)"
)
SMALLER = "smaller images or a smaller batch"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def device_bytes(tree: Any) -> int:
    """Of the largest part that a device holds, of arrays or ShapeDtypeStructs with shardings."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


def device_limit() -> int | None:
    """Bytes that this process may have of its first device: what is free, on a CPU."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        free = machine.available_bytes()
        return free // jax.local_device_count() if free else None
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def reserved(compiled: Any, state: Any, fixed: Any, batch: Any) -> str:
    """One line: the bytes that a compiled step takes of each device, by what they are for.

    Args:
      compiled: of `machine.jit`, a jax.stages.Compiled.
      state, fixed, batch: what it is called with: a steps.TrainState, frozen arrays, a batch.
    """
    analysis = compiled.memory_analysis()
    parts = {
        "trainable": device_bytes(state.trainable),
        "optimizer": device_bytes(state.opt_state),
        "moving average": device_bytes(state.ema),
        "frozen": device_bytes(fixed),
        "batch": device_bytes(batch),
        "temporaries": analysis.temp_size_in_bytes if analysis is not None else 0,
    }
    total, limit = sum(parts.values()), device_limit()
    each = ", ".join(f"{name} {human_size(size)}" for name, size in parts.items() if size)
    of = "" if limit is None else f" of {human_size(limit)} that are there"
    return f"memory of a device: {human_size(total)}{of}: {each}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had not the memory for something."""
    return isinstance(error, MemoryError) or is_of_device(error)


def is_of_device(error: BaseException) -> bool:
    """Whether XLA had not the memory; CUDA's driver says so of a program that it can't load."""
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(
        re.search("RESOURCE_EXHAUSTED|CUDA_ERROR_OUT_OF_MEMORY", str(error))
    )


@contextmanager
def explained(values: Mapping[str, Any], smaller: str = SMALLER) -> Iterator[None]:
    """Answers XLA's lack of memory inside by one line; see `advise`.

    Raises:
      UserError: in place of it.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_of_device(error):
            raise
        raise UserError(advise(error, values, smaller)) from error


def advise(error: BaseException, values: Mapping[str, Any], smaller: str = SMALLER) -> str:
    """One line on an error that `is_out_of_memory`: how much was asked for, and what needs less.

    Args:
      error: with a text of XLA's, of any length.
      values: fields of the config by name; those that it has not, or that say so already, are not
        advised.
      smaller: what else needs less.
    """
    found = _ASKED.search(str(error))
    asked = ""
    if found:
        asked = f": {human_size(float(found['size']) * _UNITS[found['unit']])} in one piece"
    ways = []
    if (batch := values.get("batch_size", 1)) > 1:
        ways.append(f"batch_size={batch // 2}")
        if "optim.accumulate" in values:
            ways.append(f"optim.accumulate={2 * values['optim.accumulate']} (the same update)")
    if values.get("model.remat") is False:
        ways.append("model.remat=True")
    if values.get("model.dtype") == "float32":
        ways.append("model.dtype=bfloat16")
    if values.get("mesh.fsdp") == 1 and jax.device_count() > 1:
        ways.append("mesh.fsdp=-1 with mesh.data=1")
    advice = ", ".join(f"--config.{way}" for way in ways) or smaller
    plan = "; `vision_jax plan --config=... --memory=GIB` finds the largest batch" if ways else ""
    return f"not enough memory{asked}: try {advice}{plan}"
