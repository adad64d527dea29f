"""Formulas of scaling against sums that are done in another way."""

import math

import numpy as np
import pytest

from vision_jax import scaling
from vision_jax.scaling import Machine, Transfer, Volume

MACHINE = Machine("a", 1e12, 1e9, 8, 100e9, 10e9)


def ring(size, among):
    """Bytes that a member receives, chunk by chunk, until it has all."""
    has, received = 1, 0.0
    while has < among:
        has, received = has + 1, received + size / among
    return received


@pytest.mark.parametrize("among", [2, 3, 8, 64])
def test_a_device_receives_what_a_ring_brings(among):
    assert Transfer("x", 48.0, among, 1, 1).received == pytest.approx(ring(48.0, among))
    assert Transfer("x", 48.0, among, 1, 2).received == pytest.approx(2 * ring(48.0, among))


def test_groups_within_fast_links_pay_for_those_alone():
    within = Transfer("x", 1e9, 8, 1, 1).seconds(MACHINE)
    assert within == pytest.approx(ring(1e9, 8) / 100e9 / scaling.LINKS)
    # Four groups of eight: each device brings an eighth of the three quarters from without.
    beyond = Transfer("x", 1e9, 32, 1, 1).seconds(MACHINE)
    assert beyond - within == pytest.approx(0.75e9 / 8 / 10e9 / scaling.LINKS)
    # Neighbours that are eight apart share no fast link.
    apart = Transfer("x", 1e9, 4, 8, 1).seconds(MACHINE)
    assert apart == pytest.approx(ring(1e9, 4) / 10e9 / scaling.LINKS)


def test_full_sharding_moves_one_and_a_half_times_what_replication_does():
    volume = Volume(parted=1e9, whole=0.0)

    def received(data, fsdp):
        return sum(one.received for one in scaling.transfers(volume, data, fsdp))

    assert received(8, 1) == pytest.approx(2e9 * 7 / 8)
    assert received(1, 8) == pytest.approx(1.5 * received(8, 1))
    assert received(1, 1) == 0
    # Parts alone cross the outer axis.
    assert received(4, 8) == pytest.approx(3e9 * 7 / 8 + 2e9 / 8 * 3 / 4)


def test_efficiency_is_bounded_by_no_overlap_and_full_overlap():
    moved = scaling.transfers(Volume(1e9, 1e6), 1, 8)
    found = scaling.expect(MACHINE, 1e12, moved)
    assert found.compute == pytest.approx(1 / scaling.UTILIZATION)
    assert 0 < found.least < found.most <= 1
    slow = scaling.expect(MACHINE, 1e9, moved)
    assert slow.most == pytest.approx(slow.compute / slow.links)
    assert slow.most < 1


@pytest.mark.parametrize(("save", "between"), [(10, 1e5), (60, 3600), (300, 1800)])
def test_dalys_interval_is_the_best_one(save, between):
    """Against a search of the formula of the time that all takes."""
    intervals = np.geomspace(1, 20 * between, 20001)
    worked = [scaling.goodput(x, save, between, 60.0) for x in intervals]
    best = intervals[int(np.argmax(worked))]
    assert scaling.daly(save, between) == pytest.approx(best, rel=0.02)
    assert scaling.young(save, between) == pytest.approx(math.sqrt(2 * save * between))
    least = scaling.goodput(scaling.daly(save, between), save, between, 60.0)
    assert least >= max(worked) * (1 - 1e-4)


def test_saves_longer_than_failures_are_apart():
    assert scaling.daly(100, 40) == 40


def test_drawn_failures_cost_what_the_formula_says(rng):
    for numbers in [(600, 30, 3600, 120), (50, 5, 100, 20)]:
        drawn = scaling.simulate(*numbers, segments=20000, seed=int(rng.integers(2**31)))
        assert drawn == pytest.approx(scaling.goodput(*numbers), rel=0.04)


def test_the_slowest_of_many_is_what_drawing_all_gives(rng):
    for devices in (1, 8, 256):
        all_of_them = 1 + 0.02 * rng.standard_normal((4000, devices)).max(axis=1)
        found = scaling.stragglers(devices, 0.02, seed=int(rng.integers(2**31)))
        assert found == pytest.approx(all_of_them.mean(), abs=0.002)


def test_failures_of_more_devices_come_more_often():
    few, many = scaling.reliability(8, 1e10), scaling.reliability(1024, 1e10)
    assert few.between == pytest.approx(128 * many.between)
    assert many.daly < few.daly
    assert many.goodput < few.goodput < 1
    assert 1 < few.slowest < many.slowest < 1.1


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.0123, "0.0123 s"), (90, "90 s"), (300, "5.0 min"), (9000, "2.5 h")]
)
def test_durations_in_words(seconds, words):
    assert scaling.duration(seconds) == words


def test_the_assumptions_are_said():
    said = "\n".join(scaling.assumptions())
    for machine in scaling.MACHINES:
        assert machine.name in said
    for part in ("40%", "70%", "50,000 hours", "300 s"):
        assert part in said
