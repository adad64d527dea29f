"""AugReg's and big_vision's files against timm's own reader of them (`_load_weights`).

The files are written here, name by name, from random values in the shapes that flax gives them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
from vit_references import npz_reference

from vision_jax import convert
from vision_jax.certify.measure import relative_error
from vision_jax.certify.random_weights import randomize
from vision_jax.certify.references import load_npz, load_weights, make_reference
from vision_jax.convert.tables import find_table, shapes_of
from vision_jax.errors import UserError
from vision_jax.models.families import build_model
from vision_jax.trees.paths import flatten, unflatten

WIDTH, HEADS, DEPTH, PATCH, GRID, CLASSES, HIDDEN = 24, 3, 2, 4, 3, 5, 40
SIDE = PATCH * GRID
SMALL = {
    "img_size": SIDE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "mlp_ratio": HIDDEN / WIDTH,
    "num_classes": CLASSES,
    "act_layer": "gelu_tanh",
}


def attention(prefix):
    shapes = {}
    for part in ("query", "key", "value"):
        shapes[f"{prefix}/{part}/kernel"] = (WIDTH, HEADS, WIDTH // HEADS)
        shapes[f"{prefix}/{part}/bias"] = (HEADS, WIDTH // HEADS)
    shapes[f"{prefix}/out/kernel"] = (HEADS, WIDTH // HEADS, WIDTH)
    shapes[f"{prefix}/out/bias"] = (WIDTH,)
    return shapes


def layer_norm(prefix):
    return {f"{prefix}/scale": (WIDTH,), f"{prefix}/bias": (WIDTH,)}


def mlp(prefix):
    return {
        f"{prefix}/Dense_0/kernel": (WIDTH, HIDDEN),
        f"{prefix}/Dense_0/bias": (HIDDEN,),
        f"{prefix}/Dense_1/kernel": (HIDDEN, WIDTH),
        f"{prefix}/Dense_1/bias": (WIDTH,),
    }


def block(names):
    mha, second, dense = names
    return {
        **layer_norm("LayerNorm_0"),
        **attention(f"MultiHeadDotProductAttention_{mha}"),
        **layer_norm(f"LayerNorm_{second}"),
        **mlp(f"MlpBlock_{dense}"),
    }


def file_shapes(kind, *, pool="token", scanned=False, channels=3, head=True):
    augreg = kind == "augreg"
    inner = block((1, 2, 3) if augreg else (0, 1, 0))
    shapes = {"embedding/kernel": (PATCH, PATCH, channels, WIDTH), "embedding/bias": (WIDTH,)}
    if pool == "token":
        shapes["cls"] = (1, 1, WIDTH)
    positions = "Transformer/posembed_input/pos_embedding" if augreg else "pos_embedding"
    shapes[positions] = (1, GRID * GRID + augreg, WIDTH)
    if scanned:
        shapes |= {f"Transformer/encoderblock/{k}": (DEPTH, *s) for k, s in inner.items()}
    else:
        for i in range(DEPTH):
            shapes |= {f"Transformer/encoderblock_{i}/{k}": s for k, s in inner.items()}
    shapes |= layer_norm("Transformer/encoder_norm")
    if pool == "map":
        shapes["MAPHead_0/probe"] = (1, 1, WIDTH)
        shapes |= attention("MAPHead_0/MultiHeadDotProductAttention_0")
        shapes |= layer_norm("MAPHead_0/LayerNorm_0") | mlp("MAPHead_0/MlpBlock_0")
    if head:
        shapes |= {"head/kernel": (WIDTH, CLASSES), "head/bias": (CLASSES,)}
    return shapes


def random_values(shapes, seed=0):
    rng = np.random.default_rng(seed)

    def value(name, shape):
        x = rng.normal(size=shape)
        if name.endswith("kernel"):
            x *= WIDTH**-0.5
        return (1 + 0.3 * x if name.endswith("scale") else x).astype(np.float32)

    return {name: value(name, shape) for name, shape in shapes.items()}


TEXT = {"params/t": (), "params/b": (), "params/txt/head/kernel": (8, 8)}
SIGLIP = {"class_token": False, "global_pool": "map"}
FILES = {
    # name: (file_shapes' arguments, prefix, other tensors, timm's architecture and arguments)
    "augreg": ({"kind": "augreg"}, "", {}, {}),
    "augreg, one channel": ({"kind": "augreg", "channels": 1}, "", {}, {"in_chans": 1}),
    "augreg, no head": ({"kind": "augreg", "head": False}, "", {}, {"num_classes": 0}),
    "augreg with optimizer": (
        {"kind": "augreg"},
        "opt/target/",
        {"opt/state/param_states/cls/momentum": (1, 1, WIDTH)},
        {},
    ),
    "big_vision": ({"kind": "big_vision"}, "params/", {}, {"no_embed_class": True}),
    "big_vision scanned": (
        {"kind": "big_vision", "scanned": True},
        "params/",
        {"opt/0/mu/cls": (1, 1, WIDTH)},
        {"no_embed_class": True},
    ),
    "big_vision gap": (
        {"kind": "big_vision", "pool": "avg"},
        "",
        {},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ),
    "siglip": (
        {"kind": "big_vision", "pool": "map", "scanned": True, "head": False},
        "params/img/",
        TEXT,
        {**SIGLIP, "num_classes": 0},
    ),
    "siglip, not scanned, with a head": (
        {"kind": "big_vision", "pool": "map"},
        "params/img/",
        TEXT,
        SIGLIP,
    ),
}


def written(name, folder):
    given, prefix, others, timms = FILES[name]
    values = random_values(file_shapes(**given))
    tensors = {prefix + key: x for key, x in values.items()} | random_values(others)
    np.savez(folder / "model.npz", **tensors)
    reference = make_reference("timm", "vit_tiny_patch16_224", {**SMALL, **timms})
    randomize(reference.module, 1)  # what the reader leaves alone shows
    reference.module.load_pretrained(str(folder / "model.npz"))
    return values, reference, convert.read_weights(str(folder / "model.npz"))


@pytest.mark.parametrize("name", FILES)
def test_files_give_what_timm_makes_of_them(name, tmp_path):
    values, reference, weights = written(name, tmp_path)
    family, arguments = convert.recognize(weights)
    assert (family, arguments["activation"], arguments["num_heads"]) == ("vit", "gelu_tanh", HEADS)
    size, channels = arguments["image_size"], arguments["in_channels"]
    assert size == (SIDE, SIDE)
    images = np.random.default_rng(2).random((2, *size, channels))
    sample = jnp.asarray(images, jnp.float32)
    like = jax.eval_shape(build_model(family, **arguments).init, jax.random.key(0), sample)[
        "params"
    ]
    flat = convert.import_weights(weights, flatten(like), arguments)
    for dtype, limit in (("float32", 1e-5), ("float64", 1e-12)):
        x = ((images - arguments["mean"]) / arguments["std"]).astype(dtype)
        theirs = reference.outputs(x)["logits"]
        with jax.enable_x64(dtype == "float64"):
            model = build_model(family, **arguments, dtype=jnp.dtype(dtype))
            params = {path: jnp.asarray(np.asarray(v), dtype) for path, v in flat.items()}
            ours = jax.jit(model.apply)(
                {"params": unflatten(like, params)}, jnp.asarray(images, dtype)
            )
        assert relative_error(np.asarray(ours), theirs) <= limit

    # The same table writes the same file, whether or not it is the one that exports choose.
    table = find_table(shapes_of(weights.tensors))
    again = convert.engine.export_tensors(flat, table.rules(arguments))
    prefix = FILES[name][1]
    assert set(again) == {prefix + key for key in values}
    for key, value in values.items():
        np.testing.assert_array_equal(again[prefix + key], value, err_msg=key)
        assert again[prefix + key].dtype == np.float32


@pytest.mark.parametrize("name", FILES)
def test_what_we_write_timm_reads_bit_identical(name, tmp_path):
    _, reference, weights = written(name, tmp_path)
    family, arguments = convert.recognize(weights)
    model = build_model(family, **arguments)
    images = jnp.zeros((1, *model.image_size, model.in_channels))
    like = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    flat = convert.import_weights(weights, flatten(like), arguments)
    tensors, _ = convert.export_weights(flat, family, arguments, to="npz")
    (tmp_path / "back").mkdir()
    np.savez(tmp_path / "back" / "model.npz", **tensors)
    again = make_reference("timm", reference.build, reference.arguments)
    load_npz(again.module, tmp_path / "back" / "model.npz")
    for key, value in reference.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[key], value), key


def test_loading_by_timm_is_strict(tmp_path):
    values, reference, _ = written("augreg", tmp_path)
    path = tmp_path / "other.npz"

    def complaint(tensors, match):
        np.savez(path, **tensors)
        with pytest.raises(RuntimeError, match=match):
            load_npz(reference.module, path)

    complaint({**values, "more": np.zeros(3, np.float32)}, "numbers, the model")
    complaint({k: x for k, x in values.items() if k != "cls"}, "timm finds no .*cls")
    headless = {k: x for k, x in values.items() if not k.startswith("head")}
    complaint(headless, r"nothing for head\.weight")
    npz, _ = npz_reference("vit_tiny_patch16_224", 32)
    with pytest.raises(UserError, match="is not for vit_tiny_patch16_224"):
        load_weights(npz, path)


def test_timms_published_augreg_models_are_of_these_sizes():
    """The architectures whose weights timm reads from such files have variants here."""
    from vision_jax.models.vit import VARIANTS

    names = {
        name.split(".")[0]
        for name in timm.list_pretrained("vit_*")
        if "augreg_" in name and "_r" not in name.split(".")[0]
    }
    assert names - set(VARIANTS) == set()
