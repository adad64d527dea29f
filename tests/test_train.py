"""The loop: what it leaves behind, whatever happens to it on the way."""

import errno
import fcntl
import json
import re
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from safetensors import safe_open
from safetensors.numpy import load_file

from vision_jax import sharding, steps, train
from vision_jax.checkpoints import restore_newest
from vision_jax.config import load_config
from vision_jax.data.fingerprint import read_fingerprint, write_fingerprint
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.run import prepare as preparation
from vision_jax.run import workdirs
from vision_jax.run.description import load_description
from vision_jax.run.restore import restore
from vision_jax.tasks.classification import task as classify

CONFIG = "vit_lora.py"


@pytest.fixture(scope="module", autouse=True)
def finished():
    """The shared run, made before any test of this file replaces a part of the program."""
    return runs.finished()


RESULTS = (
    "config.json",
    "model.json",
    "train_data.json.gz",
    "checksums.json",
    "lock",
    "metrics.jsonl",
    "tensorboard",
    "frozen",
    "checkpoints",
    "curves.png",
    "predictions.png",
    "confusion.png",
    "adapter",
    "model.safetensors",
)


def tensors(workdir):
    """Everything that a run restored, as bytes by name."""
    files = (workdir / "model.safetensors", workdir / "adapter" / "adapter_model.safetensors")
    return {
        (path.name, name): array.tobytes()
        for path in files
        for name, array in load_file(path).items()
    }


def steps_logged(workdir, metric):
    records = read_metrics(workdir / "metrics.jsonl")
    return [record["step"] for record in records if metric in record]


# One uninterrupted run --------------------------------------------------------------------------


def test_a_run_leaves_these_files_and_no_others():
    assert sorted(path.name for path in runs.finished().iterdir()) == sorted(RESULTS)
    assert steps_logged(runs.finished(), "train/loss") == list(range(1, runs.STEPS + 1))
    assert steps_logged(runs.finished(), "eval/top1") == [3, 6]


def test_the_model_carries_what_it_needs():
    with safe_open(runs.finished() / "model.safetensors", "numpy") as file:
        header = json.loads(file.metadata()["vision_jax"])
    assert header["class_names"] == list(runs.CLASSES)
    assert header["preprocessing"]["mean"] == [0.5, 0.4, 0.3]  # the weights' own
    assert header["arguments"]["num_classes"] == 4


def test_frozen_parameters_are_bit_identical_to_the_weights_and_have_no_optimizer_state():
    before = load_file(runs.inputs() / "weights.safetensors")
    after = load_file(runs.finished() / "model.safetensors")
    adapted = re.compile(r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc\d)\.weight")
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {name for name in before if adapted.fullmatch(name) or "head" in name}

    restored = restore(runs.full_config(), runs.finished(), "last")
    assert not set(restored.state.trainable) & set(restored.frozen)
    assert all(path.endswith(("/a", "/b")) or "head/" in path for path in restored.state.trainable)
    numbers = sum(x.size for x in restored.state.trainable.values())
    # AdamW's two moments and a handful of counters, nothing for what is frozen.
    assert sum(x.size for x in jax.tree.leaves(restored.state.opt_state)) <= 2 * numbers + 4
    kernel = "block_0/attn/qkv/kernel/base"
    np.testing.assert_array_equal(restored.frozen[kernel].T, before["blocks.0.attn.qkv.weight"])


@pytest.mark.long
def test_one_compile_over_50_steps(tmp_path, monkeypatch):
    traces, made = [], []
    make_loss, make_step = preparation.make_loss, steps.make_train_step

    def counted_loss(*arguments, **keywords):
        loss_fn = make_loss(*arguments, **keywords)

        def counted(*inner):
            traces.append(None)
            return loss_fn(*inner)

        return counted

    def kept_step(*arguments, **keywords):
        made.append(make_step(*arguments, **keywords))
        return made[-1]

    monkeypatch.setattr(preparation, "make_loss", counted_loss)
    monkeypatch.setattr(steps, "make_train_step", kept_step)
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 64)
    monkeypatch.setattr(train, "write_results", lambda *arguments, **keywords: None)
    config = runs.full_config(
        mesh__fsdp=4, total_steps=50, checkpoint_every=20, evaluate__every=25, log_every=10
    )
    assert train.run(config, tmp_path) == 0
    assert made[0]._cache_size() == len(made) == 1
    assert len(traces) <= 2  # with accumulation one tracing of the step looks at the loss twice


