"""A copy that differs in one bit is found, and whose it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vision_jax import replicas, sharding


def put(mesh, array, spec, spoil=None):
    """The array on the mesh; the copy of device `spoil` differs in one bit."""
    placed = NamedSharding(mesh, spec)
    parts = []
    for device, index in placed.addressable_devices_indices_map(array.shape).items():
        part = np.array(array[index])
        if device.id == spoil:
            view = part.reshape(-1).view(np.uint8)
            view[-1] ^= 1
        parts.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(array.shape, placed, parts)


def tree(mesh, rng, spoil=None, name="kernel"):
    arrays = {
        "bias": (rng.standard_normal(3, np.float32), PartitionSpec()),
        "kernel": (rng.standard_normal((8, 4)).astype(jnp.bfloat16), PartitionSpec("fsdp")),
        "seen": (rng.random((5, 2)) < 0.5, PartitionSpec()),
        "sum": (rng.standard_normal((4, 8), np.float32), PartitionSpec(None, "fsdp")),
        "step": (np.int32(3), PartitionSpec()),
    }
    return {
        key: put(mesh, np.asarray(array), spec, spoil if key == name else None)
        for key, (array, spec) in arrays.items()
    }


@pytest.mark.parametrize("name", ["bias", "kernel", "seen", "sum", "step"])
def test_one_bit_of_one_copy_is_found(rng, name):
    mesh = sharding.make_mesh(4, 2)
    draws = rng.integers(2**31)
    same = tree(mesh, np.random.default_rng(draws))
    compare = replicas.make_compare(same)
    assert replicas.find_difference(same, compare(same)) is None
    other = tree(mesh, np.random.default_rng(draws), int(rng.integers(8)), name)
    found = replicas.find_difference(other, compare(other))
    assert found == (name, [0])  # the one process that there is


def test_arrays_that_are_split_whole_have_nothing_to_compare(rng):
    mesh = sharding.make_mesh(1, 8)
    array = rng.standard_normal((8, 3), np.float32)
    split = {"kernel": put(mesh, array, PartitionSpec("fsdp"), spoil=3)}
    assert replicas.find_difference(split, replicas.make_compare(split)(split)) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.uint8, np.int32, jnp.int4])
def test_each_bit_counts(rng, dtype):
    array = jnp.asarray(rng.integers(0, 7, 257), dtype)
    total = int(replicas.bit_sum(array))
    assert int(replicas.bit_sum(array.at[int(rng.integers(257))].add(1))) != total
    turned = array.at[jnp.array([0, 1])].set(array[jnp.array([1, 0])])
    changed = int(replicas.bit_sum(turned)) != total
    assert changed == bool(array[0] != array[1])  # twice the difference of their bits


def test_what_differs_is_the_minority(rng):
    """Of copies on three processes, in an array that stands for the gathered sums."""

    class Device:
        def __init__(self, process):
            self.process_index = process

    class Mesh:
        devices = np.array([Device(0), Device(1), Device(2)]).reshape(3, 1)
        axis_names = ("data", "fsdp")

    class Leaf:
        class sharding:
            mesh, spec = Mesh, PartitionSpec()

    sums = np.full((3, 1), 7, np.uint32)
    sums[1] = 8
    assert replicas.find_difference({"x": Leaf}, sums) == ("x", [1])
    assert replicas.find_difference({"x": Leaf}, np.arange(3)[:, None]) == ("x", [0, 1, 2])


def test_a_batch_that_is_not_finite_everywhere_is_nobodys():
    mesh = sharding.make_mesh(8, 1)
    rows = np.zeros((8, 2), np.float32)
    rows[3] = np.nan
    batch = {"teacher": jax.device_put(rows, sharding.batch_sharding(mesh))}
    assert replicas.find_not_finite(batch) is None  # one process
