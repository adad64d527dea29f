"""Which trials go on, and what a journal remembers of them."""

import json
import statistics

import pytest
import runs

from vision_jax.commands import search
from vision_jax.errors import UserError
from vision_jax.search import choice, uniform
from vision_jax.search.journal import Journal, claimed
from vision_jax.search.schedule import make_schedule


def random_curves(rng, trials, steps):
    return {t: {s: float(rng.integers(50)) for s in steps} for t in range(trials)}


@pytest.mark.parametrize("best_is", ["highest", "lowest"])
def test_halving_keeps_the_best(best_is, rng):
    schedule = make_schedule("halving", 90, 2, 1 / 3, best_is, 0)
    curves = random_curves(rng, 20, schedule.rungs)
    del curves[3][10]  # lost before the first rung
    kept = schedule.survivors(curves, 0)
    sign = 1 if best_is == "highest" else -1
    rest = [sign * curves[t][10] for t in range(20) if t not in kept and t != 3]
    assert len(kept) == 7  # a third of 19
    assert 3 not in kept
    assert min(sign * curves[t][10] for t in kept) >= max(rest)


def test_the_median_rule_is_vizier_s(rng):
    schedule = make_schedule("median", 90, 2, 0.5, "highest", 0)
    curves = random_curves(rng, 9, (10, 20, 30, 60, 90))
    means = [statistics.mean(curves[t][s] for s in (10, 20, 30)) for t in range(9)]
    best = [max(curves[t][s] for s in (10, 20, 30)) for t in range(9)]
    expected = [t for t in range(9) if best[t] >= sorted(means)[4]]
    assert schedule.survivors(curves, 0) == expected


def test_a_population_copies_the_best_quarter_over_the_worst(rng):
    schedule = make_schedule("population", 90, 2, 0.5, "highest", int(rng.integers(2**32)))
    curves = {t: {30: float(t)} for t in range(8)}
    del curves[5][30]  # lost: it is the worst
    numbers = {t: {"optim.lr": 0.1 + 0.01 * t, "lora.rank": t} for t in range(8)}
    space = {"optim.lr": uniform(0.01, 0.2), "lora.rank": choice(*range(8))}
    sources, changed = schedule.exploit(curves, 0, range(8), numbers, space)
    assert sources == {**{t: t for t in range(8)}, 5: 7, 0: 6}
    for worst, best in ((5, 7), (0, 6)):
        assert changed[worst]["lora.rank"] == best
        factor = changed[worst]["optim.lr"] / numbers[best]["optim.lr"]
        assert min(abs(factor - 0.8), abs(factor - 1.25)) < 1e-6 or (
            changed[worst]["optim.lr"] == 0.2
        )
    assert {t: changed[t] for t in (1, 2, 3, 4, 6, 7)} == {
        t: numbers[t] for t in (1, 2, 3, 4, 6, 7)
    }
    assert schedule.exploit(curves, 0, range(8), numbers, space) == (sources, changed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("asha", 90, 2, 0.5), "--scheduler is 'asha'"),
        (("halving", 90, 0, 0.5), "--rungs is 0"),
        (("halving", 90, 2, 1.0), "--keep is 1"),
        (("halving", 8, 5, 0.5), "take fewer"),
        (
            ("halving", 90, 10**6, 0.5),
            "--rungs is 1000000: it must be below config",
        ),
        (("median", 90, 90, 0.5), "--rungs is 90: it must be below"),
        (("halving", 10**6, 10**5, 0.5), r"at steps (0, ){8}\.\.\.: take fewer"),
    ],
)
def test_numbers_that_make_no_schedule_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        make_schedule(*arguments, "highest", 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"rungs": 3},
            "--rungs is of --scheduler=halving or median or population, and this",
        ),
        ({"keep": 0.5}, "--keep is of --scheduler=halving, and this is none"),
        ({"keep": 0.5, "scheduler": "median"}, "--keep is of .* and this is median"),
    ],
)
def test_flags_of_another_scheduler_are_refused(flags, message, tmp_path):
    names = ("trials", "sampler", "scheduler", "rungs", "keep", "seed", "together", "plan")
    given = dict.fromkeys(names) | flags
    with pytest.raises(UserError, match=message):
        search.run(runs.tiny_config(), tmp_path, "space.py", **given)


def test_a_journal_cut_anywhere_has_all_lines_before_the_cut(tmp_path, rng):
    journal = Journal(tmp_path)
    for step in range(1, 6):
        journal.scores("evaluation", step, {0: {"top1": step / 7}, 1: {"top1": 1 / step}})
    journal.scores("lost", 3, {2: {}})
    whole = journal.path.read_bytes()
    for cut in rng.integers(0, len(whole), 20):
        journal.path.write_bytes(whole[:cut])
        journal.done("0_0", 0, [0, 1], 3.0)  # another process goes on after the torn line
        found = journal.read()
        # A line is whole without its newline too.
        complete = sum(json.loads(line) is not None for line in _whole(whole[:cut]))
        steps = sorted(found.evaluations.get(0, {}))
        assert steps == list(range(1, min(complete, 5) + 1))
        assert found.lost == ({2: 3} if complete == 6 else {})
        assert found.done == {("0_0", 0)}
        assert found.seconds == {0: 1.5, 1: 1.5}
        assert all(found.evaluations[0][step] == {"top1": step / 7} for step in steps)


def _whole(text: bytes) -> list[bytes]:
    found = []
    for line in text.splitlines():
        try:
            json.loads(line)
        except ValueError:
            continue
        found.append(line)
    return found


def test_a_claim_is_held_by_one(tmp_path):
    with claimed(tmp_path, "0_0") as first, claimed(tmp_path, "0_0") as second:
        assert (first, second) == (True, False)
        with claimed(tmp_path, "0_1") as other:
            assert other
    with claimed(tmp_path, "0_0") as again:
        assert again
