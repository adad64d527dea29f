"""Attacks and corruptions over a data set: exact on a linear model, the same in any batching."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vision_jax import sharding
from vision_jax.attacks.examples import keys_of
from vision_jax.data.corruptions import corrupt
from vision_jax.data.sources import read_source
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError
from vision_jax.tasks.classification import under_attack as robustness
from vision_jax.tasks.classification.metrics import summarize
from vision_jax.tasks.classification.under_attack import (
    Classifier,
    Examples,
    make_attack,
    make_classify,
)

CLASSES = ("a", "b")
EPSILONS = (0.01, 0.02, 0.05)


def linear(weights, images):
    return (images.reshape(len(images), -1) - 0.5) @ weights


@pytest.fixture
def subject(rng):
    """(weights f32[48, 2], examples whose pixels stay in [0, 1] under every epsilon)."""
    weights = rng.normal(size=(48, 2)).astype(np.float32)
    images = rng.integers(90, 165, (41, 4, 4, 3)).astype(np.uint8)
    labels = np.asarray(linear(weights, images / 255)).argmax(-1).astype(np.int32)
    labels[:5] = 1 - labels[:5]  # wrong to begin with
    return weights, Examples(images, labels, np.arange(100, 141, dtype=np.int32))


def over(weights, name, batch_size=16, **settings):
    settings = {"norm": "linf", "steps": 5, "restarts": 1} | settings
    attack = make_attack(name, **settings) if name else None
    classifier = Classifier(linear, (weights,), sharding.make_mesh(-1, 1), batch_size)
    return make_classify(classifier, attack, norm=settings["norm"], seed=3)


def test_accuracies_are_those_of_a_linear_model(subject):
    """Its margin falls by epsilon times the L1 norm of the weights' difference, no more."""
    weights, examples = subject
    difference = weights[:, 1].astype(float) - weights[:, 0]
    side = np.where(examples.labels == 1, 1, -1)
    margin = side * ((examples.images.reshape(41, -1) / 255 - 0.5) @ difference)
    attacks = {
        name: make_attack(name, norm="linf", steps=5, restarts=1)
        for name in ("fgsm", "pgd", "apgd-ce")
    }
    classifier = Classifier(linear, (weights,), sharding.make_mesh(-1, 1), 16)
    passed, said = [], []
    attacked = {
        name: make_classify(classifier, attack, norm="linf", seed=0)
        for name, attack in attacks.items()
    }
    results = robustness.under_attacks(
        attacked, examples, CLASSES, margin > 0, EPSILONS,
        norm="linf", advance=lambda: passed.append(1), say=said.append,
    )  # fmt: skip
    for name in ("fgsm", "pgd", "apgd-ce", "all"):
        for row, epsilon in zip(results[name], EPSILONS, strict=True):
            left = margin - epsilon * np.abs(difference).sum()
            assert row["accuracy"] == np.mean((margin > 0) & (left > 0))
            assert row["epsilon"] == epsilon
            assert row["count"] == 41
    assert len(passed) == 3 * 3 * 3  # attacks, epsilons, batches of 16
    assert len(said) == 4 * 3
    assert all(line.endswith("n=41") for line in said)
    # Calibration is of the attacked logits: wrong examples are pushed too.
    pushed = examples.images.reshape(41, -1) / 255 - 0.05 * side[:, None] * np.sign(difference)
    summary = summarize(linear(weights, pushed).astype(np.float32), examples.labels, CLASSES)
    assert results["fgsm"][-1]["ece"] == pytest.approx(summary["ece"], abs=1e-5)
    assert results["fgsm"][-1]["loss"] == pytest.approx(summary["loss"], rel=1e-5)
    assert results["fgsm"][-1]["largest"] == pytest.approx(0.05, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["pgd", "difgsm"])
def test_draws_belong_to_the_example(subject, name, rng):
    weights, examples = subject
    order = rng.permutation(41)
    whole = over(weights, name, 64, restarts=2)(examples, 0.03)
    parts = over(weights, name, 3, restarts=2)(examples.take(order), 0.03)  # 8 devices: 8 at once
    for key in ("image", "logits", "size"):
        np.testing.assert_allclose(parts[key], whole[key][order], rtol=2e-5, atol=1e-6)
    moved = keys_of(jax.random.key(3), jnp.array([100, 101]))
    assert not np.array_equal(*jax.random.key_data(moved))


