"""All tables, and which of them a file is."""

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vision_jax.convert import (
    autoencoder_kl,
    autoencoder_tiny,
    beit,
    convnext,
    deeplab,
    detr,
    dino,
    dit,
    efficientnet,
    eomt,
    faster_rcnn,
    fcos,
    inception,
    mae,
    mit,
    nanodet,
    regnet,
    resnet,
    retinanet,
    rf_detr,
    segformer,
    siglip,
    simclr,
    swin,
    unet,
    upernet,
    vit,
    yolox,
)
from vision_jax.convert.fields import check_seen, check_values
from vision_jax.convert.files import Tensors, strip_prefixes
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table, without_prefix
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES, check_arguments
from vision_jax.models.widths import PRUNED

# The first that matches is the one, so where one table's anchors contain another's it stands first.
TABLES: tuple[Table, ...] = (
    *eomt.TABLES,
    *beit.TABLES,
    *vit.TABLES,
    *resnet.TABLES,
    *regnet.TABLES,
    *efficientnet.TABLES,
    *convnext.TABLES,
    *inception.TABLES,
    *swin.TABLES,
    *detr.TABLES,
    *rf_detr.TABLES,
    *yolox.TABLES,
    *faster_rcnn.TABLES,
    *fcos.TABLES,
    *retinanet.TABLES,
    *nanodet.TABLES,
    *segformer.TABLES,
    *deeplab.TABLES,
    *mit.TABLES,
    *unet.TABLES,
    *upernet.TABLES,
    *mae.TABLES,  # last: what these take is a ViT's too
    *dino.TABLES,
    *simclr.TABLES,
    *siglip.TABLES,
    *autoencoder_kl.TABLES,
    *autoencoder_tiny.TABLES,
    *dit.TABLES,
)
ZOOS: tuple[tuple[str, tuple[Entry, ...]], ...] = tuple(
    (module.TABLES[0].family, module.ZOO)
    for module in (
        beit,
        vit,
        resnet,
        regnet,
        efficientnet,
        convnext,
        inception,
        swin,
        detr,
        rf_detr,
        yolox,
        faster_rcnn,
        fcos,
        retinanet,
        nanodet,
        eomt,
        segformer,
        deeplab,
        mit,
        unet,
        upernet,
        mae,
        dino,
        simclr,
        siglip,
        autoencoder_kl,
        autoencoder_tiny,
        dit,
    )
)
ZOO: tuple[Entry, ...] = tuple(entry for _, entries in ZOOS for entry in entries)

CANDIDATES = 4  # named by the error for a file that none of the tables knows


def find_table(shapes: Shapes, family: str = "") -> Table:
    """The table of the file whose tensors have these names and shapes, its prefix filled in.

    Args:
      shapes: by name.
      family: "mae" keeps the decoder of an MAE's file, which is a ViT's otherwise, "dino" and
        "simclr" the heads of such a one and "siglip" the text tower; others change nothing.

    Raises:
      UserError: none; names the nearest candidates and what the file lacks of each.
    """
    around = family in FAMILIES and FAMILIES[family].wraps != ""
    for table in sorted(TABLES, key=lambda table: not (around and table.family == family)):
        if (found := table.matches(shapes)) is not None:
            return found

    def found_share(table: Table) -> float:
        return sum(anchor in shapes for anchor in table.anchors) / len(table.anchors)

    filled = [table.with_prefix(prefix) for table in TABLES for prefix in table.prefixes]
    nearest = sorted(filled, key=found_share, reverse=True)[:CANDIDATES]
    lacks = "; ".join(
        f"{table.source} {table.family} ({table.kind}) needs "
        + (next((a for a in table.anchors if a not in shapes), "") or "other shapes")
        for table in nearest
    )
    if beside := _beside(shapes):
        raise UserError(beside)
    families = sorted({table.family for table in TABLES})
    first = ", ".join(sorted(shapes)[:5])
    raise UserError(
        f"no architecture that is known here ({', '.join(families)}): the nearest candidates: "
        f"{lacks}; the file has {len(shapes)} tensors: {first} ..."
    )


def _beside(shapes: Shapes) -> str:
    """What to drop of a file in which other tensors stand beside a known model's, or nothing."""
    parts = Counter(name.partition(".")[0] for name in shapes if "." in name)
    for part, _ in parts.most_common(CANDIDATES):
        inside = {name: shape for name, shape in shapes.items() if name.startswith(f"{part}.")}
        bare = strip_prefixes({name.removeprefix(f"{part}."): inside[name] for name in inside})
        table = next((table for table in TABLES if table.matches(bare) is not None), None)
        others = sorted(set(shapes) - set(inside))
        if table is not None and others:
            tops = dict.fromkeys(name.partition(".")[0] for name in others)
            rule = "|".join(re.escape(top) for top in list(tops)[:CANDIDATES])
            return (
                f"{len(inside)} tensors under {part!r} are {table.source} {table.family} "
                f"({table.kind}), and {len(others)} others are beside them: "
                f"{', '.join(others[:CANDIDATES])}; leave those out with config.model.drop (--drop "
                f"of the converter), for example ({rule})(\\..*)?"
            )
    return ""


