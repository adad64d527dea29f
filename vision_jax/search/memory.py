"""How many trials a device has room for side by side: the step is compiled, and none is tried.

compiled step of T trials --bytes--> fits the device's free memory? --no--> fewer, in proportion
"""

from typing import Any

import jax

from vision_jax import machine
from vision_jax.search.search import Search

# Of the free memory: evaluations, compilation and fragments take what is left; a CPU's is shared.
SHARE = {"cpu": 0.5}
SHARE_OF_OTHERS = 0.85


def free_bytes() -> int | None:
    """Bytes that are free on a device now, None where nothing says so; a CPU's in equal parts."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        free = machine.available_bytes()
        return None if free is None else free // jax.local_device_count()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))


def room() -> int | None:
    """The bytes of `free_bytes` that a step may take."""
    free = free_bytes()
    share = SHARE.get(jax.local_devices()[0].platform, SHARE_OF_OTHERS)
    return None if free is None else int(share * free)


def step_bytes(compiled: Any) -> int:
    """Bytes of a device that a compiled step takes: arrays, what lives within it, and results."""
    found = compiled.memory_analysis()
    own = found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes
    return int(own - found.alias_size_in_bytes)


def fitting(search: Search, most_bytes: int | None) -> int:
    """The most trials of a unit whose step takes at most so many bytes; at least 1.

    The program of each group there is by now is compiled for as many trials as it has, and for
    fewer where these do not fit. None is no bound.
    """
    count = search.settings.together
    if most_bytes is None:
        return count
    for group in search.groups:
        while count > 1:
            own = min(count, len(group.trials))
            taken = step_bytes(search.stack(group).lower(own).compile())
            if taken <= most_bytes or own == 1:
                break
            count = max(1, min(own - 1, own * most_bytes // taken))
    return count
