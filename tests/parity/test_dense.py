"""RetinaNet and FCOS beside torchvision's: files, raw outputs, detections, losses, gradients."""

import json
import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision_detectors as shared
from safetensors.torch import load_file
from torch import nn
from torchvision import models
from torchvision.models import ResNet, resnet
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision_detectors import (
    CASES,
    SIDE,
    apply,
    imported,
    normalized,
    on_a_canvas,
    random_targets,
    sees,
    variables_of,
)

from vision_jax import convert
from vision_jax.certify.measure import relative_error
from vision_jax.certify.random_weights import sample_images
from vision_jax.certify.reference_dense import outputs as raw_outputs
from vision_jax.certify.reference_dense import raw
from vision_jax.convert.package import write_package
from vision_jax.convert.read import read_preprocessing
from vision_jax.convert.retinanet import PUBLISHED_V1, V1
from vision_jax.convert.tables import find_table, infer_arguments
from vision_jax.models import fcos, retinanet
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.ops.dense_losses import anchor_loss, assign_points, point_loss
from vision_jax.tasks.detection.objective import TARGETS

VARIANTS = {**retinanet.VARIANTS, **fcos.VARIANTS}
FAMILY = {name: "retinanet" if name in retinanet.VARIANTS else "fcos" for name in VARIANTS}
CLASSES, WIDTH = 5, 64
SPREAD = {  # of the outputs of random heads, such that there are detections
    "head.classification_head.cls_logits": 2.0,
    "head.regression_head.bbox_reg": 0.5,
    "head.regression_head.bbox_ctrness": 1.5,
}


# References -------------------------------------------------------------------------------------


def small(name, norm=nn.BatchNorm2d, **keywords):
    """torchvision's of that name, of few blocks and channels."""
    body = ResNet(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm)
    levels = {f"layer{index + 2}": str(index) for index in range(3)}
    coarse = 512 if name.endswith("v2") else WIDTH
    extra = LastLevelP6P7(coarse, WIDTH)
    backbone = BackboneWithFPN(body, levels, [128, 256, 512], WIDTH, extra_blocks=extra)
    if name.startswith("fcos"):
        return FCOS(backbone, CLASSES, **keywords).eval()
    head = None
    if name.endswith("v2"):
        head = RetinaNetHead(WIDTH, 9, CLASSES, norm_layer=partial(nn.GroupNorm, 32))
        head.regression_head._loss_type = "giou"
    return RetinaNet(backbone, CLASSES, head=head, **keywords).eval()


def calibrate(model):
    """Random weights and statistics, and heads whose outputs find something."""
    shared.calibrate(model, raw, raw_outputs, SPREAD)
    if isinstance(model, FCOS):  # distances are of a ReLU: of sides, some of them 0
        model.head.regression_head.bbox_reg.bias.data += 1
    return model


@cache
def reference(name):
    return calibrate(small(name))


# Network ----------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_detections_are_torchvisions_of_each_image_alone(name):
    """All of them, of images of two sizes on a canvas that is too large for both, in float64."""
    sizes, canvas = ((128, 160), (101, 75)), (192, 256)
    images, mask = on_a_canvas(sizes, canvas)
    module = reference(name)
    arguments, flat = imported(module)
    model = build_model(FAMILY[name], **arguments, dtype=jnp.float64)
    ours = apply(model, flat, images, mask)
    module.double()
    for index, (height, width) in enumerate(sizes):
        image = images[index, :height, :width]
        with torch.no_grad():
            (found,) = module(sees(module, image))
        there = ours["score"][index] > 0
        assert 20 < there.sum() == len(found["scores"]) <= model.most
        np.testing.assert_allclose(ours["score"][index][there], found["scores"], rtol=1e-9)
        np.testing.assert_array_equal(ours["label"][index][there], found["labels"])
        boxes = ours["boxes_xyxy_01"][index][there] * [width, height, width, height]
        assert relative_error(boxes, found["boxes"].numpy()) <= 1e-9
    module.float()


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", VARIANTS)
def test_raw_outputs(name, dtype):
    """And each level of the pyramid."""
    bar = {"float32": 1e-5, "float64": 1e-12}[dtype]
    module = reference(name)
    arguments, flat = imported(module)
    model = build_model(FAMILY[name], **arguments, dtype=jnp.dtype(dtype))
    images = sample_images(2, (128, 96), 3, 5)
    ours, features = apply(model, flat, images, dtype=dtype, return_features=True)
    module.to(getattr(torch, dtype))
    with torch.no_grad():
        theirs = vars(raw_outputs(module, normalized(images, dtype)))
        levels = module.backbone(normalized(images, dtype))
    module.float()
    for key, value in theirs.items():
        assert relative_error(ours[key], value.numpy()) <= bar, key
    assert len(levels) == 5
    for index, level in enumerate(levels.values()):
        assert relative_error(features[f"level_{index}"], level.numpy()) <= bar, index


