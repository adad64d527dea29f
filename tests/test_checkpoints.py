import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs  # noqa: F401  (sets how orbax cuts arrays)

from vision_jax import sharding, steps
from vision_jax.checkpoints import Checkpoints, last_complete_step, restore_state
from vision_jax.errors import UserError

RNG = np.random.default_rng()
KERNEL = RNG.standard_normal((64, 8)).astype(np.float32)


def numbers():
    return iter(grain.MapDataset.range(100).shuffle(seed=1).to_iter_dataset())


def state_at(step: int, mesh=None):
    mesh = mesh or sharding.make_mesh(8, 1)
    place = sharding.NamedSharding(mesh, sharding.PartitionSpec("fsdp"))
    return {
        "kernel": sharding.place(KERNEL * step, place),
        "step": sharding.place(np.int32(step), sharding.replicated(mesh)),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Steps 1 to 4, the best of them step 2; the data has gone on by as many numbers."""
    workdir = tmp_path_factory.mktemp("saved")
    data = numbers()
    with closing(Checkpoints(workdir, "top1")) as checkpoints:
        checkpoints.save_frozen({"a/kernel": state_at(7)["kernel"]})
        checkpoints.save_frozen({"a/kernel": state_at(5)["kernel"]})  # of another start
        for step, top1 in ((1, 0.1), (2, 0.9), (3, None), (4, 0.5)):
            next(data)
            metrics = None if top1 is None else {"top1": top1}
            checkpoints.save(step, state_at(step), data, metrics)
    return workdir


def test_the_last_and_the_best_are_kept(saved):
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["2", "4"]
    assert last_complete_step(saved) == 4
    with closing(Checkpoints(saved, "top1", read_only=True)) as checkpoints:  # another process
        assert checkpoints.last_step() == 4
        assert checkpoints.best_step() == 2


def test_a_workdir_without_checkpoints(tmp_path):
    assert last_complete_step(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4)])
def test_a_state_comes_back_on_any_mesh(saved, shape):
    target = abstract(state_at(0, sharding.make_mesh(*shape)))
    data = numbers()
    with closing(Checkpoints(saved, "top1", read_only=True)) as checkpoints:
        state = checkpoints.restore(2, target)
        frozen = checkpoints.restore_frozen({"a/kernel": target["kernel"]})
        checkpoints.restore_data(2, data)
    np.testing.assert_array_equal(state["kernel"], KERNEL * 2)
    assert state["kernel"].sharding == target["kernel"].sharding
    np.testing.assert_array_equal(frozen["a/kernel"], KERNEL * 5)
    expected = numbers()
    assert next(data) == [next(expected) for _ in range(3)][2]


def test_an_older_state_without_averaged_statistics_is_restored_with_the_last(tmp_path):
    """And a newer one with its own."""
    statistics = {"norm": {"mean": jnp.asarray([3.0, -1.0]), "count": jnp.int32(5)}}
    newer = steps.make_state({"w": jnp.ones(2)}, statistics, tx=optax.sgd(0.1), ema=True)
    newer = replace(newer, ema={path: leaf * 2 for path, leaf in newer.ema.items()})
    older = replace(newer, ema={"w": newer.ema["w"]})
    with closing(Checkpoints(tmp_path, "top1")) as checkpoints:
        for step, state in ((1, older), (2, newer)):
            checkpoints.save(step, state, numbers(), {"top1": 2.0 - step})
    with closing(Checkpoints(tmp_path, "top1", read_only=True)) as checkpoints:
        first, second = (restore_state(checkpoints, step, abstract(newer)) for step in (1, 2))
    np.testing.assert_array_equal(first.ema["w"], [2.0, 2.0])
    np.testing.assert_array_equal(first.ema["norm/mean"], [3.0, -1.0])
    np.testing.assert_array_equal(first.ema["norm/count"], 5)
    np.testing.assert_array_equal(second.ema["norm/mean"], [6.0, -2.0])
    assert jax.tree.structure(first) == jax.tree.structure(second) == jax.tree.structure(newer)


def test_reading_leaves_the_directory_alone(saved, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(saved, workdir)
    half = workdir / "checkpoints" / "5.orbax-checkpoint-tmp"
    half.mkdir()
    with closing(Checkpoints(workdir, "top1", read_only=True)) as checkpoints:
        assert checkpoints.last_step() == 4
    assert half.is_dir()
    with closing(Checkpoints(workdir, "top1")) as checkpoints:
        assert checkpoints.last_step() == 4
        checkpoints.save(5, state_at(5), numbers(), None)  # has to wait for the removal
    assert not half.exists()


@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
def test_damage_is_one_line(saved, tmp_path, damage):
    workdir = tmp_path / "copy"
    shutil.copytree(saved, workdir)
    for path in (workdir / "checkpoints" / "4").rglob("*"):
        if path.is_file() and path.name != "commit_success.txt":
            if damage == "missing":
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[:20] if damage == "cut" else b"")
    for restore in (
        lambda checkpoints: checkpoints.restore(4, abstract(state_at(0))),
        lambda checkpoints: checkpoints.restore_data(4, numbers()),
    ):
        with pytest.raises(UserError, match=r"checkpoint \S+ is damaged") as caught:
            restore(Checkpoints(workdir, "top1", read_only=True))
        assert "\n" not in str(caught.value)


def test_a_state_of_other_shapes_is_one_line(saved):
    target = abstract(state_at(0))
    target["kernel"] = jax.ShapeDtypeStruct((64, 9), np.float32, sharding=target["kernel"].sharding)
    with (
        closing(Checkpoints(saved, "top1", read_only=True)) as checkpoints,
        pytest.raises(UserError, match="of another run"),
    ):
        checkpoints.restore(4, target)


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*Not a directory"):
        Checkpoints(tmp_path / "file", "top1")
