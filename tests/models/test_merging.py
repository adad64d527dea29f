"""Token merging without torch: token by token, ties, what stays exact, gradients, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.models.families import apply_with_features, build_model
from vision_jax.models.merging import merge_counts, merge_tokens, ones
from vision_jax.models.taps import apply_with_taps
from vision_jax.models.vit import build_vit

SMALL = {
    "num_classes": 3,
    "image_size": (20, 16),
    "patch_size": 4,
    "width": 16,
    "depth": 3,
    "num_heads": 2,
    "mlp_width": 24,
    "pool": "avg",
}


def one_by_one(x, sizes, keys, count, prefix):
    """Tokens [N, D], their sizes [N] and keys [N, d]: the paper's words for one image."""
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    places = range(prefix, len(x))
    first, second = ([i for i in places if i % 2 == odd] for odd in (0, 1))
    edges = []
    for i in first:
        likeness = [float(keys[i] @ keys[j]) for j in second]
        best = max(likeness)
        edges.append((-best, i, second[likeness.index(best)]))
    moved = {i: j for _, i, j in sorted(edges)[:count]}
    groups = [[i] for i in range(prefix)] + [[i] for i in first if i not in moved]
    groups += [[j, *(i for i in first if moved.get(i) == j)] for j in second]
    total = np.array([sizes[group].sum() for group in groups])
    means = [(sizes[g, None] * x[g]).sum(0) / sizes[g].sum() for g in groups]
    return np.array(means), total


@pytest.mark.parametrize(
    ("prefix", "patches", "count"), [(1, 16, 5), (0, 7, 3), (2, 9, 1), (5, 12, 6)]
)
def test_tokens_merge_as_one_by_one(prefix, patches, count, rng):
    x = rng.normal(size=(20, prefix + patches, 5))
    sizes = rng.integers(1, 5, x.shape[:2]).astype(float)
    keys = rng.normal(size=(*x.shape[:2], 1, 2))
    keys[::2] = np.sign(keys[::2, ..., :1]) * [1, 0]  # many ties, exact ones
    keys = np.concatenate([keys - 1, keys + 1], axis=2)  # heads
    with jax.enable_x64(True):
        ours = jax.jit(merge_tokens, static_argnums=(3, 4))(x, sizes, keys, count, prefix)
    for row in range(len(x)):
        theirs = one_by_one(x[row], sizes[row], keys[row].mean(1), count, prefix)
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(np.asarray(mine)[row], other, rtol=1e-12, atol=1e-12)


def built(seed=0, **arguments):
    """(model, its random variables, images)."""
    model = build_vit(**{**SMALL, **arguments})
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.random((2, *model.image_size, 3)), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), shapes
    )
    return model, variables, images


@functools.partial(jax.jit, static_argnums=0)
def run(model, variables, images):
    """(logits, features)."""
    return model.apply(variables, images, return_features=True)


FORMS = {
    "token": {"pool": "token"},
    "mean": {"pool": "avg", "norm_after_pool": True},
    "both": {"pool": "token_avg", "num_registers": 2},
    "two tokens": {"pool": "token", "distillation_token": True, "position_prefix": 2},
    "attention": {"pool": "map", "class_token": False, "position_prefix": 0},
}


@pytest.mark.parametrize("form", FORMS)
def test_tokens_that_are_the_same_may_all_merge(form):
    # Only with proportional attention and pooling is this exact.
    model, variables, images = built(**FORMS[form])
    params = dict(variables["params"])
    own = params["pos_embed"][:, : model.position_prefix]
    patches = jnp.zeros_like(params["pos_embed"][:, model.position_prefix :])
    params["pos_embed"] = jnp.concatenate([own, patches], axis=1)
    images = jnp.broadcast_to(images[:, :1, :1], images.shape)
    plain, _ = run(model, {"params": params}, images)
    merged, features = run(model.clone(merge=0.4), {"params": params}, images)
    assert features["block_2"].shape[1] == model.num_prefix + 4  # of 20 patches
    assert np.abs(merged - plain).max() <= 1e-5 * np.abs(plain).max()


