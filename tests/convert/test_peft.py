"""PEFT folders without torch: exact round trips, and hostile folders refused in one line.

The comparisons with PEFT itself are in tests/parity/test_peft.py.
"""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from vision_jax.convert import arguments_of
from vision_jax.convert.peft import read_adapter, write_adapter
from vision_jax.errors import UserError
from vision_jax.models.vit import build_vit
from vision_jax.trees import lora, paths

WIDTH, HIDDEN = 6, 10
SHAPES = {
    "patch_embed/kernel": (2, 2, 3, WIDTH),
    "patch_embed/bias": (WIDTH,),
    "cls_token": (1, 1, WIDTH),
    "norm/scale": (WIDTH,),
    "norm/bias": (WIDTH,),
    "head/kernel": (WIDTH, 4),
    "head/bias": (4,),
} | {
    f"block_{i}/{name}": shape
    for i in range(2)
    for name, shape in {
        "attn/qkv/kernel": (WIDTH, 3 * WIDTH),
        "attn/qkv/bias": (3 * WIDTH,),
        "attn/proj/kernel": (WIDTH, WIDTH),
        "mlp/fc1/kernel": (WIDTH, HIDDEN),
        "mlp/fc2/kernel": (HIDDEN, WIDTH),
    }.items()
}
MODEL = {
    "family": "vit",
    "arguments": arguments_of(
        build_vit(
            num_classes=4,
            image_size=(4, 4),
            patch_size=2,
            width=WIDTH,
            depth=2,
            num_heads=2,
            mlp_width=HIDDEN,
        )
    ),
}


def make_params(rng):
    tree: dict = {}
    for path, shape in SHAPES.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return tree


def attach(rng, params, rules=(r"block_\d+/.*", "patch_embed/kernel"), **settings):
    arguments = {"key": jax.random.key(0, impl="rbg"), "rank": 2, "alpha": 3.0} | settings
    params = lora.attach(params, rules, **arguments)
    flat = paths.flatten(params)
    for path in sorted(lora.adapter_paths(params)):
        flat[path] = jnp.asarray(rng.normal(size=flat[path].shape), jnp.float32)
    return paths.unflatten(params, flat)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(parameters, a folder with an adapter of their first block; not to be changed)."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("adapter")
    base = make_params(rng)
    adapted = attach(rng, base, ["block_0/.*"])
    write_adapter(folder, adapted, base_model_name="x", **MODEL, naming="timm")
    return base, folder


@pytest.mark.parametrize("dora", [False, True])
def test_round_trip_is_exact(dora, tmp_path, rng):
    """What the naming can hold comes back bit-identical: factors, settings, the trained head."""
    base = make_params(rng)
    params = attach(rng, base, dora=dora, dropout=0.25)
    params["head"] = {"kernel": base["head"]["kernel"] + 1, "bias": base["head"]["bias"] - 1}
    saved = ["head/kernel", "cls_token"]
    write_adapter(
        tmp_path, params, base_model_name="x", **MODEL, naming="timm", modules_to_save=saved
    )
    again = read_adapter(tmp_path, base, **MODEL)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_parts_round_trip_through_separate_modules(tmp_path, rng):
    base = make_params(rng)
    params = attach(rng, base, qkv_parts="q,v")
    write_adapter(tmp_path, params, base_model_name="x", **MODEL, naming="transformers")
    again = read_adapter(tmp_path, base, **MODEL)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert again["block_1"]["attn"]["qkv"]["kernel"].parts == (3, (0, 2))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["lora_alpha"] == 3
    assert not config["rank_pattern"]
    assert "vit.layers.0.attention.q_proj" in config["target_modules"]
    assert "vit.layers.0.attention.k_proj" not in config["target_modules"]


def test_parts_of_different_scales_come_back_exactly(tmp_path, rng):
    """Each part has its own alpha in PEFT's file, and no factor is multiplied by anything."""
    base = make_params(rng)
    params = attach(rng, base, [r"block_\d+/attn/qkv/kernel"], qkv_parts="q,v")
    leaf = params["block_1"]["attn"]["qkv"]["kernel"]
    own = params["block_1"]["attn"]["qkv"] | {"kernel": replace(leaf, scale=(1.5, 0.1))}
    params["block_1"]["attn"]["qkv"] = own
    write_adapter(tmp_path, params, base_model_name="x", **MODEL, naming="transformers")
    again = read_adapter(tmp_path, base, **MODEL)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == {"vit.layers.1.attention.v_proj": 0.2}
    write_adapter(tmp_path, params, base_model_name="x", **MODEL, naming="timm")
    one = read_adapter(tmp_path, base, **MODEL)["block_1"]["attn"]["qkv"]["kernel"]
    np.testing.assert_allclose(*(lora.merge(x) for x in (one, own["kernel"])), rtol=1e-5, atol=1e-6)


def test_a_named_adapter_lies_one_folder_deeper(tmp_path, rng):
    params = attach(rng, make_params(rng))
    write_adapter(tmp_path / "mine", params, base_model_name="x", **MODEL, naming="timm")
    with pytest.raises(UserError, match="there is one in mine"):
        read_adapter(tmp_path, make_params(rng), **MODEL)


