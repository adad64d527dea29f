"""Tables for Vision Transformers: timm, torchvision, and what transformers' save_pretrained writes.

Each `Table` says how to recognize its files, which rules rename them, and which tensors a ViT has
no use for. `{p}` stands for the prefix of the file at hand (`vit.`, `vision_model.`, or nothing).

Sources: timm 1.0 vision_transformer.py and deit.py; torchvision 0.29 models/vision_transformer.py;
transformers 5.23 (the *files*: its modules are named differently in memory).
"""

from collections.abc import Collection
from dataclasses import dataclass

from vision_jax.convert.engine import (
    ADD_1,
    ADD_2,
    CONV,
    COPY,
    LINEAR,
    SPLIT_BIAS,
    SPLIT_LINEAR,
    Layout,
    Rule,
    affine,
    fused,
    norm,
)
from vision_jax.errors import UserError


@dataclass(frozen=True)
class Table:
    """How one kind of file names a ViT.

    Attributes:
      source: "timm", "torchvision" or "transformers".
      family: which of the source's models.
      anchors: tensors that every such file has and by which it is recognized.
      rules: names in the file and paths in our tree.
      prefixes: what may stand for `{p}`; the first is what an export writes.
      dropped: regular expressions of tensors that these files carry and a ViT has no use for.
      defaults: `ViT`'s arguments that hold for these files unless their metadata says otherwise.
    """

    source: str
    family: str
    anchors: tuple[str, ...]
    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ("",)
    dropped: tuple[str, ...] = ()
    defaults: tuple[tuple[str, object], ...] = ()

    def with_prefix(self, prefix: str) -> "Table":
        """The table with `{p}` filled in."""

        def fill(text: str) -> str:
            return text.replace("{p}", prefix)

        rules = tuple(Rule(tuple(map(fill, r.names)), r.paths, r.layout) for r in self.rules)
        escaped = prefix.replace(".", r"\.")
        return Table(
            self.source,
            self.family,
            tuple(map(fill, self.anchors)),
            rules,
            (prefix,),
            tuple(text.replace("{p}", escaped) for text in self.dropped),
            self.defaults,
        )


def _one(name: str, path: str, layout: Layout = COPY) -> tuple[Rule]:
    return (Rule((name,), (path,), layout),)


def _timm(final_norm: str) -> tuple[Rule, ...]:
    block = "blocks.{i}"
    return (
        *affine("patch_embed.proj", "patch_embed", CONV),
        *_one("cls_token", "cls_token"),
        *_one("dist_token", "dist_token"),
        *_one("reg_token", "reg_token"),
        *_one("pos_embed", "pos_embed"),
        *norm("norm_pre", "norm_pre"),
        *norm(f"{block}.norm1", "block_{i}/norm1"),
        *affine(f"{block}.attn.qkv", "block_{i}/attn/qkv"),
        *norm(f"{block}.attn.q_norm", "block_{i}/attn/q_norm"),
        *norm(f"{block}.attn.k_norm", "block_{i}/attn/k_norm"),
        *affine(f"{block}.attn.proj", "block_{i}/attn/proj"),
        *_one(f"{block}.ls1.gamma", "block_{i}/layer_scale1"),
        *norm(f"{block}.norm2", "block_{i}/norm2"),
        *affine(f"{block}.mlp.fc1", "block_{i}/mlp/fc1"),
        *affine(f"{block}.mlp.fc2", "block_{i}/mlp/fc2"),
        *_one(f"{block}.ls2.gamma", "block_{i}/layer_scale2"),
        *norm(final_norm, "norm"),
        *_one("attn_pool.latent", "attn_pool/latent"),
        *affine("attn_pool.q", "attn_pool/q"),
        *affine("attn_pool.kv", "attn_pool/kv"),
        *affine("attn_pool.proj", "attn_pool/proj"),
        *norm("attn_pool.norm", "attn_pool/norm"),
        *affine("attn_pool.mlp.fc1", "attn_pool/mlp/fc1"),
        *affine("attn_pool.mlp.fc2", "attn_pool/mlp/fc2"),
        *affine("head", "head"),
        *affine("head_dist", "head_dist"),
    )


