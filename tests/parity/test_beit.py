"""Our BEiT against timm and transformers: every feature and the logits, from files.

Worst relative error measured on a CPU over the references below:
5.7e-7 in float32, 1.9e-15 in float64.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
import transformers

from vision_jax import convert
from vision_jax.certify.measure import certify_reference, relative_error
from vision_jax.certify.random_weights import randomize
from vision_jax.certify.references import make_reference, rebuild
from vision_jax.convert.package import write_package
from vision_jax.convert.read import Weights
from vision_jax.convert.tables import find_table, infer_arguments, table_for_export
from vision_jax.errors import UserError
from vision_jax.models.beit import VARIANTS, relative_index
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.trees.paths import flatten, unflatten

BASE = "beit_base_patch16_224"
SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 1.7}
HF = {
    "patch_size": 8,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "use_relative_position_bias": True,
}
CLASSIFIER = "BeitForImageClassification"
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}


def timm_reference(size, **arguments):
    given = {**SMALL, "num_classes": 7, "img_size": size, **arguments}
    return make_reference("timm", BASE, given), size


def hf_reference(name, side, **arguments):
    given = {**HF, "image_size": side, "num_labels": 7, **arguments}
    return make_reference("transformers", name, given), (side, side)


REFERENCES = {
    "timm": lambda: timm_reference((32, 48)),
    "timm, odd size": lambda: timm_reference((45, 30), patch_size=7, init_values=None),
    "timm, shared table": lambda: timm_reference((40, 40), in_chans=1, **SHARED),
    "timm, both tables": lambda: timm_reference(
        (24, 40), use_shared_rel_pos_bias=True, use_abs_pos_emb=True, num_classes=1
    ),
    "timm, absolute positions": lambda: timm_reference(
        (16, 40), use_rel_pos_bias=False, use_abs_pos_emb=True, in_chans=5
    ),
    "timm, no positions": lambda: timm_reference((16, 24), use_rel_pos_bias=False),
    "timm, class token": lambda: timm_reference((32, 32), global_pool="token", mlp_ratio=4),
    "timm, norm before mean": lambda: timm_reference((32, 24), use_fc_norm=False),
    "timm, norm after token": lambda: timm_reference(
        (32, 24), global_pool="token", use_fc_norm=True
    ),
    "timm, no bias": lambda: timm_reference((32, 24), qkv_bias=False, embed_dim=36, depth=1),
    "timm, no head": lambda: timm_reference((32, 40), num_classes=0),
    "timm, one patch": lambda: timm_reference((8, 8)),
    "timm v2": lambda: (
        make_reference("timm", "beitv2_base_patch16_224", {**SMALL, "img_size": 32}),
        (32, 32),
    ),
    "transformers": lambda: hf_reference(CLASSIFIER, 32),
    "transformers, odd size": lambda: hf_reference(CLASSIFIER, 45, patch_size=7, num_channels=1),
    "transformers, shared table": lambda: hf_reference(
        CLASSIFIER,
        32,
        use_relative_position_bias=False,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=0.0,
    ),
    "transformers, all positions": lambda: hf_reference(
        CLASSIFIER,
        40,
        use_shared_relative_position_bias=True,
        use_absolute_position_embeddings=True,
        use_mask_token=True,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-3,
    ),
    "transformers, absolute positions": lambda: hf_reference(
        CLASSIFIER, 24, use_relative_position_bias=False, use_absolute_position_embeddings=True
    ),
    "transformers, class token": lambda: hf_reference(CLASSIFIER, 32, use_mean_pooling=False),
    "transformers, no head": lambda: hf_reference("BeitModel", 32),
    "transformers, no head, class token": lambda: hf_reference(
        "BeitModel", 32, use_mean_pooling=False
    ),
}


def reference_of(name):
    reference, size = REFERENCES[name]()
    randomize(reference.module, sum(map(ord, name)))
    for key, parameter in reference.module.named_parameters():
        if key.endswith("relative_position_bias_table"):  # so that positions decide something
            parameter.data = torch.randn(parameter.shape) * 2
    return reference, size


@pytest.mark.parametrize("name", REFERENCES)
def test_everything_equals_the_reference_and_goes_back(name):
    reference, size = reference_of(name)
    certificate = certify_reference(reference, size, whole=True)
    print(f"{name:40s} {certificate['worst']}")
    assert certificate["pass"], certificate["reasons"]
    assert certificate["family"] == "beit"
    assert certificate["arguments"]["image_size"] == size
    blocks = {f"block_{i}" for i in range(certificate["arguments"]["depth"])}
    for errors in certificate["errors"].values():
        assert set(errors) == {"embed", "pooled", "logits", *blocks}
    assert set(certificate["tensors_dropped"]) <= {"beit.embeddings.mask_token"}
    assert certificate["parameters_filled"] == certificate["parameters_in_model"]


def imported(weights, **overrides):
    family, arguments = convert.recognize(weights)
    assert family == "beit"
    arguments |= overrides
    model = build_model(family, **arguments)
    images = jnp.zeros((1, *model.image_size, model.in_channels))
    like = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    flat = convert.import_weights(weights, flatten(like), arguments)
    return model, like, flat, arguments


def weights_of(tensors, **config):
    metadata = {"config": config} if config else {}
    arrays = {key: np.asarray(value) for key, value in tensors.items()}
    return Weights(arrays, metadata, None, "test")


def logits_of(model, like, flat, images):
    params = unflatten(like, {path: jnp.asarray(x) for path, x in flat.items()})
    return np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(images, "float32")))


def normalized(images, arguments):
    return ((images - arguments["mean"]) / arguments["std"]).astype("float32")


def images_of(size, channels=3):
    return np.random.default_rng(1).random((2, *size, channels))


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("timm, class token", "transformers"),
        ("timm, shared table", "transformers"),
        ("timm v2", "transformers"),
        ("timm, one patch", "transformers"),
    ],
)
def test_there_and_back_between_libraries(name, to, tmp_path):
    """timm's model as transformers', whose file gives the same parameters and timm's tensors."""
    reference, size = reference_of(name)
    weights = convert.read_weights(reference.save(tmp_path / "timm"))
    _, _, flat, arguments = imported(weights)
    other = rebuild(
        table_for_export(to, "beit", arguments), "beit", arguments, flat, None, tmp_path / to
    )
    images = images_of(size, arguments["in_channels"])
    theirs = reference.outputs(normalized(images, arguments))["logits"]
    assert relative_error(other.outputs(normalized(images, arguments))["logits"], theirs) <= 1e-5
    again = convert.read_weights(other.save(tmp_path / "again"))
    _, _, flat_again, arguments_again = imported(again)
    taken = ("mean", "std", "layer_scale")  # transformers' config has no preprocessing
    same = {k: v for k, v in arguments.items() if k not in taken}
    assert {k: v for k, v in arguments_again.items() if k not in taken} == same
    tensors, _ = convert.export_weights(flat_again, "beit", arguments, to="timm")
    assert tensors.keys() == weights.tensors.keys()
    for key, value in weights.tensors.items():
        np.testing.assert_array_equal(tensors[key], value, err_msg=key)


