"""From golden PyTorch files into the model and back into files, without torch."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from vision_jax.convert import (
    Weights,
    arguments_of,
    assumptions,
    class_names_of,
    export_weights,
    import_weights,
    read_weights,
    recognize,
    write_safetensors,
)
from vision_jax.convert.tables import find_table, infer_arguments, shapes_of
from vision_jax.errors import UserError
from vision_jax.models import vit
from vision_jax.models.families import build_model
from vision_jax.models.vit import build_vit
from vision_jax.ops.position_embedding import resample_positions
from vision_jax.trees.paths import flatten, unflatten

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/model.safetensors"))
HEAD = ("head/kernel", "head/bias")


def abstract(model):
    images = jnp.zeros((1, *model.image_size, 3))
    return jax.eval_shape(lambda key: model.init(key, images)["params"], jax.random.key(0))


def random_params(rng, model):
    draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, abstract(model))


def import_vit(weights, model, reinitialized=(), dropped=()):
    return import_weights(
        weights,
        flatten(abstract(model)),
        arguments_of(model),
        reinitialized=reinitialized,
        dropped=dropped,
    )


def export_vit(params, model, **options):
    return export_weights(flatten(params), "vit", arguments_of(model), **options)


def small(**arguments):
    defaults = {
        "num_classes": 3,
        "image_size": (12, 8),
        "patch_size": 4,
        "width": 8,
        "depth": 2,
        "num_heads": 2,
        "mlp_width": 16,
    }
    return build_vit(**{**defaults, **arguments})


@pytest.mark.long(but=("timm_dinov2_swiglu_registers", "transformers_clip", "timm_deit_distilled"))
@pytest.mark.parametrize("name", NAMES)
def test_the_file_written_in_timms_naming_loads_by_itself(name, tmp_path):
    weights = read_weights(str(GOLDEN / name))
    family, arguments = recognize(weights)
    assert family == "vit"
    model = build_vit(**arguments)
    like = abstract(model)
    flat = import_vit(weights, model)
    preprocessing = {"mean": [0.1] * 3, "std": [0.2] * 3, "image_size": [12, 12], "crop_pct": 0.9}
    tensors, header = export_vit(
        unflatten(like, flat), model, class_names=["a", "b"], preprocessing=preprocessing
    )
    write_safetensors(tmp_path / "out.safetensors", tensors, header)

    again = read_weights(str(tmp_path / "out.safetensors"))
    expected = {**arguments, "mean": (0.1, 0.1, 0.1), "std": (0.2, 0.2, 0.2)}
    assert recognize(again) == ("vit", expected)
    assert class_names_of(again) == ["a", "b"]
    assert again.preprocessing["image_size"] == (12, 12)
    assert again.preprocessing["interpolation"] is None
    assert find_table(shapes_of(again.tensors)).source == "timm"
    flat_again = import_vit(again, model)
    assert set(flat_again) == set(flat)
    assert all(np.array_equal(flat_again[path], flat[path]) for path in flat)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"id2label": {"0": "a", "2": "c"}}, ["a", "LABEL_1", "c"]),
        (
            {"id2label": {"10": "k", **{str(i): f"n{i}" for i in range(10)}}},
            [*(f"n{i}" for i in range(10)), "k"],
        ),
        ({"class_names": ["a", "b"]}, ["a", "b"]),
        ({"pretrained_cfg": {"label_names": ["a", "b"]}}, ["a", "b"]),
        ({"pretrained_cfg": {"label_names": ["a"]}, "label_names": ["b"]}, ["b"]),
        ({"pretrained_cfg": {"label_names": {"1": "b", "0": "a"}}}, ["a", "b"]),
        ({"architecture": "x", "crop_pct": 0.9, "labels": ["a", "b"]}, ["a", "b"]),
        ({"architecture": "x", "crop_pct": 0.9, "label_names": ["a", "b"]}, ["a", "b"]),
    ],
)
def test_names_of_classes_keep_their_numbers(config, names):
    found = class_names_of(Weights({}, {"config": config}, None, "x"))
    assert found == names


def test_weights_without_names_have_none():
    weights = read_weights(str(GOLDEN / NAMES[0] / "model.safetensors"))
    weights = dataclasses.replace(weights, metadata={"config": {"id2label": {}}})
    assert class_names_of(weights) is None


@pytest.mark.parametrize("key", ["cat", "-1", "1.0", "9999999", "00", "\u0663", ""])
def test_names_by_what_is_no_number_of_a_class(key):
    weights = Weights({}, {"config": {"id2label": {"0": "a", key: "b"}}}, None, "x")
    with pytest.raises(UserError, match=r"x: config\.json: id2label has the key "):
        class_names_of(weights)


SQUARE = {"image_size": (8, 8)}  # as torchvision, and transformers' towers and DINOv2 have it
VARIANTS = {
    "timm norm": ("timm", {}),
    "timm fc_norm": ("timm", {"pool": "avg", "norm_after_pool": True}),
    "timm registers, gated": (
        "timm",
        {
            "num_registers": 2,
            "position_prefix": 0,
            "layer_scale": 0.1,
            "qk_norm": True,
            "gated_mlp": True,
            "activation": "silu",
            "qkv_bias": False,
        },
    ),
    "timm distilled": ("timm", {"distillation_token": True, "position_prefix": 2}),
    "timm norm in front": (
        "timm",
        {"pre_norm": True, "patch_bias": False, "layer_norm_eps": 1e-5},
    ),
    "timm map": ("timm", {"pool": "map", "class_token": False, "position_prefix": 0}),
    "torchvision": ("torchvision", SQUARE),
    "transformers vit": ("transformers", {}),
    "transformers deit": ("transformers", {"distillation_token": True, "position_prefix": 2}),
    "transformers dinov2": (
        "transformers",
        {"layer_scale": 0.1, "num_registers": 4, "pool": "token_avg", **SQUARE},
    ),
    "transformers dinov2 giant": (
        "transformers",
        {
            "layer_scale": 0.1,
            "gated_mlp": True,
            "activation": "silu",
            "mlp_width": 24,
            "pool": "token_avg",
            **SQUARE,
        },
    ),
    "transformers clip": (
        "transformers",
        {"pre_norm": True, "patch_bias": False, "head_bias": False, **SQUARE},
    ),
    "transformers siglip": (
        "transformers",
        {"pool": "map", "class_token": False, "num_classes": 0, "position_prefix": 0, **SQUARE},
    ),
}


@pytest.mark.long(but=("transformers deit", "transformers vit", "timm norm in front"))
@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_is_bit_identical(name, rng):
    to, arguments = VARIANTS[name]
    model = small(**arguments)
    params = random_params(rng, model)
    tensors, header = export_vit(params, model, to=to)
    assert find_table(shapes_of(tensors)).source == to
    weights = Weights(tensors, {"vision_jax": json.loads(header["vision_jax"])}, None, "x", "")
    back = import_vit(weights, model)
    flat = flatten(params)
    assert set(back) == set(flat)
    assert all(back[path].tobytes() == flat[path].tobytes() for path in flat)


def test_what_a_naming_cannot_hold_raises(rng):
    model = small(num_registers=2, position_prefix=0)
    with pytest.raises(UserError, match=r"torchvision has no vit .* it can go to timm"):
        export_vit(random_params(rng, model), model, to="torchvision")
    with pytest.raises(UserError, match="keras has no vit"):
        export_vit(random_params(rng, model), model, to="keras")
    params = flatten(random_params(rng, model)) | {"adapter": np.zeros(2, np.float32)}
    with pytest.raises(UserError, match="no name for adapter"):
        export_weights(params, "vit", arguments_of(model), to="timm")


def exported(model, params):
    tensors, header = export_vit(params, model)
    return Weights(tensors, {"vision_jax": json.loads(header["vision_jax"])}, None, "file", "")


def test_another_number_of_classes_needs_the_head_named(rng):
    model = small()
    weights = exported(model, random_params(rng, model))
    other = small(num_classes=9)
    with pytest.raises(UserError, match=r"head\.weight \(3, 8\) for head/kernel \(8, 9\)"):
        import_vit(weights, other)
    flat = import_vit(weights, other, reinitialized=HEAD)
    assert set(flatten(abstract(other))) - set(flat) == set(HEAD)


@pytest.mark.long
def test_another_image_size_resamples_the_positions_of_a_grid_that_is_not_square(rng):
    model = small(num_registers=1, position_prefix=2)
    params = random_params(rng, model)
    other = small(num_registers=1, position_prefix=2, image_size=(20, 16))
    flat = import_vit(exported(model, params), other)
    expected = resample_positions(params["pos_embed"], (3, 2), (5, 4), 2)
    np.testing.assert_array_equal(flat["pos_embed"], expected)
    # The same number of patches in another arrangement is another grid.
    turned = small(num_registers=1, position_prefix=2, image_size=(8, 12))
    flat = import_vit(exported(model, params), turned)
    expected = resample_positions(params["pos_embed"], (3, 2), (2, 3), 2)
    np.testing.assert_array_equal(flat["pos_embed"], expected)


def test_a_wrong_architecture_lists_both_sides(rng):
    model, other = small(), small(depth=3, layer_scale=0.1)
    weights = exported(model, random_params(rng, model))
    with pytest.raises(UserError) as caught:
        import_vit(weights, other)
    assert "block_2/" in str(caught.value)
    assert "layer_scale" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pooler_is_left_out_and_nothing_else_unless_asked(rng):
    model = small(num_classes=0)
    tensors, _ = export_vit(random_params(rng, model), model, to="transformers")
    tensors["pooler.dense.weight"] = np.zeros((8, 8), np.float32)  # as ViTModel saves it
    config = {"image_size": [12, 8], "num_attention_heads": 2}
    weights = Weights(tensors, {"config": config}, None, "file", "")
    assert recognize(weights)[1]["image_size"] == (12, 8)
    import_vit(weights, model)
    tensors["pooler.norm.weight"] = np.zeros(8, np.float32)
    with pytest.raises(UserError, match=r"pooler\.norm"):
        import_vit(weights, model)
    import_vit(weights, model, dropped=(r"pooler\.norm\..*",))


def test_no_vit_says_what_was_looked_for_and_what_is_there():
    with pytest.raises(UserError) as caught:
        find_table({"layer1.0.conv1.weight": 0, "fc.bias": 0})
    for word in ("timm", "torchvision", "transformers", "fc.bias"):
        assert word in str(caught.value)


def arguments_from(rng, model, metadata):
    """What our tables infer from a file of timm's without our header."""
    shapes = shapes_of(export_vit(random_params(rng, model), model)[0])
    return infer_arguments(find_table(shapes), shapes, metadata)


