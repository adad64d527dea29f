"""Pruning: what does nothing is cut for free, and what is left is a model of its family."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_jax
from vision_jax.commands.prune import main
from vision_jax.convert import (
    arguments_of,
    export_weights,
    import_weights,
    own_naming,
    read_weights,
    recognize,
    write_safetensors,
)
from vision_jax.convert.tables import table_for_export
from vision_jax.errors import UserError
from vision_jax.models.families import build_model
from vision_jax.run import prune
from vision_jax.trees import paths

VIT = {
    "num_classes": 3, "image_size": (8, 8), "patch_size": 4, "width": 16, "depth": 2,
    "num_heads": 4, "mlp_width": 24,
}  # fmt: skip
RESNET = {"num_classes": 3, "depths": (1, 2), "widths": (8, 16), "stem_width": 8}
SWIN = {
    "num_classes": 3, "image_size": (16, 16), "depths": (2, 1), "num_heads": (2, 4),
    "windows": ((2, 2), (2, 2)), "width": 8,
}  # fmt: skip
DETR = {
    **RESNET, "depths": (1, 1), "width": 16, "num_heads": 4, "mlp_width": 24,
    "encoder_depth": 1, "decoder_depth": 1, "num_queries": 5,
}  # fmt: skip

FREE = ("mlp", "heads")
CASES = {  # name -> family, arguments, what can be cut for free
    "vit": ("vit", VIT, FREE),
    "deit": ("vit", {**VIT, "distillation_token": True, "position_prefix": 2}, FREE),
    "swiglu": ("vit", {**VIT, "gated_mlp": True, "activation": "silu", "pool": "token_avg"}, FREE),
    "siglip": ("vit", {**VIT, "pool": "map", "class_token": False, "position_prefix": 0}, FREE),
    "qk_norm": ("vit", {**VIT, "qk_norm": True, "qkv_bias": False, "pre_norm": True}, FREE),
    "basic": ("resnet", {**RESNET, "block": "basic"}, ("channels", "inner")),
    "bottleneck": ("resnet", RESNET, ("channels", "inner")),
    "resnext": (
        "resnet",
        {**RESNET, "groups": 4, "base_width": 16, "stem_widths": (4, 6), "pooled_shortcut": True},
        ("channels", "inner"),
    ),
    "swin": ("swin", SWIN, FREE),
    "swin_v2": ("swin", {**SWIN, "version": 2}, FREE),
    "convnext": ("convnext", {"num_classes": 3, "depths": (1, 2), "widths": (8, 16)}, ("mlp",)),
    "detr": ("detr", DETR, ("channels", "inner", *FREE)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def make(rng, name, dtype=jnp.float64):
    family, arguments, what = CASES[name]
    model = build_model(family, **arguments, dtype=dtype)
    size = arguments.get("image_size", (32, 32))
    images = jnp.asarray(rng.random((2, *size, 3)), dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, dtype), shapes)
    for collection in variables:
        flat = paths.flatten(variables[collection])
        for path, x in flat.items():
            if path.endswith("/var"):
                flat[path] = x**2 + 0.1
            elif path.endswith("/count"):
                flat[path] = jnp.zeros((), jnp.int32)
            elif path.endswith("/qkv_bias"):  # timm's files have no key's
                flat[path] = x.at[len(x) // 3 : len(x) // 3 * 2].set(0)
        variables[collection] = paths.nest(flat)
    return model, variables, images, size, what


class Drawn:
    """Scores drawn at random, which remember what they were of."""

    def __init__(self, rng):
        self.rng, self.groups = rng, []

    def of(self, group):
        scores = self.rng.permutation(group.count)
        self.groups.append((group, scores))
        return scores


def silence(variables, cut, drawn):
    """Zeros in what writes the channels that were cut: all but the inputs of kernels."""
    flat = {p: np.array(x) for p, x in paths.flatten(variables["params"]).items()}
    left = paths.flatten(cut["params"])
    for group, scores in drawn.groups:
        (path, axis), members = next(
            (place, members) for place, members in group.members.items() if place[0] in left
        )
        count = left[path].shape[axis] * group.count // len(members)
        dead = np.argsort(-scores, kind="stable")[count:]
        for (path, axis), members in group.members.items():
            reads = path.endswith("kernel") and axis == flat[path].ndim - 2
            if path in flat and not reads:
                places = np.flatnonzero(np.isin(members, dead))
                flat[path][(slice(None),) * axis + (places,)] = 0
    return {**variables, "params": paths.nest({p: jnp.asarray(x) for p, x in flat.items()})}


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_what_is_silent_is_cut_for_free(rng, name):
    model, variables, images, size, what = make(rng, name)
    drawn = Drawn(rng)
    pruned = prune.prune(model, variables, size, drawn, keep=0.5, what=what, multiple=2)
    assert pruned.exact
    assert drawn.groups
    assert len(jax.tree.leaves(pruned.variables)) == len(jax.tree.leaves(variables))
    before = jax.jit(model.apply)(silence(variables, pruned.variables, drawn), images)
    after = jax.jit(pruned.model.apply)(pruned.variables, images)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-12 * np.abs(one).max())
    whole = jax.jit(model.apply)(variables, images)
    assert np.abs(jax.tree.leaves(whole)[0] - jax.tree.leaves(after)[0]).max() > 1e-3


@pytest.mark.long(but=("vit",))
@pytest.mark.parametrize("name", CASES)
def test_all_kinds_and_layers_leave_a_model_of_the_family(rng, name):
    model, variables, images, size, _ = make(rng, name)
    family = CASES[name][0]
    kinds = {
        "vit": ("channels", *FREE), "resnet": ("channels", "inner"), "swin": ("channels", *FREE),
        "convnext": ("channels", "mlp"), "detr": ("channels", "inner", *FREE),
    }[family]  # fmt: skip
    scores = prune.magnitude(variables["params"])
    pruned = prune.prune(
        model, variables, size, scores, keep=0.5, what=(*kinds, "layers"), multiple=2
    )
    outputs = jax.jit(pruned.model.apply)(pruned.variables, images)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outputs))
    count = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (variables, pruned.variables)]
    assert count[1] < 0.45 * count[0]


@pytest.mark.long(but=("vit",))
@pytest.mark.parametrize("name", CASES)
def test_file_of_a_pruned_model_is_read_bit_for_bit(rng, tmp_path, name):
    model, variables, _, size, what = make(rng, name)
    scores = prune.magnitude(variables["params"])
    cut = prune.prune(model, variables, size, scores, keep=0.5, what=what, multiple=2)
    family = CASES[name][0]
    flat = {
        p: np.asarray(x) for tree in cut.variables.values() for p, x in paths.flatten(tree).items()
    }
    arguments = arguments_of(cut.model)
    tensors, header = export_weights(flat, family, arguments, to=own_naming(family))
    write_safetensors(tmp_path / "model.safetensors", tensors, header)
    weights = read_weights(str(tmp_path / "model.safetensors"))
    read, found = recognize(weights)
    assert read == family
    assert {name: arguments[name] for name in found} == found
    imported = import_weights(weights, flat, found, place=lambda path, array: array)
    jax.tree.map(np.testing.assert_array_equal, imported, flat)


def test_arguments_say_no_more_than_they_must(rng):
    model, variables, _, size, _ = make(rng, "vit")
    scores = prune.magnitude(variables["params"])
    half = prune.prune(
        model, variables, size, scores, keep=0.5, what=("channels", "heads"), multiple=4
    ).model
    assert (half.width, half.num_heads, half.head_size) == (8, 2, None)
    heads = prune.prune(model, variables, size, scores, keep=0.5, what=("heads",)).model
    assert (heads.width, heads.num_heads, heads.head_size) == (16, 2, 4)
    same = prune.prune(model, variables, size, scores, keep=1.0, what=("heads", "mlp"))
    assert arguments_of(same.model) == arguments_of(model)
    jax.tree.map(np.testing.assert_array_equal, same.variables, variables)


def test_the_least_go(rng):
    model, variables, _, size, _ = make(rng, "vit")
    flat = paths.flatten(variables["params"])
    fc1 = flat["block_1/mlp/fc1/kernel"]
    flat["block_1/mlp/fc1/kernel"] = fc1.at[:, ::2].mul(100)
    variables = {"params": paths.nest(flat)}
    scores = prune.magnitude(variables["params"])
    pruned = prune.prune(model, variables, size, scores, keep=0.5, what=("mlp",), multiple=4)
    left = paths.flatten(pruned.variables["params"])
    np.testing.assert_array_equal(left["block_1/mlp/fc1/kernel"], 100 * fc1[:, ::2])
    np.testing.assert_array_equal(
        left["block_1/mlp/fc2/kernel"], flat["block_1/mlp/fc2/kernel"][::2]
    )


def test_taylor_is_the_derivative_by_a_gate(rng):
    """The sum of gradient · weight over what writes a hidden unit is that by a factor on it."""
    w, v, x = (rng.normal(size=shape) for shape in ((4, 6), (6, 3), (5, 4)))

    def loss(params, gate):
        return jnp.square(jnp.maximum(x @ params["w"], 0) * gate[None] @ params["v"]).sum()

    params, ones = {"w": w, "v": v}, jnp.ones(6)
    gradients, by_gate = jax.grad(loss, (0, 1))(params, ones)
    members = {("w", 1): np.arange(6), ("v", 0): np.arange(6)}
    scores = prune.taylor(params, [gradients]).of(prune.Group(members, 6, True))
    np.testing.assert_allclose(scores, np.square(2 * by_gate), rtol=1e-12)


def test_what_can_not_be_pruned_is_said(rng):
    model, variables, _, size, _ = make(rng, "vit")
    scores = prune.magnitude(variables["params"])
    for settings, reason in (
        ({"what": ("inner",), "keep": 0.5}, "a vit has channels, heads, mlp, layers"),
        ({"what": (), "keep": 0.5}, "nothing to prune"),
        ({"what": ("mlp",), "keep": 0.0}, "keep 0.0"),
    ):
        with pytest.raises(UserError, match=reason):
            prune.prune(model, variables, size, scores, **settings)


def test_command_leaves_a_model_that_loads_and_computes_the_same(tmp_path, capsys):
    out = tmp_path / "pruned"
    assert main(["embedded:vit_cifar10", "--keep=0.5", "--what=mlp", f"--to={out}"]) == 0
    loaded, whole = vision_jax.load(out), vision_jax.load("embedded:vit_cifar10")
    scores = prune.magnitude(whole.variables["params"])
    size = whole.preprocessing.image_size
    pruned = prune.prune(whole.model, whole.variables, size, scores, keep=0.5, what=("mlp",))
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, pruned.variables)
    assert loaded.model.mlp_width == 128
    assert loaded.class_names == whole.class_names
    report = json.loads((out / "pruning.json").read_text())
    tokens, blocks = 64, 6
    gone = report["before"]["macs"] - report["after"]["macs"]
    assert gone == blocks * tokens * 2 * 128 * 128
    assert f"macs {report['before']['macs']:,}" in capsys.readouterr().out


def test_command_says_what_it_needs(tmp_path, capsys):
    source, to = "embedded:vit_cifar10", f"--to={tmp_path / 'out'}"
    for arguments, reason in (
        ([source, "--keep=0.5", "--score=taylor", to], "needs a run's data"),
        ([source, "--keep=0.5", "--checkpoint=best", to], "is of the folder of a run"),
        ([source, "--keep=2", to], "--keep=2: give a share above 0 and below 1"),
        ([source, "--keep=1", to], "--keep=1: give a share above 0 and below 1"),
        ([source, "--keep=nan", to], "--keep=nan: give a share above 0 and below 1"),
        ([source, "--keep=0.5", "--batches=0", to], "--batches=0: give 1 or more"),
        ([source, "--keep=0.5", "--multiple=0", to], "--multiple=0: give 1 or more"),
        (
            [source, "--keep=0.5", "--what=mlp", "--multiple=999", to],
            "--multiple=999 leaves nothing to cut",
        ),
        (
            [source, "--keep=0.5", "--what=mlp,headz", to],
            "mlp, heads, layers: did you mean `heads`",
        ),
        ([source, to], "--keep"),
    ):
        assert main(arguments) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_libraries_are_named_what_they_lack():
    arguments = arguments_of(build_model("vit", **VIT, head_size=2))
    with pytest.raises(UserError, match="head_size of 2"):
        table_for_export("timm", "vit", arguments)
