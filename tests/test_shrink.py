"""Students cut out of bigger weights by config, against trees that are put together by hand."""

import re
from functools import partial

import jax
import numpy as np
import pytest
import runs
from test_setup import Prepared

from vision_jax import convert, sharding
from vision_jax.commands import plan
from vision_jax.config import check_ranges
from vision_jax.errors import UserError
from vision_jax.models import families
from vision_jax.models.families import FAMILIES
from vision_jax.run import shrink
from vision_jax.run.description import (
    build_model,
    describe,
    load_description,
    read_weights,
    save_description,
)
from vision_jax.run.parameters import headless_parameters
from vision_jax.run.prepare import prepare
from vision_jax.trees import paths, surgery

VIT = {
    "num_classes": 3, "image_size": (16, 16), "patch_size": 8, "width": 16, "depth": 3,
    "num_heads": 4, "mlp_width": 24,
}  # fmt: skip
RESNET = {
    "num_classes": 3, "depths": (3, 2), "widths": (4, 8), "stem_width": 4, "block": "basic",
}  # fmt: skip
FULL = {"recipes": "()", "trainable": ".*"}


def shapes_of(family, arguments, size=(16, 16)):
    model = families.build_model(family, **arguments)
    tree = jax.eval_shape(lambda: families.initialize(model, jax.random.key(0), size))
    return model, {p: x for part in tree.values() for p, x in paths.flatten(part).items()}


def draw(rng, x):
    return np.asarray(rng.integers(1, 9) if x.dtype == np.int32 else rng.random(x.shape), x.dtype)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """{family: (file, its arrays by path)} of random weights."""
    found, rng = {}, np.random.default_rng(0)
    for family, arguments in (("vit", VIT), ("resnet", RESNET)):
        model, shapes = shapes_of(family, arguments)
        arrays = {path: draw(rng, leaf) for path, leaf in shapes.items()}
        file = tmp_path_factory.mktemp("weights") / f"{family}.safetensors"
        tensors, header = convert.export_weights(
            arrays, family, convert.arguments_of(model), preprocessing={"image_size": (16, 16)}
        )
        convert.write_safetensors(file, tensors, header)
        found[family] = str(file), arrays
    return found


def imported(prepared):
    """All arrays but the new head's, by path."""
    flat = prepared.trainable | prepared.frozen | paths.flatten(prepared.model_state)
    return {path: np.asarray(x) for path, x in flat.items() if not path.startswith("head/")}


def check_same(found, wanted):
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def renamed(arrays, names):
    """Arrays of a student: {its path or layer: the teacher's}, and all else but the head."""
    taken = {}
    for path, array in arrays.items():
        row = re.match(r"(stage_\d/)?block_\d", path)
        if row is None and not path.startswith("head/"):
            taken[path] = array
        for new, old in names.items():
            if row is not None and row[0] == old:
                taken[new + path.removeprefix(old)] = array
    return taken


def test_chosen_blocks_are_bit_identical_to_the_teachers(teachers, tmp_path):
    file, arrays = teachers["vit"]
    student = Prepared(model__weights=file, model__layers='(("block", (2, 0)),)', **FULL)
    assert student.description.arguments["depth"] == 2
    assert student.fresh == ["head/bias", "head/kernel"]
    check_same(imported(student), renamed(arrays, {"block_0": "block_2", "block_1": "block_0"}))
    # The workdir's description rebuilds it without the weights.
    save_description(student.description, tmp_path / "model.json")
    again = load_description(tmp_path / "model.json")
    assert build_model(student.config, again) == student.model


def test_a_block_may_be_taken_twice(teachers):
    file, arrays = teachers["vit"]
    twice = Prepared(model__weights=file, model__layers='(("block", (1, 1)),)', **FULL)
    check_same(imported(twice), renamed(arrays, {"block_0": "block_1", "block_1": "block_1"}))


def test_a_block_that_is_reinitialized_is_named_as_the_students(teachers):
    file, arrays = teachers["vit"]
    rules = "('head/.*', 'block_1/.*')"
    student = Prepared(
        model__weights=file, model__layers='(("block", (1, 2)),)', model__reinitialize=rules, **FULL
    )
    kept = {p: x for p, x in imported(student).items() if not p.startswith("block_1/")}
    check_same(kept, renamed(arrays, {"block_0": "block_1"}))
    kernel = imported(student)["block_1/mlp/fc1/kernel"]
    assert (kernel != arrays["block_2/mlp/fc1/kernel"]).all()


