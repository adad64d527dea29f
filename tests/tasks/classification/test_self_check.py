"""Five broken defences are all flagged, and three honest robust models are not."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax import sharding
from vision_jax.attacks import gradient, losses
from vision_jax.tasks.classification.self_check import Finding, check_gradients
from vision_jax.tasks.classification.under_attack import Classifier, Examples, make_classify

SIDE, CLASSES, EPSILON, BATCH = 8, 4, 0.1, 64
WIDTH = 64


def make_data(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images f32[N, 8, 8, 3]: a colored pattern for each class under brightness and noise."""
    patterns = np.random.default_rng(0).normal(size=(CLASSES, 2, 2, 3)).repeat(4, 1).repeat(4, 2)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    light = rng.uniform(-0.1, 0.1, (count, 1, 1, 1))
    noise = rng.normal(size=(count, SIDE, SIDE, 3))
    images = 0.5 + light + 0.15 * patterns[labels] + 0.08 * noise
    return np.clip(images, 0, 1).astype(np.float32), labels.astype(np.int32)


def init(key, shapes):
    """{name: normal / sqrt(fan_in)}."""
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


DENSE = {"in": (SIDE * SIDE * 3, WIDTH), "out": (WIDTH, CLASSES)}


def dense(params, images):
    """Two layers."""
    hidden = jax.nn.relu((images - 0.5).reshape(len(images), -1) @ params["in"])
    return hidden @ params["out"]


CONVOLUTION = {"in": (2, 2, 3, 16), "middle": (2, 2, 16, 32), "out": (128, CLASSES)}


def convolution(params, images):
    """Two convolutions of 2 x 2 patches, as products of matrices, and a layer over all places."""
    x = images - 0.5
    for name in ("in", "middle"):
        x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3])
        x = jax.nn.gelu(jnp.einsum("bhiwjc,ijcd->bhwd", x, params[name]))
    return x.reshape(len(x), -1) @ params["out"]


def standardize(x, axes, detached=False):
    mean, deviation = x.mean(axes, keepdims=True), x.std(axes, keepdims=True)
    if detached:
        mean, deviation = jax.lax.stop_gradient((mean, deviation))
    return (x - mean) / (deviation + 1e-3)


NORMALIZED = {"in": (SIDE * SIDE * 3, WIDTH), "middle": (WIDTH, WIDTH), "out": (WIDTH, CLASSES)}


def normalized(params, images, detached=False):
    """The image standardized, and layer normalization within."""
    x = standardize(images, (1, 2, 3), detached).reshape(len(images), -1)
    x = jax.nn.gelu(standardize(x @ params["in"], -1, detached))
    x = x + jax.nn.gelu(standardize(x @ params["middle"], -1, detached))
    return x @ params["out"]


def thermometer(params, images):
    """Each value as which of four levels it reaches, then two layers."""
    levels = jnp.array([0.2, 0.4, 0.6, 0.8])
    reached = (images[..., None] > levels.reshape(1, 1, 1, 1, 4)).astype(jnp.float32).mean(-1)
    return dense(params, reached)


@functools.cache
def trained(model, adversarial: bool):
    """Parameters of a model, 300 steps of SGD with momentum, against PGD if so."""
    shapes = {dense: DENSE, convolution: CONVOLUTION, normalized: NORMALIZED, thermometer: DENSE}
    params = init(jax.random.key(1), shapes[model])
    images, labels = make_data(1, 2048)

    def loss(params, images, labels):
        return losses.cross_entropy(model(params, images), labels).mean()

    def step(carry, key):
        params, velocity = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(images))
        x, y = jnp.asarray(images)[rows], jnp.asarray(labels)[rows]
        if adversarial:
            keys = jax.random.split(key, BATCH)
            attacked = losses.make_untargeted(partial(model, params), y)
            x = gradient.pgd(attacked, x, keys, epsilon=EPSILON, step_size=EPSILON / 2, steps=5)
        slope = jax.grad(loss)(params, x, y)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, slope)
        return (jax.tree.map(lambda p, v: p - 0.05 * v, params, velocity), velocity), None

    start = params, jax.tree.map(jnp.zeros_like, params)
    keys = jax.random.split(jax.random.key(2), 300)
    return jax.jit(lambda start: jax.lax.scan(step, start, keys)[0][0])(start)


def classifier(logits_fn, params) -> Classifier:
    return Classifier(logits_fn, (params,), sharding.make_mesh(-1, 1), BATCH)


def examples(count: int = 4 * BATCH) -> Examples:
    images, labels = make_data(2, count)
    return Examples(images, labels, np.arange(count, dtype=np.int32))


def findings(logits_fn, params, **more) -> dict[str, Finding]:
    found = check_gradients(
        classifier(logits_fn, params),
        examples(),
        norm="linf",
        epsilon=EPSILON,
        seed=0,
        **more,
    )
    return {finding.name: finding for finding in found}


def flagged(found: dict[str, Finding]) -> set[str]:
    return {name for name, finding in found.items() if finding.flagged}


@pytest.mark.long
@pytest.mark.parametrize("model", [dense, convolution, normalized])
def test_honest_robust_models_are_not_flagged(model):
    params = trained(model, adversarial=True)
    over = make_classify(classifier(model, params), _pgd_20, norm="linf", seed=0)
    some = examples()
    accuracy = np.mean(over(some, EPSILON)["logits"].argmax(-1) == some.labels)
    assert accuracy > 0.6, "the model is not robust, so the test would show nothing"
    found = findings(model, params)
    assert flagged(found) == set(), found


def _pgd_20(logits_of_images, images, labels, keys, epsilon):
    return gradient.pgd(
        losses.make_untargeted(logits_of_images, labels),
        images,
        keys,
        epsilon=epsilon,
        step_size=epsilon / 8,
        steps=20,
    )


def saturated(params, images):
    return 1e4 * dense(params, images)


def quantized(params, images):
    return dense(params, jnp.round(8 * images) / 8)


def randomized(rng, params, images):
    """Noise that no key in the program makes."""
    shape = jax.ShapeDtypeStruct(images.shape, jnp.float32)
    noise = jax.pure_callback(lambda: rng.normal(size=shape.shape).astype(np.float32), shape)
    return dense(params, images + 0.1 * noise)


def randomized_by_content(params, images):
    """Noise whose key is the image: the same at each repetition, another for the next image."""

    def noise(image):
        bits = jax.lax.bitcast_convert_type(image, jnp.int32).sum()
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), bits), image.shape)

    return dense(params, images + 0.1 * jax.lax.stop_gradient(jax.vmap(noise)(images)))


def detached(params, images):
    return normalized(params, images, detached=True)


BROKEN = {
    # Its gradients are float32's rounding of 1 - probability, and not zero.
    "saturated": (saturated, dense, {"steps", "black_box"}),
    "quantized": (quantized, dense, {"zero_gradients"}),
    "randomized": (partial(randomized, np.random.default_rng(0)), dense, {"repeats"}),
    "randomized by content": (randomized_by_content, dense, {"roughness"}),
    "not differentiable": (thermometer, thermometer, {"zero_gradients"}),
    "detached normalization": (detached, normalized, {"slopes"}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", BROKEN)
def test_broken_defences_are_flagged(name):
    logits_fn, model, expected = BROKEN[name]
    found = findings(logits_fn, trained(model, adversarial=False))
    print(name, {k: round(f.value, 4) for k, f in found.items()}, flagged(found))
    assert flagged(found) >= expected, found
