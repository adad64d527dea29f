"""The cost read from compiled programs against XLA's own count and against arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from vision_jax import cost, sharding


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def convolution(x, kernel, stride=1, padding=1, groups=1, dilation=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def test_products_cost_what_arithmetic_says():
    program = compiled(
        lambda x, w: jnp.einsum("bnd,bdm->bnm", x, w), jnp.ones((3, 5, 7)), jnp.ones((3, 7, 11))
    )
    assert cost.count(program).flops == 2 * 3 * 5 * 7 * 11


@pytest.mark.parametrize(
    "arguments",
    [{}, {"stride": 2, "padding": 0}, {"groups": 2}, {"dilation": 2, "padding": 2}, {"padding": 3}],
)
def test_convolutions_and_their_gradients_cost_what_xla_says(arguments):
    x = jnp.ones((2, 9, 10, 4))
    kernel = jnp.ones((3, 3, 4 // arguments.get("groups", 1), 6))
    for function in (
        lambda x, kernel: convolution(x, kernel, **arguments),
        jax.grad(lambda x, kernel: convolution(x, kernel, **arguments).sum(), 0),
        jax.grad(lambda x, kernel: (convolution(x, kernel, **arguments) ** 2).sum(), 1),
    ):
        program = compiled(function, x, kernel)
        count, xla = cost.count(program).flops, program.cost_analysis()["flops"]
        rest = 4 * x.size * 9 + 10_000  # XLA counts additions beside the products too
        assert count <= xla <= count + rest
        assert count > 0.5 * xla


def test_a_loop_counts_as_often_as_it_turns():
    w, x = jnp.ones((16, 16)), jnp.ones((4, 16))

    def once(w, x):
        return jnp.tanh(x @ w).sum()

    def often(w, x):
        return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=7)[0].sum()

    one, seven = (cost.count(compiled(function, w, x)).flops for function in (once, often))
    assert seven == 7 * one == 7 * 2 * 4 * 16 * 16
    backward = cost.count(compiled(jax.grad(often), w, x)).flops
    assert backward == 3 * seven - one or backward == 3 * seven


def test_a_loop_of_unknown_length_is_an_error():
    def until(x):
        return lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ x, x)

    def halve(x):  # no products: nothing to count
        return lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, x)

    assert cost.count(compiled(halve, jnp.ones((2, 2)))).flops == 0
    with pytest.raises(ValueError, match="how often this loop turns"):
        cost.count(compiled(until, jnp.ones((2, 2))))


def test_collectives_and_their_bytes():
    mesh = sharding.make_mesh(data=8, fsdp=1)
    split = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.device_put(np.ones((16, 32), np.float32), split)
    program = compiled(lambda x: x.sum(0), x)
    assert cost.count(program).collectives == {"all-reduce": (1, 32 * 4)}
    assert cost.count(compiled(lambda x: x * 2, x)).collectives == {}
    flops = cost.count(compiled(lambda x: x @ jnp.ones((32, 4)), x)).flops
    assert flops == 2 * 16 * 32 * 4 / 8  # of one device
