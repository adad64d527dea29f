"""BEiT without torch: tables of biases, attention by its definition, and its forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.models.beit import Beit, relative_index
from vision_jax.trees.paths import flatten

SMALL = {
    "num_classes": 3,
    "image_size": (17, 25),  # a grid of 2 x 3
    "patch_size": 8,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_width": 20,
}


def small(**arguments):
    return Beit(**{**SMALL, **arguments})


def abstract(model):
    images = jnp.zeros((1, *model.image_size, model.in_channels))
    return jax.eval_shape(lambda key: model.init(key, images)["params"], jax.random.key(0))


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), abstract(model)
    )


def random_images(model, seed=1, count=2):
    size = (count, *model.image_size, model.in_channels)
    return jnp.asarray(np.random.default_rng(seed).random(size), jnp.float32)


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


EVERYTHING = {"absolute_positions": True, "shared_relative_bias": True}


def test_the_index_knows_offsets_and_the_class_token():
    rows, columns = 3, 4
    index = relative_index((rows, columns))
    assert index.shape == (13, 13)
    offsets = 5 * 7
    for query in range(12):
        for key in range(12):
            down, across = np.subtract(divmod(query, columns), divmod(key, columns))
            assert index[1 + query, 1 + key] == (down + rows - 1) * 7 + across + columns - 1
    assert (index[0, 1:] == offsets).all()
    assert (index[1:, 0] == offsets + 1).all()
    assert index[0, 0] == offsets + 2


@pytest.mark.long
def test_attention_by_its_definition():
    """Logits of every pair, biases looked up one by one; the key has no bias."""
    model = small(depth=1, shared_relative_bias=True, layer_scale=None)
    params, images = random_params(model), random_images(model)
    _, features = model.apply({"params": params}, images, return_features=True)
    block, x = params["block_0"], np.asarray(features["embed"], np.float64)

    def layer(x, p):
        return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p.get("bias", 0))

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * np.asarray(p["scale"]) + np.asarray(p["bias"])

    q, k, v = np.split(layer(norm(x, block["norm1"]), block["attn"]["qkv"]), 3, axis=-1)
    q, v = q + np.asarray(block["attn"]["q_bias"]), v + np.asarray(block["attn"]["v_bias"])
    name = "relative_position_bias_table"
    table = np.asarray(block["attn"][name]) + np.asarray(params[name])
    bias = table[relative_index(model.grid)]
    out = np.zeros_like(x)
    for head, part in enumerate((slice(0, 8), slice(8, 16))):
        logits = q[..., part] @ k[..., part].transpose(0, 2, 1) / np.sqrt(8) + bias[..., head]
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        out[..., part] = weights @ v[..., part]
    x = x + layer(out, block["attn"]["proj"])
    hidden = layer(norm(x, block["norm2"]), block["mlp"]["fc1"])
    erf = jax.scipy.special.erf(hidden / np.sqrt(2))
    x = x + layer(hidden * (1 + np.asarray(erf, np.float64)) / 2, block["mlp"]["fc2"])
    assert relative(features["block_0"], x) <= 1e-5
    pooled = norm(x[:, 1:].mean(1), params["norm"])
    assert relative(features["pooled"], pooled) <= 1e-5


@pytest.mark.long(but=("arguments3",))
@pytest.mark.parametrize(
    "arguments",
    [
        {"in_channels": 1, "mean": (0.5,), "std": (0.5,), **EVERYTHING},
        {"relative_bias": False, "shared_relative_bias": True, "image_size": (31, 9)},
        {"pool": "token", "norm_after_pool": False, "layer_scale": None, "qkv_bias": False},
        {"pool": "token", "relative_bias": False, "absolute_positions": True},
        {"norm_after_pool": False, "num_classes": 0, "activation": "silu"},
    ],
)
def test_features_and_gradients_at_any_size(arguments):
    model = small(**arguments)
    images, params = random_images(model), random_params(model)

    def loss(params):
        logits, features = model.apply({"params": params}, images, return_features=True)
        return jnp.sin(logits).sum(), (logits, features)

    (_, (logits, features)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    tokens = model.grid[0] * model.grid[1] + 1
    shapes = {name: x.shape[1:] for name, x in features.items()}
    blocks = dict.fromkeys(("embed", "block_0", "block_1"), (tokens, 16))
    assert shapes == {**blocks, "pooled": (16,)}
    assert logits.shape == (2, model.num_classes or 16)
    if not model.num_classes:
        np.testing.assert_array_equal(logits, features["pooled"])
    for path, gradient in flatten(gradients).items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path


def test_what_cannot_be_is_named():
    with pytest.raises(UserError, match="'map' is none of avg, token"):
        abstract(small(pool="map"))
