"""Weights of some classes under data of others: every architecture, through its config file."""

import json
import shlex

import detection_runs
import jax
import numpy as np
import pytest
import runs
from jax.sharding import Mesh
from PIL import Image

from vision_jax import convert, train
from vision_jax.commands import evaluate, predict
from vision_jax.commands.convert import main as convert_main
from vision_jax.config import load_config
from vision_jax.errors import UserError
from vision_jax.models import families
from vision_jax.run.description import build_model, describe, load_description, read_weights
from vision_jax.run.parameters import head_warnings, headless_parameters
from vision_jax.run.prepare import prepare
from vision_jax.trees import paths

SQUARE = {"image_size": (16, 16), "patch_size": 8, "width": 16, "depth": 1, "num_heads": 2,
          "mlp_width": 24}  # fmt: skip
NAMES = ("ant", "bee")
OWN = ("a", "b", "c", "d", "e")
PLAIN = ("head",)
MODELS = {  # what a file may be of: family, arguments, modules that are made for its classes
    "ViT": ("vit", SQUARE, PLAIN),
    "AugReg": ("vit", {**SQUARE, "class_token": False, "position_prefix": 0, "pool": "map"}, PLAIN),
    "CLIP's projection": ("vit", {**SQUARE, "pre_norm": True, "head_bias": False}, PLAIN),
    "DeiT, distilled": (
        "vit",
        {**SQUARE, "distillation_token": True, "position_prefix": 2},
        ("head", "head_dist"),
    ),
    "BEiT": ("beit", SQUARE, PLAIN),
    "ConvNeXt": ("convnext", {"depths": (1, 1), "widths": (8, 12)}, PLAIN),
    "ConvNeXt, hidden layer": (
        "convnext",
        {"depths": (1, 1), "widths": (8, 12), "head_hidden": 5},
        PLAIN,
    ),
    "ResNet": ("resnet", {"depths": (1, 1), "widths": (8, 16), "stem_width": 8}, PLAIN),
    "RegNet": (
        "regnet",
        {"depths": (1, 1), "widths": (8, 24), "group_widths": (8, 12), "stem_width": 8},
        PLAIN,
    ),
    "EfficientNet": (
        "efficientnet",
        {"depths": (1, 1), "widths": (8, 12), "kernels": (3, 3), "expansions": (1.0, 2.0),
         "strides": (1, 2), "stem_width": 8, "head_width": 16},
        PLAIN,
    ),
    "Swin": (
        "swin",
        {"image_size": (32, 32), "width": 8, "depths": (2, 2), "num_heads": (1, 2),
         "windows": ((4, 4), (2, 2))},
        PLAIN,
    ),
    "DETR": ("detr", dict(detection_runs.ARGUMENTS), ("class_head",)),
    "RF-DETR": (
        "rf_detr",
        dict(detection_runs.RF_DETR["model__arguments"]),
        ("class_head", "proposals_0/class_head", "proposals_1/class_head"),
    ),
    "YOLOX": (
        "yolox",
        dict(detection_runs.YOLOX["model__arguments"]),
        ("head_0/class_head", "head_1/class_head", "head_2/class_head"),
    ),
    "Faster R-CNN": (
        "faster_rcnn",
        dict(detection_runs.FASTER_RCNN["model__arguments"]),
        ("class_head/logits", "class_head/deltas"),
    ),
    "RetinaNet": (
        "retinanet",
        dict(detection_runs.RETINANET["model__arguments"]),
        ("class_head",),
    ),
    "FCOS": ("fcos", dict(detection_runs.FCOS["model__arguments"]), ("class_head",)),
}  # fmt: skip
CONFIGS = {
    "detr": "detr_finetune",
    "rf_detr": "rf_detr_finetune",
    "yolox": "yolox_finetune",
    "faster_rcnn": "fasterrcnn_finetune",
    "retinanet": "retinanet_finetune",
    "fcos": "retinanet_finetune",
}


