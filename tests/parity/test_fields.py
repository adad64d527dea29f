"""Every field of a transformers config: used, of no effect, or named in an error.

Each field of each class is set to another valid value. Where transformers takes it beside the same
tensors, our logits agree with its, or the line names it; else the tensors themselves show it.
"""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from vision_jax import convert
from vision_jax.certify.measure import relative_error
from vision_jax.certify.random_weights import randomize, sample_images
from vision_jax.certify.references import Reference, make_reference
from vision_jax.convert.fields import Fields
from vision_jax.convert.load import table_of
from vision_jax.errors import UserError
from vision_jax.models.families import build_model
from vision_jax.trees import paths

VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 16, "patch_size": 8, "num_labels": 3,
}  # fmt: skip
DINO = {name: value for name, value in VIT.items() if name != "intermediate_size"}
TOWER = {name: value for name, value in VIT.items() if name != "num_labels"}
STAGES = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_labels": 3}
SWIN = {
    "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32,
    "patch_size": 4, "num_labels": 3,
}  # fmt: skip
SEGFORMER = STAGES | {"num_attention_heads": [1, 2, 2, 2]}
DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 5,
    "num_labels": 3,
}  # fmt: skip
RESNET = {"model_type": "resnet", "embedding_size": 8, **STAGES, "out_features": ["stage4"]}
RESNET["hidden_sizes"] = [16, 16, 32, 32]
RF_BACKBONE = {
    "model_type": "rf_detr_dinov2", "hidden_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 2, "image_size": 64, "patch_size": 8, "num_windows": 2,
    "out_features": ["stage1", "stage2", "stage4"],
}  # fmt: skip
RF = {
    "backbone_config": RF_BACKBONE, "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48,
    "decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4, "decoder_n_points": 2,
    "num_queries": 5, "group_detr": 2, "num_labels": 3,
}  # fmt: skip
CLASSES = {
    "ViTForImageClassification": VIT,
    "ViTMAEModel": TOWER | {"mask_ratio": 0.0},
    "DeiTForImageClassification": VIT,
    "DeiTForImageClassificationWithTeacher": VIT,
    "Dinov2ForImageClassification": DINO,
    "Dinov2WithRegistersForImageClassification": DINO,
    "CLIPVisionModel": TOWER,
    "CLIPVisionModelWithProjection": TOWER | {"projection_dim": 8},
    "CLIPModel": {"vision_config": TOWER, "text_config": {"num_hidden_layers": 1}},
    "SiglipVisionModel": TOWER,
    "SiglipForImageClassification": {"vision_config": TOWER, "num_labels": 3},
    "BeitForImageClassification": VIT | {"use_relative_position_bias": True},
    "Data2VecVisionForImageClassification": VIT | {"use_shared_relative_position_bias": True},
    "SwinForImageClassification": SWIN,
    "Swinv2ForImageClassification": SWIN,
    "ConvNextForImageClassification": STAGES,
    "ConvNextV2ForImageClassification": STAGES,
    "RegNetForImageClassification": STAGES | {"embedding_size": 8, "groups_width": 8},
    "ResNetForImageClassification": STAGES | {"embedding_size": 8},
    "SegformerForImageClassification": SEGFORMER,
    "SegformerForSemanticSegmentation": SEGFORMER | {"decoder_hidden_size": 16},
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.35, "num_labels": 3},
    "DetrForObjectDetection": DETR | {"backbone_config": RESNET},
    "RfDetrForObjectDetection": RF,
}
OTHER = {  # valid values that the type of the old one does not tell
    "image_size": (32, 64), "patch_size": (4, 8), "hidden_act": ("relu",),
    "activation_function": ("gelu",), "decoder_activation_function": ("gelu",),
    "position_embedding_type": ("learned",), "out_features": (["stage1"], ["stage3"]),
    "out_indices": ([1], [3]), "num_attention_heads": (4,), "window_size": (2, 8),
    "num_heads": ([4, 4],), "pretrained_window_sizes": ([2, 2],), "layer_norm_eps": (0.1,),
    "output_stride": (16, 8), "window_block_indexes": ([0], [0, 1, 2]), "num_windows": (1,),
    "decoder_n_points": (4,), "decoder_self_attention_heads": (2,), "num_channels": (1,),
    "groups_width": (4,), "hidden_sizes": ([8, 16, 16, 32],), "depth_divisible_by": (4,),
    "pooler_act": ("relu",), "segmentation_head_activation_function": ("relu",),
}  # fmt: skip
LEFT_ALONE = {  # by name or by what they are: labels, and what says which class it is
    *("architectures", "model_type", "id2label", "label2id", "transformers_version", "dtype"),
    *("_name_or_path", "stage_names", "text_config", "backbone", "problem_type", "return_dict"),
    *("output_attentions", "output_hidden_states", "is_encoder_decoder"),
    "mask_ratio",  # of MAE's pretraining, which hides patches at random: here it is an encoder
}


