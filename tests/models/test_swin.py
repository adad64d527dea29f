"""Swin without torch: names, counts, windows and masks, and the forms that must agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.models.swin import (
    VARIANTS,
    Swin,
    plan_windows,
    position_index,
    position_offsets,
    shift_mask,
    variant,
)
from vision_jax.trees import lora
from vision_jax.trees.paths import flatten

SMALL = {
    "num_classes": 3,
    "image_size": (24, 40),
    "width": 8,
    "depths": (2, 2),
    "num_heads": (1, 2),
    "windows": ((2, 3), (2, 2)),
}


def small(**arguments):
    return Swin(**{**SMALL, **arguments})


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


FIRST = """
head/bias (3,)
head/kernel (16, 3)
norm/bias (16,)
norm/scale (16,)
patch_embed/bias (8,)
patch_embed/kernel (4, 4, 3, 8)
patch_norm/bias (8,)
patch_norm/scale (8,)
stage_0/block_0/attn/proj/bias (8,)
stage_0/block_0/attn/proj/kernel (8, 8)
stage_0/block_0/attn/qkv/bias (24,)
stage_0/block_0/attn/qkv/kernel (8, 24)
stage_0/block_0/attn/relative_position_bias_table (15, 1)
stage_0/block_0/mlp/fc1/bias (32,)
stage_0/block_0/mlp/fc1/kernel (8, 32)
stage_0/block_0/mlp/fc2/bias (8,)
stage_0/block_0/mlp/fc2/kernel (32, 8)
stage_0/block_0/norm1/bias (8,)
stage_0/block_0/norm1/scale (8,)
stage_0/block_0/norm2/bias (8,)
stage_0/block_0/norm2/scale (8,)
stage_1/block_0/attn/proj/bias (16,)
stage_1/block_0/attn/proj/kernel (16, 16)
stage_1/block_0/attn/qkv/bias (48,)
stage_1/block_0/attn/qkv/kernel (16, 48)
stage_1/block_0/attn/relative_position_bias_table (9, 2)
stage_1/block_0/mlp/fc1/bias (64,)
stage_1/block_0/mlp/fc1/kernel (16, 64)
stage_1/block_0/mlp/fc2/bias (16,)
stage_1/block_0/mlp/fc2/kernel (64, 16)
stage_1/block_0/norm1/bias (16,)
stage_1/block_0/norm1/scale (16,)
stage_1/block_0/norm2/bias (16,)
stage_1/block_0/norm2/scale (16,)
stage_1/downsample/norm/bias (32,)
stage_1/downsample/norm/scale (32,)
stage_1/downsample/reduction/kernel (32, 16)
"""
SECOND = """
stage_1/block_0/attn/cpb_mlp/heads/kernel (512, 2)
stage_1/block_0/attn/cpb_mlp/hidden/bias (512,)
stage_1/block_0/attn/cpb_mlp/hidden/kernel (2, 512)
stage_1/block_0/attn/logit_scale (2, 1, 1)
stage_1/block_0/attn/proj/bias (16,)
stage_1/block_0/attn/proj/kernel (16, 16)
stage_1/block_0/attn/qkv/kernel (16, 48)
stage_1/block_0/attn/qkv_bias (48,)
stage_1/downsample/norm/bias (16,)
stage_1/downsample/norm/scale (16,)
stage_1/downsample/reduction/kernel (32, 16)
"""


def test_parameter_names_are_public_and_pinned():
    """Renaming one breaks every checkpoint: change these lists only with a migration."""

    def found(**arguments):
        paths = flatten(abstract(small(depths=(1, 1), **arguments)))
        return [f"{path} {leaf.shape}" for path, leaf in sorted(paths.items())]

    assert found() == FIRST.split("\n")[1:-1]
    second = [name for name in found(version=2) if "stage_1/block_0/attn" in name or "down" in name]
    assert second == SECOND.split("\n")[1:-1]


# timm's numbers with 1000 classes.
COUNTS = {
    "swin_tiny_patch4_window7_224": 28_288_354,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
    "swin_large_patch4_window7_224": 196_532_476,
    "swin_base_patch4_window12_384": 87_903_584,
    "swin_large_patch4_window12_384": 196_735_516,
    "swin_s3_tiny_224": 28_328_674,
    "swin_s3_small_224": 49_737_298,
    "swin_s3_base_224": 71_125_762,
    "swinv2_tiny_window8_256": 28_347_154,
    "swinv2_tiny_window16_256": 28_347_154,
    "swinv2_small_window8_256": 49_728_418,
    "swinv2_small_window16_256": 49_728_418,
    "swinv2_base_window8_256": 87_918_816,
    "swinv2_base_window16_256": 87_918_816,
    "swinv2_base_window12_192": 87_918_816,
    "swinv2_base_window12to16_192to256": 87_918_816,
    "swinv2_base_window12to24_192to384": 87_918_816,
    "swinv2_large_window12_192": 196_739_932,
    "swinv2_large_window12to16_192to256": 196_739_932,
    "swinv2_large_window12to24_192to384": 196_739_932,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts(name):
    arguments = variant(name)
    model = Swin(num_classes=1000, **arguments)
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract(model)))
    if model.version == 2:  # the key's bias, which torchvision counts and timm hasn't
        count -= sum(n * model.width * 2**stage for stage, n in enumerate(model.depths))
    assert count == COUNTS[name]
    assert variant("swinv2_cr_tiny_224") is None


PLANS = [  # of 7 x 7 windows on 15 x 11 tokens: grid, window and shift of each stage
    ("timm", 1, [((14, 10), (7, 7), (3, 3)), ((7, 5), (7, 5), (0, 0)), ((4, 3), (4, 3), (0, 0))]),
    (
        "torchvision",
        1,
        [((14, 10), (7, 7), (3, 3)), ((7, 5), (7, 7), (0, 0)), ((4, 3), (7, 7), (0, 0))],
    ),
    (
        "transformers",
        1,
        [((15, 11), (7, 7), (3, 3)), ((8, 6), (7, 7), (0, 0)), ((4, 3), (7, 7), (0, 0))],
    ),
    (
        "transformers",
        2,
        [((15, 11), (7, 7), (3, 3)), ((8, 6), (7, 7), (0, 0)), ((4, 3), (3, 3), (0, 0))],
    ),
]


@pytest.mark.parametrize(("library", "version", "expected"), PLANS)
def test_windows_by_each_librarys_rules(library, version, expected):
    plan = plan_windows((58, 43), 4, ((7, 7),) * 3, library, version)
    assert [(stage.grid, stage.size, stage.shift) for stage in plan] == expected


def test_the_index_counts_offsets_by_rows():
    index = position_index((2, 3))
    assert index.shape == (6, 6)
    assert index[0, 0] == index[5, 5] == 7  # the middle of 3 x 5 offsets
    assert index[5, 0] == 14  # query one row and two columns after the key
    assert index[0, 5] == 0
    offsets = position_offsets((2, 3))
    np.testing.assert_allclose(offsets[2, 4], np.log2(9) / 3, rtol=1e-6)
    np.testing.assert_array_equal(offsets, -offsets[::-1, ::-1])
    assert not position_offsets((1, 1)).any()


def test_the_mask_parts_what_the_shift_brought_together():
    """By definition: on the map before the shift, neighbors are at the distance they have now."""
    rows, columns, window, shift = 6, 8, (3, 4), (1, 2)
    mask = shift_mask((rows, columns), window, shift)
    place = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    before = np.roll(place, (-shift[0], -shift[1]), (0, 1))
    before = before.reshape(2, 3, 2, 4, 2).transpose(0, 2, 1, 3, 4).reshape(4, 12, 2)
    now = place.reshape(2, 3, 2, 4, 2).transpose(0, 2, 1, 3, 4).reshape(4, 12, 2)
    moved = before - now  # alike for tokens that were neighbors before
    expected = (moved[:, :, None] != moved[:, None]).any(-1)
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
@pytest.mark.parametrize("version", [1, 2])
def test_features_and_gradients_at_any_size(library, version):
    model = small(
        library=library,
        version=version,
        image_size=(27, 21),
        windows=((3, 3),) * 2,
        in_channels=1,
        mean=(0.5,),
        std=(0.5,),
    )
    images, params = random_images(model), random_params(model)

    def loss(params):
        logits, features = model.apply({"params": params}, images, return_features=True)
        return jnp.sin(logits).sum(), (logits, features)

    (_, (logits, features)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    grid = (7, 6) if library == "transformers" else (6, 5)
    merged = tuple(-(-side // 2) for side in grid)
    shapes = {name: x.shape[1:] for name, x in features.items()}
    assert shapes == {
        "embed": (*grid, 8),
        "stage_0": (*grid, 8),
        "stage_1": (*merged, 16),
        "pooled": (16,),
    }
    assert model.pyramid == (("stage_0", 4), ("stage_1", 8))
    assert logits.shape == (2, 3)
    for path, gradient in flatten(gradients).items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path
        if path.endswith("qkv_bias"):  # v2's key has none
            assert not np.asarray(gradient).reshape(3, -1)[1].any()


@functools.cache
def outputs_and_gradients(version, **form):
    model = small(version=version, **form)
    images = random_images(model)

    def loss(params):
        logits, features = model.apply({"params": params}, images, return_features=True)
        return jnp.sum(jnp.sin(logits)), {**features, "logits": logits}

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(random_params(model))
    return outputs, flatten(gradients)


def test_remat_changes_nothing_but_the_schedule():
    outputs, gradients = outputs_and_gradients(1)
    outputs_too, gradients_too = outputs_and_gradients(1, remat=True)
    assert outputs.keys() == outputs_too.keys()
    assert gradients.keys() == gradients_too.keys()
    for name in outputs:
        assert relative(outputs_too[name], outputs[name]) <= 1e-6, name
    for path in gradients:
        assert relative(gradients_too[path], gradients[path]) <= 2e-5, path


@pytest.mark.parametrize("version", [1, 2])
def test_bfloat16_stays_near_float32_and_its_head_is_float32(version):
    half = small(version=version, dtype=jnp.bfloat16)
    params, images = random_params(half), random_images(half)
    logits, features = jax.jit(lambda p, x: half.apply({"params": p}, x, return_features=True))(
        params, images
    )
    assert features["stage_1"].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert 1e-6 < relative(logits, outputs_and_gradients(version)[0]["logits"]) < 0.1
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract(half))} == {jnp.dtype("float32")}


def test_rates_act_in_training_only_and_by_the_key():
    model = small(drop_path=0.5, dropout=0.3)
    params, images = random_params(model), random_images(model)
    plain = outputs_and_gradients(1)[0]["logits"]
    assert relative(jax.jit(model.apply)({"params": params}, images), plain) <= 1e-6
    train = jax.jit(
        lambda key: model.apply({"params": params}, images, train=True, rngs={"dropout": key})
    )
    first = train(jax.random.key(1))
    np.testing.assert_array_equal(first, train(jax.random.key(1)))
    assert relative(first, train(jax.random.key(2))) > 1e-3


@pytest.mark.parametrize(("version", "parts"), [(1, ""), (2, "q,v")])
def test_adapters_on_attention_and_mlp(version, parts):
    model = small(version=version)
    params, images = random_params(model), random_images(model)
    rules = (r".*/attn/(qkv|proj)/kernel", r".*mlp/fc\d/kernel")
    tree = lora.attach(params, rules, key=jax.random.key(0), rank=2, alpha=4.0, qkv_parts=parts)
    base, adapters = lora.detach(tree)
    kinds = {"qkv", "proj", "fc1", "fc2"}
    kernels = {path for path in flatten(params) if path.endswith("kernel")}
    assert set(adapters) == {path for path in kernels if path.split("/")[-2] in kinds}
    apply = jax.jit(model.apply)
    plain = outputs_and_gradients(version)[0]["logits"]
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
    model = small(version=2)
    layers = {path: model.layer_of(path) for path in flatten(abstract(model))}
    assert model.num_layers == 6
    assert {layers["patch_embed/kernel"], layers["patch_norm/scale"]} == {0}
    assert layers["stage_0/block_1/mlp/fc1/kernel"] == 2
    assert layers["stage_1/downsample/norm/scale"] == layers["stage_1/block_0/norm1/bias"] == 3
    assert layers["norm/scale"] == 4
    assert layers["head/kernel"] == 5


def test_normalization_is_inside():
    images = random_images(small())
    mean, std = np.float32([0.1, 0.4, 0.6]), np.float32([0.2, 0.3, 0.9])
    raw = small(mean=(0.0,) * 3, std=(1.0,) * 3)
    own = small(mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    params = random_params(raw)
    normalized = (images - mean.reshape(1, 1, 1, 3)) / std.reshape(1, 1, 1, 3)
    ours = jax.jit(own.apply)({"params": params}, images)
    assert relative(ours, jax.jit(raw.apply)({"params": params}, normalized)) <= 1e-6


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"library": "keras"}, "'keras' is none of timm, torchvision, transformers"),
        ({"library": "transformers"}, "2 x 3: transformers' are square"),
        ({"num_heads": (1, 2, 4)}, "depths, num_heads, windows say it by stage"),
        ({"version": 3}, "version is 1 or 2"),
    ],
)
def test_what_cannot_be_built_is_named(arguments, match):
    with pytest.raises(UserError, match=match):
        abstract(small(**arguments))


def test_an_image_of_another_size_is_refused():
    model = small()
    with pytest.raises(ValueError, match=r"images are \(40, 24\), the model takes \(24, 40\)"):
        model.apply({"params": random_params(model)}, jnp.zeros((1, 40, 24, 3)))
