"""RF-DETR without torch: what its variants predict, groups of queries, masks, and its start."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.models.families import find_variant
from vision_jax.models.rf_detr import VARIANTS, RfDetr, variant
from vision_jax.trees.paths import flatten

SMALL = {
    "num_classes": 5,
    "image_size": (32, 32),
    "position_grid": 8,
    "decoder_depth": 2,
    "patch_size": 4,
    "feature_depths": (1, 2),
    "global_blocks": (1,),
    "backbone_width": 24,
    "backbone_depth": 2,
    "backbone_heads": 2,
    "backbone_mlp_width": 48,
    "width": 16,
    "projector_width": 8,
    "projector_blocks": 1,
    "num_queries": 6,
    "num_groups": 2,
    "num_heads": 2,
    "cross_heads": 4,
    "mlp_width": 32,
}


def small(**arguments):
    return RfDetr(**{**SMALL, **arguments})


def abstract(model, side=32):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        noise = rng.normal(size=leaf.shape)
        value = 0.3 * noise if leaf.ndim == 1 else noise / noise[..., 0].size ** 0.5
        return jnp.asarray(value, leaf.dtype)

    return jax.tree.map(draw, abstract(model))


def random_images(side=32, count=2, seed=1):
    return jnp.asarray(np.random.default_rng(seed).random((count, side, side, 3)), jnp.float32)


def difference(ours, theirs):
    """Largest difference relative to the largest value, over all leaves."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        name if name == "rf_detr_nano" else pytest.param(name, marks=pytest.mark.long)
        for name in VARIANTS
    ],
)
def test_predictions_of_the_variants(name):
    model = RfDetr(num_classes=91, **variant(name))
    side, depth = model.image_size[0], model.decoder_depth
    params = abstract(model, side)
    assert find_variant(name) == ("rf_detr", VARIANTS[name])
    for train, queries in ((False, 300), (True, 3900)):
        outputs = jax.eval_shape(
            lambda params, images, train=train: model.apply(
                {"params": params}, images, train=train
            ),
            params,
            jnp.zeros((2, side, side, 3)),
        )
        assert {name: x.shape for name, x in outputs.items()} == {
            "logits": (depth, 2, queries, 91),
            "boxes_cxcywh_01": (depth, 2, queries, 4),
            "encoder_logits": (2, queries, 91),
            "encoder_boxes_cxcywh_01": (2, queries, 4),
        }


@pytest.mark.long
def test_layers_decay_over_the_backbone_alone():
    """rfdetr's exponents with 12 blocks: embeddings 14, block i 13 - i, everything else 0."""
    model = RfDetr(num_classes=91, **variant("rf_detr_nano"))
    layers = {path: model.layer_of(path) for path in flatten(abstract(model, 384))}
    top = model.num_layers - 1
    assert top == 14
    assert set(layers.values()) == {*range(13), top}
    assert layers[model.stem] == layers["backbone/pos_embed"] == layers["backbone/cls_token"] == 0
    assert layers["backbone/block_11/norm2/bias"] == 12
    rest = {path for path, layer in layers.items() if layer == top}
    assert {path for path in rest if path.startswith("backbone")} == {
        "backbone/norm/bias",
        "backbone/norm/scale",
    }
    base = RfDetr(num_classes=91, **variant("rf_detr_base"))
    assert base.num_layers - 1 - base.layer_of("backbone/block_0/norm1/bias") == 12


@pytest.mark.long
def test_the_first_group_of_training_is_the_prediction():
    model = small()
    params, images = random_params(model), random_images()
    with jax.enable_x64(True):
        model = small(dtype=jnp.float64)
        params, images = (jax.tree.map(lambda x: x.astype("float64"), x) for x in (params, images))
        apply = jax.jit(model.apply, static_argnames="train")
        alone = apply({"params": params}, images, train=False)
        groups = apply({"params": params}, images, train=True)
        first = jax.tree.map(lambda x: x[..., : model.num_queries, :], groups)
        assert difference(first, alone) <= 1e-13
        second = jax.tree.map(lambda x: x[..., model.num_queries :, :], groups)
        assert difference(second, alone) > 1e-3


@pytest.mark.long
def test_masks():
    """None is all of the image; padding's content is nothing; one that is all padding is finite."""
    model = small()
    params, images = random_params(model), random_images(count=3)
    apply = jax.jit(lambda params, *given: model.apply({"params": params}, *given))
    mask = jnp.ones((3, 32, 32), bool)
    assert difference(apply(params, images, mask), apply(params, images)) == 0
    mask = mask.at[1, 24:].set(False).at[1, :, 16:].set(False).at[2].set(False)
    padded = apply(params, images, mask)
    noise = jnp.where(mask[..., None], images, random_images(count=3, seed=5) * 1e3)
    jax.tree.map(np.testing.assert_array_equal, apply(params, noise, mask), padded)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(padded))
    rest = jax.tree.map(lambda x: jnp.delete(x, 1, axis=x.ndim - 3)[..., :1, :, :], padded)
    plain = jax.tree.map(lambda x: x[..., :1, :, :], apply(params, images))
    assert difference(rest, plain) == 0


@pytest.mark.long
def test_the_start_is_proposals_of_one_percent():
    """Heads that predict no shift and a probability of 0.01 around it."""
    model, images = small(), random_images()
    outputs, variables = jax.jit(model.init_with_output)(jax.random.key(0), images)
    params = variables["params"]
    boxes = outputs["encoder_boxes_cxcywh_01"]
    np.testing.assert_allclose(boxes[..., 2:], 0.05, rtol=1e-6)
    cells = np.asarray(boxes[..., :2]) * 8 - 0.5
    np.testing.assert_allclose(cells, cells.round(), atol=1e-5)
    for layer in outputs["boxes_cxcywh_01"]:
        np.testing.assert_allclose(layer, boxes, rtol=1e-5)
    np.testing.assert_allclose(jax.nn.sigmoid(params["class_head"]["bias"]), 0.01, rtol=1e-5)


@pytest.mark.long
def test_other_sizes_share_the_weights():
    model, params = small(), abstract(small())
    apply = partial(model.apply, return_features=True)
    for side in (24, 48):
        _, features = jax.eval_shape(apply, {"params": params}, random_images(side))
        assert features["memory"].shape == (2, side // 4, side // 4, 16)
        names = ("feature_0", "feature_1", "memory", "reference", "decoder_0", "decoder_1")
        assert set(features) == set(names)
    for shape, message in (((32, 40), "squares of a multiple of 8"), ((8, 8), "4 cells for 6")):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(apply, {"params": params}, jnp.zeros((1, *shape, 3)))
