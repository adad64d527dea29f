"""Faster R-CNN beside torchvision's: files, raw outputs, detections, losses with gradients."""

import json
import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
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
from torchvision_detectors import apply, imported, keep, normalized, sees, variables_of

from vision_jax import convert
from vision_jax.certify.measure import relative_error
from vision_jax.certify.random_weights import randomize, randomize_statistics, sample_images
from vision_jax.certify.reference_faster_rcnn import outputs as raw_outputs
from vision_jax.certify.reference_faster_rcnn import raw
from vision_jax.certify.references import Reference
from vision_jax.convert.faster_rcnn import LOW_RESOLUTION, MOBILE, V1
from vision_jax.convert.files import Tensors, held
from vision_jax.convert.package import write_package
from vision_jax.convert.read import read_preprocessing
from vision_jax.convert.tables import find_table, infer_arguments, table_for_export
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.models.faster_rcnn import VARIANTS
from vision_jax.ops.proposal_losses import proposal_loss
from vision_jax.trees import paths

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


def calibrate(model, seed=0):
    """Random weights and statistics, and heads whose outputs find something."""
    randomize(model, seed)
    reference = Reference("torchvision", raw(model), "", {})
    randomize_statistics(reference, (128, 128), 3, seed)
    images = torch.tensor(sample_images(2, (128, 160), 3, seed)).permute(0, 3, 1, 2).float()
    for name, spread in SPREAD.items():
        module = model.get_submodule(name)
        seen = []
        hook = module.register_forward_hook(partial(keep, seen))
        with torch.no_grad():
            raw_outputs(model, 4 * (images - 0.5))
            scale = spread / torch.cat(seen).std()
            for parameter in module.parameters():
                parameter *= scale
        hook.remove()
    del model.forward  # the class's own again
    return model


@cache
def reference(version):
    return calibrate(small(version))


# Network ----------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("version", [1, 2, 3])
def test_detections_are_torchvisions_of_each_image_alone(version):
    """All of them, of images of two sizes on a canvas that is too large for both, in float64."""
    sizes, canvas = ((128, 160), (101, 75)), (160, 192)
    images, mask = np.ones((2, *canvas, 3)), np.zeros((2, *canvas), bool)
    for image, there, (height, width) in zip(images, mask, sizes, strict=True):
        image[:height, :width] = sample_images(1, (height, width), 3, height)[0]
        there[:height, :width] = True
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
    """As torchvision before 0.13 and the published file have them: frozen norms without counts."""
    renamed = {}
    for name, x in tensors.items():
        for part in ("inner_blocks", "layer_blocks"):
            name = re.sub(rf"({part}\.\d)\.0\.", r"\1.", name)
        if not name.endswith("num_batches_tracked"):
            renamed[name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = x
    return renamed


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
    _, expected = imported(module)
    arguments, found = imported(module, old_names(tensors))
    assert arguments["batch_norm_eps"] == 1e-5
    for path, array in found.items():
        wanted = np.zeros_like(array) if path.endswith("count") else expected[path]
        np.testing.assert_array_equal(array, wanted, err_msg=path)


def test_the_published_v1_has_no_epsilon_and_says_so(tmp_path):
    """By the file's name, by torchvision's name of the weights, or by a config of ours."""
    tensors = old_names({name: x.numpy() for name, x in small(1).state_dict().items()})
    for name, epsilon in (("fasterrcnn_resnet50_fpn_coco-258fb6c6", 0.0), ("mine", 1e-5)):
        file = tmp_path / f"{name}.safetensors"
        convert.write_safetensors(file, tensors)
        weights = convert.read_weights(str(file))
        assert convert.recognize(weights)[1]["batch_norm_eps"] == epsilon
        assert f"batch_norm_eps={epsilon}" in convert.assumptions(weights)
    said = {"library": "torchvision", "model": V1}
    for config in ({"weights": "COCO_V1"}, {"norm_eps": 0.0}):
        given = replace(weights, metadata={"config": said | config})
        assert convert.recognize(given)[1]["batch_norm_eps"] == 0.0
        assert convert.assumptions(given) == ("batch_norm_eps=0.0, by the weights' name",)


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
    built = build_model("faster_rcnn", **arguments)
    like = jax.eval_shape(built.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    flat = {
        path: np.zeros(x.shape, x.dtype)
        for tree in like.values()
        for path, x in paths.flatten(tree).items()
    }
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

SIDE, SLOTS = 64, 24
ALL = 10**6  # samples of an image: nothing is drawn


def random_targets(counts, sides=(8, 45)):
    """(label, boxes cxcywh in [0, 1], mask) of images of SIDE pixels, `counts` boxes each."""
    rng = np.random.default_rng(3)
    size = rng.uniform(*sides, (len(counts), SLOTS, 2)) / SIDE
    centers = size / 2 + (1 - size) * rng.random(size.shape)
    mask = np.arange(SLOTS)[None] < np.array(counts)[:, None]
    label = rng.integers(0, CLASSES, mask.shape)
    return {
        "label": label,
        "boxes_cxcywh_01": np.concatenate([centers, size], axis=-1),
        "target_mask": mask,
    }


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


CASES = {
    "plain": {"counts": (3, 1)},
    "an image without boxes": {"counts": (0, 2)},
    "no boxes at all": {"counts": (0, 0)},
    "crowds": {"counts": (SLOTS, SLOTS), "sides": (20, 40)},
    "of a pixel": {"counts": (4, 2), "sides": (1, 2)},
}


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
    images, targets = sample_images(2, (SIDE, SIDE), 3, 9), random_targets(**CASES[name])
    module.train()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    given = []
    for label, boxes, mask in zip(*targets.values(), strict=True):
        center, half = boxes[mask, :2] * SIDE, boxes[mask, 2:] * SIDE / 2
        corners = np.concatenate([center - half, center + half], axis=-1)
        given.append({"boxes": torch.tensor(corners), "labels": torch.tensor(label[mask] + 1)})
    module.zero_grad()
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
    tensors = {name: x.numpy() for name, x in module.state_dict().items()}
    tensors |= {name: x.grad.numpy() for name, x in module.named_parameters() if x.grad is not None}
    _, expected = imported(module, tensors)
    for path, gradient in paths.flatten(gradients).items():
        scale = max(np.abs(expected[path]).max(), 1e-6)
        assert np.abs(gradient - expected[path]).max() <= 1e-10 * scale, path


@pytest.mark.long
def test_boxes_without_area_stay_finite():
    """torchvision refuses them."""
    _, flat, value_and_grad = learner(1)
    images, targets = sample_images(2, (SIDE, SIDE), 3, 9), random_targets((3, 1))
    targets["boxes_cxcywh_01"][:, 0, 2:] = 0
    with jax.enable_x64(True):
        variables = variables_of(flat, "float64")
        found = value_and_grad(variables, *jax.tree.map(jnp.asarray, (images, targets)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(found)))
