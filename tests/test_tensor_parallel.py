"""What a step on a mesh with the axis `tensor` computes, holds and moves."""

import re
from collections import Counter
from contextlib import closing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from vision_jax import cost, scaling, sharding
from vision_jax.checkpoints import Checkpoints, restore
from vision_jax.commands import plan
from vision_jax.errors import UserError
from vision_jax.models import families
from vision_jax.run.prepare import prepare
from vision_jax.trees import lora, paths
from vision_jax.trees.factored import to_factored
from vision_jax.trees.leaf import roles
from vision_jax.trees.masked import to_masked
from vision_jax.trees.quantize import quantize
from vision_jax.trees.quantized import FakeQuantized, to_int8, to_nf4

VIT = {"image_size": (16, 16), "patch_size": 4, "width": 32, "depth": 2, "num_heads": 4,
       "mlp_width": 128, "num_classes": 16}  # fmt: skip
SWIN = {"image_size": (16, 16), "patch_size": 2, "width": 16, "depths": (2, 2), "num_heads": (2, 4),
        "windows": ((4, 4), (2, 2)), "num_classes": 16}  # fmt: skip
DETR = {"depths": (1, 1), "block": "basic", "widths": (8, 16), "stem_width": 8, "num_queries": 6,
        "width": 32, "num_heads": 4, "mlp_width": 64, "encoder_depth": 2, "decoder_depth": 2,
        "num_classes": 3}  # fmt: skip
DIT = {"image_size": (8, 8), "patch_size": 2, "width": 32, "depth": 2, "num_heads": 4,
       "mlp_width": 128, "num_classes": 15}  # fmt: skip
MODELS = {
    "vit": ("vit", VIT),
    "gated": ("vit", {**VIT, "gated_mlp": True, "activation": "silu", "qk_norm": True}),
    "scanned": ("vit", {**VIT, "scan": True, "remat": True}),
    "mae": ("mae", {**VIT, "num_classes": 0, "decoder_width": 16, "decoder_depth": 1,
                    "decoder_num_heads": 4, "decoder_mlp_width": 32}),
    "swin": ("swin", SWIN),
    "swin2": ("swin", {**SWIN, "version": 2}),
    "detr": ("detr", DETR),
    "dit": ("dit", DIT),
}  # fmt: skip


def drawn(model, side, rng, dtype):
    """Parameters of noise: those that begin as zeros would hide the gradient of others."""
    shapes = jax.eval_shape(
        lambda key: families.initialize(model, key, (side, side)), jax.random.key(0)
    )
    noise = lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(dtype)  # noqa: E731
    state = jax.tree.map(
        lambda leaf: abs(noise(leaf)) + 0.5, {k: v for k, v in shapes.items() if k != "params"}
    )
    return jax.tree.map(noise, shapes["params"]), state


def make_loss(model, state, enter=lambda params: params):
    """(arrays by path, frozen, -, images, -) -> a number that hangs on every output."""

    def loss(flat, frozen, none, images, key):
        params = enter(paths.unflatten(like, {**flat, **frozen}))
        more = {}
        if families.family_of(model) == "dit":
            labels = jnp.arange(len(images)) % model.num_classes
            more = {"time": jnp.linspace(0, 1, len(images), dtype=images.dtype), "labels": labels}
        outputs = model.apply({"params": params, **state}, images, **more)
        leaves = jax.tree.leaves(dict(outputs) if isinstance(outputs, dict) else [outputs])
        total = sum(jnp.cos(3 * y).sum() for y in leaves)
        return total / len(images), none

    like = None

    def of(params):
        nonlocal like
        like = params
        return loss

    return of


