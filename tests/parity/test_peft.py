"""Adapters made by PEFT load here, ours load there, and the logits are the same."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from vision_jax import convert
from vision_jax.convert import arguments_of
from vision_jax.convert.engine import import_tensors
from vision_jax.convert.peft import read_adapter, write_adapter
from vision_jax.convert.tables import find_table, shapes_of
from vision_jax.models.families import build_model
from vision_jax.models.vit import ViT
from vision_jax.trees import lora, paths

TOLERANCE = {"float32": 1e-5, "float64": 1e-11}
OURS = {
    "num_classes": 5,
    "image_size": (16, 16),
    "patch_size": 4,
    "width": 24,
    "depth": 2,
    "num_heads": 3,
    "mlp_width": 96,
}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def timm_reference(dtype, directory):
    """A timm ViT with random weights, our model, and the same weights in our tree."""
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )
    return references(model, dtype, directory)


def transformers_reference(dtype, directory, config_class=transformers.ViTConfig):
    """The same for transformers' ViT or DINOv2."""
    config = config_class(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=16,
        patch_size=4,
        num_labels=5,
        **({} if config_class is not transformers.ViTConfig else {"intermediate_size": 96}),
    )
    model = transformers.AutoModelForImageClassification.from_config(
        config,
        attn_implementation="sdpa",  # eager rounds to float32
    )
    dinov2 = config_class is transformers.Dinov2Config
    return references(
        model,
        dtype,
        directory,
        pool="token_avg" if dinov2 else "token",
        layer_scale=1.0 if dinov2 else None,
        layer_norm_eps=config.layer_norm_eps,
    )


def references(model, dtype, directory, **arguments):
    model = model.to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    if isinstance(model, transformers.PreTrainedModel):  # its files name tensors otherwise
        model.save_pretrained(directory / "base")
        tensors = load_file(directory / "base" / "model.safetensors")
    else:
        tensors = model.state_dict()
    tensors = {name: tensor.numpy().copy() for name, tensor in tensors.items()}

    ours = ViT(**OURS, **arguments, dtype=dtype)
    images = jnp.zeros((1, 16, 16, 3))
    like = jax.eval_shape(ours.init, jax.random.key(0), images)["params"]
    target = {path: jax.ShapeDtypeStruct(x.shape, dtype) for path, x in paths.flatten(like).items()}
    table = find_table(shapes_of(tensors))
    rules = table.rules(arguments_of(ours))
    flat = import_tensors(tensors, rules, target, dropped=table.dropped)
    return model, ours, paths.unflatten(like, {path: jnp.asarray(x) for path, x in flat.items()})


def described(model):
    return {"family": "vit", "arguments": arguments_of(model)}


def relative_difference(rng, theirs, ours, params, dtype):
    """Largest difference between the two models' logits, relative to the largest logit."""
    images = rng.uniform(size=(3, 16, 16, 3)).astype(dtype)
    normalized = torch.from_numpy((images - 0.5) / 0.5).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = theirs.eval()(normalized)
    expected = getattr(expected, "logits", expected).numpy()
    logits = np.asarray(jax.jit(ours.apply)({"params": params}, jnp.asarray(images)))
    assert logits.dtype == expected.dtype == dtype
    return np.abs(logits - expected).max() / np.abs(expected).max()


def save_from_peft(model, directory, **settings):
    """A PEFT model with random adapters, saved; returns it."""
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(parameter + torch.randn_like(parameter) * 0.2)
    adapted.save_pretrained(directory)
    return adapted


TIMM = ["qkv", "attn.proj", "fc1", "fc2", "patch_embed.proj"]
FROM_TIMM = {
    "plain": {"target_modules": TIMM, "r": 3, "lora_alpha": 7},
    "rslora": {"target_modules": ["qkv", "fc1"], "r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"target_modules": TIMM, "r": 3, "lora_alpha": 3, "use_dora": True},
    "patterns": {
        "target_modules": TIMM,
        "r": 3,
        "lora_alpha": 7,
        "use_rslora": True,
        "rank_pattern": {"blocks.1.attn.qkv": 5, r"blocks\.\d+\.mlp\.fc2": 2},
        "alpha_pattern": {"attn.proj": 2.5, "patch_embed.proj": 11},
        "lora_dropout": 0.1,
    },
}


@pytest.mark.parametrize("settings", FROM_TIMM.values(), ids=FROM_TIMM)
def test_timm_adapter_from_peft(settings, dtype, tmp_path, rng):
    model, ours, base = timm_reference(dtype, tmp_path)
    adapted = save_from_peft(model, tmp_path, modules_to_save=["head"], **settings)
    params = read_adapter(tmp_path, base, **described(ours))
    assert relative_difference(rng, adapted, ours, params, dtype) < TOLERANCE[dtype]
    assert relative_difference(rng, adapted, ours, base, dtype) > 1e-2
    assert relative_difference(rng, adapted, ours, lora.merge(params), dtype) < TOLERANCE[dtype]


FROM_TRANSFORMERS = {
    "query and value": {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 7},
    "all": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "projection"],
        "r": 3,
        "lora_alpha": 7,
        "use_rslora": True,
    },
    "dora": {"target_modules": ["q_proj", "v_proj", "fc1"], "r": 3, "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "fc1"],
        "r": 3,
        "rank_pattern": {"v_proj": 5, "layers.1.attention.q_proj": 2},
        "alpha_pattern": {"q_proj": 11},
    },
}


