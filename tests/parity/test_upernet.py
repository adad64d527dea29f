"""Our UPerNet against transformers', on each backbone that it has there, and on others as files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from vision_jax import convert
from vision_jax.certify.measure import certify_reference, relative_error
from vision_jax.certify.random_weights import randomize, randomize_statistics, sample_images
from vision_jax.certify.references import make_reference
from vision_jax.convert.load import write_safetensors
from vision_jax.convert.tables import table_for_export
from vision_jax.errors import UserError
from vision_jax.models.families import build_model, initialize
from vision_jax.ops.resize import resize_bilinear
from vision_jax.trees.paths import flatten, unflatten

STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
CONVNEXT = {"hidden_sizes": [16, 16, 24, 24], "depths": [1, 1, 2, 1]}
BACKBONES = {
    # Windows that a map of 500 x 333 does not fill, and that hold all of the last ones.
    "swin": {"embed_dim": 8, "depths": [1, 2, 2, 2], "num_heads": [1, 2, 2, 4], "window_size": 20},
    "convnext": CONVNEXT,
    "convnextv2": CONVNEXT,
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1]},
}


def reference_of(kind, size=(70, 97), **more):
    inner = {"model_type": kind, **BACKBONES[kind], **STAGES}
    given = {"hidden_size": 8, "auxiliary_channels": 6, "num_labels": 5, **more}
    given["backbone_config"] = {**inner, **more.get("backbone_config", {})}
    reference = make_reference("transformers", "UperNetForSemanticSegmentation", given)
    randomize(reference.module, 3)
    randomize_statistics(reference, size, 3, 3)
    return reference


@pytest.mark.long(but=("resnet",))
@pytest.mark.parametrize("kind", BACKBONES)
def test_everything_equals_the_reference_and_goes_back(kind):
    size = (70, 97) if kind == "resnet" else (500, 333)
    more = {"auxiliary_num_convs": 2, "pool_scales": [1, 4]} if kind == "resnet" else {}
    certificate = certify_reference(reference_of(kind, size, **more), size, whole=True)
    print(certificate["worst"])
    assert certificate["pass"], (certificate["reasons"], certificate["errors"])
    assert certificate["family"] == "upernet"
    assert certificate["parameters_filled"] == certificate["parameters_in_model"]
    norms = ["backbone.swin.layernorm.bias", "backbone.swin.layernorm.weight"]
    assert certificate["tensors_dropped"] == (norms if kind == "swin" else [])
    first = {"swin": "embed"}.get(kind, "stem")
    named = {first, *(f"stage_{i}" for i in range(4)), "pooled_context", "fused"}
    heads = {"logits", "auxiliary_logits"}
    assert set(certificate["errors"]["float64"]) == named | heads


def imported(folder):
    """(arguments, parameters by path, shapes of the model's variables) of a folder's file."""
    weights = convert.read_weights(str(folder))
    family, arguments = convert.recognize(weights)
    assert family == "upernet"
    model = build_model(family, **arguments)
    like = jax.eval_shape(lambda key: initialize(model, key, (64, 64)), jax.random.key(0))
    target = {path: leaf for tree in like.values() for path, leaf in flatten(tree).items()}
    return arguments, convert.import_weights(weights, target, arguments), like


def test_loss_and_every_gradient_are_the_references(tmp_path):
    """With BatchNorm on the batch's statistics, ignored pixels and the auxiliary head."""
    reference, size = reference_of("convnext"), (70, 97)
    reference.save(tmp_path)
    arguments, flat, like = imported(tmp_path)
    images = sample_images(2, size, 3, 5)
    labels = np.random.default_rng(5).integers(0, 5, (2, *size))
    labels[:, :9] = 255
    mean, std = (np.asarray(arguments[name]) for name in ("mean", "std"))
    module = reference.module.double().train()
    normalized = torch.from_numpy(((images - mean) / std).transpose(0, 3, 1, 2).copy())
    said = module(normalized, labels=torch.from_numpy(labels))
    said.loss.backward()
    with jax.enable_x64(True):
        model = build_model("upernet", **arguments, dtype=jnp.float64)
        wide = {
            path: jnp.asarray(x, jnp.int32 if path.endswith("count") else jnp.float64)
            for path, x in flat.items()
        }
        variables = {
            part: unflatten(tree, {path: wide[path] for path in flatten(tree)})
            for part, tree in like.items()
        }

        def loss(params):
            outputs, changed = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            kept, total = labels != 255, 0.0
            for name, weight in (("logits", 1.0), ("auxiliary_logits", 0.4)):
                logits = jax.nn.log_softmax(resize_bilinear(outputs[name], size))
                index = np.where(kept, labels, 0)[..., None]
                picked = jnp.take_along_axis(logits, index, -1)[..., 0]
                total = total - weight * (picked * kept).sum() / kept.sum()
            return total, (changed["batch_stats"], outputs["logits"])

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (ours, (statistics, logits)), gradients = step(variables["params"])
        logits = np.asarray(resize_bilinear(logits, size)).transpose(0, 3, 1, 2)
    assert relative_error(logits, said.logits.detach().numpy()) <= 1e-12
    assert abs(float(ours) - said.loss.item()) <= 1e-12 * said.loss.item()
    found = {path: np.asarray(x) for path, x in flatten({**gradients}).items()}
    found |= {path: np.asarray(x) for path, x in flatten(statistics).items()}
    tensors, _ = convert.export_weights(found, "upernet", arguments, to="transformers")
    expected = {name: x.grad.numpy() for name, x in module.named_parameters()}
    # What BatchNorm takes away again has a gradient of rounding alone.
    least = 1e-4 * max(np.abs(x).max() for x in expected.values())
    for name, x in expected.items():
        apart = np.abs(tensors.pop(name) - x).max()
        assert apart <= 1e-10 * max(np.abs(x).max(), least), name
    for name, buffer in module.named_buffers():
        assert relative_error(tensors.pop(name), buffer.numpy()) <= 1e-12, name
    assert not tensors


def test_a_swin_in_memory_is_the_one_in_its_file(tmp_path):
    reference = reference_of("swin")
    reference.save(tmp_path)
    _, file, _ = imported(tmp_path)
    (tmp_path / "memory").mkdir()
    tensors = {name: value.numpy() for name, value in reference.module.state_dict().items()}
    write_safetensors(tmp_path / "memory/model.safetensors", tensors)
    (tmp_path / "memory/config.json").write_text((tmp_path / "config.json").read_text())
    _, memory, _ = imported(tmp_path / "memory")
    assert file.keys() == memory.keys()
    for path, array in file.items():
        np.testing.assert_array_equal(memory[path], array, err_msg=path)


OTHERS = {
    "mit": (("depths", (1, 1)), ("num_heads", (1, 2)), ("reductions", (2, 1)), ("widths", (4, 8))),
    "regnet": (("depths", (1, 1)), ("group_widths", (4, 4)), ("stem_width", 4), ("widths", (4, 8))),
    "efficientnet": (
        *(("depths", (1, 1)), ("expansions", (1, 2)), ("head_width", 8), ("kernels", (3, 3))),
        *(("stem_width", 4), ("strides", (2, 2)), ("widths", (4, 8))),
    ),
    "convnext": (("depths", (1, 1)), ("kernel_size", 3), ("widths", (4, 8))),
    "swin": (
        *(("depths", (1, 1)), ("image_size", (32, 32)), ("num_heads", (1, 2))),
        *(("width", 4), ("windows", ((4, 4), (2, 2)))),
    ),
}


@pytest.mark.parametrize("encoder", OTHERS)
def test_files_of_other_backbones_are_ours_alone(rng, encoder, tmp_path):
    arguments = {"num_classes": 3, "encoder": encoder, "encoder_arguments": OTHERS[encoder],
                 "width": 8}  # fmt: skip
    model = build_model("upernet", **arguments)
    like = jax.eval_shape(lambda key: initialize(model, key, (64, 64)), jax.random.key(0))
    flat = {
        path: np.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        for tree in like.values()
        for path, leaf in flatten(tree).items()
    }
    whole = convert.arguments_of(model)
    with pytest.raises(UserError, match="transformers has no upernet that is such a model"):
        table_for_export("transformers", "upernet", whole)
    path = tmp_path / "run.safetensors"
    write_safetensors(path, *convert.export_weights(flat, "upernet", whole, to="transformers"))
    found, again, _ = imported(path)
    assert {name: found[name] for name in arguments} == arguments
    for name, array in flat.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auxiliary_concat_input": True}, "auxiliary_concat_input True is not supported"),
        ({"hidden_size": 16}, "hidden_size 16, and the tensors are of 8"),
        ({"pool_scales": [1, 2]}, r"pool_scales \[1, 2\], and the tensors are of 4"),
        ({"backbone_config": {"model_type": "swinv2"}}, "model_type 'swinv2' is none of resnet"),
        ({"backbone_config": {"hidden_act": "gelu"}}, "hidden_act 'gelu' is not supported"),
    ],
)
def test_a_config_that_computes_otherwise_is_refused(change, message, tmp_path):
    reference_of("resnet").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        convert.recognize(convert.read_weights(str(tmp_path)))


def test_fewer_maps_than_stages_and_other_backbones_are_refused(tmp_path):
    fewer = {"backbone_config": {"out_features": ["stage2", "stage3", "stage4"]}}
    inner = transformers.Swinv2Config(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, **STAGES
    )
    config = transformers.UperNetConfig(backbone_config=inner, hidden_size=8)
    for name, module, message in (
        ("fewer", reference_of("resnet", **fewer).module, "on 3 maps of a resnet with 4 stages"),
        ("other", transformers.UperNetForSemanticSegmentation(config), "is no Swin, ConvNeXt or"),
    ):
        module.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=message):
            convert.recognize(convert.read_weights(str(tmp_path / name)))


def test_every_published_name_builds_its_reference():
    from vision_jax.convert.upernet import ZOO

    for entry in ZOO:
        with torch.device("meta"):
            reference = make_reference(entry.source, entry.build, dict(entry.arguments))
        assert len(reference.module.decode_head.lateral_convs) == 3, entry.name
