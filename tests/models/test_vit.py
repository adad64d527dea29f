"""The ViT without torch: golden outputs, sizes, dropped branches, variants."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from vision_jax import convert
from vision_jax.errors import UserError
from vision_jax.models.families import build_model, find_variant
from vision_jax.models.vit import VARIANTS, build_vit, variant_arguments
from vision_jax.trees.paths import flatten, unflatten

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {
    "num_classes": 3,
    "image_size": (12, 8),
    "patch_size": 4,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_width": 24,
}


def small(**arguments):
    return build_vit(**{**SMALL, **arguments})


def abstract(model):
    images = jnp.zeros((1, *model.image_size, model.in_channels))
    return jax.eval_shape(lambda key: model.init(key, images)["params"], jax.random.key(0))


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), abstract(model)
    )


def random_images(model, seed=1, count=4):
    size = (count, *model.image_size, model.in_channels)
    return jnp.asarray(np.random.default_rng(seed).random(size), jnp.float32)


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.long(but=("transformers_clip",))
@pytest.mark.parametrize(
    "name", sorted(path.parent.name for path in GOLDEN.glob("*/model.safetensors"))
)
def test_blocks_and_logits_equal_the_golden_outputs(name):
    weights = convert.read_weights(str(GOLDEN / name))
    golden = safetensors.numpy.load_file(GOLDEN / name / "outputs.safetensors")
    family, arguments = convert.recognize(weights)
    model = build_model(family, **arguments)
    like = abstract(model)
    params = unflatten(like, convert.import_weights(weights, flatten(like), arguments))
    logits, features = jax.jit(
        lambda params, images: model.apply({"params": params}, images, return_features=True)
    )(params, golden["images"])
    for index in range(model.depth):
        block = f"block_{index}"
        assert relative(features[block], golden[block]) <= 1e-5, block
    assert relative(logits, golden["logits"]) <= 1e-5


@pytest.mark.long(but=("size1",))
@pytest.mark.parametrize("size", [(4, 20), (15, 11)])
def test_any_image_size(size):
    model = small(image_size=size)
    params, images = random_params(model), random_images(model)
    assert model.grid == (size[0] // 4, size[1] // 4)
    assert params["pos_embed"].shape == (1, 1 + model.grid[0] * model.grid[1], 16)
    logits = jax.jit(model.apply)({"params": params}, images)
    assert logits.shape == (4, 3)
    whole = (size[0] // 4 * 4, size[1] // 4 * 4)  # what fills no patch is not seen
    cut = jax.jit(small(image_size=whole).apply)(
        {"params": params}, images[:, : whole[0], : whole[1]]
    )
    np.testing.assert_array_equal(logits, cut)


@pytest.mark.long
def test_randomness_in_training_is_a_function_of_the_key_under_scan():
    model = small(scan=True, drop_path=0.5, dropout=0.3)
    params, images = random_params(model), random_images(model, count=16)
    apply = jax.jit(
        lambda params, key: model.apply(
            {"params": params}, images, train=True, rngs={"dropout": key}
        )
    )
    first = apply(params, jax.random.key(1))
    np.testing.assert_array_equal(first, apply(params, jax.random.key(1)))
    assert relative(first, apply(params, jax.random.key(2))) > 1e-3


def test_drop_path_drops_whole_branches_of_single_images_and_rescales():
    """Of one block at the last depth, each image's output is one of four combinations."""
    model = small(depth=2, drop_path=0.25)
    params, images = random_params(model), random_images(model, count=1)
    images = jnp.repeat(images, 64, axis=0)
    _, features = jax.jit(
        lambda params: model.apply(
            {"params": params},
            images,
            train=True,
            return_features=True,
            rngs={"dropout": jax.random.key(0)},
        )
    )(params)
    first = np.asarray(features["block_0"])
    np.testing.assert_allclose(first, first[:1].repeat(64, 0), rtol=1e-5, atol=1e-5)  # rate 0
    change = np.asarray(features["block_1"]) - first
    kinds = np.unique(np.round(change[:, 0, 0], 3))
    assert 2 <= len(kinds) <= 4
    kept = np.abs(change).max(axis=(1, 2)) > 0
    assert 0.8 < kept.mean() <= 1  # both branches fall with probability 1/16


@pytest.mark.parametrize("variant", ["b16", "x/16", "b/15", "/16", "b/16/2"])
def test_unknown_variants_name_the_known(variant):
    with pytest.raises(UserError, match="for example 'b/16'"):
        variant_arguments(variant)


@pytest.mark.long(but=("vit_tiny_patch16_224", "deit_base_distilled_patch16_224"))
@pytest.mark.parametrize("name", VARIANTS)
def test_timms_names_are_variants(name):
    family, arguments = find_variant(f"{name}.some_tag")
    assert (family, arguments) == ("vit", VARIANTS[name])
    arguments |= {"depth": 1, "num_classes": 1, "image_size": (arguments["patch_size"],) * 2}
    shapes = flatten(abstract(build_vit(**arguments)))
    assert shapes["patch_embed/kernel"].shape[-1] == arguments["width"]


def test_a_variants_arguments_are_the_callers_to_change():
    find_variant("vit_base_patch16_224")[1]["depth"] = 1
    assert find_variant("vit_base_patch16_224")[1]["depth"] == 12


def test_an_unknown_pooling_is_named():
    with pytest.raises(UserError, match="'cls' is none of token, avg"):
        abstract(small(pool="cls"))


def test_layers_of_norms():
    assert small(pre_norm=True).layer_of("norm_pre/scale") == 0
    layers = [small(norm_after_pool=after).layer_of("norm/scale") for after in (False, True)]
    assert layers == [2, 3]  # of the last block, as in timm, or of the head
