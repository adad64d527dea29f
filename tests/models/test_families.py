"""Named intermediates: the outputs stay as they are, and what is not named costs nothing."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.models.families import (
    apply_with_features,
    build_model,
    check_image_size,
    initialize,
)

VIT = {
    "image_size": (8, 8), "patch_size": 4, "width": 16, "depth": 3, "num_heads": 2, "mlp_width": 24,
}  # fmt: skip
RESNET = {"depths": (1, 1), "widths": (8, 16), "stem_width": 8}
IMAGES = jnp.asarray(np.random.default_rng(0).random((2, 8, 8, 3)), jnp.float32)


def build(rng: np.random.Generator, family: str, images=IMAGES, **arguments):
    model = build_model(family, num_classes=3, **arguments)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)

    def draw(leaf):
        return jnp.asarray(np.abs(rng.normal(size=leaf.shape)) * 0.3, leaf.dtype)

    return model, jax.tree.map(draw, shapes)


def flops(function, *arrays) -> float:
    return jax.jit(function).lower(*arrays).compile().cost_analysis()["flops"]


class Counted(nn.Module):
    """A model that says when it is traced."""

    told: Callable[[], None]
    in_channels: int = 3

    @nn.compact
    def __call__(self, images):
        self.told()
        return nn.Dense(4, name="head")(images.mean((1, 2)))


def test_a_model_is_traced_once_for_all_who_ask_for_its_arrays():
    """Who asks has the same program as without; another size is another trace."""
    calls: list[int] = []
    told = partial(calls.append, 1)  # equal models are one model

    def begin(key):
        return initialize(Counted(told), key, (4, 4))["params"]["head"]["bias"]

    def begin_plainly(key):
        return Counted(told).init(key, jnp.zeros((1, 4, 4, 3)))["params"]["head"]["bias"]

    def program(function):
        return jax.jit(function).lower(jax.random.key(0)).as_text().partition("\n")[2]

    for _ in range(2):
        jax.eval_shape(lambda key: begin(key), jax.random.key(0))
    programs = [program(lambda key: begin(key)) for _ in range(2)]
    assert len(calls) == 1
    assert programs == [program(begin_plainly)] * 2
    initialize(Counted(told), jax.random.key(0), (8, 8))
    assert len(calls) == 3


@pytest.mark.long(but=("resnet-arguments5-names5",))
@pytest.mark.parametrize(
    ("family", "arguments", "names"),
    [
        ("vit", VIT, ["embed", "block_1", "pooled"]),
        ("vit", {**VIT, "distillation_token": True, "position_prefix": 2}, ["head", "head_dist"]),
        ("vit", {**VIT, "remat": True}, ["block_0/attention", "block_2/attention"]),
        ("vit", {**VIT, "qk_norm": True}, ["block_1/attention"]),
        ("vit", {**VIT, "scan": True}, ["block_1"]),
        ("resnet", RESNET, ["stem", "stage_0", "stage_1"]),
    ],
)
def test_outputs_are_bit_identical_with_features(family, arguments, names, rng):
    model, variables = build(rng, family, **arguments)
    expected = jax.jit(model.apply)(variables, IMAGES)
    apply = jax.jit(partial(apply_with_features, model, names=names))
    outputs, features = apply(variables, IMAGES)
    np.testing.assert_array_equal(outputs, expected)
    assert set(features) == set(names)
    assert all(len(feature) == len(IMAGES) for feature in features.values())


@pytest.mark.long
def test_what_is_not_named_costs_nothing(rng):
    model, variables = build(rng, "vit", **VIT)
    plain = flops(model.apply, variables, IMAGES)

    def features_of(*names):
        return partial(apply_with_features, model, names=names)

    assert flops(features_of(), variables, IMAGES) == plain
    assert flops(features_of("block_1", "pooled"), variables, IMAGES) == plain
    one = flops(features_of("block_1/attention"), variables, IMAGES) - plain
    two = flops(features_of("block_0/attention", "block_1/attention"), variables, IMAGES) - plain
    assert one <= 2 * 2 * 2 * 5 * 5 * (8 + 8)  # B·K·N·N·(d multiplications and additions, softmax)
    assert 0 < one < two < plain / 4

    def first(variables, images):  # without the logits, the rest of the teacher isn't run
        return features_of("block_0")(variables, images)[1]

    assert flops(first, variables, IMAGES) < 0.5 * plain


@pytest.mark.long
def test_attention_is_what_the_block_attended_with(rng):
    """Written out from the tokens that enter the block."""
    model, variables = build(rng, "vit", **{**VIT, "num_heads": 1})
    names = ["block_0", "block_0/attention", "block_1/attention"]
    _, features = jax.jit(partial(apply_with_features, model, names=names))(variables, IMAGES)
    block = variables["params"]["block_1"]
    x = features["block_0"]
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    y = (x - mean) / jnp.sqrt(variance + 1e-6)
    scale, bias = (block["norm1"][name].reshape(1, 1, -1) for name in ("scale", "bias"))
    qkv = (y * scale + bias) @ block["attn"]["qkv"]["kernel"]
    q, k, _ = jnp.split(qkv + block["attn"]["qkv"]["bias"].reshape(1, 1, -1), 3, axis=-1)
    expected = jax.nn.softmax(q @ k.swapaxes(1, 2) / 4)
    np.testing.assert_allclose(features["block_1/attention"][:, 0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(features["block_0/attention"].sum(-1), 1, rtol=1e-5)


@pytest.mark.long
def test_running_statistics_change_as_without_features(rng):
    model, variables = build(rng, "resnet", **RESNET)
    arguments = {"train": True, "mutable": ["batch_stats"]}
    expected, changed = jax.jit(partial(model.apply, **arguments))(variables, IMAGES)
    (outputs, features), ours = jax.jit(
        partial(apply_with_features, model, names=["stage_1"], **arguments)
    )(variables, IMAGES)
    np.testing.assert_array_equal(outputs, expected)
    assert features["stage_1"].shape == (2, 1, 1, 64)
    assert list(ours) == ["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, ours, changed)


@pytest.mark.long
def test_gradients_flow_through_features(rng):
    model, variables = build(rng, "vit", **{**VIT, "remat": True})

    def loss(params):
        _, features = apply_with_features(
            model, {"params": params}, IMAGES, names=["block_1/attention"], train=True
        )
        return jnp.square(features["block_1/attention"]).sum()

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    assert np.abs(gradient["block_1"]["attn"]["qkv"]["kernel"]).max() > 0
    assert not np.abs(gradient["block_2"]["attn"]["qkv"]["kernel"]).any()


@pytest.mark.long(but=("vit-arguments1-block_0/attention-; set model.scan=False",))
@pytest.mark.parametrize(
    ("family", "arguments", "name", "message"),
    [
        ("vit", VIT, "block_3", "vit gives no 'block_3' of embed, .*did you mean `block_"),
        ("vit", {**VIT, "scan": True}, "block_0/attention", "; set model.scan=False"),
        ("vit", VIT, "block_0/attn", "did you mean `block_0/attention`"),
        ("resnet", RESNET, "block_0/attention", "resnet gives no 'block_0/attention' of stem"),
    ],
)
def test_unknown_names_are_refused(family, arguments, name, message, rng):
    model, variables = build(rng, family, **arguments)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(partial(apply_with_features, model, names=[name]), variables, IMAGES)


SWIN = {
    "depths": (1, 1), "num_heads": (2, 2), "windows": ((2, 2), (2, 2)), "width": 16,
    "image_size": (11, 8),
}  # fmt: skip
CONVNEXT = {"depths": (1, 1), "widths": (8, 16)}


@pytest.mark.long(but=["vit"])
@pytest.mark.parametrize(
    ("family", "arguments", "cut"),
    [
        ("vit", {**VIT, "depth": 1, "image_size": (11, 8)}, 3),
        ("swin", SWIN, 3),
        ("swin", {**SWIN, "library": "transformers"}, 0),  # which pads
        ("convnext", CONVNEXT, 3),
        ("convnext", {**CONVNEXT, "stem_widths": (8,)}, 0),
        ("resnet", RESNET, 0),
    ],
    ids=["vit", "swin", "swin padded", "convnext", "convnext overlapping", "resnet"],
)
def test_the_size_divisor_tells_what_a_model_would_not_see(family, arguments, cut, rng):
    images = jnp.asarray(rng.random((1, 11, 8, 3)), jnp.float32)
    model, variables = build(rng, family, images, **arguments)
    gradient = jax.jit(jax.grad(lambda images: model.apply(variables, images)[0, 0]))(images)
    unseen = (np.abs(gradient).sum((0, 2, 3)) == 0).sum()
    assert unseen == cut == 11 % getattr(model, "size_divisor", 1)
    if cut:
        said = r"size: of 11 pixels .* the last 3: take a multiple of 4, such as 8 or 12"
        with pytest.raises(UserError, match=said):
            check_image_size(model, (8, 11), "size")
        check_image_size(model, (8, 12), "size")


def test_images_of_which_nothing_is_left_are_refused(rng):
    model, variables = build(rng, "convnext", **CONVNEXT)
    with pytest.raises(
        UserError, match=r"of \(4, 7\) pixels are too small, nothing .* for stage 1"
    ):
        jax.eval_shape(model.apply, variables, jnp.zeros((1, 4, 7, 3)))
