"""Students cut out of teachers: the whole is the teacher, and what does nothing is cut for free."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.models.families import build_model
from vision_jax.trees import lora, surgery
from vision_jax.trees.paths import flatten, unflatten

VIT = {
    "num_classes": 3, "image_size": (8, 8), "patch_size": 4, "width": 16, "depth": 3,
    "num_heads": 4, "mlp_width": 24,
}  # fmt: skip
FORMS = {
    "plain": {},
    "deit": {"distillation_token": True, "position_prefix": 2, "layer_scale": 0.1},
    "swiglu": {"gated_mlp": True, "activation": "silu", "num_registers": 2, "pool": "token_avg"},
    "siglip": {"pool": "map", "class_token": False, "position_prefix": 0, "qkv_bias": False},
    "clip": {"pre_norm": True, "patch_bias": False, "qk_norm": True},
}
IMAGES = np.random.default_rng(0).random((2, 8, 8, 3))


def build(family="vit", **arguments):
    return build_model(family, **arguments, dtype=jnp.float64)


def shapes_of(model):
    images = jax.ShapeDtypeStruct(IMAGES.shape, jnp.float32)
    return jax.eval_shape(model.clone(dtype=jnp.float32).init, jax.random.key(0), images)


def draw(rng, shapes):
    return jax.tree.map(lambda x: rng.normal(size=x.shape) * 0.3, shapes)


def check_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize(("depth", "count"), [(12, 12), (12, 6), (7, 2), (5, 3), (24, 7)])
def test_layers_are_spread_from_first_to_last(depth, count):
    chosen = surgery.spread_layers(depth, count)
    assert len(set(chosen)) == count
    assert (chosen[0], chosen[-1]) == (0, depth - 1)
    gaps = np.diff(chosen)
    assert gaps.max() - gaps.min() <= 1


def test_all_layers_are_the_teacher(rng):
    params = draw(rng, shapes_of(build(**VIT))["params"])
    check_same(surgery.take_layers(params, {"block": range(3)}), params)
    check_same(surgery.take_layers(params, {}), params)


def test_layers_without_effect_are_cut_for_free(rng):
    """A block whose branches end in zeros adds nothing to the residual stream."""
    model, student = build(**VIT), build(**{**VIT, "depth": 2})
    params = draw(rng, shapes_of(model)["params"])
    for layer in (params["block_1"]["attn"]["proj"], params["block_1"]["mlp"]["fc2"]):
        layer.update(jax.tree.map(np.zeros_like, dict(layer)))
    taken = surgery.take_layers(params, {"block": (0, 2)})
    assert jax.tree.structure(taken) == jax.tree.structure(shapes_of(student)["params"])
    with jax.enable_x64(True):
        expected = jax.jit(model.apply)({"params": params}, IMAGES)
        logits = jax.jit(student.apply)({"params": taken}, IMAGES)
    np.testing.assert_array_equal(logits, expected)


def test_a_resnets_stages_and_statistics(rng):
    arguments = {"num_classes": 3, "widths": (4, 8), "stem_width": 4, "block": "basic"}
    teacher = draw(rng, shapes_of(build("resnet", depths=(3, 2), **arguments)))
    like = shapes_of(build("resnet", depths=(2, 1), **arguments))
    layers = {"stage_0/block": (0, 2), "stage_1/block": (0,)}
    student = {name: surgery.take_layers(tree, layers) for name, tree in teacher.items()}
    assert jax.tree.map(jnp.shape, student) == jax.tree.map(jnp.shape, like)
    for collection in ("params", "batch_stats"):
        check_same(
            student[collection]["stage_0"]["block_1"], teacher[collection]["stage_0"]["block_2"]
        )


def test_the_teachers_tree_is_left_alone(rng):
    params = draw(rng, shapes_of(build(**VIT))["params"])
    names = list(flatten(params))
    surgery.take_layers(params, {"block": (2, 0, 2, 0)})
    assert list(flatten(params)) == names


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"block": (0, 3)}, "no block_3: take some of 0 to 2"),
        ({"block": ()}, "block without a layer"),
        ({"layer": (0,)}, "no layers layer_0, layer_1 ...; it has block"),
        ({"stage_0/block": (0,)}, "no 'stage_0/block'"),
    ],
)
def test_layers_that_are_not_there(layers, message):
    params = shapes_of(build(**VIT))["params"]
    with pytest.raises(UserError, match=message):
        surgery.take_layers(params, layers)


# Width --------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_the_whole_width_is_the_teacher_and_a_part_fits_the_student(form, rng):
    arguments = {**VIT, **FORMS[form]}
    params = draw(rng, shapes_of(build(**arguments))["params"])
    narrow = partial(surgery.narrow_vit, num_heads=4)
    with jax.enable_x64(True):
        check_same(narrow(params, width=16, mlp_width=24), params)
    like = shapes_of(build(**{**arguments, "width": 8, "num_heads": 2, "mlp_width": 10}))
    student = jax.eval_shape(partial(narrow, width=8, mlp_width=10), params)
    assert jax.tree.map(jnp.shape, student) == jax.tree.map(jnp.shape, like["params"])


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_what_has_no_effect_is_cut_for_free(form, rng):
    """The student hidden in a teacher: copies of channels that nothing reads, dead heads and units.

    Copies and not zeros, so that LayerNorm's statistics stay. Everything is shuffled: the residual
    channels in one way for all blocks, heads and hidden units within each block.
    """
    wide = {**VIT, **FORMS[form]}
    narrow = {**wide, "width": 8, "num_heads": 2, "mlp_width": 12}
    student, teacher = build(**narrow), build(**wide)
    small = draw(rng, shapes_of(student)["params"])
    flat = {}
    channels = rng.permutation(16)
    heads = {}  # by block
    for path, leaf in flatten(shapes_of(teacher)["params"]).items():
        array, block = flatten(small)[path], path.split("/")[0]
        for axis, kind in surgery._axes_of(path).items():
            parts = np.split(array, array.shape[axis] // (12 if kind == "mlp" else 8), axis)
            reads = path.endswith("kernel") and axis == 0
            grown = []
            for part in parts:
                if kind == "width":
                    other, order = (0 * part if reads else part), channels
                else:  # whoever reads them gets zeros, so that they may be anything
                    random = rng.normal(size=part.shape) * (part != 0)  # they read no copies
                    other = 0 * part if reads else random
                    order = heads.setdefault((block, kind), shuffled(rng, kind))
                grown.append(np.take(np.concatenate([part, other], axis), order, axis))
            array = np.concatenate(grown, axis)
        assert array.shape == leaf.shape
        flat[path] = array
    params = unflatten(shapes_of(teacher)["params"], flat)

    with jax.enable_x64(True):
        found = surgery.narrow_vit(params, num_heads=4, width=8, mlp_width=12)
        expected = jax.jit(teacher.apply)({"params": params}, IMAGES)
        logits = jax.jit(student.apply)({"params": found}, IMAGES)
    np.testing.assert_allclose(logits, expected, rtol=1e-11, atol=1e-12)


def shuffled(rng: np.random.Generator, kind: str) -> np.ndarray:
    if kind == "mlp":
        return rng.permutation(24)
    return (4 * rng.permutation(4)[:, None] + np.arange(4)).reshape(-1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 6, "mlp_width": 8}, "width 6: take a multiple of 4, .* up to 16"),
        ({"width": 20, "mlp_width": 8}, "width 20: take a multiple of 4, .* up to 16"),
        ({"width": 8, "mlp_width": 25}, "mlp_width 25: take 1 to 24"),
    ],
)
def test_sizes_that_a_teacher_cannot_give(sizes, message, rng):
    params = draw(rng, shapes_of(build(**VIT))["params"])
    with pytest.raises(UserError, match=message):
        surgery.narrow_vit(params, num_heads=4, **sizes)


def test_adapters_and_other_architectures_are_refused(rng):
    params = jax.tree.map(jnp.asarray, draw(rng, shapes_of(build(**VIT))["params"]))
    adapted = lora.attach(params, (r".*/fc1/kernel",), key=jax.random.key(0), rank=2, alpha=2.0)
    with pytest.raises(UserError, match=r"block_0/mlp/fc1/kernel/\w+ .*merge adapters first"):
        surgery.narrow_vit(adapted, num_heads=4, width=8, mlp_width=8)
    with pytest.raises(UserError, match="narrower is made of a ViT only"):
        surgery.narrow_vit({"conv1": {"kernel": 1}}, num_heads=4, width=8, mlp_width=8)
