"""YOLOX beside pixeltable-yolox: network, files, assignment and losses with their gradients."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vision_jax import convert
from vision_jax.certify import references
from vision_jax.certify.measure import certify_reference, relative_error
from vision_jax.certify.random_weights import randomize, randomize_statistics
from vision_jax.convert.tables import find_table, infer_arguments
from vision_jax.models.yolox import STRIDES, VARIANTS
from vision_jax.ops import cells
from vision_jax.ops.detection_outputs import cell_detections
from vision_jax.ops.simota import yolox_loss

with warnings.catch_warnings(action="ignore"):  # of imports
    from yolox.models import YoloxHead
    from yolox.utils import postprocess

    from vision_jax.certify.reference_yolox import Yolox, named

CLASSES, CANVAS, SLOTS = 4, (32, 64), 48
SMALL = {"num_classes": 5, "depth": 1 / 3, "width": 1 / 8}


# Network and files ------------------------------------------------------------------------------


def reference_of(**arguments):
    reference = references.make_reference("yolox", "YOLOX", {**SMALL, **arguments})
    randomize(reference.module, 0)
    randomize_statistics(reference, (64, 96), 3, 0)
    return reference


@pytest.mark.parametrize(
    "arguments",
    [
        {"depthwise": True, "act": "lrelu"},
        pytest.param({"depth": 2 / 3, "act": "relu"}, marks=pytest.mark.long),
        pytest.param({"width": 3 / 16}, marks=pytest.mark.long),
    ],
)
def test_what_a_certificate_proves(arguments):
    """Raw outputs and maps, the file bit by bit, and what the reference makes of our export."""
    measured = certify_reference(reference_of(**arguments), (64, 96), whole=True)
    names = {"logits", "object_logits", "box_deltas", "stem"}
    names |= {f"stage_{i}" for i in range(4)} | {f"level_{i}" for i in range(3)}
    assert measured["family"] == "yolox"
    assert all(set(errors) == names for errors in measured["errors"].values())
    assert measured["pass"], measured["reasons"]
    assert measured["arguments"]["activation"] == {"lrelu": "leaky_relu"}.get(
        arguments.get("act", "silu"), arguments.get("act", "silu")
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_published_file_tells_its_variant(name):
    """By its names and shapes alone, each of which has its place."""
    with torch.device("meta"):
        shapes = {key: tuple(x.shape) for key, x in named(name).state_dict().items()}
    table = find_table(shapes)
    arguments = infer_arguments(table, shapes, {})
    wanted = {"depthwise": False, **VARIANTS[name], "num_classes": 80, "activation": "silu"}
    assert {key: arguments[key] for key in wanted} == wanted
    rules = table.rules(arguments)
    assert sorted(tensor for rule in rules for tensor in rule.names) == sorted(shapes)


def test_a_file_of_the_original_is_read_out_of_what_is_beside(tmp_path):
    module = Yolox(**SMALL)
    content = {"model": module.state_dict(), "start_epoch": 300, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "yolox.pth")
    weights = convert.read_weights(str(tmp_path / "yolox.pth"), allow_pickle=True)
    family, arguments = convert.recognize(weights)
    assert (family, arguments["num_classes"], arguments["width"]) == ("yolox", 5, 8)
    assert set(weights.tensors) == set(module.state_dict())


# Assignment and losses --------------------------------------------------------------------------


def random_case(counts, *, sides=(4, 40), spread=1.0, away=0.0):
    """(raw predictions, targets) of two images, the first `counts` targets of each real.

    All cases have one shape, so that ours is compiled once.
    """
    rng = np.random.default_rng(7)
    shape = (len(counts), len(cells.grid(CANVAS, STRIDES)[0]))
    raw = {
        "logits": rng.normal(size=(*shape, CLASSES)) * 2,
        "object_logits": rng.normal(size=shape) - 1,
        "box_deltas": rng.normal(size=(*shape, 4)) * 0.7,
    }
    size = np.array(CANVAS[::-1])
    centers = (0.5 + spread * (rng.random((len(counts), SLOTS, 2)) - 0.5)) * size + away
    boxes = np.concatenate([centers, rng.uniform(*sides, centers.shape)], axis=-1)
    mask = np.arange(SLOTS)[None] < np.array(counts)[:, None]
    return raw, (rng.integers(0, CLASSES, mask.shape), boxes, mask)


def theirs(raw, targets, l1):
    """(terms, gradients) of the reference's head, which is given its own convolutions' outputs."""
    head = YoloxHead(CLASSES, width=0.125)
    head.use_l1 = l1
    given = {name: torch.tensor(x, requires_grad=True) for name, x in raw.items()}
    deltas = given["box_deltas"]
    outputs, grids, strides, start = [], [], [], 0
    for level, stride in enumerate(STRIDES):
        rows, columns = CANVAS[0] // stride, CANVAS[1] // stride
        part = slice(start, start + rows * columns)
        start = part.stop
        output = torch.cat(
            [deltas[:, part], given["object_logits"][:, part, None], given["logits"][:, part]], -1
        )
        image = output.transpose(1, 2).reshape(len(deltas), -1, rows, columns)
        output, grid = head.get_output_and_grid(image, level, stride, "torch.DoubleTensor")
        outputs.append(output)
        grids.append(grid.double())
        strides.append(torch.full((1, rows * columns), float(stride), dtype=torch.float64))
    label, boxes, mask = targets
    labels = np.concatenate([label[..., None], boxes], axis=-1) * mask[..., None]
    with warnings.catch_warnings(action="ignore"):  # of autocast without a GPU
        total, *terms = head.get_losses(
            None,
            [grid[:, :, 0] for grid in grids],
            [grid[:, :, 1] for grid in grids],
            strides,
            torch.tensor(labels),
            torch.cat(outputs, 1),
            [deltas] if l1 else [],
            torch.float64,
        )
    total.backward()
    return total.item(), terms, {name: x.grad.numpy() for name, x in given.items()}


CASES = {
    "plain": {"counts": (3, 1)},
    "an image without boxes": {"counts": (0, 2)},
    "no boxes at all": {"counts": (0, 0)},
    "crowds": {"counts": (20, 12), "sides": (20, 40), "spread": 0.3},
    "more boxes than cells": {"counts": (SLOTS, 1)},
    "without area": {"counts": (4, 2), "sides": (0, 0)},
    "centers outside": {"counts": (5, 3), "spread": 1.6},
    "far outside": {"counts": (1, 0), "away": 500.0},
}


@pytest.fixture(scope="module")
def ours():
    """(raw, targets, l1_weight) -> ((loss, metrics), gradients), in float64."""

    def loss(raw, targets, l1_weight):
        losses, metrics = yolox_loss(
            raw["logits"],
            raw["object_logits"],
            raw["box_deltas"],
            *targets,
            jnp.ones(len(raw["logits"]), bool),
            canvas=CANVAS,
            strides=STRIDES,
            l1_weight=l1_weight,
        )
        return losses.mean(), metrics

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("l1", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_the_references(name, l1, ours):
    raw, targets = random_case(**CASES[name])
    total, (box, objects, classes, deltas, a_box), gradients = theirs(raw, targets, l1)
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, (raw, targets, np.float64(l1)))
        (value, metrics), own = ours(*given)
    np.testing.assert_allclose(value, total, rtol=1e-10)
    terms = {"loss_box": box / 5, "loss_object": objects, "loss_class": classes}
    terms |= {"loss_l1": deltas} if l1 else {}
    for key, term in terms.items():
        np.testing.assert_allclose(metrics[key], term.item(), rtol=1e-10, atol=1e-12, err_msg=key)
    if metrics["loss_box"]:
        boxes = targets[2].sum()
        np.testing.assert_allclose(np.asarray(metrics["foreground"]) / boxes, a_box, rtol=1e-12)
    for key, gradient in gradients.items():
        scale = max(np.abs(gradient).max(), 1e-3)
        assert np.abs(np.asarray(own[key]) - gradient).max() <= 1e-10 * scale, key


def test_decoded_boxes_are_the_references():
    raw, _ = random_case((1, 1))
    module = Yolox(CLASSES, 1 / 3, 1 / 8).eval()
    sizes = [(CANVAS[0] // stride, CANVAS[1] // stride) for stride in STRIDES]
    module.head.hw = sizes
    scores = np.concatenate([raw["object_logits"][..., None], raw["logits"]], axis=-1)
    outputs = torch.tensor(np.concatenate([raw["box_deltas"], scores], axis=-1))
    expected = module.head.decode_outputs(outputs, "torch.DoubleTensor")[..., :4].numpy()
    with jax.enable_x64(True):
        found = cells.decode(jnp.asarray(raw["box_deltas"]), CANVAS, STRIDES)
    assert relative_error(np.asarray(found), expected) <= 1e-15


def test_detections_are_the_references():
    """All of them, in their order, in pixels of an image that was twice as large."""
    raw, _ = random_case((1, 1))
    raw["box_deltas"] = 0.1 * raw["box_deltas"] + np.array([0, 0, 2, 2])  # many overlap
    with jax.enable_x64(True):
        given = {name: jnp.asarray(value) for name, value in raw.items()}
        boxes = cells.decode(given["box_deltas"], CANVAS, STRIDES)
        scores = [given["object_logits"][..., None], given["logits"]]
        decoded = np.concatenate([boxes, *map(jax.nn.sigmoid, scores)], axis=-1)
        found = jax.jit(partial(cell_detections, least=0.01))(
            given["logits"],
            given["object_logits"],
            boxes / np.tile(CANVAS[::-1], 2).reshape(1, 1, 4),
            jnp.array([CANVAS, CANVAS]) * 2,
        )
    expected = postprocess(torch.tensor(decoded), CLASSES, conf_thre=0.01, nms_thre=0.65)
    for index, rows in enumerate(expected):
        there = np.asarray(found["score"][index]) > 0
        assert 10 < there.sum() == len(rows) < len(boxes[index])
        order = np.argsort(-(rows[:, 4] * rows[:, 5]).numpy(), kind="stable")
        rows = rows.numpy()[order]
        np.testing.assert_allclose(found["score"][index][there], rows[:, 4] * rows[:, 5], 1e-9)
        np.testing.assert_array_equal(found["label"][index][there], rows[:, 6])
        np.testing.assert_allclose(found["boxes_xyxy_px"][index][there], 2 * rows[:, :4], 1e-9)