def infer_arguments(table: Table, shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    """The model's arguments for a recognized file; our own header is the best witness.

    Raises:
      UserError: the file is a relative that the model cannot be.
    """
    ours = metadata.get("vision_jax", {}).get("arguments")
    if isinstance(ours, dict):  # JSON keeps tuples as lists
        found = {name: as_tuples(value) for name, value in ours.items()}
        if metadata["vision_jax"].get("family") in (None, table.family):
            return found
        # A part of what the header describes: the ViT in an MAE.
        return {name: x for name, x in found.items() if name in FAMILIES[table.family].arguments}
    (prefix,) = table.prefixes
    bare, config = without_prefix(shapes, prefix), metadata.get("config", {})
    if config.get("library") == "torchvision":
        _check_builder(config.get("kwargs") or {})
    if table.fields is None or not config:
        return table.arguments(bare, metadata)
    check_values(config, table.fields)
    found = table.arguments(bare, metadata)
    check_arguments(table.family, found)
    check_seen(config, table.fields, table.config({**FAMILIES[table.family].defaults, **found}))
    return found


# Arguments of torchvision's builders that the tensors show, that a table reads, or of training.
_BUILDER = (
    "num_classes image_size patch_size num_layers num_heads hidden_dim mlp_dim width_mult groups "
    "width_per_group embed_dim depths window_size mlp_ratio block downsample_layer dropout "
    "attention_dropout stochastic_depth_prob zero_init_residual progress weights "
    "weights_backbone min_size max_size image_mean image_std rpn_pre_nms_top_n_test "
    "rpn_post_nms_top_n_test rpn_pre_nms_top_n_train rpn_post_nms_top_n_train "
    "rpn_score_thresh rpn_batch_size_per_image box_batch_size_per_image box_detections_per_img "
    "topk_candidates score_thresh detections_per_img center_sampling_radius aux_loss"
)


def _check_builder(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name not in _BUILDER.split() and value not in (None, False):
            raise UserError(
                f"config.json: {name} {value!r} of torchvision's builder is not supported: the "
                "model may compute otherwise"
            )


def table_for_export(to: str, family: str, arguments: Arguments) -> Table:
    """The table that names such a model in timm's, torchvision's or transformers' manner.

    Raises:
      UserError: no such naming, or it has no place for this model.
    """
    able = [table for table in TABLES if table.family == family and _holds(table, arguments)]
    for table in able:
        if table.source == to:
            bare = not arguments["num_classes"] and "" in table.prefixes
            return table.with_prefix("" if bare else table.prefixes[0])
    pruned = [f"{name} of {arguments[name]}" for name in PRUNED if arguments.get(name)]
    what = f"is pruned like this one, with a {pruned[0]}" if pruned else "is such a model"
    others = ", ".join(sorted({table.source for table in able}))
    raise UserError(
        f"{to} has no {family} that {what}: it can go to {others}"
        if able
        else f"{to} has no {family} that {what}, and nor has any other library: keep its file, "
        "which config.model.weights and vision_jax.load read"
    )


def _holds(table: Table, arguments: Arguments) -> bool:
    """Whether the naming has a place for all of such a model, whole or pruned."""
    pruned = {name for name in PRUNED if arguments.get(name)}
    return pruned <= set(table.pruned) and table.holds(arguments)


def is_held(to: str, family: str, arguments: Arguments) -> bool:
    """Whether the library `to` has such a model."""
    return any(
        (table.source, table.family) == (to, family) and _holds(table, arguments)
        for table in TABLES
    )


def naming_for_export(to: str, family: str, arguments: Arguments) -> Table:
    """`table_for_export`, but the names of a run's own files take any model of a family.

    They have a word for all parameters, also of a model that the config has none for (another
    epsilon, another pooling), and the header of a run's own file says what the config cannot.

    Raises:
      UserError: no such naming, or it has no place for this model.
    """
    try:
        return table_for_export(to, family, arguments)
    except UserError:
        named = [t for t in TABLES if (t.source, t.family) == (to, family)]
        if to != own_naming(family) or not named:
            raise
        table = named[-1] if to == "timm" else named[0]
        return table.with_prefix(table.prefixes[0])


def own_naming(family: str) -> str:
    """Whose naming a run's own files take: timm's where it has the family, else transformers'.

    Of a family that neither has, its own repository's.
    """
    sources = [table.source for table in TABLES if table.family == family]
    return next((name for name in ("timm", "transformers") if name in sources), sources[0])


def published(name: str) -> tuple[str, str]:
    """(family, weights for `read_weights`) of a name of the zoo or another variant of timm's.

    Args:
      name: "timm/NAME", with or without the tag of one of its weights ("timm/NAME.TAG"),
        "torchvision/NAME" or "transformers/NAME".

    Raises:
      UserError: no such name, or nobody publishes weights of it; with the nearest names.
    """
    source, _, build = name.partition("/")
    bare = name if source != "timm" else name.partition(".")[0]
    for family, zoo in ZOOS:
        entry = next((entry for entry in zoo if entry.name == bare), None)
        if entry is None:
            continue
        if source == "timm":
            return family, f"timm://{build}"
        if not entry.published:
            raise UserError(f"{name}: no published weights are known: give config.model.weights")
        return family, entry.published
    if source == "timm":
        for family, architecture in FAMILIES.items():
            if "_" in build and architecture.variant(build.partition(".")[0]) is not None:
                return family, f"timm://{build}"
    near = difflib.get_close_matches(bare, [entry.name for entry in ZOO], n=3)
    hint = f": did you mean {', '.join(near)}?" if near else ""
    raise UserError(f"{name} is not in the zoo{hint}; docs/zoo.md lists it")


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by name; tensors of a file are not read for it."""
    if isinstance(tensors, Tensors):
        return tensors.shapes
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def as_tuples(value: Any) -> Any:
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value
