"""The loop: what it leaves behind, whatever happens to it on the way."""

import json
import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs
from safetensors import safe_open
from safetensors.numpy import load_file

from vision_jax import classify, modes, setup, sharding, steps, train
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics


@pytest.fixture(scope="module", autouse=True)
def finished():
    """The shared run, made before any test of this file replaces a part of the program."""
    return runs.finished()


RESULTS = (
    "config.json",
    "model.json",
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
    """Everything that a run trained, as bytes by name."""
    files = (workdir / "model.safetensors", workdir / "adapter" / "adapter_model.safetensors")
    return {
        (path.name, name): array.tobytes()
        for path in files
        for name, array in load_file(path).items()
    }


def steps_logged(workdir, metric):
    records = read_metrics(workdir / "metrics.jsonl")
    return [record["step"] for record in records if metric in record]


def python(*arguments, devices=1, **keywords):
    environment = {
        **os.environ,
        "PYTHONPATH": str(runs.ROOT),
        "XLA_FLAGS": runs.xla_flags(devices),
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **keywords,
    )


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


def test_frozen_parameters_are_the_weights_to_the_bit_and_have_no_optimizer_state():
    before = load_file(runs.inputs() / "weights.safetensors")
    after = load_file(runs.finished() / "model.safetensors")
    adapted = re.compile(r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc\d)\.weight")
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {name for name in before if adapted.fullmatch(name) or "head" in name}

    trained = modes.restore(runs.full_config(), runs.finished(), "last")
    assert not set(trained.state.trainable) & set(trained.frozen)
    assert all(path.endswith(("/a", "/b")) or "head/" in path for path in trained.state.trainable)
    numbers = sum(x.size for x in trained.state.trainable.values())
    # AdamW's two moments and a handful of counters, nothing for what is frozen.
    assert sum(x.size for x in jax.tree.leaves(trained.state.opt_state)) <= 2 * numbers + 4
    kernel = "block_0/attn/qkv/kernel/base"
    np.testing.assert_array_equal(trained.frozen[kernel].T, before["blocks.0.attn.qkv.weight"])


def test_one_compile_over_50_steps(tmp_path, monkeypatch):
    traces, made = [], []
    make_loss, make_step = setup.make_loss, steps.make_train_step

    def counted_loss(*arguments, **keywords):
        loss_fn = make_loss(*arguments, **keywords)

        def counted(*inner):
            traces.append(None)
            return loss_fn(*inner)

        return counted

    def kept_step(*arguments, **keywords):
        made.append(make_step(*arguments, **keywords))
        return made[-1]

    monkeypatch.setattr(setup, "make_loss", counted_loss)
    monkeypatch.setattr(steps, "make_train_step", kept_step)
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 64)
    monkeypatch.setattr(modes, "write_results", lambda *arguments, **keywords: None)
    config = runs.full_config(
        mesh__fsdp=4, total_steps=50, checkpoint_every=20, evaluate__every=25, log_every=10
    )
    assert train.run(config, tmp_path) == 0
    assert made[0]._cache_size() == len(made) == 1
    assert len(traces) <= 2  # with accumulation one tracing of the step looks at the loss twice


# Meshes -----------------------------------------------------------------------------------------


def test_a_run_that_moves_to_another_mesh_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 64)
    monkeypatch.setattr(modes, "write_results", lambda *arguments, **keywords: None)

    class Interrupted(Exception):
        pass

    def interrupt(*arguments):
        raise Interrupted

    config = runs.full_config(mesh__data=1, mesh__fsdp=8)
    with monkeypatch.context() as patch:
        patch.setattr(classify.Evaluation, "line", interrupt)  # at step 3, after checkpoint 2
        with pytest.raises(Interrupted):
            train.run(config, tmp_path)
    trained = modes.restore(config, tmp_path, "last")
    base = trained.frozen["block_0/mlp/fc1/kernel/base"]  # [32, 64]
    assert base.sharding.shard_shape(base.shape) == (32, 8)
    moment = trained.state.opt_state[1].mu["head/kernel"]  # [32, 4]
    assert moment.sharding.shard_shape(moment.shape) == (4, 4)

    assert train.run(runs.full_config(mesh__data=4, mesh__fsdp=2), tmp_path) == 0
    assert_same_numbers(tmp_path, runs.finished())


def assert_same_numbers(workdir, other, later=2e-3):
    """Losses and gradients agree; after two steps within `later`, for Adam enlarges rounding."""
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
        rtol = 2e-5 if step <= 2 else later
        key = (step, name)
        np.testing.assert_allclose(ours[key], theirs[key], rtol=rtol, err_msg=str(key))


# Several processes ------------------------------------------------------------------------------


