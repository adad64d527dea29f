"""What must hold of the distillation losses whatever their formulas, and the stored form."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.ops import distillation

LABEL = jnp.asarray(np.random.default_rng(0).integers(0, 7, 6))


def random(rng, *shape: int):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def of_scores(scores, teacher_scores, **settings):
    """The loss of attention maps before their softmax: a map's rows must sum to one."""
    attentions = jax.nn.softmax(scores), jax.nn.softmax(teacher_scores)
    return distillation.attention_maps(*attentions, **settings)


def random_boxes(rng, *shape: int):
    low, high = jnp.array([0.3, 0.3, 0.1, 0.1]), jnp.array([0.7, 0.7, 0.5, 0.5])
    return low.reshape(1, 1, 4) + (high - low).reshape(1, 1, 4) * jax.nn.sigmoid(
        random(rng, *shape, 4)
    )


LOSSES = {
    "soft": (partial(distillation.soft_logits, temperature=3.0), (6, 7)),
    "decoupled": (partial(distillation.decoupled, label=LABEL), (6, 7)),
    "hint": (distillation.hint, (6, 4, 5)),
    "transfer": (distillation.attention_transfer, (6, 3, 4, 5)),
    "maps": (of_scores, (6, 2, 4, 4)),
    "maps, mse": (partial(of_scores, kind="mse"), (6, 2, 4, 4)),
    "patches": (distillation.patch_tokens, (6, 4, 5)),
    "distance": (distillation.relational_distance, (6, 5)),
    "angle": (distillation.relational_angle, (6, 5)),
}


@functools.cache
def compiled(name: str):
    function = LOSSES[name][0]
    return jax.jit(jax.value_and_grad(lambda s, t: function(s, t).sum()))


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_equals_its_teacher_loses_nothing(name, rng):
    function, shape = LOSSES[name]
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(rng.normal(size=shape)) for _ in range(2))
        least, gradient = compiled(name)(teacher, teacher)
        assert abs(least) <= 1e-12
        assert np.abs(gradient).max() <= 1e-12
        value, gradient = compiled(name)(student, teacher)
        assert value > 1e-3
        assert np.isfinite(gradient).all()
    half = (jax.ShapeDtypeStruct(shape, jnp.bfloat16),) * 2
    losses = jax.eval_shape(function, *half)
    assert (losses.shape, losses.dtype) == ((6,), jnp.float32)


@pytest.mark.parametrize("name", ["distance", "angle", "transfer", "patches", "hint"])
def test_zero_and_equal_features_have_finite_gradients(name, rng):
    """A dead layer, and one image twice in a batch."""
    shape = LOSSES[name][1]
    teacher = random(rng, *shape)
    for student in (jnp.zeros(shape), jnp.ones(shape), teacher.at[1].set(teacher[0])):
        for pair in ((student, teacher), (teacher, student)):
            loss, gradient = compiled(name)(*pair)
            assert np.isfinite(loss)
            assert np.isfinite(gradient).all()


@pytest.mark.long
def test_decoupled_with_the_teachers_own_weights_is_soft_logits(rng):
    logits, teacher, temperature = 3 * random(rng, 1, 7), 3 * random(rng, 1, 7), 2.0
    other = 1 - jax.nn.softmax(teacher / temperature)[0, LABEL[0]]
    decoupled = distillation.decoupled(
        logits, teacher, LABEL[:1], target_weight=1, other_weight=other, temperature=temperature
    )
    soft = distillation.soft_logits(logits, teacher, temperature)
    np.testing.assert_allclose(decoupled, soft, rtol=1e-5)


def test_logits_of_any_size_stay_finite(rng):
    logits, teacher = 1e4 * random(rng, 6, 7), 1e4 * random(rng, 6, 7)
    for name in ("soft", "decoupled"):
        loss, gradient = compiled(name)(logits, teacher)
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()


def test_one_teacher_of_weight_is_that_teacher(rng):
    teachers, temperature = random(rng, 3, 6, 7), 2.0
    together = distillation.ensemble_logits(teachers, [0, 1, 0], temperature)
    alone = jax.nn.softmax(teachers[1] / temperature)
    np.testing.assert_allclose(jax.nn.softmax(together / temperature), alone, rtol=1e-5)


def test_the_token_losses_are_weighted(rng):
    losses, logits, teacher = jnp.arange(6.0), random(rng, 6, 7), random(rng, 6, 7)
    soft = distillation.token(losses, logits, teacher, kind="soft", weight=0.25, temperature=3)
    expected = 0.75 * losses + 0.25 * distillation.soft_logits(logits, teacher, 3)
    np.testing.assert_allclose(soft, expected, rtol=1e-6)


def test_unknown_kinds_and_wrong_grids_are_refused(rng):
    with pytest.raises(UserError, match="'mean' is none of cosine, mse"):
        distillation.patch_tokens(random(rng, 2, 3, 4), random(rng, 2, 3, 4), kind="mean")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"9 tokens after 1 in front make no grid \(2, 4\)"):
        distillation.to_grid(random(rng, 2, 10, 4), (2, 2), grid=(2, 4), num_prefix=1)


