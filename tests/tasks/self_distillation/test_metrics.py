"""The names of a collapse."""

import math

import pytest

from vision_jax.errors import UserError
from vision_jax.tasks.collapse import Watching
from vision_jax.tasks.self_distillation import metrics

MOST = math.log(64)
HEALTHY = {
    "dino": 0.7 * MOST, "teacher_entropy": 0.4 * MOST, "batch_entropy": 0.9 * MOST,
    "feature_spread": 0.4,
}  # fmt: skip
WATCH = metrics.Watch(
    prototypes=64,
    warn_after=100,
    warmup_steps=60,
    student_temperature=0.1,
    teacher_temperature=0.04,
    centering="center",
    center_momentum=0.9,
    stop=False,
)


def watched(steps, watch=WATCH, **changes):
    """{step: warning} of a run whose metrics are these."""
    watching, said = Watching(watch), {}
    for step in range(1, steps + 1):
        for line in watching(step, {**HEALTHY, **changes}):
            said[step] = line
    return said


def changed(**fields):
    return metrics.Watch(**{**vars(WATCH), **fields})


def test_a_healthy_run_hears_nothing():
    assert watched(1000) == {}
    # At first nothing need be learned yet, while the rate warms up.
    assert watched(159, dino=MOST, teacher_entropy=MOST) == {}


@pytest.mark.parametrize(
    ("fields", "values", "cause"),
    [
        ({}, {"batch_entropy": 0.01}, "same of all (entropy 0.010): the rate is too high"),
        ({"center_momentum": 1.0}, {"batch_entropy": 0.01}, "the center does not move"),
        ({}, {"feature_spread": 0.001}, "features of all images agree (spread 0.0010): the rate"),
        ({}, {"teacher_entropy": 0.001}, "no doubt (entropy 0.0010): its temperature is too low"),
        ({}, {"dino": MOST, "teacher_entropy": MOST}, "no choice (loss 4.1589, log K 4.1589): its"),
        (
            {"teacher_temperature": 0.2},
            {"dino": MOST, "teacher_entropy": MOST},
            "temperature 0.2 is not below the student's 0.1",
        ),
    ],
)
def test_a_collapse_is_named_once_with_its_cause(fields, values, cause):
    said = watched(1000, changed(**fields), **values)
    ((step, line),) = said.items()
    assert 100 <= step <= 200
    assert line.startswith("collapse: ")
    assert cause in line
    with pytest.raises(UserError, match="ended this one"):
        watched(1000, changed(**fields, stop=True), **values)