# Meshes -----------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_that_moves_to_another_mesh_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 64)
    monkeypatch.setattr(train, "write_results", lambda *arguments, **keywords: None)

    class Interrupted(Exception):
        pass

    def interrupt(*arguments):
        raise Interrupted

    config = runs.full_config(mesh__data=1, mesh__fsdp=8)
    with monkeypatch.context() as patch:
        patch.setattr(classify.Evaluation, "line", interrupt)  # at step 3, after checkpoint 2
        with pytest.raises(Interrupted):
            train.run(config, tmp_path)
    restored = restore(config, tmp_path, "last")
    base = restored.frozen["block_0/mlp/fc1/kernel/base"]  # [32, 64]
    assert base.sharding.shard_shape(base.shape) == (32, 8)
    moment = restored.state.opt_state[1].mu["head/kernel"]  # [32, 4]
    assert moment.sharding.shard_shape(moment.shape) == (4, 4)

    assert train.run(runs.full_config(mesh__data=4, mesh__fsdp=2), tmp_path) == 0
    assert_same_numbers(tmp_path, runs.finished())


def assert_same_numbers(workdir, other, later=2e-3, exact=2):
    """Losses and gradients agree; after `exact` steps within `later`: Adam enlarges rounding."""
    names = ("train/loss", "train/grad_norm", "eval/loss")
    ours, theirs = (
        {
            (record["step"], name): record[name]
            for record in read_metrics(folder / "metrics.jsonl")
            for name in names
            if name in record
        }
        for folder in (workdir, other)
    )
    assert ours.keys() == theirs.keys()
    for step, name in ours:
        rtol = 2e-5 if step <= exact else later
        key = (step, name)
        np.testing.assert_allclose(ours[key], theirs[key], rtol=rtol, err_msg=str(key))


# Several processes ------------------------------------------------------------------------------


@pytest.mark.long
def test_two_processes_are_one_run(tmp_path):
    # By SGD: of a bias gradient that is only rounding, classes being balanced, Adam makes a step.
    sgd = {**runs.FULL, "optim__name": "sgd", "optim__lr": 0.1}
    fields = runs.overrides(mesh__fsdp=2, **sgd)
    children = runs.start_two(CONFIG, tmp_path / "two", fields, devices=2)
    screens = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], screens
    assert "Files written:" in screens[0][0]
    for text in ("data:", "Parameters", "step", "Files"):  # what connects them talks, we don't
        assert text not in screens[1][0]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(RESULTS)
    assert train.run(runs.tiny_config(**sgd), tmp_path / "one") == 0
    assert_same_numbers(tmp_path / "two", tmp_path / "one", exact=runs.STEPS)