TIMM = {
    "vit_base_patch16_clip_quickgelu_224": {"activation": "quick_gelu", "layer_norm_eps": 1e-5},
    "vit_giantopt_patch16_siglip_256.v2": {"activation": "gelu_tanh", "num_heads": 16},
    "vit_base_patch16_siglip_gap_224": {"pool": "avg", "activation": "gelu"},
    "vit_base_patch16_224.augreg_in21k": {"pool": "token", "layer_norm_eps": 1e-6},
}


@pytest.mark.parametrize("architecture", TIMM)
def test_a_timm_name_says_what_shapes_do_not(architecture, rng):
    metadata = {"config": {"architecture": architecture}}
    arguments = arguments_from(rng, small(image_size=(16, 16), width=64), metadata)
    assert {key: arguments[key] for key in TIMM[architecture]} == TIMM[architecture]
    assert arguments["image_size"] == (16, 16)


def test_heads_of_an_unusual_width_are_asked_for_and_not_guessed(rng):
    with pytest.raises(UserError, match="how many heads share 8 channels"):
        arguments_from(rng, small(image_size=(16, 16)), {})
    assert arguments_from(rng, small(image_size=(16, 16), width=128), {})["num_heads"] == 2
    square = small(image_size=(8, 8))
    shapes = shapes_of(export_vit(random_params(rng, square), square, to="torchvision")[0])
    config = {"library": "torchvision", "kwargs": {"num_heads": 2}}
    assert infer_arguments(find_table(shapes), shapes, {"config": config})["num_heads"] == 2


