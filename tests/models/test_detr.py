"""DETR without torch: canvases, masks, positions, and queries on a grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.models.detr import Detr, _grid, _nearness
from vision_jax.ops.position_embedding import sine_positions
from vision_jax.trees.paths import flatten, unflatten

SMALL = {
    "num_classes": 3,
    "depths": (1, 1, 2, 2),
    "widths": (4, 4, 8, 8),
    "stem_width": 8,
    "num_queries": 7,
    "width": 32,
    "num_heads": 4,
    "mlp_width": 48,
    "encoder_depth": 2,
    "decoder_depth": 2,
}
SHORT = {"depths": (1, 1), "widths": (4, 8), "encoder_depth": 1, "decoder_depth": 1}
FORMS = {
    "bottleneck": {},
    "basic": {"block": "basic"},
    "dc5": {"dilation": True},
    "grid_queries": {"grid_queries": True},
}


def small(**arguments):
    return Detr(**{**SMALL, **arguments})


def abstract(model):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, model.in_channels)))


def random_variables(model, seed=0):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        noise = rng.normal(size=leaf.shape)
        if leaf.ndim == 0:
            value = noise * 0
        elif leaf.ndim == 1:
            value = 1 + 0.1 * np.abs(noise)
        else:
            value = noise / noise[..., 0].size ** 0.5
        return jnp.asarray(value, leaf.dtype)

    return jax.tree.map(draw, abstract(model))


def random_images(size, count=2, seed=1):
    return jnp.asarray(np.random.default_rng(seed).random((count, *size, 3)), jnp.float32)


def on_canvas(images, size, fill=0.7):
    """(images padded with some color to a canvas, their pixel mask)."""
    count, height, width, _ = images.shape
    canvas = jnp.full((count, *size, 3), fill).at[:, :height, :width].set(images)
    return canvas, jnp.zeros((count, *size), bool).at[:, :height, :width].set(True)


def difference(ours, theirs):
    """Largest difference relative to the largest value, over all leaves."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


@pytest.mark.long(but=("basic", "grid_queries", "dc5"))
@pytest.mark.parametrize("form", FORMS)
def test_predictions_and_tokens(form):
    model, images = small(**FORMS[form]), jnp.zeros((2, 70, 50, 3))
    outputs, features = jax.eval_shape(
        lambda key: model.init_with_output(key, images, return_features=True)[0], jax.random.key(0)
    )
    assert outputs["logits"].shape == (2, 2, 7, 4)
    assert outputs["boxes_cxcywh_01"].shape == (2, 2, 7, 4)
    assert model.pyramid[-1] == ("stage_3", 16 if form == "dc5" else 32)
    tokens = features["input_proj"].shape[1] * features["input_proj"].shape[2]
    assert features["encoder_1"].shape == (2, tokens, 32)
    assert features["decoder_1"].shape == (2, 7, 32)


def on_canvases(form, dtype, canvases):
    """Outputs and maps of two images alone, and of the same images on each canvas."""
    model = small(**FORMS[form], dtype=dtype, encoder_depth=1, decoder_depth=1)
    variables = jax.tree.map(
        lambda x: x.astype(dtype) if x.ndim else x, random_variables(model, seed=2)
    )
    images = random_images((72, 58)).astype(dtype)  # even and odd numbers of cells
    apply = jax.jit(lambda *args: model.apply(*args, return_features=True))
    results = [apply(variables, images)]
    for size in canvases:
        outputs, features = apply(variables, *on_canvas(images, size))
        maps = {
            name: x[:, : like.shape[1], : like.shape[2]]
            for name, x in features.items()
            if (like := results[0][1][name]).ndim == 4
        }
        results.append((outputs, maps))
    return [(outputs, {name: maps[name] for name in results[1][1]}) for outputs, maps in results]


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_what_is_computed_of_an_image_does_not_depend_on_its_canvas(form):
    """Up to the order of sums: of other lengths in attention, and as the CPU's products block.

    In float64 nothing but rounding is left, where a single padded pixel would show.
    """
    with jax.enable_x64(True):
        alone, *others = on_canvases(
            form, jnp.float64, ((128, 96), (81, 58))[: 1 + (form == "dc5")]
        )
        for other in others:
            assert difference(other, alone) <= 1e-14
    if form == "bottleneck":
        (outputs, maps), (padded, padded_maps) = on_canvases(form, jnp.float32, ((128, 96),))
        assert difference(padded, outputs) <= 1e-6
        assert difference(padded_maps, maps) <= 1e-6
        for name in ("stem", "stage_0"):
            np.testing.assert_array_equal(padded_maps[name], maps[name])


@pytest.mark.long
def test_what_is_computed_of_an_image_does_not_depend_on_its_batch():
    """Bit-identical: neither the padding's content nor other images, one all padding, matter."""
    model = small(**SHORT)
    variables, images = random_variables(model), random_images((70, 50), 3)
    canvas, mask = on_canvas(images, (96, 64))
    apply = jax.jit(model.apply)
    outputs = apply(variables, canvas, mask)
    noise = jnp.where(mask[..., None], canvas, random_images((96, 64), 3, 5) * 1e3)
    jax.tree.map(np.testing.assert_array_equal, apply(variables, noise, mask), outputs)
    changed = apply(variables, canvas.at[2].set(0.3), mask.at[1].set(False).at[2, 40:].set(False))
    first = [jax.tree.map(lambda x: x[:, 0], tree) for tree in (changed, outputs)]
    jax.tree.map(np.testing.assert_array_equal, *first)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(changed))