@pytest.mark.long
def test_the_whole_width_is_the_import_without(teachers):
    fields = {"model__weights": teachers["vit"][0], "model__layers": '(("block", (1,)),)', **FULL}
    whole, plain = Prepared(model__width=16, model__mlp_width=24, **fields), Prepared(**fields)
    assert whole.description == plain.description
    check_same(imported(whole), imported(plain))


@pytest.mark.long
def test_a_narrower_shallower_student_trains_its_adapters(teachers):
    file, arrays = teachers["vit"]
    student = Prepared(
        model__weights=file,
        model__layers='(("block", (2,)),)',
        model__width=8,
        model__mlp_width=10,
        optim__warmup_steps=0,
        lora__rules=".*/qkv/kernel",
    )
    names = ("depth", "width", "num_heads", "mlp_width")
    assert [student.description.arguments[name] for name in names] == [1, 8, 2, 10]
    narrow = partial(surgery.narrow_vit, num_heads=4, width=8, mlp_width=10)
    wanted = paths.flatten(jax.jit(narrow)(paths.nest(renamed(arrays, {"block_0": "block_2"}))))
    bases = {
        path.removesuffix("/base"): x
        for path, x in imported(student).items()
        if not path.endswith(("/a", "/b"))
    }
    check_same(bases, wanted)
    before, state, metrics = student.step(2)  # LoRA's A moves once B has
    assert np.isfinite(float(metrics["loss"]))
    assert "block_0/attn/qkv/kernel/a" in before
    for path, array in state.trainable.items():
        assert (np.asarray(array) != before[path]).any(), path


def test_a_resnets_blocks_bring_their_statistics(teachers):
    file, arrays = teachers["resnet"]
    student = Prepared(
        model__weights=file,
        model__layers='(("stage_0/block", (0, 2)), ("stage_1/block", 1))',
        **FULL,
    )
    assert student.description.arguments["depths"] == (2, 1)
    kept = {"stage_0/block_0": "stage_0/block_0", "stage_0/block_1": "stage_0/block_2"}
    wanted = renamed(arrays, kept | {"stage_1/block_0": "stage_1/block_0"})
    assert "stage_0/block_1/bn1/mean" in wanted
    check_same(imported(student), wanted)


def test_a_students_arrays_are_sharded_as_the_config_says(teachers):
    config = runs.tiny_config(
        model__weights=teachers["vit"][0],
        model__layers='(("block", 1),)',
        model__mlp_width=16,
        sharding_rules='((".*/fc1/kernel", (None, "fsdp")),)',
        **FULL,
    )
    mesh = sharding.make_mesh(data=1, fsdp=8)
    run = prepare(config, runs.CLASSES, mesh=mesh)
    layout = run.parameters
    params = run.make_arrays()[0].trainable
    assert {path: x.sharding for path, x in params.items()} == layout.shardings
    assert params["block_0/mlp/fc1/kernel"].addressable_shards[0].data.shape == (16, 2)


def test_features_of_a_student_without_a_head(teachers):
    file, arrays = teachers["resnet"]
    config = runs.tiny_config(model__weights=file, model__layers='(("stage_0/block", 1),)')
    weights = read_weights(config)
    description = describe(config, weights, runs.CLASSES, headless=True)
    model = build_model(config, description)
    mesh = sharding.make_mesh(data=8, fsdp=1)
    params, statistics = headless_parameters(config, model, (16, 16), mesh, weights)
    kept = {f"stage_{stage}/block_{index}" for stage, index in ((0, 0), (1, 0), (1, 1))}
    found = paths.flatten(params) | paths.flatten(statistics)
    check_same(found, renamed(arrays, {name: name for name in kept}))


def test_plans_are_the_students_with_and_without_the_weights(teachers):
    fields = {"model__layers": '(("block", (0,)),)', "model__width": 4}
    file = teachers["vit"][0]
    sizes = [
        (name, VIT[name]) for name in ("patch_size", "width", "depth", "num_heads", "mlp_width")
    ]
    known = {"model__variant": "vit", "model__arguments": tuple(sizes)}
    for more in ({"model__weights": file}, {"model__weights": "gone.safetensors", **known}):
        config = runs.tiny_config(**fields, **more)
        description, notes = plan.describe_planned(config)
        assert len(notes) == ("gone" in more["model__weights"])
        arguments = description.arguments
        assert [arguments[n] for n in ("depth", "width", "num_heads", "mlp_width")] == [1, 4, 1, 24]
        assert "block_1" not in prepare(config, description=description).parameters.like


