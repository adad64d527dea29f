"""Faster R-CNN beside torchvision's: files, raw outputs, detections, losses with gradients."""

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision_detectors as shared
from safetensors.torch import load_file
from torch import nn
from torchvision import models
from torchvision.models import ResNet, mobilenetv3, resnet
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation
from torchvision_detectors import (
    CASES,
    SIDE,
    apply,
    imported,
    normalized,
    random_targets,
    sees,
    variables_of,
)

from vision_jax import convert
from vision_jax.certify.measure import relative_error
from vision_jax.certify.random_weights import sample_images
from vision_jax.certify.reference_faster_rcnn import outputs as raw_outputs
from vision_jax.certify.reference_faster_rcnn import raw
from vision_jax.convert.faster_rcnn import LOW_RESOLUTION, MOBILE, PUBLISHED_V1, V1
from vision_jax.convert.files import Tensors, held
from vision_jax.convert.package import write_package
from vision_jax.convert.read import read_preprocessing
from vision_jax.convert.tables import find_table, infer_arguments, table_for_export
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.models.faster_rcnn import VARIANTS
from vision_jax.ops.proposal_losses import proposal_loss

CLASSES, WIDTH = 5, 32
SPREAD = {  # of the outputs of random heads, such that there are detections
    "rpn.head.cls_logits": 2.0,
    "rpn.head.bbox_pred": 0.3,
    "roi_heads.box_predictor.cls_score": 2.5,
    "roi_heads.box_predictor.bbox_pred": 1.5,
}


# References -------------------------------------------------------------------------------------


def small(version, norm=nn.BatchNorm2d, **keywords):
    """torchvision's, of few blocks and channels; version 3 is that of a MobileNetV3."""
    if version == 3:
        return small_mobile(norm, **keywords)
    body = ResNet(resnet.Bottleneck, [1, 1, 1, 1], norm_layer=norm)
    levels = {f"layer{index + 1}": str(index) for index in range(4)}
    own = nn.BatchNorm2d if version == 2 else None
    backbone = BackboneWithFPN(body, levels, [256, 512, 1024, 2048], WIDTH, norm_layer=own)
    head = TwoMLPHead(WIDTH * 49, 64)
    if version == 2:
        head = FastRCNNConvFCHead((WIDTH, 7, 7), [WIDTH] * 4, [64], norm_layer=own)
    return FasterRCNN(
        backbone,
        rpn_head=RPNHead(WIDTH, 3, conv_depth=version),
        box_head=head,
        box_predictor=FastRCNNPredictor(64, CLASSES + 1),
        **keywords,
    ).eval()


class HardSigmoid(nn.Module):
    """torch's own has a gradient of 1 / 6 in float32, of float64 too: 1.8e-8 off in the end."""

    def forward(self, x):
        return nn.functional.relu6(x + 3) / 6


def small_mobile(norm, **keywords):
    """A last stage of two blocks, of which the first gives a map; gates in some of the stages."""
    blocks = [
        (8, 3, 8, 8, True, "RE", 2, 1),
        (8, 3, 24, 16, False, "RE", 2, 1),
        (16, 5, 48, 24, True, "HS", 2, 1),
        (24, 5, 56, 32, True, "HS", 1, 1),
        (32, 5, 64, 40, True, "HS", 2, 1),
        (40, 5, 80, 40, True, "HS", 1, 1),
    ]
    settings = [mobilenetv3.InvertedResidualConfig(*block, width_mult=1) for block in blocks]
    body = mobilenetv3.MobileNetV3(settings, 8, norm_layer=norm).features
    for module in body.modules():
        if isinstance(module, SqueezeExcitation):
            module.scale_activation = HardSigmoid()
    anchors = AnchorGenerator(((32, 64, 128, 256, 512),) * 3, ((0.5, 1.0, 2.0),) * 3)
    return FasterRCNN(
        BackboneWithFPN(body, {"5": "0", "7": "1"}, [40, 240], WIDTH),
        rpn_anchor_generator=anchors,
        rpn_score_thresh=0.05,
        box_head=TwoMLPHead(WIDTH * 49, 64),
        box_predictor=FastRCNNPredictor(64, CLASSES + 1),
        **keywords,
    ).eval()


def calibrate(model):
    return shared.calibrate(model, raw, raw_outputs, SPREAD)


@cache
def reference(version):
    return calibrate(small(version))


