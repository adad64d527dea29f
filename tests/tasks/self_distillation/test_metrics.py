"""What evaluation measures, and the names of a collapse."""

import math

import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.ops.probe import knn_predict
from vision_jax.tasks.self_distillation import metrics
from vision_jax.tasks.self_distillation.figures import color_patches

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
    watching, said = watch.begin(), {}
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


def test_a_rank_that_falls_is_told():
    assert metrics.diagnose_rank([3.0, 9.0, 8.0, 7.0, 6.0]) == ""  # not by half
    assert metrics.diagnose_rank([3.0, 9.0, 8.0, 3.0, 4.0]) == ""  # it rises again
    assert "from 9.0 to 3.0" in metrics.diagnose_rank([3.0, 9.0, 8.0, 5.0, 3.0])


def test_neighbors_are_the_probes_without_the_image_itself(rng):
    features, labels = rng.normal(size=(30, 6)).astype(np.float32), rng.integers(0, 3, 30)
    found = metrics.leave_one_out(features, labels, num_classes=3, neighbors=5)
    for row in range(0, 30, 7):
        rest = np.arange(30) != row
        (theirs,) = knn_predict(
            features[rest], labels[rest], features[row : row + 1], num_classes=3, neighbors=(5,)
        )[5]
        assert found[row] == theirs
    summary = metrics.summarize(features, labels, num_classes=3, neighbors=5)
    assert summary["knn"] == (found == labels).mean()
    assert 3 < summary["rank"] <= 6
    assert metrics.summarize(features, labels, num_classes=0, neighbors=0)["knn"] is None
    features[3, 2] = np.nan
    with pytest.raises(UserError, match="not finite for 1 of 30 images"):
        metrics.summarize(features, labels, num_classes=3, neighbors=5)


def test_the_same_tokens_have_the_same_color(rng):
    tokens = rng.normal(size=(2, 6, 5))
    tokens[1, 4] = tokens[0, 1]
    colors = color_patches(tokens, (2, 3))
    assert colors.shape == (2, 2, 3, 3)
    assert colors.min() >= 0
    assert colors.max() <= 1
    np.testing.assert_array_equal(colors[1, 1, 1], colors[0, 0, 1])
    assert color_patches(np.ones((1, 4, 2)), (2, 2)).shape == (1, 2, 2, 3)  # nothing to tell apart
