"""LowRank leaves: the product is the merged kernel's, and so is the gradient, at less work."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from vision_jax import cost
from vision_jax.trees.leaf import convolve, dot, merge_leaf
from vision_jax.trees.low_rank import LowRank

STRIDED = partial(convolve, strides=(2, 1), padding=((1, 2), (0, 1)))
FORMS = {
    "dense": (dot, (3, 7, 12), (12, 18), {}),
    "parts": (dot, (3, 7, 12), (12, 18), {"parts": (3, (0, 2))}),
    "parts of two scales": (dot, (3, 7, 12), (12, 18), {"parts": (3, (0, 2)), "scale": (0.7, 0.2)}),
    "dora": (dot, (5, 12), (12, 18), {"dora": True}),
    "dora of parts": (dot, (3, 7, 12), (12, 18), {"parts": (3, (1,)), "dora": True}),
    "convolution": (STRIDED, (2, 9, 8, 5), (3, 2, 5, 6), {}),
    "dora of a convolution": (STRIDED, (2, 9, 8, 5), (3, 2, 5, 6), {"dora": True}),
}


def make_case(rng, form, dtype, dropout=0.0):
    """(product, x, leaf) with random contents."""
    product, x_shape, shape, options = FORMS[form]

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    rank, parts = 4, options.get("parts")
    a, b = normal(*shape[:-1], rank), normal(rank, shape[-1])
    if parts:
        count = len(parts[1])
        a, b = normal(count, shape[0], rank), normal(count, rank, shape[1] // parts[0])
    magnitude = jnp.abs(normal(shape[-1])) + 0.5 if options.get("dora") else None
    scale = options.get("scale", 0.7)
    leaf = LowRank(normal(*shape), a, b, magnitude, scale, parts, dropout)
    return product, normal(*x_shape), leaf


def numpy_merge(leaf):
    """The kernel that the leaf stands in for, written out."""
    base, a, b = (np.asarray(x, np.float64) for x in (leaf.base, leaf.a, leaf.b))
    delta = np.zeros_like(base)
    if leaf.parts:
        columns = base.shape[1] // leaf.parts[0]
        for position, part in enumerate(leaf.parts[1]):
            update = np.broadcast_to(leaf.scale, 2)[position] * (a[position] @ b[position])
            delta[:, part * columns : (part + 1) * columns] = update
    else:
        delta = leaf.scale * np.einsum("...r,ro->...o", a, b)
    kernel = base + delta
    if leaf.magnitude is not None:
        norm = np.sqrt((kernel.reshape(-1, kernel.shape[-1]) ** 2).sum(0))
        kernel = kernel / norm * np.asarray(leaf.magnitude, np.float64)
    return kernel


def assert_close(actual, expected, tolerance):
    """Largest difference, relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("form", FORMS)
def test_merged_kernel_and_product(form, rng):
    with jax.enable_x64(True):
        product, x, leaf = make_case(rng, form, jnp.float64)
        merged, attached = jax.jit(lambda x, leaf: (merge_leaf(leaf), product(x, leaf)))(x, leaf)
        assert_close(merged, numpy_merge(leaf), 1e-14)
        assert_close(attached, product(x, jnp.asarray(numpy_merge(leaf))), 1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_that_of_autodiff_through_the_merged_kernel(form, rng):
    with jax.enable_x64(True):
        product, x, leaf = make_case(rng, form, jnp.float64)
        actual, expected = gradients(rng, product, x, leaf)
        for got, wanted in zip(actual, expected, strict=True):
            assert_close(got, wanted, 1e-13)


@pytest.mark.long(but=("dense",))
@pytest.mark.parametrize("form", ["dense", "dora of parts"])
def test_bfloat16_inputs_with_float32_parameters(form, rng):
    """The products round their inputs to bfloat16; the parameters' gradients stay in float32."""
    product, x, leaf = make_case(rng, form, jnp.float32)
    half = x.astype(jnp.bfloat16)
    assert product(half, leaf).dtype == jnp.bfloat16
    actual, expected = gradients(rng, product, half, leaf, plain_x=x)
    for got in actual[1:]:
        assert got.dtype == jnp.float32
        assert (got != got.astype(jnp.bfloat16).astype(jnp.float32)).any()  # not rounded on the way
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted, 0.05)


