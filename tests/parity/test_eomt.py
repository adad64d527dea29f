"""Our EoMT against transformers'."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from vision_jax import convert
from vision_jax.certify.measure import certify_reference, relative_error
from vision_jax.certify.random_weights import randomize, sample_images
from vision_jax.certify.references import make_reference
from vision_jax.errors import UserError
from vision_jax.models.families import build_model
from vision_jax.trees.paths import flatten, unflatten

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 8,
    "mlp_ratio": 2,
    "num_blocks": 2,
    "num_queries": 5,
    "num_register_tokens": 2,
    "num_labels": 3,
}


def reference_of(seed=3, **changes):
    build = "EomtForUniversalSegmentation"
    reference = make_reference("transformers", build, SMALL | changes)
    randomize(reference.module, seed)
    return reference


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_upscale_blocks": 1, "num_blocks": 1, "patch_size": 16, "num_channels": 2}],
    ids=["as published", "other sizes"],
)
def test_everything_equals_the_reference_and_goes_back(changes):
    certificate = certify_reference(reference_of(**changes), (48, 48), whole=True)
    print(certificate["worst"])
    assert certificate["pass"], (certificate["reasons"], certificate["errors"])
    assert certificate["family"] == "eomt"
    # The count of updates is in no file.
    assert certificate["parameters_filled"] == certificate["parameters_in_model"]
    assert certificate["tensors_consumed"] == certificate["tensors"]
    blocks = {f"block_{index}" for index in range(4)}
    wanted = {"embed", "normed", "logits", "mask_logits"} | blocks
    assert set(certificate["errors"]["float64"]) == wanted


def imported(reference, folder, **changes):
    reference.save(folder)
    weights = convert.read_weights(str(folder))
    family, arguments = convert.recognize(weights)
    model = build_model(family, **arguments, **changes)
    size = (1, *arguments["image_size"], arguments["in_channels"])
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(size))
    target = flatten(like["params"]) | flatten(like["batch_stats"])
    flat = convert.import_weights(weights, target, arguments)
    wide = {
        path: jnp.asarray(x, x.dtype if path.endswith("count") else changes.get("dtype"))
        for path, x in flat.items()
    }
    return model, {
        part: unflatten(tree, {path: wide[path] for path in flatten(tree)})
        for part, tree in like.items()
    }


@pytest.mark.parametrize("shares", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_masked_attention_at_inference(shares, tmp_path):
    """A block whose share is 0 goes on with the mask of the one before."""
    reference = reference_of()
    images = sample_images(2, (48, 48), 3, 1)
    plain = reference.outputs(((images - 0.5) / 0.5).astype(np.float64))
    reference.module.attn_mask_probs.copy_(torch.tensor(shares))
    with jax.enable_x64(True):
        model, variables = imported(reference, tmp_path, dtype=jnp.float64)
        np.testing.assert_array_equal(variables["batch_stats"]["mask_probs"], shares)
        mean, std = (np.asarray(x) for x in (model.mean, model.std))
        theirs = reference.outputs((images - mean) / std)
        ours = jax.jit(model.apply)(variables, images)
        assert relative_error(np.asarray(ours["logits"][-1]), theirs["logits"]) <= 1e-12
        assert relative_error(np.asarray(ours["mask_logits"][-1]), theirs["mask_logits"]) <= 1e-12
    assert relative_error(plain["mask_logits"], theirs["mask_logits"]) > 1e-3


def test_every_prediction_of_training(tmp_path):
    reference = reference_of()
    reference.module.attn_mask_probs.fill_(1)
    with jax.enable_x64(True):
        model, variables = imported(reference, tmp_path, dtype=jnp.float64)
        images = sample_images(2, (48, 48), 3, 1)
        mean, std = (np.asarray(x) for x in (model.mean, model.std))
        module = reference.module.double().train()
        said = []
        predict = module.predict
        module.predict = lambda tokens: said.append(predict(tokens)) or said[-1]
        normalized = torch.from_numpy(((images - mean) / std).transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            module(normalized)
        ours = jax.jit(lambda v, x: model.apply(v, x, train=True))(variables, images)
        assert len(ours["logits"]) == len(said) == 3
        for layer, (masks, classes) in enumerate(said):
            found = {name: np.asarray(x[layer]) for name, x in ours.items()}
            assert relative_error(found["logits"], classes.numpy()) <= 1e-12
            assert relative_error(found["mask_logits"], masks.numpy()) <= 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"num_queries": 7}, "num_queries 7, and the tensors are of 5"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn True is not supported"),
    ],
)
def test_a_config_that_computes_otherwise_is_refused(change, message, tmp_path):
    reference_of().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        convert.recognize(convert.read_weights(str(tmp_path)))


def test_the_published_size_has_transformers_parameters():
    with torch.device("meta"):
        config = transformers.EomtConfig(num_labels=133)
        module = transformers.EomtForUniversalSegmentation(config)
    model = build_model("eomt", num_classes=133, **_sizes("eomt_large_640"))
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 640, 640, 3)))
    count = sum(leaf.size for leaf in jax.tree.leaves(like["params"]))
    assert count == sum(parameter.numel() for parameter in module.parameters())


def _sizes(name):
    from vision_jax.models.eomt import VARIANTS

    return VARIANTS[name]