def sharded(model, params, state, mesh, frozen=()):
    """(loss and gradient, compiled for the mesh; the shardings; the layout)."""
    layout = sharding.tensor_layout(params, mesh, model.tensor_rules)
    places = sharding.parameter_shardings(params, mesh, tensor=layout)
    looped = model.looped if getattr(model, "scan", False) else ""
    used = model
    if looped:
        gather = sharding.make_gather(places)

        def enter(block, prefix):
            block = paths.unflatten(block, gather(paths.flatten(block), prefix))
            return layout.enter(block, prefix)

        used = model.clone(scan=enter)
    loss = make_loss(used, state, lambda tree: layout.enter(tree, but=looped))(params)
    loss = sharding.gather_in(loss, places, looped)
    train = [path for path in paths.flatten(params) if path not in frozen]
    out = (None, {path: places[path] for path in train})
    step = jax.jit(
        lambda flat, fixed, images: jax.value_and_grad(loss, has_aux=True)(
            flat, fixed, None, images, None
        ),
        out_shardings=((None, None), out[1]),
    )
    return step, places, layout


def images_of(model, rng, count, dtype):
    side = getattr(model, "image_size", (40, 40))[0]
    return rng.standard_normal((count, side, side, model.in_channels)).astype(dtype), side


@pytest.fixture
def all_split(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 64)


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(4, 1, 2), (1, 4, 2), (2, 2, 2), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_those_of_one_device(name, sizes, rng, all_split):
    family, arguments = MODELS[name]
    with jax.enable_x64(True):
        model = families.build_model(family, in_channels=3, **arguments, dtype=jnp.float64)
        images, side = images_of(model, rng, 8, np.float64)
        params, state = drawn(model, side, rng, np.float64)
        flat = paths.flatten(params)
        plain = make_loss(model, state)(params)
        (expected, _), gradients = jax.jit(jax.value_and_grad(plain, has_aux=True))(
            flat, {}, None, images, None
        )
        mesh = sharding.make_mesh(*sizes)
        step, places, _ = sharded(model, params, state, mesh)
        assert any("tensor" in place.spec for place in places.values())
        placed = {path: jax.device_put(x, places[path]) for path, x in flat.items()}
        (loss, _), found = step(placed, {}, jax.device_put(images, sharding.batch_sharding(mesh)))
        assert abs(loss - expected) <= 1e-12 * abs(expected)
        assert found.keys() == gradients.keys()
        for path, gradient in found.items():
            scale = max(np.linalg.norm(gradients[path]), 1e-3)
            error = np.linalg.norm(np.asarray(gradient) - gradients[path])
            assert error <= 1e-12 * scale, path


# What the compiled program holds and moves --------------------------------------------------------


def collectives(text, kind):
    """Shapes of the arrays that a compiled program's collectives of a kind give."""
    found = Counter()
    for line in re.findall(rf"= (.*?) {kind}\(", text):
        for sides in re.findall(r"\w\d+\[([\d,]*)\]", line):
            found[tuple(int(side) for side in sides.split(",") if side)] += 1
    return found


def compiled(name, sizes, rng):
    family, arguments = MODELS[name]
    model = families.build_model(family, in_channels=3, **arguments)
    images, side = images_of(model, rng, 8, np.float32)
    params, state = drawn(model, side, rng, np.float32)
    mesh = sharding.make_mesh(*sizes)
    step, places, layout = sharded(model, params, state, mesh)
    flat = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path])
        for path, x in paths.flatten(params).items()
    }
    split = sharding.batch_sharding(mesh)
    images = jax.ShapeDtypeStruct(images.shape, images.dtype, sharding=split)
    return flat, step.lower(flat, {}, images).compile(), layout


# Arrays [rows, width] that an all-reduce gives, of 2 images a device: of each pair of layers one
# forward and one backward, of each of DETR's inputs of queries, keys and values one backward. The
# input of the first values of its decoder is constant.
SUMMED = {
    "vit": {(2 * 17, 32): 2 * (2 + 2)},
    "gated": {(2 * 17, 32): 2 * (2 + 2)},
    "mae": {(2 * 17, 32): 2 * (2 + 2), (2 * 17, 16): 2 + 2},
    "swin": {(2 * 64, 16): 2 * (2 + 2), (2 * 16, 32): 2 * (2 + 2)},
    "detr": {(2 * 25, 32): 2 * (2 + 4) + 2 * 2, (2 * 6, 32): 2 * 3 + 2 * 5 - 1},
    "dit": {(2 * 16, 32): 2 * (2 + 2)},
}