@pytest.mark.parametrize(
    ("arguments", "to"),
    [
        ({"image_size": (32, 48)}, "transformers"),
        ({"qkv_bias": False}, "transformers"),
        ({"pool": "token"}, "transformers"),
        ({"layer_norm_eps": 1e-12}, "timm"),
        ({"activation": "silu"}, "timm"),
        ({}, "torchvision"),
    ],
)
def test_what_a_library_has_not(arguments, to):
    given = {**FAMILIES["beit"].defaults, **VARIANTS[BASE], "num_classes": 3, **arguments}
    with pytest.raises(UserError, match=f"{to} has no beit that is such a model"):
        table_for_export(to, "beit", given)


@pytest.mark.parametrize("size", [(56, 40), (24, 24), (72, 72)])
@pytest.mark.parametrize("more", [{}, {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": True}])
def test_another_image_size_resamples_as_timm_does(size, more):
    old = randomize(timm_reference((40, 40), **more)[0].module, 6)
    new, _ = timm_reference(size, **more)
    filtered = timm.models.beit.checkpoint_filter_fn(old.state_dict(), new.module)
    new.module.load_state_dict(filtered, strict=True)
    weights = weights_of(old.state_dict(), architecture=BASE, model_args={"img_size": 40})
    model, like, flat, arguments = imported(weights, image_size=size)
    images = images_of(size)
    theirs = new.outputs(normalized(images, arguments))["logits"]
    assert relative_error(logits_of(model, like, flat, images), theirs) <= 1e-5


def test_a_table_that_is_not_square_resamples_as_timm_does():
    reference, _ = timm_reference((24, 40), use_abs_pos_emb=True)
    randomize(reference.module, 7)
    weights = weights_of(
        {key: x.clone() for key, x in reference.module.state_dict().items()},
        model_args={"img_size": [24, 40]},
    )
    model, like, flat, arguments = imported(weights, image_size=(40, 32))
    reference.module.set_input_size((40, 32))
    images = images_of((40, 32))
    theirs = reference.outputs(normalized(images, arguments))["logits"]
    assert relative_error(logits_of(model, like, flat, images), theirs) <= 1e-5


def meta(name, **arguments):
    with torch.device("meta"):
        module = timm.create_model(name, **arguments)
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_named_variants_are_timms(name):
    shapes = meta(name)
    table = find_table(shapes)
    arguments = infer_arguments(table, shapes, {"config": {"architecture": f"{name}.tag"}})
    computed = {k: v for k, v in VARIANTS[name].items() if k not in ("mean", "std")}
    assert arguments == {**arguments, **computed}
    cfg = timm.get_pretrained_cfg(name)
    assert VARIANTS[name].get("mean", (0.5, 0.5, 0.5)) == cfg.mean
    full = {**FAMILIES["beit"].defaults, **arguments, **VARIANTS[name]}
    assert table.config(full) == {"architecture": name, "model_args": {}}
    bare = infer_arguments(table, shapes, {})  # the tensors say all but the start of LayerScale
    assert bare | {"layer_scale": arguments["layer_scale"]} == arguments
    model = build_model("beit", **arguments)
    like = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, *model.image_size, model.in_channels))
    )
    ours = sum(leaf.size for leaf in jax.tree.leaves(like["params"]))
    assert ours == sum(np.prod(shape) for shape in shapes.values())


