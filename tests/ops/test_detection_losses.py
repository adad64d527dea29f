"""Set losses against loops in numpy, and what padding, groups and devices must not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.optimize import linear_sum_assignment

from vision_jax.errors import UserError
from vision_jax.ops import detection_losses

LAYERS, EXAMPLES, QUERIES, CLASSES, SLOTS = 2, 8, 10, 4, 5
LOSSES = {
    "detr": detection_losses.detr_loss,
    "ia_bce": detection_losses.sigmoid_detr_loss,
    "focal": functools.partial(detection_losses.sigmoid_detr_loss, class_loss="focal"),
}


def mean_of(loss):
    """The loss of a batch."""

    def batch_loss(*problem, **arguments):
        losses, metrics = loss(*problem, **arguments)
        return losses.mean(), metrics

    return batch_loss


# Compiled once each; gradients with respect to logits and boxes.
COMPILED = {
    name: jax.jit(jax.value_and_grad(mean_of(loss), (0, 1), has_aux=True))
    for name, loss in LOSSES.items()
}


def random_boxes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    sides = rng.uniform(0.05, 0.4, (*shape, 2))
    return np.concatenate([rng.uniform(0.2, 0.8, (*shape, 2)), sides], axis=-1).astype(np.float32)


def make_problem(rng: np.random.Generator, name: str) -> list[np.ndarray]:
    """The arguments of a loss: some images without targets, some full, one padded example."""
    classes = CLASSES + (name == "detr")
    logits = 2 * rng.normal(size=(LAYERS, EXAMPLES, QUERIES, classes))
    target_mask = rng.random((EXAMPLES, SLOTS)) < np.linspace(0, 1, EXAMPLES)[:, None]
    return [
        logits.astype(np.float32),
        random_boxes(rng, LAYERS, EXAMPLES, QUERIES),
        rng.integers(0, CLASSES, (EXAMPLES, SLOTS)).astype(np.int32),
        random_boxes(rng, EXAMPLES, SLOTS),
        target_mask,
        np.arange(EXAMPLES) != 4,
    ]


def overlaps(box, other):
    """IoU and GIoU of two cxcywh boxes."""
    inter = hull = 1.0
    for i in (0, 1):
        low, high = (
            [b[i] + sign * b[i + 2] / 2 for b in (box, other)] for sign in (-1, 1)
        )  # fmt: skip
        inter *= max(min(high) - max(low), 0)
        hull *= max(high) - min(low)
    union = box[2] * box[3] + other[2] * other[3] - inter
    return inter / union, inter / union - (hull - union) / hull


def softplus(x):
    return np.logaddexp(0, x)


def reference(name: str, logits, boxes, label, target_boxes, target_mask, mask):
    """The loss and the terms of the last layer with the default weights, query by query."""
    logits, boxes, target_boxes = (np.float64(x) for x in (logits, boxes, target_boxes))
    count = max(target_mask[mask].sum(), 1)
    total = 0.0
    for layer in range(LAYERS):
        class_sum = weight_sum = l1_sum = giou_sum = 0.0
        for i in np.flatnonzero(mask):
            real = np.flatnonzero(target_mask[i])
            x = logits[layer, i]
            p = 1 / (1 + np.exp(-x))
            there, missing = 0.25 * (1 - p) ** 2 * softplus(-x), 0.75 * p**2 * softplus(x)
            log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
            class_cost = -np.exp(log_p) if name == "detr" else 2 * (there - missing)
            pairs = [[overlaps(b, target_boxes[i, t]) for b in boxes[layer, i]] for t in real]
            pairs = np.reshape(pairs, (len(real), QUERIES, 2))
            l1 = np.abs(target_boxes[i, real][:, None] - boxes[layer, i]).sum(-1)
            cost = class_cost.T[label[i, real]] + 5 * l1 - 2 * pairs[..., 1]
            matched = list(zip(*linear_sum_assignment(cost), strict=True))
            classes = np.full(QUERIES, CLASSES)
            per_class = p**2 * softplus(x) if name == "ia_bce" else missing.copy()
            for row, query in matched:
                k = classes[query] = label[i, real[row]]
                l1_sum += l1[row, query]
                giou_sum += 1 - pairs[row, query, 1]
                if name == "ia_bce":
                    t = max(p[query, k] ** 0.25 * pairs[row, query, 0] ** 0.75, 0.01)
                    per_class[query, k] = t * softplus(-x[query, k])
                    per_class[query, k] += (1 - t) * softplus(x[query, k])
                else:
                    per_class[query, k] = there[query, k]
            if name == "detr":
                weights = np.where(classes == CLASSES, 0.1, 1.0)
                weight_sum += weights.sum()
                class_sum -= (weights * log_p[np.arange(QUERIES), classes]).sum()
            else:
                class_sum += per_class.sum()
        terms = {
            "loss_ce": class_sum / (weight_sum if name == "detr" else count),
            "loss_bbox": l1_sum / count,
            "loss_giou": giou_sum / count,
        }
        last = terms["loss_ce"] + 5 * terms["loss_bbox"] + 2 * terms["loss_giou"]
        total += last
    return total, terms | {"loss_aux": total - last}


@pytest.mark.long(but=("detr",))
@pytest.mark.parametrize("name", LOSSES)
def test_terms_are_those_of_the_loop(name, rng):
    for _ in range(5):
        problem = make_problem(rng, name)
        (loss, metrics), gradients = COMPILED[name](*problem)
        expected, terms = reference(name, *problem)
        np.testing.assert_allclose(loss, expected, rtol=3e-6)
        for term, value in terms.items():
            np.testing.assert_allclose(metrics[term], value, rtol=5e-6, err_msg=term)
        assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.long(but=("detr",))
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_masked_counts_nothing(name, rng):
    problem = make_problem(rng, name)
    (loss, metrics), gradients = COMPILED[name](*problem)
    logits, boxes, label, target_boxes, target_mask, mask = (x.copy() for x in problem)
    logits[:, ~mask] = boxes[:, ~mask] = np.nan
    padded = ~(target_mask & mask[:, None])
    label[padded], target_boxes[padded] = CLASSES - 1, 0
    target_mask[~mask] = True
    other = COMPILED[name](logits, boxes, label, target_boxes, target_mask, mask)
    assert other[0][0] == loss
    assert all(other[0][1][key] == metrics[key] for key in metrics)
    for result, wanted in zip(other[1], gradients, strict=True):
        np.testing.assert_array_equal(result, wanted)
        assert (wanted[:, ~mask] == 0).all()

    order = rng.permutation(SLOTS)
    shuffled = (*problem[:2], *(x[:, order] for x in problem[2:5]), mask)
    np.testing.assert_allclose(COMPILED[name](*shuffled)[0][0], loss, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_real_at_all(name, rng):
    problem = make_problem(rng, name)
    no_targets = [*problem[:4], np.zeros_like(problem[4]), problem[5]]
    (loss, metrics), gradients = COMPILED[name](*no_targets)
    assert loss > 0
    assert (gradients[1] == 0).all()
    assert metrics["loss_bbox"] == metrics["class_error"] == metrics["matched_iou"] == 0
    no_examples = [*problem[:5], np.zeros_like(problem[5])]
    (loss, metrics), gradients = COMPILED[name](*no_examples)
    assert loss == 0
    assert all(value == 0 for value in metrics.values())
    assert all((x == 0).all() for x in gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_of_the_last_layer(name, rng):
    """Predictions that copy the targets, in another order, but one class and one box too many."""
    logits, boxes, label, target_boxes, target_mask, mask = make_problem(rng, name)
    target_mask[:], mask[:] = True, True
    queries = np.stack([rng.permutation(QUERIES) for _ in range(EXAMPLES)])
    logits[:] = 12 * np.eye(CLASSES + 1)[CLASSES][: logits.shape[-1]] - 6
    rows = np.arange(EXAMPLES)[:, None]
    logits[:, rows, queries[:, :SLOTS]] = 12 * np.eye(logits.shape[-1])[label] - 6
    boxes[-1, rows, queries[:, :SLOTS]] = target_boxes
    (_, metrics), _ = COMPILED[name](logits, boxes, label, target_boxes, target_mask, mask)
    assert metrics["matched_iou"] == pytest.approx(1, abs=1e-5)
    assert metrics["loss_bbox"] == metrics["class_error"] == metrics["cardinality_error"] == 0
    logits[-1, 0, queries[0, 0]] = 12 * np.eye(logits.shape[-1])[(label[0, 0] + 1) % CLASSES] - 6
    logits[-1, 1, queries[1, SLOTS]] = 12 * np.eye(logits.shape[-1])[0] - 6
    (_, metrics), _ = COMPILED[name](logits, boxes, label, target_boxes, target_mask, mask)
    assert float(metrics["class_error"]) == pytest.approx(1 / (EXAMPLES * SLOTS))
    assert float(metrics["cardinality_error"]) == pytest.approx(1 / EXAMPLES)


@pytest.mark.long
@pytest.mark.parametrize("name", ["detr", "ia_bce"])
def test_one_device_and_eight_give_the_same_without_gathering_the_costs(name, rng):
    problem = make_problem(rng, name)
    expected = COMPILED[name](*problem)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = [PartitionSpec(None, "data")] * 2 + [PartitionSpec("data")] * 4
    sharded = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(problem, specs, strict=True)
    ]
    compiled = COMPILED[name].lower(*sharded).compile()
    result = compiled(*sharded)
    for ours, wanted in zip(*(jax.tree.leaves(x) for x in (result, expected)), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=2e-6, atol=1e-7)
    assert "all-gather" not in compiled.as_text()


def test_groups_are_the_mean_of_losses_of_their_own(rng):
    groups = [make_problem(rng, "ia_bce") for _ in range(2)]
    logits, boxes = (np.concatenate([g[i] for g in groups], axis=2) for i in (0, 1))
    targets = groups[0][2:]
    loss = jax.jit(functools.partial(mean_of(detection_losses.sigmoid_detr_loss), groups=2))
    together, metrics = loss(logits, boxes, *targets)
    apart = [COMPILED["ia_bce"](*group[:2], *targets)[0] for group in groups]
    np.testing.assert_allclose(together, np.mean([x for x, _ in apart]), rtol=2e-6)
    for key in metrics.keys() - {"cardinality_error"}:
        np.testing.assert_allclose(metrics[key], np.mean([m[key] for _, m in apart]), rtol=5e-6)
    assert metrics["cardinality_error"] == apart[0][1]["cardinality_error"]


def test_proposals_are_one_layer_more_and_not_the_last(rng):
    logits, boxes, *targets = make_problem(rng, "ia_bce")
    proposals = {"encoder_logits": logits[0], "encoder_boxes_cxcywh_01": boxes[0]}
    loss, metrics = jax.jit(mean_of(detection_losses.sigmoid_detr_loss))(
        logits[1:], boxes[1:], *targets, **proposals
    )
    (expected, same), _ = COMPILED["ia_bce"](logits, boxes, *targets)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert metrics["loss_aux"] == 0
    np.testing.assert_allclose(metrics["loss_encoder"], same["loss_aux"], rtol=1e-6)
    assert metrics["loss_ce"] == pytest.approx(float(same["loss_ce"]), rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [1, 2])
def test_the_mean_over_micro_batches_is_the_whole_batch(name, size, rng):
    """Loss, every metric and the gradient, though images have 0 to 5 boxes and some are padding."""
    problem = make_problem(rng, name)
    (loss, metrics), (logits_slope, boxes_slope) = COMPILED[name](*problem)
    parts = jax.jit(
        jax.value_and_grad(
            lambda *arrays, whole: mean_of(LOSSES[name])(*arrays, whole=whole), (0, 1), has_aux=True
        )
    )
    found = []
    for rows in (slice(start, start + size) for start in range(0, EXAMPLES, size)):
        arrays = [x[:, rows] for x in problem[:2]] + [x[rows] for x in problem[2:]]
        found.append(parts(*arrays, whole=(problem[4], problem[5])))
    share = size / EXAMPLES
    np.testing.assert_allclose(share * sum(part[0][0] for part in found), loss, rtol=3e-6)
    for key, value in metrics.items():
        total = share * sum(part[0][1][key] for part in found)
        np.testing.assert_allclose(total, value, rtol=5e-6, atol=1e-7, err_msg=key)
    for number, slope in enumerate((logits_slope, boxes_slope)):
        joined = share * np.concatenate([part[1][number] for part in found], axis=1)
        np.testing.assert_allclose(joined, slope, rtol=0, atol=3e-6 * np.abs(slope).max())


@pytest.mark.long
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_images(name, rng):
    """They sum up to a batch's; `alone`, each is what a batch of one image gives."""
    problem = make_problem(rng, name)
    mask = problem[5]
    losses, _ = jax.jit(LOSSES[name])(*problem)
    (loss, _), _ = COMPILED[name](*problem)
    assert losses.shape == (EXAMPLES,)
    np.testing.assert_allclose(losses.mean(), loss, rtol=1e-6)
    assert (losses[~mask] == 0).all()
    assert (losses[mask] > 0).all()

    alone, _ = jax.jit(functools.partial(LOSSES[name], alone=True))(*problem)
    for row in range(EXAMPLES):
        one = [x[:, row : row + 1] for x in problem[:2]] + [x[row : row + 1] for x in problem[2:]]
        np.testing.assert_allclose(alone[row], COMPILED[name](*one)[0][0], rtol=2e-6)
    if name != "detr":  # a weighted mean has one divisor, and sums of boxes another
        count = (problem[4] & mask[:, None]).sum(1)
        scale = EXAMPLES * np.maximum(count, 1) / count.sum()
        np.testing.assert_allclose(losses, alone * scale, rtol=3e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_predictions_have_finite_losses_and_gradients(name, rng):
    logits, boxes, label, target_boxes, target_mask, mask = make_problem(rng, name)
    logits = 1e4 * np.sign(logits)
    boxes[0] = 0
    boxes[1, :, ::2, 2:] = 1e-20
    (loss, _), gradients = COMPILED[name](logits, boxes, label, target_boxes, target_mask, mask)
    assert np.isfinite(loss)
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.long
def test_half_precision_predictions_are_scored_in_float32(rng):
    problem = make_problem(rng, "detr")
    halves = [jnp.asarray(x, jnp.bfloat16) for x in problem[:2]]
    (loss, metrics), _ = COMPILED["detr"](*halves, *problem[2:])
    assert loss.dtype == metrics["loss_ce"].dtype == jnp.float32
    expected, _ = reference("detr", *(np.float32(x) for x in halves), *problem[2:])
    np.testing.assert_allclose(loss, expected, rtol=3e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 3}, r"10 queries do not split into 3 groups"),
        ({"groups": 5}, r"5 boxes but the model only 2 queries"),
        ({"class_loss": "bce"}, r"class_loss is one of ia_bce, focal, not 'bce'"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, rng):
    loss = functools.partial(detection_losses.sigmoid_detr_loss, **arguments)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(loss, *map(jnp.asarray, make_problem(rng, "ia_bce")))