# Network ----------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("version", [1, 2, 3])
def test_detections_are_torchvisions_of_each_image_alone(version):
    """All of them, of images of two sizes on a canvas that is too large for both, in float64."""
    sizes, canvas = ((128, 160), (101, 75)), (160, 192)
    images, mask = shared.on_a_canvas(sizes, canvas)
    module = reference(version)
    arguments, flat = imported(module)
    model = build_model("faster_rcnn", **arguments, dtype=jnp.float64)
    ours = apply(model, flat, images, mask)
    module.double()
    for index, (height, width) in enumerate(sizes):
        image = images[index, :height, :width]
        with torch.no_grad():
            (found,) = module(sees(module, image))
            whole = np.zeros((1, 3, *(-(-side // 32) * 32 for side in image.shape[:2])))
            whole[0, :, :height, :width] = normalized(image[None])[0]
            features = module.backbone(torch.tensor(whole))
            batch = ImageList(torch.tensor(whole), [(height, width)])
            (proposals,), _ = module.rpn(batch, features)
        assert 20 < ours["proposed"][index].sum() == len(proposals)
        own = ours["proposals_xyxy_px"][index, : len(proposals)]
        assert relative_error(own, proposals.numpy()) <= 1e-12
        there = ours["score"][index] > 0
        assert 20 < there.sum() == len(found["scores"]) <= 100
        np.testing.assert_allclose(ours["score"][index][there], found["scores"], rtol=1e-9)
        np.testing.assert_array_equal(ours["label"][index][there] + 1, found["labels"])
        boxes = ours["boxes_xyxy_01"][index][there] * [width, height, width, height]
        assert relative_error(boxes, found["boxes"].numpy()) <= 1e-9
    module.float()


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("version", [1, 3])
def test_raw_outputs(version, dtype):
    """Of few proposals, which float32 orders as float64 does, and of every level."""
    bar = {"float32": 1e-5, "float64": 1e-12}[dtype]
    module = reference(version)
    arguments, flat = imported(module)
    model = build_model("faster_rcnn", **{**arguments, "proposals": 16}, dtype=jnp.dtype(dtype))
    images = sample_images(2, (128, 96), 3, 5)
    ours, features = apply(model, flat, images, dtype=dtype, return_features=True)
    few = {"training": 16, "testing": 16}
    before = module.rpn._pre_nms_top_n, module.rpn._post_nms_top_n
    module.rpn._pre_nms_top_n = module.rpn._post_nms_top_n = few
    module.to(getattr(torch, dtype))
    with torch.no_grad():
        theirs = vars(raw_outputs(module, normalized(images, dtype)))
        levels = module.backbone(normalized(images, dtype))
    for name, value in theirs.items():
        assert relative_error(ours[name], value.numpy()) <= bar, name
    for index, level in enumerate(levels.values()):
        assert relative_error(features[f"level_{index}"], level.numpy()) <= bar, index
    module.rpn._pre_nms_top_n, module.rpn._post_nms_top_n = before
    module.float()


# Files ------------------------------------------------------------------------------------------


def old_names(tensors):
    numbered, plain = "rpn.head.conv.0.0.", "rpn.head.conv."
    return shared.old_names(tensors, lambda name: name.replace(numbered, plain))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_tells_its_variant_and_each_tensor_has_its_place(name):
    """By names and shapes alone; v1's older names too."""
    with torch.device("meta"):
        module = models.get_model(name, weights=None, weights_backbone=None)
    shapes = {key: tuple(x.shape) for key, x in module.state_dict().items()}
    counts = {V1: [348, 295], f"{V1}_v2": [404]}.get(name, [330, 284])
    spelled = [shapes, old_names(shapes)][: len(counts)]
    assert [len(names) for names in spelled] == counts
    for names in spelled:
        table = find_table(names)
        said = {"config": {"model": name}}
        arguments = {**FAMILIES["faster_rcnn"].defaults, **infer_arguments(table, names, said)}
        assert {key: arguments[key] for key in VARIANTS[name]} == VARIANTS[name]
        assert arguments["num_classes"] == 90
        rules = table.rules(arguments)
        kept = [key for rule in rules for key in rule.names if key in names]
        assert sorted(kept) == sorted(names)


def test_older_names_give_the_same_arrays():
    module = small(1)
    tensors = {name: x.numpy() for name, x in module.state_dict().items()}
    shared.check_older_names(module, old_names(tensors))


def test_the_published_v1_has_no_epsilon_and_says_so(tmp_path):
    tensors = old_names({name: x.numpy() for name, x in small(1).state_dict().items()})
    shared.check_epsilon(tensors, V1, PUBLISHED_V1, tmp_path)


def test_the_low_resolution_is_known_by_its_name(tmp_path):
    """Its tensors are those of the other: by a lone file's name, or by config.json."""
    with torch.device("meta"):
        module = models.get_model(MOBILE, weights=None, weights_backbone=None)
    shapes = old_names({name: x.shape for name, x in module.state_dict().items()})
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    few = {"roi_heads.box_predictor.cls_score.bias": np.zeros(3, np.float32)}
    ends = {LOW_RESOLUTION: (150, 320, 640), MOBILE: (1000, 800, 1333)}
    for name, (proposals, *sides) in ends.items():
        file = tmp_path / f"{name}-907ea3f9.safetensors"
        convert.write_safetensors(file, few)
        weights = convert.read_weights(str(file))  # of images; and of the network:
        own = {**FAMILIES["faster_rcnn"].preprocessing, **(weights.preprocessing or {})}
        assert [own["short"], own["longest"]] == sides
        held_ = Tensors({key: held(x) for key, x in tensors.items()})
        config = {"library": "torchvision", "model": name, "kwargs": {"min_size": [200, 240]}}
        for metadata in ({}, {"config": config}):
            whole = replace(weights, tensors=held_, metadata=metadata)
            found = convert.recognize(whole)[1]
            assert (found["proposals"], found["least_proposal_score"]) == (proposals, 0.05)
            assert found["anchor_sizes"] == ((32, 64, 128, 256, 512),) * 3
        read = read_preprocessing({"config": config})
        assert (read["short"], read["longest"]) == (240, sides[1])


@pytest.mark.parametrize(
    ("own", "builder", "sides"),
    [
        ({}, LOW_RESOLUTION, (320, 640)),
        ({"proposals": 200, "least_proposal_score": 0.1}, MOBILE, (800, 1333)),
    ],
)
def test_a_mobilenet_goes_to_the_builder_of_its_proposals(own, builder, sides):
    sizes = {**VARIANTS[LOW_RESOLUTION], **own, "num_classes": 3}
    arguments = {**FAMILIES["faster_rcnn"].defaults, **sizes}
    config = table_for_export("torchvision", "faster_rcnn", arguments).config(arguments)
    assert config["model"] == builder
    with torch.device("meta"):
        module = models.get_model(builder, weights=None, **config["kwargs"])
    assert module.rpn._post_nms_top_n["testing"] == arguments["proposals"]
    assert module.rpn._pre_nms_top_n["testing"] == arguments["proposals"]
    assert module.rpn.score_thresh == arguments["least_proposal_score"]
    assert (*module.transform.min_size, module.transform.max_size) == sides
    shapes = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    found = infer_arguments(find_table(shapes), shapes, {"config": config})
    assert found == {name: arguments[name] for name in found}


@pytest.mark.long
def test_frozen_norms_without_epsilon():
    """What torchvision makes of the published weights, and of our file of them, strictly."""
    module = small(1, FrozenBatchNorm2d)
    overwrite_eps(module, 0.0)
    calibrate(module)
    config = {"library": "torchvision", "model": V1, "weights": "COCO_V1"}
    arguments, flat = imported(module, metadata={"config": config})
    model = build_model("faster_rcnn", **arguments, dtype=jnp.float64)
    images = sample_images(1, (64, 64), 3, 2)
    _, features = apply(model, flat, images, return_features=True)
    again = small(1, FrozenBatchNorm2d)
    tensors, _ = convert.export_weights(flat, "faster_rcnn", arguments, to="torchvision")
    again.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()}, strict=True)
    overwrite_eps(again, 0.0)
    for one in (module, again):
        with torch.no_grad():
            levels = one.double().backbone(normalized(images))
        for index, level in enumerate(levels.values()):
            assert relative_error(features[f"level_{index}"], level.numpy()) <= 1e-12


@pytest.mark.long
def test_a_written_folder_is_what_its_builder_loads(tmp_path):
    """With as many proposals and detections, for as many classes, and sides of images."""
    sizes = {**VARIANTS[V1], "num_classes": 3, "proposals": 50, "most": 7}
    arguments = {**FAMILIES["faster_rcnn"].defaults, **sizes, "batch_norm_eps": 0.0}
    flat = shared.zeros("faster_rcnn", arguments)
    own = {"short": 320, "longest": 640, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    write_package(tmp_path, flat, "faster_rcnn", arguments, to="torchvision", preprocessing=own)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["norm_eps"] == 0.0
    module = models.get_model(config["model"], weights=None, **config["kwargs"])
    module.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert module.rpn._post_nms_top_n["testing"] == 50
    assert module.roi_heads.detections_per_img == 7
    assert (module.transform.min_size, module.transform.max_size) == ((320,), 640)
    weights = convert.read_weights(str(tmp_path))
    plain = replace(weights, metadata={"config": config})  # without our header
    for read in (weights, plain):
        found = convert.recognize(read)[1]
        assert {key: found[key] for key in sizes} == sizes
        assert found["batch_norm_eps"] == 0.0


# Losses -----------------------------------------------------------------------------------------

ALL = 10**6  # samples of an image: nothing is drawn


@cache
def learner(version):
    """(the reference, ours, its arrays, a compiled (variables, images, targets) -> ...)."""
    many = {"rpn_batch_size_per_image": ALL, "box_batch_size_per_image": ALL}
    few = {f"rpn_{kind}_nms_top_n_train": 100 for kind in ("pre", "post")}
    module = calibrate(small(version, **many, **few)).double()
    assign = module.rpn.assign_targets_to_anchors

    def assign_in_float64(anchors, targets):  # labels are float32, and so would be the loss
        labels, boxes = assign(anchors, targets)
        return [label.double() for label in labels], boxes

    module.rpn.assign_targets_to_anchors = assign_in_float64
    arguments, flat = imported(module)
    own = {"rpn_samples": ALL, "box_samples": ALL, "train_proposals": 100}
    model = build_model("faster_rcnn", **{**arguments, **own}, dtype=jnp.float64)

    @jax.jit
    def value_and_grad(variables, images, targets):
        def loss(params):
            given = {**variables, "params": params}
            outputs, _ = model.apply(
                given,
                images,
                None,
                targets,
                train=True,
                rngs={"dropout": jax.random.key(0)},
                mutable=["batch_stats"],
            )
            losses, metrics = proposal_loss(outputs, jnp.ones(len(images), bool))
            return losses.mean(), metrics

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    return module, flat, value_and_grad


@pytest.mark.long
@pytest.mark.parametrize(
    ("version", "name"),
    [
        *((1, name) for name in CASES),
        *((2, name) for name in ("plain", "no boxes at all")),
        *((3, name) for name in ("plain", "an image without boxes")),
    ],
)
def test_losses_and_gradients_are_torchvisions(version, name):
    module, flat, value_and_grad = learner(version)
    images, targets = sample_images(2, (SIDE, SIDE), 3, 9), random_targets(CLASSES, **CASES[name])
    shared.to_train(module)
    given = shared.as_theirs(targets, [(SIDE, SIDE)] * 2, first=1)
    terms = module(sees(module, *images), given)
    sum(terms.values()).backward()
    with jax.enable_x64(True):
        variables = variables_of(flat, "float64")
        arguments = jax.tree.map(jnp.asarray, (images, targets))
        (value, metrics), gradients = jax.device_get(value_and_grad(variables, *arguments))
    own_names = {
        "loss_classifier": "loss_class",
        "loss_box_reg": "loss_box",
        "loss_objectness": "loss_objectness",
        "loss_rpn_box_reg": "loss_rpn_box",
    }
    for key, ours in own_names.items():
        expected = terms[key].item()
        np.testing.assert_allclose(metrics[ours], expected, rtol=1e-10, atol=1e-12, err_msg=key)
    np.testing.assert_allclose(value, sum(terms.values()).item(), rtol=1e-10)
    shared.check_gradients(gradients, module)


@pytest.mark.long
def test_boxes_without_area_stay_finite():
    """torchvision refuses them."""
    _, flat, value_and_grad = learner(1)
    images, targets = sample_images(2, (SIDE, SIDE), 3, 9), random_targets(CLASSES, (3, 1))
    targets["boxes_cxcywh_01"][:, 0, 2:] = 0
    with jax.enable_x64(True):
        variables = variables_of(flat, "float64")
        found = value_and_grad(variables, *jax.tree.map(jnp.asarray, (images, targets)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(found)))
