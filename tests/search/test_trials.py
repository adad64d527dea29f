"""A trial side by side with others is its run alone; the best becomes a run; kills cost nothing."""

import json
import os

import detection_runs
import jax
import numpy as np
import pytest
import runs
import segmentation_runs

from vision_jax import train
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.run.restore import restore
from vision_jax.search import choice, drive, log_uniform, report, uniform
from vision_jax.search.search import Search, Settings
from vision_jax.search.space import check_space
from vision_jax.search.stack import Stack, begin
from vision_jax.search.trial import cut, make_groups, pad, trial_config
from vision_jax.sharding import make_batch_placer

pytestmark = pytest.mark.long

# Every number that a step of a classifier has, but for those of one optimizer or recipe.
NUMBERS = {
    "optim.lr": log_uniform(1e-3, 1e-1),
    "optim.weight_decay": uniform(0.01, 0.3),
    "optim.final_weight_decay": uniform(0.1, 0.4),
    "optim.b1": uniform(0.8, 0.95),
    "optim.b2": uniform(0.9, 0.999),
    "optim.clip_norm": uniform(0.1, 1.0),
    "optim.layer_decay": uniform(0.5, 0.9),
    "optim.ema_decay": uniform(0.3, 0.6),
    "augment.label_smoothing": uniform(0.01, 0.3),
    "augment.mixup": uniform(0.1, 0.4),
    "augment.erasing": uniform(0.1, 0.5),
    "model.dropout": uniform(0.05, 0.3),
    "lora.rank": choice(1, 2, 5),
    "lora.alpha": uniform(4.0, 16.0),
}


def search(out, space, config=None, **settings):
    config = config or runs.tiny_config(log_every=1)
    return Search(config, check_space(space, config), Settings(**settings), out)


def assert_same_curves(found, trial, workdir, tolerance):
    """Of a trial and of its run alone; returns how many numbers were compared."""
    compared = 0
    for record in read_metrics(workdir / "metrics.jsonl"):
        for name, value in record.items():
            kind, _, metric = name.partition("/")
            records = {"train": found.training, "eval": found.evaluations}.get(kind)
            if records is not None and metric != "images_per_second":
                own = records[trial][int(record["step"])][metric]
                assert abs(own - value) <= tolerance * max(1, abs(value)), (name, own, value)
                compared += 1
    return compared


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_curve_is_that_of_the_run_alone(accumulate, tmp_path, rng):
    config = runs.tiny_config(
        optim__accumulate=accumulate, batch_size=16, lora__dropout=0.1, augment__cutmix=0.3
    )
    seed = int(rng.integers(2**32))
    all_trials = search(tmp_path / "search", NUMBERS, config, trials=4, seed=seed)
    (group,) = all_trials.groups
    assert set(group.numbers) == set(NUMBERS)
    drive.run(all_trials)
    found = all_trials.journal.read()
    for trial, values in enumerate(all_trials.values):
        workdir = tmp_path / str(trial)
        assert train.run(trial_config(config, values), workdir) == 0
        # 6 steps of 3 numbers, 2 evaluations of 4
        assert assert_same_curves(found, trial, workdir, 1e-5) == 26


@pytest.mark.parametrize("tiny", [segmentation_runs.tiny_config, detection_runs.tiny_config])
def test_trials_of_other_tasks_are_their_runs_alone(tiny, tmp_path, rng):
    config = tiny(log_every=1)
    space = {"optim.lr": log_uniform(1e-4, 1e-3), "optim.weight_decay": log_uniform(1e-3, 0.1)}
    every = search(tmp_path / "search", space, config, trials=2, seed=int(rng.integers(2**32)))
    (group,) = every.groups
    assert set(group.numbers) == set(space)
    drive.run(every)
    found = every.journal.read()
    rows = report.make_table(every, found)
    assert {row.state for row in rows} == {"finished"}
    assert report.finish_best(every, found, report.find_best(every, rows)) == 0
    for trial, values in enumerate(every.values):
        workdir = tmp_path / str(trial)
        assert train.run(trial_config(config, values), workdir) == 0
        assert assert_same_curves(found, trial, workdir, 1e-3) > config.total_steps


