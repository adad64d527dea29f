"""Our EoMT against transformers'."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vision_jax
from vision_jax import convert
from vision_jax.certify.measure import certify_reference, relative_error
from vision_jax.certify.random_weights import randomize, sample_images
from vision_jax.certify.references import make_reference
from vision_jax.config import default_config
from vision_jax.errors import UserError
from vision_jax.models.families import build_model
from vision_jax.run.description import describe
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


def test_a_published_folder_segments_windows_as_its_processor_does(tmp_path, rng):
    """Split, seen and put together again; where two classes are alike either is right."""
    small = {"num_hidden_layers": 2, "num_blocks": 1, "image_size": 32, "num_upscale_blocks": 1}
    reference = reference_of(num_queries=12, **small)
    module, folder = reference.module, tmp_path / "eomt"
    module.attn_mask_probs.zero_()
    size = {"shortest_edge": 32, "longest_edge": None}
    processor = transformers.EomtImageProcessorPil(do_split_image=True, size=size)
    photos = []
    for height, width in ((41, 100), (87, 40), (50, 50)):
        coarse = rng.integers(0, 256, (height // 9, width // 9, 3), np.uint8)
        photos.append(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))
    with torch.no_grad():  # queries of several classes
        queries = module(processor(photos, return_tensors="pt")["pixel_values"])
        mean = queries.class_queries_logits.mean((0, 1))
        module.class_predictor.bias -= mean
    reference.save(folder)
    processor.save_pretrained(folder)
    found = set()
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for index, image in enumerate(photos):
        inputs = processor(image, return_tensors="pt")
        with torch.no_grad():
            outputs = module(inputs["pixel_values"])
        outputs.patch_offsets = inputs["patch_offsets"]
        (theirs,) = processor.post_process_semantic_segmentation(
            outputs, [image.size[::-1]], return_segmentation_scores=True
        )
        best, second, _ = theirs.segmentation_scores.sort(0, descending=True).values
        sure = best - second > 1e-4 * best
        assert sure.float().mean() > 0.95
        found |= set(theirs.segmentation.unique().tolist())
        image.save(tmp_path / "images" / f"{index}.png")
        mask = torch.where(sure, theirs.segmentation, 255).numpy().astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{index}.png")
    assert len(found) > 1
    loaded = vision_jax.load(folder)
    assert (loaded.preprocessing.view, loaded.preprocessing.image_size) == ("windows", (32, 32))
    config = default_config("segmentation")
    config.model.weights = str(folder)
    described = describe(config, convert.read_weights(str(folder)), loaded.class_names)
    assert described.preprocessing == loaded.preprocessing
    (tmp_path / "classes.json").write_text(json.dumps(loaded.class_names))
    evaluation = vision_jax.evaluate(loaded, loaded.variables, tmp_path, batch_size=2)
    assert evaluation.summary["count"] == 3
    assert evaluation.summary["pixel_accuracy"] == 1
