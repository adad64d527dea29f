"""ConvNeXt's cells of patches, its norms, and its response normalization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.models.convnext import ConvNeXt, GlobalResponseNorm

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


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


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


def test_response_normalization_is_its_definition():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    params = {"scale": jnp.linspace(-1, 1, 5), "bias": jnp.linspace(0, 2, 5)}
    norms = np.sqrt((x.astype(np.float64) ** 2).sum((1, 2), keepdims=True))
    response = norms / (norms.mean(-1, keepdims=True) + 1e-6)
    row = {name: np.asarray(value).reshape(1, 1, 1, 5) for name, value in params.items()}
    expected = x + row["scale"] * x * response + row["bias"]
    assert relative(GlobalResponseNorm().apply({"params": params}, x), expected) <= 1e-6


def test_a_norm_before_the_pooling_belongs_to_the_last_block():
    assert [small(norm_before_pool=early).layer_of("norm/scale") for early in (True, False)] == [
        3,
        4,
    ]