def test_microsofts_own_files_with_their_indices():
    module = randomize(timm_reference((32, 32), use_shared_rel_pos_bias=True)[0].module, 5)
    index = torch.from_numpy(relative_index((4, 4)))
    modules = ["rel_pos_bias", "blocks.0.attn", "blocks.1.attn"]
    indices = {f"{name}.relative_position_index": index for name in modules}
    more = {"mask_token": torch.zeros(1, 1, 24), "lm_head.bias": torch.zeros(9)}
    _, _, flat, _ = imported(weights_of(module.state_dict()))
    _, _, own, _ = imported(weights_of({**module.state_dict(), **indices, **more}))
    assert own.keys() == flat.keys()
    for key, value in flat.items():
        np.testing.assert_array_equal(own[key], value)
    wrong = {**module.state_dict(), **indices, "rel_pos_bias.relative_position_index": index.T}
    with pytest.raises(
        UserError, match=r"rel_pos_bias\.relative_position_index has not the values"
    ):
        imported(weights_of(wrong))


@pytest.mark.parametrize("name", ["transformers", "transformers, all positions"])
def test_transformers_as_it_is_in_memory_and_as_it_was(name, tmp_path):
    reference, _ = reference_of(name)
    weights = convert.read_weights(reference.save(tmp_path))
    _, _, flat, arguments = imported(weights)
    config = json.loads((tmp_path / "config.json").read_text())
    for tensors in (
        reference.module.state_dict(),
        with_indices(weights.tensors, arguments),
        {key.replace("beit.", "data2vec_vision."): x for key, x in weights.tensors.items()},
    ):
        _, _, other, same = imported(weights_of(tensors, **config))
        assert same == arguments
        assert other.keys() == flat.keys()
        for key, value in flat.items():
            np.testing.assert_array_equal(other[key], value)


def with_indices(tensors, arguments):
    side = arguments["image_size"][0] // arguments["patch_size"]
    suffix = "relative_position_bias_table"
    return dict(tensors) | {
        key.replace(suffix, "relative_position_index"): relative_index((side, side))
        for key in tensors
        if key.endswith(suffix)
    }


@pytest.mark.parametrize("shared", [False, True])
def test_data2vec_is_a_beit(shared, tmp_path):
    """With another prefix; it goes out as transformers' BEiT and gives the same logits."""
    given = {"use_shared_relative_position_bias": shared, "layer_norm_eps": 1e-6}
    reference, size = hf_reference("Data2VecVisionForImageClassification", 32, **given)
    randomize(reference.module, 8)
    model, like, flat, arguments = imported(convert.read_weights(reference.save(tmp_path)))
    images = images_of(size)
    theirs = reference.outputs(normalized(images, arguments))["logits"]
    assert relative_error(logits_of(model, like, flat, images), theirs) <= 1e-5
    for to in ("transformers", "timm"):
        table = table_for_export(to, "beit", arguments)
        other = rebuild(table, "beit", arguments, flat, None, tmp_path / to)
        assert (
            relative_error(other.outputs(normalized(images, arguments))["logits"], theirs) <= 1e-5
        )


