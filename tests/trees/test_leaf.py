"""A leaf that the package does not know: all that it takes is its class.

`Quantized`, `Masked` and `Flat` below are whole leaves. Layers multiply by them, adapters sit on
them, and training, sharding and export know what to do with their arrays.
"""

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.errors import ScopeParamShapeError
from jax.sharding import PartitionSpec

from vision_jax import sharding
from vision_jax.errors import UserError
from vision_jax.models.layers import Conv
from vision_jax.models.vit import ViT
from vision_jax.trees import lora, paths
from vision_jax.trees.leaf import (
    Leaf,
    convolve,
    leaves,
    map_leaves,
    roles,
    trainable_paths,
)

KERNELS = (r"block_\d+/.*kernel", "patch_embed/kernel")
ADAPTED = (r"block_\d+/(attn|mlp)/(qkv|fc1)/kernel", "patch_embed/kernel")
KEY = jax.random.key(1, impl="rbg")  # this generator compiles faster than the default one
ADAPTERS = {
    "plain": {},
    "dora": {"dora": True},
    "dora of parts, dropout": {"dora": True, "qkv_parts": "q,v", "dropout": 0.5},
}


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Quantized(Leaf):
    """values · scale: int8[..., in, out] and one f[out] a column."""

    trains: ClassVar = {"values": False, "scale": False}
    like_kernel: ClassVar = ("values",)

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return self.scale.dtype

    def merge(self):
        return self.values.astype(self.dtype) * self.scale.reshape((1,) * (self.ndim - 1) + (-1,))


@partial(jax.tree_util.register_dataclass, data_fields=["base", "mask"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Masked(Leaf):
    """base where mask[..., in, out] is True, else 0; the base trains by rule, as a kernel does."""

    trains: ClassVar = {"mask": False}
    like_kernel: ClassVar = ("base",)

    base: jax.Array
    mask: jax.Array

    @property
    def shape(self):
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def merge(self):
        return jnp.where(self.mask, self.base, 0)


@partial(jax.tree_util.register_dataclass, data_fields=["row"], meta_fields=["made_of"])
@dataclasses.dataclass(frozen=True)
class Flat(Leaf):
    """A kernel as one row, which trains by rule: its array has another shape than the kernel."""

    row: jax.Array
    made_of: tuple[int, ...]

    @property
    def shape(self):
        return self.made_of

    @property
    def dtype(self):
        return self.row.dtype

    def merge(self):
        return self.row.reshape(self.made_of)


def quantize(kernel):
    scale = jnp.abs(kernel).max(tuple(range(kernel.ndim - 1))) / 127
    shape = (1,) * (kernel.ndim - 1) + (-1,)
    return Quantized(jnp.round(kernel / scale.reshape(shape)).astype(jnp.int8), scale)


def prune(kernel):
    return Masked(kernel, jnp.abs(kernel) > 0.1)


def flatten(kernel):
    return Flat(kernel.reshape(-1), kernel.shape)


def put(function, params, rules=KERNELS):
    """The tree with function(kernel) in place of the kernels that the rules choose."""
    chosen = paths.select(leaves(params), rules, field="rules")
    return map_leaves(lambda path, leaf: function(leaf) if path in chosen else leaf, params)


def make_vit(depth=1, **arguments):
    defaults = {"num_classes": 5, "image_size": (16, 16), "patch_size": 8}
    sizes = {"width": 24, "depth": depth, "num_heads": 2, "mlp_width": 40}
    return ViT(**(defaults | sizes | arguments))


def make_params(dtype=jnp.float32, depth=1):
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(make_vit(depth).init, jax.random.key(0), make_images(1))["params"]
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape) * 0.2, dtype), shapes)


def make_images(count=4, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).uniform(size=(count, 16, 16, 3)), dtype)


def moved(params):
    """Its adapters after some training."""
    random = np.random.default_rng(2)
    flat = paths.flatten(params)
    for path in sorted(lora.adapter_paths(params)):
        flat[path] += jnp.asarray(random.normal(size=flat[path].shape) * 0.2, flat[path].dtype)
    return paths.unflatten(params, flat)


def relative_difference(actual, expected):
    assert actual.shape == expected.shape
    return float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.long(but=("prune",))
