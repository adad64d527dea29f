"""The learning-rate finder: its rule on curves whose answer is known, and a run of it."""

import json

import numpy as np
import pytest
import runs

from vision_jax.commands import find_lr
from vision_jax.errors import UserError


def rates(count=100):
    return list(np.geomspace(find_lr.LOW, find_lr.HIGH, count))


def test_the_suggestion_is_where_the_loss_falls_fastest(rng):
    """A sigmoid is steepest at its middle, and the average lags by 9 updates at most."""
    middle = rng.uniform(-9, -5)
    logs = np.log(rates())
    losses = 2 - 1.5 / (1 + np.exp(-(logs - middle)))
    losses = losses + np.maximum(0, logs + 2) ** 2  # and it diverges at the end
    found = find_lr.suggest_rate(rates(), list(losses))
    updates = (np.log(found) - middle) / (logs[1] - logs[0])
    assert -1 <= updates <= 10


def test_losses_that_never_fall_are_refused():
    assert find_lr.suggest_rate(rates(), list(np.linspace(1, 2, 100))) is None
    assert find_lr.suggest_rate(rates()[:1], [float("nan")]) is None


def test_the_average_is_the_bias_corrected_one(rng):
    losses = rng.normal(size=30)
    weights = 0.9 ** np.arange(30)[::-1]
    expected = (weights * losses).sum() / weights.sum()
    assert find_lr.average(list(losses))[-1] == pytest.approx(expected, rel=1e-12)
    assert find_lr.has_diverged([1.0] * 30 + [1e3])
    assert not find_lr.has_diverged([1.0] * 31)


@pytest.mark.long
def test_a_run_writes_what_it_found(tmp_path):
    assert find_lr.run(runs.tiny_config(total_steps=100), tmp_path) == 0
    record = json.loads((tmp_path / "find_lr.json").read_text())
    assert record["suggestion"] in record["rates"]
    assert 1e-4 < record["suggestion"] < 1
    assert (tmp_path / "find_lr.png").stat().st_size > 5000


@pytest.mark.long
def test_without_a_suggestion_the_curve_is_there_to_look_at(tmp_path, monkeypatch):
    """Free adversarial training makes several updates a step: the rates are those of the steps."""
    monkeypatch.setattr(find_lr, "suggest_rate", lambda rates, losses: None)
    config = runs.tiny_config(total_steps=100, recipes=("adversarial",), adversarial__method="free")
    with pytest.raises(UserError, match="does not fall at any rate"):
        find_lr.run(config, tmp_path)
    record = json.loads((tmp_path / "find_lr.json").read_text())
    assert record["suggestion"] is None
    replays = config.adversarial.replays
    updates = find_lr.UPDATES * replays
    rise = replays * np.log(find_lr.HIGH / find_lr.LOW) / (updates - 1)
    np.testing.assert_allclose(np.diff(np.log(record["rates"])), rise, rtol=1e-3)
    assert (tmp_path / "find_lr.png").stat().st_size > 5000
