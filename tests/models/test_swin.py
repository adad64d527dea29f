"""Swin without torch: windows, masks and indices, and images of any size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.models.swin import (
    Swin,
    plan_windows,
    position_index,
    position_offsets,
    shift_mask,
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


@pytest.mark.long
@pytest.mark.parametrize(
    ("library", "version"),
    [
        ("timm", 1),
        ("transformers", 2),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("timm", 2), ("torchvision", 1), ("torchvision", 2), ("transformers", 1))
        ),
    ],
)
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


@pytest.mark.long
def test_adapters_on_parts_of_the_second_versions_attention():
    model = small(version=2)
    params, images = random_params(model), random_images(model)
    rules = (r".*/attn/qkv/kernel",)
    tree = lora.attach(params, rules, key=jax.random.key(0), rank=2, alpha=4.0, qkv_parts="q,v")
    base, adapters = lora.detach(tree)
    moved = {
        path: dataclasses.replace(leaf, b=jnp.full_like(leaf.b, 0.1))
        for path, leaf in adapters.items()
    }
    tree = lora.apply_adapters(base, moved)
    apply = jax.jit(model.apply)
    logits = apply({"params": tree}, images)
    assert relative(logits, apply({"params": params}, images)) > 1e-3
    assert relative(logits, apply({"params": lora.merge(tree)}, images)) <= 1e-5


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
