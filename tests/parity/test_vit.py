"""Our ViT against timm, torchvision and transformers: every block and the logits, from files."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from vit_references import CLASSES, REFERENCES, timm_reference, transformers_reference

from vision_jax import convert
from vision_jax.certify.measure import certify_reference, relative_error
from vision_jax.certify.random_weights import randomize
from vision_jax.certify.references import make_reference, rebuild
from vision_jax.convert.read import Weights
from vision_jax.convert.tables import find_table, infer_arguments, table_for_export
from vision_jax.convert.vit.arguments import TIMM_OTHER
from vision_jax.convert.vit.config import BUILDERS
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.models.vit import VARIANTS, build_vit, variant_arguments
from vision_jax.ops.position_embedding import resample_positions
from vision_jax.trees.paths import flatten, unflatten


def made(name):
    reference, size = REFERENCES[name]()
    randomize(reference.module, sum(map(ord, name)))
    return reference, size


def target(arguments):
    model = build_model("vit", **arguments)
    images = jnp.zeros((1, *model.image_size, model.in_channels))
    return model, jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def imported(weights, **overrides):
    """(arguments, model, parameters by path) with some arguments changed."""
    family, arguments = convert.recognize(weights)
    assert family == "vit"
    arguments |= overrides
    model, like = target(arguments)
    return arguments, model, convert.import_weights(weights, flatten(like), arguments)


def logits(model, flat, images):
    like = target(convert.arguments_of(model))[1]
    return np.asarray(jax.jit(model.apply)({"params": unflatten(like, flat)}, images))


def normalized(images, arguments, dtype="float32"):
    return ((images - arguments["mean"]) / arguments["std"]).astype(dtype)


@pytest.mark.parametrize("name", REFERENCES)
def test_everything_equals_the_reference_and_goes_back(name):
    reference, size = made(name)
    certificate = certify_reference(reference, size, whole=True)
    worst = certificate["worst"]
    print(f"{name:40s} {worst['float32']:.1e} {worst['float64']:.1e}")
    assert certificate["pass"], certificate["reasons"]
    assert {"embed", "block_0", "logits"} <= set(certificate["errors"]["float64"])
    assert certificate["parameters_filled"] == certificate["parameters_in_model"]
    allowed = r".*mask_token" if name != "transformers siglip classifier" else r".*\.head\..*"
    assert all(re.fullmatch(allowed, key) for key in certificate["tensors_dropped"])


# What else holds a model: where it may go, it gives the same logits there.
GOES = {
    "timm ti/16": {"torchvision", "transformers"},
    "timm not square": {"transformers"},
    "timm other sizes": {"transformers"},
    "timm no head": {"transformers"},
    "timm without biases in qkv": {"transformers"},
    "timm with qk_norm": set(),
    "timm with pre_norm": set(),
    "timm with registers": set(),
    "timm deit distilled": {"transformers"},
    "timm deit3": set(),
    "timm dinov2": set(),
    "timm mae": set(),
    "timm clip quickgelu": set(),
    "timm siglip": set(),
    "timm siglip2 giantopt": {"npz"},
    "timm so400m gap": set(),
    "torchvision b/16": {"timm", "transformers"},
    "transformers vit": set(),
    "transformers deit": set(),
    "transformers dinov2": set(),
    "transformers dinov2 giant with registers": set(),
    "transformers clip": {"timm"},
    "transformers clip projected": set(),
    "transformers siglip": {"timm", "npz"},
    "transformers siglip classifier": {"timm", "npz"},
    "npz augreg": {"timm", "transformers"},
    "npz siglip": {"timm", "transformers"},
    "npz gap": {"timm", "transformers"},
}


@pytest.mark.parametrize("name", GOES)
def test_a_model_goes_where_it_is_held(name, tmp_path):
    reference, size = made(name)
    (tmp_path / "from").mkdir()
    arguments, _, flat = imported(convert.read_weights(reference.save(tmp_path / "from")))
    images = normalized(
        np.random.default_rng(2).random((2, *size, arguments["in_channels"])), arguments
    )
    theirs = reference.outputs(images)["logits"]
    for to in {"timm", "torchvision", "transformers", "npz"} - {reference.source}:
        if to not in GOES[name]:
            with pytest.raises(UserError, match=f"{to} has no vit that is such a model"):
                table_for_export(to, "vit", arguments)
            continue
        table = table_for_export(to, "vit", arguments)
        again = rebuild(table, "vit", arguments, flat, None, tmp_path / to)
        assert relative_error(again.outputs(images)["logits"], theirs) <= 1e-5, to


@pytest.mark.parametrize("name", [n for n in REFERENCES if re.match("timm|transformers", n)])
def test_configs_alone_say_the_arguments_that_the_header_says(name, tmp_path):
    reference, _ = made(name)
    (tmp_path / "from").mkdir()
    arguments, _, flat = imported(convert.read_weights(reference.save(tmp_path / "from")))
    table = table_for_export(reference.source, "vit", arguments)
    rebuild(table, "vit", arguments, flat, None, tmp_path / "back")
    weights = convert.read_weights(str(tmp_path / "back"))
    assert "vision_jax" in weights.metadata
    bare = Weights(
        weights.tensors, {"config": weights.metadata["config"]}, weights.preprocessing, "x", ()
    )
    expected, found = convert.recognize(weights)[1], convert.recognize(bare)[1]
    if expected["layer_scale"] is not None:  # where training would start: no file says it
        found["layer_scale"] = expected["layer_scale"]
    assert found == expected


IN_MEMORY = [
    name
    for name in REFERENCES
    if re.match("transformers (vit|deit|mae|dinov2)", name) and "channel" not in name
]


@pytest.mark.parametrize("name", IN_MEMORY)
def test_transformers_names_in_memory_give_the_same(name, tmp_path):
    """What torch.save(model.state_dict()) writes; a file from save_pretrained names otherwise."""
    reference, _ = made(name)
    weights = convert.read_weights(reference.save(tmp_path))
    tensors = {key: value.numpy() for key, value in reference.module.state_dict().items()}
    assert set(tensors) != set(weights.tensors)
    memory = Weights(tensors, weights.metadata, weights.preprocessing, "x", ())
    arguments, _, flat = imported(weights)
    same_arguments, _, same = imported(memory)
    assert same_arguments == arguments
    assert same.keys() == flat.keys()
    for path, value in flat.items():
        np.testing.assert_array_equal(same[path], value, err_msg=path)


def test_published_files_of_torchvision_are_older(tmp_path):
    reference, _ = made("torchvision b/16")
    weights = convert.read_weights(reference.save(tmp_path))
    names = {".mlp.0.": ".mlp.linear_1.", ".mlp.3.": ".mlp.linear_2."}

    def old(key):
        for new, before in names.items():
            key = key.replace(new, before)
        return key

    older = Weights({old(k): x for k, x in weights.tensors.items()}, {}, None, "x", ())
    _, _, flat = imported(weights)
    _, _, same = imported(older)
    for path, value in flat.items():
        np.testing.assert_array_equal(same[path], value, err_msg=path)


def test_mae_files_for_pretraining_give_their_encoder(tmp_path):
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1}
    decoder |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}
    reference, size = transformers_reference("ViTMAEForPreTraining", mask_ratio=0.0, **decoder)
    randomize(reference.module, 11)
    arguments, model, flat = imported(convert.read_weights(reference.save(tmp_path)))
    images = np.random.default_rng(3).random((2, *size, 3)).astype(np.float32)
    x = torch.from_numpy(normalized(images, arguments)).permute(0, 3, 1, 2)
    noise = torch.linspace(0, 1, 9).expand(2, -1)
    with torch.no_grad():
        theirs = reference.module.vit(x, noise=noise).last_hidden_state[:, 0].numpy()
    assert relative_error(logits(model, flat, images), theirs) <= 1e-5


@pytest.mark.parametrize(
    ("old", "new", "prefix"),
    [((14, 14), (24, 24), 1), ((24, 24), (14, 14), 5), ((7, 9), (4, 13), 0), ((2, 2), (9, 9), 1)],
)
def test_resampled_positions_equal_timms(old, new, prefix):
    positions = np.random.default_rng(7).normal(size=(1, prefix + old[0] * old[1], 8))
    positions = positions.astype(np.float32)
    theirs = resample_abs_pos_embed(torch.from_numpy(positions), new, old, prefix).numpy()
    assert relative_error(resample_positions(positions, old, new, prefix), theirs) <= 3e-6


@pytest.mark.parametrize("name", ["timm ti/16", "timm deit3", "timm with registers"])
def test_another_image_size_gives_timms_logits(name, tmp_path):
    reference, _ = made(name)
    weights = convert.read_weights(reference.save(tmp_path))
    arguments, model, flat = imported(weights, image_size=(80, 64))
    reference.module.set_input_size((80, 64))
    images = np.random.default_rng(9).random((2, 80, 64, 3)).astype(np.float32)
    theirs = reference.outputs(normalized(images, arguments))["logits"]
    assert relative_error(logits(model, flat, images), theirs) <= 1e-5


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_adapted_as_timm_does(channels, tmp_path):
    reference, size = made("timm ti/16")
    weights = convert.read_weights(reference.save(tmp_path))
    kernel = timm.models.adapt_input_conv(
        channels, reference.module.patch_embed.proj.weight.detach()
    )
    each = {"in_channels": channels, "mean": (0.4,) * channels, "std": (0.3,) * channels}
    arguments, model, flat = imported(weights, **each)
    other, _ = timm_reference("vit_tiny_patch16_224", size, in_chans=channels)
    state = {**reference.module.state_dict(), "patch_embed.proj.weight": kernel}
    other.module.load_state_dict(state, strict=True)
    images = np.random.default_rng(9).random((2, *size, channels)).astype(np.float32)
    theirs = other.outputs(normalized(images, arguments))["logits"]
    assert relative_error(logits(model, flat, images), theirs) <= 1e-5


SHORT = {
    "ti/16": "vit_tiny_patch16_224",
    "s/16": "vit_small_patch16_224",
    "s/32": "vit_small_patch32_224",
    "b/8": "vit_base_patch8_224",
    "b/16": "vit_base_patch16_224",
    "b/32": "vit_base_patch32_224",
    "l/16": "vit_large_patch16_224",
    "l/32": "vit_large_patch32_224",
    "h/14": "vit_huge_patch14_224",
    "g/14": "vit_giant_patch14_224",
}


def meta(name, **arguments):
    with torch.device("meta"):
        module = timm.create_model(name, **arguments)
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}, module


@pytest.mark.parametrize("variant", SHORT)
def test_parameter_counts_equal_timms(variant):
    _, module = meta(SHORT[variant], num_classes=1000, weight_init="skip")
    model = build_vit(variant, num_classes=1000, image_size=(224, 224))
    ours = sum(leaf.size for leaf in jax.tree.leaves(target(convert.arguments_of(model))[1]))
    assert ours == sum(parameter.numel() for parameter in module.parameters())
    assert variant_arguments(variant)["depth"] == len(module.blocks)


@pytest.mark.parametrize("name", VARIANTS)
def test_named_variants_are_timms(name):
    shapes, module = meta(name, weight_init="skip")
    table = find_table(shapes)
    config = {"architecture": f"{name}.tag", "global_pool": module.global_pool}
    inferred = infer_arguments(table, shapes, {"config": config})
    arguments = {**FAMILIES["vit"].defaults, **inferred}
    named = dict(VARIANTS[name])
    if named.pop("layer_scale", None) is not None:
        assert arguments["layer_scale"] is not None
    assert arguments == {**arguments, **named}
    unnamed = set(inferred) - set(VARIANTS[name]) - {"layer_scale", "num_classes", "in_channels"}
    assert {key: arguments[key] for key in unnamed} == {
        key: FAMILIES["vit"].defaults[key] for key in unnamed
    }
    assert table.config(arguments)["model_args"] == {}
    assert VARIANTS[table.config(arguments)["architecture"]] == VARIANTS[name]


@pytest.mark.parametrize("builder", BUILDERS)
def test_torchvisions_builders_are_named(builder):
    with torch.device("meta"):
        module = make_reference("torchvision", builder, {"image_size": 224}).module
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    table = find_table(shapes)
    arguments = {**FAMILIES["vit"].defaults, **infer_arguments(table, shapes, {})}
    assert table.holds(arguments)
    assert table.config(arguments) == {"model": builder, "kwargs": {"image_size": 224}}


def architectures():
    # 18x2 has parallel blocks and intern300m no final norm: their names don't match, so they raise.
    other = re.compile(TIMM_OTHER + r"|18x2|intern300m")
    names = timm.list_models(["vit_*", "deit*", "flexivit*"])
    return [name for name in names if not other.search(name)]


def test_arguments_are_read_off_every_vit_of_timm():
    """Names and shapes give the heads, activation, epsilon and pooling that timm builds with."""
    acts = {
        "GELU": "gelu",
        "GELUTanh": "gelu_tanh",
        "QuickGELU": "quick_gelu",
        "SiLU": "silu",
    }
    checked = 0
    for name in architectures():
        shapes, module = meta(name)
        if type(module).__name__ not in ("VisionTransformer", "VisionTransformerDistilled"):
            continue
        if hasattr(module.patch_embed, "backbone") or module.pos_embed is None:
            continue
        config = {"architecture": name, "global_pool": module.global_pool}
        table = find_table(shapes)
        ours = infer_arguments(table, shapes, {"config": config})
        block = module.blocks[0]
        assert ours["num_heads"] == block.attn.num_heads, name
        assert ours["activation"] == acts[type(block.mlp.act).__name__], name
        assert ours["layer_norm_eps"] == block.norm1.eps, name
        assert ours["depth"] == len(module.blocks), name
        assert ours["num_classes"] == module.num_classes, name
        assert ours["pool"] == module.global_pool, name
        assert ours["image_size"] == tuple(module.patch_embed.img_size), name
        assert table.holds({**FAMILIES["vit"].defaults, **ours}), name
        checked += 1
    assert checked > 100


def test_heads_of_another_width_are_as_many_as_the_name_says():
    shapes, module = meta("vit_tiny_patch16_224", embed_dim=384)
    config = {"architecture": "vit_tiny_patch16_224"}
    ours = infer_arguments(find_table(shapes), shapes, {"config": config})
    assert ours["num_heads"] == module.blocks[0].attn.num_heads == 3


@pytest.mark.parametrize("given", [{"norm_layer": "rmsnorm"}, {"pool_include_prefix": True}])
def test_what_leaves_no_trace_in_the_tensors_is_refused(given):
    shapes, _ = meta("vit_tiny_patch16_224")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": given}
    with pytest.raises(UserError, match=next(iter(given))):
        infer_arguments(find_table(shapes), shapes, {"config": config})


def test_what_no_model_of_a_library_is_stays_out_of_its_files():
    arguments = {**FAMILIES["vit"].defaults, **VARIANTS["vit_tiny_patch16_224"]}
    arguments |= {"num_classes": CLASSES, "in_channels": 3}
    everywhere = {"timm", "torchvision", "transformers"}

    def goes(**changed):
        found = set()
        for to in (*everywhere, "npz"):
            try:
                table_for_export(to, "vit", {**arguments, **changed})
                found.add(to)
            except UserError:
                pass
        return found

    assert goes() == everywhere
    assert goes(layer_norm_eps=1e-12) == {"transformers"}
    assert goes(layer_norm_eps=1e-5) == {"timm", "transformers"}
    assert goes(layer_scale=0.1) == {"timm"}
    assert goes(layer_scale=0.1, pool="token_avg") == {"transformers"}
    assert goes(activation="gelu_tanh") == {"timm", "transformers", "npz"}
    assert goes(head_bias=False) == set()
    assert goes(head_bias=False, num_classes=0) == {"timm", "transformers"}
    assert goes(patch_bias=False) == set()
    assert goes(gated_mlp=True, activation="silu", layer_scale=0.1) == {"timm"}
    assert goes(gated_mlp=True, activation="silu") == set()
    assert goes(pool="avg", norm_after_pool=True) == {"timm"}
    assert goes(image_size=(224, 192)) == {"timm", "transformers"}
    assert goes(image_size=(230, 230)) == {"timm", "transformers"}


@pytest.mark.parametrize("num_heads", [1, 2, 5])
@pytest.mark.parametrize("name", ["transformers vit", "transformers deit", "transformers dinov2"])
def test_fewer_heads_of_their_size_go_to_transformers_and_come_back(name, num_heads, rng, tmp_path):
    reference, size = made(name)
    (tmp_path / "from").mkdir()
    weights = convert.read_weights(reference.save(tmp_path / "from"))
    arguments = convert.recognize(weights)[1] | {"num_heads": num_heads, "head_size": 16}
    model, like = target(arguments)
    flat = {p: rng.normal(size=x.shape) / 8 for p, x in flatten(like).items()}
    flat = {path: x.astype(np.float32) for path, x in flat.items()}
    images = normalized(rng.random((2, *size, 3)), arguments)
    table = table_for_export("transformers", "vit", arguments)
    again = rebuild(table, "vit", arguments, flat, None, tmp_path / "back")
    theirs = again.outputs(images)["logits"]
    seen = images * arguments["std"] + arguments["mean"]
    ours = logits(model, flat, seen.astype(np.float32))
    assert relative_error(ours, theirs) <= 1e-5

    # Of what transformers saves itself, without our header.
    again.module.save_pretrained(tmp_path / "saved")
    read = convert.recognize(convert.read_weights(str(tmp_path / "saved")))[1]
    assert (read["num_heads"], read["head_size"]) == (num_heads, 16)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    (tmp_path / "saved/config.json").write_text(json.dumps(config | {"head_dim": 12}))
    with pytest.raises(
        UserError, match=f"head_dim 12, and the tensors have {num_heads} heads of 16"
    ):
        convert.recognize(convert.read_weights(str(tmp_path / "saved")))
    for other in ("timm", "torchvision"):
        with pytest.raises(UserError, match=rf"{other} has no vit .*head_size of 16: it can go to"):
            table_for_export(other, "vit", arguments)