def test_one_compilation_for_all_epsilons(subject):
    weights, examples = subject
    traced = []

    def counting(weights, images):
        traced.append(1)
        return linear(weights, images)

    attack = make_attack("pgd", norm="linf", steps=2, restarts=1)
    classifier = Classifier(counting, (weights,), sharding.make_mesh(-1, 1), 8)
    run = make_classify(classifier, attack, norm="linf", seed=0)
    run(examples, 0.01)
    before = len(traced)
    for epsilon in (0.02, 0.5):
        run(examples, epsilon)
    assert len(traced) == before > 0


def test_epsilon_zero_is_bit_identical_to_clean(subject):
    weights, examples = subject
    clean = over(weights, None)(examples)["logits"]
    for name in ("fgsm", "pgd"):
        np.testing.assert_array_equal(over(weights, name)(examples, 0.0)["logits"], clean)


@pytest.mark.long
def test_autoattack_finds_what_a_linear_model_withstands(subject, rng):
    """Of three classes: the nearest boundary in L-infinity is the L1 norm of a difference away."""
    _, examples = subject
    weights = rng.normal(size=(48, 3)).astype(np.float32)
    logits = linear(weights, examples.images / 255)
    examples = Examples(examples.images, logits.argmax(-1).astype(np.int32), examples.index)
    top = weights.T[examples.labels]  # [41, 48]
    reach = np.abs(top[:, None] - weights.T).sum(-1)  # [41, 3]
    gap = logits.max(-1, keepdims=True) - logits
    distance = np.where(reach > 0, gap / np.maximum(reach, 1e-9), np.inf).min(-1)
    # Where the attack need not be exact: in the widest gap between two distances of the middle.
    near = np.sort(distance)
    fooled = 10 + (near[11:32] / near[10:31]).argmax() + 1
    epsilon = float(near[fooled - 1 : fooled + 1].mean())
    classifier = Classifier(linear, (weights,), sharding.make_mesh(-1, 1), 16)
    classify = make_classify(classifier, None, norm="linf", seed=0)
    said = []
    record = robustness.under_autoattack(
        classifier, classify, examples, ("a", "b", "c"),
        version="rand", norm="linf", epsilon=epsilon, seed=0, say=said.append,
    )  # fmt: skip
    assert record["accuracy"] == np.mean(distance > epsilon) == (41 - fooled) / 41
    assert record["after"]["clean"] == 1
    assert min(record["after"].values()) == record["accuracy"]
    assert record["count"] == 41
    assert said[-1].endswith("n=41")


def test_corruptions_are_those_of_the_rows(subject):
    weights, examples = subject
    results = robustness.under_corruptions(
        over(weights, None), examples, CLASSES, ("fog", "shot_noise"), (2, 5),
        seed=4, threads=2, advance=lambda: None, say=lambda text: None,
    )  # fmt: skip
    assert [row["severity"] for row in results["fog"]] == [2, 5]
    for name, rows in results.items():
        for row in rows:
            changed = [
                corrupt(image, index, name=name, severity=row["severity"], seed=4)
                for image, index in zip(examples.images, examples.index.tolist(), strict=True)
            ]
            logits = linear(weights, np.stack(changed) / 255)
            assert row["accuracy"] == np.mean(logits.argmax(-1) == examples.labels)
            assert row["count"] == 41
    mean = np.mean([row["accuracy"] for rows in results.values() for row in rows])
    assert robustness.mean_accuracy(results) == pytest.approx(mean)


def test_examples_are_spread_evenly_and_damaged_ones_are_named(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        for row in range(10):
            color = np.full((8, 8, 3), 10 * row, np.uint8)
            Image.fromarray(color).save(tmp_path / name / f"{row}.png")
    (tmp_path / "y" / "9.png").write_bytes(b"no image")
    source = read_source(str(tmp_path))
    preprocessing = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, 1.0, "bilinear", "center")
    read = partial(robustness.read_examples, source, preprocessing, threads=2)
    some, damage = read(count=5)
    assert some.index.tolist() == [0, 4, 9, 14]
    assert some.labels.tolist() == [0, 0, 0, 1]
    assert some.images[:, 0, 0, 0].tolist() == [0, 40, 90, 40]
    [line] = damage.lines
    assert line.startswith(f"{source.example_name(19)}: not a readable image")
    assert len(read(count=0)[0].labels) == len(read(count=99)[0].labels) == 19
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"not one of 5 images .* first .*\.png: not a readable"):
        read(count=5)


def test_an_unknown_attack_is_told_the_nearest():
    with pytest.raises(UserError, match="did you mean `fgsm`"):
        make_attack("fgms", norm="linf", steps=1, restarts=1)