def gradients(rng, product, x, leaf, plain_x=None):
    """Gradients for x, A, B and the magnitude: our own, and autodiff's through `merge_leaf`."""
    plain_x = x if plain_x is None else plain_x
    dy = rng.normal(size=jax.eval_shape(product, x, leaf).shape)

    def pull(function, x):
        def inner(x, a, b, magnitude):
            return function(x, dataclasses.replace(leaf, a=a, b=b, magnitude=magnitude))

        y, pull = jax.vjp(inner, x, leaf.a, leaf.b, leaf.magnitude)
        return jax.tree.leaves(pull(jnp.asarray(dy, y.dtype)))

    return jax.jit(
        lambda: (pull(product, x), pull(lambda x, leaf: product(x, merge_leaf(leaf)), plain_x))
    )()


@pytest.mark.long(but=("dense", "dora of parts"))
@pytest.mark.parametrize("form", FORMS)
def test_many_adapters_of_one_kernel_are_each_as_alone(form, rng):
    with jax.enable_x64(True):
        product, x, leaf = make_case(rng, form, jnp.float64)
        own = [make_case(rng, form, jnp.float64)[2] for _ in range(3)]
        trained = [(one.a, one.b, one.magnitude) for one in own]
        dy = jnp.asarray(rng.normal(size=product(x, leaf.base).shape))

        def loss(trained, base, x):
            a, b, magnitude = trained
            changed = dataclasses.replace(leaf, base=base, a=a, b=b, magnitude=magnitude)
            return jnp.sum(dy * jnp.sin(product(x, changed)))

        alone = jax.jit(jax.value_and_grad(loss))
        stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *trained)
        # What is shared, and where inputs or frozen kernels differ so that nothing is.
        inputs = jnp.asarray(rng.normal(size=(3, *x.shape)))
        kernels = jnp.stack([one.base for one in own])
        for base, all_x, axes in ((leaf.base, x, (0, None, None)), (kernels, inputs, (0, 0, 0))):
            every = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=axes))(stacked, base, all_x)
            for place, mine in enumerate(trained):
                shared = axes[1] is None
                expected = alone(
                    mine, base if shared else base[place], all_x if shared else all_x[place]
                )
                row = jax.tree.map(lambda array, at=place: array[at], every)
                for got, wanted in zip(*map(jax.tree.leaves, (row, expected)), strict=True):
                    assert_close(got, wanted, 1e-12)


@pytest.mark.long(but=("dora",))
@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_are_those_of_the_merged_kernel(form, rng):
    """Of gradient penalties, backward twice, and of Hessian products, forward over backward."""
    with jax.enable_x64(True):
        product, x, leaf = make_case(rng, form, jnp.float64)
        kernel, along = merge_leaf(leaf), jnp.asarray(rng.normal(size=x.shape))
        found = []
        for own in (leaf, kernel):
            slope = jax.grad(lambda x, own=own: jnp.sum(jnp.sin(product(x, own))))
            penalty = jax.grad(lambda x, slope=slope: jnp.sum(slope(x) ** 2))
            found.append((penalty(x), jax.jvp(slope, (x,), (along,))[1]))
        for got, wanted in zip(*found, strict=True):
            assert_close(got, wanted, 1e-12)


def test_the_product_that_adapters_share_is_computed_once(rng):
    """In the compiled program: T trials cost the frozen product once, and T skinny ones."""
    product, x, leaf = make_case(rng, "dense", jnp.float32)

    def flops(trials):
        def loss(a, b):
            return jnp.sum(jnp.sin(product(x, dataclasses.replace(leaf, a=a, b=b))))

        factors = (jnp.ones((trials, *leaf.a.shape)), jnp.ones((trials, *leaf.b.shape)))
        return cost.count(jax.jit(jax.vmap(jax.grad(loss, (0, 1)))).lower(*factors).compile()).flops

    rows, (inputs, outputs), rank = 21, leaf.shape, 4
    skinny = 2 * rows * rank * (inputs + outputs)  # x A B; x A again and dy Bᵀ; and dA and dB
    assert flops(9) - flops(1) <= 8 * 3 * skinny
    assert flops(1) >= 2 * rows * inputs * outputs


