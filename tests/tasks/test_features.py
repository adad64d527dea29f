"""What features are found to be worth, their rank, and the colors of patches."""

import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.ops.probe import few_shot_predict, fit_logistic, knn_predict
from vision_jax.tasks import features
from vision_jax.tasks.collapse import diagnose_rank
from vision_jax.tasks.features import Labelled, Probe
from vision_jax.tasks.patches import color_patches


def labelled(rng, count, centers):
    labels = rng.integers(0, len(centers), count)
    noise = rng.normal(size=(count, centers.shape[1]))
    return Labelled((centers[labels] + noise).astype(np.float32), labels)


def test_probes_learn_from_one_set_and_are_tested_on_the_other(rng):
    centers = rng.normal(size=(3, 6))
    learn, test = labelled(rng, 60, centers), labelled(rng, 30, centers)
    found = features.measure(learn, test, 3, Probe(5, 0.5, 4, 2, seed=7))
    given = (learn.features, learn.labels, test.features)
    expected = {
        "knn": [knn_predict(*given, num_classes=3, neighbors=(5,))[5]],
        "linear": [fit_logistic(*given[:2], num_classes=3, strength=0.5)(given[2]).argmax(1)],
        "few_shot": [few_shot_predict(*given, num_classes=3, shots=4, seed=s) for s in (7, 8)],
    }
    assert found.keys() == expected.keys()
    for name, predicted in expected.items():
        right = [np.mean(one == test.labels) for one in predicted]
        assert found[name] == pytest.approx(np.mean(right)), name
        assert found[name] > 0.4, name
    nothing = features.measure(learn, test, 3, Probe(0, 0.0, 0, 1, seed=0))
    assert nothing == {"knn": None, "linear": None, "few_shot": None}


def test_features_have_a_rank_and_must_be_finite(rng):
    values = rng.normal(size=(30, 6)).astype(np.float32)
    assert 3 < features.rank(values) <= 6
    features.check_finite(values)
    values[3, 2] = np.nan
    with pytest.raises(UserError, match="not finite for 1 of 30 images"):
        features.check_finite(values)


def test_a_rank_that_falls_is_told():
    assert diagnose_rank([3.0, 9.0, 8.0, 7.0, 6.0]) == ""  # not by half
    assert diagnose_rank([3.0, 9.0, 8.0, 3.0, 4.0]) == ""  # it rises again
    assert "from 9.0 to 3.0" in diagnose_rank([3.0, 9.0, 8.0, 5.0, 3.0])


def test_the_same_tokens_have_the_same_color(rng):
    tokens = rng.normal(size=(2, 6, 5))
    tokens[1, 4] = tokens[0, 1]
    colors = color_patches(tokens, (2, 3))
    assert colors.shape == (2, 2, 3, 3)
    assert colors.min() >= 0
    assert colors.max() <= 1
    np.testing.assert_array_equal(colors[1, 1, 1], colors[0, 0, 1])
    assert color_patches(np.ones((1, 4, 2)), (2, 2)).shape == (1, 2, 2, 3)  # nothing to tell apart