def test_the_encoder_of_masked_image_modeling(tmp_path):
    """Its head is dropped; the features are means of normalized patch tokens."""
    reference, size = hf_reference("BeitForMaskedImageModeling", 32, use_mask_token=True)
    randomize(reference.module, 9)
    model, like, flat, arguments = imported(convert.read_weights(reference.save(tmp_path)))
    assert (arguments["num_classes"], arguments["pool"]) == (0, "avg")
    images = images_of(size)
    seen = reference.outputs(normalized(images, arguments), {"tokens": "layernorm"})
    theirs = seen["tokens"][:, 1:].mean(1)
    assert relative_error(logits_of(model, like, flat, images), theirs) <= 1e-5


def test_a_package_opens_by_the_libraries_own_means(tmp_path):
    reference, size = reference_of("timm, class token")
    _, _, flat, arguments = imported(convert.read_weights(reference.save(tmp_path / "own")))
    preprocessing = {
        "image_size": size,
        "mean": arguments["mean"],
        "std": arguments["std"],
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "bicubic",
    }
    images = images_of(size)
    theirs = reference.outputs(normalized(images, arguments))["logits"]
    for to in ("timm", "transformers"):
        write_package(tmp_path / to, flat, "beit", arguments, to=to, preprocessing=preprocessing)
    auto = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "transformers")
    own = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    for module in (auto, own):
        other = dataclasses.replace(reference, module=module.eval())
        assert (
            relative_error(other.outputs(normalized(images, arguments))["logits"], theirs) <= 1e-5
        )


def test_what_cannot_be_known_or_is_another_model_is_an_error(tmp_path):
    def complaint(shapes, config, match):
        with pytest.raises(UserError, match=match):
            infer_arguments(find_table(shapes), shapes, {"config": config} if config else {})

    shapes = meta(BASE, **SMALL, img_size=40)
    complaint(shapes, {"global_pool": "max"}, "global_pool 'max' is none of token, avg")
    complaint(shapes, {"architecture": BASE, "model_args": {"img_size": "40"}}, "img_size '40'")
    complaint(shapes, {"model_args": {"num_heads": "3"}}, "num_heads '3' is no positive whole")
    complaint(shapes, {"model_args": {"init_values": "small"}}, "init_values 'small' is no number")
    damaged = {key: x for key, x in shapes.items() if "blocks.0.mlp.fc2" not in key}
    complaint(damaged, {}, "nothing for block_0/mlp/fc2/kernel")
    oblong = meta(BASE, **SMALL, img_size=(24, 40))
    complaint(oblong, {}, "fit no square")
    arguments = infer_arguments(
        find_table(oblong), oblong, {"config": {"model_args": {"img_size": [24, 40]}}}
    )
    assert arguments["image_size"] == (24, 40)
    without = meta(BASE, **SMALL, img_size=40, use_rel_pos_bias=False, use_abs_pos_emb=True)
    complaint(without, {}, "must name its architecture")
    complaint(without, {"architecture": "eva_giant_patch14_224"}, "must name its architecture")
    unknown = meta(BASE, **SMALL, img_size=40, use_rel_pos_bias=False)
    complaint(unknown, {"architecture": "beit_mine"}, "don't say the image size")
    reference = make_reference("transformers", CLASSIFIER, {**HF, "image_size": [32, 40]})
    with pytest.raises(UserError, match="32 x 40 pixels: transformers exchanges rows and columns"):
        convert.recognize(convert.read_weights(reference.save(tmp_path)))


@pytest.mark.parametrize(
    "name", ["beit3_base_patch16_224", "eva02_tiny_patch14_224", "vit_relpos_small_patch16_224"]
)
def test_its_relatives_are_no_beit(name):
    shapes = meta(name)
    zeros = {key: np.zeros(shape, "float32") for key, shape in shapes.items()}
    with pytest.raises(UserError):
        convert.import_weights(weights_of(zeros, architecture=name), {}, {})