def test_no_gradient_of_the_frozen_kernel_is_computed():
    """In the backward pass no product has the kernel's shape but the merge, which costs in·out·r.

    The full dense gradient would be the product over all 64 rows.
    """
    base, a, b = jnp.ones((24, 40)), jnp.ones((24, 2)), jnp.ones((2, 40))

    def loss(factors, x):
        return dot(x, LowRank(base, *factors)).sum()

    def contracted(function, *arguments):
        """Sizes summed over, of all products that give an array of the kernel's size."""
        found = []

        def visit(jaxpr):
            for equation in jaxpr.eqns:
                if equation.primitive.name == "dot_general":
                    (left, _), _ = equation.params["dimension_numbers"]
                    shape = equation.outvars[0].aval.shape
                    if sorted(shape) == [24, 40]:
                        found.append(equation.invars[0].aval.shape[left[0]])
                for sub in jaxprs_in_params(equation.params):
                    visit(sub)

        visit(jax.make_jaxpr(function)(*arguments).jaxpr)
        return found

    x = jnp.ones((64, 24))
    assert set(contracted(jax.grad(loss, argnums=(0, 1)), (a, b), x)) == {2}

    def plain_loss(factors, x):
        return (x @ merge_leaf(LowRank(base, *factors))).sum()

    assert 64 in contracted(jax.grad(plain_loss, argnums=(0, 1)), (a, b), x)


@pytest.mark.parametrize("form", ["parts", "dora of a convolution"])
def test_dropout_keeps_the_expectation(form, rng):
    product, x, leaf = make_case(rng, form, jnp.float32, dropout=0.25)
    keys = jax.random.split(jax.random.key(0), 2000)
    exact, merged, samples = jax.jit(
        lambda x, leaf: (
            product(x, leaf),  # no key, no dropout
            product(x, merge_leaf(leaf)),
            jax.vmap(lambda key: product(x, leaf, dropout_key=key))(keys),
        )
    )(x, leaf)
    assert_close(exact, merged, 1e-5)
    samples = np.asarray(samples, np.float64)
    error = np.abs(samples.mean(0) - np.asarray(exact))
    assert (error < 6 * samples.std(0) / np.sqrt(2000) + 1e-4).all()
    assert samples.std(0).max() > 0.01
    if leaf.parts:  # the frozen path, and so a part without adapter, sees no dropout
        assert samples[..., 6:12].std(0).max() < 1e-5


def test_dropout_gradient_is_that_of_the_written_out_product(rng):
    with jax.enable_x64(True):
        _, x, leaf = make_case(rng, "dense", jnp.float64, dropout=0.25)
        key = jax.random.key(3)
        keep = jax.random.bernoulli(key, 0.75, x.shape).astype(x.dtype)

        def ours(a, b, x):
            replaced = LowRank(leaf.base, a, b, None, 0.7, None, 0.25)
            return jnp.sin(dot(x, replaced, key)).sum()

        def written_out(a, b, x):
            return jnp.sin(x @ leaf.base + 0.7 * ((x * keep / 0.75) @ a) @ b).sum()

        arguments = (leaf.a, leaf.b, x)
        actual = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(*arguments)
        expected = jax.jit(jax.grad(written_out, argnums=(0, 1, 2)))(*arguments)
        for got, wanted in zip(actual, expected, strict=True):
            assert_close(got, wanted, 1e-13)


def test_bfloat16_product_of_a_plain_kernel_accumulates_in_float32():
    """4096 ones and a tail of small values: a bfloat16 accumulator would lose the tail."""
    x = jnp.ones((2, 4096), jnp.bfloat16)
    kernel = jnp.full((4096, 3), 2.0**-7, jnp.float32)
    np.testing.assert_array_equal(np.asarray(dot(x, kernel), np.float32), 32.0)
    gradient = jax.grad(lambda kernel: dot(x, kernel).astype(jnp.float32).sum())(kernel)
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, 2.0)
    assert dot(x, kernel).dtype == jnp.bfloat16
