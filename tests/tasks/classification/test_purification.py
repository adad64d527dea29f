"""A generator before a classifier, of linear models: what comes out is known."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax import sharding
from vision_jax.attacks.examples import keys_of
from vision_jax.errors import UserError
from vision_jax.tasks.classification import purification
from vision_jax.tasks.classification.under_attack import (
    Classifier,
    Examples,
    make_attack,
    make_classify,
)

CLASSES = ("a", "b")
SHAPE = (4, 4, 3)


def linear(weights, images):
    return (images.reshape(len(images), -1) - 0.5) @ weights


def generator_of(share, predicts="image", size=SHAPE[:2]):
    """Whose guess of the image is a share of what it sees."""

    def apply(params, state, x, time, labels, *, train, keys):
        assert labels.dtype == jnp.int32
        return {"prediction": params["share"] * x}, state

    model = SimpleNamespace(predicts=predicts, num_classes=5, image_size=size, in_channels=3)
    variables = ({"share": jnp.float32(share)}, {}, {})
    return SimpleNamespace(
        model=model, apply=apply, assemble=lambda flat: flat, arguments=variables
    )


@pytest.fixture
def subject(rng):
    """(classifier, examples, its weights)."""
    weights = rng.normal(size=(48, 2)).astype(np.float32)
    images = rng.integers(90, 165, (21, *SHAPE)).astype(np.uint8)
    labels = np.asarray(linear(weights, images / 255)).argmax(-1).astype(np.int32)
    labels[:3] = 1 - labels[:3]  # wrong to begin with
    classifier = Classifier(linear, (weights,), sharding.make_mesh(-1, 1), 16)
    return classifier, Examples(images, labels, np.arange(50, 71, dtype=np.int32)), weights


@pytest.mark.parametrize("predicts", ["image", "velocity"])
def test_images_follow_the_flow(predicts, rng):
    generator = generator_of(0.8, predicts)
    images = rng.uniform(size=(3, *SHAPE)).astype(np.float32)
    keys = jax.random.split(jax.random.key(4), 3)
    found = purification.make_purify(generator, strength=0.4, steps=3)(
        generator.arguments, jnp.asarray(images), keys
    )
    noise = np.stack([jax.random.normal(key, SHAPE) for key in keys]).astype(np.float64)
    x, time = 0.6 * (2.0 * images - 1) + 0.4 * noise, 0.6
    for end in (0.6 + 0.4 / 3, 0.6 + 0.8 / 3, 1.0):
        slope = 0.8 * x if predicts == "velocity" else (0.8 * x - x) / max(1 - time, 0.05)
        x, time = x + (end - time) * slope, end
    np.testing.assert_allclose(found, np.clip((x + 1) / 2, 0, 1), atol=2e-6)


def under(subject, generator, strength, attacks=("fgsm", "pgd"), epsilons=(0.01, 0.05), **settings):
    classifier, examples, _ = subject
    made = {name: make_attack(name, norm="linf", steps=4, restarts=1) for name in attacks}
    said = []
    record = purification.under_purification(
        classifier,
        make_classify(classifier, None, norm="linf", seed=3),
        generator,
        purification.Settings("runs/generator", strength, 3, 2),
        made,
        examples,
        epsilons,
        norm="linf",
        seed=3,
        say=said.append,
        **settings,
    )
    return record, said


def test_strength_0_is_no_defence_to_the_bit(subject):
    classifier, examples, _ = subject
    generator = generator_of(0.8)
    purify = purification.make_purify(generator, strength=0.0, steps=3)
    defended = purification.make_defended(classifier, purify, generator.arguments)
    over = purification.make_attacked(defended, purify, None, number=0, draws=2, seed=3)
    images = over(examples, 0.0)["none"]
    plain = make_classify(classifier, None, norm="linf", seed=3)
    expected = plain(examples)
    for draw in range(purification.JUDGED_BY):
        np.testing.assert_array_equal(images[:, draw], expected["image"])
        logits = plain(Examples(images[:, draw], examples.labels, examples.index))["logits"]
        np.testing.assert_array_equal(logits, expected["logits"])
    record, _ = under(subject, generator, 0.0, attacks=("fgsm",))
    attack = make_classify(
        classifier, make_attack("fgsm", norm="linf", steps=4, restarts=1), norm="linf", seed=3
    )
    clean = expected["logits"].argmax(-1) == examples.labels
    assert record["clean"] == clean.mean()
    for row in record["attacks"]["fgsm"]:
        logits = attack(examples, row["epsilon"])["logits"]
        alone = (clean & (logits.argmax(-1) == examples.labels)).mean()
        assert row["transferred"] == row["adaptive"] == pytest.approx(alone)


def test_figures_are_those_of_linear_models(subject):
    """The sign of the weights' difference is the best attack, through the defence and before it."""
    _, examples, weights = subject
    strength, share = 0.1, 0.9
    generator = generator_of(share)
    record, said = under(subject, generator, strength, attacks=("fgsm",), epsilons=(0.05,))
    difference = weights[:, 1] - weights[:, 0]
    side = np.where(examples.labels == 1, 1, -1)
    purify = purification.make_purify(generator, strength=strength, steps=3)

    def verdicts(images, number):
        root = jax.random.fold_in(jax.random.key(3), number)
        keys = keys_of(root, jnp.asarray(examples.index))
        columns = []
        for draw in range(purification.JUDGED_BY):
            noise = jax.vmap(
                lambda key, draw=draw: jax.random.fold_in(jax.random.fold_in(key, 2), draw)
            )
            seen = purify(generator.arguments, jnp.asarray(images, jnp.float32), noise(keys))
            logits = linear(weights, np.asarray(seen))
            columns.append(logits.argmax(-1) == examples.labels)
        return np.stack(columns, axis=1)

    images = examples.images / 255
    clean = verdicts(images, 0)
    moved = images - 0.05 * (side[:, None] * np.sign(difference)).reshape(-1, *SHAPE)
    attacked = (clean & verdicts(moved, 1)).mean()
    (row,) = record["attacks"]["fgsm"]
    assert record["clean"] == pytest.approx(clean.mean())
    assert row["transferred"] == pytest.approx(attacked)
    assert row["adaptive"] == pytest.approx(attacked)
    assert 0 <= attacked < clean.mean()
    assert any("fgsm 12.75/255 adaptive" in line for line in said)


