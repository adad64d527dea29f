"""What a step would take on machines that are not here: bytes on their links, time, and failures.

Arithmetic alone; what it starts from (bytes of parameters, FLOPs) `plan` takes from the compiled
step. A mesh's axes lie in the order (data, fsdp, tensor): neighbours along the last are neighbours
on the machine, so that the links that are fast carry what is moved most.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

# What is assumed; docs/scaling.md has the sources, and every table says it.
UTILIZATION = 0.4  # of a device's peak, by the products of a step that waits for nothing
LINKS = 0.7  # of a link's rate, by a collective
DEVICE_HOURS = 50_000  # between failures of one device: 419 in 54 days of 16,384 H100
RESTART = 300.0  # seconds from a failure to the next step
SAVE_RATE = 1e9  # bytes/s of a whole checkpoint to the store, which takes a second at least
JITTER = 0.02  # standard deviation of a device's time for a step, as a share of it


@dataclass(frozen=True)
class Machine:
    """One kind of device and what joins many.

    Attributes:
      name: of the device.
      flops: a second, products in bfloat16.
      memory: bytes of a device.
      joined: how many the fast links join.
      fast: bytes/s that a device receives from those.
      slow: bytes/s that a device receives from all others: its share of the network.
    """

    name: str
    flops: float
    memory: float
    joined: int
    fast: float
    slow: float


MACHINES = (
    Machine("H100", 989e12, 80e9, 8, 450e9, 50e9),
    Machine("TPU v5e", 197e12, 16e9, 256, 200e9, 3.125e9),
    Machine("TPU v6e", 918e12, 32e9, 256, 400e9, 12.5e9),
)


@dataclass(frozen=True)
class Volume:
    """Bytes that a step moves, of whole arrays; of what `tensor` splits, of a device's part.

    Attributes:
      parted: what trains and is split over `fsdp`.
      whole: what trains and is not.
      frozen: what does not train and is split over `fsdp`.
      times: micro-batches of an update: parameters are gathered for each.
      turned: fused kernels that are split over `tensor` (see trees/parted.py).
      summed: activations that are summed over `tensor`, in all of an update, as compiled.
    """

    parted: float = 0.0
    whole: float = 0.0
    frozen: float = 0.0
    times: int = 1
    turned: float = 0.0
    summed: float = 0.0


@dataclass(frozen=True)
class Transfer:
    """One kind of collective of a step.

    Attributes:
      what: it is for.
      size: bytes of the array that is gathered or reduced, in a group of `among` devices.
      among: devices of a group.
      stride: distance of neighbours of a group.
      passes: 1 for a gather or a reduction that scatters, 2 for a reduction that all have.
    """

    what: str
    size: float
    among: int
    stride: int
    passes: float

    @property
    def received(self) -> float:
        """Bytes that a device receives by a ring's algorithm: the least that is possible."""
        return self.passes * self.size * (self.among - 1) / self.among

    def seconds(self, machine: Machine) -> float:
        """Time by rings within what fast links join, then between those groups.

        Each device of a group brings its part of what comes from without, and they share it.
        """
        near = max(1, min(self.among, machine.joined // self.stride))
        far = math.ceil(self.among / near)
        within = self.size * (near - 1) / near / machine.fast
        between = self.size * (far - 1) / far / near / machine.slow
        return self.passes * (within + between) / LINKS


def transfers(volume: Volume, data: int, fsdp: int, tensor: int = 1) -> list[Transfer]:
    """The collectives of an update on a (data, fsdp, tensor) mesh.

    A parameter that is split over `fsdp` is gathered in the forward pass and again in the backward
    pass, and its gradient is reduced and scattered; then parts are reduced over `data`. Others'
    gradients are reduced over all devices that have other images. A fused kernel is turned as often
    as it is gathered, and its gradient once.
    """
    both, times = volume.parted + volume.frozen, volume.times
    turns = (3 if fsdp > 1 else 2) * times
    found = [
        Transfer("gathers of parameters", both, fsdp, tensor, 2 * times),
        Transfer("gradients over fsdp", volume.parted, fsdp, tensor, times),
        Transfer("gradients over data", volume.parted / fsdp, data, tensor * fsdp, 2 * times),
        Transfer("gradients over all", volume.whole, data * fsdp, tensor, 2 * times),
        Transfer("fused kernels turned", volume.turned, tensor, 1, turns),
        Transfer("activations summed", volume.summed, tensor, 1, 2),
    ]
    return [one for one in found if one.among > 1 and one.size > 0]


@dataclass(frozen=True)
class Expected:
    """What a step would take.

    Attributes:
      compute: seconds of its products at UTILIZATION of the peak.
      links: seconds of its collectives.
    """

    compute: float
    links: float

    @property
    def least(self) -> float:
        """The efficiency where nothing is computed while something is moved."""
        return self.compute / (self.compute + self.links)

    @property
    def most(self) -> float:
        """The efficiency where all is moved while something is computed, as far as that goes."""
        return self.compute / max(self.compute, self.links)


def expect(machine: Machine, flops: float, moved: Sequence[Transfer]) -> Expected:
    """The time of a step of `flops` a device that moves `moved`."""
    compute = flops / (machine.flops * UTILIZATION)
    return Expected(compute, sum(one.seconds(machine) for one in moved))


# Failures ---------------------------------------------------------------------------------------


def young(save: float, between: float) -> float:
    """Seconds of work between checkpoints that lose least (Young 1974): √(2 · save · between).

    Args:
      save: seconds that a checkpoint takes from the work.
      between: mean seconds between failures.
    """
    return math.sqrt(2 * save * between)


def daly(save: float, between: float) -> float:
    """The same by Daly (2006, doi:10.1016/j.future.2004.11.016, eq. 37), for rare saves too."""
    if save >= 2 * between:
        return between
    ratio = save / (2 * between)
    return math.sqrt(2 * save * between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def goodput(interval: float, save: float, between: float, restart: float) -> float:
    """The share of time that is work which lasts, of exponential failures (Daly 2006, eq. 20).

    A failure takes all since the last checkpoint, and `restart`, in which others may happen.
    """
    taken = between * math.exp(restart / between) * math.expm1((interval + save) / between)
    return interval / taken


def simulate(
    interval: float, save: float, between: float, restart: float, *, segments: int, seed: int = 0
) -> float:
    """The same by drawing failures: `segments` intervals of work, each repeated until it is saved.

    What `goodput` has as a formula; here a failure may be drawn from what a machine was seen to do.
    """
    rng = np.random.default_rng(seed)
    clock = 0.0
    left = rng.exponential(between)  # to the next failure
    for _ in range(segments):
        need = interval + save
        while left < need:
            clock += left
            left = rng.exponential(between)
            while left < restart:
                clock += left
                left = rng.exponential(between)
            clock += restart
            left -= restart
        clock += need
        left -= need
    return segments * interval / clock


def stragglers(devices: int, jitter: float = JITTER, *, draws: int = 4000, seed: int = 0) -> float:
    """The mean time of a step that waits for the slowest of all devices, of one device's time.

    Times are normal around 1. The largest of n is drawn at once: its distribution function is that
    of one to the power of n.
    """
    normal = NormalDist()
    levels = np.random.default_rng(seed).uniform(size=draws) ** (1 / devices)
    levels = np.minimum(levels, 1 - 1e-15)
    return 1 + jitter * float(np.mean([normal.inv_cdf(level) for level in levels]))


@dataclass(frozen=True)
class Reliability:
    """Attributes:
    between: mean seconds between failures of any device.
    save: seconds of a whole checkpoint.
    young, daly: seconds between checkpoints, by both formulas.
    goodput: the share of time that is work which lasts, with Daly's interval, simulated.
    slowest: the time of a step that waits for the slowest device, of one device's.
    """

    between: float
    save: float
    young: float
    daly: float
    goodput: float
    slowest: float


def reliability(devices: int, state: float) -> Reliability:
    """What failures and stragglers take, of so many devices and a state of so many bytes."""
    between, save = DEVICE_HOURS * 3600 / devices, max(1.0, state / SAVE_RATE)
    interval = daly(save, between)
    worked = simulate(interval, save, between, RESTART, segments=4000)
    return Reliability(between, save, young(save, between), interval, worked, stragglers(devices))


# Words ------------------------------------------------------------------------------------------


def assumptions() -> list[str]:
    """Everything that the figures rest on."""
    return [
        f"Assumed: products at {UTILIZATION:.0%} of the peak in bfloat16, links at {LINKS:.0%} of "
        "their rate, rings; the first efficiency moves nothing while it computes, the second "
        "all that it can.",
        *(
            f"  {m.name}: {m.flops / 1e12:.0f} TFLOP/s, {m.memory / 1e9:.0f} GB; {m.joined} "
            f"devices joined at {m.fast / 1e9:g} GB/s, beyond at {m.slow / 1e9:g} GB/s each"
            for m in MACHINES
        ),
        f"  failures: one in {DEVICE_HOURS:,} hours of a device, {RESTART:g} s to start again, "
        f"checkpoints at {SAVE_RATE / 1e9:g} GB/s; steps vary by {JITTER:.0%}",
    ]


def duration(seconds: float) -> str:
    """ "3.2 h", "14 min", "38 s"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"