def _torchvision(fc1: str, fc2: str) -> tuple[Rule, ...]:
    block = "encoder.layers.encoder_layer_{i}"
    return (
        *affine("conv_proj", "patch_embed", CONV),
        *_one("class_token", "cls_token"),
        *_one("encoder.pos_embedding", "pos_embed"),
        *norm(f"{block}.ln_1", "block_{i}/norm1"),
        *_one(f"{block}.self_attention.in_proj_weight", "block_{i}/attn/qkv/kernel", LINEAR),
        *_one(f"{block}.self_attention.in_proj_bias", "block_{i}/attn/qkv/bias"),
        *affine(f"{block}.self_attention.out_proj", "block_{i}/attn/proj"),
        *norm(f"{block}.ln_2", "block_{i}/norm2"),
        *affine(f"{block}.mlp.{fc1}", "block_{i}/mlp/fc1"),
        *affine(f"{block}.mlp.{fc2}", "block_{i}/mlp/fc2"),
        *norm("encoder.ln", "norm"),
        *affine("heads.head", "head"),
    )


def _bert_embeddings() -> tuple[Rule, ...]:
    return (
        *affine("{p}embeddings.patch_embeddings.projection", "patch_embed", CONV),
        *_one("{p}embeddings.cls_token", "cls_token"),
        *_one("{p}embeddings.position_embeddings", "pos_embed"),
    )


def _bert_attention(block: str) -> tuple[Rule, ...]:
    parts = [f"{block}.attention.attention.{part}" for part in ("query", "key", "value")]
    return (
        *fused(parts, "block_{i}/attn/qkv"),
        *affine(f"{block}.attention.output.dense", "block_{i}/attn/proj"),
    )


def _transformers_vit() -> tuple[Rule, ...]:
    block = "{p}encoder.layer.{i}"
    return (
        *_bert_embeddings(),
        *norm(f"{block}.layernorm_before", "block_{i}/norm1"),
        *_bert_attention(block),
        *norm(f"{block}.layernorm_after", "block_{i}/norm2"),
        *affine(f"{block}.intermediate.dense", "block_{i}/mlp/fc1"),
        *affine(f"{block}.output.dense", "block_{i}/mlp/fc2"),
        *norm("{p}layernorm", "norm"),
    )


def _dinov2(fc1: str, fc2: str) -> tuple[Rule, ...]:
    block = "{p}encoder.layer.{i}"
    return (
        *_bert_embeddings(),
        *_one("{p}embeddings.register_tokens", "reg_token"),
        *norm(f"{block}.norm1", "block_{i}/norm1"),
        *_bert_attention(block),
        *_one(f"{block}.layer_scale1.lambda1", "block_{i}/layer_scale1"),
        *norm(f"{block}.norm2", "block_{i}/norm2"),
        *affine(f"{block}.mlp.{fc1}", "block_{i}/mlp/fc1"),
        *affine(f"{block}.mlp.{fc2}", "block_{i}/mlp/fc2"),
        *_one(f"{block}.layer_scale2.lambda1", "block_{i}/layer_scale2"),
        *norm("{p}layernorm", "norm"),
        *affine("classifier", "head"),
    )


def _clip_tower() -> tuple[Rule, ...]:
    block = "{p}encoder.layers.{i}"
    parts = [f"{block}.self_attn.{part}_proj" for part in ("q", "k", "v")]
    return (
        *affine("{p}embeddings.patch_embedding", "patch_embed", CONV),
        *_one("{p}embeddings.class_embedding", "cls_token", ADD_2),
        *_one("{p}embeddings.position_embedding.weight", "pos_embed", ADD_1),
        *norm("{p}pre_layrnorm", "norm_pre"),  # spelled so in the files
        *norm(f"{block}.layer_norm1", "block_{i}/norm1"),
        *fused(parts, "block_{i}/attn/qkv"),
        *affine(f"{block}.self_attn.out_proj", "block_{i}/attn/proj"),
        *norm(f"{block}.layer_norm2", "block_{i}/norm2"),
        *affine(f"{block}.mlp.fc1", "block_{i}/mlp/fc1"),
        *affine(f"{block}.mlp.fc2", "block_{i}/mlp/fc2"),
        *norm("{p}post_layernorm", "norm"),
    )


