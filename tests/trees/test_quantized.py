"""Quantized leaves against their definitions, written out in numpy."""

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax import sharding
from vision_jax.errors import UserError
from vision_jax.models.vit import ViT
from vision_jax.trees import lora, paths, quantize
from vision_jax.trees.leaf import convolve, dot, roles, trainable_paths
from vision_jax.trees.masked import to_n_of_m
from vision_jax.trees.quantized import (
    NF4_CODE,
    FakeQuantized,
    Int8,
    dynamic_code,
    to_int8,
    to_nf4,
)

KERNELS = [r"block_\d+/.*kernel", "patch_embed/kernel"]
FORMS = {
    "int8": to_int8,
    "int8, dynamic": lambda kernel: to_int8(kernel, dynamic=True),
    "int8, static": lambda kernel: to_int8(kernel, input_scale=jnp.asarray(0.05, kernel.dtype)),
    "nf4": to_nf4,
    "nf4, plain scales": lambda kernel: to_nf4(kernel, block_size=16, double=False),
    "fake": FakeQuantized,
    "fake, dynamic": lambda kernel: FakeQuantized(kernel, dynamic=True),
}


def relative(actual, expected):
    assert actual.shape == expected.shape
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())


def by_output(kernel):
    return np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]).T  # [out, K]


# int8 --------------------------------------------------------------------------------------------


def test_int8_is_the_nearest_of_255_levels_of_each_output(rng):
    for shape in ((7, 5), (3, 2, 4, 6)):
        kernel = rng.normal(size=shape).astype(np.float32)
        kernel[..., 1] = 0
        leaf = to_int8(jnp.asarray(kernel))
        for values, scale, row in zip(
            by_output(leaf.values), np.asarray(leaf.scale), by_output(kernel), strict=True
        ):
            largest = np.abs(row).max() or 127
            assert scale == pytest.approx(largest / 127, rel=1e-6)
            assert np.abs(values * scale - row).max() <= (0.5 + 1e-4) * scale
            if row.any():
                assert np.abs(values).max() == 127  # and not 127.5, which loses the largest
        assert relative(leaf.merge(), kernel.astype(np.float64)) < 0.5 / 127 + 1e-6
        assert (np.asarray(leaf.merge())[..., 1] == 0).all()


def rounded(x, axes, fixed=None):
    """(whole numbers, scale) of float64 inputs."""
    scale = np.abs(x).max(axes, keepdims=True) / 127 if fixed is None else np.float64(fixed)
    return np.clip(np.round(x / scale), -127, 127), scale


@pytest.mark.parametrize("fixed", [None, 0.03], ids=["dynamic", "static"])
def test_int8_inputs_multiply_as_integers(rng, fixed):
    """Beyond what float32 could add exactly: 3,000 products of up to 127 · 127."""
    with jax.enable_x64(True):
        x = rng.uniform(2, 3, size=(3, 4, 3000))
        kernel = rng.uniform(0.5, 1, size=(3000, 6))
        leaf = to_int8(
            jnp.asarray(kernel),
            dynamic=fixed is None,
            input_scale=None if fixed is None else jnp.asarray(fixed),
        )
        whole, scale = rounded(x, -1, fixed)
        total = whole.astype(np.int64) @ np.asarray(leaf.values, np.int64)
        assert np.abs(total).max() > 2**24
        expected = total * scale * np.asarray(leaf.scale)
        assert relative(dot(jnp.asarray(x), leaf), expected) < 1e-14
        assert relative(dot(jnp.asarray(x, jnp.float32), leaf), expected) < 1e-4  # some x round so


