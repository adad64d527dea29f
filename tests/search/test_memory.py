"""How many trials a device takes side by side, and what happens where it takes fewer."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs

from vision_jax import machine
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import UserError
from vision_jax.search import choice, drive, log_uniform, memory
from vision_jax.search.search import Search, Settings
from vision_jax.search.space import check_space
from vision_jax.search.stack import Stack, begin
from vision_jax.sharding import make_batch_placer

SPACE = {"optim.lr": log_uniform(1e-3, 1e-1)}


def search(out, config=None, space=SPACE, **settings):
    config = config or runs.tiny_config(log_every=1)
    return Search(config, check_space(space, config), Settings(**settings), out)


def test_as_many_trials_as_fit(monkeypatch, rng):
    """Of programs whose bytes are some that all share and some of each trial."""
    monkeypatch.setattr(memory, "step_bytes", lambda bytes_: bytes_)
    for _ in range(20):
        shared, own = (int(x) for x in rng.integers(1, 1000, 2))
        compiled = []

        def lower(count, shared=shared, own=own, compiled=compiled):
            compiled.append(count)
            return SimpleNamespace(compile=lambda: shared + count * own)

        every = search(None, trials=40)
        monkeypatch.setattr(Search, "groups", [SimpleNamespace(trials=tuple(range(40)))])
        monkeypatch.setattr(
            Search, "stack", lambda self, group, to=lower: SimpleNamespace(lower=to)
        )
        room = int(rng.integers(1, 20_000))
        found = memory.fitting(every, room)
        most = max(1, min(16, (room - shared) // own))
        assert found <= most
        assert found >= max(1, most // 2 - shared // own)
        assert len(compiled) <= 5
        assert memory.fitting(every, None) == 16


def test_a_container_s_bound_counts_without_files(tmp_path, monkeypatch):
    for name, text in {
        "max": "5000",
        "current": "4000",
        "stat": "anon 7\ninactive_file 900",
    }.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    bound = (f"{tmp_path}/memory.", "max", "current", "inactive_file")
    monkeypatch.setattr(machine, "_CGROUPS", (("/nowhere/", "a", "b", "c"), bound))
    assert machine.available_bytes() == 1900
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_bytes() > 10_000


def test_how_many_is_decided_once(tmp_path, monkeypatch):
    given = iter([5, 2])
    monkeypatch.setattr(memory, "fitting", lambda search, room: next(given))
    first = drive.settle(search(tmp_path, trials=8))
    assert first.at_once == 5
    assert [unit.members for unit in first.units] == [tuple(range(8))]  # as without a bound
    assert json.loads((tmp_path / "search.json").read_text())["at_once"] == 5
    assert drive.settle(search(tmp_path, trials=8)).at_once == 5
    with pytest.raises(UserError, match="together 16, and here 4"):
        drive.keep_settings(search(tmp_path, trials=8, together=4))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run"):
        drive.settle(search(run, trials=8))
    assert [path.name for path in run.iterdir()] == ["config.json"]


@pytest.mark.long
@pytest.mark.parametrize("most", [1, 2])
def test_a_step_in_parts_is_the_step(most, rng):
    every = search(None, space={**SPACE, "lora.rank": choice(1, 2)}, trials=3)
    (group,) = every.groups
    stack = Stack(every.prepare(group.config), group.numbers)
    run = stack.run
    batches = run.training_data(every.sources(group.config)[0], DamageLog())
    batch = make_batch_placer(run.mesh)(next(batches))
    results = []
    for step in (stack.step, stack.step_by(most)):
        state, frozen = begin(stack, {None: run}, [None] * 3)
        results.append(step(state, frozen, batch, stack.numbers(every.values)))
    assert int(results[0][0].step) == int(results[1][0].step) == 1
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_a_full_device_costs_no_trial(tmp_path, monkeypatch, capsys):
    """It has room for one trial of three; evaluations of all at once fail, too."""
    every = search(tmp_path / "all", trials=3)
    drive.run(every)
    usual = Stack.make_evaluate

    def full(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    def make_evaluate(self, source):
        task = SimpleNamespace(**{n: getattr(self.run.task, n) for n in dir(self.run.task)})
        task.make_evaluate_all = lambda *arguments: full
        run = SimpleNamespace(**{n: getattr(self.run, n) for n in dir(self.run)})
        run.task = task
        return usual(SimpleNamespace(run=run), source)

    class Full:
        lower = Stack.lower

        def __call__(self, *arguments):
            full()

    monkeypatch.setattr(Stack, "step", Full())
    monkeypatch.setattr(Stack, "make_evaluate", make_evaluate)
    less = search(tmp_path / "less", trials=3)
    drive.run(less)
    assert "trials of unit 0_0 go on 1 at a time" in capsys.readouterr().out
    curves, expected = (one.curves(one.journal.read()) for one in (less, every))
    assert curves.keys() == expected.keys() == {0, 1, 2}
    losses, before = (one.journal.read().training for one in (less, every))
    for trial in curves:
        assert curves[trial].keys() == expected[trial].keys()
        for step, values in losses[trial].items():
            assert values["loss"] == pytest.approx(before[trial][step]["loss"], rel=1e-5)
    monkeypatch.setattr(Stack, "step_by", lambda self, most: full)
    none = search(tmp_path / "none", trials=3)
    with pytest.raises(jax.errors.JaxRuntimeError):  # not even one trial
        drive.run(none)
