"""Convolutions of a CPU beside XLA's own, in float64: values, and derivatives in each mode."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from vision_jax.trees import products

CASES = {  # window, strides, padding, groups, dilation, channels, outputs
    "groups": ((3, 3), (2, 1), ((1, 1), (0, 1)), 2, 1, 6, 4),
    "depthwise": ((3, 2), (1, 1), ((1, 1), (0, 1)), 3, 1, 3, 3),
    "depthwise, strided": ((3, 3), (2, 2), ((0, 1), (1, 0)), 3, 1, 3, 3),
    "depthwise, dilated": ((3, 3), (1, 2), ((2, 2), (2, 2)), 3, 2, 3, 3),
    "atrous": ((3, 3), (1, 1), ((5, 5), (5, 5)), 1, 5, 4, 3),
    "atrous, beyond the map": ((3, 3), (1, 1), ((9, 9), (9, 9)), 1, 9, 4, 3),
    "atrous, uneven": ((2, 3), (1, 1), ((6, 0), (8, 5)), 1, 6, 4, 3),
    "depthwise, two outputs each": ((3, 3), (1, 1), ((1, 1), (1, 1)), 3, 1, 3, 6),
}


@pytest.mark.long(but=("depthwise, strided", "atrous, uneven"))
@pytest.mark.parametrize("case", CASES)
def test_a_convolution_and_its_derivatives_are_those_of_xla(case, rng):
    window, strides, padding, groups, dilation, channels, outputs = CASES[case]
    ours = products.convolution(window, strides, padding, groups, dilation)

    def theirs(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    with jax.enable_x64(True):
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
        shapes = (3, 2, 7, 6, channels), (3, *window, channels // groups, outputs)
        x, kernel, dx, dkernel = (draw(*shape) for shape in shapes * 2)

        def everything(product):
            def each(x, kernel, dx, dkernel):
                loss = lambda x, kernel: jnp.sin(product(x, kernel)).sum()  # noqa: E731
                gradient = jax.grad(loss, (0, 1))
                second = jax.jvp(gradient, (x, kernel), (dx, dkernel))[1]  # forward over reverse
                slope = lambda *at: sum(map(jnp.vdot, gradient(*at), (dx, dkernel)))  # noqa: E731
                return {
                    "value and tangent": jax.jvp(product, (x, kernel), (dx, dkernel)),
                    "gradient": gradient(x, kernel),
                    "second derivative": second,
                    "second derivative, reverse mode": jax.grad(slope, (0, 1))(x, kernel),
                }

            return jax.jit(jax.vmap(each))(x, kernel, dx, dkernel)

        for got, wanted in zip(*map(jax.tree.leaves, map(everything, (ours, theirs))), strict=True):
            assert jnp.abs(got - wanted).max() <= 1e-12 * jnp.abs(wanted).max()
