"""Nearest neighbours, few-shot and logistic regression against plain loops in float64."""

import numpy as np
import pytest

from vision_jax.ops.probe import L2, few_shot_predict, fit_logistic, knn_predict

CLASSES = 4


@pytest.fixture
def clusters(rng):
    """Overlapping clusters: (train features, labels, test features, labels)."""
    centers = rng.normal(size=(CLASSES, 6))
    labels = rng.integers(0, CLASSES, 90)
    features = (centers[labels] + rng.normal(size=(90, 6))).astype(np.float32)
    return features[:60], labels[:60], features[60:], labels[60:]


def plain_knn(train, labels, row, k):
    cosines = [row @ t / np.linalg.norm(row) / np.linalg.norm(t) for t in train.astype(np.float64)]
    votes = np.zeros(CLASSES)
    for index in sorted(range(len(train)), key=lambda i: -cosines[i])[:k]:
        votes[labels[index]] += np.exp(cosines[index] / 0.07)
    return votes.argmax()


def test_neighbors_vote_by_the_cosine(clusters, monkeypatch):
    monkeypatch.setattr("vision_jax.ops.probe.CHUNK", 7)  # the last chunk is smaller
    train, labels, test, _ = clusters
    found = knn_predict(train, labels, test, num_classes=CLASSES, neighbors=(1, 5, 1000))
    assert list(found) == [1, 5, 1000]
    for k, predicted in found.items():
        expected = [plain_knn(train, labels, row, k) for row in test.astype(np.float64)]
        np.testing.assert_array_equal(predicted, expected)


def test_features_of_any_scale_and_zero_features_have_neighbors(clusters):
    train, labels, test, _ = clusters
    scaled = knn_predict(1e12 * train, labels, 1e-12 * test, num_classes=CLASSES, neighbors=(5,))
    plain = knn_predict(train, labels, test, num_classes=CLASSES, neighbors=(5,))
    np.testing.assert_array_equal(scaled[5], plain[5])
    zeros = knn_predict(train, labels, 0 * test, num_classes=CLASSES, neighbors=(5,))
    assert np.isfinite(zeros[5]).all()


@pytest.mark.parametrize("shots", [1, 8, 1000])
def test_few_shot_is_the_ridge_regression(clusters, shots, rng):
    train, labels, test, truth = clusters
    arguments = {"num_classes": CLASSES, "shots": shots, "seed": 3}
    predicted = few_shot_predict(train, labels, test, **arguments)
    if shots == 1000:  # all examples are chosen, so the optimum can be checked by its gradient
        x = train.astype(np.float64)
        mean, std = x.mean(0), x.std(0) + 1e-5
        x = np.c_[(x - mean) / std, np.ones(len(x))]
        stacked = np.r_[x, np.sqrt(L2) * np.eye(x.shape[1])]
        targets = np.r_[2.0 * np.eye(CLASSES)[labels] - 1, np.zeros((x.shape[1], CLASSES))]
        kernel, *_ = np.linalg.lstsq(stacked, targets, rcond=None)
        expected = (np.c_[(test - mean) / std, np.ones(len(test))] @ kernel).argmax(-1)
        np.testing.assert_array_equal(predicted, expected)
        assert (predicted == truth).mean() > 0.4  # chance is 0.25
    again = few_shot_predict(train, labels, test, **arguments)
    np.testing.assert_array_equal(predicted, again)
    noise = rng.normal(size=(500, 6)).astype(np.float32)  # near every boundary
    chosen = [few_shot_predict(train, labels, noise, **{**arguments, "seed": s}) for s in (3, 4)]
    assert (chosen[0] != chosen[1]).any() == (shots < 1000)


def test_both_forms_of_the_system_agree(clusters):
    """More features than examples, and the other way round."""
    train, labels, test, _ = clusters
    wide, wide_test = (np.tile(x, 20) for x in (train, test))  # D = 120 > 60 examples
    arguments = {"num_classes": CLASSES, "shots": 1000, "seed": 0}
    few = few_shot_predict(wide, labels, wide_test, **arguments)
    x = wide.astype(np.float64)
    mean, std = x.mean(0), x.std(0) + 1e-5
    x = np.c_[(x - mean) / std, np.ones(60)]
    kernel = np.linalg.solve(x.T @ x + L2 * np.eye(121), x.T @ (2.0 * np.eye(CLASSES)[labels] - 1))
    expected = (np.c_[(wide_test - mean) / std, np.ones(30)] @ kernel).argmax(-1)
    np.testing.assert_array_equal(few, expected)


def newton(x, labels, strength):
    """scikit-learn's problem by whole Newton steps: kernel and bias, f64[D + 1, C]."""
    x = np.pad(x, ((0, 0), (0, 1)), constant_values=1)
    penalty = np.repeat(np.append(np.ones(x.shape[1] - 1), 1e-9), CLASSES)  # next to none of a bias
    flat = np.zeros(x.shape[1] * CLASSES)
    for _ in range(30):
        logits = x @ flat.reshape(-1, CLASSES)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = strength * (x.T @ (p - np.eye(CLASSES)[labels])).ravel() + penalty * flat
        hessian = np.diag(penalty)
        for row, probabilities in zip(x, p, strict=True):
            curved = np.diag(probabilities) - np.outer(probabilities, probabilities)
            hessian += strength * np.kron(np.outer(row, row), curved)
        flat = flat - np.linalg.solve(hessian, gradient)
    assert np.abs(gradient).max() < 1e-8
    return flat.reshape(-1, CLASSES)


@pytest.mark.parametrize("strength", [0.02, 1.0])
def test_the_linear_probe_is_the_solution_that_newton_finds(clusters, strength):
    train, labels, test, _ = clusters
    predict = fit_logistic(train, labels, num_classes=CLASSES, strength=strength)
    x = np.float64(train)
    mean, std = x.mean(0), x.std(0)
    solution = newton((x - mean) / std, labels, strength)
    logits = (test - mean) / std @ solution[:-1] + solution[-1]
    shift = (predict(test) - logits).mean()  # of all biases, which changes nothing
    np.testing.assert_allclose(predict(test) - shift, logits, atol=2e-4)
    again = fit_logistic(train, labels, num_classes=CLASSES, strength=strength)
    np.testing.assert_array_equal(again(test), predict(test))


def test_the_linear_probe_takes_features_that_say_nothing(clusters):
    """A constant one, and one twice."""
    train, labels, test, _ = clusters
    predict = fit_logistic(train, labels, num_classes=CLASSES, strength=1.0)
    more = [np.concatenate([x, x[:, :1], 0 * x[:, :1] + 3], axis=1) for x in (train, test)]
    wider = fit_logistic(more[0], labels, num_classes=CLASSES, strength=1.0)
    # One that is there twice is held back less, and 2 or 3 of 30 may change their side.
    assert (wider(more[1]).argmax(1) == predict(test).argmax(1)).mean() > 0.75
    assert np.isfinite(wider(more[1])).all()