# Files ------------------------------------------------------------------------------------------


def old_names(tensors):
    """The towers' convolutions by the number of each second one, between which ReLUs stand."""

    def number(match):
        return f"{match[1]}{2 * int(match[2])}.{match[3]}"

    tower = re.compile(r"(head\.\w+\.conv\.)(\d)\.0\.(\w+)")
    return shared.old_names(tensors, lambda name: tower.sub(number, name))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_tells_its_variant_and_each_tensor_has_its_place(name):
    """By names and shapes alone; the older names of v1 and of FCOS too."""
    with torch.device("meta"):
        module = models.get_model(name, weights=None, weights_backbone=None)
    shapes = {key: tuple(x.shape) for key, x in module.state_dict().items()}
    counts = {V1: [354, 301], f"{V1}_v2": [362], "fcos_resnet50_fpn": [372, 319]}[name]
    spelled = [shapes, old_names(shapes)][: len(counts)]
    assert [len(names) for names in spelled] == counts
    for names in spelled:
        table = find_table(names)
        assert table.family == FAMILY[name]
        arguments = {**FAMILIES[table.family].defaults, **infer_arguments(table, names, {})}
        assert {key: arguments[key] for key in VARIANTS[name]} == VARIANTS[name]
        assert arguments["num_classes"] == 91
        rules = table.rules(arguments)
        kept = [key for rule in rules for key in rule.names if key in names]
        assert sorted(kept) == sorted(names)


@pytest.mark.parametrize("name", [V1, "fcos_resnet50_fpn"])
def test_older_names_give_the_same_arrays(name):
    module = small(name)
    tensors = {key: x.numpy() for key, x in module.state_dict().items()}
    shared.check_older_names(module, old_names(tensors))


def test_the_published_v1_has_no_epsilon_and_says_so(tmp_path):
    tensors = old_names({key: x.numpy() for key, x in small(V1).state_dict().items()})
    shared.check_epsilon(tensors, V1, PUBLISHED_V1, tmp_path)