def _siglip_pool() -> tuple[Rule, ...]:
    in_proj = "{p}head.attention.in_proj"
    return (
        *_one("{p}head.probe", "attn_pool/latent"),
        Rule((f"{in_proj}_weight",), ("attn_pool/q/kernel", "attn_pool/kv/kernel"), SPLIT_LINEAR),
        Rule((f"{in_proj}_bias",), ("attn_pool/q/bias", "attn_pool/kv/bias"), SPLIT_BIAS),
        *affine("{p}head.attention.out_proj", "attn_pool/proj"),
        *norm("{p}head.layernorm", "attn_pool/norm"),
        *affine("{p}head.mlp.fc1", "attn_pool/mlp/fc1"),
        *affine("{p}head.mlp.fc2", "attn_pool/mlp/fc2"),
    )


_BERT_PATCHES = "{p}embeddings.patch_embeddings.projection.weight"
_CLIP_PATCHES = "{p}embeddings.patch_embedding.weight"
_TEXT_TOWER = (r"text_model\..*", r"text_projection\..*", "logit_scale", "logit_bias")
_INDICES = r"{p}embeddings\.position_ids"

# The first whose anchors are all there is the one, so the special stand before the general.
TABLES = (
    Table(
        "timm",
        "fc_norm",
        ("patch_embed.proj.weight", "blocks.0.norm1.weight", "fc_norm.weight"),
        _timm("fc_norm"),
        defaults=(("norm_after_pool", True), ("pool", "avg")),
    ),
    Table(
        "timm",
        "norm",
        ("patch_embed.proj.weight", "blocks.0.norm1.weight"),
        _timm("norm"),
        # MAE's and DINOv2's own pretraining files name their encoders as timm does.
        dropped=("mask_token", r"decoder_.*"),
    ),
    Table(
        "torchvision",
        "mlp.0",
        ("conv_proj.weight", "encoder.layers.encoder_layer_0.mlp.0.weight"),
        _torchvision("0", "3"),
    ),
    Table(
        "torchvision",
        "mlp.linear_1",  # the published files, from before torchvision 0.13
        ("conv_proj.weight", "encoder.layers.encoder_layer_0.mlp.linear_1.weight"),
        _torchvision("linear_1", "linear_2"),
    ),
    Table(
        "transformers",
        "deit_distilled",
        (_BERT_PATCHES, "{p}embeddings.distillation_token", "cls_classifier.weight"),
        (
            *_transformers_vit(),
            *_one("{p}embeddings.distillation_token", "dist_token"),
            *affine("cls_classifier", "head"),
            *affine("distillation_classifier", "head_dist"),
        ),
        prefixes=("deit.", ""),
        defaults=(("layer_norm_eps", 1e-12), ("position_prefix", 2)),
    ),
    Table(
        "transformers",
        "deit",  # with one head the distillation token is one register among the others
        (_BERT_PATCHES, "{p}embeddings.distillation_token"),
        (
            *_transformers_vit(),
            *_one("{p}embeddings.distillation_token", "reg_token"),
            *affine("classifier", "head"),
        ),
        prefixes=("deit.", ""),
        defaults=(("layer_norm_eps", 1e-12), ("position_prefix", 2)),
    ),
    Table(
        "transformers",
        "dinov2_swiglu",
        (_BERT_PATCHES, "{p}encoder.layer.0.mlp.weights_in.weight"),
        _dinov2("weights_in", "weights_out"),
        prefixes=("dinov2.", "dinov2_with_registers.", ""),
        dropped=(r"{p}embeddings\.mask_token",),
        defaults=(("position_prefix", 1),),
    ),
    Table(
        "transformers",
        "dinov2",
        (_BERT_PATCHES, "{p}encoder.layer.0.layer_scale1.lambda1"),
        _dinov2("fc1", "fc2"),
        prefixes=("dinov2.", "dinov2_with_registers.", ""),
        dropped=(r"{p}embeddings\.mask_token",),
        defaults=(("position_prefix", 1),),
    ),
    Table(
        "transformers",
        "vit",  # and the encoder of MAE
        (_BERT_PATCHES, "{p}encoder.layer.0.layernorm_before.weight"),
        (*_transformers_vit(), *affine("classifier", "head")),
        prefixes=("vit.", ""),
        dropped=(r"decoder\..*", _INDICES),
        defaults=(("layer_norm_eps", 1e-12), ("position_prefix", 1)),
    ),
    Table(
        "transformers",
        "clip",
        (_CLIP_PATCHES, "{p}embeddings.class_embedding"),
        (*_clip_tower(), *affine("visual_projection", "head")),
        prefixes=("vision_model.", ""),
        dropped=(*_TEXT_TOWER, _INDICES),
        defaults=(
            ("layer_norm_eps", 1e-5),
            ("activation", "quick_gelu"),
            ("position_prefix", 1),
        ),
    ),
    Table(
        "transformers",
        "siglip_classifier",  # pools by the mean; its attention pooling is unused
        (_CLIP_PATCHES, "classifier.weight"),
        (*_clip_tower(), *affine("classifier", "head")),
        prefixes=("vision_model.", ""),
        dropped=(r"{p}head\..*", *_TEXT_TOWER, _INDICES),
        defaults=(("activation", "gelu_tanh"), ("position_prefix", 0), ("pool", "avg")),
    ),
    Table(
        "transformers",
        "siglip",
        (_CLIP_PATCHES,),
        (*_clip_tower(), *_siglip_pool()),
        prefixes=("vision_model.", ""),
        dropped=(*_TEXT_TOWER, _INDICES),
        defaults=(("activation", "gelu_tanh"), ("position_prefix", 0)),
    ),
)