@pytest.mark.long
def test_processes_of_different_configs_stop_and_name_the_field(tmp_path):
    children = runs.start_two(CONFIG, tmp_path / "two", runs.overrides(), others={"optim.lr": 0.5})
    screens = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [2, 2], screens
    for _, errors in screens:
        (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
        assert re.search(r"process 1 \(\S+\) has another config than process 0 \(\S+\): ", line)
        assert "optim.lr is 0.5 and not 0.01" in line
    assert not (tmp_path / "two").exists()


# Process 1 fails between two steps, while process 0 waits for it in the next one.
FAILING = """
import sys, time
from vision_jax import main, train
report = train._Reporter.__call__
def fail(self, step, metrics):
    report(self, step, metrics)
    if step == 2 and "--process=1" in sys.argv:
        sys.stderr.write(f"failed at {time.time()}\\n")
        raise RuntimeError("something unforeseen")
train._Reporter.__call__ = fail
main.command()
"""


@pytest.mark.long
def test_the_failure_of_one_process_ends_the_other_within_seconds(tmp_path):
    program = tmp_path / "failing.py"
    program.write_text(FAILING)
    children = runs.start_two(
        CONFIG, tmp_path / "two", runs.overrides(total_steps=1000), (str(program),)
    )
    (_, errors), (_, other_errors) = (child.communicate(timeout=200) for child in children)
    ended = time.time()
    assert [child.returncode for child in children] == [1, 1], errors + other_errors
    assert ended - float(re.search(r"failed at (\S+)", other_errors)[1]) < 60  # 7 on a free machine
    (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
    words = r"error: process 1 \(\S+, step 2\): RuntimeError: something unforeseen"
    assert re.fullmatch(words, line)
    assert "Traceback" not in errors
    assert "RuntimeError: something unforeseen" in other_errors


# Workdirs that hold something else --------------------------------------------------------------


def snapshot(folder):
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optim__lr": 0.5}, r"holds a run of another config \(optim.lr: 0.01 -> 0.5\)"),
        ({"data__train": "/nowhere"}, "holds a run of another config"),
        ({"batch_size": 7}, "does not divide"),
    ],
)
def test_a_finished_run_is_not_touched_by_another(fields, message):
    before = snapshot(runs.finished())
    with pytest.raises(UserError, match=message):
        train.run(runs.tiny_config(**(runs.FULL | fields)), runs.finished())
    assert snapshot(runs.finished()) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_somebodys_files_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text('{"model_type": "vit"}')
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="another"):
        train.run(runs.tiny_config(), tmp_path)
    assert snapshot(tmp_path) == before


@pytest.fixture
def begun(tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(runs.finished(), tmp_path / "begun"))


@pytest.mark.parametrize("name", ["config.json", "model.json"])
def test_damaged_records_are_named(begun, name):
    text = (begun / name).read_text()
    (begun / name).write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=f"{name}: not readable"):
        train.run(runs.full_config(), begun)


@pytest.mark.parametrize("name", ["config.json", "model.json", "train_data.json.gz"])
def test_records_that_were_changed_by_hand_are_named(begun, name, capsys):
    path = begun / name
    if name.endswith(".gz"):
        data = bytearray(path.read_bytes())
        data[9] ^= 1  # the operating system in gzip's header: the content is the same
        path.write_bytes(data)
    else:
        path.write_text(path.read_text() + " ")
    restore(runs.full_config(), begun, "last")
    assert f"warning: {path} is not as the run wrote it" in capsys.readouterr().err


def test_other_classes_than_when_the_run_began(begun):
    text = (begun / "model.json").read_text()
    (begun / "model.json").write_text(text.replace('"dog"', '"cow"'))
    with pytest.raises(UserError, match="has changed since this run began: other classes"):
        train.run(runs.full_config(), begun)


# A workdir without a checkpoint, longer runs, other data ------------------------------------------


def quick(monkeypatch):
    """Without results, which take the most of the time."""
    monkeypatch.setattr(train, "write_results", lambda *arguments, **keywords: None)


@pytest.mark.long
def test_a_run_that_died_before_its_first_checkpoint_may_be_another_one(tmp_path, monkeypatch):
    quick(monkeypatch)
    for record in ("config.json", "model.json", "train_data.json.gz"):
        shutil.copy(runs.finished() / record, tmp_path)
    text = (tmp_path / "model.json").read_text()  # also of other weights and classes
    (tmp_path / "model.json").write_text(text.replace('"dog"', '"cow"'))
    config = runs.full_config(optim__lr=0.5, total_steps=1)
    assert train.run(config, tmp_path) == 0
    assert load_config(str(tmp_path / "config.json"), {}).optim.lr == 0.5
    assert load_description(tmp_path / "model.json").class_names == runs.CLASSES
    assert workdirs.check_records(tmp_path) == []


def test_results_without_a_checkpoint_are_not_overwritten_by_another_run(begun):
    shutil.rmtree(begun / "checkpoints")
    before = snapshot(begun)
    with pytest.raises(UserError, match=r"another config \(optim.lr: 0.01 -> 0.5\)"):
        train.run(runs.full_config(optim__lr=0.5), begun)
    assert snapshot(begun) == before


def trained_bytes(workdir):
    step, state, _ = restore_newest(workdir, None)
    return step, {path: np.asarray(leaf).tobytes() for path, leaf in state["trainable"].items()}


