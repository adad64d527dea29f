"""Factored kernels: nearest by numpy's SVD, right in gradient and in what sits on them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vision_jax import sharding
from vision_jax.errors import UserError
from vision_jax.run.factorize import Layer, Spectrum, choose_ranks, spectrum
from vision_jax.trees import factored, lora, paths, quantize
from vision_jax.trees.factored import Factored, to_factored
from vision_jax.trees.leaf import convolve, dot, roles, trainable_paths
from vision_jax.trees.low_rank import LowRank
from vision_jax.trees.quantized import FakeQuantized, Int8

SHAPES = [(24, 40), (40, 24), (3, 3, 5, 16), (1, 1, 32, 12)]


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_left_out_is_the_dropped_singular_values(rng, shape):
    """Eckart and Young: no product of this rank is closer."""
    kernel = rng.normal(size=shape)
    values = np.linalg.svd(kernel.reshape(-1, shape[-1]), compute_uv=False)
    known = spectrum(kernel)
    for rank in (1, 7, 11):
        for leaf in (to_factored(kernel, rank), to_factored(kernel, rank, known.basis)):
            assert (leaf.shape, leaf.rank) == (shape, rank)
            error = np.linalg.norm(kernel - leaf.u @ leaf.v)
            expected = np.sqrt(np.square(values[rank:]).sum())
            np.testing.assert_allclose(error, expected, rtol=1e-12)
            # Balanced: what is between the two has one scale.
            lengths = np.linalg.norm(leaf.u.reshape(-1, rank), axis=0)
            np.testing.assert_allclose(lengths, np.linalg.norm(leaf.v, axis=1), rtol=1e-10)
        share = known.left_out(rank)
        np.testing.assert_allclose(share, np.square(values[rank:]).sum() / np.square(values).sum())


def test_on_the_outputs_it_is_the_whitened_svd(rng):
    """The optimum of ‖XW − XUV‖ by the inverse of a square root of XᵀX, and its error."""
    x = rng.normal(size=(500, 30)) @ rng.normal(size=(30, 30)) + 2 * rng.normal(size=30)
    kernel = rng.normal(size=(30, 20))
    y = x @ kernel
    root = np.linalg.cholesky(x.T @ x).T  # root'root = X'X
    left, values, right = np.linalg.svd(root @ kernel, full_matrices=False)
    known = spectrum(kernel, y.T @ y)
    np.testing.assert_allclose(known.energy, np.square(values), rtol=1e-8)
    for rank in (1, 6, 15):
        direct = np.linalg.solve(root, left[:, :rank] * values[:rank]) @ right[:rank]
        leaf = to_factored(kernel, rank, known.basis)
        assert relative(leaf.u @ leaf.v, direct) < 1e-10
        error = np.linalg.norm(y - x @ leaf.u @ leaf.v)
        np.testing.assert_allclose(error, np.sqrt(np.square(values[rank:]).sum()), rtol=1e-9)
        plain = to_factored(kernel, rank)
        assert error < np.linalg.norm(y - x @ plain.u @ plain.v)


def test_a_product_comes_back(rng):
    """Of its own rank within rounding, traced too, and of a kernel of less rank than asked for."""
    for shape in SHAPES:
        u, v = rng.normal(size=(*shape[:-1], 4)), rng.normal(size=(4, shape[-1]))
        kernel = jnp.asarray(u @ v, jnp.float32)
        for rank in (4, 9):
            made = jax.jit(lambda kernel, rank=rank: to_factored(kernel, rank))(kernel)
            assert relative(made.merge(), kernel) < 1e-5
    assert not np.asarray(to_factored(jnp.zeros((8, 6)), 3).merge()).any()
    assert to_factored(np.eye(4, 9), 100).rank == 4  # there are no more


@pytest.mark.parametrize("window", [None, 3])
def test_products_and_gradients_are_those_of_the_kernel(rng, window):
    """Of x and of both factors, against the dense kernel's through U·V."""
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(2, 6, 6, 8)))
        inner = (8,) if window is None else (window, window, 8)
        leaf = Factored(
            jnp.asarray(rng.normal(size=(*inner, 3))), jnp.asarray(rng.normal(size=(3, 10)))
        )

        def layer(x, kernel):
            if window is None:
                return dot(x, kernel)
            return convolve(x, kernel, (2, 1), ((1, 1), (0, 1)))

        weights = jnp.asarray(rng.normal(size=layer(x, leaf.merge()).shape))
        assert relative(layer(x, leaf), layer(x, leaf.merge())) < 1e-12

        def loss(x, u, v, dense):
            kernel = u @ v if dense else Factored(u, v)
            return (jnp.sin(layer(x, kernel)) * weights).sum()

        grad = jax.grad(loss, (0, 1, 2))
        ours, theirs = (grad(x, leaf.u, leaf.v, dense) for dense in (False, True))
        for one, other in zip(ours, theirs, strict=True):
            assert relative(one, other) < 1e-12


