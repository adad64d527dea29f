"""attach, merge, unmerge, detach and apply_adapters on a small ViT."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vision_jax.errors import UserError
from vision_jax.models.vit import ViT
from vision_jax.trees import lora, paths

RULES = (r"block_\d+/.*", "patch_embed/kernel")
SETTINGS = {
    "fused": {},
    "parts": {"qkv_parts": "q,v"},
    "dora": {"dora": True},
    "dora of parts": {"dora": True, "qkv_parts": "k"},
}


def make_vit(**arguments):
    defaults = {
        "num_classes": 5,
        "image_size": (16, 16),
        "patch_size": 8,
        "width": 24,
        "depth": 1,
        "num_heads": 2,
        "mlp_width": 40,
    }
    return ViT(**(defaults | arguments))


def random_like(rng, tree):
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype), tree)


def make_params(rng, dtype=jnp.float32, depth=1):
    model = make_vit(depth=depth)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    return random_like(
        rng, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes["params"])
    )


def make_images(rng, count=4, dtype=jnp.float32):
    return jnp.asarray(rng.uniform(size=(count, 16, 16, 3)), dtype)


def attach(params, rules=RULES, **settings):
    # This generator compiles faster than the default one.
    arguments = {"key": jax.random.key(1, impl="rbg"), "rank": 3, "alpha": 6.0} | settings
    return lora.attach(params, rules, **arguments)


def trained(rng, params):
    """The tree after some training: its adapters moved, all else as it was."""
    flat = paths.flatten(params)
    moved = random_like(rng, {path: flat[path] for path in lora.adapter_paths(params)})
    return paths.unflatten(params, flat | {path: flat[path] + x for path, x in moved.items()})


def relative_difference(actual, expected):
    return float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())


@pytest.mark.long(but=("settings2-float64",))
@pytest.mark.parametrize(
    ("settings", "dtype"),
    [(settings, "float64") for settings in SETTINGS.values()]
    + [(SETTINGS["parts"], "float32"), (SETTINGS["dora"], "float32")],
)
def test_merged_logits_equal_attached_ones(settings, dtype, rng):
    with jax.enable_x64(dtype == "float64"):
        model, params, images = (
            make_vit(dtype=dtype),
            make_params(rng, dtype),
            make_images(rng, 4, dtype),
        )
        fresh = attach(params, **settings)
        moved = trained(rng, fresh)

        @jax.jit
        def logits(*trees):
            return [model.apply({"params": tree}, images) for tree in trees]

        base, at_first, attached, merged = logits(params, fresh, moved, lora.merge(moved))
        tolerance = {"float32": 1e-6, "float64": 1e-13}[dtype]
        assert relative_difference(at_first, base) < tolerance
        assert relative_difference(attached, merged) < tolerance
        assert relative_difference(attached, base) > 1e-2


@pytest.mark.long
def test_scan_equals_unrolled_with_adapters(rng):
    params, images = (
        trained(rng, attach(make_params(rng, depth=2), [r"block_\d+/.*"], qkv_parts="q,v")),
        make_images(rng),
    )

    def loss(params, model):
        return jnp.sin(model.apply({"params": params}, images)).sum()

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, gradient = run(params, make_vit(depth=2))
    scanned, scanned_gradient = run(params, make_vit(depth=2, scan=True))
    assert relative_difference(scanned, value) < 1e-5
    gradient, scanned_gradient = paths.flatten(gradient), paths.flatten(scanned_gradient)
    for path in lora.adapter_paths(params):
        assert relative_difference(scanned_gradient[path], gradient[path]) < 1e-4, path


def test_fresh_adapters(rng):
    """A uniform within 1/√fan_in, B zero, scale by rank; shapes of dense, parts and convolution."""
    params = attach(make_params(rng, depth=2), rank=8, qkv_parts="q,v")
    flat = paths.flatten(params)
    shapes = {path: flat[path].shape for path in lora.adapter_paths(params)}
    assert len(shapes) == 2 * (2 * 4 + 1)
    assert shapes["block_1/attn/qkv/kernel/a"] == (2, 24, 8)
    assert shapes["block_1/attn/qkv/kernel/b"] == (2, 8, 24)
    assert shapes["block_0/mlp/fc1/kernel/a"] == (24, 8)
    assert shapes["block_0/mlp/fc1/kernel/b"] == (8, 40)
    assert shapes["patch_embed/kernel/a"] == (8, 8, 3, 8)
    assert shapes["patch_embed/kernel/b"] == (8, 24)
    for path in shapes:
        if path.endswith("/b"):
            assert not flat[path].any()
    for path, fan_in in (("block_0/mlp/fc1", 24), ("block_1/mlp/fc2", 40), ("patch_embed", 192)):
        a = np.asarray(flat[f"{path}/kernel/a"]) * np.sqrt(fan_in)
        assert np.abs(a).max() <= 1
        assert np.abs(a).max() > 0.95
        assert abs(a.std() - 1 / np.sqrt(3)) < 0.08
    params = make_params(rng)
    rules = ["head/kernel"]
    assert attach(params, rules, rank=4, alpha=6)["head"]["kernel"].scale == 1.5
    stabilized = attach(params, rules, rank=4, alpha=6, rank_stabilized=True, dropout=0.2)
    assert stabilized["head"]["kernel"].scale == 3.0
    assert stabilized["head"]["kernel"].dropout == 0.2


def test_the_whole_tree_of_a_vit_with_adapters():
    """Paths are public: checkpoints, rules and optimizer state know arrays by them."""
    params = jax.eval_shape(
        partial(attach, rank=3, dora=True, qkv_parts="q,v"),
        jax.eval_shape(make_vit().init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"],
    )
    assert {path: x.shape for path, x in paths.flatten(params).items()} == {
        "block_0/attn/proj/bias": (24,),
        "block_0/attn/proj/kernel/base": (24, 24),
        "block_0/attn/proj/kernel/a": (24, 3),
        "block_0/attn/proj/kernel/b": (3, 24),
        "block_0/attn/proj/kernel/magnitude": (24,),
        "block_0/attn/qkv/bias": (72,),
        "block_0/attn/qkv/kernel/base": (24, 72),
        "block_0/attn/qkv/kernel/a": (2, 24, 3),
        "block_0/attn/qkv/kernel/b": (2, 3, 24),
        "block_0/attn/qkv/kernel/magnitude": (72,),
        "block_0/mlp/fc1/bias": (40,),
        "block_0/mlp/fc1/kernel/base": (24, 40),
        "block_0/mlp/fc1/kernel/a": (24, 3),
        "block_0/mlp/fc1/kernel/b": (3, 40),
        "block_0/mlp/fc1/kernel/magnitude": (40,),
        "block_0/mlp/fc2/bias": (24,),
        "block_0/mlp/fc2/kernel/base": (40, 24),
        "block_0/mlp/fc2/kernel/a": (40, 3),
        "block_0/mlp/fc2/kernel/b": (3, 24),
        "block_0/mlp/fc2/kernel/magnitude": (24,),
        "block_0/norm1/bias": (24,),
        "block_0/norm1/scale": (24,),
        "block_0/norm2/bias": (24,),
        "block_0/norm2/scale": (24,),
        "cls_token": (1, 1, 24),
        "head/bias": (5,),
        "head/kernel": (24, 5),
        "norm/bias": (24,),
        "norm/scale": (24,),
        "patch_embed/bias": (24,),
        "patch_embed/kernel/base": (8, 8, 3, 24),
        "patch_embed/kernel/a": (8, 8, 3, 3),
        "patch_embed/kernel/b": (3, 24),
        "patch_embed/kernel/magnitude": (24,),
        "pos_embed": (1, 5, 24),
    }


@pytest.mark.long
def test_another_rule_leaves_other_adapters_alone(rng):
    params = make_params(rng, depth=2)
    few = paths.flatten(attach(params, ["block_0/.*"]))
    many = paths.flatten(attach(params, ["block_0/.*", "head/kernel", "block_1/mlp/.*"]))
    for path in few:
        if path.startswith("block_0/"):
            np.testing.assert_array_equal(few[path], many[path])
    a0, a1 = (attach(params, [f"block_{i}/mlp/fc1/kernel"])[f"block_{i}"] for i in range(2))
    assert (a0["mlp"]["fc1"]["kernel"].a != a1["mlp"]["fc1"]["kernel"].a).any()


@pytest.mark.long
def test_adapters_swap_over_one_base_bit_identical(rng):
    params = make_params(rng)
    first, second = (
        lora.detach(trained(rng, attach(params, rules, rank=rank)))[1]
        for rules, rank in ((["block_0/.*"], 2), (RULES, 3))
    )
    base = params
    for adapters in (first, second, first):
        base, again = lora.detach(lora.apply_adapters(base, adapters))
        assert_identical(again, adapters)
    assert_identical(base, params)


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.long
def test_unmerge_undoes_merge(rng):
    params = trained(rng, attach(make_params(rng), qkv_parts="q,v"))
    base, adapters = lora.detach(params)
    again = lora.unmerge(lora.merge(params), adapters)
    assert_identical(lora.detach(again)[1], adapters)
    for path, x in paths.flatten(lora.detach(again)[0]).items():
        np.testing.assert_allclose(x, paths.flatten(base)[path], atol=1e-6)
    dora = attach(base, ["head/kernel"], dora=True)
    dora_adapters = lora.detach(dora)[1]
    with pytest.raises(UserError, match="merged DoRA adapter cannot be undone"):
        lora.unmerge(lora.merge(dora), dora_adapters)


@pytest.mark.long
def test_frozen_leaves_stay_bit_identical_and_have_no_gradient_or_optimizer_state(rng):
    model, images = make_vit(), make_images(rng)
    params = attach(make_params(rng), [".*/(qkv|fc2)/kernel"], qkv_parts="q,v", dropout=0.1)
    flat = paths.flatten(params)
    chosen = lora.adapter_paths(params)
    trainable, frozen = paths.partition(flat, chosen)
    tx = optax.adamw(1e-2)

    def loss(trainable, frozen):
        tree = paths.unflatten(params, trainable | frozen)
        rngs = {"adapter": jax.random.key(5)}
        return jnp.square(model.apply({"params": tree}, images, train=True, rngs=rngs)).sum()

    @jax.jit
    def step(trainable, opt_state, frozen):
        gradient = jax.grad(loss)(trainable, frozen)
        updates, opt_state = tx.update(gradient, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    opt_state = tx.init(trainable)
    arrays = {x.shape for x in jax.tree.leaves(opt_state)}
    assert arrays == {x.shape for x in trainable.values()} | {()}
    new, opt_state = step(trainable, opt_state, frozen)
    new, _ = step(new, opt_state, frozen)
    for path in chosen:
        assert (new[path] != trainable[path]).any(), path
    base, _ = lora.detach(paths.unflatten(params, new | frozen))
    assert_identical(base, lora.detach(params)[0])


@pytest.mark.long
def test_attached_step_has_under_0_7_of_the_flops_of_full_fine_tuning():
    model = make_vit(width=192, depth=2, num_heads=3, mlp_width=768, image_size=(64, 64))
    images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rules = [r"block_\d+/attn/qkv/kernel", r"block_\d+/mlp/fc\d/kernel"]
    adapted = jax.eval_shape(lambda params: attach(params, rules, rank=2, qkv_parts="q,v"), params)

    def flops(like, chosen, transform=lambda tree: tree):
        trainable, frozen = paths.partition(paths.flatten(like), chosen)

        def loss(trainable, frozen, images):
            tree = transform(paths.unflatten(like, trainable | frozen))
            return model.apply({"params": tree}, images).sum()

        step = jax.jit(jax.grad(loss)).lower(trainable, frozen, images)
        return step.compile().cost_analysis()["flops"]

    adapters = lora.adapter_paths(adapted)
    full = flops(params, set(paths.flatten(params)))
    assert flops(adapted, adapters) <= 0.7 * full
    assert flops(adapted, adapters, lora.merge) > 0.85 * full  # what autodiff makes of it


@pytest.mark.long
def test_dropout_is_the_same_on_one_and_eight_devices(rng):
    model, images = make_vit(), make_images(rng, 16)
    params = trained(rng, attach(make_params(rng), [".*/(qkv|fc1)/kernel"], dropout=0.5))

    @jax.jit
    def logits(params, images, key):
        return model.apply({"params": params}, images, train=True, rngs={"adapter": key})

    one = logits(params, images, jax.random.key(7))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(images, NamedSharding(mesh, P("data")))
    replicated = jax.device_put(params, NamedSharding(mesh, P()))
    eight = logits(replicated, sharded, jax.random.key(7))
    assert len(eight.sharding.device_set) == 8
    assert relative_difference(eight, one) < 1e-5
    assert relative_difference(logits(params, images, jax.random.key(8)), one) > 1e-3
    still = jax.jit(lambda: model.apply({"params": params}, images))()
    merged = jax.jit(lambda: model.apply({"params": lora.merge(params)}, images))()
    assert relative_difference(still, merged) < 1e-6


@pytest.mark.long
def test_attach_to_sharded_and_abstract_parameters(rng):
    params = make_params(rng)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(params, NamedSharding(mesh, P()))
    sharded["block_0"]["mlp"]["fc1"]["kernel"] = jax.device_put(
        params["block_0"]["mlp"]["fc1"]["kernel"], NamedSharding(mesh, P("fsdp"))
    )
    expected = attach(params, dora=True)
    under_jit = jax.jit(lambda params: attach(params, dora=True))(sharded)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), under_jit, expected)
    shapes = jax.eval_shape(lambda params: attach(params, dora=True), params)
    assert jax.tree.map(jnp.shape, expected) == jax.tree.map(lambda x: x.shape, shapes)


REFUSED = {
    "rank": ({"rank": 0}, "lora.rank"),
    "alpha": ({"alpha": 0.0}, "lora.alpha"),
    "dropout": ({"dropout": 1.0}, "lora.dropout"),
    "parts": ({"qkv_parts": "q,w"}, "lora.qkv_parts: 'q,w'"),
    "no qkv": ({"rules": ["head/kernel"], "qkv_parts": "q"}, "needs a fused qkv kernel"),
    "a bias": ({"rules": ["head/bias"]}, "lora.rules: .* nearest path is 'head/kernel'"),
    "a typo": ({"rules": [r"blok_\d+/mlp/fc1/kernel"]}, "nearest path is 'block_./mlp/fc1/kernel'"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_attach_refuses(settings, message, rng):
    with pytest.raises(UserError, match=message) as error:
        attach(make_params(rng), **settings)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_refused(rng):
    params = make_params(rng)
    attached = attach(params, ["head/kernel"])
    adapters = lora.detach(attached)[1]
    with pytest.raises(UserError, match="head/kernel has an adapter already"):
        attach(attached, ["head/kernel"])
    with pytest.raises(UserError, match="head/kernel has an adapter already"):
        lora.apply_adapters(attached, adapters)
    with pytest.raises(UserError, match="nearest path is 'head/kernel'"):
        lora.apply_adapters(params, {"haed/kernel": adapters["head/kernel"]})
    with pytest.raises(UserError, match=r"'block_0/mlp/fc1/kernel' has A \(24, 3\) and B \(3, 5\)"):
        lora.apply_adapters(params, {"block_0/mlp/fc1/kernel": adapters["head/kernel"]})
    with pytest.raises(UserError, match="is no kernel of a dense or convolution layer"):
        lora.attach({"x": {"kernel": jnp.ones(3)}}, [".*"], key=jax.random.key(0), rank=1, alpha=1)