@pytest.mark.parametrize("settings", FROM_TRANSFORMERS.values(), ids=FROM_TRANSFORMERS)
def test_transformers_adapter_from_peft(settings, dtype, tmp_path, rng):
    model, ours, base = transformers_reference(dtype, tmp_path)
    adapted = save_from_peft(model, tmp_path, modules_to_save=["classifier"], **settings)
    params = read_adapter(tmp_path, base, **described(ours))
    assert relative_difference(rng, adapted, ours, params, dtype) < TOLERANCE[dtype]
    assert relative_difference(rng, adapted, ours, base, dtype) > 1e-2


def test_dinov2_adapter_from_peft(tmp_path, rng):
    model, ours, base = transformers_reference("float32", tmp_path, transformers.Dinov2Config)
    targets = ["q_proj", "v_proj", "o_proj", "fc1", "projection"]
    adapted = save_from_peft(model, tmp_path, target_modules=targets, r=3)
    params = read_adapter(tmp_path, base, **described(ours))
    assert relative_difference(rng, adapted, ours, params, "float32") < 1e-5
    assert relative_difference(rng, adapted, ours, base, "float32") > 1e-2


def test_adapter_of_transformers_4(tmp_path, rng):
    """Its modules had the names that the files still have."""
    model, ours, base = transformers_reference("float32", tmp_path)
    adapted = save_from_peft(model, tmp_path, target_modules=["q_proj", "v_proj", "fc1"], r=3)
    file = tmp_path / "adapter_model.safetensors"
    older = {
        name.replace("vit.layers.", "vit.encoder.layer.")
        .replace("attention.q_proj", "attention.attention.query")
        .replace("attention.v_proj", "attention.attention.value")
        .replace("mlp.fc1", "intermediate.dense"): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(older, file)
    params = read_adapter(tmp_path, base, **described(ours))
    assert relative_difference(rng, adapted, ours, params, "float32") < 1e-5


RULES = [r"block_\d+/attn/(qkv|proj)/kernel", r"block_0/mlp/fc\d/kernel"]
ATTACHED = {
    "fused": {},
    "parts": {"qkv_parts": "q,v"},
    "rslora": {"rank_stabilized": True, "dropout": 0.1},
    "dora": {"dora": True},
    "dora of parts": {"dora": True, "qkv_parts": "v"},
}


@pytest.mark.parametrize("naming", ["timm", "transformers"])
@pytest.mark.parametrize("settings", ATTACHED.values(), ids=ATTACHED)
def test_adapter_to_peft(settings, naming, dtype, tmp_path, rng):
    reference = timm_reference if naming == "timm" else transformers_reference
    model, ours, base = reference(dtype, tmp_path)
    params = attach_random(rng, base, [*RULES, "patch_embed/kernel"], rank=3, alpha=7.0, **settings)
    # What was trained besides: the head, a bias under an adapter, a norm and a bare parameter.
    trained = ["head/kernel", "head/bias", "block_1/attn/qkv/bias", "norm/scale", "pos_embed"]
    flat = paths.flatten(params)
    flat |= {path: flat[path] + 0.3 for path in trained}
    params = paths.unflatten(params, flat)

    write_adapter(
        tmp_path,
        params,
        base_model_name="reference",
        **described(ours),
        naming=naming,
        modules_to_save=trained,
    )
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert relative_difference(rng, loaded, ours, params, dtype) < TOLERANCE[dtype]
    assert relative_difference(rng, model, ours, params, dtype) > 1e-2

    again = read_adapter(tmp_path, base, **described(ours))
    assert relative_difference(rng, loaded, ours, again, dtype) < TOLERANCE[dtype]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "head" in config["modules_to_save"] or "classifier" in config["modules_to_save"]


def test_leaves_of_different_kinds_to_peft(tmp_path, rng):
    """Ranks, scales and DoRA that differ between leaves: patterns and gains of 1 keep the sums."""
    model, ours, base = timm_reference("float32", tmp_path)
    params = attach_random(rng, base, ["block_0/attn/qkv/kernel"], rank=2, alpha=3.0, dora=True)
    params = attach_random(rng, params, [r"block_1/mlp/fc\d/kernel"], rank=5, alpha=4.0)
    write_adapter(tmp_path, params, base_model_name="reference", **described(ours), naming="timm")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert relative_difference(rng, loaded, ours, params, "float32") < 1e-5
    again = read_adapter(tmp_path, base, **described(ours))
    assert relative_difference(rng, loaded, ours, again, "float32") < 1e-5


def attach_random(rng, params, rules, **settings):
    """`attach` with random B and disturbed magnitudes, as after training."""
    before = lora.adapter_paths(params)
    params = lora.attach(params, rules, key=jax.random.key(0), **settings)
    flat = paths.flatten(params)
    for path, array in flat.items():
        if path not in before and path.endswith(("kernel/b", "kernel/magnitude")):
            flat[path] = array + rng.normal(size=array.shape).astype(array.dtype) * 0.2
    return paths.unflatten(params, flat)


def vit_of_transformers(**more):
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SMALL, num_labels=5, **more)
    )