def test_draws_do_not_depend_on_the_batch(subject):
    classifier, examples, _ = subject
    generator = generator_of(0.7)
    purify = purification.make_purify(generator, strength=0.3, steps=3)
    defended = purification.make_defended(classifier, purify, generator.arguments)
    attack = make_attack("pgd", norm="linf", steps=3, restarts=1)
    over = purification.make_attacked(defended, purify, attack, number=1, draws=2, seed=3)
    whole = over(examples, 0.03)
    rows = np.arange(20, 2, -3)
    some = over(examples.take(rows), 0.03)
    assert whole.keys() == {"transferred", "adaptive"}
    for kind, images in whole.items():
        np.testing.assert_allclose(some[kind], images[rows], atol=1e-6)
        assert np.abs(images[:, 0] - images[:, 1]).max() > 0.05  # the draws differ


def test_the_gradient_goes_through_all_steps(rng):
    share, strength, steps = 1.5, 0.3, 4
    generator = generator_of(share)
    purify = purification.make_purify(generator, strength=strength, steps=steps)
    images = jnp.asarray(rng.uniform(size=(2, *SHAPE)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 2)

    def output(x):
        seen = purify(generator.arguments, x, keys)
        return jnp.sin(3 * seen).sum(), seen

    (_, seen), found = jax.value_and_grad(output, has_aux=True)(images)
    # The guess is a share of x, so each step multiplies x, and with it the gradient.
    times = np.linspace(1 - strength, 1, steps + 1)
    slope = times[0] * np.prod(1 + np.diff(times) * (share - 1) / (1 - times[:-1]))
    inside = (seen > 0) & (seen < 1)
    assert 0 < inside.mean() < 1
    np.testing.assert_allclose(found, np.where(inside, 3 * np.cos(3 * seen) * slope, 0), atol=1e-5)


def test_a_generator_of_other_images_is_refused():
    trained = SimpleNamespace(preprocessing=SimpleNamespace(image_size=(4, 4), mean=(0.5,) * 3))
    purification.check_generator(generator_of(1), trained, "runs/g")
    with pytest.raises(UserError, match="makes images of 8 x 4 and 3 channels") as caught:
        purification.check_generator(generator_of(1, size=(8, 4)), trained, "runs/g")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is no run of config"):
        purification.check_generator(generator_of(1, "noise"), trained, "runs/g")
