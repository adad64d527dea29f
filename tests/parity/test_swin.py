"""Our Swin against timm, torchvision and transformers: every feature and the logits, from files.

Worst relative error measured on a CPU over the references below:
7.1e-7 in float32, 2.6e-15 in float64.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
import transformers
from timm.layers import resize_rel_pos_bias_table

from vision_jax import convert
from vision_jax.certify.measure import relative_error
from vision_jax.certify.random_weights import randomize
from vision_jax.certify.references import make_reference
from vision_jax.convert.read import Weights
from vision_jax.convert.swin.config import BUILDERS
from vision_jax.convert.tables import find_table, infer_arguments, table_for_export
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.models.swin import VARIANTS, position_offsets
from vision_jax.ops.position_embedding import resample_relative_positions
from vision_jax.trees.paths import flatten, unflatten

LIMITS = {"float32": 1e-5, "float64": 1e-12}
V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
SMALL = {"embed_dim": 24, "depths": (2, 1), "num_heads": (2, 3), "num_classes": 7}
TORCHVISION = "torchvision.models.swin_transformer."
SECOND = {
    "block": f"{TORCHVISION}SwinTransformerBlockV2",
    "downsample_layer": f"{TORCHVISION}PatchMergingV2",
}


def timm_reference(name, size, **arguments):
    return make_reference("timm", name, {**SMALL, "img_size": size, **arguments}), size


def torchvision_reference(size, window, **arguments):
    given = {**SMALL, "patch_size": [4, 4], "window_size": window, **arguments}
    return make_reference("torchvision", f"{TORCHVISION}SwinTransformer", given), size


def transformers_reference(name, size, window, **arguments):
    given = {key: value for key, value in SMALL.items() if key != "num_classes"}
    given |= {"image_size": size, "window_size": window, "num_labels": 7, **arguments}
    reference = make_reference("transformers", name, given)
    return reference, (size, size) if isinstance(size, int) else size


# Maps of 15 x 11 and 8 x 6 tokens, or 16 x 12 where the image is padded.
ODD = (62, 45)
REFERENCES = {
    "timm v1": lambda: timm_reference(V1, (64, 96), window_size=4),
    "timm v1, windows clipped": lambda: timm_reference(V1, (40, 40), mlp_ratio=3.3),
    "timm v1, maps padded": lambda: timm_reference(V1, ODD, window_size=4, qkv_bias=False),
    "timm v1, windows by stage": lambda: timm_reference(
        V1, (48, 72), window_size=((4, 6), (6, 5)), patch_size=3
    ),
    "timm v1, no head": lambda: timm_reference(V1, (32, 32), depths=(1, 1), num_classes=0),
    "timm v2": lambda: timm_reference(V2, (64, 96), window_size=4),
    "timm v2, windows clipped": lambda: timm_reference(V2, (40, 40), qkv_bias=False),
    "timm v2, maps padded": lambda: timm_reference(
        V2, ODD, window_size=(4, 6), pretrained_window_sizes=(3, 0), act_layer="silu"
    ),
    "torchvision v1": lambda: torchvision_reference((64, 96), [4, 4]),
    "torchvision v1, large windows": lambda: torchvision_reference((40, 40), [7, 7], mlp_ratio=2.5),
    "torchvision v1, maps padded": lambda: torchvision_reference(ODD, [4, 4]),
    "torchvision v2, maps padded": lambda: torchvision_reference(ODD, [4, 6], **SECOND),
    "transformers v1": lambda: transformers_reference("SwinForImageClassification", 64, 4),
    "transformers v1, image padded": lambda: transformers_reference(
        "SwinForImageClassification", ODD, 4, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-3
    ),
    "transformers v1, no shift": lambda: transformers_reference("SwinModel", (32, 64), 4),
    "transformers v1, one channel": lambda: transformers_reference(
        "SwinForImageClassification", 32, 4, num_channels=1, qkv_bias=False
    ),
    "transformers v2": lambda: transformers_reference(
        "Swinv2ForImageClassification", 64, 4, pretrained_window_sizes=(3, 2)
    ),
    "transformers v2, windows clipped": lambda: transformers_reference(
        "Swinv2ForImageClassification", (45, 62), 7
    ),
    "transformers v2, image padded": lambda: transformers_reference("Swinv2Model", ODD, 6),
}


def read(name, tmp_path):
    reference, size = REFERENCES[name]()
    randomize(reference.module, sum(map(ord, name)))
    return reference, size, reference.save(tmp_path)


def target(arguments):
    model = build_model("swin", **arguments)
    images = jnp.zeros((1, *model.image_size, model.in_channels))
    return model, jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def load(weights, image_size, **overrides):
    family, arguments = convert.recognize(weights)
    assert family == "swin"
    channels = arguments["in_channels"]
    arguments |= {"mean": arguments["mean"][:channels], "std": arguments["std"][:channels]}
    # torchvision's files say no image size; those of the others do.
    assert arguments["image_size"] == image_size or arguments["library"] == "torchvision"
    arguments |= {"image_size": image_size, **overrides}
    model, like = target(arguments)
    return model, like, convert.import_weights(weights, flatten(like), arguments), arguments


def normalized(images, arguments, dtype="float32"):
    return ((images - arguments["mean"]) / arguments["std"]).astype(dtype)


@functools.cache
def compiled(model):
    return jax.jit(lambda params, x: model.apply({"params": params}, x, return_features=True))


def outputs(model, like, flat, images, dtype="float32"):
    model = dataclasses.replace(model, dtype=jnp.dtype(dtype))
    params = unflatten(like, {path: jnp.asarray(x, dtype) for path, x in flat.items()})
    logits, features = compiled(model)(params, jnp.asarray(images, dtype))
    return {**features, "logits": logits}


@pytest.mark.parametrize("name", REFERENCES)
def test_everything_equals_the_reference_and_goes_back(name, tmp_path):
    reference, size, path = read(name, tmp_path)
    weights = convert.read_weights(path)
    model, like, flat, arguments = load(weights, size)
    table = table_for_export(reference.source, "swin", arguments)
    images = np.random.default_rng(1).random((2, *size, arguments["in_channels"]))
    for dtype, limit in LIMITS.items():
        theirs = reference.outputs(normalized(images, arguments, dtype), table.modules(arguments))
        with jax.enable_x64(dtype == "float64"):
            ours = outputs(model, like, flat, images, dtype)
            errors = {key: relative_error(np.asarray(ours[key]), theirs[key]) for key in ours}
        assert set(errors) == {"embed", "stage_0", "stage_1", "pooled", "logits"}
        print(f"{name:40s} {dtype} {max(errors.values()):.1e}")
        assert max(errors.values()) <= limit, errors

    tensors, _ = convert.export_weights(flat, "swin", arguments, to=reference.source)
    assert set(tensors) == set(weights.tensors)
    for key, tensor in weights.tensors.items():
        assert tensors[key].dtype == tensor.dtype
        np.testing.assert_array_equal(tensors[key], tensor, err_msg=key)

    changed = {key: x if "qkv_bias" in key else 1.25 * x for key, x in flat.items()}
    again = rebuild(table, arguments, changed, tmp_path)
    theirs = again.outputs(normalized(images, arguments))["logits"]
    ours = outputs(model, like, changed, images)["logits"]
    assert relative_error(np.asarray(ours), theirs) <= LIMITS["float32"]


def rebuild(table, arguments, flat, folder):
    """The library's own model, from the config that we write, with the exported tensors."""
    config = json.loads(json.dumps(table.config(arguments)))
    tensors, _ = convert.export_weights(flat, "swin", arguments, to=table.source)
    channels, classes = arguments["in_channels"], arguments["num_classes"]
    if table.source == "timm":
        given = {**config["model_args"], "num_classes": classes, "in_chans": channels}
        reference = make_reference("timm", config["architecture"], given)
    elif table.source == "torchvision":
        reference = make_reference(
            "torchvision", config["model"], config["kwargs"] | {"num_classes": classes}
        )
    else:
        (folder / "back").mkdir()
        config |= {"num_channels": channels, "num_labels": classes}
        (folder / "back" / "config.json").write_text(json.dumps(config))
        convert.write_safetensors(folder / "back" / "model.safetensors", tensors, {"format": "pt"})
        build = config["architectures"][0]
        module, report = getattr(transformers, build).from_pretrained(
            folder / "back", output_loading_info=True
        )
        assert not any(report.values()), report
        return dataclasses.replace(make_reference("transformers", build, {}), module=module.eval())
    reference.module.load_state_dict(
        {k: torch.from_numpy(x) for k, x in tensors.items()}, strict=True
    )
    return reference