def find_table(names: Collection[str]) -> Table:
    """The table of the file whose tensors have these names, its prefix filled in.

    Raises:
      UserError: no ViT that we know; lists what was looked for and what is there.
    """
    for table in TABLES:
        for prefix in table.prefixes:
            filled = table.with_prefix(prefix)
            if all(anchor in names for anchor in filled.anchors):
                return filled
    sought = ", ".join(f"{t.source} {t.family} ({t.with_prefix('').anchors[-1]})" for t in TABLES)
    first = ", ".join(sorted(names)[:5])
    raise UserError(
        f"no ViT in a naming that is known here: looked for {sought}; the file has {len(names)} "
        f"tensors: {first} ...; take weights of a Vision Transformer from timm, torchvision or "
        "transformers"
    )


def table_for_export(to: str, *, norm_after_pool: bool, family: str | None = None) -> Table:
    """The table that names a model's tensors in timm's, torchvision's or transformers' manner.

    Args:
      to: "timm", "torchvision" or "transformers".
      norm_after_pool: the model's argument; it decides the final norm's name in timm.
      family: for transformers, which model: "vit", "deit_distilled", "dinov2", "clip", ...

    Raises:
      UserError: no such naming.
    """
    if to == "timm":
        family = "fc_norm" if norm_after_pool else "norm"
    elif to == "torchvision":
        family = "mlp.0"
    for table in TABLES:
        if (table.source, table.family) == (to, family):
            return table.with_prefix(table.prefixes[0])
    known = ", ".join(sorted({f"{table.source} {table.family}" for table in TABLES}))
    raise UserError(f"no naming {to!r} {family or ''}: there are {known}")