@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(n, marks=pytest.mark.long) for n in SUMMED if n != "vit")]
)
def test_activations_are_summed_once_a_pair_and_nothing_else_of_them_moves(name, rng):
    flat, program, layout = compiled(name, (4, 1, 2), rng)
    text = program.as_text()
    summed = collectives(text, "all-reduce")
    assert {shape: summed[shape] for shape in SUMMED[name]} == SUMMED[name]
    wide = max(width for _, width in SUMMED[name])
    allowed = {(n, flat[path].shape[-1] // n) for path, n in layout.parts.items()}  # biases
    allowed |= {(49, 2), (2, 8, 6, 32)}
    for shape in collectives(text, "all-gather"):
        # Gradients of vectors, and of tables of positions; DETR's class head takes whole batches.
        assert np.prod(shape) <= 3 * wide or shape in allowed, shape
    # Fused kernels are turned on their way there, their gradients on the way back.
    turned = sum(4 * np.prod(flat[path].shape) / 2 for path in layout.parts)
    found = cost.count(program).collectives.get("all-to-all", (0, 0.0))[1]
    assert found == pytest.approx(2 * turned, abs=4 * 4 * 32)  # a row of an embedding
    assert bool(layout.parts) == (name != "detr")


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(2, 2, 2), (1, 2, 4)])
def test_with_fsdp_parameters_are_gathered_and_activations_stay(data, fsdp, tensor, rng, all_split):
    flat, program, layout = compiled("vit", (data, fsdp, tensor), rng)
    summed = collectives(program.as_text(), "all-reduce")
    rows = 8 // data // fsdp * 17
    assert summed[rows, 32] == 2 * (2 + 2)
    # What a device has of a kernel when it is gathered: its share by `tensor`.
    used = set()
    for path, leaf in flat.items():
        shape = list(leaf.shape)
        if path in layout.axes:
            shape[layout.axes[path]] //= tensor
        used.add(tuple(shape))
    biases = {(3, 32), (16,), (64,)}
    gathered = set(collectives(program.as_text(), "all-gather")) - {(8, 16)}
    assert gathered <= used | biases | {(1, 1, 32)}, gathered - used


@pytest.mark.parametrize(("sizes", "share"), [((4, 1, 2), 2), ((1, 1, 8), 8), ((2, 2, 2), 4)])
def test_what_a_device_holds(sizes, share, all_split):
    """Of a ViT of 8 heads, by hand: the kernels and biases of pairs and the head are split."""
    width, hidden, classes, depth, tensor = 64, 256, 16, 2, sizes[2]
    arguments = {**VIT, "width": width, "num_heads": 8, "mlp_width": hidden}
    model = families.build_model("vit", in_channels=3, **arguments)
    params = jax.eval_shape(
        lambda key: families.initialize(model, key, (16, 16)), jax.random.key(0)
    )["params"]
    mesh = sharding.make_mesh(*sizes)
    layout = sharding.tensor_layout(params, mesh, model.tensor_rules)
    places = sharding.parameter_shardings(params, mesh, tensor=layout)
    flat = paths.flatten(params)
    held = {p: 4 * np.prod(places[p].shard_shape(leaf.shape)) for p, leaf in flat.items()}
    block = 4 * width**2 + 2 * width * hidden  # qkv and proj, fc1 and fc2
    split = depth * block + width * classes
    kernels = [p for p in flat if re.search("(qkv|proj|fc1|fc2|head)/kernel", p)]
    assert sum(held[path] for path in kernels) == 4 * split / share
    assert sum(held[f"block_{i}/mlp/fc1/bias"] for i in range(depth)) == 4 * depth * hidden / tensor
    rest = sum(4 * np.prod(flat[path].shape) for path in flat if "patch_embed/kernel" not in path)
    others = sum(held.values()) - sum(held[path] for path in kernels)
    if sizes[1] == 1:  # biases, norms and embeddings are whole but for the biases of what is split
        whole = depth * (3 + 1 + 1 + 4) * width + width * (1 + 17 + 1 + 2) + 4 * 4 * 3 * width
        assert others == 4 * (whole + (depth * hidden + classes) / tensor)
    else:
        assert others < rest