@pytest.mark.parametrize("name", ["timm v2", "torchvision v2, maps padded", "transformers v2"])
def test_v2s_scale_has_a_limit(name, tmp_path):
    """In float64: at cosines times 100, torch's float32 is as far from its float64 as ours is."""
    reference, size = REFERENCES[name]()
    randomize(reference.module, 9)
    for key, parameter in reference.module.named_parameters():
        if key.endswith("logit_scale"):
            parameter.data[0] = 5.0  # over log 100
    model, like, flat, arguments = load(convert.read_weights(reference.save(tmp_path)), size)
    images = np.random.default_rng(3).random((2, *size, arguments["in_channels"]))
    theirs = reference.outputs(normalized(images, arguments, "float64"))["logits"]
    with jax.enable_x64(True):
        logits = outputs(model, like, flat, images, "float64")["logits"]
        assert relative_error(np.asarray(logits), theirs) <= LIMITS["float64"]


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("timm v1", {"torchvision", "transformers"}),
        ("timm v1, windows clipped", set()),
        ("timm v1, maps padded", set()),
        ("timm v1, windows by stage", set()),
        ("timm v2, maps padded", set()),
        ("torchvision v1", {"timm", "transformers"}),
        ("torchvision v1, maps padded", set()),
        ("transformers v1", {"timm", "torchvision"}),
        ("transformers v1, no shift", set()),
        ("transformers v2", {"timm"}),
        ("transformers v2, windows clipped", set()),
    ],
)
def test_a_model_goes_to_the_libraries_whose_windows_it_has(name, others, tmp_path):
    reference, size, path = read(name, tmp_path)
    _, _, flat, arguments = load(convert.read_weights(path), size)
    images = np.random.default_rng(2).random((2, *size, 3))
    theirs = reference.outputs(normalized(images, arguments))["logits"]
    for to in {"timm", "torchvision", "transformers"} - {reference.source}:
        if to not in others:
            with pytest.raises(UserError, match=f"{to} has no swin that is such a model"):
                table_for_export(to, "swin", arguments)
            continue
        again = rebuild(table_for_export(to, "swin", arguments), arguments, flat, tmp_path)
        logits = again.outputs(normalized(images, arguments))["logits"]
        assert relative_error(logits, theirs) <= LIMITS["float32"], to


