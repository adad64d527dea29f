"""BatchNorm and Conv against torch's over several updates, in float64.

Worst relative error measured on a CPU: see the limits, 1e-12 of each output's scale.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vision_jax.models.layers import BatchNorm, Conv

LIMIT = 1e-12


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def relative(ours, theirs):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2)))


def from_torch(x):
    return x.detach().permute(0, 2, 3, 1)


@pytest.mark.parametrize("mode", ["train", "eval", "frozen", "train, then eval"])
@pytest.mark.parametrize(("epsilon", "momentum"), [(1e-5, 0.1), (1e-3, 0.01)])
def test_batch_norm_over_updates(mode, epsilon, momentum):
    rng = np.random.default_rng(len(mode))
    width, updates = 5, 4
    theirs = torch.nn.BatchNorm2d(width, eps=epsilon, momentum=momentum).double()
    with torch.no_grad():
        for tensor in (theirs.weight, theirs.bias, theirs.running_mean):
            tensor.copy_(torch.from_numpy(rng.normal(size=width)))
        theirs.running_var.copy_(torch.from_numpy(rng.uniform(0.5, 2, width)))
        theirs.num_batches_tracked.fill_(11)
    as_array = lambda tensor: jnp.asarray(tensor.detach().numpy().copy())  # noqa: E731
    params = {"scale": as_array(theirs.weight), "bias": as_array(theirs.bias)}
    stats = {
        "mean": as_array(theirs.running_mean),
        "var": as_array(theirs.running_var),
        "count": jnp.int32(11),
    }
    norm = BatchNorm(epsilon, momentum, frozen=mode == "frozen", dtype=jnp.float64)

    def loss(params, x, weights, stats, train):
        variables = {"params": params, "batch_stats": stats}
        y, state = norm.apply(variables, x, train, mutable=["batch_stats"])
        return (y * weights).sum(), (y, state["batch_stats"])

    for update in range(updates):
        training = mode == "train" or (mode == "train, then eval" and update < 2)
        theirs.train(training)
        x = 3 + 2 * rng.normal(size=(3, 4, 2, width))
        weights = rng.normal(size=x.shape)
        gradients, (y, stats) = jax.grad(loss, (0, 1), has_aux=True)(
            params, jnp.asarray(x), jnp.asarray(weights), stats, training or mode == "frozen"
        )
        theirs.zero_grad()
        input_ = to_torch(x).requires_grad_()
        output = theirs(input_)
        (output * to_torch(weights)).sum().backward()
        assert relative(y, from_torch(output)) <= LIMIT
        assert relative(gradients[1], from_torch(input_.grad)) <= LIMIT
        assert relative(gradients[0]["scale"], theirs.weight.grad) <= LIMIT
        assert relative(gradients[0]["bias"], theirs.bias.grad) <= LIMIT
        assert relative(stats["mean"], theirs.running_mean) <= LIMIT
        assert relative(stats["var"], theirs.running_var) <= LIMIT
        assert int(stats["count"]) == int(theirs.num_batches_tracked)
        # The parameters move too, so that no mode is compared on its first values alone.
        params = {name: params[name] - 0.1 * gradients[0][name] for name in params}
        with torch.no_grad():
            theirs.weight -= 0.1 * theirs.weight.grad
            theirs.bias -= 0.1 * theirs.bias.grad


CONVOLUTIONS = {  # kernel, stride, padding, groups, input's height and width
    "1 x 1": ((1, 1), (1, 1), 0, 1, (5, 4)),
    "1 x 1, stride": ((1, 1), (2, 2), 0, 1, (5, 6)),
    "tiles": ((4, 4), (4, 4), 0, 1, (8, 12)),
    "tiles that leave a rest": ((2, 3), (2, 3), 0, 1, (7, 8)),
    "tiles, padded": ((2, 2), (2, 2), 1, 1, (5, 6)),
    "tiles in groups": ((2, 2), (2, 2), 0, 2, (6, 4)),
    "stem": ((7, 7), (2, 2), 3, 1, (11, 14)),
    "3 x 3, stride, groups": ((3, 3), (2, 2), 1, 2, (7, 6)),
    "depthwise": ((7, 7), (1, 1), 3, 4, (5, 6)),
    "overlapping patches": ((3, 3), (2, 2), 1, 1, (6, 6)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_their_gradients(name, bias):
    size, strides, padding, groups, sides = CONVOLUTIONS[name]
    rng = np.random.default_rng(3)
    theirs = torch.nn.Conv2d(4, 8, size, strides, padding, groups=groups, bias=bias).double()
    pad = ((padding, padding),) * 2
    conv = Conv(8, size, strides, pad, groups=groups, use_bias=bias, dtype=jnp.float64)
    params = {"kernel": jnp.asarray(theirs.weight.detach().numpy().transpose(2, 3, 1, 0))}
    if bias:
        params["bias"] = jnp.asarray(theirs.bias.detach().numpy())
    x = rng.normal(size=(2, *sides, 4))
    input_ = to_torch(x).requires_grad_()
    output = theirs(input_)
    weights = rng.normal(size=from_torch(output).shape)
    (output * to_torch(weights)).sum().backward()

    def loss(params, x):
        y = conv.apply({"params": params}, x)
        return (y * weights).sum(), y

    gradients, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, jnp.asarray(x))
    assert relative(y, from_torch(output)) <= LIMIT
    assert relative(gradients[1], from_torch(input_.grad)) <= LIMIT
    kernel = theirs.weight.grad.permute(2, 3, 1, 0)
    assert relative(gradients[0]["kernel"], kernel) <= LIMIT
    if bias:
        assert relative(gradients[0]["bias"], theirs.bias.grad) <= LIMIT