def test_two_processes_are_one_run(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fields = runs.overrides(mesh__fsdp=2, **runs.FULL)
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    config = f"--config={runs.ROOT / 'configs/vit_lora.py'}"
    children = [
        python(
            *("-m", "vision_jax.main", config, f"--workdir={tmp_path / 'two'}", *overrides),
            *(f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process={process}"),
            devices=2,
        )
        for process in range(2)
    ]
    screens = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], screens
    assert "Files written:" in screens[0][0]
    for text in ("data:", "Parameters", "step", "Files"):  # what connects them talks, we don't
        assert text not in screens[1][0]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(RESULTS)
    # Dropout, which the first two steps don't feel, falls on other images: processes take turns in
    # the order of the data, and each has its own part of the batch.
    assert_same_numbers(tmp_path / "two", runs.finished(), later=0.05)


# Deaths -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def dying(tmp_path_factory):
    """tests/crashes.py, which runs beside the tests above."""
    folder = tmp_path_factory.mktemp("deaths")
    overrides = json.dumps(runs.overrides(**runs.FULL))
    return folder, python(str(runs.ROOT / "tests/crashes.py"), str(folder), overrides)


@pytest.fixture(scope="module")
def deaths(dying):
    """The folder and the (exit code, screen) of each of its scenarios."""
    folder, child = dying
    output, errors = child.communicate(timeout=500)
    assert child.returncode == 0, errors
    return folder, json.loads(output)


def test_one_device_computes_what_eight_do(deaths):
    folder, outcomes = deaths
    assert outcomes["uninterrupted"][0] == 0, outcomes["uninterrupted"][1]
    assert_same_numbers(folder / "whole", runs.finished())


def test_kills_at_the_worst_moments_change_nothing(deaths):
    folder, outcomes = deaths
    kills = [name for name, (code, _) in outcomes.items() if code == 128 + 9]
    assert len(kills) == 6
    assert outcomes["after kills"][0] == 0, outcomes["after kills"][1]
    assert tensors(folder / "killed") == tensors(folder / "whole")
    assert "resumed at step 3" in outcomes["before results"][1]


@pytest.mark.parametrize("workdir", ["killed", "full", "stopped"])
def test_each_step_is_logged_once_and_files_are_whole(deaths, workdir):
    folder, _ = deaths
    assert steps_logged(folder / workdir, "train/loss") == [1, 2, 3, 4, 5, 6]
    assert steps_logged(folder / workdir, "eval/top1") == [3, 6]
    assert sorted(path.name for path in (folder / workdir).iterdir()) == sorted(RESULTS)
    kept = sorted(path.name for path in (folder / workdir / "checkpoints").iterdir())
    assert kept == sorted(path.name for path in (folder / "whole" / "checkpoints").iterdir())


def test_a_full_disk_is_one_line_and_loses_nothing(deaths):
    folder, outcomes = deaths
    code, screen = outcomes["full disk"]
    assert code == 2
    assert "Traceback" not in screen
    assert screen.splitlines()[-1].startswith(f"error: cannot write {folder / 'full'}")
    assert outcomes["after full disk"][0] == 0
    assert "resumed at step " in outcomes["after full disk"][1]
    assert tensors(folder / "full") == tensors(folder / "whole")


def test_sigterm_saves_and_says_how_to_resume(deaths):
    folder, outcomes = deaths
    code, screen = outcomes["terminated"]
    assert code == 128 + 15
    assert re.search(r"stopped by SIGTERM at step \d; the state is saved\. Run the same", screen)
    assert "Traceback" not in screen
    assert outcomes["after signals"][0] == 0
    assert tensors(folder / "stopped") == tensors(folder / "whole")


def test_a_second_signal_ends_the_process_at_once(deaths):
    _, outcomes = deaths
    code, screen = outcomes["twice"]
    assert code == 128 + 2
    assert "the state is saved" not in screen


def test_a_loss_that_is_not_finite_stops_the_run_with_its_metrics(deaths):
    folder, outcomes = deaths
    code, screen = outcomes["not finite"]
    assert code == 2
    assert re.search(r"^error: step 5 is not finite \(grad_norm .*loss nan\)", screen, re.MULTILINE)
    assert "Files written:" in screen
    record = read_metrics(folder / "spoiled" / "metrics.jsonl")[-1]
    assert record["step"] == 5
    assert np.isnan(record["train/loss"])
    kept = [int(path.name) for path in (folder / "spoiled" / "checkpoints").iterdir()]
    assert max(kept) == 4
    state = modes.restore(runs.full_config(), folder / "spoiled", "last").state
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


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


@pytest.mark.parametrize("name", ["config.json", "model.json"])
def test_damaged_records_are_named(tmp_path, name):
    for record in ("config.json", "model.json"):
        text = (runs.finished() / record).read_text()
        (tmp_path / record).write_text(text[: len(text) // 2] if record == name else text)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        train.run(runs.full_config(), tmp_path)


def test_other_classes_than_when_the_run_began(tmp_path):
    for record in ("config.json", "model.json"):
        text = (runs.finished() / record).read_text()
        (tmp_path / record).write_text(text.replace('"dog"', '"cow"'))
    with pytest.raises(UserError, match=r"classes .* have changed since this run began"):
        train.run(runs.full_config(), tmp_path)


def test_weights_that_changed_before_the_first_checkpoint(tmp_path):
    for record in ("config.json", "model.json"):
        (tmp_path / record).write_text((runs.finished() / record).read_text())
    description = setup.load_description(tmp_path / "model.json")
    text = (tmp_path / "model.json").read_text()
    (tmp_path / "model.json").write_text(text.replace(description.sha256, "0" * 64))
    with pytest.raises(UserError, match="has changed since this run began"):
        train.run(runs.full_config(), tmp_path)
