"""The layers without torch: statistics as explicit state, groups, tiles, devices, adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vision_jax.errors import UserError
from vision_jax.models.layers import ADAPTER_KEYS, BatchNorm, Conv
from vision_jax.trees import lora
from vision_jax.trees.paths import flatten


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


# BatchNorm ---------------------------------------------------------------------------------------

STATISTICS = {"mean": draw(5, seed=1), "var": 1 + draw(5, seed=2) ** 2, "count": jnp.int32(3)}
PARAMS = {"scale": draw(5, seed=3), "bias": draw(5, seed=4)}


def apply_norm(norm, x, train):
    variables = {"params": PARAMS, "batch_stats": STATISTICS}
    return norm.apply(variables, x, train, mutable=["batch_stats"])


def test_a_fresh_norm_changes_nothing_and_its_state_is_named():
    variables = BatchNorm().init(jax.random.key(0), draw(2, 3, 3, 5), True)
    shapes = {path: x.shape for path, x in flatten(variables).items()}
    assert shapes == {
        "params/scale": (5,),
        "params/bias": (5,),
        "batch_stats/mean": (5,),
        "batch_stats/var": (5,),
        "batch_stats/count": (),
    }
    assert variables["batch_stats"]["count"] == 0  # initializing is no update
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


def test_training_normalizes_by_the_batch_and_moves_the_statistics():
    x = 3 + 2 * draw(4, 3, 2, 5)
    y, state = apply_norm(BatchNorm(momentum=0.25), x, True)
    wide = np.asarray(x, np.float64).reshape(24, 5)
    normed = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    expected = normed * np.asarray(PARAMS["scale"]) + np.asarray(PARAMS["bias"])
    assert relative(y.reshape(24, 5), expected) <= 1e-6
    stats = state["batch_stats"]
    assert relative(stats["mean"], 0.75 * STATISTICS["mean"] + 0.25 * wide.mean(0)) <= 1e-6
    assert relative(stats["var"], 0.75 * STATISTICS["var"] + 0.25 * wide.var(0, ddof=1)) <= 1e-6
    assert (int(stats["count"]), stats["count"].dtype) == (4, jnp.int32)


@pytest.mark.parametrize(("frozen", "train"), [(False, False), (True, True), (True, False)])
def test_evaluation_and_frozen_norms_use_and_keep_the_running_statistics(frozen, train):
    x = draw(4, 3, 2, 5)
    y, state = apply_norm(BatchNorm(frozen=frozen), x, train)
    for name, value in STATISTICS.items():
        np.testing.assert_array_equal(state["batch_stats"][name], value)
    row = {
        name: np.asarray(value).reshape(1, 1, 1, -1)
        for name, value in (STATISTICS | PARAMS).items()
    }
    expected = (x - row["mean"]) / np.sqrt(row["var"] + 1e-5) * row["scale"] + row["bias"]
    assert relative(y, expected) <= 1e-6


def test_statistics_take_no_gradient_but_the_batch_does():
    x = draw(3, 2, 2, 5)

    def loss(x, norm, train):
        y, state = apply_norm(norm, x, train)
        return jnp.sin(y).sum(), state

    means = lambda x: loss(x, BatchNorm(), True)[1]["batch_stats"]["mean"].sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(means)(x), 0)
    frozen = jax.grad(loss, has_aux=True)(x, BatchNorm(frozen=True), True)[0]
    evaluated = jax.grad(loss, has_aux=True)(x, BatchNorm(), False)[0]
    np.testing.assert_array_equal(frozen, evaluated)
    batch = jax.grad(loss, has_aux=True)(x, BatchNorm(), True)[0]
    np.testing.assert_allclose(batch.sum((0, 1, 2)), 0, atol=1e-5)  # a shift is normalized away


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_statistics_of_narrow_inputs_stay_float32(dtype):
    x = (30 + draw(64, 4, 4, 5)).astype(dtype)
    y, state = apply_norm(BatchNorm(dtype=dtype, momentum=1.0), x, True)
    assert y.dtype == dtype
    stats = state["batch_stats"]
    assert stats["mean"].dtype == stats["var"].dtype == jnp.float32
    wide = np.asarray(x, np.float64).reshape(-1, 5)
    assert relative(stats["mean"], wide.mean(0)) <= 1e-5
    assert relative(stats["var"], wide.var(0, ddof=1)) <= 1e-4


class Net(nn.Module):
    """A convolution between two norms, so that the second norm sees what the first did."""

    @nn.compact
    def __call__(self, x, train):
        x = BatchNorm(name="first")(x, train)
        x = Conv(6, (3, 3), (2, 2), ((1, 1), (1, 1)), name="conv")(nn.relu(x))
        return BatchNorm(name="second")(x, train)


@pytest.mark.long
def test_a_batch_over_4_devices_is_normalized_as_on_one():
    """Each device's two images have another mean, which norms that don't synchronize would show."""
    net = Net()
    offsets = jnp.repeat(jnp.arange(4.0), 2).reshape(8, 1, 1, 1)
    x = draw(8, 5, 5, 3) * (1 + offsets) + 10 * offsets
    weights = draw(8, 3, 3, 6, seed=8)
    variables = net.init(jax.random.key(0), x, False)

    @jax.jit
    def step(variables, x, weights):
        def loss(params):
            state = {"params": params, "batch_stats": variables["batch_stats"]}
            y, new = net.apply(state, x, True, mutable=["batch_stats"])
            return (y * weights).sum(), (y, new)

        gradients, (y, new) = jax.grad(loss, has_aux=True)(variables["params"])
        return y, gradients, new["batch_stats"]

    one = step(variables, x, weights)
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    four = step(
        jax.device_put(variables, whole), jax.device_put(x, rows), jax.device_put(weights, rows)
    )
    assert len(four[0].sharding.device_set) == 4
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(one[1]))
    assert relative(four[0], one[0]) <= 1e-5
    for path, gradient in flatten(one[1]).items():  # some are zero but for rounding
        assert float(jnp.abs(flatten(four[1])[path] - gradient).max()) <= 1e-5 * largest, path
    for path, value in flatten(one[2]).items():
        assert relative(flatten(four[2])[path], value) <= 1e-5, path
    assert four[2]["second"]["count"] == 1


# Conv --------------------------------------------------------------------------------------------


def by_definition(x, kernel, strides, padding, groups):
    """The sum written out, in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    h, w, share, features = kernel.shape
    rows = (x.shape[1] - h) // strides[0] + 1
    columns = (x.shape[2] - w) // strides[1] + 1
    y = np.zeros((x.shape[0], rows, columns, features))
    for i in range(rows):
        for j in range(columns):
            top, left = i * strides[0], j * strides[1]
            window = x[:, top : top + h, left : left + w]
            for f in range(features):
                start = f // (features // groups) * share
                y[:, i, j, f] = (window[..., start : start + share] * kernel[..., f]).sum((1, 2, 3))
    return y