def test_shapes_that_do_not_go_together_are_refused(rng):
    boxes = random_boxes(rng, 2, 4)
    for function, *shapes in (
        (distillation.soft_logits, (2, 10), (2, 7)),
        (distillation.hard_label, (2, 10), (2, 7)),
        (distillation.hint, (2, 3, 4), (2, 5, 4)),
        (distillation.attention_transfer, (2, 3, 4), (2, 5, 4)),
        (distillation.attention_maps, (2, 3, 4, 4), (2, 1, 5, 5)),
        (distillation.patch_tokens, (2, 3, 4), (2, 3, 5)),
        (distillation.relational_distance, (2, 4), (3, 4)),
        (lambda s, t: distillation.detr_queries(s, boxes, t, boxes), (2, 4, 5), (2, 4, 6)),
    ):
        with pytest.raises(UserError, match=r"the student gives \(.* the teacher \(.*: give both"):
            jax.eval_shape(function, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))


@pytest.mark.long
def test_sharded_batches_give_the_same_losses_and_gradients(rng):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    cases = {
        distillation.relational_distance: [random(rng, 8, 5), random(rng, 8, 5)],
        distillation.relational_angle: [random(rng, 8, 5), random(rng, 8, 5)],
        distillation.detr_queries: [
            random(rng, 8, 6, 4), random_boxes(rng, 8, 6),
            random(rng, 8, 6, 4), random_boxes(rng, 8, 6),
        ],
    }  # fmt: skip
    for function, arrays in cases.items():
        step = jax.jit(jax.value_and_grad(lambda *arrays: function(*arrays).mean()))  # noqa: B023
        alone, together = step(*arrays), step(*(jax.device_put(x, rows) for x in arrays))
        np.testing.assert_allclose(alone[0], together[0], rtol=1e-6)
        np.testing.assert_allclose(alone[1], together[1], rtol=1e-5, atol=1e-7)


@pytest.mark.long
def test_tokens_on_their_own_grid_keep_their_places(rng):
    tokens = random(rng, 2, 1 + 6, 4)
    grid = distillation.to_grid(tokens, (2, 3), grid=(2, 3), num_prefix=1)
    np.testing.assert_array_equal(grid[:, 1, 2], tokens[:, 6])
    constant = distillation.to_grid(jnp.full((2, 4, 4, 1), 3.0), (7, 2))
    np.testing.assert_array_equal(constant, np.full((2, 7, 2, 1), 3.0))


# Detectors ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_order_of_queries_does_not_matter_and_equal_ones_lose_nothing(rng):
    loss = jax.jit(partial(distillation.detr_queries, most_queries=5))
    logits, boxes = 3 * random(rng, 2, 8, 4), random_boxes(rng, 2, 8)
    order = rng.permutation(8)
    same = loss(logits[:, order], boxes[:, order], logits, boxes)
    np.testing.assert_allclose(same, 0, atol=1e-5)
    student = 3 * random(rng, 2, 8, 4), random_boxes(rng, 2, 8)
    one = loss(*student, logits, boxes)
    other = loss(student[0][:, order], student[1][:, order], logits[:, ::-1], boxes[:, ::-1])
    assert (one > 0.01).all()
    np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.long
def test_queries_that_the_teacher_does_not_believe_in_weigh_nothing(rng):
    loss = jax.jit(partial(distillation.detr_queries, sigmoid=True, most_queries=2))
    teacher, boxes = random(rng, 2, 4, 3).at[:, 2:].set(-100.0), random_boxes(rng, 2, 4)
    student = random(rng, 2, 4, 3), random_boxes(rng, 2, 4)
    moved = boxes.at[:, 2:].set(boxes[:, :2])
    believed = loss(*student, teacher, boxes)
    np.testing.assert_allclose(believed, loss(*student, teacher, moved), rtol=1e-6)
    nothing = jnp.full((2, 4, 3), -1e4)
    assert np.isfinite(loss(*student, nothing, boxes)).all()


# Storage ------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_best_classes_keep_their_probabilities_at_the_temperature(rng):
    logits, temperature = 2 * random(rng, 6, 20), 3.0
    top = distillation.compress_logits(logits, 5, temperature)
    assert [x.dtype for x in top] == [jnp.float32, jnp.int32, jnp.float32]
    expanded = distillation.expand_logits(top, 20)
    full, kept = (jax.nn.softmax(x / temperature) for x in (logits, expanded))
    best = np.argsort(-np.asarray(logits), axis=-1)
    for row in range(6):
        np.testing.assert_allclose(kept[row, best[row, :5]], full[row, best[row, :5]], rtol=1e-5)
        left = full[row, best[row, 5:]].mean()
        np.testing.assert_allclose(kept[row, best[row, 5:]], np.full(15, left), rtol=1e-5)


def test_compression_of_what_is_compressed_changes_nothing(rng):
    logits = 2 * random(rng, 6, 20)
    top = distillation.compress_logits(logits, 5)
    again = distillation.compress_logits(distillation.expand_logits(top, 20), 5)
    np.testing.assert_array_equal(top.values, again.values)
    np.testing.assert_array_equal(top.classes, again.classes)
    np.testing.assert_allclose(top.rest, again.rest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [0, 4])
def test_a_k_out_of_range_is_refused(k, rng):
    with pytest.raises(UserError, match=f"top {k} logits of 4 classes: take 1 to 3"):
        distillation.compress_logits(random(rng, 2, 4), k)
