"""Runs that are killed, stopped, out of disk or not finite: what is left, and how they go on.

tests/crashes.py is the program; .ci/run takes all of this file with XLA's usual flags.
"""

import json
import re

import jax
import numpy as np
import pytest
import runs
from test_train import RESULTS, assert_same_numbers, steps_logged, tensors

from vision_jax.logging import read_metrics
from vision_jax.run.restore import restore

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def deaths(tmp_path_factory):
    """The folder and the (exit code, screen) of each scenario."""
    folder = tmp_path_factory.mktemp("deaths")
    overrides = json.dumps(runs.overrides(**runs.FULL))
    with runs.python(str(runs.ROOT / "tests/crashes.py"), str(folder), overrides) as child:
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
    state = restore(runs.full_config(), folder / "spoiled", "last").state
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
