"""The ViT without torch: golden outputs, names, counts, and the forms that must agree."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from vision_jax import convert
from vision_jax.errors import UserError
from vision_jax.models.families import build_model, find_variant
from vision_jax.models.vit import VARIANTS, build_vit, variant_arguments
from vision_jax.trees.paths import flatten, unflatten

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {
    "num_classes": 3,
    "image_size": (12, 8),
    "patch_size": 4,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_width": 24,
}


def small(**arguments):
    return build_vit(**{**SMALL, **arguments})


def abstract(model):
    images = jnp.zeros((1, *model.image_size, model.in_channels))
    return jax.eval_shape(lambda key: model.init(key, images)["params"], jax.random.key(0))


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), abstract(model)
    )


def random_images(model, seed=1, count=4):
    size = (count, *model.image_size, model.in_channels)
    return jnp.asarray(np.random.default_rng(seed).random(size), jnp.float32)


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_blocks_and_logits_equal_the_golden_outputs(name):
    weights = convert.read_weights(str(GOLDEN / name))
    golden = safetensors.numpy.load_file(GOLDEN / name / "outputs.safetensors")
    family, arguments = convert.recognize(weights)
    model = build_model(family, **arguments)
    like = abstract(model)
    params = unflatten(like, convert.import_weights(weights, flatten(like), arguments))
    logits, features = jax.jit(
        lambda params, images: model.apply({"params": params}, images, return_features=True)
    )(params, golden["images"])
    for index in range(model.depth):
        block = f"block_{index}"
        assert relative(features[block], golden[block]) <= 1e-5, block
    assert relative(logits, golden["logits"]) <= 1e-5


NAMES = """
attn_pool/kv/bias (32,)
attn_pool/kv/kernel (16, 32)
attn_pool/latent (1, 1, 16)
attn_pool/mlp/fc1/bias (24,)
attn_pool/mlp/fc1/kernel (16, 24)
attn_pool/mlp/fc2/bias (16,)
attn_pool/mlp/fc2/kernel (24, 16)
attn_pool/norm/bias (16,)
attn_pool/norm/scale (16,)
attn_pool/proj/bias (16,)
attn_pool/proj/kernel (16, 16)
attn_pool/q/bias (16,)
attn_pool/q/kernel (16, 16)
block_0/attn/k_norm/bias (8,)
block_0/attn/k_norm/scale (8,)
block_0/attn/proj/bias (16,)
block_0/attn/proj/kernel (16, 16)
block_0/attn/q_norm/bias (8,)
block_0/attn/q_norm/scale (8,)
block_0/attn/qkv/bias (48,)
block_0/attn/qkv/kernel (16, 48)
block_0/layer_scale1 (16,)
block_0/layer_scale2 (16,)
block_0/mlp/fc1/bias (48,)
block_0/mlp/fc1/kernel (16, 48)
block_0/mlp/fc2/bias (16,)
block_0/mlp/fc2/kernel (24, 16)
block_0/norm1/bias (16,)
block_0/norm1/scale (16,)
block_0/norm2/bias (16,)
block_0/norm2/scale (16,)
cls_token (1, 1, 16)
dist_token (1, 1, 16)
head/bias (3,)
head/kernel (16, 3)
norm/bias (16,)
norm/scale (16,)
norm_pre/bias (16,)
norm_pre/scale (16,)
patch_embed/bias (16,)
patch_embed/kernel (4, 4, 3, 16)
pos_embed (1, 7, 16)
reg_token (1, 2, 16)
"""


def test_parameter_names_are_public_and_pinned():
    """Renaming one breaks every checkpoint: change this list only with a migration."""
    model = small(
        depth=1,
        pool="map",
        distillation_token=True,
        num_registers=2,
        pre_norm=True,
        qk_norm=True,
        layer_scale=1e-5,
        gated_mlp=True,
    )
    found = [f"{path} {leaf.shape}" for path, leaf in sorted(flatten(abstract(model)).items())]
    assert found == NAMES.split("\n")[1:-1]
    distilled = flatten(abstract(small(depth=1, distillation_token=True)))
    assert {"head/kernel", "head_dist/kernel", "head_dist/bias"} <= set(distilled)


# timm's numbers with 1000 classes at 224 pixels; tests/parity counts live.
COUNTS = {
    "ti/16": 5_717_416,
    "s/16": 22_050_664,
    "s/32": 22_878_952,
    "b/8": 86_576_872,
    "b/16": 86_567_656,
    "b/32": 88_224_232,
    "l/16": 304_326_632,
    "h/14": 632_045_800,
    "g/14": 1_012_611_432,
}


@pytest.mark.parametrize("variant", COUNTS)
def test_parameter_counts(variant):
    model = build_vit(variant, num_classes=1000, image_size=(224, 224))
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract(model)))
    assert count == COUNTS[variant]


FORMS = {
    "remat": {"remat": True},
    "scan": {"scan": True},
    "scan and remat": {"scan": True, "remat": True},
}


@functools.cache
def outputs_and_gradients(**form):
    model = small(layer_scale=0.5, num_registers=1, **form)
    images = random_images(model)

    def loss(params):
        logits, features = model.apply({"params": params}, images, return_features=True)
        return jnp.sum(jnp.sin(logits)), {**features, "logits": logits}

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(random_params(model))
    return outputs, flatten(gradients)


@pytest.mark.parametrize("form", FORMS)
def test_remat_and_scan_change_nothing_but_the_schedule(form):
    outputs, gradients = outputs_and_gradients()
    outputs_too, gradients_too = outputs_and_gradients(**FORMS[form])
    assert outputs.keys() == outputs_too.keys()
    assert gradients.keys() == gradients_too.keys()
    for name in outputs:
        assert relative(outputs_too[name], outputs[name]) <= 1e-6, name
    for path in gradients:
        assert np.abs(gradients[path]).max() > 0, path
        assert relative(gradients_too[path], gradients[path]) <= 2e-5, path


@pytest.mark.parametrize("size", [(4, 20), (15, 11)])
def test_any_image_size(size):
    model = small(image_size=size)
    params, images = random_params(model), random_images(model)
    assert model.grid == (size[0] // 4, size[1] // 4)
    assert params["pos_embed"].shape == (1, 1 + model.grid[0] * model.grid[1], 16)
    logits = jax.jit(model.apply)({"params": params}, images)
    assert logits.shape == (4, 3)
    whole = (size[0] // 4 * 4, size[1] // 4 * 4)  # what fills no patch is not seen
    cut = jax.jit(small(image_size=whole).apply)(
        {"params": params}, images[:, : whole[0], : whole[1]]
    )
    np.testing.assert_array_equal(logits, cut)


def test_an_image_of_another_size_is_refused():
    model = small()
    with pytest.raises(ValueError, match=r"images are \(8, 12\), the model takes \(12, 8\)"):
        model.apply({"params": random_params(model)}, jnp.zeros((1, 8, 12, 3)))


def test_normalization_is_inside():
    images = random_images(small())
    mean, std = np.array([0.1, 0.4, 0.6], np.float32), np.array([0.2, 0.3, 0.9], np.float32)
    raw = small(mean=(0.0,) * 3, std=(1.0,) * 3)
    own = small(mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    params = random_params(raw)
    normalized = (images - mean.reshape(1, 1, 1, 3)) / std.reshape(1, 1, 1, 3)
    ours = jax.jit(own.apply)({"params": params}, images)
    assert relative(ours, jax.jit(raw.apply)({"params": params}, normalized)) <= 1e-6


def test_bfloat16_stays_near_float32_and_its_head_is_float32():
    model, half = small(), small(dtype=jnp.bfloat16)
    params, images = random_params(model), random_images(model)
    exact = jax.jit(model.apply)({"params": params}, images)
    logits, features = jax.jit(lambda p, x: half.apply({"params": p}, x, return_features=True))(
        params, images
    )
    assert features["block_0"].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert 1e-6 < relative(logits, exact) < 0.1
    kinds = {leaf.dtype for leaf in jax.tree.leaves(abstract(half))}
    assert kinds == {jnp.dtype("float32")}


@pytest.mark.parametrize("scan", [False, True])
def test_randomness_in_training_is_a_function_of_the_key(scan):
    model = small(scan=scan, drop_path=0.5, dropout=0.3)
    params, images = random_params(model), random_images(model, count=16)
    apply = jax.jit(
        lambda params, key: model.apply(
            {"params": params}, images, train=True, rngs={"dropout": key}
        )
    )
    first = apply(params, jax.random.key(1))
    np.testing.assert_array_equal(first, apply(params, jax.random.key(1)))
    assert relative(first, apply(params, jax.random.key(2))) > 1e-3


def test_rates_act_in_training_only():
    model = small(drop_path=0.5, dropout=0.3)
    params, images = random_params(model), random_images(model)
    logits = jax.jit(model.apply)({"params": params}, images)
    np.testing.assert_array_equal(logits, jax.jit(small().apply)({"params": params}, images))


def test_drop_path_drops_whole_branches_of_single_images_and_rescales():
    """Of one block at the last depth, each image's output is one of four combinations."""
    model = small(depth=2, drop_path=0.25)
    params, images = random_params(model), random_images(model, count=1)
    images = jnp.repeat(images, 64, axis=0)
    _, features = jax.jit(
        lambda params: model.apply(
            {"params": params},
            images,
            train=True,
            return_features=True,
            rngs={"dropout": jax.random.key(0)},
        )
    )(params)
    first = np.asarray(features["block_0"])
    np.testing.assert_allclose(first, first[:1].repeat(64, 0), rtol=1e-5, atol=1e-5)  # rate 0
    change = np.asarray(features["block_1"]) - first
    kinds = np.unique(np.round(change[:, 0, 0], 3))
    assert 2 <= len(kinds) <= 4
    kept = np.abs(change).max(axis=(1, 2)) > 0
    assert 0.8 < kept.mean() <= 1  # both branches fall with probability 1/16