SPECIAL = {
    "sgd": {"optim.momentum": uniform(0.5, 0.9)},
    "lars": {"optim.momentum": uniform(0.5, 0.9)},
    "lamb": {"optim.b2": uniform(0.9, 0.999)},
    "lion": {"optim.b1": uniform(0.8, 0.9)},
    "muon": {"optim.momentum": uniform(0.5, 0.9)},
    "adamw": {"optim.b1": uniform(0.8, 0.9)},
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("optimizer", SPECIAL)
def test_zeros_that_fill_up_a_rank_stay_zeros_and_the_rest_is_the_run_alone(optimizer, dora, rng):
    space = {"optim.lr": uniform(1e-3, 1e-2), "lora.rank": choice(1, 2, 4), **SPECIAL[optimizer]}
    space["optim.weight_decay"] = uniform(0.01, 0.1)
    config = runs.tiny_config(optim__name=optimizer, lora__dora=dora, lora__qkv_parts="q,v")
    every = search(None, space, config, trials=3, seed=int(rng.integers(2**32)))
    for place, rank in enumerate((2, 4, 1)):
        every.values[place]["lora.rank"] = rank
    (group,) = every.groups
    stack = Stack(every.prepare(group.config), group.numbers)
    alone = {n: every.prepare(trial_config(config, own)) for n, own in enumerate(every.values)}
    state, frozen = begin(stack, {4: alone[1], 2: alone[0], 1: alone[2]}, [2, 4, 1])
    source = every.sources(config)[0]
    data = stack.run.training_data(source, DamageLog())
    place_batch = make_batch_placer(stack.run.mesh)
    batches = [place_batch(next(data)) for _ in range(5)]
    for batch in batches:
        state, metrics = stack.step(state, frozen, batch, stack.numbers(every.values))
    assert np.asarray(metrics["finite"]).all()
    for trial, run in alone.items():
        own, fixed, _ = run.make_arrays()
        train_step = run.make_train_step()
        for batch in batches:
            own, _ = train_step(own, fixed, batch)
        padded = stack.row(state, trial)
        for x, y in zip(
            jax.tree.leaves(cut(padded, run.abstract_state)), jax.tree.leaves(own), strict=True
        ):
            # An update's sign, Lion's, is another where its momentum is nearly zero.
            far = np.abs(np.asarray(x) - np.asarray(y)) > 1e-5
            assert far.mean() <= (0.01 if optimizer == "lion" else 0)
        filled = pad(cut(padded, run.abstract_state), stack.run.abstract_state)
        for x, y in zip(jax.tree.leaves(padded), jax.tree.leaves(filled), strict=True):
            assert np.array_equal(np.asarray(x), np.asarray(y))  # all that was cut off is zero


def test_trials_share_a_program_where_a_step_need_not_know_what_they_differ_in():
    config = runs.tiny_config()
    trials = [
        {"optim.lr": 1e-3, "optim.name": "adamw", "augment.mixup": 0.0, "optim.warmup_steps": 1},
        {"optim.lr": 1e-2, "optim.name": "adamw", "augment.mixup": 0.2, "optim.warmup_steps": 1},
        {"optim.lr": 3e-3, "optim.name": "lion", "augment.mixup": 0.2, "optim.warmup_steps": 1},
        {"optim.lr": 2e-3, "optim.name": "adamw", "augment.mixup": 0.0, "optim.warmup_steps": 1},
        {"optim.lr": 2e-3, "optim.name": "adamw", "augment.mixup": 0.1, "optim.warmup_steps": 2},
    ]
    groups = make_groups(config, trials, Search(config, {}, Settings(), None).prepare)
    assert [group.trials for group in groups] == [(0, 3), (1,), (2,), (4,)]
    assert [group.numbers for group in groups] == [
        ("optim.lr",),
        *[("optim.lr", "augment.mixup")] * 3,
    ]


SPACE = {
    "optim.lr": log_uniform(1e-3, 1e-1),
    "lora.rank": choice(1, 2),
    "optim.name": choice("adamw", "lion"),
}


HALVING = ("--scheduler=halving", "--keep=0.5", "--rungs=1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, request):
    """A search by halving of two programs, in units of at most two trials, and its best run."""
    return killed_searches(tmp_path_factory.mktemp("search"), request, 20, *HALVING)


def killed_searches(folder, request, kills, *flags):
    """(the folder, exit codes) of a search, whole, killed and by two processes."""
    (folder / "space.py").write_text(
        "from vision_jax.search import choice, log_uniform\n\n"
        "def get_space():\n    return {'optim.lr': log_uniform(1e-3, 1e-1), "
        "'lora.rank': choice(1, 2), 'optim.name': choice('adamw', 'lion')}\n"
    )
    fields = runs.overrides(batch_size=8, total_steps=8, evaluate__every=4, checkpoint_every=3)
    arguments = (str(folder), str(request.config.option.seed), json.dumps(fields), str(kills))
    with runs.python(str(runs.ROOT / "tests/search/kills.py"), *arguments, *flags) as child:
        output, errors = child.communicate(timeout=1500)
    assert child.returncode == 0, errors
    return folder, json.loads(output)


def test_the_best_trial_is_an_ordinary_run(whole):
    folder, outcomes = whole
    assert outcomes["whole"] == 0
    record = json.loads((folder / "whole/search.json").read_text())
    rows = record["trials"]
    finished = [row for row in rows if row["state"] == "finished"]
    assert len(rows) == 6
    assert len(finished) == 3  # half of 6
    (best,) = (row for row in rows if row["place"] == 1)
    assert best["figures"]["top1"] == max(row["figures"]["top1"] for row in finished)
    workdir = folder / "whole/best"
    config = runs.load_config(str(workdir / "config.json"), {})
    assert config.optim.lr == best["values"]["optim.lr"]
    restored = restore(config, workdir, "last")
    assert int(restored.state.step) == config.total_steps
    # The very run alone, from the start.
    alone = folder / "alone"
    assert train.run(config, alone) == 0
    ours, theirs = (read_metrics(w / "metrics.jsonl") for w in (workdir, alone))
    names = ("train/loss", "eval/top1", "eval/loss")
    for name in names:
        there = {r["step"]: r[name] for r in ours if name in r}
        own = {r["step"]: r[name] for r in theirs if name in r}
        assert own.keys() <= there.keys()
        assert all(abs(there[step] - own[step]) < 1e-5 for step in own)


def test_kills_at_random_moments_change_nothing(whole):
    folder, outcomes = whole
    assert (outcomes["kills"], outcomes["last"]) == (20, 0)
    for number in range(outcomes["searches"]):
        same_results(folder / f"killed{number}", folder / "whole")


def test_two_processes_share_a_search(whole):
    folder, outcomes = whole
    assert outcomes["two"] == [0, 0]
    same_results(folder / "two", folder / "whole")
    journal = (folder / "two/journal.jsonl").read_text().split("\n")
    done = [json.loads(line) for line in journal if '"done"' in line]
    units = [(record["unit"], record["rung"]) for record in done]
    assert len(units) == len(set(units))  # nothing was done twice


def test_a_sampler_that_learns_draws_the_same_after_kills(tmp_path, request):
    """Optuna's TPE in three batches of two trials, beyond what it draws at random first."""
    pytest.importorskip("optuna")
    folder, outcomes = killed_searches(tmp_path, request, 8, "--sampler=optuna:tpe")
    assert [outcomes[name] for name in ("whole", "last", "two")] == [0, 0, [0, 0]]
    assert outcomes["kills"] == 8
    for number in range(outcomes["searches"]):
        same_results(folder / f"killed{number}", folder / "whole")
    same_results(folder / "two", folder / "whole")


def same_results(one, other):
    assert (one / "trials.csv").read_bytes() == (other / "trials.csv").read_bytes()
    weights = "best/model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()


def test_a_population_goes_on_from_the_best_of_each_rung(tmp_path, rng):
    space = {"optim.lr": log_uniform(1e-4, 1e-1)}
    config = runs.tiny_config(evaluate__every=100)
    every = search(
        tmp_path, space, config, trials=4, scheduler="population", seed=int(rng.integers(2**32))
    )
    drive.run(every)
    found = every.journal.read()
    (unit,) = every.units
    sources, values = every.numbers_at(found, unit, 1)
    curves = every.curves(found)
    ranked = every.schedule.rank(curves, every.schedule.rungs[0])
    assert sources == {**{t: t for t in range(4)}, ranked[-1]: ranked[0]}
    assert {t for t in range(4) if values[t] != every.values[t]} <= {ranked[-1]}
    rows = report.make_table(every, found)
    assert {row.state for row in rows} == {"finished"}
    assert [row.values for row in rows] == list(every.final_values(found).values())


def test_a_trial_that_is_not_finite_ends_alone(tmp_path):
    config = runs.tiny_config(optim__clip_norm=0)
    every = search(tmp_path, {"optim.lr": choice(1e-3, 1e30)}, config, trials=6)
    drive.run(every)
    rows = report.make_table(every, every.journal.read())
    wild = [row.values["optim.lr"] > 1 for row in rows]
    assert any(wild)
    assert [row.state for row in rows] == ["not finite" if one else "finished" for one in wild]


def test_a_trial_whose_logits_are_not_finite_ends_alone(tmp_path):
    """Its update was finite, and its parameters are too: what they compute is not."""
    config = runs.tiny_config(optim__name="sgd", optim__clip_norm=0, evaluate__every=1)
    every = search(tmp_path, {"optim.lr": choice(1e-3, 1e18, 1e25, 1e36)}, config, trials=8)
    drive.run(every)
    found = every.journal.read()
    rows = report.make_table(every, found)
    assert {row.state for row in rows if row.values["optim.lr"] < 1} == {"finished"}
    assert {row.state for row in rows if row.values["optim.lr"] > 1e30} == {"not finite"}
    assert all(row.state == "not finite" for row in rows if row.trial in found.lost)


def test_a_search_does_not_go_on_with_other_images(tmp_path):
    every = search(tmp_path, {"optim.lr": log_uniform(1e-3, 1e-1)})
    drive.keep_settings(every)
    held = json.loads((tmp_path / "search.json").read_text())
    held["sha256"]["data"] = "0" * 64
    (tmp_path / "search.json").write_text(json.dumps(held))
    with pytest.raises(UserError, match="sha256: data"):
        drive.keep_settings(every)


def test_the_folder_of_another_search_is_refused(whole, tmp_path):
    folder, _ = whole
    text = (folder / "whole/search.json").read_text()
    (tmp_path / "search.json").write_text(text)
    space = {"optim.lr": log_uniform(1e-3, 1e-1)}
    with pytest.raises(UserError, match="holds another search"):
        drive.keep_settings(search(tmp_path, space))
    assert os.listdir(tmp_path) == ["search.json"]