def test_a_timm_config_overrides_the_name(rng):
    config = {
        "architecture": "vit_base_patch16_224",
        "pretrained_cfg": {"input_size": [3, 12, 8]},
        "model_args": {"num_heads": 2, "global_pool": "avg", "act_layer": "silu"},
    }
    arguments = arguments_from(rng, small(), {"config": config})
    assert arguments["image_size"] == (12, 8)
    assert (arguments["num_heads"], arguments["pool"]) == (2, "avg")
    assert arguments["activation"] == "silu"


def test_arguments_that_no_vit_has_raise(rng):
    cases = [
        ({"config": {"architecture": "vit_base_patch16_rpn_224"}}, "computes otherwise"),
        ({"config": {"model_args": {"act_layer": "elu", "img_size": [12, 8]}}}, "elu"),
        ({"config": {"global_pool": "prr"}}, "prr"),
        ({"config": {"model_args": {"img_size": -3}}}, "img_size"),
        ({}, "no square grid"),
    ]
    for metadata, words in cases:
        with pytest.raises(UserError, match=words):
            arguments_from(rng, small(), metadata)
    header = {"vision_jax": {"arguments": {"wings": 2}}}
    with pytest.raises(UserError, match="wings"):
        recognize(
            Weights(export_vit(random_params(rng, small()), small())[0], header, None, "file", "")
        )


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": np.ones(3, np.float32)})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_safetensors(path, {"a": np.zeros(3, np.float32)})
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    assert safetensors.numpy.load_file(path)["a"].tolist() == [1, 1, 1]
    with pytest.raises(UserError, match="not written"):
        write_safetensors(tmp_path / "none" / "x.safetensors", {})