def test_parts_become_one_adapter_of_the_summed_rank_in_timm(tmp_path, rng):
    base = make_params(rng)
    params = attach(rng, base, [r"block_\d+/attn/.*"], qkv_parts="q,v")
    write_adapter(tmp_path, params, base_model_name="x", **MODEL, naming="timm")
    again = read_adapter(tmp_path, base, **MODEL)
    for x, y in zip(*(jax.tree.leaves(lora.merge(p)) for p in (again, params)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {
        name: config["rank_pattern"].get(name, config["r"]) for name in config["target_modules"]
    }
    assert ranks["blocks.0.attn.qkv"] == 4
    assert ranks["blocks.0.attn.proj"] == 2


def test_reading_works_on_abstract_parameters(tmp_path, rng):
    base = make_params(rng)
    params = attach(rng, base)
    write_adapter(tmp_path, params, base_model_name="x", **MODEL, naming="timm")
    shapes = jax.eval_shape(lambda base: read_adapter(tmp_path, base, **MODEL), base)
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(jnp.shape, params)


def edit_config(**changes):
    def edit(config, tensors):
        config.update(changes)

    return edit


def drop(name):
    def edit(config, tensors):
        del tensors[name]

    return edit


def reshape(name, shape):
    def edit(config, tensors):
        tensors[name] = np.zeros(shape, np.float32)

    return edit


QKV = "base_model.model.blocks.0.attn.qkv"
HOSTILE = {
    "another method": (edit_config(peft_type="IA3"), "peft_type is not LORA"),
    "rank as text": (edit_config(r="2"), "r is '2'"),
    "negative rank": (edit_config(r=-1), "r is '-1'"),
    "rank as flag": (edit_config(r=True), "r is 'True'"),
    "endless alpha": (edit_config(lora_alpha=float("inf")), "lora_alpha is 'inf'"),
    "flag as number": (edit_config(use_dora=1), "use_dora is '1'"),
    "another rank": (edit_config(r=3), r"lora_A.weight is \(2, .* for rank 3"),
    "broken pattern": (edit_config(alpha_pattern={"(": 2}), "alpha_pattern: '.' is no regular"),
    "a pattern that looks ahead": (edit_config(rank_pattern={"(?=a)": 2}), "is no regular"),
    "long pattern": (edit_config(rank_pattern={"a" * 10**6: 2}), "of at most 1000 characters"),
    "deep pattern": (edit_config(rank_pattern={"(" * 900 + ")" * 900: 2}), "is no regular"),
    "many slow patterns": (
        edit_config(rank_pattern={f"({'a?b*' * 200}.*)*{i}": 2 for i in range(3000)}),
        "rank_pattern: the patterns ask for too much work",
    ),
    "rank as text in a pattern": (edit_config(rank_pattern={"fc1": "2"}), "rank_pattern is"),
    "list of patterns": (edit_config(alpha_pattern=["fc1"]), "alpha_pattern is"),
    "DoRA without magnitude": (edit_config(use_dora=True), "magnitude_vector is missing"),
    "another variant": (edit_config(use_qalora=True), "use_qalora is set"),
    "a field of tomorrow": (edit_config(use_new_arithmetic={"a": 1}), "use_new_arithmetic is set"),
    "a changed base": (edit_config(init_lora_weights="pissa_niter_4"), "changes the base"),
    "an unknown start": (edit_config(init_lora_weights="tomorrow"), "changes the base"),
    "a bias without lora_bias": (reshape(f"{QKV}.lora_B.bias", (18,)), "should be absent"),
    "lora_bias without a bias": (edit_config(lora_bias=True), "lora_B.bias is missing"),
    "a long name": (reshape("abcdefghi." * 60 + "x", (2, 6)), "a name of 601 characters"),
    "no B": (drop(f"{QKV}.lora_B.weight"), "qkv.lora_B.weight is missing"),
    "another width": (reshape(f"{QKV}.lora_A.weight", (2, 7)), r"is \(2, 7\) and should be \(2, 6"),
    "a flat tensor": (reshape(f"{QKV}.lora_B.weight", (36,)), r"is \(36,\) and should be \(18, 2"),
    "another depth": (
        reshape("base_model.model.blocks.7.attn.qkv.lora_A.weight", (2, 6)),
        "blocks.7.attn.qkv; it must be for the same architecture and depth",
    ),
    "a stray tensor": (reshape("base_model.model.haed.weight", (4, 6)), "haed.weight"),
    "another head": (reshape("base_model.model.head.weight", (9, 6)), r"head.weight \(9, 6\)"),
    "a tensor under two names": (reshape("blocks.0.attn.qkv.lora_A.weight", (2, 6)), "in it twice"),
    "no adapters": (lambda config, tensors: tensors.clear(), "no tensor in it ends in .lora_A"),
}


@pytest.mark.parametrize(("edit", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_adapter_is_refused_in_one_line(edit, message, written, tmp_path):
    base, folder = written
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file, config_file = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    config, tensors = json.loads(config_file.read_text()), safetensors.numpy.load_file(file)
    edit(config, tensors)
    config_file.write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(UserError, match=message) as error:
        read_adapter(tmp_path, base, **MODEL)
    assert "\n" not in str(error.value)


def test_damaged_folder_is_refused_in_one_line(written, tmp_path):
    base, folder = written
    with pytest.raises(UserError, match=r"no adapter_config\.json in it"):
        read_adapter(tmp_path, base, **MODEL)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file, config_file = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged or no safetensors file"):
        read_adapter(tmp_path, base, **MODEL)
    file.unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors in it"):
        read_adapter(tmp_path, base, **MODEL)
    for text in ("{", "[" * 100_000, "[]", '"LORA"'):
        config_file.write_text(text)
        with pytest.raises(UserError, match=r"not readable as JSON|peft_type"):
            read_adapter(tmp_path, base, **MODEL)
    with pytest.raises(UserError, match="no adapter to write"):
        write_adapter(tmp_path, base, base_model_name="x", **MODEL, naming="timm")
