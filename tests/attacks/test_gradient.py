"""FGSM and PGD: what they promise of an example, of a batch, of devices, and of their cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax import cost, sharding
from vision_jax.attacks import gradient, losses, norms
from vision_jax.errors import UserError
from vision_jax.models.vit import ViT
from vision_jax.trees import lora, paths

EPSILON = {"linf": 0.03, "l2": 0.5, "l1": 4.0}
OPTIONS = {
    "plain": {},
    "all": {"restarts": 2, "freeze_solved": True, "momentum": 1.0, "diversity": 0.7},
}
SHAPE = (8, 8, 3)
HIDDEN = np.random.default_rng(0).normal(size=(192, 64)) / 192**0.5
HEAD = np.random.default_rng(1).normal(size=(64, 5)) / 4


def mlp(images):
    hidden = jnp.tanh(3 * images.reshape(len(images), -1) @ HIDDEN.astype(images.dtype))
    return hidden @ HEAD.astype(images.dtype)


def make_case(rng, count=12, dtype=np.float32):
    """Images of which a quarter are misclassified to begin with; (images, labels, keys)."""
    images = jnp.asarray(rng.uniform(-0.1, 1.1, (count, *SHAPE)).clip(0, 1), dtype)
    labels = jnp.argmax(mlp(images), axis=1)
    labels = jnp.where(jnp.arange(count) % 4 == 0, (labels + 1) % 5, labels)
    return images, labels, keys_of(np.arange(count))


def keys_of(index):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.asarray(index))


def attack(images, labels, keys, norm="linf", loss=losses.cross_entropy, **options):
    epsilon = EPSILON[norm]
    options = {"epsilon": epsilon, "step_size": epsilon / 3, "steps": 5, **options}
    loss_of_images = losses.make_untargeted(mlp, labels, loss)
    return gradient.pgd(loss_of_images, images, keys, norm=norm, **options)


@pytest.mark.long(but=("l1-plain",))
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("norm", EPSILON)
def test_it_stays_in_ball_and_box_and_an_example_in_itself(norm, options, rng):
    images, labels, keys = make_case(rng)
    run = jax.jit(lambda *given: attack(*given, norm, **OPTIONS[options]))
    found = run(images, labels, keys)
    assert found.dtype == jnp.float32
    assert found.min() >= 0
    assert found.max() <= 1
    assert (norms.size(found - images, norm) <= EPSILON[norm] * (1 + 1e-5)).all()
    before = losses.make_untargeted(mlp, labels)(images)[0]
    after, fooled = losses.make_untargeted(mlp, labels)(found)
    solved = losses.make_untargeted(mlp, labels)(images)[1]
    if OPTIONS[options].get("freeze_solved"):
        np.testing.assert_array_equal(found[np.flatnonzero(solved)], images[np.flatnonzero(solved)])
        after, before = after[~solved], before[~solved]
    assert (after > before).mean() > 0.8  # a diverse step is only likely to raise it
    assert fooled.sum() >= solved.sum()


@pytest.mark.long
def test_batch_size_and_order_change_nothing(rng):
    with jax.enable_x64(True):  # in float32 the sign of next to nothing is chance
        images, labels, keys = make_case(rng, dtype=np.float64)
        run = jax.jit(lambda *given: attack(*given, **OPTIONS["all"]))
        whole = np.asarray(run(images, labels, keys))
        chosen = np.array([7, 2, 11, 5])
        some = np.asarray(run(images[chosen], labels[chosen], keys[chosen]))
        np.testing.assert_allclose(some, whole[chosen], rtol=0, atol=1e-12)
        other = np.asarray(run(images[chosen], labels[chosen], keys[chosen - 1]))
        assert np.abs(other - some).max() > 1e-3


def test_frozen_examples_stop_where_they_fool_first(rng):
    images, labels, _ = make_case(rng)
    loss_of_images = losses.make_untargeted(mlp, labels)
    once = jax.jit(lambda x: attack(images, labels, None, start=x, steps=1))
    path = [(images + rng.uniform(-0.03, 0.03, images.shape)).clip(0, 1).astype(jnp.float32)]
    for _ in range(5):
        path.append(once(path[-1]))
    fooled = np.stack([loss_of_images(x)[1] for x in [images, *path]])
    frozen = np.asarray(attack(images, labels, None, start=path[0], freeze_solved=True))
    first = np.where(fooled.any(0), fooled.argmax(0), len(path))
    for example, step in enumerate(first):
        expected = images if step == 0 else path[step - 1]
        np.testing.assert_allclose(frozen[example], expected[example], atol=1e-6)
    assert len(set(first)) > 2


@pytest.mark.long
def test_restarts_are_never_worse_and_keep_the_worst(rng):
    images, labels, keys = make_case(rng, 32)
    loss_of_images = losses.make_untargeted(mlp, labels, losses.margin)
    run = jax.jit(
        lambda restarts: attack(
            images, labels, keys, restarts=restarts, steps=1, loss=losses.margin
        ),
        static_argnums=0,
    )
    one, four = (loss_of_images(run(restarts))[0] for restarts in (1, 4))
    assert (four >= one - 1e-5).all()
    assert (four > one + 1e-4).any()


@pytest.mark.long
def test_fooling_counts_more_than_the_loss(rng):
    """The loss is highest where nothing fools; a restart there does not displace one that does."""

    def loss_of_images(images):
        level = images.mean((1, 2, 3))
        return -level, level > 0.5

    images, _, keys = make_case(rng, 64)
    images = jnp.full_like(images, 0.5)
    arguments = {"epsilon": 0.3, "step_size": 0.0, "steps": 1}
    found = gradient.pgd(loss_of_images, images, keys, restarts=6, **arguments)
    assert loss_of_images(found)[1].sum() >= 58  # each start does by a chance of a half


def test_targets_are_reached(rng):
    images, labels, keys = make_case(rng)
    targets = (labels + 2) % 5
    loss_of_images = losses.make_targeted(mlp, targets)
    found = gradient.pgd(loss_of_images, images, keys, epsilon=0.2, step_size=0.02, steps=20)
    assert loss_of_images(found)[1].all()


def test_epsilon_is_traced_and_may_differ_by_example(rng):
    images, labels, keys = make_case(rng)
    run = jax.jit(
        lambda e: attack(images, labels, keys, epsilon=e, step_size=e / 4, random_start=False)
    )
    small, large = run(0.01), run(0.03)
    assert run._cache_size() == 1
    mixed = jnp.where(jnp.arange(12) < 6, 0.01, 0.03)
    np.testing.assert_array_equal(run(mixed), jnp.concatenate([small[:6], large[6:]]))
    np.testing.assert_array_equal(run(0.0), images)


def test_fgsm_is_one_signed_step(rng):
    images, labels, _ = make_case(rng)
    loss_of_images = losses.make_untargeted(mlp, labels)
    slope = jax.grad(lambda x: loss_of_images(x)[0].sum())(images)
    found = gradient.fgsm(loss_of_images, images, epsilon=0.1)
    np.testing.assert_allclose(found, (images + 0.1 * jnp.sign(slope)).clip(0, 1), atol=1e-6)


def bilinear(size):
    """f[size, 8] that makes 8 pixels `size`: pixels are squares and the border goes on outside."""
    at = (np.arange(size) + 0.5) * 8 / size - 0.5
    weights = 1 - np.abs(at[:, None] - np.arange(8))
    return weights.clip(0) / weights.clip(0).sum(1, keepdims=True)


@pytest.mark.long
def test_diversity_is_bilinear_on_black(rng):
    images, _, keys = make_case(rng, 200)

    @jax.jit
    def run(keys, images):
        draws = jax.vmap(lambda key: gradient.draw_smaller(key, (8, 8), 0.5, 0.5))(keys)
        return gradient.diversify(keys, images, probability=0.5, smallest=0.5), draws

    seen, draws = jax.tree.map(np.asarray, run(keys, images))
    for given, made, smaller, size, place in zip(np.asarray(images), seen, *draws, strict=True):
        expected = np.zeros(SHAPE)
        inside = tuple(slice(p, p + s) for p, s in zip(place, size, strict=True))
        expected[inside] = np.einsum("ih,jw,hwc->ijc", *map(bilinear, size), given)
        np.testing.assert_allclose(made, expected if smaller else given, atol=1e-5)
    assert 70 < draws[0].sum() < 130
    assert set(draws[1].ravel().tolist()) == {4, 5, 6, 7}
    assert set(draws[2].ravel().tolist()) == {0, 1, 2, 3, 4}


def test_what_makes_no_sense_is_an_error(rng):
    images, labels, keys = make_case(rng)
    with pytest.raises(UserError, match="restarts from one given start"):
        attack(images, labels, keys, start=images, restarts=2)
    with pytest.raises(UserError, match="keys are missing"):
        attack(images, labels, None)
    attack(images, labels, None, start=images)


# --- through our models


def make_vit(rng):
    model = ViT(
        num_classes=5, image_size=(16, 16), patch_size=8, width=64, depth=1, num_heads=2,
        mlp_width=256,
    )  # fmt: skip

    def init(key):
        params = model.init(key, jnp.zeros((1, 16, 16, 3)))["params"]
        return lora.attach(params, (r"block_\d+/.*",), key=key, rank=2, alpha=4.0)

    like = jax.eval_shape(init, jax.random.key(0))
    flat = {
        path: (rng.normal(size=x.shape) * 0.3).astype(x.dtype)
        for path, x in paths.flatten(like).items()
    }
    return model, paths.unflatten(like, flat)


def vit_attack(model, params, images, labels, keys, steps=4):
    loss_of_images = losses.make_untargeted(lambda x: model.apply({"params": params}, x), labels)
    return gradient.pgd(loss_of_images, images, keys, epsilon=0.03, step_size=0.01, steps=steps)


@pytest.mark.long
def test_pgd_costs_its_steps_and_forms_no_parameter_gradient(rng):
    model, params = make_vit(rng)
    images, labels, keys = jnp.zeros((8, 16, 16, 3)), jnp.zeros(8, int), keys_of(np.arange(8))

    def flops(function, *given):
        return cost.count(jax.jit(function).lower(*given).compile()).flops

    def forward(params, images):
        loss_of_images = losses.make_untargeted(
            lambda x: model.apply({"params": params}, x), labels
        )
        return loss_of_images(images)[0].sum()

    merged = jax.jit(lora.merge)(params)
    with jax.numpy_rank_promotion("allow"):
        whole = flops(
            lambda params, images: vit_attack(model, params, images, labels, keys, steps=7),
            params,
            images,
        )
        once = flops(jax.value_and_grad(forward, argnums=1), params, images)
        plain = flops(forward, params, images)
        full = flops(jax.value_and_grad(forward, argnums=(0, 1)), merged, images)
    # Merging the adapters needs no image and may be done once, before the loop.
    print(whole / 7, once, plain, full)
    assert 0.9 * once <= whole / 7 <= 1.02 * once
    assert once < 2.2 * plain  # a parameter gradient would make it three times
    assert full > 2.7 * plain


@pytest.mark.long
def test_a_lora_tree_is_attacked_as_its_merged_kernels_and_sharded_parameters_as_whole_ones(rng):
    with jax.enable_x64(True):
        model, params = make_vit(rng)
        model = model.clone(dtype=jnp.float64)
        params = jax.tree.map(lambda x: x.astype(np.float64), params)
        images = jnp.asarray(rng.random((8, 16, 16, 3)))
        labels = jnp.arange(8) % 5
        keys = keys_of(np.arange(8))
        run = jax.jit(lambda *given: vit_attack(model, *given))
        expected = np.asarray(run(params, images, labels, keys))
        assert np.abs(expected - images).max() > 0.02
        merged = run(jax.jit(lora.merge)(params), images, labels, keys)
        np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-12)
        mesh = sharding.make_mesh(2, 4)
        flat = paths.flatten(params)
        places = sharding.parameter_shardings(flat, mesh)
        assert any(not place.is_fully_replicated for place in places.values())
        spread = {path: jax.device_put(x, places[path]) for path, x in flat.items()}
        batch = jax.device_put((images, labels, keys), sharding.batch_sharding(mesh))
        sharded = run(paths.unflatten(params, spread), *batch)
        assert not sharded.sharding.is_fully_replicated
        np.testing.assert_allclose(sharded, expected, rtol=0, atol=1e-12)