@pytest.mark.long
def test_an_adapter_adds_its_rank_to_the_factors(rng):
    """`merge` keeps two factors; DoRA, and adapters of parts, too. What is no smaller is whole."""
    base = Factored(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((48, 6), (6, 60))))
    tree = {"qkv": {"kernel": base}}
    for number, settings in enumerate(({}, {"qkv_parts": "q,v", "dora": True})):
        key = jax.random.key(number)
        adapted = lora.attach(tree, ["qkv/kernel"], key=key, rank=2, alpha=3.0, **settings)
        leaf = adapted["qkv"]["kernel"]
        moved = jax.tree.map(
            lambda x: x + 0.1 * jnp.asarray(rng.normal(size=x.shape), x.dtype), leaf
        )
        joined = factored.merge({"qkv": {"kernel": moved}})["qkv"]["kernel"]
        assert isinstance(joined, Factored)
        assert joined.rank == (10 if "qkv_parts" in settings else 8)
        assert relative(joined.merge(), moved.merge()) < 1e-5
    wide = dataclasses.replace(leaf, a=jnp.ones((2, 48, 12)), b=jnp.ones((2, 12, 20)))
    assert not isinstance(factored.merge({"kernel": wide})["kernel"], Factored)


def test_factors_are_made_and_multiplied_out_in_full_precision():
    """An accelerator's own choice is a third of float32's digits, which a CPU doesn't show."""
    base = Factored(jnp.ones((48, 6)), jnp.ones((6, 60)))
    adapted = lora.attach(
        {"kernel": base}, ["kernel"], key=jax.random.key(0), rank=2, alpha=3.0, dora=True
    )

    def compute(kernel, basis, tree):
        made = [to_factored(kernel, 6), to_factored(kernel, 6, basis)]
        return [*made, factored.merge(tree), *(leaf.merge() for leaf in made)]

    program = jax.make_jaxpr(compute)(base.merge(), jnp.eye(60), adapted)
    products = [one for one in program.eqns if one.primitive.name == "dot_general"]
    products += [
        inner
        for one in program.eqns
        if "jaxpr" in one.params
        for inner in one.params["jaxpr"].eqns
        if inner.primitive.name == "dot_general"
    ]
    assert len(products) >= 5
    highest = jax.lax.Precision.HIGHEST
    assert {one.params["precision"] for one in products} == {(highest, highest)}


def make_tree(rng, quantized=False):
    kernels = {
        "fc": jnp.asarray(rng.normal(size=(64, 48)), jnp.float32),
        "conv": jnp.asarray(rng.normal(size=(3, 3, 8, 32)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(48, 5)), jnp.float32),
    }
    plain = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    return plain, factored.factorize(plain, {"fc/kernel": 8, "conv/kernel": 12})