@pytest.mark.long
def test_frozen_norms_without_epsilon():
    """What torchvision makes of the published weights, and of our file of them, strictly."""
    module = small(V1, FrozenBatchNorm2d)
    overwrite_eps(module, 0.0)
    calibrate(module)
    config = {"library": "torchvision", "model": V1, "weights": "COCO_V1"}
    arguments, flat = imported(module, metadata={"config": config})
    model = build_model("retinanet", **arguments, dtype=jnp.float64)
    images = sample_images(1, (64, 64), 3, 2)
    ours = apply(model, flat, images)
    again = small(V1, FrozenBatchNorm2d)
    tensors, _ = convert.export_weights(flat, "retinanet", arguments, to="torchvision")
    again.load_state_dict({key: torch.tensor(x) for key, x in tensors.items()}, strict=True)
    overwrite_eps(again, 0.0)
    for one in (module, again):
        with torch.no_grad():
            theirs = vars(raw_outputs(one.double(), normalized(images)))
        for key, value in theirs.items():
            assert relative_error(ours[key], value.numpy()) <= 1e-12, key


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_a_written_folder_is_what_its_builder_loads(name, tmp_path):
    """With as many candidates and detections, for as many classes, and sides of images."""
    own = {"num_classes": 3, "candidates": 50, "most": 7, "least_score": 0.1}
    sizes = {**VARIANTS[name], **own, "batch_norm_eps": 0.0}
    arguments = {**FAMILIES[FAMILY[name]].defaults, **sizes}
    flat = shared.zeros(FAMILY[name], arguments)
    said = {"short": 320, "longest": 640, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    write_package(tmp_path, flat, FAMILY[name], arguments, to="torchvision", preprocessing=said)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["norm_eps"] == 0.0
    module = models.get_model(config["model"], weights=None, **config["kwargs"])
    module.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert (module.topk_candidates, module.detections_per_img, module.score_thresh) == (50, 7, 0.1)
    assert (module.transform.min_size, module.transform.max_size) == ((320,), 640)
    weights = convert.read_weights(str(tmp_path))
    plain = replace(weights, metadata={"config": config})  # without our header
    for read in (weights, plain):
        found = convert.recognize(read)[1]
        assert {key: found[key] for key in sizes} == sizes
    read = read_preprocessing({"config": config})
    assert (read["short"], read["longest"], read["rule"]) == (320, 640, "torchvision")


# Losses -----------------------------------------------------------------------------------------

SIZES, CANVAS = ((SIDE, SIDE), (51, 58)), (96, 160)  # a canvas of SIDE, of each image alone


def loss_of(model):
    """(outputs, targets..., mask, size) -> (losses, metrics) of a model of ours."""
    if isinstance(model, retinanet.RetinaNet):
        return partial(anchor_loss, box_loss=model.box_loss)
    return partial(point_loss, radius=model.radius)


@cache
def learner(name):
    """(the reference, its arrays, a compiled (variables, images, mask, targets) -> ...)."""
    module = calibrate(small(name)).double()
    arguments, flat = imported(module)
    model = build_model(FAMILY[name], **arguments, dtype=jnp.float64)
    sizes = jnp.array(SIZES)

    @jax.jit
    def value_and_grad(variables, images, mask, targets):
        def loss(params):
            given = {**variables, "params": params}
            outputs, _ = model.apply(given, images, mask, train=True, mutable=["batch_stats"])
            everyone = jnp.ones(len(images), bool)
            losses, metrics = loss_of(model)(
                outputs, *(targets[n] for n in TARGETS), everyone, sizes
            )
            return losses.mean(), metrics

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    return module, flat, value_and_grad


TERMS = {"classification": "class", "bbox_regression": "box", "bbox_ctrness": "center"}


def their_terms(module, images, targets):
    """Loss terms of torchvision's, of a canvas that is each image's own."""
    shared.to_train(module)
    module.transform.resize = lambda image, target: (image, target)
    seen = [
        torch.tensor(image[:height, :width].transpose(2, 0, 1))
        for image, (height, width) in zip(images, SIZES, strict=True)
    ]
    return module(seen, shared.as_theirs(targets, SIZES))


@pytest.mark.long(but=("retinanet_resnet50_fpn_v2-crowds", "fcos_resnet50_fpn-crowds"))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", VARIANTS)
def test_losses_of_outputs_are_torchvisions(name, case, rng):
    """And their gradients, of random outputs of all places, and of some that are on no image."""
    module, targets = small(name).double(), random_targets(CLASSES, **CASES[case])
    grids = [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]
    maps = [torch.zeros(2, WIDTH, *grid, dtype=torch.float64) for grid in grids]
    places = module.anchor_generator(ImageList(torch.zeros(2, 3, SIDE, SIDE), list(SIZES)), maps)
    point = name.startswith("fcos")
    counts = [(1 if point else 9) * height * width for height, width in grids]
    shapes = {"cls_logits": CLASSES, "bbox_regression": 4, **({"bbox_ctrness": 1} if point else {})}
    raw = {key: rng.normal(size=(2, sum(counts), size)) for key, size in shapes.items()}
    if point:
        raw["bbox_regression"] = np.maximum(2 * raw["bbox_regression"] + 1, 0)
    said = {key: torch.tensor(x, requires_grad=True) for key, x in raw.items()}
    terms = module.compute_loss(
        shared.as_theirs(targets, SIZES), said, places, *([counts] if point else [])
    )
    sum(terms.values()).backward()

    def more(x):  # places that are on no canvas of an image
        return jnp.concatenate([x, 3 * jnp.ones_like(x[:, :7])], axis=1)

    known = {"cls_logits": "logits", "bbox_regression": "distances" if point else "box_deltas"}
    known |= {"bbox_ctrness": "center_logits"}
    boxes = np.stack(places)
    with jax.enable_x64(True):
        levels = jnp.split(jnp.asarray(boxes), np.cumsum(counts)[:-1], axis=1)
        fixed = {"inside": more(jnp.ones(boxes.shape[:2], bool)).at[:, sum(counts) :].set(False)}
        fixed["points_xyxy_px" if point else "anchors_xyxy_px"] = more(jnp.asarray(boxes))
        if point:
            reach = [fcos._reach(x, index, len(levels)) for index, x in enumerate(levels)]
            fixed["reach_px"] = more(jnp.concatenate(reach, axis=1))
        given = (targets[key] for key in TARGETS)
        rest = [*map(jnp.asarray, given), jnp.ones(2, bool), jnp.array(SIZES)]
        if point:
            loss = partial(point_loss, radius=1.5)
        else:
            loss = partial(anchor_loss, box_loss=VARIANTS[name].get("box_loss", "l1"))

        @jax.jit
        @partial(jax.value_and_grad, has_aux=True)
        def value_and_grad(own):
            wide = {known[key]: more(x) for key, x in own.items()}
            if point:
                wide["center_logits"] = wide["center_logits"][..., 0]
            losses, metrics = loss({**wide, **fixed}, *rest)
            return losses.mean(), metrics

        (value, metrics), gradients = value_and_grad(jax.tree.map(jnp.asarray, raw))
        found = jax.device_get((value, metrics, gradients))
    np.testing.assert_allclose(found[0], sum(terms.values()).item(), rtol=1e-10)
    for key, term in terms.items():
        ours = found[1][f"loss_{TERMS[key]}"]
        np.testing.assert_allclose(ours, term.item(), rtol=1e-10, atol=1e-12, err_msg=key)
    for key, x in said.items():
        expected = np.zeros(x.shape) if x.grad is None else x.grad.numpy()
        assert np.abs(found[2][key] - expected).max() <= 1e-10 * np.abs(expected).max(), key


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((V1, case) for case in CASES),
        *((f"{V1}_v2", case) for case in ("plain", "no boxes at all")),
        *(("fcos_resnet50_fpn", case) for case in ("plain", "no boxes at all")),
    ],
)
def test_losses_and_gradients_are_torchvisions(name, case):
    """One image is smaller than the other, and our canvas larger than both."""
    module, flat, value_and_grad = learner(name)
    (images, mask), targets = on_a_canvas(SIZES, CANVAS), random_targets(CLASSES, **CASES[case])
    terms = their_terms(module, images, targets)
    sum(terms.values()).backward()
    with jax.enable_x64(True):
        variables = variables_of(flat, "float64")
        given = jax.tree.map(jnp.asarray, (images, mask, targets))
        (value, metrics), gradients = jax.device_get(value_and_grad(variables, *given))
    for key, term in terms.items():
        expected, ours = term.item(), metrics[f"loss_{TERMS[key]}"]
        np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12, err_msg=key)
    np.testing.assert_allclose(value, sum(terms.values()).item(), rtol=1e-10)
    found = metrics["foreground" if name.startswith("fcos") else "anchors"]
    assert (found > 0) == ("no boxes" not in case and (case, name[:4]) != ("of a pixel", "fcos"))
    shared.check_gradients(gradients, module)


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_boxes_without_area_train_nothing(name):
    """torchvision refuses them: the loss is that of the others alone."""
    module, flat, value_and_grad = learner(name)
    (images, mask), targets = on_a_canvas(SIZES, CANVAS), random_targets(CLASSES, (3, 1))
    targets["boxes_cxcywh_01"][:, 0, 2:] = 0
    others = {**targets, "target_mask": targets["target_mask"].copy()}
    others["target_mask"][:, 0] = False
    with jax.enable_x64(True):
        variables = variables_of(flat, "float64")
        found, alone = (
            jax.device_get(
                value_and_grad(variables, *jax.tree.map(jnp.asarray, (images, mask, one)))
            )
            for one in (targets, others)
        )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    jax.tree.map(np.testing.assert_array_equal, found, alone)
    expected = sum(their_terms(module, images, others).values()).item()
    np.testing.assert_allclose(found[0][0], expected, rtol=1e-10)