def test_fewer_heads_of_their_size_go_to_timm_and_come_back(tmp_path):
    # A head_dim of timm's own, as of a model that has lost heads; each stage has another width.
    reference, size = timm_reference(V1, (64, 96), window_size=4, head_dim=8)
    randomize(reference.module, 5)
    weights = convert.read_weights(reference.save(tmp_path))
    model, like, flat, arguments = load(weights, size)
    assert arguments["head_size"] == 8
    images = np.random.default_rng(2).random((2, *size, 3))
    theirs = reference.outputs(normalized(images, arguments))["logits"]
    ours = outputs(model, like, flat, images)["logits"]
    assert relative_error(np.asarray(ours), theirs) <= LIMITS["float32"]
    again = rebuild(table_for_export("timm", "swin", arguments), arguments, flat, tmp_path)
    found = again.outputs(normalized(images, arguments))["logits"]
    assert relative_error(found, theirs) <= LIMITS["float32"]
    for to in ("torchvision", "transformers"):
        with pytest.raises(
            UserError, match=f"{to} has no swin .* head_size of 8: it can go to timm"
        ):
            table_for_export(to, "swin", arguments)
    # A stage that has lost heads where the first has not, of another size than its own heads.
    reference, _ = timm_reference(V1, (64, 96), window_size=4, head_dim=(None, 6))
    (tmp_path / "by_stage").mkdir()
    with pytest.raises(UserError, match=r"heads of \[\d+, 6\] channels by stage"):
        convert.recognize(convert.read_weights(reference.save(tmp_path / "by_stage")))
    with pytest.raises(UserError, match="nor has any other library"):
        table_for_export("timm", "swin", {**arguments, "version": 2})


