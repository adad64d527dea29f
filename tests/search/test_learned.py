"""Samplers that learn: replayed they draw the same, and they find what random draws do not."""

import importlib.util
import math

import pytest
import runs

from vision_jax.commands import search as command
from vision_jax.errors import UserError
from vision_jax.search import choice, learned, log_uniform, uniform, when
from vision_jax.search.journal import Found
from vision_jax.search.search import Search, Settings
from vision_jax.search.space import check_space, draw_trials

NEEDED = {"optuna:tpe": ["optuna"], "optuna:gp": ["torch"], "optuna:cmaes": ["cmaes"]}
SPACE = {
    "optim.lr": log_uniform(1e-5, 1.0),
    "optim.weight_decay": uniform(0.0, 0.3),
    "lora.rank": log_uniform(1, 64),
    "optim.name": choice("adamw", "sgd"),
    "optim.momentum": when("optim.name", "sgd", uniform(0.5, 0.9)),
    "lora.rules": choice((r"block_0/.*",), (r"block_1/.*",)),
}


def config():
    return runs.tiny_config(optim__warmup_steps=1)


def score(values):
    """A bowl around lr 3e-3 without decay; nothing where the rate is too high."""
    if values["optim.lr"] > 0.3:
        return None
    return -abs(math.log(values["optim.lr"] / 3e-3)) - 3 * values.get("optim.weight_decay", 0)


def names():
    pytest.importorskip("optuna")
    return [
        pytest.param(name, marks=[] if name == "optuna:tpe" else pytest.mark.long)
        for name in NEEDED
    ]


def ended(search, count):
    """A journal in which the first trials have ended."""
    found, last = Found(), search.schedule.rungs[-1]
    for trial in range(count):
        figure = score(search.values[trial])
        if figure is None:
            found.lost[trial] = 1
        else:
            found.evaluations[trial] = {last: {search.metric: figure}}
    return found


def make(name, seed, trials, together):
    own = config()
    settings = Settings(trials=trials, sampler=name, seed=seed, together=together)
    return Search(own, check_space(SPACE, own), settings, None)


@pytest.mark.parametrize("name", names())
def test_a_search_made_anew_draws_the_same_from_the_journal(name, rng):
    if any(importlib.util.find_spec(one) is None for one in NEEDED[name]):
        pytest.skip(f"{NEEDED[name]} is not installed")
    seed = int(rng.integers(2**32))
    trials, together = (26, 4) if name == "optuna:tpe" else (14, 4)
    straight = make(name, seed, trials, together)
    while straight.draw(ended(straight, len(straight.values))):
        pass
    assert len(straight.values) == trials
    assert not straight.draw(ended(straight, trials))
    for values in straight.values:
        assert 1e-5 <= values["optim.lr"] <= 1
        assert type(values["lora.rank"]) is int
        assert values["lora.rules"] in SPACE["lora.rules"].values
        assert (values["optim.name"] == "sgd") == (values["optim.momentum"] != 0.9)
    for stopped in (2 * together + 1, trials - 1):  # trials that have ended when it is killed
        again = make(name, seed, trials, together)
        again.draw(ended(straight, stopped))
        drawn = together * (stopped // together + 1)
        assert again.values == straight.values[: min(drawn, trials)]


def test_tpe_finds_what_random_draws_do_not(rng):
    """The mean of the last ten, over three seeds: random draws of this bowl have -3.5."""
    pytest.importorskip("optuna")
    means = {"random": [], "optuna:tpe": []}
    for seed in rng.integers(2**32, size=3):
        tpe = make("optuna:tpe", int(seed), 40, 5)
        while tpe.draw(ended(tpe, len(tpe.values))):
            pass
        drawn = draw_trials(tpe.space, 40, "random", int(seed))
        for name, values in (("optuna:tpe", tpe.values), ("random", drawn)):
            scores = [score(own) for own in values[-10:]]
            means[name].append(sum(-6.0 if x is None else x for x in scores) / 10)
    assert sum(means["optuna:tpe"]) / 3 > sum(means["random"]) / 3 + 0.5, means


def test_a_batch_has_units_of_its_own_and_programs_stay(monkeypatch):
    pytest.importorskip("optuna")
    space = {"optim.lr": log_uniform(1e-3, 1e-1), "lora.rank": choice(1, 2, 5)}
    own = config()
    settings = Settings(trials=7, sampler="optuna:tpe", together=3)
    search = Search(own, check_space(space, own), settings, None)
    traced = []
    monkeypatch.setattr(
        "vision_jax.search.trial._needed", lambda run, names: traced.append(names) or set()
    )
    configs = []
    for count in (0, 3, 6):
        search.draw(ended(search, count))
        (group,) = search.groups
        configs.append(group.config)
    assert [unit.members for unit in search.units] == [(0, 1, 2), (3, 4, 5), (6,)]
    assert [unit.name for unit in search.units] == ["0_0", "0_1", "0_2"]
    assert len(traced) == 1
    assert configs[0].to_dict() == configs[2].to_dict()
    assert configs[0].lora.rank == 5  # whatever was drawn, so that shapes stay


def test_a_program_has_room_for_a_rank_that_is_the_config_s_own():
    """Which a trial has where the range of the rank is not there."""
    pytest.importorskip("optuna")
    own = runs.tiny_config(lora__rank=6)
    space = check_space(
        {
            "optim.name": choice("adamw", "sgd"),
            "lora.rank": when("optim.name", "sgd", choice(1, 2)),
        },
        own,
    )
    search = Search(own, space, Settings(trials=12, sampler="optuna:tpe", together=12), None)
    search.draw(Found())
    assert {values["lora.rank"] for values in search.values} == {1, 2, 6}
    for group in search.groups:
        assert group.config.lora.rank == 6


def test_what_does_not_go_together_is_refused(tmp_path, monkeypatch):
    given = dict.fromkeys(
        ("trials", "sampler", "scheduler", "rungs", "keep", "seed", "together", "plan")
    )
    given["sampler"] = "optuna:tpe"
    with pytest.raises(UserError, match="--scheduler=halving compares trials that are drawn"):
        command.run(config(), tmp_path, "space.py", **{**given, "scheduler": "halving"})
    with pytest.raises(UserError, match="needs at least two ranges of numbers"):
        learned.make_learner("optuna:cmaes", {"x": uniform(0.0, 1.0)}, 0, "highest")
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'vision_jax\[optuna\]'"):
        learned.make_learner("optuna:tpe", SPACE, 0, "highest")
