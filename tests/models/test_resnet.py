"""ResNets without torch: names, counts, features, strides, and the forms that must agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.models.resnet import VARIANTS, ResNet, variant
from vision_jax.trees.paths import flatten

SMALL = {"num_classes": 3, "depths": (1, 2), "widths": (8, 16), "stem_width": 8}
FORMS = {
    "basic": {"block": "basic"},
    "bottleneck": {},
    "resnext": {"groups": 2, "base_width": 32},
    "d": {"stem_widths": (4, 6), "pooled_shortcut": True},
    "transformers": {"stride_first": True, "first_stride": 2},
    "no pool": {"stem_pool": False},
    "for CIFAR": {"stem_size": 3, "stem_pool": False},
}


def small(**arguments):
    return ResNet(**{**SMALL, **arguments})


def abstract(model, size=(33, 46)):
    images = jnp.zeros((1, *size, model.in_channels))
    return jax.eval_shape(model.init, jax.random.key(0), images)


def random_variables(model, seed=0):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.ndim == 0:
            return jnp.zeros((), jnp.int32)
        noise = rng.normal(size=leaf.shape)
        value = 1 + 0.1 * np.abs(noise) if leaf.ndim == 1 else noise / leaf[..., 0].size ** 0.5
        return jnp.asarray(value, jnp.float32)

    shaped = abstract(model)
    arrays = jax.tree.map(lambda leaf: np.empty(leaf.shape), shaped)
    return jax.tree.map(draw, arrays)


def random_images(model, size=(33, 46), count=2):
    shape = (count, *size, model.in_channels)
    return jnp.asarray(np.random.default_rng(1).random(shape), jnp.float32)


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


FIRST = """
bn1/bias (8,)
bn1/scale (8,)
conv1/kernel (7, 7, 3, 8)
head/bias (3,)
head/kernel (32, 3)
stage_0/block_0/bn1/bias (8,)
stage_0/block_0/bn1/scale (8,)
stage_0/block_0/bn2/bias (8,)
stage_0/block_0/bn2/scale (8,)
stage_0/block_0/bn3/bias (32,)
stage_0/block_0/bn3/scale (32,)
stage_0/block_0/conv1/kernel (1, 1, 8, 8)
stage_0/block_0/conv2/kernel (3, 3, 8, 8)
stage_0/block_0/conv3/kernel (1, 1, 8, 32)
stage_0/block_0/downsample_bn/bias (32,)
stage_0/block_0/downsample_bn/scale (32,)
stage_0/block_0/downsample_conv/kernel (1, 1, 8, 32)
"""


def test_parameter_names_are_public_and_pinned():
    """Renaming one breaks every checkpoint: change this list only with a migration."""
    variables = abstract(small(depths=(1,), widths=(8,)))
    found = [f"{path} {x.shape}" for path, x in sorted(flatten(variables["params"]).items())]
    assert found == FIRST.split("\n")[1:-1]
    norms = {path.rpartition("/")[0] for path in flatten(variables["params"]) if "bn" in path}
    wanted = {f"{norm}/{name}" for norm in norms for name in ("mean", "var", "count")}
    assert set(flatten(variables["batch_stats"])) == wanted


# timm's numbers with 1000 classes.
COUNTS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet50d": 25_576_264,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "wide_resnet50_2": 68_883_240,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    shapes = abstract(ResNet(num_classes=1000, **variant(name)), (64, 64))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[name]
    assert variant("resnet51") is None
    assert name in VARIANTS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(64, 32), (33, 46)])
def test_features_and_strides(form, size):
    model = small(**FORMS[form])
    images = jnp.zeros((1, *size, 3))
    logits, features = jax.eval_shape(
        lambda key: model.init_with_output(key, images, return_features=True)[0], jax.random.key(0)
    )
    assert logits.shape == (1, 3)
    assert set(features) == {"stem", "stage_0", "stage_1", "pooled"}
    expansion = 1 if form == "basic" else 4
    for (name, stride), width in zip(model.pyramid, (8, 16), strict=True):
        grid = tuple(-(-side // stride) for side in size)
        assert features[name].shape == (1, *grid, expansion * width), name
    assert features["pooled"].shape == (1, expansion * 16)


@pytest.mark.parametrize("form", FORMS)
def test_layers_cover_every_parameter_in_order(form):
    model = small(**FORMS[form])
    layers = {path: model.layer_of(path) for path in flatten(abstract(model)["params"])}
    assert model.num_layers == 5
    assert set(layers.values()) == set(range(5))
    assert layers[model.stem] == 0
    assert layers["stage_0/block_0/conv1/kernel"] == 1
    assert layers["stage_1/block_0/downsample_conv/kernel"] == 2
    assert layers["stage_1/block_1/bn1/scale"] == 3
    assert layers["head/bias"] == 4


def test_no_head_and_other_channels():
    whole, bare = small(in_channels=5, mean=(0.5,) * 5, std=(0.5,) * 5), {"num_classes": 0}
    headless = small(in_channels=5, mean=(0.5,) * 5, std=(0.5,) * 5, **bare)
    variables, images = random_variables(whole), random_images(whole)
    assert variables["params"]["conv1"]["kernel"].shape == (7, 7, 5, 8)
    _, features = jax.jit(lambda v, x: whole.apply(v, x, return_features=True))(variables, images)
    assert not any("head" in path for path in flatten(abstract(headless)))
    params = {name: tree for name, tree in variables["params"].items() if name != "head"}
    pooled = jax.jit(headless.apply)({**variables, "params": params}, images)
    assert relative(pooled, features["pooled"]) <= 1e-6


def test_training_gradients_and_remat():
    """Remat recomputes: the same outputs, gradients and statistics, each updated once."""

    def results(**form):
        model = small(stem_widths=(4, 4), pooled_shortcut=True, **form)
        variables, images = random_variables(model), random_images(model)

        def loss(params):
            state = {**variables, "params": params}
            logits, new = model.apply(state, images, train=True, mutable=["batch_stats"])
            return jnp.sin(logits).sum(), (logits, new["batch_stats"])

        gradients, (logits, stats) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
        return logits, flatten(gradients), flatten(stats)

    logits, gradients, stats = results()
    logits_too, gradients_too, stats_too = results(remat=True)
    assert relative(logits_too, logits) <= 1e-6
    assert {int(x) for path, x in stats.items() if path.endswith("count")} == {1}
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path
        assert relative(gradients_too[path], gradient) <= 1e-4, path
    for path, value in stats.items():
        assert relative(stats_too[path], value) <= 1e-5, path


def test_frozen_norms_train_as_they_evaluate():
    model = small(freeze_norm=True)
    variables, images = random_variables(model), random_images(model)
    train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    logits, state = train(variables, images)
    assert relative(logits, jax.jit(model.apply)(variables, images)) <= 1e-6
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])
