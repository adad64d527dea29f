"""Runs of the segmenters beside U-Net: SegFormer, DeepLabV3 and UPerNet with second heads, EoMT."""

import json

import jax
import numpy as np
import pytest
import runs
from segmentation_runs import CLASSES, tiny_config

import vision_jax
from vision_jax import convert, train
from vision_jax.commands.convert import main as convert_main
from vision_jax.logging import read_metrics
from vision_jax.models import families
from vision_jax.run.restore import restore
from vision_jax.trees import paths

MIT = {
    "depths": (1, 1), "widths": (8, 12), "num_heads": (1, 2), "reductions": (2, 1),
    "patch_sizes": (7, 3), "strides": (4, 2), "mlp_ratios": (2, 2),
}  # fmt: skip
VIT = {"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_width": 16}
SWIN = {
    "depths": (1, 2, 1), "image_size": (32, 32), "num_heads": (1, 2, 2), "width": 8,
    "windows": ((4, 4), (4, 4), (2, 2)),
}  # fmt: skip
EOMT = {**VIT, "num_queries": 5, "num_blocks": 1, "upscale_blocks": 1}
MODELS = {
    "segformer": {**MIT, "decoder_width": 8},
    "deeplab": {
        "depths": (1, 1, 1), "widths": (2, 4, 8), "stem_width": 4, "rates": (1, 2), "width": 8,
        "auxiliary_head": True,
    },
    "eomt": {**EOMT, "mask_annealing": ((0, 4),)},
    "upernet": {
        "encoder": "swin", "width": 8, "pool_sizes": (1, 2), "map_norm_eps": 1e-5,
        "encoder_arguments": tuple(SWIN.items()), "auxiliary_head": True, "auxiliary_width": 4,
    },
}  # fmt: skip
TERMS = {
    "segformer": {"pixel_loss": 1.0, "dice_loss": 1.0},
    "deeplab": {"pixel_loss": 1.0, "dice_loss": 1.0, "auxiliary_loss": 0.4},
    "upernet": {"pixel_loss": 1.0, "dice_loss": 1.0, "auxiliary_loss": 0.4},
    "eomt": {"class_loss": 2.0, "mask_loss": 5.0, "mask_dice_loss": 5.0, "deep_loss": 1.0},
}


def config_of(family, **more):
    arguments = tuple(MODELS[family].items())
    more = {"loss__points": 64} | more if family == "eomt" else more
    return tiny_config(
        model__variant=family, model__arguments=arguments, model__image_size=32, **more
    )


@pytest.mark.long
@pytest.mark.parametrize("family", MODELS)
def test_a_run_trains_evaluates_and_its_file_is_read(family, tmp_path):
    config = config_of(family, total_steps=3, evaluate__every=3, loss__dice_weight=1.0)
    assert train.run(config, tmp_path / "run") == 0
    records = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "train/loss" in r]
    for record in records:
        parts = sum(record[f"train/{name}"] * w for name, w in TERMS[family].items())
        np.testing.assert_allclose(record["train/loss"], parts, rtol=1e-4)
    summary = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert list(summary["per_class"]) == list(CLASSES)
    assert 0 < summary["pixel_accuracy"] <= 1
    found = convert.read_weights(str(tmp_path / "run/model.safetensors"))
    assert convert.recognize(found)[0] == family
    assert tuple(found.preprocessing["image_size"]) == (32, 32)
    loaded = vision_jax.load(str(tmp_path / "run/model.safetensors"))
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    outputs = jax.jit(loaded.apply)(loaded.variables, loaded.preprocess(image))
    label = loaded.postprocess(outputs, [(40, 50)])["label"][0]
    assert label.shape == (40, 50)
    assert label.max() < len(CLASSES)
    if family == "eomt":
        state = restore(config, tmp_path / "run", "last").state.model_state
        assert int(state["mask_count"]) == 3
        np.testing.assert_allclose(state["mask_probs"], [0.5**0.9], rtol=1e-6)  # of the third
        assert convert_main([str(tmp_path / "run"), f"--out={tmp_path / 'hf'}", "--to=timm"]) == 2


@pytest.mark.long
def test_a_step_of_eomt_on_one_and_on_eight_devices():
    """The points are an image's own, wherever it is."""
    losses = []
    for devices in (1, 8):
        config = config_of("eomt")
        prepared = runs.Prepared(devices=devices, fsdp=devices, config=config)
        _, metrics = prepared.step(prepared.state, prepared.frozen, prepared.batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.long(but=("eomt",))
@pytest.mark.parametrize(
    ("family", "inside", "arguments", "prefix"),
    [
        ("segformer", "mit", MIT, "backbone/"),
        ("deeplab", "resnet", {k: MODELS["deeplab"][k] for k in ("depths", "widths", "stem_width")},
         "backbone/"),
        ("upernet", "swin", SWIN, "backbone/"),
        ("eomt", "vit", {**VIT, "image_size": (32, 32), "num_registers": 1}, ""),
    ],
    ids=["segformer", "deeplab", "upernet", "eomt"],
)  # fmt: skip
def test_a_classifier_is_its_backbone(rng, family, inside, arguments, prefix, tmp_path):
    model = families.build_model(inside, num_classes=2, **arguments)
    like = jax.eval_shape(lambda key: families.initialize(model, key, (32, 32)), jax.random.key(0))
    flat = {
        path: np.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        for tree in like.values()
        for path, leaf in paths.flatten(tree).items()
    }
    to = "transformers" if inside == "mit" else "timm"
    tensors, header = convert.export_weights(
        flat, inside, convert.arguments_of(model), to=to, preprocessing={"image_size": (32, 32)}
    )
    file = tmp_path / "classifier.safetensors"
    convert.write_safetensors(file, tensors, header)
    given = MODELS[family]
    if prefix and "encoder" not in given:
        given = given | arguments
    if not prefix:
        given = {k: v for k, v in given.items() if k not in arguments}
    prepared = runs.Prepared(
        config=tiny_config(
            model__variant=family,
            model__arguments=tuple(given.items()),
            model__weights=file,
            model__image_size=32,
        )
    )
    state = prepared.state
    found = state.trainable | prepared.frozen | paths.flatten(state.model_state)
    beyond = ("head/", "norm/") if inside == "swin" else "head/"  # of its maps
    kept = {path for path in flat if not path.startswith(beyond)}
    for path in kept:
        np.testing.assert_array_equal(found[prefix + path], flat[path], err_msg=path)
    assert set(found) > {prefix + path for path in kept}
