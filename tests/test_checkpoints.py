import re
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs  # noqa: F401  (sets how orbax cuts arrays)

from vision_jax import checkpoints as checkpoints_module
from vision_jax import sharding, steps
from vision_jax.checkpoints import (
    Checkpoints,
    best_step,
    last_complete_step,
    restore,
    restore_frozen,
    restore_newest,
    restore_state,
    set_aside,
)
from vision_jax.checksums import read_checksums, verify_checksums
from vision_jax.errors import UserError

KERNEL = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)


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
    """Steps 1 to 4, the best of them step 2."""
    workdir = tmp_path_factory.mktemp("saved")
    with closing(Checkpoints(workdir, "top1")) as checkpoints:
        checkpoints.save_frozen({"a/kernel": state_at(7)["kernel"]})
        checkpoints.save_frozen({"a/kernel": state_at(5)["kernel"]})  # of another start
        for step, top1 in ((1, 0.1), (2, 0.9), (3, None), (4, 0.5)):
            metrics = None if top1 is None else {"top1": top1}
            checkpoints.save(step, state_at(step), metrics)
    return workdir


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_the_last_and_the_best_are_kept(saved):
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["2", "4"]
    assert last_complete_step(saved) == 4
    assert best_step(saved, "top1") == 2


def test_a_workdir_without_checkpoints(tmp_path):
    assert last_complete_step(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        restore_newest(tmp_path / "none", abstract(state_at(0)))


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4)])
def test_a_state_comes_back_on_any_mesh(saved, shape):
    target = abstract(state_at(0, sharding.make_mesh(*shape)))
    state, notes = restore(saved, 2, target)
    frozen, of_frozen = restore_frozen(saved, {"a/kernel": target["kernel"]})
    np.testing.assert_array_equal(state["kernel"], KERNEL * 2)
    assert state["kernel"].sharding == target["kernel"].sharding
    np.testing.assert_array_equal(frozen["a/kernel"], KERNEL * 5)
    assert notes == of_frozen == []


def test_reading_leaves_the_directory_alone(copied):
    half = copied / "checkpoints" / "5.orbax-checkpoint-tmp"
    half.mkdir()
    assert restore_newest(copied, abstract(state_at(0)))[0] == 4
    assert half.is_dir()
    with closing(Checkpoints(copied, "top1")) as checkpoints:
        checkpoints.save(5, state_at(5), None)  # has to wait for the removal
    assert not half.exists()
    assert last_complete_step(copied) == 5


def test_every_file_has_a_checksum(saved):
    for folder in (saved / "frozen", saved / "checkpoints" / "2", saved / "checkpoints" / "4"):
        names = {str(path.relative_to(folder)) for path in files_of(folder)}
        assert set(read_checksums(folder)) == names - {"checksums.json"}
        assert verify_checksums(folder)


def test_no_flipped_bit_is_silent(copied, rng):
    """One of each file; of the larger ones, which hold the values, four more."""
    target = abstract(state_at(0))
    readers = {
        "frozen": lambda: restore_frozen(copied, {"a/kernel": target["kernel"]}),
        "checkpoints/4": lambda: restore(copied, 4, target),
    }
    for folder, read in readers.items():
        for path in files_of(copied / folder):
            size = 8 * path.stat().st_size
            for bit in rng.integers(size, size=4 if size > 8000 else 1):
                flip(path, int(bit))
                with pytest.raises(UserError, match=r"checkpoint \S+ is damaged") as caught:
                    read()
                assert "\n" not in str(caught.value)
                flip(path, int(bit))
    assert restore_newest(copied, target)[0] == 4


def test_an_older_version_had_no_checksums(copied):
    for path in copied.rglob("checksums.json"):
        path.unlink()
    step, state, notes = restore_newest(copied, abstract(state_at(0)))
    assert step == 4
    np.testing.assert_array_equal(state["kernel"], KERNEL * 4)
    assert re.search(r"checkpoints/4 is of an older version, without checksums", notes[0])


