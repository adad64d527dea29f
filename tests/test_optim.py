"""Schedules and optimizers against their published update rules, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vision_jax import optim
from vision_jax.errors import UserError

SHAPES = {
    "patch_embed/kernel": (2, 2, 3, 8),
    "pos_embed": (1, 5, 8),
    "cls_token": (1, 1, 8),
    "block_0/norm1/scale": (8,),
    "block_0/attn/qkv/kernel/a": (2, 8, 4),
    "block_0/attn/qkv/kernel/b": (2, 4, 8),
    "block_0/mlp/fc1/kernel": (8, 16),
    "block_0/mlp/fc1/bias": (16,),
    "block_0/attn/relative_position_bias_table": (9, 2),
    "block_0/attn/logit_scale": (2, 1, 1),
    "block_0/attn/cpb_mlp/hidden/kernel": (2, 8),
    "head/kernel": (8, 4),
    "head/bias": (4,),
}
DECAYED = {path for path in SHAPES if "kernel" in path and "cpb_mlp" not in path}
INSIDE = {path for path in SHAPES if "kernel" in path and path.startswith("block_0")}
LR, WD, B1, B2, EPS, MOMENTUM = 1e-2, 0.3, 0.8, 0.95, 1e-8, 0.7


def random_tree(rng, scale=1.0):
    return {path: scale * rng.normal(size=shape) for path, shape in SHAPES.items()}


def to_float32(tree):
    return {path: jnp.asarray(array, jnp.float32) for path, array in tree.items()}


def to_jax(tree):
    return {path: jnp.asarray(array) for path, array in tree.items()}


def make(name, params, **changed):
    arguments = {
        "schedule": optim.make_schedule("constant", peak=LR, total_steps=100),
        "params": params,
        "weight_decay": WD,
        "b1": B1,
        "b2": B2,
        "eps": EPS,
        "momentum": MOMENTUM,
    }
    return optim.make_optimizer(name, **(arguments | changed))


def train(tx, params, gradients):
    """Parameters after one update per gradient, in float64."""
    with jax.enable_x64(True):
        params = to_jax(params)
        state, update = tx.init(params), jax.jit(tx.update)
        for gradient in gradients:
            updates, state = update(to_jax(gradient), state, params)
            params = optax.apply_updates(params, updates)
        return {path: np.asarray(array) for path, array in params.items()}


# --- Schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 7, 50])
def test_schedule_is_its_formula(name, warmup):
    peak, final, total = 0.3, 0.1, 50
    schedule = jax.jit(
        optim.make_schedule(
            name, peak=peak, total_steps=total, warmup_steps=warmup, final_fraction=final
        )
    )
    for step in range(total + 1):
        if step < warmup:
            expected = peak * (step + 1) / warmup
        else:
            done = (step - warmup) / (total - warmup) if total > warmup else 0.0
            shape = {"cosine": (1 + np.cos(np.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
            expected = peak * (final + (1 - final) * shape.get(name, 0))
            if name == "step":
                expected = peak / 10 if step >= 34 else peak  # 2/3 of 50 is 33.3
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_no_update_of_a_run_has_rate_0(name):
    for warmup in (0, 1, 3, 10):
        rate = optim.make_schedule(name, peak=0.3, total_steps=10, warmup_steps=warmup)
        rates = [float(rate(step)) for step in range(10)]
        assert min(rates) > 0
        assert max(rates) == pytest.approx(0.3)


def test_schedule_stays_at_its_end():
    schedule = optim.make_schedule("cosine", peak=1.0, total_steps=10, final_fraction=0.2)
    np.testing.assert_allclose([schedule(10), schedule(1000)], 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "cosin"}, "did you mean 'cosine'"),
        ({"warmup_steps": 11}, "warmup_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"total_steps": 0}, "total_steps"),
        ({"peak": float("nan")}, "peak"),
        ({"final_fraction": 1.5}, "final_fraction"),
        ({"drop_at": 0.0}, "drop_at"),
    ],
)
def test_impossible_schedule_is_a_user_error(changed, message):
    arguments = {"name": "cosine", "peak": 1.0, "total_steps": 10, "warmup_steps": 2} | changed
    with pytest.raises(UserError, match=message):
        optim.make_schedule(**arguments)


# --- Update rules ---------------------------------------------------------------------------------


def adam(memory, g, t):
    memory["m"] = B1 * memory.get("m", 0) + (1 - B1) * g
    memory["v"] = B2 * memory.get("v", 0) + (1 - B2) * g**2
    return memory["m"] / (1 - B1**t) / (np.sqrt(memory["v"] / (1 - B2**t)) + EPS)


def norm_ratio(p, u):
    return np.linalg.norm(p) / np.linalg.norm(u)


def adamw_rule(path, memory, p, g, t, decay):
    return p - LR * (adam(memory, g, t) + decay * p)


def sgd_rule(path, memory, p, g, t, decay):
    memory["m"] = MOMENTUM * memory.get("m", 0) + g + decay * p
    return p - LR * memory["m"]


def lars_rule(path, memory, p, g, t, decay):
    direction = g + decay * p
    if path in DECAYED:
        size = np.linalg.norm(p)
        direction = 0.001 * size / (np.linalg.norm(g) + decay * size + 1e-8) * direction
    memory["m"] = MOMENTUM * memory.get("m", 0) + LR * direction
    return p - memory["m"]


def lamb_rule(path, memory, p, g, t, decay):
    direction = adam(memory, g, t) + decay * p
    if path in DECAYED:
        direction = norm_ratio(p, direction) * direction
    return p - LR * direction


def lion_rule(path, memory, p, g, t, decay):
    sign = np.sign(B1 * memory.get("m", 0) + (1 - B1) * g)
    memory["m"] = B2 * memory.get("m", 0) + (1 - B2) * g
    return p - LR * (sign + decay * p)


def muon_rule(path, memory, p, g, t, decay):
    if path not in INSIDE:
        return adamw_rule(path, memory, p, g, t, decay)
    m = memory["m"] = MOMENTUM * memory.get("m", 0) + (1 - MOMENTUM) * g
    m = MOMENTUM * m + (1 - MOMENTUM) * g
    direction = np.stack([orthogonalize(x) for x in m.reshape(-1, *m.shape[-2:])]).reshape(m.shape)
    return p - LR * (0.2 * np.sqrt(max(p.shape[-2:])) * direction + decay * p)


def orthogonalize(x):
    transposed = x.shape[0] > x.shape[1]
    x = (x.T if transposed else x) / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if transposed else x


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_update_rule_with_weight_decay_on_kernels_only(name, rng):
    rule = globals()[f"{name}_rule"]
    params, gradients = random_tree(rng), [random_tree(rng, 0.1) for _ in range(6)]
    expected, memory = dict(params), {path: {} for path in params}
    for t, gradient in enumerate(gradients, start=1):
        for path, g in gradient.items():
            decay = WD if path in DECAYED else 0.0
            expected[path] = rule(path, memory[path], expected[path], g, t, decay)

    result = train(make(name, params), params, gradients)
    for path, array in expected.items():
        # The rate and Adam's bias correction are float32, so the error is relative to the change.
        # Where Lion's signs cancel, the change is the rounding of the sum.
        bound = 1e-6 * np.abs(array - params[path]).max() + 1e-15 * np.abs(array).max()
        np.testing.assert_allclose(result[path], array, rtol=0, atol=bound, err_msg=path)


def test_weight_decay_may_follow_a_schedule(rng):
    """Without a gradient a kernel shrinks by the rate times the decay of each update."""
    params = random_tree(rng)
    zeros = {path: 0 * array for path, array in params.items()}

    def decay(step):
        found = optim.half_cosine(step, first=0.1, last=0.5, total_steps=3)
        return found.astype(jnp.float64)  # as these parameters are

    result = train(make("adamw", params, decay_schedule=decay), params, [zeros] * 3)
    factor = np.prod([1 - LR * decay for decay in (0.1, 0.2, 0.4)])
    for path, array in params.items():
        expected = array * factor if path in DECAYED else array
        np.testing.assert_allclose(result[path], expected, rtol=1e-6)


@pytest.mark.long
def test_muon_updates_are_as_large_as_adams(rng):
    shapes = {"block_0/a/kernel": (64, 64), "block_0/b/kernel": (64, 256), "head/kernel": (64, 64)}
    params = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    tx = make("muon", params, weight_decay=0.0)
    gradients = {path: jnp.asarray(rng.normal(size=s), jnp.float32) for path, s in shapes.items()}
    updates, _ = tx.update(gradients, tx.init(params), params)
    size = {path: float(jnp.sqrt(jnp.mean(update**2))) / LR for path, update in updates.items()}
    assert size["head/kernel"] == pytest.approx(1, rel=1e-3)  # Adam's first update is lr · sign(g)
    for path in ("block_0/a/kernel", "block_0/b/kernel"):
        assert 0.12 < size[path] < 0.24, path  # 0.2, as Adam's later updates are


@pytest.mark.parametrize("norm", [0.5, 1e6])
def test_gradient_is_clipped_before_the_optimizer_sees_it(norm, rng):
    params, gradient = random_tree(rng), random_tree(rng)
    length = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    scaled = {path: g * min(1, norm / length) for path, g in gradient.items()}
    clipped = train(make("sgd", params, clip_norm=norm), params, [gradient])
    expected = train(make("sgd", params), params, [scaled])
    for path in params:
        np.testing.assert_allclose(clipped[path], expected[path], rtol=1e-10)


@pytest.mark.long
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_norm_that_is_known_is_not_computed_again(name, rng):
    """It reaches the clipping through the whole chain, of every optimizer."""
    params, gradient = to_jax(random_tree(rng)), to_jax(random_tree(rng))
    tx = make(name, params, clip_norm=0.5)
    norm = optax.tree.norm(gradient)
    (told, _), (own, _) = (
        tx.update(gradient, tx.init(params), params, **known) for known in ({"grad_norm": norm}, {})
    )
    for path in params:
        np.testing.assert_array_equal(told[path], own[path])


@pytest.mark.long
def test_the_norm_that_is_told_is_the_one_that_counts(rng):
    params, gradient = to_jax(random_tree(rng)), to_jax(random_tree(rng))
    tx = make("sgd", params, clip_norm=0.5, weight_decay=0.0)
    once, twice = (
        tx.update(gradient, tx.init(params), params, grad_norm=jnp.float32(norm))[0]
        for norm in (8.0, 4.0)
    )
    for path in params:
        np.testing.assert_allclose(twice[path], 2 * once[path], rtol=1e-6)


def layer_of(path):
    return {"block_0": 1, "head": 2}.get(path.split("/")[0], 0)


@pytest.mark.long
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_layer_decay_multiplies_update_and_decay(name, rng):
    params, gradient = to_float32(random_tree(rng)), to_float32(random_tree(rng))

    def first_update(**layers):
        tx = make(name, params, **layers)
        return tx.update(gradient, tx.init(params), params)[0]

    plain = first_update()
    scaled = first_update(layer_of=layer_of, num_layers=3, layer_decay=0.5)
    for path in params:
        factor = {"head": 1.0, "block_0": 0.5}.get(path.split("/")[0], 0.25)
        np.testing.assert_array_equal(scaled[path], factor * plain[path])


@pytest.mark.long
def test_rates_multiply_on_top_of_layers_and_the_first_that_matches_counts(rng):
    params, gradient = to_float32(random_tree(rng)), to_float32(random_tree(rng))

    def first_update(**more):
        tx = make("adamw", params, **more)
        return tx.update(gradient, tx.init(params), params)[0]

    layers = {"layer_of": layer_of, "num_layers": 3, "layer_decay": 0.5}
    plain = first_update(**layers)
    scaled = first_update(**layers, lr_multipliers=(("head/.*", 0.25), (".*kernel", 4.0)))
    for path in params:
        factor = 0.25 if path.startswith("head") else 4.0 if path.endswith("kernel") else 1.0
        np.testing.assert_array_equal(scaled[path], factor * plain[path])


# --- State ----------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_state_is_stable_and_one_compile_serves_sharded_parameters(name, rng):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = {
        path: NamedSharding(mesh, PartitionSpec("fsdp" if shape[0] == 8 else None))
        for path, shape in SHAPES.items()
    }
    start = to_float32(random_tree(rng))
    params = jax.device_put(start, sharding)
    layers = {"layer_of": layer_of, "num_layers": 3, "layer_decay": 0.7, "clip_norm": 1.0}
    tx = make(name, params, **layers)
    traces = []

    def step(params, state, gradient):
        traces.append(None)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def described(tree):
        return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]

    def follow_parameters(keys, _):
        path = getattr(keys[-1], "key", None)
        return sharding.get(path, NamedSharding(mesh, PartitionSpec()))

    single, single_state = start, tx.init(start)
    state_sharding = jax.tree.map_with_path(follow_parameters, single_state)
    state = jax.device_put(single_state, state_sharding)
    step = jax.jit(step, out_shardings=(sharding, state_sharding))
    before = jax.tree.structure(state), described(state)
    for _ in range(3):
        gradient = to_float32(random_tree(rng))
        params, state = step(params, state, jax.device_put(gradient, sharding))
        updates, single_state = tx.update(gradient, single_state, single)
        single = optax.apply_updates(single, updates)
    assert (jax.tree.structure(state), described(state)) == before
    assert not any(weak for _, _, weak in described(state))
    assert len(traces) == 1
    for path in params:
        np.testing.assert_allclose(params[path], single[path], rtol=1e-4, atol=1e-5)


def test_average_follows_the_weights_with_a_warmed_up_decay(rng):
    expected = ema = {"w": np.zeros(3)}
    ema = to_float32(ema)
    update = jax.jit(optim.update_ema, static_argnames="decay")
    for t in range(40):
        params = {"w": rng.normal(size=3)}
        decay = min(0.8, (1 + t) / (10 + t))
        expected = {"w": decay * expected["w"] + (1 - decay) * params["w"]}
        ema = update(ema, to_float32(params), decay=0.8, step=t)
    assert decay == 0.8
    np.testing.assert_allclose(ema["w"], expected["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("adamW2", {}, "did you mean 'adamw'"),
        ("sdg", {}, "did you mean 'sgd'"),
        ("adamw", {"b2": 1.0}, "b2"),
        ("sgd", {"momentum": -0.1}, "momentum"),
        ("adamw", {"weight_decay": -1.0}, "weight_decay"),
        ("lars", {"decay_schedule": lambda step: 0.1}, "lars has one weight decay"),
        ("adamw", {"clip_norm": float("inf")}, "clip_norm"),
        ("adamw", {"layer_decay": 0.0}, "layer_decay"),
        ("adamw", {"layer_decay": 0.9}, "needs layer_of"),
        ("adamw", {"layer_decay": 0.9, "layer_of": lambda path: 5, "num_layers": 3}, "in layer 5"),
        ("adamw", {"lr_multipliers": (("bakbone/.*", 0.1),)}, "no parameter that is trained"),
    ],
)
def test_impossible_optimizer_is_a_user_error(name, changed, message, rng):
    with pytest.raises(UserError, match=message):
        make(name, random_tree(rng), **changed)
