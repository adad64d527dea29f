"""Our DiT against diffusers', and DiT and SiT against a PyTorch module written after the papers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vision_jax import convert
from vision_jax.certify.measure import certify_reference, relative_error
from vision_jax.certify.random_weights import randomize
from vision_jax.certify.reference_dit import DiT
from vision_jax.certify.references import make_reference
from vision_jax.convert.diffusers import WEIGHTS_FILE
from vision_jax.convert.load import load_model
from vision_jax.convert.tables import table_for_export
from vision_jax.errors import UserError
from vision_jax.models.families import build_model
from vision_jax.trees.paths import flatten, unflatten

BARS = {"float32": 1e-5, "float64": 1e-12}
OWN = {
    "DiT": {"hidden_size": 48, "depth": 2, "num_heads": 3, "input_size": 8, "num_classes": 5},
    "SiT": {"hidden_size": 32, "depth": 3, "num_heads": 2, "input_size": 6, "num_classes": 7,
            "predicts": "velocity", "patch_size": 3, "mlp_ratio": 2.0},
    "pixels": {"hidden_size": 64, "depth": 1, "num_heads": 4, "input_size": 12, "patch_size": 4,
               "in_channels": 3, "learn_sigma": False, "predicts": "image"},
}  # fmt: skip
THEIRS = {
    "variances": {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 2,
                  "sample_size": 8, "num_embeds_ada_norm": 5, "out_channels": 8},
    "other epsilon": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3,
                      "sample_size": 12, "num_embeds_ada_norm": 9, "patch_size": 4,
                      "in_channels": 3, "norm_eps": 1e-4},
}  # fmt: skip
CASES = [
    *(pytest.param("dit", name, given, id=name) for name, given in OWN.items()),
    *(
        pytest.param("diffusers", "DiTTransformer2DModel", given, id=f"diffusers, {name}")
        for name, given in THEIRS.items()
    ),
]
every_case = pytest.mark.parametrize(("source", "build", "given"), CASES)


def reference(source, build, given, seed=0):
    made = make_reference(source, build, given)
    randomize(made.module, seed)
    return made


@every_case
def test_a_certificate(source, build, given, request):
    seed = request.config.option.seed
    side = given.get("input_size") or given["sample_size"]
    measured = certify_reference(
        reference(source, build, given, seed), (side, side), seed=seed, whole=True
    )
    assert measured["reasons"] == []
    assert measured["tensors_dropped"] == []
    assert {"prediction", "block_0"} <= set(measured["errors"]["float64"])


@every_case
@pytest.mark.parametrize("dtype", BARS)
def test_gradients(source, build, given, dtype, tmp_path, request):
    """Of all parameters and of the input, at every kind of time and class."""
    rng = np.random.default_rng(request.config.option.seed)
    made = reference(source, build, given, request.config.option.seed)
    spec = made.save(tmp_path)
    with jax.enable_x64(dtype == "float64"):
        model, variables = load_model(spec, dtype=jnp.dtype(dtype))
        params = {p: jnp.asarray(x, dtype) for p, x in flatten(variables["params"]).items()}
        x = rng.normal(size=(5, *model.image_size, model.in_channels)).astype(dtype)
        time = np.array([0, 0.25, 0.5, 0.999, 1]) * (999 if model.predicts == "noise" else 1)
        time = time.round() if model.predicts == "noise" else time
        labels = np.array([0, 1, 2, model.num_classes, model.num_classes])

        def loss(params, x):
            variables_ = {"params": unflatten(variables["params"], params)}
            outputs = model.apply(
                variables_, x, jnp.asarray(time, dtype), jnp.asarray(labels, jnp.int32)
            )
            return sum(jnp.sin(y).sum() for y in outputs.values())

        value, (gradients, of_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
            params, jnp.asarray(x)
        )
    module = made.module.to(getattr(torch, dtype))
    pixels = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    output = module(pixels, torch.from_numpy(time.astype(dtype)), torch.from_numpy(labels))
    wanted = (output if isinstance(module, DiT) else output.sample).sin().sum()
    wanted.backward()
    bar = 10 * BARS[dtype]
    scale = wanted.abs().item() + x.size**0.5
    assert abs(float(value) - wanted.item()) <= bar * scale
    assert relative_error(np.asarray(of_x), pixels.grad.numpy()) <= bar
    tensors, _ = convert.export_weights(
        {path: np.asarray(g) for path, g in gradients.items()},
        "dit",
        convert.arguments_of(model),
        to=source,
    )
    of_torch = {name: p.grad.numpy() for name, p in module.named_parameters()}
    if source == "diffusers":  # the copies' gradients add up in the one that is ours
        for name in [n for n in of_torch if ".norm1.emb." in n and ".0." in n]:
            copies = [n for n in of_torch if n.split(".", 2)[2:] == name.split(".", 2)[2:]]
            total = sum(of_torch[n] for n in copies)
            of_torch.update(dict.fromkeys(copies, total))
    largest = max(np.abs(g).max() for g in of_torch.values())
    assert of_torch.keys() == tensors.keys() - {"pos_embed"}
    for name, gradient in of_torch.items():
        # The key's bias has no gradient but rounding: softmax doesn't see it.
        bare = "to_k.bias" in name or "qkv.bias" in name
        size = largest if bare else np.abs(gradient).max()
        assert np.abs(tensors[name] - gradient).max() <= bar * size, name


def test_copies_that_differ_are_refused(tmp_path):
    made = reference("diffusers", "DiTTransformer2DModel", THEIRS["variances"])
    made.save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    tensors[name][3] += 1e-3
    save_file(tensors, tmp_path / WEIGHTS_FILE, {"format": "pt"})
    message = r"timestep_embedder\.linear_2\.bias differs between block 0 and block 1"
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path))
    del tensors[name]
    save_file(tensors, tmp_path / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors of a fused parameter lack: .*linear_2\.bias"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["DiT-S-2-256x256.pt", "SiT-S-2-256x256.pt", "0400000.pt"])
def test_pickled_checkpoints_of_the_originals(name, tmp_path):
    """The average of a training program's checkpoint; what it predicts is in the file's name."""
    made = make_reference("dit", "DiT", {"hidden_size": 384, "depth": 12, "num_heads": 6,
                                         "num_classes": 3})  # fmt: skip
    average = made.module.state_dict()
    last = {key: torch.zeros_like(tensor) for key, tensor in average.items()}
    torch.save({"model": last, "ema": average, "opt": {"state": {}}}, tmp_path / name)
    with pytest.raises(UserError, match="is a pickle"):
        load_model(str(tmp_path / name))
    weights = convert.read_weights(str(tmp_path / name), allow_pickle=True)
    family, arguments = convert.recognize(weights)
    assert (family, arguments["num_heads"], arguments["image_size"]) == ("dit", 6, (32, 32))
    assert arguments["predicts"] == ("velocity" if "SiT" in name else "noise")
    wanted = {
        "DiT-S-2-256x256.pt": ("dit's dit-s-2, by the name of the file",),
        "SiT-S-2-256x256.pt": ("dit's sit-s-2, by the name of the file",),
        "0400000.pt": ("num_heads=6",),
    }
    *found, predicts = convert.assumptions(weights)
    assert tuple(found) == wanted[name]
    assert predicts.startswith(f"that it predicts {arguments['predicts']}; if it is ")
    _, variables = load_model(str(tmp_path / name), allow_pickle=True)
    table = average["y_embedder.embedding_table.weight"].numpy()
    np.testing.assert_array_equal(variables["params"]["class_embed"], table)


OTHER = {
    "activation_fn": "gelu", "norm_type": "ada_norm", "norm_elementwise_affine": True,
    "attention_bias": False, "cross_attention_dim": 16, "num_attention_heads": 6,
    "attention_head_dim": 8, "in_channels": 3, "out_channels": 4, "num_layers": 3,
    "patch_size": 4, "num_embeds_ada_norm": 6, "_class_name": "PixArtTransformer2DModel",
    "num_vector_embeds": 4, "only_cross_attention": True, "double_self_attention": True,
    "attention_type": "gated", "caption_channels": 8, "interpolation_scale": 2,
    "use_additional_conditions": True,
}  # fmt: skip
FREE = {
    "dropout": 0.1, "norm_num_groups": 16, "upcast_attention": True, "use_linear_projection": True,
}  # fmt: skip


def test_every_field_of_the_config_is_used_checked_or_of_no_effect(tmp_path):
    made = reference("diffusers", "DiTTransformer2DModel", THEIRS["variances"])
    made.save(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    plain = load_model(str(tmp_path))[0]

    def changed(name, value):
        path.write_text(json.dumps({**config, name: value}))
        return load_model(str(tmp_path))[0]

    for name, value in OTHER.items():
        with pytest.raises(UserError, match=name):
            changed(name, value)
    for name, value in FREE.items():
        assert changed(name, value) == plain, name
    assert changed("norm_eps", 0.25).mlp_norm_eps == 0.25
    assert changed("sample_size", 16).image_size == (16, 16)
    assert changed("_class_name", "Transformer2DModel") == plain
    known = {*OTHER, *FREE, "norm_eps", "sample_size", "_diffusers_version"}
    assert set(config) <= known


def test_one_kind_is_not_written_as_the_other():
    """Frequencies of the time differ, so an export would compute something else."""
    own = build_model("dit", num_classes=3, image_size=(8, 8), patch_size=2, width=16, depth=1,
                      num_heads=2, mlp_width=64)  # fmt: skip
    for changed, refused, can in (
        ({"time_shift": 1, "predicts": "noise"}, "dit", "diffusers"),
        ({"predicts": "noise"}, "diffusers", "dit"),
        ({"time_shift": 1}, "dit", ""),
    ):
        arguments = convert.arguments_of(own.clone(**changed))
        with pytest.raises(UserError, match=f"{refused} has no dit that is such a model.*{can}"):
            table_for_export(refused, "dit", arguments)