# Structured leaves, runs --------------------------------------------------------------------------


def adapted(tree, **more):
    return lora.attach(tree, [".*kernel"], key=jax.random.key(0), rank=2, alpha=4.0, **more)


def changed(tree, rule, make):
    return quantize(tree, {path for path in paths.flatten(tree) if re.fullmatch(rule, path)}, make)


BLOCKS = r"block_\d+/.*kernel"
LEAVES = {
    "adapters": adapted,
    "adapters of q and v, DoRA": partial(adapted, qkv_parts="q,v", dora=True),
    "int8, int8 inputs": lambda tree: changed(tree, BLOCKS, partial(to_int8, dynamic=True)),
    "towards int8": lambda tree: changed(tree, BLOCKS, partial(FakeQuantized, dynamic=True)),
    "nf4, adapters": lambda tree: adapted(changed(tree, BLOCKS, partial(to_nf4, block_size=8))),
    "masked": lambda tree: changed(tree, BLOCKS, partial(to_masked, share=0.5)),
    "factored": lambda tree: changed(tree, BLOCKS, partial(to_factored, rank=8)),
}


@pytest.mark.long(but=["adapters of q and v, DoRA"])
@pytest.mark.parametrize("kind", LEAVES)
def test_what_takes_a_kernels_place_follows_it(kind, rng, all_split):
    with jax.enable_x64(True):
        model = families.build_model("vit", in_channels=3, **VIT, dtype=jnp.float64)
        images, side = images_of(model, rng, 8, np.float64)
        params, state = drawn(model, side, rng, np.float64)
        params = LEAVES[kind](jax.tree.map(jnp.asarray, params))
        flat = paths.flatten(params)
        noise = {p: 0.1 * rng.standard_normal(x.shape) for p, x in flat.items()}
        moved = ("/a", "/b", "/magnitude")
        flat = {p: x + noise[p] if p.endswith(moved) else x for p, x in flat.items()}
        frozen = {p for p, role in roles(params).items() if role.trains is False}
        own, fixed = paths.partition(flat, set(flat) - frozen)
        plain = make_loss(model, state)(params)
        (expected, _), gradients = jax.jit(jax.value_and_grad(plain, has_aux=True))(
            own, fixed, None, images, None
        )
        mesh = sharding.make_mesh(2, 2, 2)
        step, places, _ = sharded(model, params, state, mesh, frozen)
        for path in ("block_0/attn/qkv/kernel", "block_0/mlp/fc2/kernel"):
            split = [p for p in places if p.startswith(path) and "tensor" in places[p].spec]
            assert split, path
        placed = {p: jax.device_put(x, places[p]) for p, x in flat.items()}
        parts = paths.partition(placed, set(own))
        (loss, _), found = step(*parts, jax.device_put(images, sharding.batch_sharding(mesh)))
        assert abs(loss - expected) <= 1e-12 * abs(expected)
        for path, gradient in found.items():
            scale = max(np.linalg.norm(gradients[path]), 1e-3)
            error = np.linalg.norm(np.asarray(gradient) - gradients[path])
            assert error <= 1e-12 * scale, path


def prepared(monkeypatch, sizes, **fields):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 256)  # a tiny ViT has no larger ones
    mesh = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), sizes, strict=True))
    return prepare(runs.tiny_config(**{"recipes": "()", "trainable": ".*", **mesh, **fields}))