@pytest.mark.long
def test_both_factors_are_quantized_described_and_made_again(rng):
    plain, tree = make_tree(rng)
    assert factored.ranks_of(tree) == {"fc/kernel": 8, "conv/kernel": 12}
    chosen = quantize.choose(tree, [".*kernel"], ["head/.*"])
    for form, inner in (("int8", Int8), ("fake_int8", FakeQuantized)):
        made = quantize.quantize(tree, chosen, quantize.FORMS[form])
        for name in ("fc", "conv"):
            leaf = made[name]["kernel"]
            assert isinstance(leaf.u, inner)
            assert isinstance(leaf.v, inner)
            assert relative(leaf.merge(), tree[name]["kernel"].merge()) < 0.02
    made = quantize.quantize(tree, chosen, quantize.FORMS["int8"])
    assert sorted(quantize.int8_kernels(made)) == [
        "conv/kernel/u",
        "conv/kernel/v",
        "fc/kernel/u",
        "fc/kernel/v",
    ]
    kept = quantize.merge_but_int8(made)
    assert jax.tree.structure(kept) == jax.tree.structure(made)
    floats = factored.merge(made)
    assert {x.dtype.name for x in jax.tree.leaves(floats)} == {"float32"}
    assert factored.ranks_of(floats) == factored.ranks_of(tree)

    calibrated = quantize.quantize_static(tree, chosen, {"fc/kernel": jnp.float32(0.1)})
    assert calibrated["fc"]["kernel"].u.input_scale == jnp.float32(0.1)
    small = jax.eval_shape(
        lambda tree: quantize.quantize(tree, chosen, quantize.FORMS["nf4"]), tree
    )
    for some in (tree, made, calibrated, small):
        told = json.loads(json.dumps(quantize.describe(some)))
        assert quantize.is_quantized(told) == (some is not tree)
        like = quantize.like(jax.eval_shape(lambda: plain), told)
        assert jax.tree.structure(like) == jax.tree.structure(some)
        for one, other in zip(jax.tree.leaves(like), jax.tree.leaves(some), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize(
    "told",
    [
        {"form": "factored", "rank": 0, "u": {}, "v": {}},
        {"form": "factored", "rank": 49, "u": {}, "v": {}},
        {"form": "factored", "rank": "8", "u": {}, "v": {}},
        {"form": "factored", "rank": 8, "u": {}},
        {"form": "factored", "rank": 8, "u": {}, "v": "int8"},
        {"form": "factored", "rank": 8, "u": {"form": "int8"}, "v": {}},
        {
            "form": "factored",
            "rank": 8,
            "u": {},
            "v": {"form": "factored", "rank": 2, "u": {}, "v": {}},
        },
    ],
)
def test_a_description_of_no_such_factors_is_refused(rng, told):
    with pytest.raises(UserError, match="fc/kernel: it cannot be quantized as"):
        quantize.like(make_tree(rng)[0], {"fc/kernel": told})


def test_factors_train_and_are_sharded_as_their_kernel_is(rng):
    _, tree = make_tree(rng)
    assert {role.rule_path for path, role in roles(tree).items() if path[:2] == "fc"} == {
        "fc/kernel"
    }
    assert trainable_paths(tree, ["fc/kernel"], field="trainable") == {"fc/kernel/u", "fc/kernel/v"}
    mesh = sharding.make_mesh(1, 8)
    made = sharding.parameter_shardings(tree, mesh, [("fc/kernel", ("fsdp",))])
    assert made["fc/kernel/u"].spec == made["fc/kernel/v"].spec == PartitionSpec("fsdp")
    placed = jax.device_put(tree, paths.unflatten(tree, made))
    x = jnp.asarray(rng.normal(size=(16, 64)), jnp.float32)
    there = jax.jit(dot)(x, placed["fc"]["kernel"])
    assert relative(there, dot(x, tree["fc"]["kernel"])) < 1e-5
    assert isinstance(
        lora.attach(tree, ["fc/kernel"], key=jax.random.key(0), rank=2, alpha=1.0)["fc"]["kernel"],
        LowRank,
    )


# Ranks --------------------------------------------------------------------------------------------


def make_layer(energy, shape=(16, 16), price=1, weight=1.0):
    return Layer(shape, price, Spectrum(np.asarray(energy, float), np.eye(16)), price, weight)


def test_ranks_are_those_of_the_least_error(rng):
    """Of all choices for three layers, by trying them: exactly where the last step fits."""
    layers = {
        name: make_layer(np.sort(rng.exponential(size=16) ** 2)[::-1], price=price, weight=weight)
        for name, price, weight in (("a", 3, 1.0), ("b", 1, 0.3), ("c", 2, 2.0))
    }
    options = {name: [0, *layer.ranks(1)] for name, layer in layers.items()}
    whole = sum(layer.cost(0) for layer in layers.values())

    def cost(ranks):
        return sum(layer.cost(ranks.get(name, 0)) for name, layer in layers.items())

    def error(ranks):
        return sum(layers[n].weight * layers[n].spectrum.left_out(r) for n, r in ranks.items() if r)

    every = [
        {"a": a, "b": b, "c": c} for a in options["a"] for b in options["b"] for c in options["c"]
    ]

    def least(budget):
        return min((error(one) for one in every if cost(one) <= budget), default=np.inf)

    steps = sorted(step for layer in layers.values() for step in layer.steps(1))
    for count in (1, len(steps) // 2, len(steps)):
        saved = sum(units for _, _, units in steps[:count])
        chosen = choose_ranks(layers, saved, 1)
        assert cost(chosen) == whole - saved
        np.testing.assert_allclose(error(chosen), least(whole - saved))
    longest = max(units for _, _, units in steps)
    for keep in (0.9, 0.6, 0.3):
        chosen = choose_ranks(layers, (1 - keep) * whole, 1)
        assert cost(chosen) <= keep * whole
        assert least(keep * whole) - 1e-12 <= error(chosen) <= least(keep * whole - longest) + 1e-12


def test_what_costs_nothing_goes_first():
    """A kernel of rank 2 loses nothing; one that nobody hears of goes before one that matters."""
    flat = np.ones(16)
    layers = {
        "loud": make_layer(flat, weight=100.0),
        "quiet": make_layer(flat, weight=0.01),
        "thin": make_layer([5, 1] + [0] * 14),
    }
    assert choose_ranks(layers, 1, 2) == {"thin": 2}
    assert choose_ranks(layers, 256 - 64 + 1, 2).keys() == {"thin", "quiet"}
    assert choose_ranks(layers, 10**9, 2) == dict.fromkeys(layers, 2)  # all that there is
    assert choose_ranks({"small": make_layer(np.ones(2), (2, 2))}, 1, 8) == {}