def test_layers_for_rate_decay():
    model = small(pre_norm=True, num_registers=1)
    layers = {path: model.layer_of(path) for path in flatten(abstract(model))}
    assert max(layers.values()) == model.num_layers - 1
    assert {layers[name] for name in ("pos_embed", "cls_token", "norm_pre/scale")} == {0}
    assert layers["block_1/mlp/fc1/kernel"] == 2
    assert layers["norm/scale"] == layers["block_1/norm1/scale"]  # as in timm
    assert layers["head/kernel"] == small(norm_after_pool=True).layer_of("norm/scale") == 3


@pytest.mark.parametrize("variant", ["b16", "x/16", "b/15", "/16", "b/16/2"])
def test_unknown_variants_name_the_known(variant):
    with pytest.raises(UserError, match="for example 'b/16'"):
        variant_arguments(variant)


@pytest.mark.parametrize("name", VARIANTS)
def test_timms_names_are_variants(name):
    family, arguments = find_variant(f"{name}.some_tag")
    assert (family, arguments) == ("vit", VARIANTS[name])
    arguments |= {"depth": 1, "num_classes": 1, "image_size": (arguments["patch_size"],) * 2}
    shapes = flatten(abstract(build_vit(**arguments)))
    assert shapes["patch_embed/kernel"].shape[-1] == arguments["width"]


def test_a_variants_arguments_are_the_callers_to_change():
    find_variant("vit_base_patch16_224")[1]["depth"] = 1
    assert find_variant("vit_base_patch16_224")[1]["depth"] == 12


@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_channels(channels):
    model = small(in_channels=channels, mean=(0.5,) * channels, std=(0.2,) * channels)
    params, images = random_params(model), random_images(model)
    assert params["patch_embed"]["kernel"].shape == (4, 4, channels, 16)
    assert jax.jit(model.apply)({"params": params}, images).shape == (4, 3)


def test_an_unknown_pooling_is_named():
    with pytest.raises(UserError, match="'cls' is none of token, avg"):
        abstract(small(pool="cls"))
