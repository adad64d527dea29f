from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vision_jax import sharding
from vision_jax.errors import UserError
from vision_jax.trees.low_rank import LowRank


def shapes(**by_name):
    return {
        name.replace("__", "/"): jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in by_name.items()
    }


def low_rank(rows, columns):
    arrays = shapes(base=(rows, columns), a=(rows, 2), b=(2, columns))
    return LowRank(**arrays)


@pytest.mark.parametrize(
    ("asked", "made"),
    [((-1, 1), (8, 1)), ((1, -1), (1, 8)), ((2, 4), (2, 4)), ((-1, 2), (4, 2)), ((4, -1), (4, 2))],
)
def test_mesh(asked, made):
    mesh = sharding.make_mesh(*asked)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == made


@pytest.mark.parametrize(
    "asked", [(3, 1), (-1, 3), (-1, -1), (0, -1), (-1, 0), (8, 8), (-2, -4), (-8, 1), (-2, -1)]
)
def test_a_mesh_that_does_not_fit_is_refused(asked):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        sharding.make_mesh(*asked)


@dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "gpu"
    device_kind: str = "fake"


@pytest.mark.parametrize("by", ["slice", "process"])
@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (4, 1, 2)])
def test_only_data_goes_over_slices(by, sizes, rng):
    """8 devices of two slices, found in any order; a process has 2 of a slice's, or all."""
    slices = {d: d % 2 for d in range(8)}
    devices = [
        Device(d, d % 4, slices[d]) if by == "slice" else Device(d, slices[d]) for d in range(8)
    ]
    made = sharding.hybrid_devices([devices[d] for d in rng.permutation(8)], sizes, 2)
    assert made.shape == sizes
    assert sorted(device.id for device in made.flat) == list(range(8))
    half = sizes[0] // 2
    for rows in (made[:half], made[half:]):
        assert len({slices[device.id] for device in rows.flat}) == 1


def test_slices_that_are_not_there_are_refused():
    with pytest.raises(UserError, match=r"mesh.slices=2: there are 1 processes"):
        sharding.make_mesh(8, 1, slices=2)
    eight = [Device(d, d // 4, d // 4) for d in range(8)]
    with pytest.raises(UserError, match=r"there are 2 slices, and mesh.data=1, which"):
        sharding.hybrid_devices(eight, (1, 8), 2)
    uneven = [Device(d, d // 4, int(d < 3)) for d in range(8)]
    with pytest.raises(UserError, match=r"mesh.slices=2: "):
        sharding.hybrid_devices(uneven, (4, 2), 2)


def test_the_default_splits_the_largest_axis_that_divides():
    mesh = sharding.make_mesh(2, 4)
    made = sharding.parameter_shardings(
        shapes(
            wide=(64, 512),
            tall=(512, 64),
            odd=(511, 128),
            none=(511, 129),
            small=(64, 64),
        )
        | {"fc": {"kernel": low_rank(128, 256)}},
        mesh,
    )
    assert {name: made[name].spec for name in made} == {
        "wide": PartitionSpec(None, "fsdp"),
        "tall": PartitionSpec("fsdp", None),
        "odd": PartitionSpec(None, "fsdp"),
        "none": PartitionSpec(),
        "small": PartitionSpec(),
        "fc/kernel/base": PartitionSpec(None, "fsdp"),
        "fc/kernel/a": PartitionSpec(),
        "fc/kernel/b": PartitionSpec(),
    }
    whole = sharding.parameter_shardings(shapes(wide=(64, 512)), sharding.make_mesh(8, 1))
    assert whole["wide"].is_fully_replicated


def test_rules_come_first_and_name_the_kernel_of_an_adapter():
    mesh = sharding.make_mesh(2, 4)
    made = sharding.parameter_shardings(
        {"fc": {"kernel": low_rank(8, 512), **shapes(bias=(512,))}},
        mesh,
        [(r"fc/kernel", ("fsdp",)), (r"fc/.*", (None,))],
    )
    assert made["fc/kernel/base"].spec == PartitionSpec("fsdp")
    assert made["fc/kernel/a"].spec == PartitionSpec(None)
    assert made["fc/bias"].spec == PartitionSpec(None)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ((r"fd/kernel", ("fsdp",)), "matches no parameter; the nearest path is 'fc/kernel'"),
        ((r"fc/kernel", ("model",)), "cannot be split"),
        ((r"fc/kernel", ("fsdp", None, None)), "cannot be split"),
        ((r"fc/kernel", (None, "fsdp")), "cannot be split"),
        ((r"fc/kernel", "fsdp"), "cannot be split"),
        ((r"fc/kernel", ("fsdp", "fsdp")), "cannot be split"),
        ((r"fc/kernel", (["fsdp"],)), "cannot be split"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rule, message):
    with pytest.raises(UserError, match=message):
        sharding.parameter_shardings(shapes(fc__kernel=(8, 511)), sharding.make_mesh(2, 4), [rule])


def test_optimizer_state_is_laid_out_like_its_parameter():
    mesh = sharding.make_mesh(1, 8)
    parameters = sharding.parameter_shardings(shapes(a__kernel=(512, 64), a__bias=(64,)), mesh)
    abstract = {
        "mu": shapes(a__kernel=(512, 64), a__bias=(64,)),
        "count": jax.ShapeDtypeStruct((), np.int32),
        "factored": {"a/kernel": jax.ShapeDtypeStruct((), np.float32)},
    }
    made = sharding.state_shardings(abstract, parameters, mesh)
    assert made["mu"]["a/kernel"].spec == PartitionSpec("fsdp", None)
    assert made["mu"]["a/bias"].is_fully_replicated
    assert made["count"].is_fully_replicated
    assert made["factored"]["a/kernel"].is_fully_replicated


def test_arrays_and_batches_arrive_where_they_should(rng):
    mesh = sharding.make_mesh(2, 4)
    array = rng.standard_normal((512, 64)).astype(np.float32)
    placed = sharding.place(array, sharding.parameter_shardings(shapes(a=array.shape), mesh)["a"])
    np.testing.assert_array_equal(placed, array)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(128, 64)}

    images = np.arange(16 * 3, dtype=np.uint8).reshape(16, 3)
    batch = sharding.make_batch_placer(mesh)({"image": images})
    np.testing.assert_array_equal(batch["image"], images)
    assert {shard.data.shape for shard in batch["image"].addressable_shards} == {(2, 3)}