def bare_resnet(folder, name):
    """A file of a plain ResNet without any config, as timm publishes them."""
    model = build_model("resnet", num_classes=3, depths=(1, 1, 1, 1), widths=(8, 8, 8, 8))
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    flat = {p: np.zeros(x.shape, x.dtype) for t in like.values() for p, x in flatten(t).items()}
    tensors, _ = export_weights(flat, "resnet", arguments_of(model))
    write_safetensors(folder / name, tensors)
    return read_weights(str(folder / name))


@pytest.mark.long
def test_what_a_bare_file_does_not_say_is_told(tmp_path):
    weights = bare_resnet(tmp_path, "mine.safetensors")
    assert "pooling and strides without blur" in assumptions(weights)
    assert recognize(weights)[0] == "resnet"
    # The name of the file settles it, or not: of other sizes it is another network's.
    assert "ReLU" in assumptions(bare_resnet(tmp_path, "resnet50-0676ba61.safetensors"))
    for name in ("resnetaa50-1.safetensors", "resnetblur50.safetensors"):
        with pytest.raises(UserError, match="So says the name of the file"):
            recognize(bare_resnet(tmp_path, name))


@pytest.mark.long
def test_the_name_of_a_file_is_taken_where_its_sizes_are(tmp_path):
    """OpenAI's CLIP has timm's quick GELU, which no tensor shows."""
    name = "vit_base_patch32_clip_quickgelu_224"
    sizes = {**vit.VARIANTS[name], "num_classes": 0}
    model = build_model("vit", **sizes)
    like = flatten(abstract(model))
    flat = {path: np.broadcast_to(np.float32(0), x.shape) for path, x in like.items()}
    tensors, _ = export_weights(flat, "vit", arguments_of(model))
    weights = Weights(tensors, {}, None, "x", [tmp_path / f"{name}.openai.safetensors"])
    assert recognize(weights)[1]["activation"] == "quick_gelu"
    assert assumptions(weights) == (f"timm's {name}, by the name of the file",)
    unnamed = Weights(tensors, {}, None, "x", [tmp_path / "x.safetensors"])
    assert recognize(unnamed)[1]["activation"] == "gelu"
    assert "activation=gelu" in assumptions(unnamed)


def test_a_builder_of_torchvision_that_computes_otherwise_is_refused(tmp_path):
    weights = bare_resnet(tmp_path, "mine.safetensors")
    dilated = {"library": "torchvision", "kwargs": {"replace_stride_with_dilation": [0, 1, 1]}}
    with pytest.raises(UserError, match="replace_stride_with_dilation"):
        recognize(dataclasses.replace(weights, metadata={"config": dilated}))
