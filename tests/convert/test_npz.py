"""AugReg's and big_vision's files without torch: read and written bit-identical, or refused."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vision_jax import convert
from vision_jax.convert import engine
from vision_jax.convert.files import open_npz
from vision_jax.convert.npz import write_npz
from vision_jax.convert.tables import TABLES, find_table, naming_for_export, table_for_export
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES, RUN_ARGUMENTS, build_model
from vision_jax.trees.paths import flatten

ARGUMENTS = {
    **FAMILIES["vit"].defaults,
    "num_classes": 3,
    "image_size": (12, 12),
    "patch_size": 4,
    "width": 16,
    "depth": 3,
    "num_heads": 2,
    "mlp_width": 24,
    "activation": "gelu_tanh",
}
MAP = {"pool": "map", "class_token": False, "position_prefix": 0}


def target(arguments):
    model = build_model("vit", **arguments)
    images = jnp.zeros((1, *model.image_size, model.in_channels))
    return flatten(jax.eval_shape(model.init, jax.random.key(0), images)["params"])


def random_params(arguments):
    rng = np.random.default_rng(0)
    return {
        path: rng.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in target(arguments).items()
    }


def written(folder, tensors, name="model.npz"):
    write_npz(folder / name, tensors)
    return convert.read_weights(str(folder / name))


def kind(name):
    return next(t for t in TABLES if (t.source, t.kind) == ("npz", name))


@pytest.mark.long(but=("augreg-changed0-params/", "big_vision scanned-changed6-"))
@pytest.mark.parametrize("prefix", ["", "params/", "params/img/", "img/", "opt/target/"])
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("augreg", {}),
        ("augreg", {"num_classes": 0, "in_channels": 1, "mean": (0.5,), "std": (0.5,)}),
        ("augreg", {"num_classes": 21843, "num_heads": 4, "depth": 1}),
        ("big_vision", {"position_prefix": 0}),
        ("big_vision", MAP),
        ("big_vision", {**MAP, "pool": "avg"}),
        ("big_vision scanned", MAP),
        ("big_vision scanned", {**MAP, "num_classes": 0, "patch_size": 6}),
    ],
)
def test_both_ways_bit_identical(name, changed, prefix, tmp_path):
    arguments = {**ARGUMENTS, **changed}
    params = random_params(arguments)
    table = kind(name).with_prefix(prefix)
    tensors = engine.export_tensors(params, table.rules(arguments))
    assert find_table({key: x.shape for key, x in tensors.items()}).kind == name
    weights = written(tmp_path, tensors)
    family, found = convert.recognize(weights)
    assert family == "vit"
    assert found == {k: v for k, v in arguments.items() if k not in RUN_ARGUMENTS}
    back = convert.import_weights(weights, target(arguments), found)
    assert back.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(np.asarray(back[path]), value, err_msg=path)


def test_exports_take_augregs_names_where_the_class_token_has_a_position():
    assert table_for_export("npz", "vit", ARGUMENTS).kind == "augreg"
    assert table_for_export("npz", "vit", {**ARGUMENTS, "position_prefix": 0}).kind == "big_vision"
    assert table_for_export("npz", "vit", {**ARGUMENTS, **MAP}).kind == "big_vision"


@pytest.mark.parametrize(
    "changed",
    [
        {"activation": "gelu"},
        {"layer_norm_eps": 1e-12},
        {"image_size": (12, 8)},
        {"image_size": (13, 13)},
        {"num_registers": 1},
        {"layer_scale": 0.1},
        {"pre_norm": True},
        {"qkv_bias": False},
        {"pool": "avg", "norm_after_pool": True},
    ],
)
def test_what_the_file_cannot_say_is_refused(changed):
    with pytest.raises(UserError, match="npz has no vit that is such a model"):
        table_for_export("npz", "vit", {**ARGUMENTS, **changed})


def test_the_hidden_layer_before_old_heads_is_named(tmp_path):
    table = kind("augreg").with_prefix("")
    tensors = engine.export_tensors(random_params(ARGUMENTS), table.rules(ARGUMENTS))
    tensors |= {
        "pre_logits/kernel": np.zeros((16, 16), np.float32),
        "pre_logits/bias": np.zeros(16, np.float32),
    }
    weights = written(tmp_path, tensors)
    _, found = convert.recognize(weights)
    with pytest.raises(UserError, match="pre_logits/bias, pre_logits/kernel"):
        convert.import_weights(weights, target(found), found)
    # For another head it can be left out, together with the old one, on purpose.
    head = ("head/kernel", "head/bias")
    flat = convert.import_weights(
        weights, target(found), found, reinitialized=head, dropped=(r"pre_logits/.*",)
    )
    assert set(flat) == set(target(found)) - set(head)


def test_text_towers_and_optimizers_are_left_out_and_nothing_else(tmp_path):
    arguments = {**ARGUMENTS, **MAP, "num_classes": 0}
    table = kind("big_vision scanned").with_prefix("params/img/")
    tensors = engine.export_tensors(random_params(arguments), table.rules(arguments))
    others = ("params/t", "params/b", "params/txt/Encoder_0/x", "opt/0/mu/img/embedding/kernel")
    tensors |= {name: np.zeros(1, np.float32) for name in others}
    weights = written(tmp_path, tensors)
    _, found = convert.recognize(weights)
    convert.import_weights(weights, target(found), found)
    stray = "params/img/Transformer/encoderblock/LayerNorm_7/scale"
    weights = written(tmp_path, {**tensors, stray: np.zeros((3, 16), np.float32)})
    with pytest.raises(UserError, match="LayerNorm_7/scale"):
        convert.import_weights(weights, target(found), found)


def test_blocks_of_different_depths_are_an_error(tmp_path):
    arguments = {**ARGUMENTS, **MAP}
    table = kind("big_vision scanned").with_prefix("")
    tensors = dict(engine.export_tensors(random_params(arguments), table.rules(arguments)))
    name = "Transformer/encoderblock/MlpBlock_0/Dense_1/bias"
    tensors[name] = tensors[name][:2]
    weights = written(tmp_path, tensors)
    _, found = convert.recognize(weights)
    with pytest.raises(UserError, match=r"1 do not fit: .*MlpBlock_0/Dense_1/bias"):
        convert.import_weights(weights, target(found), found)
    query = "Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"
    with pytest.raises(UserError, match=r"query/kernel is no kernel of width x heads x channels"):
        convert.recognize(written(tmp_path, {**tensors, query: np.zeros((3, 16), np.float32)}))


def test_half_precision_is_read_and_damage_is_an_error(tmp_path):
    values = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16)
    write_npz(tmp_path / "half.npz", {"x": values})
    np.testing.assert_array_equal(open_npz(tmp_path / "half.npz")["x"], values)
    data = (tmp_path / "half.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(data[: len(data) // 2])
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    for name in ("short.npz", "objects.npz"):
        with pytest.raises(UserError, match=name):
            open_npz(tmp_path / name)


def test_a_runs_own_file_takes_any_vit_by_timms_names():
    odd = {**ARGUMENTS, "layer_norm_eps": 1e-12, "pool": "token_avg", "head_bias": False}
    with pytest.raises(UserError, match="timm has no vit that is such a model"):
        table_for_export("timm", "vit", odd)
    with pytest.raises(UserError, match="transformers has no vit that is such a model"):
        naming_for_export("transformers", "vit", odd)
    params = random_params(odd)
    tensors = engine.export_tensors(params, naming_for_export("timm", "vit", odd).rules(odd))
    assert len(tensors) == len(params)