@pytest.mark.long
def test_convolutions_of_integers(rng):
    with jax.enable_x64(True):
        x = rng.normal(size=(2, 9, 8, 4))
        for window, strides, padding, groups, dilation in (
            ((3, 2), (2, 1), ((1, 2), (0, 1)), 1, 1),
            ((3, 3), (1, 1), ((1, 1), (1, 1)), 2, 1),
            ((3, 3), (1, 1), ((1, 1), (1, 1)), 4, 1),
            ((3, 2), (3, 2), ((0, 0), (0, 0)), 1, 1),
            ((1, 1), (2, 2), ((0, 0), (0, 0)), 1, 1),
            ((2, 2), (1, 1), ((2, 2), (2, 2)), 1, 2),
        ):
            kernel = jnp.asarray(rng.normal(size=(*window, 4 // groups, 8)))
            leaf = to_int8(kernel, dynamic=True)
            whole, scale = rounded(x, (1, 2, 3))
            expected = jax.lax.conv_general_dilated(  # of whole numbers below 2**53
                jnp.asarray(whole),
                leaf.values.astype(jnp.float64),
                strides,
                padding,
                rhs_dilation=(dilation, dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
            expected = np.asarray(expected) * scale * np.asarray(leaf.scale)
            actual = convolve(jnp.asarray(x), leaf, strides, padding, groups, dilation=dilation)
            assert relative(actual, expected) < 1e-14


def test_the_gradient_passes_the_rounding_and_stops_where_inputs_are_clipped(rng):
    with jax.enable_x64(True):
        x, dy = jnp.asarray(rng.normal(size=(3, 5, 8))), jnp.asarray(rng.normal(size=(3, 5, 6)))
        kernel = jnp.asarray(rng.normal(size=(8, 6)))

        def gradient(leaf):
            return jax.grad(lambda x: (dot(x, leaf) * dy).sum())(x)

        merged = np.asarray(dy @ to_int8(kernel).merge().T)
        for leaf in (to_int8(kernel), to_int8(kernel, dynamic=True)):
            assert relative(gradient(leaf), merged) < 1e-14
        fixed = 0.5 / 127
        clipped = gradient(to_int8(kernel, input_scale=jnp.asarray(fixed)))
        outside = np.abs(np.asarray(x)) > 127 * fixed
        assert outside.any()
        assert relative(clipped, np.where(outside, 0, merged)) < 1e-14


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_trains_for_int8_computes_what_int8_will(rng, dynamic):
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(rng.normal(size=(5, 8))), jnp.asarray(rng.normal(size=(8, 6)))
        fake = FakeQuantized(kernel, dynamic)
        expected = np.asarray(dot(x, to_int8(kernel, dynamic=dynamic)))
        assert relative(dot(x, fake), expected) < 1e-14
        np.testing.assert_array_equal(to_int8(fake.merge()).values, to_int8(kernel).values)

        dkernel = jax.grad(lambda kernel: dot(x, FakeQuantized(kernel, dynamic)).sum())(kernel)
        whole, scale = rounded(np.asarray(x), -1)
        seen = whole * scale if dynamic else np.asarray(x)
        assert relative(dkernel, np.repeat(seen.sum(0)[:, None], 6, 1)) < 1e-14


# 4 bits ------------------------------------------------------------------------------------------


def test_the_codes_are_quantiles_of_a_normal_distribution():
    """QLoRA, equation 4 and appendix E: 8 positive and 7 negative ones, and zero."""
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    positive = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    found = np.sort([*positive, 0, *negative])
    np.testing.assert_allclose(NF4_CODE, found / found.max(), atol=2e-4)

    code = dynamic_code()
    assert len(np.unique(code)) == 256
    for decade in range(7):
        inside = (np.abs(code) > 0.1 * 10.0**-decade) & (np.abs(code) < 10.0**-decade)
        assert inside.sum() == 2 * 2 ** (6 - decade)
        middles = np.sort(code[inside & (code > 0)])
        np.testing.assert_allclose(np.diff(middles), 0.9 * 10.0**-decade / (len(middles)), 1e-3)


def nearest(x, code):
    return np.abs(np.asarray(x)[..., None] - code.astype(np.float64)).argmin(-1)


@pytest.mark.long(but=("(37, 5)-False",))
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(64, 3), (37, 5), (3, 3, 5, 4), (300, 9)], ids=str)
def test_nf4_is_the_nearest_code_of_each_block(rng, shape, double):
    size = 16
    with jax.enable_x64(True):
        kernel = rng.normal(size=shape)
        kernel.reshape(-1, shape[-1])[:size, 0] = 0
        leaf = to_nf4(jnp.asarray(kernel), block_size=size, double=double)
        inputs = math.prod(shape[:-1])
        assert leaf.codes.shape == (-(-inputs // 2), shape[-1])
        rows = by_output(kernel)
        blocks = [[row[i : i + size] for i in range(0, inputs, size)] for row in rows]
        largest = np.array([[np.abs(block).max() for block in row] for row in blocks])
        used = largest
        if double:
            flat = largest.reshape(-1) - largest.mean()
            scales = [np.abs(flat[i : i + 256]).max() for i in range(0, flat.size, 256)]
            np.testing.assert_allclose(leaf.absmax_scale, scales, rtol=1e-12)
            of_each = np.repeat(scales, 256)[: flat.size]
            code = dynamic_code()
            used = code[nearest(flat / of_each, code)].astype(np.float64) * of_each
            used = used.reshape(largest.shape) + largest.mean()
        expected = [
            np.concatenate(
                [NF4_CODE[nearest(b / (top or 1), NF4_CODE)] * np.float64(now)
                 for b, top, now in zip(row, tops, nows, strict=True)]
            )
            for row, tops, nows in zip(blocks, largest, used, strict=True)
        ]  # fmt: skip
        assert relative(by_output(leaf.merge()), np.array(expected)) < 1e-12
        assert leaf.shape == shape
        assert leaf.dtype == jnp.float64
        error = np.abs(by_output(leaf.merge()) - rows).mean() / np.abs(rows).mean()
        assert error < 0.12


# In a tree ---------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_formula(rng):
    for _ in range(4):
        shape = tuple(rng.integers(1, 90, rng.choice([2, 4])).tolist())
        kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
        for form, settings in (
            ("int8", {}),
            ("fake_int8", {}),
            ("nf4", {"block_size": 16}),
            ("nf4", {"double": False}),
        ):
            leaf = jax.eval_shape(lambda x: quantize.FORMS[form](x, **settings), kernel)  # noqa: B023
            size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(leaf))
            assert size == quantize.kernel_bytes(shape, form, **settings), (shape, form)


def test_what_is_chosen():
    names = ("block_0/fc1", "class_head", "box_head/fc3", "head", "roi_head/fc1", "head_0/conv1")
    params = {name: {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)} for name in names}
    params["embedding"] = {"kernel": jnp.ones((3, 4, 4))}
    from vision_jax.config import default_config

    fields = default_config("detection").quantize
    chosen = quantize.choose(params, fields.rules, fields.keep)
    assert chosen == {f"{name}/kernel" for name in ("block_0/fc1", "roi_head/fc1", "head_0/conv1")}
    with pytest.raises(UserError, match=r"q.rules: rule 'fc7/.\*' matches no kernel"):
        quantize.choose(params, ["fc7/.*"], field="q.rules")
    with pytest.raises(UserError, match="nothing is left to change"):
        quantize.choose(params, ["head/.*"], ["head/.*"])
    tree = quantize.quantize(params, chosen, to_int8)
    with pytest.raises(UserError, match=r"block_0/fc1/kernel is no plain kernel"):
        quantize.quantize(tree, chosen, to_int8)


@pytest.mark.long(but=("int8",))
@pytest.mark.parametrize("form", FORMS)
def test_zeros_of_a_mask_stay(rng, form):
    """And what is quantized is the kernel with its zeros; training for int8 leaves them alone."""
    kernel = jnp.asarray(rng.normal(size=(12, 5)), jnp.float32)
    masked = {"fc": {"kernel": to_n_of_m(kernel)}}
    leaf = quantize.quantize(masked, {"fc/kernel"}, FORMS[form])["fc"]["kernel"]
    zeros = ~np.asarray(masked["fc"]["kernel"].mask)
    assert not np.asarray(leaf.merge())[zeros].any()
    plain = FORMS[form](masked["fc"]["kernel"].merge())
    np.testing.assert_array_equal(leaf.merge(), plain.merge())
    if form.startswith("fake"):
        x = jnp.asarray(rng.normal(size=(3, 12)), jnp.float32)
        gradient = jax.grad(lambda leaf: dot(x, leaf).sum(), allow_int=True)(leaf).base.base
        assert not np.asarray(gradient)[zeros].any()
        assert np.asarray(gradient)[~zeros].all()


def make_vit(**arguments):
    sizes = {"width": 24, "depth": 1, "num_heads": 2, "mlp_width": 40}
    return ViT(num_classes=5, image_size=(16, 16), patch_size=8, **(sizes | arguments))


def make_tree(rng, form, dtype):
    shapes = jax.eval_shape(make_vit().init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, dtype), shapes["params"]
    )
    return quantize.quantize(params, quantize.choose(params, KERNELS), FORMS[form])


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_a_model_computes_with_it_and_trains_on_it(rng, form):
    """Logits, the images' gradient, adapters' gradients: those of the merged kernels."""
    exact = form in ("int8", "nf4", "nf4, plain scales", "fake")
    with jax.enable_x64(True):
        tree = make_tree(rng, form, jnp.float64)
        images = jnp.asarray(rng.uniform(size=(2, 16, 16, 3)))
        model = make_vit(dtype=jnp.float64)
        attach = {"rules": KERNELS, "key": jax.random.key(0), "rank": 2, "alpha": 4.0}
        over = lora.attach(tree, **attach, dora=True)
        plain = lora.attach(lora.merge(tree), **attach, dora=True)

        @jax.jit
        def evaluate(params):
            def loss(images, params):
                return jnp.square(model.apply({"params": params}, images)).sum()

            adapters = lora.detach(params)[1]

            def adapted(adapters):
                return loss(images, lora.apply_adapters(lora.detach(params)[0], adapters))

            return (
                model.apply({"params": params}, images),
                jax.grad(loss)(images, params),
                jax.grad(adapted)(adapters) if adapters else {},
            )

        found, expected = evaluate(tree), evaluate(lora.merge(tree))
        for ours, theirs in zip(found[:2], expected[:2], strict=True):
            assert (relative(ours, np.asarray(theirs)) < 1e-12) == exact
        scanned = model.clone(scan=True).apply({"params": tree}, images)
        assert relative(scanned, np.asarray(found[0])) < 1e-12
        ours, theirs = evaluate(over), evaluate(plain)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert not np.asarray(other).any() or relative(one, np.asarray(other)) < 1e-12


@pytest.mark.long
def test_what_trains_and_how_it_is_sharded():
    kernels = {"fc": {"kernel": jnp.ones((256, 512))}, "out": {"kernel": jnp.ones((512, 256))}}
    tree = {
        **quantize.quantize({"fc": kernels["fc"]}, {"fc/kernel"}, to_nf4),
        **quantize.quantize({"out": kernels["out"]}, {"out/kernel"}, FakeQuantized),
    }
    assert trainable_paths(tree, [".*"], field="trainable") == {"out/kernel/base"}
    tree = lora.attach(tree, ["fc/kernel"], key=jax.random.key(0), rank=2, alpha=4.0)
    assert trainable_paths(tree, [".*"], field="trainable") == {
        "fc/kernel/a",
        "fc/kernel/b",
        "out/kernel/base",
    }
    assert roles(tree)["out/kernel/base"].rule_path == "out/kernel"
    mesh = sharding.make_mesh(1, 8)
    placed = jax.device_put(tree, paths.unflatten(tree, sharding.parameter_shardings(tree, mesh)))
    codes = placed["fc"]["kernel"].base.codes
    assert {shard.data.shape for shard in codes.addressable_shards} == {(128, 64)}
    merged = jax.jit(lora.merge)(placed)
    jax.tree.map(np.testing.assert_array_equal, merged, lora.merge(tree))


def test_an_int8_base_keeps_its_bits_and_its_adapters(rng):
    tree = {"fc": {"kernel": to_int8(jnp.asarray(rng.normal(size=(8, 6)), jnp.float32))}}
    adapted = lora.attach(lora.merge(tree), [".*"], key=jax.random.key(0), rank=2, alpha=4.0)
    moved = lora.move_adapters(adapted, tree)
    assert isinstance(moved["fc"]["kernel"].base, Int8)
    np.testing.assert_array_equal(moved["fc"]["kernel"].a, adapted["fc"]["kernel"].a)
    np.testing.assert_array_equal(moved["fc"]["kernel"].base.values, tree["fc"]["kernel"].values)


def test_the_share_of_a_change_that_rounding_leaves(rng):
    first = {"kernel": jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)}
    base = quantize.quantize(first, {"kernel"}, to_int8)
    before = lora.merge(base)

    def share(change):
        wanted = {"kernel": before["kernel"] + change}
        after = lora.merge(quantize.quantize(wanted, {"kernel"}, to_int8))
        return quantize.surviving_share(before, wanted, after)["kernel"]

    step = np.asarray(base["kernel"].scale)
    inner = np.abs(np.asarray(base["kernel"].values)) < 120  # so that no scale changes
    tiny = jnp.asarray(np.where(inner, 0.4 * step, 0))
    assert share(tiny) == pytest.approx(0, abs=1e-4)
    assert share(2 * step * inner) == pytest.approx(1, abs=1e-4)
    assert quantize.surviving_share(before, before, before) == {}