def resnet_of_timm():
    return timm.create_model("resnet18", num_classes=5, layers=(1, 1, 1, 1))


def convnext_of_timm():
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    return timm.create_model("convnext_atto", num_classes=5, **sizes)


def deit_of_timm():
    sizes = {"img_size": 32, "depth": 1}
    return timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **sizes)


def swin_of_transformers():
    sizes = {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    config = transformers.SwinConfig(**sizes, image_size=32, patch_size=4, num_labels=5)
    return transformers.SwinForImageClassification(config)


def beit_of_transformers():
    config = transformers.BeitConfig(**SMALL, use_relative_position_bias=True, num_labels=5)
    return transformers.BeitForImageClassification(config)


def swiglu_of_transformers():
    sizes = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
    config = transformers.Dinov2Config(**sizes, use_swiglu_ffn=True, num_labels=5)
    return transformers.Dinov2ForImageClassification(config)


SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
QV = ["q_proj", "v_proj"]
WHOLE_HEAD = {"modules_to_save": ["classifier"]}
VALID = {
    "bias of q and v": (
        vit_of_transformers,
        {"target_modules": QV, "bias": "lora_only"} | WHOLE_HEAD,
    ),
    "all biases": (vit_of_transformers, {"target_modules": QV, "bias": "all"} | WHOLE_HEAD),
    "DoRA and all biases": (
        vit_of_transformers,
        {"target_modules": QV, "bias": "all", "use_dora": True} | WHOLE_HEAD,
    ),
    "q adapted, v saved whole": (
        vit_of_transformers,
        {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]},
    ),
    "lora_bias": (
        vit_of_transformers,
        {"target_modules": [*QV, "fc1", "projection"], "lora_bias": True}
        | {"alpha_pattern": {"q_proj": 3}, "bias": "lora_only"},
    ),
    "expressions": (
        vit_of_transformers,
        {"target_modules": r".*\.(q_proj|v_proj|fc\d)$", "use_rslora": True}
        | {"rank_pattern": {r"layers\.[1-9]\..*(q|v)_proj": 2, "fc1": 5}}
        | {"alpha_pattern": {r"^vit\.layers\.0\.attention\.\w{1,3}_proj": 3.5}},
    ),
    "some layers": (
        vit_of_transformers,
        {"target_modules": QV, "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "all linear layers": (
        deit_of_timm,
        {"target_modules": "all-linear", "exclude_modules": ["head"], "fan_in_fan_out": True},
    ),
    "no alpha": (vit_of_transformers, {"target_modules": QV, "alpha_pattern": {"q_proj": 0}}),
    "MiCA": (deit_of_timm, {"target_modules": ["qkv"], "init_lora_weights": "mica"}),
    "stem and blocks of one name": (
        resnet_of_timm,
        {"target_modules": ["conv1", "conv2", "fc"]}
        | {"rank_pattern": {"^conv1": 2}, "alpha_pattern": {"^conv1": 3}},
    ),
    "1 x 1 convolutions": (
        convnext_of_timm,
        {"target_modules": ["fc1", "fc2"], "use_dora": True},
    ),
    "Swin": (swin_of_transformers, {"target_modules": "all-linear", "bias": "lora_only"}),
    "BEiT": (beit_of_transformers, {"target_modules": QV, "bias": "all"}),
    "SwiGLU": (swiglu_of_transformers, {"target_modules": "all-linear"}),
}


def saved_base(model, directory):
    """What `read_weights` reads of a model with random weights."""
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(directory / "base")
        return str(directory / "base")
    save_file(model.state_dict(), directory / "base.safetensors")
    return str(directory / "base.safetensors")


def read_base(spec):
    """(our model without normalization, variables) of `saved_base`."""
    weights = convert.read_weights(spec)
    family, arguments = convert.recognize(weights)
    model = build_model(family, **(arguments | {"mean": (0.0,) * 3, "std": (1.0,) * 3}))
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    target = {path: leaf for tree in like.values() for path, leaf in paths.flatten(tree).items()}
    arrays = convert.import_weights(weights, target, arguments)
    variables = {
        name: paths.unflatten(
            tree, {path: jnp.asarray(arrays[path]) for path in paths.flatten(tree)}
        )
        for name, tree in like.items()
    }
    return model, variables, {"family": family, "arguments": arguments_of(model)}


def difference(rng, theirs, ours, variables):
    """As `relative_difference`, of images that are not normalized."""
    images = rng.uniform(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(images).permute(0, 3, 1, 2))
    expected = getattr(expected, "logits", expected).numpy()
    logits = jax.jit(ours.apply)(variables, jnp.asarray(images))
    return np.abs(logits - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("make", "settings"), VALID.values(), ids=VALID)
def test_adapters_of_every_kind_there_and_back(make, settings, tmp_path, rng):
    """PEFT's adapter here, and what was read written again and loaded by PEFT."""
    model = make()
    spec = saved_base(model, tmp_path)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**({"r": 4} | settings)))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "theirs")
    ours, base, described = read_base(spec)
    assert difference(rng, adapted, ours, base) > 1e-3
    params = read_adapter(tmp_path / "theirs", base["params"], **described)
    variables = base | {"params": params}
    assert difference(rng, adapted, ours, variables) < 1e-5

    plain, _ = lora.detach(params)
    before = paths.flatten(base["params"])
    changed = [path for path, x in paths.flatten(plain).items() if (x != before[path]).any()]
    naming = "timm" if spec.endswith("safetensors") else "transformers"
    write_adapter(
        tmp_path / "ours",
        params,
        base_model_name="reference",
        **described,
        naming=naming,
        modules_to_save=changed,
    )
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
    assert difference(rng, again, ours, variables) < 1e-5


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_adapter_of_a_wrapped_base(wrapper, tmp_path, rng):
    model = vit_of_transformers()
    spec = saved_base(model, tmp_path)
    adapted = save_from_peft(
        model, tmp_path, target_modules=QV, alpha_pattern={"layers.0.attention.q_proj": 3}
    )
    file, config_file = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    old = "base_model.model."
    tensors = {name.replace(old, old + wrapper): x for name, x in load_file(file).items()}
    save_file(tensors, file)
    config = json.loads(config_file.read_text())
    key = f"^{wrapper}vit.layers.0.attention.q_proj"
    config_file.write_text(json.dumps(config | {"alpha_pattern": {key: 3}}))
    ours, base, described = read_base(spec)
    params = read_adapter(tmp_path, base["params"], **described)
    assert difference(rng, adapted, ours, base | {"params": params}) < 1e-5


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_two_patterns_for_one_module(field, tmp_path, rng):
    """PEFT saves patterns in alphabetical order, and takes the first that matches."""
    model = vit_of_transformers()
    spec = saved_base(model, tmp_path)
    two = {"v_proj": 3, r".*layers\.1.*v_proj": 2}
    adapted = save_from_peft(model, tmp_path, target_modules=QV, **{field: two})
    ours, base, described = read_base(spec)
    with pytest.warns(UserWarning, match=rf"{field} of vit.layers.1.attention.v_proj \(2, 3\)"):
        params = read_adapter(tmp_path, base["params"], **described)
    if field == "alpha_pattern":  # what PEFT loads is not what was trained
        assert difference(rng, adapted, ours, base | {"params": params}) > 1e-3
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    else:
        with pytest.raises(RuntimeError, match="size mismatch"):
            peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert difference(rng, adapted, ours, base | {"params": params}) < 1e-5


def test_parts_of_different_scales_in_a_float32_file(tmp_path, rng):
    """Of a float64 model: nothing is rescaled in the file's own precision."""
    with jax.enable_x64(True):
        model, ours, base = transformers_reference("float64", tmp_path)
        settings = {"target_modules": QV, "r": 3, "alpha_pattern": {"q_proj": 11, "v_proj": 0.7}}
        save_from_peft(model, tmp_path, **settings)
        file = tmp_path / "adapter_model.safetensors"
        save_file({name: x.float() for name, x in load_file(file).items()}, file)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).double()
        params = read_adapter(tmp_path, base, **described(ours))
        assert relative_difference(rng, loaded, ours, params, "float64") < 1e-11