@pytest.mark.long
def test_the_references_way_lets_padding_in():
    model = small(mask_padding=False, **SHORT)
    variables, images = random_variables(model), random_images((70, 50))
    alone = jax.jit(model.apply)(variables, images)
    padded = jax.jit(model.apply)(variables, *on_canvas(images, (128, 96)))
    assert difference(padded, alone) > 1e-3
    # But the padding's color does not matter: it is zero after the normalization.
    again = jax.jit(model.apply)(variables, *on_canvas(images, (128, 96), 0.2))
    jax.tree.map(np.testing.assert_array_equal, again, padded)


@pytest.mark.long
def test_gradients_are_finite_where_there_is_nothing_but_padding():
    images, mask = on_canvas(random_images((40, 64), 3), (64, 96))
    mask = mask.at[2].set(False)
    model = small(**SHORT)
    variables = random_variables(model)

    def loss(params):
        outputs = model.apply({**variables, "params": params}, images, mask)
        return sum(jnp.sin(x).sum() for x in outputs.values())

    gradients = flatten(jax.jit(jax.grad(loss))(variables["params"]))
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.long
def test_one_compile_for_all_masks_of_a_canvas():
    model = small(**SHORT)
    variables = random_variables(model)
    apply = jax.jit(model.apply)
    for height, width in ((64, 64), (40, 31), (1, 1)):
        apply(variables, *on_canvas(random_images((height, width)), (64, 64)))
    assert apply._cache_size() == 1


def test_sine_positions_count_the_valid_cells():
    """The definition, cell by cell in float64."""
    mask = np.zeros((2, 5, 7), bool)
    mask[0, :3, :5], mask[1] = True, True
    found = np.asarray(sine_positions(jnp.asarray(mask), 16))
    for image, (height, width) in enumerate(((3, 5), (5, 7))):
        for row in range(height):
            for column in range(width):
                expected = []
                for place, count in ((row, height), (column, width)):
                    angle = (place + 1) / (count + 1e-6) * 2 * np.pi
                    for frequency in 10000.0 ** (-np.arange(4) / 4):
                        expected += [np.sin(angle * frequency), np.cos(angle * frequency)]
                np.testing.assert_allclose(found[image, row, column], expected, atol=2e-6)


@pytest.mark.long
def test_grid_queries_need_no_other_parameters():
    assert flatten(abstract(small(grid_queries=True))) == flatten(abstract(small()))


@pytest.mark.long
def test_grid_queries_start_in_the_cells_of_a_grid():
    model = small(grid_queries=True)
    images = random_images((64, 64))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    boxes = jax.jit(model.apply)(variables, images)["boxes_cxcywh_01"]
    x, y = np.meshgrid([1 / 6, 3 / 6, 5 / 6], [1 / 6, 3 / 6, 5 / 6])
    grid = np.stack([x.ravel(), y.ravel(), np.full(9, 1 / 3), np.full(9, 1 / 3)], axis=-1)
    np.testing.assert_allclose(boxes, np.broadcast_to(grid[:7], (2, 2, 7, 4)), rtol=1e-6)
    for count in (1, 2, 3, 100):
        assert np.isfinite(_grid(count)).all()
        assert len(np.unique(_grid(count)[:, :2], axis=0)) == count


def test_grid_queries_look_near_their_boxes():
    """Against loops; the image is 3 by 4 cells of a map of 4 by 5."""
    rng = np.random.default_rng(0)
    boxes = rng.random((2, 3, 4)).astype(np.float32)
    valid = np.zeros((2, 4, 5), bool)
    valid[:, :3, :4] = True
    found = _nearness(jnp.asarray(boxes), jnp.asarray(valid), 6)
    assert found.shape == (2, 6, 3, 20)
    looks = [(-0.7, 0), (0.7, 0), (0, -0.7), (0, 0.7), (0, 0), (-0.7, 0)]
    for b, head, query, row, column in np.ndindex(2, 6, 3, 4, 5):
        cx, cy, w, h = boxes[b, query]
        x = ((column + 0.5) / 4 - cx) / (w / 2 + 1 / 8) - looks[head][0]
        y = ((row + 0.5) / 3 - cy) / (h / 2 + 1 / 6) - looks[head][1]
        expected = -(x**2 + y**2)
        np.testing.assert_allclose(found[b, head, query, 5 * row + column], expected, rtol=2e-5)


@pytest.mark.long
def test_grid_queries_move_boxes_from_layer_to_layer():
    """Each layer's box is its own move from the last one's, through which no gradient flows."""
    model = small(grid_queries=True)
    variables, images = random_variables(model), random_images((64, 64))
    flat = flatten(variables["params"])
    bias = flat["box_head/fc3/bias"]

    @jax.jit
    def logits(bias):
        params = unflatten(variables["params"], {**flat, "box_head/fc3/bias": bias})
        boxes = model.apply({**variables, "params": params}, images)["boxes_cxcywh_01"]
        return jnp.log(boxes / (1 - boxes))

    moves = logits(bias + 0.25) - logits(bias)
    np.testing.assert_allclose(moves[0], 0.25, atol=1e-5)  # the second's attention moves too
    gradient = jax.grad(lambda bias: logits(bias)[1].sum())(bias)
    np.testing.assert_allclose(gradient, np.full(4, 2 * 7), rtol=1e-4)  # images, queries; once each
