"""Our SegFormer and its encoder against transformers'."""

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
from vision_jax.errors import UserError
from vision_jax.models.families import build_model
from vision_jax.ops.resize import resize_bilinear
from vision_jax.trees.paths import flatten, unflatten

SEGMENTER = "SegformerForSemanticSegmentation"
SMALL = {
    "depths": [1, 2, 1, 1],
    "hidden_sizes": [8, 16, 20, 32],
    "num_attention_heads": [1, 2, 5, 4],
    "decoder_hidden_size": 24,
    "num_labels": 7,
}
OTHER = {
    "num_encoder_blocks": 3,
    "depths": [1, 1, 1],
    "hidden_sizes": [8, 12, 16],
    "num_attention_heads": [2, 3, 2],
    "sr_ratios": [3, 1, 2],
    "patch_sizes": [5, 3, 3],
    "strides": [3, 2, 1],
    "mlp_ratios": [2, 1, 3],
    "decoder_hidden_size": 12,
    "num_channels": 2,
    "num_labels": 1,
}
REFERENCES = {
    "segformer": (SEGMENTER, SMALL, (125, 84)),
    "segformer of multiples": (SEGMENTER, {**SMALL, "depths": [1, 1, 1, 1]}, (64, 96)),
    "segformer of other sizes": (SEGMENTER, OTHER, (50, 71)),
    "encoder": ("SegformerForImageClassification", SMALL, (90, 61)),
    "bare encoder": ("SegformerModel", {**SMALL, "depths": [1, 1, 1, 1]}, (90, 61)),
}


def reference_of(name, seed=3):
    build, arguments, size = REFERENCES[name]
    reference = make_reference("transformers", build, arguments)
    randomize(reference.module, seed)
    randomize_statistics(reference, size, arguments.get("num_channels", 3), seed)
    return reference, size


@pytest.mark.parametrize("name", REFERENCES)
def test_everything_equals_the_reference_and_goes_back(name):
    reference, size = reference_of(name)
    certificate = certify_reference(reference, size, whole=True)
    print(name, certificate["worst"])
    assert certificate["pass"], (certificate["reasons"], certificate["errors"])
    assert certificate["family"] == ("mit" if "encoder" in name else "segformer")
    assert certificate["parameters_filled"] == certificate["parameters_in_model"]
    assert certificate["tensors_consumed"] == certificate["tensors"]
    stages = {f"stage_{i}" for i in range(len(certificate["arguments"]["depths"]))}
    fused = set() if "encoder" in name else {"fused"}
    assert set(certificate["errors"]["float64"]) == stages | fused | {"logits"}


def imported(origin):
    weights = convert.read_weights(str(origin))
    family, arguments = convert.recognize(weights)
    model = build_model(family, **arguments)
    images = jnp.zeros((1, 64, 64, arguments["in_channels"]))
    like = jax.eval_shape(model.init, jax.random.key(0), images)
    target = flatten(like["params"]) | flatten(like.get("batch_stats", {}))
    return family, arguments, convert.import_weights(weights, target, arguments), like


@pytest.mark.parametrize("name", ["segformer", "encoder", "bare encoder"])
def test_names_in_memory_are_read_as_the_files(name, tmp_path):
    reference, _ = reference_of(name)
    reference.save(tmp_path)
    lone = {key: value.numpy() for key, value in reference.module.state_dict().items()}
    write_safetensors(tmp_path / "memory.safetensors", lone)
    family, arguments, file, _ = imported(tmp_path)
    again, same, memory, _ = imported(tmp_path / "memory.safetensors")
    # Heads are in no tensor, and a lone file has no config.
    assert (again, same) == (family, {**arguments, "num_heads": (1, 2, 5, 8)})
    assert file.keys() == memory.keys()
    for path, array in file.items():
        np.testing.assert_array_equal(memory[path], array, err_msg=path)


def test_an_image_of_500_by_333_has_logits_of_125_by_84():
    model = build_model("segformer", num_classes=2, depths=(1,) * 4, widths=(8, 16, 20, 32))
    images = jax.ShapeDtypeStruct((1, 500, 333, 3), jnp.float32)
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert logits.shape == (1, 125, 84, 2)