@pytest.mark.parametrize("make", [quantize, prune, flatten])
def test_a_model_computes_with_it_what_it_computes_with_the_merged_kernels(make):
    """Dense layers, the patch embedding and, stacked, blocks in a scan."""
    with jax.enable_x64(True):
        params, images = make_params(jnp.float64, depth=2), make_images(4, jnp.float64)
        tree = put(make, params)
        assert len(paths.flatten(tree)) >= len(paths.flatten(params))
        model = make_vit(depth=2, dtype=jnp.float64)

        @jax.jit
        def logits(tree, params):
            return (
                model.apply({"params": params}, images),
                model.apply({"params": lora.merge(tree)}, images),
                model.apply({"params": tree}, images),
                model.clone(scan=True).apply({"params": tree}, images),
            )

        plain, merged, ours, scanned = logits(tree, params)
        assert relative_difference(ours, merged) < 1e-13
        assert relative_difference(scanned, merged) < 1e-13
        assert (relative_difference(ours, plain) > 1e-4) == (make is not flatten)


@pytest.mark.long
def test_convolutions(rng):
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(2, 7, 8, 4)))
        for strides, padding, groups, dilation in (
            ((2, 1), ((1, 2), (0, 1)), 1, 1),
            ((1, 1), ((1, 1), (1, 1)), 2, 1),
            ((3, 2), ((0, 0), (0, 0)), 1, 1),
            ((3, 2), ((0, 0), (0, 0)), 1, 2),
        ):
            conv = Conv(6, (3, 2), strides, padding, groups, dilation, dtype=jnp.float64)
            kernel = jnp.asarray(rng.normal(size=(3, 2, 4 // groups, 6)))
            bias = jnp.asarray(rng.normal(size=6))
            leaf = quantize(kernel)
            expected = jax.lax.conv_general_dilated(
                x,
                leaf.merge(),
                strides,
                padding,
                rhs_dilation=(dilation, dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
            for given in (leaf, leaf.merge()):
                actual = conv.apply({"params": {"kernel": given, "bias": bias}}, x)
                assert relative_difference(actual - bias.reshape(1, 1, 1, -1), expected) < 1e-13
                actual = convolve(x, given, strides, padding, groups, dilation=dilation)
                assert relative_difference(actual, expected) < 1e-13


def test_a_kernel_of_another_shape_is_refused_whatever_stands_in_for_it():
    model, params = make_vit(), make_params()
    for make in (lambda x: x, quantize, prune, flatten):
        params["head"]["kernel"] = make(jnp.ones((24, 6)))
        with pytest.raises(
            ScopeParamShapeError, match=r'"kernel" in "head".* \(24, 5\).* \(24, 6\)'
        ):
            jax.eval_shape(model.apply, {"params": params}, make_images())


@pytest.mark.long
@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_over_it_have_the_gradients_that_they_have_over_the_merged_kernels(settings):
    with jax.enable_x64(True):
        model, images = make_vit(dtype=jnp.float64), make_images(4, jnp.float64)
        tree = put(quantize, make_params(jnp.float64))
        over_leaves, over_arrays = (
            moved(lora.attach(base, ADAPTED, key=KEY, rank=3, alpha=6.0, **settings))
            for base in (tree, lora.merge(tree))
        )
        adapters = lora.adapter_paths(over_leaves)
        assert adapters == lora.adapter_paths(over_arrays)
        assert "block_0/attn/qkv/kernel/base/values" in paths.flatten(over_leaves)
        assert_identical(lora.detach(over_leaves)[0], tree)

        def loss(trainable, frozen, like):
            params = paths.unflatten(like, trainable | frozen)
            rngs = {"adapter": jax.random.key(5)}
            return jnp.sin(model.apply({"params": params}, images, train=True, rngs=rngs)).sum()

        def evaluate(params):
            trainable, frozen = paths.partition(paths.flatten(params), adapters)
            return jax.value_and_grad(loss)(trainable, frozen, params), lora.merge(params)

        actual, expected = jax.jit(lambda *trees: [evaluate(tree) for tree in trees])(
            over_leaves, over_arrays
        )
        for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert relative_difference(ours, theirs) < 1e-12
        assert all(jnp.abs(gradient).max() > 1e-6 for gradient in actual[0][1].values())
        assert_identical(*map(jax.tree.structure, (actual[1], make_params())))


def test_what_trains_is_what_the_leaf_says_and_then_what_the_rules_say():
    params = make_params()
    attach = partial(lora.attach, key=KEY, rank=2, alpha=4.0)
    kernel = "block_0/attn/qkv/kernel"
    tree = put(prune, attach(put(quantize, params), [kernel]), ["head/kernel"])
    everything = set(paths.flatten(tree))
    fixed = {path for path in everything if path.endswith(("/values", "kernel/scale", "/mask"))}
    fixed.add(f"{kernel}/base/scale")
    assert {f"{kernel}/base/values", "block_0/mlp/fc1/kernel/scale", "head/kernel/mask"} < fixed
    assert trainable_paths(tree, [".*"], field="trainable") == everything - fixed
    factors = {f"{kernel}/a", f"{kernel}/b"}
    assert trainable_paths(tree, [], field="trainable") == factors
    for rules in (["head/.*"], ["head/kernel", "head/bias"]):  # as without the mask
        head = trainable_paths(tree, rules, field="trainable") - factors
        assert head == {"head/kernel/base", "head/bias"}
    for rule in (f"{kernel}/base/.*", r"block_0/mlp/fc1/kernel.*", "head/kernel/mask"):
        with pytest.raises(UserError, match=r"^trainable: rule .* matches no parameter"):
            trainable_paths(tree, [rule], field="trainable")


@pytest.mark.long
def test_a_step_leaves_what_is_fixed_bit_identical_and_keeps_no_state_for_it():
    model, images = make_vit(), make_images()
    params = put(quantize, make_params())
    params = lora.attach(params, ADAPTED, key=KEY, rank=2, alpha=4.0)
    params = put(prune, params, ["head/kernel"])
    chosen = trainable_paths(params, ["head/.*"], field="trainable")
    trainable, frozen = paths.partition(paths.flatten(params), chosen)
    assert {str(array.dtype) for array in trainable.values()} == {"float32"}
    tx = optax.adamw(1e-2)

    @jax.jit
    def step(trainable, opt_state, frozen):
        def loss(trainable):
            tree = paths.unflatten(params, trainable | frozen)
            return jnp.square(model.apply({"params": tree}, images)).sum()

        updates, opt_state = tx.update(jax.grad(loss)(trainable), opt_state, trainable)
        return optax.apply_updates(trainable, updates), frozen

    new, same = step(trainable, tx.init(trainable), frozen)
    assert_identical(same, frozen)
    for path in chosen - {path for path in chosen if path.endswith("/a")}:  # B is zero at first
        assert (new[path] != trainable[path]).any(), path
    pruned = ~frozen["head/kernel/mask"]
    merged = lora.merge(paths.unflatten(params, new | same))["head"]["kernel"]
    assert pruned.any()
    assert not merged[pruned].any()


def test_it_is_sharded_as_its_kernel_is():
    mesh = sharding.make_mesh(1, 8)
    kernels = {"fc": {"kernel": jnp.ones((256, 512))}, "out": {"kernel": jnp.ones((512, 256))}}
    tree = put(quantize, kernels, [".*"])
    tree = lora.attach(tree, ["fc/kernel"], key=KEY, rank=2, alpha=4.0)
    assert {path: role.rule_path for path, role in roles(tree).items()} == {
        "fc/kernel/base/values": "fc/kernel",
        "fc/kernel/base/scale": "fc/kernel/scale",
        "fc/kernel/a": "fc/kernel/a",
        "fc/kernel/b": "fc/kernel/b",
        "out/kernel/values": "out/kernel",
        "out/kernel/scale": "out/kernel/scale",
    }
    made = sharding.parameter_shardings(tree, mesh, [("fc/kernel", ("fsdp",))])
    plain = sharding.parameter_shardings(kernels, mesh, [("fc/kernel", ("fsdp",))])
    assert made["fc/kernel/base/values"] == plain["fc/kernel"]
    assert made["out/kernel/values"] == plain["out/kernel"]
    assert plain["out/kernel"].spec == PartitionSpec("fsdp", None)
    assert made["fc/kernel/base/scale"].spec == PartitionSpec()
    placed = jax.device_put(tree, paths.unflatten(tree, made))
    values = placed["fc"]["kernel"].base.values
    assert {shard.data.shape for shard in values.addressable_shards} == {(32, 512)}
    for one, other in zip(jax.tree.leaves(placed), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(one, other)
