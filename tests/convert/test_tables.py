"""Which table a file is of, and which a model goes to: what the errors say."""

import re

import jax
import jax.numpy as jnp
import pytest

from vision_jax.convert import engine
from vision_jax.convert.files import Tensor, Tensors
from vision_jax.convert.load import export_weights
from vision_jax.convert.tables import (
    TABLES,
    ZOO,
    find_table,
    infer_arguments,
    shapes_of,
    table_for_export,
)
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES, build_model, find_variant
from vision_jax.trees.paths import flatten


def arguments_of(name, **more):
    family, given = find_variant(name)
    return family, {**FAMILIES[family].defaults, "num_classes": 3, **given, **more}


def written(name, to, **more):
    """Shapes by name, one number each, of a file in another library's naming."""
    family, arguments = arguments_of(name, **more)
    table = table_for_export(to, family, arguments)
    names = (
        rule.names if hasattr(rule, "names") else (rule.name,) for rule in table.rules(arguments)
    )
    return table, {name: (1,) for group in names for name in group}


def test_an_unknown_file_is_told_its_nearest_candidates():
    shapes = {"bn1.running_mean": (4,), "layer1.0.conv1.weight": (4, 4, 3, 3), "other": (2,)}
    with pytest.raises(UserError) as caught:
        find_table(shapes)
    message = str(caught.value)
    assert "\n" not in message
    for family in FAMILIES:
        assert family in message
    assert "timm resnet (timm) needs layer1.0.bn2.running_var" in message
    assert message.index("timm resnet") < message.index("the file has 3 tensors")
    assert "bn1.running_mean, layer1.0.conv1.weight, other" in message


def test_an_empty_file_and_a_foreign_one():
    for shapes in ({}, {f"bert.layer.{i}.weight": (2, 2) for i in range(40)}):
        with pytest.raises(UserError, match=f"the file has {len(shapes)} tensors") as caught:
            find_table(shapes)
        assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("resnet50", {"timm", "torchvision", "transformers"}),
        ("resnet50d", {"timm"}),
        ("resnext50_32x4d", {"timm", "torchvision"}),
        ("regnety_004", {"timm", "torchvision", "transformers"}),
        ("regnetx_004_tv", {"timm", "torchvision", "transformers"}),
        ("convnext_tiny", {"timm", "torchvision", "transformers"}),
        ("convnext_atto", {"timm", "transformers"}),
        ("convnextv2_tiny", {"timm", "transformers"}),
        ("convnext_atto_ols", {"timm"}),
    ],
)
def test_a_model_goes_to_the_libraries_that_have_it(name, sources):
    family, arguments = arguments_of(name)
    for to in ("timm", "torchvision", "transformers", "npz"):
        if to in sources:
            table = table_for_export(to, family, arguments)
            assert (table.source, table.family, len(table.prefixes)) == (to, family, 1)
        else:
            listed = re.escape(", ".join(sorted(sources)))
            message = f"^{to} has no {family} that is such a model: it can go to {listed}$"
            with pytest.raises(UserError, match=message):
                table_for_export(to, family, arguments)


def test_what_no_library_has_can_go_nowhere():
    family, arguments = arguments_of("resnet50", stem_pool=False)
    with pytest.raises(UserError, match="nor has any other library: keep its file"):
        table_for_export("timm", family, arguments)
    with pytest.raises(UserError, match="nor has any other library: keep its file"):
        table_for_export("timm", family, {**arguments, "stem_pool": True, "dilation": True})
    with pytest.raises(UserError, match="keras has no resnet"):
        table_for_export("keras", family, arguments)


def test_a_model_without_a_head_is_written_bare():
    for classes, prefix in ((3, "resnet."), (0, "")):
        table, shapes = written("resnet50", "transformers", num_classes=classes)
        assert table.prefixes == (prefix,)
        assert f"{prefix}embedder.embedder.convolution.weight" in shapes


def test_a_header_of_ours_is_the_best_witness():
    table, shapes = written("resnet50", "timm")
    header = {"vision_jax": {"arguments": {"depths": [3, 4], "mean": [0.5]}}}
    assert infer_arguments(table, shapes, header) == {"depths": (3, 4), "mean": (0.5,)}


def test_the_zoos_names_are_unique_and_say_their_source():
    names = [entry.name for entry in ZOO]
    assert len(names) == len(set(names)) >= 120
    sources = {"timm", "torchvision", "transformers", "npz", "detr", "yolox", "nanodet"}
    sources |= {"diffusers", "dit", "fid"}
    assert {entry.source for entry in ZOO} == sources
    assert {table.family for table in TABLES} == set(FAMILIES)
    kinds = [(table.source, table.family, table.kind) for table in TABLES]
    assert len(kinds) == len(set(kinds))
    assert all(entry.image_size > 0 for entry in ZOO)
    # timm's own metadata say the license; OpenAI's pages of CLIP name none.
    unlicensed = [e.name for e in ZOO if e.source != "timm" and e.published and not e.license]
    assert all(name.startswith("transformers/clip-") for name in unlicensed), unlicensed