def test_loss_and_gradients_are_the_references(tmp_path):
    """With BatchNorm on the batch's statistics, ignored pixels and the labels' own size."""
    reference, _ = reference_of("segformer")
    reference.save(tmp_path)
    _, arguments, flat, like = imported(tmp_path)
    size = (66, 49)
    images = sample_images(2, size, 3, 5)
    labels = np.random.default_rng(5).integers(0, 7, (2, *size))
    labels[:, :9] = 255
    mean, std = (np.asarray(arguments[name]) for name in ("mean", "std"))
    module = reference.module.double().train()
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout) or "DropPath" in type(part).__name__:
            part.eval()
    normalized = torch.from_numpy(((images - mean) / std).transpose(0, 3, 1, 2).copy())
    theirs = module(normalized, labels=torch.from_numpy(labels)).loss
    theirs.backward()
    with jax.enable_x64(True):
        model = build_model("segformer", **arguments, dtype=jnp.float64)
        wide = {
            path: jnp.asarray(x, jnp.int32 if path.endswith("count") else jnp.float64)
            for path, x in flat.items()
        }
        variables = {
            part: unflatten(tree, {path: wide[path] for path in flatten(tree)})
            for part, tree in like.items()
        }

        def loss(params):
            logits, changed = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            logits = jax.nn.log_softmax(resize_bilinear(logits, size))
            kept = labels != 255
            picked = jnp.take_along_axis(logits, np.where(kept, labels, 0)[..., None], -1)[..., 0]
            return -(picked * kept).sum() / kept.sum(), changed["batch_stats"]

        grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (ours, statistics), gradients = grad(variables["params"])
        gradients = {path: np.asarray(x) for path, x in flatten(gradients).items()}
    assert abs(float(ours) - theirs.item()) <= 1e-12 * theirs.item()
    own = dict(module.named_parameters())
    pairs = {
        "backbone/stage_0/patch_embed/kernel": "segformer.stages.0.patch_embeddings.proj.weight",
        "backbone/stage_1/block_1/attn/sr_conv/kernel":
            "segformer.stages.1.blocks.1.attention.sequence_reduction.sequence_reduction.weight",
        "backbone/stage_2/block_0/mlp/conv_dw/kernel":
            "segformer.stages.2.blocks.0.mlp.dwconv.dwconv.weight",
        "proj_3/kernel": "decode_head.linear_projections.3.proj.weight",
        "fuse_bn/scale": "decode_head.batch_norm.weight",
        "class_head/bias": "decode_head.classifier.bias",
    }  # fmt: skip
    for path, name in pairs.items():
        expected = own[name].grad.numpy()
        expected = expected.transpose(2, 3, 1, 0) if expected.ndim == 4 else expected.T
        assert relative_error(gradients[path], expected) <= 1e-10, path
    fused = own["decode_head.linear_fuse.weight"].grad.numpy()[:, :, 0, 0].T  # coarse to fine
    joined = np.concatenate([gradients[f"fuse_{i}/kernel"] for i in reversed(range(4))])
    assert relative_error(joined, fused) <= 1e-10
    running = module.decode_head.batch_norm.running_var.numpy()
    assert relative_error(np.asarray(statistics["fuse_bn"]["var"]), running) <= 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"reshape_last_stage": False}, "reshape_last_stage False is not supported"),
        ({"sr_ratios": [4, 4, 2, 1]}, r"sr_ratios \[4, 4, 2, 1\], and the tensors"),
    ],
)
def test_a_config_that_computes_otherwise_is_refused(change, message, tmp_path):
    reference_of("segformer")[0].save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        convert.recognize(convert.read_weights(str(tmp_path)))


def test_what_the_published_configs_say_beside_is_known(tmp_path):
    reference_of("segformer")[0].save(tmp_path)
    more = {"downsampling_rates": [1, 4, 8, 16], "image_size": 224, "torch_dtype": "float32"}
    config = json.loads((tmp_path / "config.json").read_text()) | more
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert convert.unknown_fields(convert.read_weights(str(tmp_path))) == ()


def test_bilinear_is_torchs():
    x = torch.from_numpy(sample_images(2, (13, 21), 5, 0)).permute(0, 3, 1, 2)
    for size in ((26, 63), (40, 30), (13, 9), (5, 42)):
        theirs = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
        with jax.enable_x64(True):
            ours = resize_bilinear(jnp.asarray(x.permute(0, 2, 3, 1).numpy()), size)
        assert relative_error(np.asarray(ours), theirs.numpy()) <= 1e-14, size


def test_every_published_name_builds_its_reference():
    from vision_jax.convert.segformer import ZOO

    for entry in ZOO:
        with torch.device("meta"):
            config = transformers.SegformerConfig(**dict(entry.arguments))
            module = transformers.SegformerForSemanticSegmentation(config)
        shapes = {name: tuple(x.shape) for name, x in module.state_dict().items()}
        table = convert.tables.find_table(shapes)
        found = convert.tables.infer_arguments(table, shapes, {})
        size = entry.name.rpartition("-")[2]
        variant = convert.segformer.DECODERS[f"segformer_{size}"]
        assert {name: found[name] for name in variant} == variant


def test_images_too_small_for_a_window_are_refused():
    model = build_model("mit", num_classes=2, depths=(1,) * 4, widths=(8, 16, 20, 32))
    with pytest.raises(UserError, match="a map of 7 x 8 cells has no window of 8 for keys"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 32, 3)))