def test_nothing_merges_by_default_and_the_program_is_the_same():
    model, variables, images = built()
    texts = [
        jax.jit(one.apply).lower(variables, images).as_text()
        for one in (model, model.clone(merge=0))
    ]
    assert texts[0] == texts[1]
    assert "top_k" not in texts[0]
    assert "top_k" in jax.jit(model.clone(merge=1).apply).lower(variables, images).as_text()


def test_remat_batches_and_vmap_give_the_same():
    model, variables, images = built(merge=3)
    whole, _ = run(model, variables, images)
    one_each = jax.jit(jax.vmap(lambda x: model.apply(variables, x[None])[0]))
    forms = {
        "remat": run(model.clone(remat=True), variables, images)[0],
        "one by one": jnp.concatenate([run(model, variables, x[None])[0] for x in images]),
        "vmap": one_each(images),
    }
    for name, found in forms.items():
        np.testing.assert_allclose(found, whole, rtol=2e-5, atol=1e-6, err_msg=name)


def test_gradients_are_those_of_finite_differences():
    model, variables, images = built(merge=3)
    with jax.enable_x64(True):
        model = model.clone(dtype=jnp.float64)
        variables, images = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x), jnp.float64), (variables, images)
        )

        @jax.jit
        def loss(variables):
            return (model.apply(variables, images) ** 2).sum()

        rng = np.random.default_rng(3)
        step = jax.tree.map(lambda x: rng.normal(size=x.shape), variables)
        gradient = jax.jit(jax.grad(loss))(variables)
        pairs = zip(*(jax.tree.leaves(tree) for tree in (gradient, step)), strict=True)
        along = sum(np.vdot(g, s) for g, s in pairs)

        def shifted(e):
            return loss(jax.tree.map(lambda x, s: np.asarray(x) + e * s, variables, step))

        ahead, behind = shifted(1e-6), shifted(-1e-6)
        assert abs((ahead - behind) / 2e-6 - along) <= 1e-6 * abs(along)


def test_attention_that_is_asked_for_counts_sizes():
    model, variables, images = built(merge=5)
    name, place = "block_1/attention", "block_1/attn/attention"

    @jax.jit
    def both(variables, images):
        _, found = apply_with_features(model, variables, images, names=[name])
        return found[name], apply_with_taps(model, variables, {place: 0.0}, images)[1][place]

    found, inside = both(variables, images)
    assert found.shape[-1] == 16  # of 1 + 20 tokens
    np.testing.assert_allclose(found, inside, rtol=1e-5)


def test_bfloat16_sizes_stay_exact():
    x = jnp.ones((1, 9, 4), jnp.bfloat16)
    merged, sizes = merge_tokens(x, ones(x) * 301, jnp.ones((1, 9, 2, 4), jnp.bfloat16), 4, 1)
    assert (merged.dtype, sizes.dtype) == (jnp.bfloat16, jnp.float32)
    assert sizes.tolist() == [[301, 5 * 301, 301, 301, 301]]


@pytest.mark.parametrize("merge", [-1, 1.5, -0.1])
def test_numbers_that_say_nothing_are_refused(merge):
    with pytest.raises(UserError, match=f"merge {merge}: give a whole number"):
        merge_counts(merge, 2, 16)


@pytest.mark.parametrize("family", ["mae", "dino", "simclr", "eomt"])
def test_what_needs_each_patch_refuses(family):
    sizes = {name: value for name, value in SMALL.items() if name != "pool"}
    more = {"mae": {"num_classes": 0, "decoder_width": 8}, "eomt": {"num_blocks": 1}}
    arguments = {**sizes, "num_classes": 0 if family != "eomt" else 3, **more.get(family, {})}
    model = build_model(family, **arguments, merge=2)
    with pytest.raises(UserError, match="needs a token for each patch"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 20, 16, 3)))


def test_a_loop_over_blocks_is_refused():
    model, variables, images = built()
    model = model.clone(merge=2, scan=True)
    with pytest.raises(UserError, match="scan: where tokens merge"):
        model.apply(variables, images)