# Each family's rows, and a student of some of them.
ROWS = {
    "beit": ({"block": 1}, {**VIT, "depth": 2}),
    "mae": (
        {"block": (1,), "decoder/block": (0, 2)},
        {**VIT, "num_classes": 0, "depth": 2, "decoder_width": 8, "decoder_depth": 3,
         "decoder_num_heads": 2, "decoder_mlp_width": 8},
    ),
    "dino": (
        {"block": (1,)},
        {**VIT, "num_classes": 0, "depth": 2, "prototypes": 6, "head_width": 8, "bottleneck": 4},
    ),
    "simclr": (
        {"block": (1,)},
        {**VIT, "num_classes": 0, "depth": 2, "head_width": 8, "projection": 4},
    ),
    "siglip": (
        {"block": (1,), "text/block": (0, 2)},
        {**VIT, "num_classes": 0, "depth": 2, "vocab_size": 9, "text_length": 4, "text_width": 8,
         "text_depth": 3, "text_num_heads": 2, "text_mlp_width": 8},
    ),
    "dit": (
        {"block": (1,)},
        {"num_classes": 3, "image_size": (16, 16), "patch_size": 8, "width": 8, "depth": 2,
         "num_heads": 2, "mlp_width": 8, "in_channels": 3},
    ),
    "swin": (
        {"stage_1/block": (1,)},
        {"num_classes": 3, "image_size": (16, 16), "width": 8, "depths": (1, 2),
         "num_heads": (1, 2), "windows": ((2, 2), (2, 2))},
    ),
    "convnext": (
        {"stage_1/block": (1,)}, {"num_classes": 3, "depths": (1, 2), "widths": (8, 12)}
    ),
    "regnet": (
        {"stage_1/block": (0, 2)},
        {"num_classes": 3, "depths": (1, 3), "widths": (8, 16), "group_widths": (8, 8)},
    ),
    "efficientnet": (
        {"stage_1/block": (0, 2)},
        {"num_classes": 3, "depths": (1, 3), "widths": (8, 16), "kernels": (3, 3),
         "expansions": (1.0, (2.0, 3.0, 4.0)), "strides": (1, 2)},
    ),
    "faster_rcnn": (
        {"backbone/stage_1/block": (0, 2)},
        {"num_classes": 3, "depths": (1, 3), "widths": (4, 8), "stem_width": 4, "width": 8,
         "anchor_sizes": (8, 16, 32), "head_width": 8, "proposals": 4},
    ),
    "fcos": (
        {"backbone/stage_1/block": (0, 2)},
        {"num_classes": 3, "depths": (1, 3), "widths": (4, 8), "stem_width": 4, "width": 8,
         "head_groups": 2, "point_sizes": (8, 16, 32), "candidates": 4},
    ),
    "retinanet": (
        {"backbone/stage_1/block": (0, 2)},
        {"num_classes": 3, "depths": (1, 3), "widths": (4, 8), "stem_width": 4, "width": 8,
         "anchor_sizes": (8, 16, 32), "candidates": 4},
    ),
    "deeplab": (
        {"backbone/stage_1/block": (0, 2)},
        {"num_classes": 3, "depths": (1, 3), "widths": (4, 8), "stem_width": 4, "width": 8,
         "rates": (2,)},
    ),
    "eomt": (
        {"block": (1, 2)},
        {**VIT, "depth": 3, "num_queries": 3, "num_blocks": 1, "upscale_blocks": 1},
    ),
    "mit": (
        {"stage_1/block": (1,)},
        {"num_classes": 3, "depths": (1, 2), "widths": (8, 10), "num_heads": (1, 2),
         "reductions": (2, 1)},
    ),
    "segformer": (
        {"backbone/stage_1/block": (1,)},
        {"num_classes": 3, "depths": (1, 2), "widths": (8, 10), "num_heads": (1, 2),
         "reductions": (2, 1), "decoder_width": 8},
    ),
    "detr": (
        {"encoder": (1,), "decoder": 2, "backbone/stage_0/block": (0, 2)},
        {"num_classes": 3, "depths": (3, 1), "widths": (4, 8), "stem_width": 4, "num_queries": 4,
         "width": 16, "num_heads": 2, "mlp_width": 16, "encoder_depth": 2, "decoder_depth": 3},
    ),
    "nanodet": (
        {"stage_3/block": (0, 2)},
        {"num_classes": 3, "depths": (1, 2, 2, 3), "stem_width": 4, "width": 8},
    ),
    "rf_detr": (
        {"decoder": (1,)},
        {"num_classes": 3, "image_size": (16, 16), "position_grid": 4, "decoder_depth": 2,
         "patch_size": 4, "feature_depths": (1,), "global_blocks": (), "backbone_width": 8,
         "backbone_depth": 1, "backbone_heads": 1, "backbone_mlp_width": 8, "width": 8,
         "projector_width": 8, "projector_blocks": 1, "num_queries": 4, "num_groups": 1,
         "num_heads": 1, "cross_heads": 1, "mlp_width": 8},
    ),
}  # fmt: skip