@pytest.mark.parametrize("damage", ["cut", "missing", "empty", "no files"])
def test_the_newest_is_damaged_and_an_older_one_is_whole(copied, damage):
    newest = copied / "checkpoints" / "4"
    for path in files_of(newest):
        if damage in ("missing", "no files") and path.name != "checksums.json":
            path.unlink()
        elif damage in ("cut", "empty"):
            path.write_bytes(path.read_bytes()[:20] if damage == "cut" else b"")
    if damage == "no files":
        shutil.rmtree(newest)
        newest.mkdir()
    with pytest.raises(UserError, match=r"checkpoint \S+ is damaged") as caught:
        restore(copied, 4, abstract(state_at(0)))
    assert "\n" not in str(caught.value)
    step, state, notes = restore_newest(copied, abstract(state_at(0)))
    assert step == 2
    np.testing.assert_array_equal(state["kernel"], KERNEL * 2)
    assert re.search(r"checkpoints/4 is damaged", notes[0])
    assert notes[1] == "step 2 is whole and is taken instead"
    # Training moves it out of the way, whole or not, and can save that step again.
    assert newest.is_dir()
    kept = [path.read_bytes() for path in files_of(newest)]
    assert str(copied / "damaged" / "4") in set_aside(copied, 2)[0]
    assert [path.read_bytes() for path in files_of(copied / "damaged" / "4")] == kept
    with closing(Checkpoints(copied, "top1")) as checkpoints:
        checkpoints.save(4, state_at(4), None)
    assert restore_newest(copied, abstract(state_at(0)))[0] == 4
    assert "4.1" in set_aside(copied, 2)[0]


def test_damaged_metrics_of_an_older_checkpoint_do_not_keep_a_run_from_going_on(copied):
    flip(copied / "checkpoints/2/metrics/metrics", 3)
    assert restore_newest(copied, abstract(state_at(0)))[0] == 4
    with pytest.raises(UserError, match=r"checkpoints/2 is damaged"):
        best_step(copied, "top1")
    assert "step 2 is kept in" in set_aside(copied, 4)[0]
    assert best_step(copied, "top1") == 4


def test_all_are_damaged(copied):
    for step in ("2", "4"):
        flip(copied / "checkpoints" / step / "state" / "_METADATA", 5)
    with pytest.raises(UserError, match=r"checkpoints/4 is damaged"):
        restore_newest(copied, abstract(state_at(0)))


def test_a_checkpoint_that_training_replaces_meanwhile(copied, monkeypatch):
    real = checkpoints_module.restore

    def slow(workdir, step, target):
        if step == 4:  # gone before its last file is read
            shutil.move(workdir / "checkpoints" / "4", workdir / "checkpoints" / "6")
        return real(workdir, step, target)

    monkeypatch.setattr(checkpoints_module, "restore", slow)
    step, state, notes = restore_newest(copied, abstract(state_at(0)))
    assert (step, notes) == (6, [])
    np.testing.assert_array_equal(state["kernel"], KERNEL * 4)


def test_a_kill_before_the_checksums_leaves_no_checkpoint(saved, tmp_path, monkeypatch):
    def die(folder):
        raise OSError(5, "killed")

    monkeypatch.setattr(checkpoints_module, "write_checksums", die)
    with (
        pytest.raises(UserError, match="cannot write"),
        closing(Checkpoints(tmp_path, "top1")) as checkpoints,
    ):
        checkpoints.save(1, state_at(1), None)
    assert last_complete_step(tmp_path) is None


def test_an_older_state_without_averaged_statistics_is_restored_with_the_last(tmp_path):
    """And a newer one with its own."""
    statistics = {"norm": {"mean": jnp.asarray([3.0, -1.0]), "count": jnp.int32(5)}}
    newer = steps.make_state({"w": jnp.ones(2)}, statistics, tx=optax.sgd(0.1), ema=True)
    newer = replace(newer, ema={path: leaf * 2 for path, leaf in newer.ema.items()})
    older = replace(newer, ema={"w": newer.ema["w"]})
    with closing(Checkpoints(tmp_path, "top1")) as checkpoints:
        for step, state in ((1, older), (2, newer)):
            checkpoints.save(step, state, {"top1": 2.0 - step})
    first, second = (restore_state(tmp_path, step, abstract(newer))[0] for step in (1, 2))
    np.testing.assert_array_equal(first.ema["w"], [2.0, 2.0])
    np.testing.assert_array_equal(first.ema["norm/mean"], [3.0, -1.0])
    np.testing.assert_array_equal(first.ema["norm/count"], 5)
    np.testing.assert_array_equal(second.ema["norm/mean"], [6.0, -2.0])
    assert jax.tree.structure(first) == jax.tree.structure(second) == jax.tree.structure(newer)


def test_a_state_of_other_shapes_is_one_line(saved):
    target = abstract(state_at(0))
    target["kernel"] = jax.ShapeDtypeStruct((64, 9), np.float32, sharding=target["kernel"].sharding)
    with pytest.raises(UserError, match="of another run"):
        restore(saved, 4, target)


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*Not a directory"):
        Checkpoints(tmp_path / "file", "top1")


def test_processes_that_do_not_come_are_no_damage(tmp_path, monkeypatch):
    """Others may be gone or late while a folder is opened; the checkpoints in it are whole."""
    error = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Gloo context initialization failed")

    def late(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints_module.ocp, "CheckpointManager", late)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        Checkpoints(tmp_path, "eval/top1")
    assert caught.value is error