def other_values(name, value):
    if name in OTHER:
        return [other for other in OTHER[name] if other != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value or 1]
    if isinstance(value, float):
        return [value / 2 or 0.25]
    return []


def reference_logits(reference, images):
    if isinstance(reference.module, transformers.CLIPModel):
        output = reference.module.vision_model(
            torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        )
        with torch.no_grad():
            return reference.module.visual_projection(output.pooler_output).detach().numpy()
    found = reference.outputs(images)
    if found["logits"].ndim == 4:  # of pixels
        return found["logits"].transpose(0, 2, 3, 1)
    return np.concatenate([found[k].ravel() for k in ("logits", "boxes_cxcywh_01") if k in found])


class Ours:
    """Logits of what vision_jax makes of a folder; equal arguments are computed once."""

    def __init__(self):
        self.known = []

    def __call__(self, folder, images):
        weights = convert.read_weights(str(folder))
        family, arguments = convert.recognize(weights)
        channels = arguments["in_channels"]
        arguments |= {"mean": (0.0,) * channels, "std": (1.0,) * channels}
        if family == "detr":
            arguments["mask_padding"] = False
        asked = (family, arguments, images.shape)
        for seen, logits in self.known:
            if seen == asked:
                return logits
        model = build_model(family, **arguments)
        like = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(images))
        target = {p: x for tree in like.values() for p, x in paths.flatten(tree).items()}
        flat = convert.import_weights(weights, target, arguments)
        variables = {
            kind: paths.unflatten(tree, {p: flat[p] for p in paths.flatten(tree)})
            for kind, tree in like.items()
        }
        found = jax.jit(model.apply)(variables, jnp.asarray(images))
        if family in ("detr", "rf_detr"):
            found = jnp.concatenate([found[k][-1].ravel() for k in ("logits", "boxes_cxcywh_01")])
        elif isinstance(found, tuple):  # a distilled model's two
            found = sum(found) / 2
        logits = np.asarray(found).ravel()
        self.known.append((asked, logits))
        return logits


def images_of(config, side):
    inner = config.get("vision_config") or config.get("backbone_config") or {}
    given = inner.get("image_size", config.get("image_size", side))
    size = given if given in (16, 32, 64) else side
    channels = inner.get("num_channels", config.get("num_channels", 3))
    return sample_images(2, (size, size), channels, seed=0)


def parts(fields, config, within=()):
    """(path of names) of every field, those of objects inside too."""
    for name, value in config.items():
        inner = fields.inner.get(name)
        if isinstance(value, dict) and inner is not None:
            yield from parts(inner, value, (*within, name))
        elif name not in LEFT_ALONE:
            yield (*within, name), value


@pytest.mark.parametrize("build", CLASSES)
def test_every_field_is_used_harmless_or_named(build, tmp_path):
    side = 64 if "Detr" in build else 32
    reference = make_reference("transformers", build, CLASSES[build])
    randomize(reference.module, 0)
    folder = tmp_path / "same"
    reference.save(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    table = table_of(convert.read_weights(str(folder)))
    ours = Ours()
    images = images_of(config, side)
    expected = reference_logits(reference, images).ravel()
    assert relative_error(ours(folder, images), expected) < 2e-5

    model_class = type(reference.module)
    missed, agreed, refused, lines = [], [], [], []
    # The class's own fields, those that its file leaves out too.
    full = json.loads(reference.module.config.to_json_string(use_diff=False))
    for names, value in parts(table.fields, full | config):
        assert names[-1] in owner(table.fields, names).known, names
        for other in other_values(names[-1], value):
            changed = with_value(config, names, other)
            path.write_text(json.dumps(changed))
            images = images_of(changed, side)
            try:
                module, report = model_class.from_pretrained(folder, output_loading_info=True)
                if any(report.values()):
                    continue
                theirs = Reference("transformers", module.eval(), build, {})
                expected = reference_logits(theirs, images).ravel()
            except Exception:  # no such model of transformers either
                continue
            try:
                found = ours(folder, images)
            except UserError as error:
                lines.append(str(error))
                refused.append(names[-1])
                continue
            good = found.shape == expected.shape and relative_error(found, expected) < 2e-4
            (agreed if good else missed).append((".".join(names), other))
    path.write_text(json.dumps(config))
    assert not missed, missed
    assert not any("\n" in line for line in lines)
    assert agreed
    if build == "DetrForObjectDetection":
        assert "auxiliary_loss" in refused


def owner(fields: Fields, names):
    for name in names[:-1]:
        fields = fields.inner[name]
    return fields


def with_value(config, names, value):
    changed = copy.deepcopy(config)
    inside = changed
    for name in names[:-1]:
        inside = inside.setdefault(name, {})
    inside[names[-1]] = value
    return changed