def meta(name, **arguments):
    with torch.device("meta"):
        module = timm.create_model(name, **arguments)
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}, module


@pytest.mark.parametrize("name", VARIANTS)
def test_named_variants_are_timms(name):
    shapes, _ = meta(name)
    table = find_table(shapes)
    arguments = infer_arguments(table, shapes, {"config": {"architecture": f"{name}.tag"}})
    assert arguments == {**arguments, **VARIANTS[name], "library": "timm"}
    assert arguments["num_classes"] == shapes["head.fc.weight"][0]
    full = {**FAMILIES["swin"].defaults, **arguments}
    assert table.config(full) == {"architecture": name, "model_args": {}}
    if "v2" not in name:  # v1's tables say it without a config
        assert infer_arguments(table, shapes, {}) == arguments
    _, like = target(arguments)
    extra = sum(np.prod(x.shape) // 3 for key, x in flatten(like).items() if "qkv_bias" in key)
    ours = sum(np.prod(x.shape) for x in flatten(like).values())
    assert ours - extra == sum(np.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("builder", BUILDERS)
def test_torchvisions_builders_are_named_variants(builder):
    with torch.device("meta"):
        module = make_reference("torchvision", builder, {}).module
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    table = find_table(shapes)
    arguments = infer_arguments(table, shapes, {})
    variant = VARIANTS[BUILDERS[builder]]
    assert arguments == {**arguments, **variant, "library": "torchvision"}
    full = {**FAMILIES["swin"].defaults, **arguments}
    assert table.config(full) == {"model": builder, "kwargs": {}}
    _, like = target(arguments)
    ours = sum(np.prod(x.shape) for x in flatten(like).values())
    assert ours == sum(parameter.numel() for parameter in module.parameters())


def weights_of(tensors, **config):
    metadata = {"config": config} if config else {}
    arrays = {key: np.asarray(value) for key, value in tensors.items()}
    return Weights(arrays, metadata, None, "test", "")


def imported(weights, **overrides):
    _, arguments = convert.recognize(weights)
    arguments |= overrides
    model, like = target(arguments)
    flat = convert.import_weights(weights, flatten(like), arguments)
    return flat, arguments, (model, like, flat)


@pytest.mark.parametrize("name", [V1, V2])
def test_microsofts_own_files_give_timms_parameters(name):
    """They merge at a stage's end, and have buffers that timm computes."""
    module = randomize(timm_reference(name, (64, 64), window_size=4)[0].module, 5)
    timms = module.state_dict()
    buffers = ("relative_position_index", "relative_coords_table", "attn_mask")
    kept = {key: x for key, x in module.named_buffers() if key.split(".")[-1] in buffers}
    originals = {
        key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head"): value
        for key, value in (timms | kept).items()
    }
    model_args = {"img_size": [64, 64], "window_size": 4}
    flat, arguments, _ = imported(weights_of(timms, architecture=name, model_args=model_args))
    own, own_arguments, _ = imported(weights_of(originals))
    assert own_arguments["windows"] == arguments["windows"] == ((4, 4), (4, 4))
    assert own.keys() == flat.keys()
    for key, value in flat.items():
        np.testing.assert_array_equal(own[key], value)
    index = next(key for key in originals if key.endswith("relative_position_index"))
    with pytest.raises(UserError, match="relative_position_index has not the values"):
        imported(weights_of({**originals, index: originals[index] + 1}))


def test_transformers_v1_as_it_is_in_memory(tmp_path):
    reference, _, path = read("transformers v1", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    in_memory, arguments, _ = imported(weights_of(reference.module.state_dict(), **config))
    from_file, same, _ = imported(convert.read_weights(path))
    assert arguments == same
    assert in_memory.keys() == from_file.keys()
    for key, value in from_file.items():
        np.testing.assert_array_equal(in_memory[key], value)


@pytest.mark.parametrize(
    ("size", "window"), [((88, 56), None), ((56, 56), ((5, 5), (5, 5)))], ids=["image", "window"]
)
def test_another_image_or_window_resamples_v1s_tables_as_timm_does(size, window):
    old = randomize(timm_reference(V1, (40, 40))[0].module, 6)
    given = {"img_size": size} | ({"window_size": window} if window else {})
    new = make_reference("timm", V1, {**SMALL, **given})
    filtered = timm.models.swin_transformer.checkpoint_filter_fn(old.state_dict(), new.module)
    new.module.load_state_dict(filtered, strict=True)
    config = {"architecture": V1, "model_args": {"img_size": [40, 40]}}
    overrides = {"image_size": size} | ({"windows": window} if window else {})
    _, arguments, ours = imported(weights_of(old.state_dict(), **config), **overrides)
    images = np.random.default_rng(7).random((2, *size, 3))
    theirs = new.outputs(normalized(images, arguments))["logits"]
    model, like, flat = ours
    logits = outputs(model, like, flat, images)["logits"]
    assert relative_error(np.asarray(logits), theirs) <= LIMITS["float32"]


@pytest.mark.parametrize(
    ("old", "new", "extra"),
    [((7, 7), (12, 12), 0), ((14, 14), (7, 7), 3), ((3, 5), (6, 4), 0), ((1, 1), (3, 3), 0)],
)
def test_resampled_relative_positions_equal_timms(old, new, extra):
    rows = [(2 * h - 1) * (2 * w - 1) + extra for h, w in (old, new)]
    table = np.random.default_rng(8).normal(size=(rows[0], 4)).astype(np.float32)
    theirs = resize_rel_pos_bias_table(torch.from_numpy(table), new, (rows[1], 4), old).numpy()
    assert relative_error(resample_relative_positions(table, old, new, extra), theirs) <= 3e-6


@pytest.mark.parametrize(
    ("window", "pretrained"), [(w, p) for w in (1, 2, 7, 24, 37) for p in (0, 6, 12)]
)
def test_offsets_are_bit_identical_to_torchs(window, pretrained):
    attention = timm.models.swin_transformer_v2.WindowAttention(
        8, (window, window + 1), 2, pretrained_window_size=(pretrained, pretrained)
    )
    ours = position_offsets((window, window + 1), pretrained)
    np.testing.assert_array_equal(ours, attention.relative_coords_table[0].numpy())


def test_what_cannot_be_known_or_is_another_model_is_an_error(tmp_path):
    def complaint(shapes, config, match):
        with pytest.raises(UserError, match=match):
            infer_arguments(find_table(shapes), shapes, {"config": config} if config else {})

    shapes, _ = meta(V2)
    complaint(shapes, {}, "don't say how large the windows are")
    complaint(shapes, {"architecture": "swinv2_of_mine"}, "don't say how large the windows are")
    first, _ = meta(V1)
    named = {"architecture": V1}
    complaint(first, named | {"model_args": {"always_partition": True}}, "always_partition True")
    complaint(first, named | {"model_args": {"global_pool": "max"}}, "global_pool 'max'")
    complaint(first, named | {"model_args": {"window_size": [7, 7, 7]}}, "3 windows for 4 stages")
    complaint(first, named | {"model_args": {"window_size": "7"}}, "is not one or two sizes")
    for wrong in (None, 0, [7.5], {"h": 7}):
        complaint(first, named | {"model_args": {"window_size": wrong}}, "config.json")
        wrong = {"pretrained_window_sizes": {"h": 7}, "window_size": 7}
        complaint(shapes, named | {"model_args": wrong}, "not square windows")
    damaged = {key: shape for key, shape in first.items() if "layers.3.blocks.0.mlp.fc2" not in key}
    complaint(damaged, named, "nothing for stage_3/block_0/mlp/fc2/kernel")
    other, _ = meta("swinv2_cr_tiny_224")
    with pytest.raises(UserError, match="no architecture that is known here"):
        find_table(other)
    reference, _ = transformers_reference("SwinModel", 32, 4, use_absolute_embeddings=True)
    with pytest.raises(UserError, match="use_absolute_embeddings True"):
        convert.recognize(convert.read_weights(reference.save(tmp_path)))