@pytest.mark.long
@pytest.mark.parametrize(
    "fields",
    [
        {"optim__accumulate": 2, "optim__ema_decay": 0.9, "model__remat": True},
        {"model__scan": True},
        {"recipes": "('lora', 'adversarial')", "adversarial__steps": 2},
        {"recipes": "('quantize', 'lora')", "quantize__form": "nf4", "quantize__block_size": 8},
    ],
    ids=["accumulated", "scanned", "attacked adapters", "QLoRA"],
)
def test_all_meshes_train_alike(monkeypatch, rng, fields):
    batch, found = None, {}
    # Adam makes a whole step of a gradient that is zero but for its rounding.
    fields = {"optim__name": "sgd", "batch_size": 16, **fields}
    for sizes in [(8, 1, 1), (4, 1, 2), (1, 4, 2)]:
        run = prepared(monkeypatch, sizes, **fields)
        state, frozen, _ = run.make_arrays()
        if batch is None:
            batch = {
                name: rng.integers(0, 3, leaf.shape).astype(leaf.dtype)
                for name, leaf in run.abstract_batch().items()
            }
        step, losses = run.make_train_step(), []
        for _ in range(3):
            state, metrics = step(state, frozen, sharding.make_batch_placer(run.mesh)(batch))
            losses.append(float(metrics["loss"]))
        assert bool(metrics["finite"])
        assert step._cache_size() == 1
        found[sizes] = losses
    for sizes, losses in found.items():
        np.testing.assert_allclose(losses, found[8, 1, 1], rtol=1e-6, err_msg=str(sizes))


def test_a_checkpoint_moves_to_a_mesh_with_the_axis_and_back(monkeypatch, tmp_path):
    before = prepared(monkeypatch, (4, 1, 2), optim__ema_decay=0.9)
    state, _, _ = before.make_arrays()
    with closing(Checkpoints(tmp_path, "top1")) as checkpoints:
        checkpoints.save(1, state, None)
    kept = jax.device_get(state)
    for sizes in [(2, 2, 2), (8, 1, 1)]:
        target = prepared(monkeypatch, sizes, optim__ema_decay=0.9).abstract_state
        moved, notes = restore(tmp_path, 1, target)
        assert notes == []
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(moved), kept)
        assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, moved, target))


def test_optimizer_and_average_are_split_as_their_parameter(monkeypatch):
    state = prepared(monkeypatch, (4, 1, 2), optim__ema_decay=0.9).abstract_state
    kernel = "block_0/mlp/fc1/kernel"
    (adam,) = (
        part
        for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    )
    for tree in (state.trainable, adam.mu, adam.nu, state.ema):
        assert tree[kernel].sharding.shard_shape((32, 64)) == (32, 32)


def test_what_the_mesh_does_not_divide_is_whole_and_said(monkeypatch):
    layout = prepared(monkeypatch, (2, 1, 4)).parameters.tensor
    assert "block_0/mlp/fc1/kernel" in layout.axes
    assert "block_0/attn/qkv/kernel" not in layout.axes
    note = "block_0/attn/qkv/kernel: mesh.tensor=4 does not divide its 2 heads: whole"
    assert note in layout.notes


def test_a_plan_counts_what_the_axis_moves():
    """Of a block of width 32 and 5 tokens: 2 images a device, 4 sums of their tokens."""
    config = runs.tiny_config(
        recipes="()", trainable=".*", mesh__data=4, mesh__tensor=2, batch_size=8
    )
    volume = plan.compile_step(config, plan.describe_planned(config)[0]).volume
    assert volume.turned == 4 * 32 * 96 / 2
    tokens, head = 4 * (2 * 5) * 32 * 4, 2 * 32 * 4
    # Less half of the fused biases' gradients, and more by numbers of each image.
    assert volume.summed == pytest.approx(tokens + head, rel=0.05)
    moved = {one.what: one for one in scaling.transfers(volume, 4, 1, 2)}
    assert moved["activations summed"].received == volume.summed  # a ring of two: in and out
    assert moved["fused kernels turned"].received == 2 * volume.turned / 2
    assert moved["gradients over all"].among == 4


def test_a_mesh_that_can_split_nothing_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"mesh.tensor=2 splits nothing: this model has no rules"):
        prepared(monkeypatch, (4, 1, 2), model__weights="", model__variant="resnet18")
    with pytest.raises(UserError, match=r"data=4, fsdp=1, tensor=3 does not fit 8 devices"):
        sharding.make_mesh(4, 1, 3)
    assert sharding.make_mesh(-1, 2, 2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
