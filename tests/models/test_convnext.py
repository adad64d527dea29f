"""ConvNeXt without torch: names, counts, features, strides, and the forms that must agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.models.convnext import ConvNeXt, GlobalResponseNorm, variant
from vision_jax.trees.paths import flatten

SMALL = {"num_classes": 3, "depths": (1, 2), "widths": (8, 12)}
FORMS = {
    "v1": {},
    "v2": {"grn": True, "layer_scale": None},
    "overlapping stem": {"stem_widths": (6,)},
    "patches of 2": {"patch_size": 2, "first_stride": 2},
    "hidden head": {"head_hidden": 5, "kernel_size": 3, "mlp_ratio": 2},
    "norm first": {"norm_before_pool": True, "conv_mlp": True},
}


def small(**arguments):
    return ConvNeXt(**{**SMALL, **arguments})


def abstract(model, size=(33, 46)):
    images = jnp.zeros((1, *size, model.in_channels))
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        scale = 0.3 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(rng.normal(size=leaf.shape) * scale, jnp.float32)

    return jax.tree.map(draw, abstract(model))


def random_images(model, size=(33, 46), count=2):
    shape = (count, *size, model.in_channels)
    return jnp.asarray(np.random.default_rng(1).random(shape), jnp.float32)


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


STAGE = """
block_0/conv_dw/bias (12,)
block_0/conv_dw/kernel (7, 7, 1, 12)
block_0/layer_scale (12,)
block_0/mlp/fc1/bias (48,)
block_0/mlp/fc1/kernel (12, 48)
block_0/mlp/fc2/bias (12,)
block_0/mlp/fc2/kernel (48, 12)
block_0/norm/bias (12,)
block_0/norm/scale (12,)
downsample_conv/bias (12,)
downsample_conv/kernel (2, 2, 8, 12)
downsample_norm/bias (8,)
downsample_norm/scale (8,)
"""
ENDS = """
head/bias (3,)
head/kernel (12, 3)
norm/bias (12,)
norm/scale (12,)
stem_conv/bias (8,)
stem_conv/kernel (4, 4, 3, 8)
stem_norm/bias (8,)
stem_norm/scale (8,)
"""


def test_parameter_names_are_public_and_pinned():
    """Renaming one breaks every checkpoint: change these lists only with a migration."""
    found = sorted(
        f"{path} {x.shape}" for path, x in flatten(abstract(small(depths=(1, 1)))).items()
    )
    inside = [f"stage_1/{line}" for line in STAGE.split("\n")[1:-1]]
    assert [line for line in found if "stage_0" not in line] == sorted(
        [*ENDS.split("\n")[1:-1], *inside]
    )
    second = flatten(abstract(small(**FORMS["v2"])))
    assert second["stage_0/block_0/mlp/grn/scale"].shape == (32,)
    assert second["stage_0/block_0/mlp/grn/bias"].shape == (32,)
    assert not any("layer_scale" in path for path in second)


# timm's numbers with 1000 classes.
COUNTS = {
    "convnext_atto": 3_695_520,
    "convnext_tiny": 28_589_128,
    "convnext_base": 88_591_464,
    "convnextv2_atto": 3_708_400,
    "convnextv2_tiny": 28_635_496,
    "convnextv2_base": 88_717_800,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    shapes = abstract(ConvNeXt(num_classes=1000, **variant(name)), (64, 64))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[name]
    assert variant("convnext_mine") is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(64, 32), (35, 46)])
def test_features_and_strides(form, size):
    """A patch convolution leaves out what is no whole patch, as torch's does."""
    model = small(**FORMS[form])
    images = jnp.zeros((1, *size, 3))
    logits, features = jax.eval_shape(
        lambda key: model.init_with_output(key, images, return_features=True)[0], jax.random.key(0)
    )
    assert logits.shape == (1, 3)
    assert set(features) == {"stem", "stage_0", "stage_1", "pooled"}
    assert model.pyramid == (("stage_0", 4), ("stage_1", 8))
    for (name, stride), width in zip(model.pyramid, (8, 12), strict=True):
        overlap = form == "overlapping stem"  # its convolutions are padded
        first = [-(-side // 4) if overlap else side // 4 for side in size]
        grid = tuple(side // (stride // 4) for side in first)
        assert features[name].shape == (1, *grid, width), name
    assert features["pooled"].shape == (1, 5 if form == "hidden head" else 12)


@pytest.mark.parametrize("form", FORMS)
def test_layers_cover_every_parameter_in_order(form):
    model = small(**FORMS[form])
    layers = {path: model.layer_of(path) for path in flatten(abstract(model))}
    assert model.num_layers == 5
    assert set(layers.values()) == set(range(5))
    assert layers[model.stem] == layers["stem_norm/scale"] == 0
    assert layers["stage_1/downsample_conv/kernel"] == layers["stage_1/block_0/norm/bias"] == 2
    assert layers["stage_1/block_1/mlp/fc1/kernel"] == 3
    assert layers["norm/scale"] == (3 if model.norm_before_pool else 4)
    assert layers["head/bias"] == 4


def test_response_normalization_is_its_definition():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    params = {"scale": jnp.linspace(-1, 1, 5), "bias": jnp.linspace(0, 2, 5)}
    norms = np.sqrt((x.astype(np.float64) ** 2).sum((1, 2), keepdims=True))
    response = norms / (norms.mean(-1, keepdims=True) + 1e-6)
    row = {name: np.asarray(value).reshape(1, 1, 1, 5) for name, value in params.items()}
    expected = x + row["scale"] * x * response + row["bias"]
    assert relative(GlobalResponseNorm().apply({"params": params}, x), expected) <= 1e-6


def test_no_head_and_other_channels():
    channels = {"in_channels": 4, "mean": (0.5,) * 4, "std": (0.5,) * 4}
    whole, headless = small(**channels), small(**channels, num_classes=0)
    params, images = random_params(whole), random_images(whole)
    assert params["stem_conv"]["kernel"].shape == (4, 4, 4, 8)
    _, features = jax.jit(lambda p, x: whole.apply({"params": p}, x, return_features=True))(
        params, images
    )
    bare = {name: tree for name, tree in params.items() if name != "head"}
    assert set(flatten(bare)) == set(flatten(abstract(headless)))
    pooled = jax.jit(headless.apply)({"params": bare}, images)
    assert relative(pooled, features["pooled"]) <= 1e-6


@pytest.mark.parametrize("form", ["v1", "v2"])
def test_gradients_and_remat(form):
    def results(**more):
        model = small(**FORMS[form], **more)
        params, images = random_params(model), random_images(model)

        def loss(params):
            logits = model.apply({"params": params}, images)
            return jnp.sin(logits).sum(), logits

        gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
        return logits, flatten(gradients)

    logits, gradients = results()
    logits_too, gradients_too = results(remat=True)
    assert relative(logits_too, logits) <= 1e-6
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path
        assert relative(gradients_too[path], gradient) <= 1e-4, path


def test_rates_act_in_training_only_and_by_the_key():
    model, plain = small(drop_path=0.5, dropout=0.3), small()
    params, images = random_params(model), random_images(model)
    still = jax.jit(model.apply)({"params": params}, images)
    assert relative(still, jax.jit(plain.apply)({"params": params}, images)) <= 1e-6
    train = jax.jit(
        lambda key: model.apply({"params": params}, images, train=True, rngs={"dropout": key})
    )
    first = train(jax.random.key(1))
    np.testing.assert_array_equal(first, train(jax.random.key(1)))
    assert relative(first, train(jax.random.key(2))) > 1e-3