@pytest.mark.long
def test_a_run_of_constant_rate_goes_on_to_another_length(tmp_path, monkeypatch):
    """Bit-identical to one that long from the start; with other workers, and evaluated
    elsewhere."""
    quick(monkeypatch)
    fields = {"optim__schedule": "constant", "evaluate__every": 3}
    assert train.run(runs.full_config(**fields, total_steps=5), tmp_path / "long") == 0
    assert train.run(runs.full_config(**fields, total_steps=3), tmp_path / "short") == 0
    longer = runs.full_config(
        **{**fields, "evaluate__every": 4}, total_steps=5, data__workers=1, data__max_damaged=0.5
    )
    assert train.run(longer, tmp_path / "short") == 0
    assert trained_bytes(tmp_path / "short") == trained_bytes(tmp_path / "long")
    config = load_config(str(tmp_path / "short" / "config.json"), {})
    assert (config.total_steps, config.evaluate.every) == (5, 4)
    assert workdirs.check_records(tmp_path / "short") == []
    with pytest.raises(UserError, match="of which 5 are done: 4 are too few"):
        train.run(runs.full_config(**fields, total_steps=4), tmp_path / "short")


def test_a_schedule_that_ends_elsewhere_would_have_been_another_run(begun):
    with pytest.raises(UserError, match=r"rates of the 6 steps that are done .* --from="):
        train.run(runs.full_config(total_steps=9), begun)


def test_changed_data_is_refused_by_its_first_name(begun):
    record = begun / "train_data.json.gz"
    fingerprint = read_fingerprint(record)
    fingerprint["name"][3] = "away"
    fingerprint["annotations"][5] = 7
    write_fingerprint(fingerprint, record)
    before = snapshot(begun)
    text = r"has changed .*: 1 added \('\S+\[3\]'\), 1 removed \('away'\), 1 annotated otherwise"
    with pytest.raises(UserError, match=text):
        train.run(runs.full_config(), begun)
    assert snapshot(begun) == before


# One run at a time --------------------------------------------------------------------------------


def test_a_second_run_in_one_workdir_is_refused(begun):
    with workdirs.locked(begun), pytest.raises(UserError, match="is in use: another run trains"):
        train.run(runs.full_config(), begun)
    restore(runs.full_config(), begun, "last")  # reading goes on


