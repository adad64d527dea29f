"""RF-DETR without torch: names, counts, groups of queries, masks, adapters, one compile."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.models.families import FAMILIES, find_variant
from vision_jax.models.rf_detr import VARIANTS, RfDetr, variant
from vision_jax.trees import lora
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


# With 91 classes, as the published ones; the mask token, of no effect, is none of ours.
COUNTS = {
    "rf_detr_nano": 30_466_914,
    "rf_detr_small": 32_110_786,
    "rf_detr_medium": 33_687_074,
    "rf_detr_large": 33_932_834,
    "rf_detr_base": 32_174_146,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_and_shapes(name):
    model = RfDetr(num_classes=91, **variant(name))
    side, depth = model.image_size[0], model.decoder_depth
    params = abstract(model, side)
    assert sum(x.size for x in jax.tree.leaves(params)) == COUNTS[name]
    assert set(VARIANTS) == set(COUNTS)
    assert find_variant(name) == ("rf_detr", VARIANTS[name])
    assert FAMILIES["rf_detr"].task == "detection"
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


NAMES = """
backbone/block_1/attn/proj/bias (24,)
backbone/block_1/attn/proj/kernel (24, 24)
backbone/block_1/attn/qkv/bias (72,)
backbone/block_1/attn/qkv/kernel (24, 72)
backbone/block_1/layer_scale1 (24,)
backbone/block_1/layer_scale2 (24,)
backbone/block_1/mlp/fc1/bias (48,)
backbone/block_1/mlp/fc1/kernel (24, 48)
backbone/block_1/mlp/fc2/bias (24,)
backbone/block_1/mlp/fc2/kernel (48, 24)
backbone/block_1/norm1/bias (24,)
backbone/block_1/norm1/scale (24,)
backbone/block_1/norm2/bias (24,)
backbone/block_1/norm2/scale (24,)
backbone/cls_token (1, 1, 24)
backbone/norm/bias (24,)
backbone/norm/scale (24,)
backbone/patch_embed/bias (24,)
backbone/patch_embed/kernel (4, 4, 3, 24)
backbone/pos_embed (1, 65, 24)
box_embed (12, 4)
box_head/fc1/bias (16,)
box_head/fc1/kernel (16, 16)
box_head/fc2/bias (16,)
box_head/fc2/kernel (16, 16)
box_head/fc3/bias (4,)
box_head/fc3/kernel (16, 4)
class_head/bias (5,)
class_head/kernel (16, 5)
decoder_1/cross_attn/offsets/bias (16,)
decoder_1/cross_attn/offsets/kernel (16, 16)
decoder_1/cross_attn/out/bias (16,)
decoder_1/cross_attn/out/kernel (16, 16)
decoder_1/cross_attn/value/bias (16,)
decoder_1/cross_attn/value/kernel (16, 16)
decoder_1/cross_attn/weights/bias (8,)
decoder_1/cross_attn/weights/kernel (16, 8)
decoder_1/fc1/bias (32,)
decoder_1/fc1/kernel (16, 32)
decoder_1/fc2/bias (16,)
decoder_1/fc2/kernel (32, 16)
decoder_1/norm1/bias (16,)
decoder_1/norm1/scale (16,)
decoder_1/norm2/bias (16,)
decoder_1/norm2/scale (16,)
decoder_1/norm3/bias (16,)
decoder_1/norm3/scale (16,)
decoder_1/self_attn/k/bias (16,)
decoder_1/self_attn/k/kernel (16, 16)
decoder_1/self_attn/out/bias (16,)
decoder_1/self_attn/out/kernel (16, 16)
decoder_1/self_attn/q/bias (16,)
decoder_1/self_attn/q/kernel (16, 16)
decoder_1/self_attn/v/bias (16,)
decoder_1/self_attn/v/kernel (16, 16)
decoder_norm/bias (16,)
decoder_norm/scale (16,)
position_fc1/bias (16,)
position_fc1/kernel (32, 16)
position_fc2/bias (16,)
position_fc2/kernel (16, 16)
projector/block_0/conv1/kernel (3, 3, 8, 8)
projector/block_0/conv2/kernel (3, 3, 8, 8)
projector/block_0/norm1/bias (8,)
projector/block_0/norm1/scale (8,)
projector/block_0/norm2/bias (8,)
projector/block_0/norm2/scale (8,)
projector/conv1/kernel (1, 1, 48, 16)
projector/conv2/kernel (1, 1, 24, 16)
projector/norm/bias (16,)
projector/norm/scale (16,)
projector/norm1/bias (16,)
projector/norm1/scale (16,)
projector/norm2/bias (16,)
projector/norm2/scale (16,)
proposals_1/box_head/fc1/bias (16,)
proposals_1/box_head/fc1/kernel (16, 16)
proposals_1/box_head/fc2/bias (16,)
proposals_1/box_head/fc2/kernel (16, 16)
proposals_1/box_head/fc3/bias (4,)
proposals_1/box_head/fc3/kernel (16, 4)
proposals_1/class_head/bias (5,)
proposals_1/class_head/kernel (16, 5)
proposals_1/norm/bias (16,)
proposals_1/norm/scale (16,)
proposals_1/proj/bias (16,)
proposals_1/proj/kernel (16, 16)
query_embed (12, 16)
"""


def test_parameter_names_are_public_and_pinned():
    """Renaming one breaks every checkpoint: change this list only with a migration."""
    found = flatten(abstract(small()))
    again = ("decoder_0/", "proposals_0/", "backbone/block_0/")
    listed = [
        f"{path} {x.shape}" for path, x in sorted(found.items()) if not path.startswith(again)
    ]
    assert listed == NAMES.split("\n")[1:-1]


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


def test_steps_are_one_compile_with_finite_gradients_and_remat_changes_nothing():
    backbone = {"backbone_depth": 1, "feature_depths": (1,), "global_blocks": (0,)}
    rest = {"dropout": 0.2, "drop_path": 0.2, "decoder_depth": 1, **backbone}
    params, images = random_params(small(**rest)), random_images()

    def step_of(**form):
        model = small(**rest, **form)

        def loss(params, images, key):
            keys = {"dropout": key}
            outputs = model.apply({"params": params}, images, train=True, rngs=keys)
            return sum(jnp.sin(x).sum() for x in outputs.values())

        return jax.jit(jax.grad(loss))

    step = step_of()
    gradients = flatten(step(params, images, jax.random.key(0)))
    again = flatten(step_of(remat=True)(params, images, jax.random.key(0)))
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all(), path
        if not path.endswith("k/bias"):  # softmax does not see it
            assert np.abs(gradient).max() > 0, path
        np.testing.assert_allclose(again[path], gradient, rtol=1e-3, atol=1e-4, err_msg=path)
    for seed in (1, 2):
        step(params, random_images(seed=seed), jax.random.key(seed))
    assert step._cache_size() == 1
    other = step(params, images, jax.random.key(1))
    assert difference(other, step(params, images, jax.random.key(0))) > 1e-3


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


def test_half_precision_keeps_wide_heads():
    outputs = jax.eval_shape(
        lambda params: small(dtype=jnp.bfloat16).apply(
            {"params": params}, random_images(), train=True
        ),
        abstract(small()),
    )
    assert {x.dtype for x in outputs.values()} == {jnp.dtype(jnp.float32)}


def test_adapters_fit_every_linear_layer():
    model, images = small(decoder_depth=1), random_images()
    params = random_params(model)
    rules = (
        r"backbone/block_\d/(attn|mlp)/.*kernel",
        r"decoder_\d/(self|cross)_attn/.*kernel",
        r"projector/.*kernel",
        r"proposals_0/proj/kernel",
    )
    attached = lora.attach(params, rules, key=jax.random.key(0), rank=2, alpha=4.0)
    base, adapters = lora.detach(attached)
    assert len(adapters) == 2 * 4 + 8 + 4 + 1
    trained = {
        path: jax.tree.map(lambda x: x + 0.05, adapter) for path, adapter in adapters.items()
    }
    attached = lora.apply_adapters(base, trained)
    apply = jax.jit(lambda params: model.apply({"params": params}, images))
    merged = apply(lora.merge(attached))
    assert difference(apply(attached), merged) <= 1e-5
    assert difference(merged, apply(base)) > 1e-3
