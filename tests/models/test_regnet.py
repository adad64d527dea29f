"""RegNets without torch: names, counts, features, strides, and the forms that must agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.models.regnet import RegNet, variant
from vision_jax.trees.paths import flatten

SMALL = {
    "num_classes": 3,
    "depths": (1, 2),
    "widths": (8, 24),
    "group_widths": (8, 12),
    "stem_width": 8,
}
FORMS = {"x": {}, "y": {"se_ratio": 0.25}, "stride 1": {"se_ratio": 0.25, "first_stride": 1}}


def small(**arguments):
    return RegNet(**{**SMALL, **arguments})


def abstract(model, size=(33, 46)):
    images = jnp.zeros((1, *size, model.in_channels))
    return jax.eval_shape(model.init, jax.random.key(0), images)


def random_variables(model, seed=0):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.ndim == 0:
            return jnp.zeros((), jnp.int32)
        noise = rng.normal(size=leaf.shape)
        fan_in = np.prod(leaf.shape[:-1])
        value = 1 + 0.1 * np.abs(noise) if leaf.ndim == 1 else noise / fan_in**0.5
        return jnp.asarray(value, jnp.float32)

    return jax.tree.map(draw, abstract(model))


def random_images(model, size=(33, 46), count=2):
    shape = (count, *size, model.in_channels)
    return jnp.asarray(np.random.default_rng(1).random(shape), jnp.float32)


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


BLOCK = """
bn1/bias (16,)
bn1/scale (16,)
bn2/bias (16,)
bn2/scale (16,)
bn3/bias (16,)
bn3/scale (16,)
bn_downsample/bias (16,)
bn_downsample/scale (16,)
conv1/kernel (1, 1, 8, 16)
conv2/kernel (3, 3, 4, 16)
conv3/kernel (1, 1, 16, 16)
conv_downsample/kernel (1, 1, 8, 16)
se/fc1/bias (2,)
se/fc1/kernel (16, 2)
se/fc2/bias (16,)
se/fc2/kernel (2, 16)
"""
ENDS = """
head/bias (3,)
head/kernel (16, 3)
stem_bn/bias (8,)
stem_bn/scale (8,)
stem_conv/kernel (3, 3, 3, 8)
"""


def test_parameter_names_are_public_and_pinned():
    """Renaming one breaks every checkpoint: change these lists only with a migration."""
    model = small(depths=(1,), widths=(16,), group_widths=(4,), se_ratio=0.25)
    variables = abstract(model)
    found = [f"{path} {x.shape}" for path, x in sorted(flatten(variables["params"]).items())]
    inside = [f"stage_0/block_0/{line}" for line in BLOCK.split("\n")[1:-1]]
    assert found == sorted([*ENDS.split("\n")[1:-1], *inside])
    norms = {path.rpartition("/")[0] for path in flatten(variables["params"]) if "bn" in path}
    wanted = {f"{norm}/{name}" for norm in norms for name in ("mean", "var", "count")}
    assert set(flatten(variables["batch_stats"])) == wanted


# timm's and torchvision's numbers with 1000 classes.
COUNTS = {
    "regnetx_002": 2_684_792,
    "regnetx_004_tv": 5_495_976,
    "regnetx_080": 39_572_648,
    "regnety_002": 3_162_996,
    "regnety_004": 4_344_144,
    "regnety_016": 11_202_430,
    "regnety_032": 19_436_338,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    shapes = abstract(RegNet(num_classes=1000, **variant(name)), (64, 64))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[name]


def test_stages_from_the_papers_numbers():
    """Table 8 and 9 of the paper; torchvision rounds a width down only if that keeps 90 %."""
    assert variant("regnety_040") == {
        "depths": (2, 6, 12, 2),
        "widths": (128, 192, 512, 1088),
        "group_widths": (64,) * 4,
        "se_ratio": 0.25,
    }
    assert variant("regnetx_004")["widths"] == (32, 64, 160, 384)
    assert variant("regnetx_004_tv")["widths"] == (32, 64, 160, 400)
    assert variant("regnetz_004") is None


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
    for (name, stride), width in zip(model.pyramid, (8, 24), strict=True):
        grid = tuple(-(-side // stride) for side in size)
        assert features[name].shape == (1, *grid, width), name
    assert features["pooled"].shape == (1, 24)


@pytest.mark.parametrize("form", FORMS)
def test_layers_cover_every_parameter_in_order(form):
    model = small(**FORMS[form])
    layers = {path: model.layer_of(path) for path in flatten(abstract(model)["params"])}
    assert model.num_layers == 5
    assert set(layers.values()) == set(range(5))
    assert layers[model.stem] == layers["stem_bn/scale"] == 0
    assert layers["stage_0/block_0/conv1/kernel"] == 1
    assert layers["stage_1/block_0/conv_downsample/kernel"] == 2
    assert layers["stage_1/block_1/bn1/scale"] == 3
    assert layers["head/bias"] == 4


def test_no_head_and_other_channels():
    channels = {"in_channels": 1, "mean": (0.5,), "std": (0.5,)}
    whole, headless = small(**channels), small(**channels, num_classes=0)
    variables, images = random_variables(whole), random_images(whole)
    assert variables["params"]["stem_conv"]["kernel"].shape == (3, 3, 1, 8)
    _, features = jax.jit(lambda v, x: whole.apply(v, x, return_features=True))(variables, images)
    assert not any("head" in path for path in flatten(abstract(headless)))
    params = {name: tree for name, tree in variables["params"].items() if name != "head"}
    pooled = jax.jit(headless.apply)({**variables, "params": params}, images)
    assert relative(pooled, features["pooled"]) <= 1e-6


def test_training_gradients_and_remat():
    """Remat recomputes: the same outputs, gradients and statistics, each updated once."""

    def results(**form):
        model = small(se_ratio=0.25, **form)
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