@pytest.mark.long(but=["convnext"])
@pytest.mark.parametrize("family", ROWS)
def test_what_is_taken_fits_the_student(family):
    layers, arguments = ROWS[family]
    shrinking = shrink.plan_shrinking(
        family, arguments, layers=tuple(layers.items()), width=0, mlp_width=0
    )
    size = (32, 32) if family == "nanodet" else (16, 16)
    _, whole = shapes_of(family, arguments, size)
    _, wanted = shapes_of(family, {**arguments, **shrinking.after}, size)
    taken = paths.flatten(surgery.take_layers(paths.nest(whole), shrinking.layers))
    assert taken.keys() < whole.keys()
    assert taken == wanted


MESSAGES = [
    ({"model__layers": '(("blok", 2),)'}, "vit has no row 'blok' of block: did you mean `block`?"),
    ({"model__layers": '(("block", (0, 3)),)'}, "block (0, 3): take some of 0 to 2"),
    ({"model__layers": '(("block", ()),)'}, "block (): take some of 0 to 2"),
    ({"model__layers": '(("block", 4),)'}, "4 layers of a teacher of 3: take 1 to 3"),
    (
        {"model__width": 6},
        "config.model.width 6: take a multiple of 4, the size of a head, up to 16",
    ),
    ({"model__width": 20}, "config.model.width 20: take a multiple of 4"),
    ({"model__mlp_width": 25}, "config.model.mlp_width 25: take 1 to 24"),
    ({"model__weights": "", "model__width": 8}, "take a part of weights: set config.model.weights"),
]


@pytest.mark.parametrize(("fields", "message"), MESSAGES)
def test_what_the_weights_cannot_give(fields, message, teachers):
    random = {"model__variant": "vit", "model__arguments": tuple(VIT.items())[2:]}
    given = random if "model__weights" in fields else {"model__weights": teachers["vit"][0]}
    config = runs.tiny_config(**given, **fields)
    with pytest.raises(UserError, match=re.escape(message)):
        describe(config, read_weights(config), runs.CLASSES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model__width": 8},
            "config.model.width: narrower is made of a ViT only, not of a resnet",
        ),
        ({"model__mlp_width": 8}, "config.model.mlp_width: narrower is made of a ViT only"),
        ({"model__layers": '(("block", 2),)'}, "no row 'block' of stage_0/block, stage_1/block"),
        ({"model__layers": '(("stage_0/block", (1, 2)),)'}, "begin with 0, and take it once"),
        ({"model__layers": '(("stage_0/block", (0, 0)),)'}, "begin with 0, and take it once"),
    ],
)
def test_what_a_resnet_cannot_give(fields, message, teachers):
    config = runs.tiny_config(model__weights=teachers["resnet"][0], **fields)
    with pytest.raises(UserError, match=re.escape(message)):
        describe(config, read_weights(config), runs.CLASSES)


@pytest.mark.parametrize(
    "layers",
    ['("block", 2)', '(("block", 2.0),)', '((2, "block"),)', '(("block", 1), ("block", 2))',
     '(("block", ("a",)),)', '(("block", True),)'],
)  # fmt: skip
def test_layers_that_are_written_otherwise(layers):
    with pytest.raises(UserError, match=r"config.model.layers is .*it must be a tuple of \(row"):
        check_ranges(runs.tiny_config(model__layers=layers))


def test_every_family_can_lose_layers():
    # Of which there are smaller variants.
    whole = {"yolox", "unet", "upernet", "autoencoder_kl", "autoencoder_tiny", "inception"}
    assert {*ROWS, *whole, "vit", "resnet"} == FAMILIES.keys()
    for family in whole:
        with pytest.raises(UserError, match=f"{family} has no row 'block' of none"):
            shrink.plan_shrinking(family, {}, layers=(("block", 1),), width=0, mlp_width=0)


@pytest.mark.long
def test_weights_of_layers_not_taken_must_be_there_too(teachers):
    config = runs.tiny_config(
        model__weights=teachers["vit"][0], model__layers='(("block", (0,)),)', **FULL
    )
    weights = read_weights(config)
    tensors = {name: np.asarray(x) for name, x in weights.tensors.items()}
    del tensors["blocks.2.mlp.fc1.weight"]
    mesh = sharding.make_mesh(data=8, fsdp=1)
    damaged = convert.Weights(**{**vars(weights), "tensors": tensors})
    run = prepare(config, runs.CLASSES, weights=damaged, mesh=mesh)
    with pytest.raises(UserError, match=r"block_2/mlp/fc1/kernel"):
        run.make_arrays()