def test_points_and_boxes_of_equal_area_and_at_every_bound(rng):
    """As torchvision's compute_loss, of points on a grid and boxes of whole pixels."""
    side = np.repeat([8.0, 16.0, 32.0], [64, 16, 4])
    corners = [
        (stride * np.indices((64 // stride, 64 // stride)).reshape(2, -1)[::-1]).T
        for stride in (8, 16, 32)
    ]
    middle = np.concatenate(corners).astype(float)
    points = np.concatenate([middle - side[:, None] / 2, middle + side[:, None] / 2], axis=1)
    low = rng.integers(0, 48, (12, 2))
    boxes = np.concatenate([low, low + 4 * rng.integers(1, 12, (12, 2))], axis=1).astype(float)
    boxes[6:] = boxes[:6][:, [1, 0, 3, 2]]  # of as much area
    least, most = 4 * side, 8 * side
    least[:64], most[-4:] = 0, np.inf
    with jax.enable_x64(True):
        target, found = assign_points(
            jnp.asarray(points)[None],
            jnp.stack([jnp.asarray(least), jnp.asarray(most)], -1)[None],
            jnp.asarray(boxes)[None],
            jnp.ones((1, 12), bool),
            radius=1.5,
        )
    seen = []
    module = FCOS.__new__(FCOS)
    nn.Module.__init__(module)
    module.center_sampling_radius = 1.5
    module.head = nn.Module()
    module.head.compute_loss = lambda targets, outputs, anchors, matched: seen.append(matched)
    wanted = {"boxes": torch.tensor(boxes), "labels": torch.zeros(12, dtype=torch.int64)}
    module.compute_loss([wanted], {}, [torch.tensor(points)], [64, 16, 4])
    matched = seen[0][0].numpy()
    assert (matched >= 0).sum() > 5
    np.testing.assert_array_equal(np.where(found[0], target[0], -1), matched)
