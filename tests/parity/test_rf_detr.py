"""Our RF-DETR against transformers': windows, features, masks, sizes and groups; and its files.

Proposals are the cells of the highest logits, and where two nearly tie, rounding may swap them:
random heads of order one keep the logits of these small maps apart by 1e-5 of their size and more,
which the comparison asserts.
"""

import argparse
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import RfDetrConfig, RfDetrForObjectDetection
from transformers.models.rf_detr.modeling_rf_detr import MultiScaleDeformableAttention

from vision_jax import convert
from vision_jax.certify.measure import relative_error
from vision_jax.certify.random_weights import randomize, sample_images
from vision_jax.convert.engine import export_tensors
from vision_jax.convert.package import write_package
from vision_jax.convert.rf_detr import TABLES
from vision_jax.convert.tables import find_table, infer_arguments, shapes_of
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.models.rf_detr import VARIANTS, RfDetr
from vision_jax.ops.deformable import sample_weighted
from vision_jax.trees.paths import flatten, unflatten

BACKBONE = {
    "model_type": "rf_detr_dinov2",
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "mlp_ratio": 2,
    "patch_size": 4,
    "image_size": 32,
    "num_windows": 2,
    "out_features": ["stage1", "stage3"],
}
REST = {
    "d_model": 16,
    "c2f_num_blocks": 1,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 4,
    "decoder_n_points": 2,
    "num_queries": 6,
    "group_detr": 3,
    "num_labels": 5,
    "dropout": 0.0,
}
PICKLE = {"allow_pickle": True}
BARS = {"float32": 1e-5, "float64": 1e-12}
MASK = np.ones((2, 32, 32), bool)
MASK[1, 21:] = MASK[1, :, 13:] = False
# (backbone, rest, side of the images, mask, training)
CASES = {
    "plain": ({}, {}, 32, None, False),
    "all groups, padded": ({}, {}, 32, MASK, True),
    # 1 % of the image is less than half a cell's distance of the outermost centers.
    "51 cells a side": (
        {"image_size": 102, "patch_size": 2, "num_windows": 3},
        {},
        102,
        None,
        False,
    ),
    "odd": (
        {
            "num_windows": 4,
            "out_features": ["stem", "stage2"],
            "image_size": 20,
            "window_block_indexes": [1],
        },
        {
            "decoder_n_points": 3,
            "hidden_expansion": 0.25,
            "c2f_num_blocks": 2,
            "layer_norm_eps": 1e-3,
            "decoder_layers": 1,
        },
        48,
        None,
        False,
    ),
}


def reference_of(backbone, rest, seed=3):
    config = RfDetrConfig(backbone_config={**BACKBONE, **backbone}, **{**REST, **rest})
    module = RfDetrForObjectDetection._from_config(config, attn_implementation="sdpa").eval()
    randomize(module, seed)
    embeddings = module.model.backbone.backbone.embeddings
    embeddings.interpolate_pos_encoding = types.MethodType(resampled, embeddings)
    return module


def resampled(self, embeddings, height, width):
    """As transformers does, but not in float32 when the model is in float64."""
    table = self.position_embeddings
    old, new = round((table.shape[1] - 1) ** 0.5), height // self.patch_size
    grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    if old != new:
        grid = torch.nn.functional.interpolate(
            grid, size=(new, new), mode="bicubic", align_corners=False, antialias=True
        )
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)], dim=1)


def imported(module, folder):
    module.save_pretrained(folder)
    weights = convert.read_weights(str(folder))
    family, arguments = convert.recognize(weights)
    assert family == "rf_detr"
    model = build_model(family, **arguments)
    images = jnp.zeros((1, *model.image_size, arguments["in_channels"]))
    like = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return weights, arguments, convert.import_weights(weights, flatten(like), arguments), like


def of_reference(module, images, arguments, mask, train, dtype):
    """Outputs by our names."""
    module.to(getattr(torch, dtype)).train(train)
    mean, std = (np.asarray(arguments[name]) for name in ("mean", "std"))
    images = (images - mean) / std if mask is None else (images - mean) / std * mask[..., None]
    images = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(dtype))
    out = module(images, pixel_mask=None if mask is None else torch.from_numpy(mask).long())
    logits, boxes = module.predict_class_and_boxes(
        out.intermediate_hidden_states, out.intermediate_reference_points
    )
    outputs = {
        "logits": logits,
        "boxes_cxcywh_01": boxes,
        "encoder_logits": out.enc_outputs_class,
        "encoder_boxes_cxcywh_01": out.enc_outputs_coord_logits,
    }
    hidden = {f"decoder_{i}": x for i, x in enumerate(out.intermediate_hidden_states)}
    features = {"memory": out.backbone_features.permute(0, 2, 3, 1), **hidden}
    return outputs, {**features, "reference": out.init_reference_points}