NONE, ONE = ((0, 0), (0, 0)), ((1, 1), (1, 1))
CONVOLUTIONS = {
    "1 x 1": ((1, 1), (1, 1), NONE, 1),
    "1 x 1, stride": ((1, 1), (2, 2), NONE, 1),
    "tiles that leave a rest": ((2, 3), (2, 3), NONE, 1),
    "tiles, padded": ((2, 2), (2, 2), ONE, 1),
    "tiles in groups": ((2, 2), (2, 2), NONE, 2),
    "3 x 3": ((3, 3), (1, 1), ONE, 1),
    "3 x 3, stride, groups": ((3, 3), (2, 2), ONE, 2),
    "depthwise": ((3, 3), (1, 1), ONE, 4),
    "uneven": ((1, 3), (1, 2), ((0, 0), (2, 1)), 2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_the_sum_written_out(name):
    size, strides, padding, groups = CONVOLUTIONS[name]
    conv = Conv(8, size, strides, padding, groups=groups)
    x = draw(2, 7, 8, 4)
    variables = conv.init(jax.random.key(0), x)
    assert variables["params"]["kernel"].shape == (*size, 4 // groups, 8)
    params = {"kernel": draw(*size, 4 // groups, 8, seed=2), "bias": draw(8, seed=3)}
    expected = by_definition(x, params["kernel"], strides, padding, groups)
    expected += np.asarray(params["bias"]).reshape(1, 1, 1, -1)
    assert relative(conv.apply({"params": params}, x), expected) <= 1e-6


# Adapters on convolutions ------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", [n for n, given in CONVOLUTIONS.items() if given[3] == 1])
def test_a_merged_adapter_computes_what_the_adapter_did(name, dora):
    size, strides, padding, _ = CONVOLUTIONS[name]
    conv, x = Conv(8, size, strides, padding), draw(2, 7, 8, 4)
    params = {"kernel": draw(*size, 4, 8, seed=2), "bias": draw(8, seed=3)}
    plain = conv.apply({"params": params}, x)
    tree = lora.attach(params, ["kernel"], key=jax.random.key(0), rank=2, alpha=4.0, dora=dora)
    assert relative(conv.apply({"params": tree}, x), plain) <= 1e-6
    base, adapters = lora.detach(tree)
    moved = {
        path: dataclasses.replace(leaf, b=draw(*leaf.b.shape, seed=7))
        for path, leaf in adapters.items()
    }
    tree = lora.apply_adapters(base, moved)
    adapted = conv.apply({"params": tree}, x)
    assert relative(adapted, plain) > 1e-2
    merged = lora.merge(tree)
    assert merged["kernel"].shape == params["kernel"].shape
    assert relative(adapted, conv.apply({"params": merged}, x)) <= 1e-5
    keys = {ADAPTER_KEYS: jax.random.key(1)}
    assert relative(conv.apply({"params": tree}, x, rngs=keys), adapted) <= 1e-6  # a rate of zero


def test_a_convolution_in_groups_takes_no_adapter():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Conv(8, (3, 3), groups=2, name="conv2")(x)

    x = draw(1, 5, 5, 4)
    params = {"conv2": {"kernel": draw(3, 3, 2, 8), "bias": jnp.zeros(8)}}
    tree = lora.attach(params, [".*kernel"], key=jax.random.key(0), rank=2, alpha=4.0)
    with pytest.raises(UserError, match=r"^conv2: a convolution in groups .* config\.lora\.rules"):
        Outer().apply({"params": tree}, x)
