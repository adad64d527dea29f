"""What holds for every method: pure, one compile, each image alone, any leaf, any form of a call.

That the numbers are right is tests/parity/test_explanations.py's matter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.attacks.examples import keys_of
from vision_jax.errors import UserError
from vision_jax.explain import measures
from vision_jax.explain.explainer import BASELINES, make_explainer
from vision_jax.explain.forward import (
    Forward,
    class_logit,
    class_targets,
    place_logit,
    region_logit,
    score_of,
)
from vision_jax.explain.gradients import gauss_legendre
from vision_jax.explain.methods import METHODS, find_method, make_explain
from vision_jax.models.families import build_model, initialize
from vision_jax.trees import lora, paths, quantize

FAST = {  # few of all that a method repeats
    "smooth_grad": {"samples": 2},
    "integrated_gradients": {"nodes": 3},
    "occlusion": {"window": 8, "stride": 8},
    "feature_ablation": {"cells": 2},
    "rise": {"masks": 3, "cells": 2},
}
SIDE = 16
VIT = {
    "num_classes": 4, "image_size": (SIDE, SIDE), "patch_size": 4, "width": 16, "depth": 2,
    "num_heads": 2, "mlp_width": 24, "num_registers": 1,
}  # fmt: skip
RESNET = {"num_classes": 4, "depths": (1, 1), "widths": (8, 8), "stem_width": 8, "block": "basic"}


@functools.cache
def subject(family="vit", **arguments):
    """(model, random variables)."""
    given = {"vit": VIT, "resnet": RESNET}[family]
    model = build_model(family, **{**given, **arguments})
    rng = np.random.default_rng(3)
    variables = jax.tree.map(
        lambda x: x + jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype),
        initialize(model, jax.random.key(0), (SIDE, SIDE)),
    )
    return model, variables


def arguments(count=3):
    images = jnp.asarray(np.random.default_rng(4).random((count, SIDE, SIDE, 3)), jnp.float32)
    labels = jnp.arange(count) % 4
    return images, class_logit(labels), keys_of(jax.random.key(5), jnp.arange(count))


def explain(name, model, variables, *given):
    return make_explain(Forward(model), name, **FAST.get(name, {}))(variables, *given)


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_a_map_is_of_its_image_alone_and_compiled_once(name, monkeypatch):
    model, variables = subject()
    images, target, keys = arguments()
    traced = []
    call = Forward.__call__

    def watched(self, *given):
        traced.append(1)
        return call(self, *given)

    monkeypatch.setattr(Forward, "__call__", watched)
    run = make_explain(Forward(model), name, **FAST.get(name, {}))
    found = run(variables, images, target, keys)
    first = len(traced)
    assert first
    again = run(variables, images[::-1], class_logit(jnp.array([3, 3, 0])), keys)
    assert len(traced) == first  # other images and classes are arguments
    assert not np.array_equal(found, again)
    assert np.isfinite(found).all()

    def of_one(image, label, key):
        explained = make_explain(Forward(model), name, **FAST.get(name, {}))
        return explained(variables, image[None], class_logit(label[None]), key[None])[0]

    alone = jax.vmap(of_one)(images, jnp.arange(3) % 4, keys)
    scale = np.abs(found).max()
    np.testing.assert_allclose(alone, found, rtol=0, atol=2e-5 * scale)


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_adapted_quantized_and_scanned_models_are_explained(name):
    """An adapter that does nothing changes nothing, one that acts does; 8 bits hardly do."""
    model, variables = subject()
    images, target, keys = arguments()
    base = np.asarray(explain(name, model, variables, images, target, keys))
    scale = np.abs(base).max()
    rules = [".*(qkv|fc1)/kernel"]
    adapted = lora.attach(variables["params"], rules, key=jax.random.key(1), rank=2, alpha=2.0)
    same = explain(name, model, {"params": adapted}, images, target, keys)
    np.testing.assert_allclose(same, base, rtol=0, atol=1e-4 * scale)
    moved = explain(name, model, {"params": shifted(adapted)}, images, target, keys)
    merged = explain(name, model, {"params": lora.merge(shifted(adapted))}, images, target, keys)
    assert np.abs(moved - base).max() > 1e-2 * scale
    np.testing.assert_allclose(moved, merged, rtol=0, atol=1e-4 * np.abs(merged).max())
    chosen = quantize.choose(variables["params"], rules)
    small = quantize.quantize(variables["params"], chosen, quantize.FORMS["int8"])
    found = np.asarray(explain(name, model, {"params": small}, images, target, keys))
    assert np.corrcoef(found.reshape(-1), base.reshape(-1))[0, 1] > 0.95
    assert np.abs(found - base).max() > 0
    scanned = explain(name, model.clone(scan=True, remat=True), variables, images, target, keys)
    np.testing.assert_allclose(scanned, base, rtol=0, atol=1e-5 * scale)


def shifted(adapted):
    """Adapters that act."""
    flat = paths.flatten(adapted)
    return paths.unflatten(
        adapted, {path: x + 0.1 if path.endswith("kernel/b") else x for path, x in flat.items()}
    )


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in METHODS if "attention" not in name])
def test_a_convolutional_network_is_explained(name):
    model, variables = subject("resnet")
    images, target, keys = arguments()
    found = explain(name, model, variables, images, target, keys)
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 0


@pytest.mark.long
def test_what_a_model_has_not_is_told_in_one_line():
    model, variables = subject("resnet")
    images, target, keys = arguments()
    with pytest.raises(UserError, match="a resnet has no blocks whose tokens all see each other"):
        jax.eval_shape(
            functools.partial(explain, "attention_rollout", model), variables, images, target, keys
        )
    with pytest.raises(UserError, match="did you mean `grad_cam`"):
        find_method("gradcam")
    forward = Forward(model)
    with pytest.raises(UserError, match="has no 'stage_9/output': did you mean `stage_1/output`"):
        jax.eval_shape(lambda v, x: forward(v, x, {"stage_9/output": 0.0}), variables, images)
    assert forward.map_taps(variables, images) == ["stage_1/output"]


def test_targets_read_one_number_an_image():
    rng = np.random.default_rng(6)
    classes, queries, pixels = (
        jnp.asarray(rng.random(shape), jnp.float32)
        for shape in ((2, 4), (3, 2, 5, 4), (2, 3, 6, 4))
    )
    labels, places = jnp.array([3, 1]), jnp.array([4, 0])
    region = jnp.asarray(rng.random((2, 3, 6)) < 0.5).at[:, 0, 0].set(True)
    for target, logits, of_image in (
        (class_logit(labels), classes, lambda b: classes[b, labels[b]]),
        (place_logit(places, labels), queries, lambda b: queries[-1, b, places[b], labels[b]]),
        (place_logit(places, labels), queries[0], lambda b: queries[0, b, places[b], labels[b]]),
        (
            region_logit(region, labels),
            pixels,
            lambda b: np.asarray(pixels)[b][np.asarray(region)[b]][:, labels[b]].mean(),
        ),
    ):
        found = target({"logits": logits})
        np.testing.assert_allclose(found, [of_image(0), of_image(1)], rtol=1e-6)


def test_the_nodes_integrate_polynomials_exactly():
    places, weights = gauss_legendre(5)
    for degree in range(10):
        assert abs((weights * places**degree).sum() - 1 / (degree + 1)) < 1e-14


@pytest.mark.long
@pytest.mark.parametrize("name", BASELINES)
def test_the_baseline_asked_for_is_where_the_way_begins(name):
    """The map's sum is the difference from the score there, and from no other baseline's."""
    model, variables = subject()
    images, target, _ = arguments()
    labels = jnp.arange(3) % 4
    forward = Forward(model)
    explain = make_explainer(
        forward, ["integrated_gradients"], size=(SIDE, SIDE), seed=0, baseline=name
    )
    found = explain(variables, images, class_targets(labels), jnp.arange(3))
    maps = np.asarray(found["integrated_gradients"]["map"])
    mean = jnp.asarray(model.mean, jnp.float32).reshape(1, 1, 1, 3)
    empty = {
        "mean": jnp.broadcast_to(mean, images.shape),
        "black": jnp.zeros_like(images),
        "blurred": measures.blurred(images),
    }
    score = np.asarray(score_of(forward, variables, images, target))
    scale = np.abs(maps).sum((1, 2))
    for other, start in empty.items():
        lost = score - np.asarray(score_of(forward, variables, start, target))
        error = np.abs(maps.sum((1, 2)) - lost) / scale
        assert (error < 2e-3).all() if other == name else (error > 2e-3).any()
    assert (np.abs(found["integrated_gradients"]["completeness"]) < 0.1).all()