def tree_of(flat, like, dtype):
    return {"params": unflatten(like, {path: jnp.asarray(x, dtype) for path, x in flat.items()})}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_intermediates_equal_the_references(name, tmp_path):
    backbone, rest, side, mask, train = CASES[name]
    module = reference_of(backbone, rest)
    _, arguments, flat, like = imported(module, tmp_path)
    images = sample_images(2, (side, side), 3, 1)
    for dtype, bar in BARS.items():
        with torch.no_grad():
            outputs, features = of_reference(module, images, arguments, mask, train, dtype)
        with jax.enable_x64(dtype == "float64"):
            model = build_model("rf_detr", **arguments, dtype=jnp.dtype(dtype))
            apply = jax.jit(partial(model.apply, train=train, return_features=True))
            ours, own = apply(tree_of(flat, like, dtype), jnp.asarray(images, dtype), mask)
            ours = {**ours, **own}
        best = np.asarray(ours["encoder_logits"]).max(-1)
        best = np.sort(best.reshape(2, -1, arguments["num_queries"]), axis=-1)
        assert np.diff(best).min() > 1e-5 * np.abs(best).max()
        theirs = {**outputs, **features}
        errors = {
            key: relative_error(np.asarray(ours[key]), x.numpy()) for key, x in theirs.items()
        }
        print(name, dtype, errors)
        assert max(errors.values()) <= bar, errors


def test_gradients_equal_the_references(tmp_path):
    """In float64, of all parameters, through all outputs of all groups in training."""
    module = reference_of({}, {}, seed=5)
    weights, arguments, flat, like = imported(module, tmp_path / "weights")
    images = sample_images(2, (32, 32), 3, 1)
    outputs, _ = of_reference(module, images, arguments, MASK, True, "float64")
    rng = np.random.default_rng(0)
    pulls = {name: rng.normal(size=tuple(x.shape)) for name, x in outputs.items()}
    sum((torch.from_numpy(pulls[name]) * x).sum() for name, x in outputs.items()).backward()
    for parameter in module.parameters():
        grad = parameter.grad
        parameter.data = torch.zeros_like(parameter.data) if grad is None else grad
    module.save_pretrained(tmp_path / "gradients")
    theirs = convert.read_weights(str(tmp_path / "gradients")).tensors
    with jax.enable_x64(True):
        model = build_model("rf_detr", **arguments, dtype=jnp.float64)

        def loss(variables):
            outputs = model.apply(variables, jnp.asarray(images), jnp.asarray(MASK), train=True)
            return sum((pulls[name] * x).sum() for name, x in outputs.items())

        gradients = jax.jit(jax.grad(loss))(tree_of(flat, like, "float64"))["params"]
    table = find_table(shapes_of(weights.tensors))
    arrays = {path: np.asarray(x) for path, x in flatten(gradients).items()}
    ours = export_tensors(arrays, table.rules(arguments))
    assert set(ours) == set(theirs)
    largest = max(float(np.abs(theirs[name]).max()) for name in theirs)
    for name, gradient in ours.items():
        scale = max(float(np.abs(theirs[name]).max()), 1e-3 * largest)
        assert np.abs(gradient - theirs[name]).max() / scale <= 1e-12, name