@pytest.mark.long(
    but=("resnet18-{'output_stride': 8}", "vit_tiny_patch16_224-{'mlp_layer': 'glumlp'}")
)
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("resnet18", {"output_stride": 8}),
        ("resnet18", {"aa_layer": "avg"}),
        ("resnet18", {"global_pool": "max"}),
        ("convnext_atto", {"output_stride": 16}),
        ("convnext_atto", {"act_layer": "relu"}),
        ("regnety_002", {"linear_out": True}),
        ("mobilenetv2_050", {"norm_layer": "groupnorm"}),
        ("vit_tiny_patch16_224", {"mlp_layer": "glumlp"}),
        ("swin_tiny_patch4_window7_224", {"always_partition": True}),
        ("beit_base_patch16_224", {"norm_layer": "rmsnorm"}),
    ],
    ids=str,
)
def test_what_a_config_says_and_no_tensor_shows_is_not_overlooked(name, given):
    family, arguments = arguments_of(name)
    tensors, _ = export_weights(shapes_in(family, arguments), family, arguments)
    shapes = shapes_of(tensors)
    table = find_table(shapes)

    def infer(**more):
        config = {"architecture": name, "model_args": {"drop_path_rate": 0.1, **more}}
        return infer_arguments(table, shapes, {"config": config})

    assert infer()["num_classes"] == 3
    (word,) = given
    with pytest.raises(UserError, match=word):
        infer(**given)


# A model of each naming that can be written, as "source: variant".
READ_BACK = (
    *("timm: vit_tiny_patch16_224", "torchvision: vit_tiny_patch16_224"),
    *("transformers: vit_tiny_patch16_224", "timm: beit_base_patch16_224"),
    *("transformers: beit_base_patch16_224", "timm: resnet18"),
    *("transformers: resnet18", "timm: regnetx_002", "transformers: regnetx_002"),
    *("torchvision: regnety_004", "timm: efficientnet_b0", "torchvision: efficientnet_b0"),
    *("efficientnet_pytorch: efficientnet_b0", "timm: mobilenetv2_050"),
    *("torchvision: mobilenetv2_050", "transformers: mobilenetv2_050"),
    *("torchvision: mobilenet_v3_small", "timm: convnext_atto", "torchvision: convnext_tiny"),
    *("transformers: convnext_atto", "transformers: convnextv2_atto"),
    *("timm: swin_tiny_patch4_window7_224", "torchvision: swin_tiny_patch4_window7_224"),
    *("transformers: swin_tiny_patch4_window7_224", "transformers: swinv2_tiny_window8_256"),
    *("transformers: detr_resnet50", "detr: detr_resnet50", "transformers: rf_detr_nano"),
    *("yolox: yolox_nano", "torchvision: fasterrcnn_resnet50_fpn", "nanodet: nanodet_g"),
    *("torchvision: retinanet_resnet50_fpn", "torchvision: retinanet_resnet50_fpn_v2"),
    *("torchvision: fcos_resnet50_fpn", "smp: unet_resnet18", "smp: unet_resnet50"),
    *("transformers: upernet_resnet18", "transformers: upernet_convnext_tiny"),
    "transformers: upernet_swin_tiny_patch4_window7_224",
    *("diffusers: autoencoder_kl_sd", "diffusers: autoencoder_kl_sd3"),
    *("diffusers: autoencoder_tiny_sd", "dit: dit_s_2", "diffusers: dit_s_4", "dit: sit_b_8"),
    "dit: jit_b_16",
)
TOLD = {  # what the naming computes by, where the variant's own arguments differ
    "efficientnet_pytorch: efficientnet_b0": {"same_padding": True, "batch_norm_eps": 1e-3},
    "torchvision: swin_tiny_patch4_window7_224": {"library": "torchvision"},
    "transformers: swin_tiny_patch4_window7_224": {"library": "transformers"},
    "transformers: swinv2_tiny_window8_256": {"library": "transformers"},
    "transformers: rf_detr_nano": {"image_size": (384, 384)},
    "diffusers: dit_s_4": {"time_shift": 1, "mlp_norm_eps": 1e-5},
    **{
        f"diffusers: autoencoder_{name}": {"num_classes": 0}
        for name in ("kl_sd", "kl_sd3", "tiny_sd")
    },
}
QUICKLY = tuple(name for name in READ_BACK if "mobilenet" in name)


@pytest.mark.long(but=QUICKLY)
@pytest.mark.parametrize("naming", READ_BACK)
def test_each_naming_is_read_as_it_is_written(naming):
    source, name = naming.split(": ")
    family, arguments = arguments_of(name, **TOLD.get(naming, {}))
    if "image_size" in FAMILIES[family].required:
        arguments.setdefault("image_size", (224, 224))
    table = table_for_export(source, family, arguments)
    tensors = engine.export_lazily(shapes_in(family, arguments), table.rules(arguments))
    shapes = shapes_of(tensors)
    found = find_table(shapes)
    assert (found.source, found.family, found.kind) == (source, family, table.kind)
    inferred = infer_arguments(found, shapes, {"config": table.config(arguments)})
    assert inferred == {argument: arguments[argument] for argument in inferred}
    assert {"num_classes"} < set(inferred)


def shapes_in(family, arguments):
    """The model's arrays by path, without numbers."""
    model = build_model(family, **arguments)
    channels = arguments.get("in_channels", 3)
    images = jnp.zeros((1, *(arguments.get("image_size") or (64, 64)), channels))
    like = jax.eval_shape(model.init, jax.random.key(0), images)
    flat = {path: leaf for tree in like.values() for path, leaf in flatten(tree).items()}
    return Tensors({path: Tensor(leaf.shape, leaf.dtype, dict) for path, leaf in flat.items()})


def test_no_other_library_is_given_a_detr_with_grid_queries():
    for source in ("transformers", "detr"):
        family, arguments = arguments_of("detr_resnet50", grid_queries=True)
        table = table_for_export(source, family, arguments)
        with pytest.raises(UserError, match="grid_queries: no other DETR has them"):
            table.config(arguments)
        table.config(arguments | {"grid_queries": False})