def write(path, family, arguments, names=OWN):
    """A file of random weights for so many classes, and its arrays by path."""
    model = families.build_model(family, num_classes=len(names), **arguments)
    size = arguments.get("image_size", (64, 64))
    shapes = jax.eval_shape(lambda key: families.initialize(model, key, size), jax.random.key(0))
    rng = np.random.default_rng(0)
    arrays = {
        name: (0.1 * rng.normal(size=leaf.shape) + (name.endswith("var"))).astype(leaf.dtype)
        for tree in shapes.values()
        for name, leaf in paths.flatten(tree).items()
    }
    tensors, header = convert.export_weights(
        arrays,
        family,
        convert.arguments_of(model),
        to=convert.own_naming(family),
        class_names=names,
    )
    convert.write_safetensors(path, tensors, header)
    return arrays


def config_of(family, file, **fields):
    fields = {"model.weights": file, **{k.replace("__", "."): v for k, v in fields.items()}}
    config = runs.ROOT / f"configs/{CONFIGS.get(family, 'transfer')}.py"
    return load_config(str(config), {name: str(value) for name, value in fields.items()})


def begin(config, class_names=NAMES):
    """(arrays by path, those that began anew, warnings) of a new run."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    run = prepare(config, class_names, mesh=mesh)
    state, frozen, fresh = run.make_arrays()
    warnings = head_warnings(run.weights, run.model, run.description, fresh, run.parameters)
    arrays = {**state.trainable, **frozen, **paths.flatten(state.model_state)}
    return arrays, set(fresh), warnings


def sized(family, arguments):
    """Fields that a file without preprocessing leaves open."""
    if family in CONFIGS or "image_size" in arguments:
        return {}
    return {"model__image_size": 48}


def leaves(arguments, modules):
    ends = ("kernel", "bias") if arguments.get("head_bias", True) else ("kernel",)
    return {f"{module}/{end}" for module in modules for end in ends}


@pytest.mark.long(but=("BEiT", "DeiT, distilled", "ConvNeXt, hidden layer"))
@pytest.mark.parametrize("name", MODELS)
def test_another_number_of_classes_begins_a_new_head_and_keeps_the_rest(name, tmp_path):
    """By the rules of the config file as it comes."""
    family, arguments, modules = MODELS[name]
    kept = write(tmp_path / "weights.safetensors", family, arguments)
    config = config_of(family, tmp_path / "weights.safetensors", **sized(family, arguments))
    arrays, fresh, warnings = begin(config)
    assert fresh == leaves(arguments, modules)
    assert not warnings
    assert arrays.keys() == kept.keys()
    for path, array in arrays.items():
        if path in fresh:
            count = len(NAMES) + (family in ("detr", "faster_rcnn"))
            each = 4 if "deltas" in path else 3 if family == "retinanet" else 1
            assert array.shape[-1] == each * count
        else:
            np.testing.assert_array_equal(array, kept[path], err_msg=path)


@pytest.mark.long(but=("ViT", "EfficientNet"))
@pytest.mark.parametrize("name", MODELS)
def test_advice_is_what_mends_it(name, tmp_path):
    """Beside the rules that there were before, and as a shell takes it."""
    family, arguments, modules = MODELS[name]
    write(tmp_path / "weights.safetensors", family, arguments)
    stem = families.build_model(family, num_classes=2, **arguments).stem
    fields = {**sized(family, arguments), "model__reinitialize": rf"{stem[:-1]}\w"}
    config = config_of(family, tmp_path / "weights.safetensors", **fields)
    weights = read_weights(config)
    with pytest.raises(UserError, match=r"a head of 5 classes and .*train has 2: set ") as caught:
        describe(config, weights, NAMES)
    advice = shlex.split(str(caught.value).split(": set ")[1])[0]
    flag, _, value = advice.partition("=")
    assert flag == "--config.model.reinitialize"
    fields["model__reinitialize"] = value
    mended = config_of(family, tmp_path / "weights.safetensors", **fields)
    rules = mended.model.reinitialize
    every = leaves(arguments, modules) | {stem, "block_0/norm1/scale"}
    assert paths.select(every, rules, field="") == leaves(arguments, modules) | {stem}
    describe(mended, weights, NAMES)


@pytest.mark.parametrize("names", [(), ("one",)], ids=["none", "one"])
@pytest.mark.parametrize("name", ["DeiT, distilled", "ResNet"])
def test_weights_of_no_class_or_one(name, names, tmp_path):
    family, arguments, modules = MODELS[name]
    kept = write(tmp_path / "weights.safetensors", family, arguments, names)
    config = config_of(family, tmp_path / "weights.safetensors", **sized(family, arguments))
    arrays, fresh, _ = begin(config)
    assert fresh == leaves(arguments, modules)
    for path in arrays.keys() - fresh:
        np.testing.assert_array_equal(arrays[path], kept[path], err_msg=path)
    none = config_of(family, config.model.weights, **sized(family, arguments))
    none.model.reinitialize = ()
    with pytest.raises(UserError, match="have no head and" if not names else "a head of 1 class"):
        begin(none)


def test_features_of_a_distilled_model_need_no_head(tmp_path):
    family, arguments, _ = MODELS["DeiT, distilled"]
    kept = write(tmp_path / "weights.safetensors", family, arguments)
    config = config_of(family, tmp_path / "weights.safetensors")
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    weights = read_weights(config)
    description = describe(config, weights, NAMES, headless=True)
    model = build_model(config, description)
    params, _ = headless_parameters(config, model, (16, 16), mesh, weights)
    flat = paths.flatten(params)
    assert kept.keys() - flat.keys() == leaves(arguments, ("head", "head_dist"))
    for path, array in flat.items():
        np.testing.assert_array_equal(array, kept[path])


def test_a_kept_head_says_that_its_classes_had_other_names(tmp_path):
    """And nothing is said where it is new, where names agree, or where the weights have none."""
    file = tmp_path / "weights.safetensors"
    kept = write(file, "vit", SQUARE)
    config = config_of("vit", file, model__reinitialize="()")
    arrays, fresh, warnings = begin(config, ("a", "c", "b", "d", "e"))
    assert not fresh
    np.testing.assert_array_equal(arrays["head/kernel"], kept["head/kernel"])
    (warning,) = warnings
    assert "2 of its 5 classes have other names there: label 1 is 'b' there and 'c'" in warning
    assert "--config.model.reinitialize='head/.*'" in warning
    assert begin(config, OWN)[2] == []
    assert begin(config_of("vit", file), ("v", "w", "x", "y", "z"))[2] == []
    write(file, "vit", SQUARE, tuple(f"LABEL_{i}" for i in range(5)))
    assert begin(config, OWN)[2] == []


def test_a_new_head_that_does_not_train_is_told(tmp_path):
    family, arguments, _ = MODELS["DeiT, distilled"]
    write(tmp_path / "weights.safetensors", family, arguments)
    config = config_of(family, tmp_path / "weights.safetensors", trainable="head/.*")
    (warning,) = begin(config)[2]
    assert warning.startswith("head_dist/bias, head_dist/kernel: re-initialized, and not among")


@pytest.mark.long
def test_a_detector_learns_other_classes(tmp_path, capsys):
    """Trained by the README's config, evaluated, asked for boxes, and written for transformers."""
    short = {**MODELS["DETR"][1], "decoder_depth": 1}
    write(tmp_path / "weights.safetensors", "detr", short)
    fields = detection_runs.overrides(
        trainable="class_head/.*",
        optim__lr_multipliers=(),
        total_steps=1,
        evaluate__every=1,
        evaluate__score=0.0,
    )
    own = {"model.weights": str(tmp_path / "weights.safetensors")}
    kept = ("model.variant", "model.arguments", "model.reinitialize")
    fields = {name: value for name, value in fields.items() if name not in kept} | own
    config = load_config(str(detection_runs.CONFIG), fields)
    workdir = tmp_path / "run"
    assert train.run(config, workdir) == 0
    assert evaluate.run(config, workdir, "last") == 0
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(image)
    assert predict.run(config, workdir, "last", [str(image)], tmp_path) == 0
    boxes = json.loads((tmp_path / "predictions.json").read_text())[0]["boxes"]
    names = load_description(workdir / "model.json").class_names
    assert len(names) == 8
    assert {box["name"] for box in boxes} <= set(names)
    assert convert_main([str(workdir), f"--out={tmp_path / 'out'}", "--to=transformers"]) == 0
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["id2label"] == {str(label): name for label, name in enumerate(names)}
    found = convert.recognize(convert.read_weights(str(tmp_path / "out")))
    assert (found[0], found[1]["num_classes"]) == ("detr", 8)
    capsys.readouterr()