def test_deformable_attention_alone():
    """The sum of bilinear samples and its gradients, with places outside the map."""
    rng = np.random.default_rng(0)
    maps, weights = rng.normal(size=(2, 5, 7, 3, 4)), rng.normal(size=(2, 6, 3, 2))
    places, pull = rng.uniform(-0.5, 1.5, (2, 6, 3, 2, 2)), rng.normal(size=(2, 6, 12))
    given = [torch.tensor(x, requires_grad=True) for x in (maps, places, weights)]
    theirs = MultiScaleDeformableAttention()(
        given[0].reshape(2, 35, 3, 4),
        torch.tensor([[5, 7]]),
        [(5, 7)],
        torch.tensor([0]),
        given[1][:, :, :, None],
        given[2][:, :, :, None],
        64,
    )
    (theirs * torch.from_numpy(pull)).sum().backward()
    with jax.enable_x64(True):
        ours, back = jax.vjp(
            lambda *args: sample_weighted(*args).reshape(2, 6, 12),
            *map(jnp.asarray, (maps, places, weights)),
        )
        assert relative_error(np.asarray(ours), theirs.detach().numpy()) <= 1e-14
        for gradient, tensor in zip(back(jnp.asarray(pull)), given, strict=True):
            assert relative_error(np.asarray(gradient), tensor.grad.numpy()) <= 1e-13


@pytest.mark.parametrize("name", ["plain", "odd"])
def test_the_export_is_the_file_and_loads_strictly(name, tmp_path):
    backbone, rest, side, *_ = CASES[name]
    module = reference_of(backbone, rest)
    with torch.no_grad():
        module.model.backbone.backbone.embeddings.mask_token.zero_()
    weights, arguments, flat, _ = imported(module, tmp_path / "source")
    write_package(tmp_path / "back", flat, "rf_detr", arguments, to="transformers")
    again = convert.read_weights(str(tmp_path / "back"))
    assert set(again.tensors) == set(weights.tensors)
    for tensor, value in weights.tensors.items():
        np.testing.assert_array_equal(again.tensors[tensor], value)
    loaded, report = RfDetrForObjectDetection.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report.values()), report
    images = torch.from_numpy(sample_images(1, (side, side), 3, 1).transpose(0, 3, 1, 2)).float()
    module.model.backbone.backbone.embeddings.interpolate_pos_encoding = (
        loaded.model.backbone.backbone.embeddings.interpolate_pos_encoding
    )
    with torch.no_grad():
        ours, theirs = loaded.eval()(images), module(images)
    assert relative_error(ours.logits.numpy(), theirs.logits.numpy()) <= 1e-5
    assert relative_error(ours.pred_boxes.numpy(), theirs.pred_boxes.numpy()) <= 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_a_checkpoint_of_rfdetr_tells_its_variant(name):
    """By its names and shapes: there is no config.json."""
    model = RfDetr(num_classes=91, **VARIANTS[name])
    images = jnp.zeros((1, *model.image_size, 3))
    flat = flatten(jax.eval_shape(model.init, jax.random.key(0), images)["params"])
    zeros = {path: np.broadcast_to(np.float32(0), x.shape) for path, x in flat.items()}
    wanted = {**FAMILIES["rf_detr"].defaults, **VARIANTS[name], "num_classes": 91}
    tensors = export_tensors(zeros, TABLES[0].with_prefix("").rules(wanted))
    found = infer_arguments(find_table(shapes_of(tensors)), shapes_of(tensors), {})
    assert {**FAMILIES["rf_detr"].defaults, **found} == wanted


def test_a_pickle_of_rfdetr_and_its_relatives(tmp_path):
    module = reference_of({}, {})
    weights, *_ = imported(module, tmp_path)
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in weights.tensors.items()}
    tensors["_kp_active_mask"] = torch.zeros(0, dtype=torch.bool)

    def recognized(more):
        content = {"model": tensors | more, "args": argparse.Namespace(lr=1e-4, resolution=32)}
        torch.save(content, tmp_path / "checkpoint.pth")
        return convert.recognize(convert.read_weights(str(tmp_path / "checkpoint.pth"), **PICKLE))

    for more, message in (
        ({}, "width 24"),
        ({"segmentation_head.bias": torch.zeros(1)}, "for masks or keypoints"),
        ({"backbone.0.projector.stages.1.1.weight": torch.zeros(1)}, "several scales"),
    ):
        with pytest.raises(UserError, match=message):
            recognized(more)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"backbone_config": {"use_swiglu_ffn": True}}, "use_swiglu_ffn True"),
        ({"backbone_config": {"out_features": ["stage9"]}}, "'stage9' is none of 3 blocks'"),
    ],
)
def test_what_the_model_cannot_be_is_refused(change, message, tmp_path):
    weights, *_ = imported(reference_of({}, {}), tmp_path)
    shapes = shapes_of(weights.tensors)
    with pytest.raises(UserError, match=message):
        infer_arguments(find_table(shapes), shapes, {"config": change})