def test_a_refused_start_leaves_no_folder_behind(tmp_path):
    with pytest.raises(UserError, match=r"optim\.accumulate"):
        train.run(runs.tiny_config(optim__accumulate=3), tmp_path / "new" / "run")
    with pytest.raises(UserError, match="no such folder"):
        train.run(runs.full_config(data__train="/nowhere"), tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with workdirs.locked(tmp_path) as lock:
        assert "has no locks" in lock.note


def test_drafts_of_a_killed_run_are_removed(begun, monkeypatch):
    quick(monkeypatch)
    (begun / "model.safetensors.draft").touch()
    (begun / "model.safetensorsab12_x9z").touch()  # as versions before 0.2 named them
    (begun / "adapter" / "adapter_model.safetensors.draft").touch()
    before = set(snapshot(runs.finished()))
    assert train.run(runs.full_config(), begun) == 0
    after = {path.relative_to(begun) for path in snapshot(begun)}
    events = {path for path in after if path.parts[0] == "tensorboard"}
    assert after - events <= {path.relative_to(runs.finished()) for path in before}


@pytest.mark.long
def test_a_damaged_newest_checkpoint_is_kept_and_the_run_goes_on_from_an_older_one(
    tmp_path, monkeypatch, capsys
):
    quick(monkeypatch)
    line, calls = classify.Evaluation.line, []

    def interrupt(evaluation):
        calls.append(None)
        return line(evaluation) if len(calls) != 2 else 1 / 0  # at step 6, after checkpoint 4

    monkeypatch.setattr(classify.Evaluation, "line", interrupt)
    with pytest.raises(ZeroDivisionError):
        train.run(runs.full_config(), tmp_path)
    metadata = tmp_path / "checkpoints" / "4" / "state" / "_METADATA"
    metadata.write_bytes(metadata.read_bytes()[:-1])
    assert train.run(runs.full_config(), tmp_path) == 0
    screen = capsys.readouterr().out
    assert "checkpoints/4 is damaged" in screen
    assert "resumed at step 3" in screen
    assert (tmp_path / "damaged" / "4").is_dir()
    assert trained_bytes(tmp_path) == trained_bytes(runs.finished())


# From another run ---------------------------------------------------------------------------------


def test_a_new_run_begins_with_another_ones_weights_and_moments(tmp_path, monkeypatch):
    quick(monkeypatch)
    old = restore(runs.full_config(), runs.finished(), "last")
    seen = {}
    monkeypatch.setattr(
        preparation.Run,
        "make_train_step",
        lambda run: lambda state, *_: seen.update(state=state) or 1 / 0,
    )
    config = runs.full_config(optim__lr=1e-3, optim__schedule="linear", model__weights="/gone")
    with pytest.raises(ZeroDivisionError):
        train.run(config, tmp_path / "new", runs.finished())
    state = seen["state"]
    assert int(state.step) == 0
    for path, leaf in old.state.trainable.items():
        np.testing.assert_array_equal(state.trainable[path], leaf)
        np.testing.assert_array_equal(state.ema[path], leaf)  # the average begins anew
    for before, now in zip(
        jax.tree.leaves_with_path(old.state.opt_state),
        jax.tree.leaves_with_path(state.opt_state),
        strict=True,
    ):
        assert before[0] == now[0]
        schedule = "ScaleByScheduleState" in str(jax.tree.structure(old.state.opt_state)) and (
            before[0] == jax.tree.leaves_with_path(old.state.opt_state)[-1][0]
        )
        np.testing.assert_array_equal(now[1], 0 if schedule else before[1])
    description = load_description(tmp_path / "new" / "model.json")
    assert description.started_from == f"{runs.finished().resolve()}, step 6"


@pytest.mark.long
def test_a_run_from_another_one_resumes_and_says_where_it_began(tmp_path, monkeypatch, capsys):
    quick(monkeypatch)
    config = runs.full_config(optim__name="lion", total_steps=2, evaluate__every=1)
    assert train.run(config, tmp_path / "new", runs.finished()) == 0
    screen = capsys.readouterr().out
    assert "the optimizer's state begins anew: the optimizers differ in" in screen
    assert train.run(config, tmp_path / "new", runs.finished()) == 0
    assert "resumed at step 2" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a run that began with"):
        train.run(config, tmp_path / "new", tmp_path)


def test_what_a_run_cannot_begin_with(tmp_path):
    finished = runs.finished()
    for fields, start, message in (
        ({}, tmp_path / "none", "holds no run"),
        ({"lora__rank": 3}, finished, r"has config.lora.rank 2, and this one 3"),
        ({"recipes": "()"}, finished, r"config.recipes \('lora',\)"),
        ({}, tmp_path / "self", "is the --workdir"),
    ):
        with pytest.raises(UserError, match=message):
            train.run(runs.full_config(**fields), tmp_path / "self", start)


# Early stopping -----------------------------------------------------------------------------------


@pytest.mark.long
def test_training_ends_where_its_figure_no_longer_improves_and_goes_on_where_asked(
    tmp_path, monkeypatch, capsys
):
    quick(monkeypatch)
    fields = {"optim__lr": 0, "evaluate__every": 2}  # the figure is always the same
    workdir = tmp_path / "run"
    for _ in range(2):  # the second start sees that it has ended
        assert train.run(runs.tiny_config(**fields, evaluate__stop_after=1), workdir) == 0
        assert "stopped at step 4: 1 evaluations in a row" in capsys.readouterr().out
        assert steps_logged(workdir, "train/loss") == [1, 2, 3, 4]
    assert train.run(runs.tiny_config(**fields), workdir) == 0
    assert train.run(runs.tiny_config(**fields), tmp_path / "whole") == 0
    assert steps_logged(workdir, "train/loss") == [1, 2, 3, 4, 5, 6]
    assert_same_numbers(workdir, tmp_path / "whole")
