"""Spaces and samplers: what is drawn lies in its range, is repeated by its seed, or is refused."""

import itertools
import math

import numpy as np
import pytest
import runs

from vision_jax.errors import UserError
from vision_jax.search import choice, log_uniform, uniform, when
from vision_jax.search.space import check_space, draw_trials, read_space

CONFIG = runs.load_config(str(runs.ROOT / "configs/vit_lora.py"), {})
SPACE = {
    "optim.lr": log_uniform(1e-4, 1e-2),
    "optim.weight_decay": uniform(0, 0.3),
    "lora.rank": log_uniform(1, 64),
    "optim.name": choice("adamw", "lion"),
}


def space():
    return check_space(SPACE, CONFIG)


@pytest.mark.parametrize("sampler", ["random", "sobol"])
def test_draws_lie_in_their_ranges_and_more_trials_leave_the_first_as_they_are(sampler, rng):
    seed = int(rng.integers(2**32))
    trials = draw_trials(space(), 200, sampler, seed)
    for values in trials:
        assert 1e-4 <= values["optim.lr"] <= 1e-2
        assert values["optim.lr"] == np.float32(values["optim.lr"])
        assert 0 <= values["optim.weight_decay"] <= 0.3
        assert type(values["lora.rank"]) is int
        assert 1 <= values["lora.rank"] <= 64
    assert {values["optim.name"] for values in trials} == {"adamw", "lion"}
    assert draw_trials(space(), 200, sampler, seed) == trials
    assert draw_trials(space(), 50, sampler, seed) == trials[:50]
    assert draw_trials(space(), 50, sampler, seed ^ 1) != trials[:50]


def test_log_uniform_is_uniform_in_the_logarithm(rng):
    drawn = draw_trials({"x": log_uniform(1e-4, 1e-2)}, 4000, "random", int(rng.integers(2**32)))
    shares = np.log([values["x"] / 1e-4 for values in drawn]) / math.log(100)
    counts, _ = np.histogram(shares, 10, (0, 1))
    assert ((counts - 400) ** 2 / 400).sum() < 40  # chi², 9 degrees: 1 of 130,000


def test_sobol_fills_each_dyadic_box_once(rng):
    drawn = draw_trials(
        {"x": uniform(0.0, 1.0), "y": uniform(0.0, 1.0)}, 64, "sobol", int(rng.integers(2**32))
    )
    boxes = {(int(values["x"] * 8), int(values["y"] * 8)) for values in drawn}
    assert len(boxes) == 64


def test_grid_has_every_combination():
    drawn = draw_trials(space(), 60, "grid")  # 2 choices x 3 points of each of three ranges
    assert len(drawn) == 54
    points = [{values[name] for values in drawn} for name in SPACE]
    assert [len(one) for one in points] == [3, 3, 3, 2]
    assert {tuple(values.values()) for values in drawn} == set(itertools.product(*points))
    with pytest.raises(UserError, match="the grid has 2 points"):
        draw_trials(space(), 1, "grid")


def test_what_is_there_where_another_field_has_some_value(rng):
    """Elsewhere it is the config's own; a grid has such points once."""
    given = {
        "optim.name": choice("adamw", "sgd", "lion"),
        "optim.momentum": when("optim.name", "sgd", uniform(0.5, 0.8)),
        "optim.b2": when("optim.name", ("adamw", "lion"), choice(0.95, 0.99)),
    }
    space = check_space(given, CONFIG)
    for sampler in ("random", "sobol", "grid"):
        for own in draw_trials(space, 64, sampler, int(rng.integers(2**32))):
            sgd = own["optim.name"] == "sgd"
            assert sgd == (own["optim.momentum"] != CONFIG.optim.momentum), own
            assert 0.5 <= own["optim.momentum"] <= 0.8 or not sgd
            assert own["optim.b2"] in ((CONFIG.optim.b2,) if sgd else (0.95, 0.99))
    assert len(draw_trials(space, 24, "grid")) == 4 + 2 * 2  # sgd has four rates, others two b2


BAD = {
    "name": ({"optim.learning_rate": uniform(0, 1)}, "did you mean `optim.lr`"),
    "end": ({"optim.b1": uniform(0.9, 1.5)}, "optim.b1 is 1.5: it must be at least 0 and below 1"),
    "type": ({"lora.rank": choice(4, "eight")}, "lora.rank is 'eight': it takes int"),
    "choice": ({"optim.name": choice("adamw", "adam")}, "optim.name is 'adam': it must be"),
    "relation": ({"optim.warmup_steps": uniform(0, 500)}, "the run has 200 updates"),
    "kept": ({"total_steps": choice(10, 20)}, "total_steps is the same for all trials"),
    "when": ({"optim.momentum": when("optim.name", "sgd", uniform(0.5, 0.8))}, "before it"),
    "none": (
        {
            "optim.name": choice("adamw", "lion"),
            "optim.momentum": when("optim.name", "sgd", uniform(0.5, 0.8)),
        },
        "is 'sgd', which is none of its choices",
    ),
    "plain": ({"optim.lr": 1e-3}, r"write choice\(...\)"),
    "empty": ({}, "must return a dict of 1 to"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_makes_no_space_is_refused_by_its_field(name):
    bad, message = BAD[name]
    with pytest.raises(UserError, match=message):
        check_space(bad, CONFIG)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_space(:", "is no Python file"),
        ("x = 1", "defines no get_space"),
        ("def get_space():\n    return 1 / 0\n", r"space\.py:2: ZeroDivisionError"),
        (
            "from vision_jax.search import uniform\ndef get_space():\n    return uniform(2, 1)",
            "two numbers, the smaller first",
        ),
    ],
)
def test_a_bad_space_file_is_one_line(text, message, tmp_path):
    path = tmp_path / "space.py"
    with pytest.raises(UserError, match="there is no file"):
        read_space(str(path), CONFIG)
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_space(str(path), CONFIG)
