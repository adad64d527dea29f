"""BEiT without torch: names, counts, tables of biases, and the forms that must agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.models.beit import VARIANTS, Beit, relative_index, variant
from vision_jax.trees import lora
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


NAMES = """
block_0/attn/proj/bias (16,)
block_0/attn/proj/kernel (16, 16)
block_0/attn/q_bias (16,)
block_0/attn/qkv/kernel (16, 48)
block_0/attn/relative_position_bias_table (18, 2)
block_0/attn/v_bias (16,)
block_0/layer_scale1 (16,)
block_0/layer_scale2 (16,)
block_0/mlp/fc1/bias (20,)
block_0/mlp/fc1/kernel (16, 20)
block_0/mlp/fc2/bias (16,)
block_0/mlp/fc2/kernel (20, 16)
block_0/norm1/bias (16,)
block_0/norm1/scale (16,)
block_0/norm2/bias (16,)
block_0/norm2/scale (16,)
cls_token (1, 1, 16)
head/bias (3,)
head/kernel (16, 3)
norm/bias (16,)
norm/scale (16,)
patch_embed/bias (16,)
patch_embed/kernel (8, 8, 3, 16)
pos_embed (1, 7, 16)
relative_position_bias_table (18, 2)
"""
EVERYTHING = {"absolute_positions": True, "shared_relative_bias": True}


def test_parameter_names_are_public_and_pinned():
    """Renaming one breaks every checkpoint: change this list only with a migration."""
    paths = flatten(abstract(small(depth=1, **EVERYTHING)))
    found = [f"{path} {leaf.shape}" for path, leaf in sorted(paths.items())]
    assert found == NAMES.split("\n")[1:-1]
    bare = small(depth=1, relative_bias=False, qkv_bias=False, layer_scale=None, num_classes=0)
    optional = ("table", "q_bias", "v_bias", "layer_scale", "pos_embed", "head")
    left = [f for f in found if not any(name in f for name in optional)]
    paths = flatten(abstract(bare))
    assert [f"{path} {leaf.shape}" for path, leaf in sorted(paths.items())] == left


# timm's numbers with 1000 classes.
COUNTS = {
    "beit_base_patch16_224": 86_530_984,
    "beit_base_patch16_384": 86_744_104,
    "beit_large_patch16_224": 304_430_568,
    "beit_large_patch16_384": 304_998_888,
    "beit_large_patch16_512": 305_674_728,
    "beitv2_base_patch16_224": 86_530_984,
    "beitv2_large_patch16_224": 304_430_568,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts(name):
    model = Beit(num_classes=1000, **variant(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(model))) == COUNTS[name]
    assert variant("beit3_base_patch16_224") is None


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


@functools.cache
def outputs_and_gradients(**form):
    model = small(**EVERYTHING, **form)
    images = random_images(model)

    def loss(params):
        logits, features = model.apply({"params": params}, images, return_features=True)
        return jnp.sum(jnp.sin(logits)), {**features, "logits": logits}

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(random_params(model))
    return outputs, flatten(gradients)


def test_remat_changes_nothing_but_the_schedule():
    outputs, gradients = outputs_and_gradients()
    outputs_too, gradients_too = outputs_and_gradients(remat=True)
    assert outputs.keys() == outputs_too.keys()
    assert gradients.keys() == gradients_too.keys()
    for name in outputs:
        assert relative(outputs_too[name], outputs[name]) <= 1e-6, name
    for path in gradients:
        assert relative(gradients_too[path], gradients[path]) <= 2e-5, path


def test_bfloat16_stays_near_float32_and_its_head_is_float32():
    half = small(dtype=jnp.bfloat16, **EVERYTHING)
    params, images = random_params(half), random_images(half)
    logits, features = jax.jit(lambda p, x: half.apply({"params": p}, x, return_features=True))(
        params, images
    )
    assert features["block_1"].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert 1e-6 < relative(logits, outputs_and_gradients()[0]["logits"]) < 0.1
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract(half))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("remat", [False, True])
def test_rates_act_in_training_only_and_by_the_key(remat):
    model = small(drop_path=0.5, dropout=0.3, remat=remat, **EVERYTHING)
    params, images = random_params(model), random_images(model)
    plain = outputs_and_gradients()[0]["logits"]
    assert relative(jax.jit(model.apply)({"params": params}, images), plain) <= 1e-6
    train = jax.jit(
        lambda key: model.apply({"params": params}, images, train=True, rngs={"dropout": key})
    )
    first = train(jax.random.key(1))
    np.testing.assert_array_equal(first, train(jax.random.key(1)))
    assert relative(first, train(jax.random.key(2))) > 1e-3


@pytest.mark.parametrize("parts", ["", "q,v"])
def test_adapters_on_attention_and_mlp(parts):
    model = small(**EVERYTHING)
    params, images = random_params(model), random_images(model)
    rules = (r".*/attn/(qkv|proj)/kernel", r".*mlp/fc\d/kernel")
    tree = lora.attach(params, rules, key=jax.random.key(0), rank=2, alpha=4.0, qkv_parts=parts)
    base, adapters = lora.detach(tree)
    assert len(adapters) == 8
    apply = jax.jit(model.apply)
    plain = outputs_and_gradients()[0]["logits"]
    assert relative(apply({"params": tree}, images), plain) <= 1e-6
    moved = {
        path: dataclasses.replace(leaf, b=jnp.full_like(leaf.b, 0.1))
        for path, leaf in adapters.items()
    }
    tree = lora.apply_adapters(base, moved)
    logits = apply({"params": tree}, images)
    assert relative(logits, plain) > 1e-3
    assert relative(logits, apply({"params": lora.merge(tree)}, images)) <= 1e-5


def test_layers_for_rate_decay():
    model = small(**EVERYTHING)
    layers = {path: model.layer_of(path) for path in flatten(abstract(model))}
    assert model.num_layers == 4
    first = {path for path, layer in layers.items() if layer == 0}
    embeddings = {"patch_embed/kernel", "patch_embed/bias", "cls_token", "pos_embed"}
    assert first == embeddings | {"relative_position_bias_table"}
    assert {path for path, layer in layers.items() if layer == 3} == {
        f"{top}/{leaf}" for top, leaves in HEADS.items() for leaf in leaves
    }
    for index in (0, 1):
        block = {path for path in layers if path.startswith(f"block_{index}/")}
        assert {layers[path] for path in block} == {index + 1}


HEADS = {"norm": ("scale", "bias"), "head": ("kernel", "bias")}


def test_normalization_is_inside():
    images = random_images(small())
    mean, std = np.float32([0.1, 0.4, 0.6]), np.float32([0.2, 0.3, 0.9])
    raw = small(mean=(0.0,) * 3, std=(1.0,) * 3)
    own = small(mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    params = random_params(raw)
    normalized = (images - mean.reshape(1, 1, 1, 3)) / std.reshape(1, 1, 1, 3)
    ours = jax.jit(own.apply)({"params": params}, images)
    assert relative(ours, jax.jit(raw.apply)({"params": params}, normalized)) <= 1e-6


def test_what_cannot_be_is_named():
    with pytest.raises(UserError, match="'map' is none of avg, token"):
        abstract(small(pool="map"))
    model = small()
    with pytest.raises(ValueError, match=r"images are \(25, 17\), the model takes \(17, 25\)"):
        model.apply({"params": random_params(model)}, jnp.zeros((1, 25, 17, 3)))
