"""Names of a Swin Transformer's tensors and modules: timm, Microsoft, torchvision, transformers.

Sources: timm 1.0 swin_transformer.py and swin_transformer_v2.py; torchvision 0.29
models/swin_transformer.py; transformers 5.23 models/swin and models/swinv2 (v1 has other names in
memory than in its files); https://github.com/microsoft/Swin-Transformer.
"""

from dataclasses import dataclass, replace

import numpy as np

from vision_jax.convert.engine import (
    CONV,
    COPY,
    LINEAR,
    Fixed,
    Layout,
    Rule,
    Rules,
    affine,
    fused,
    norm,
    one,
)
from vision_jax.convert.table import Arguments
from vision_jax.models.swin import Windows, plan_windows, position_index, position_offsets

Sides = tuple[int, int]


@dataclass(frozen=True)
class Names:
    """What one kind of file calls the modules.

    `block` and `merging` (through which a stage is entered) are formatted with the stage s, the
    stage before it, the block b, and torchvision's running numbers of both.
    """

    block: str
    merging: str
    patches: str = "patch_embed.proj"
    patch_norm: str = "patch_embed.norm"
    norms: tuple[str, str] = ("norm1", "norm2")
    attention: str = "attn"
    qkv: tuple[str, ...] = ("attn.qkv",)
    proj: str = "attn.proj"
    mlp: tuple[str, str] = ("mlp.fc1", "mlp.fc2")
    table: str = "attn.relative_position_bias_table"
    cpb_mlp: str = "attn.cpb_mlp"
    norm: str = "norm"
    head: str = "head"

    def at(self, template: str, s: int, b: int = 0) -> str:
        """A name in stage s; `{p}` stays."""
        return template.format(p="{p}", s=s, b=b, before=s - 1, merge=2 * s, blocks=2 * s + 1)


TIMM = Names("layers.{s}.blocks.{b}", "layers.{s}.downsample", head="head.fc")
ORIGINAL = Names("layers.{s}.blocks.{b}", "layers.{before}.downsample")
TORCHVISION = Names(
    "features.{blocks}.{b}",
    "features.{merge}",
    patches="features.0.0",
    patch_norm="features.0.2",
    mlp=("mlp.0", "mlp.3"),
)
TRANSFORMERS = Names(
    "{p}encoder.layers.{s}.blocks.{b}",
    "{p}encoder.layers.{before}.downsample",
    patches="{p}embeddings.patch_embeddings.projection",
    patch_norm="{p}embeddings.norm",
    norms=("layernorm_before", "layernorm_after"),
    attention="attention.self",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    proj="attention.output.dense",
    mlp=("intermediate.dense", "output.dense"),
    table="attention.self.relative_position_bias_table",
    cpb_mlp="attention.self.continuous_position_bias_mlp",
    norm="{p}layernorm",
    head="classifier",
)
IN_MEMORY = replace(  # what torch.save(model.state_dict()) writes of transformers' v1
    TRANSFORMERS,
    attention="attention.relative_position_bias",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    proj="attention.o_proj",
    mlp=("mlp.fc1", "mlp.fc2"),
    table="attention.relative_position_bias.relative_position_bias_table",
)

# q's and v's bias beside each other in one of ours, whose middle third is nobody's: [D] x 2, [3·D].
_Q_V = Layout(
    lambda xs: [np.concatenate([xs[0], np.zeros_like(xs[0]), xs[1]])],
    lambda xs: np.split(xs[0], 3)[::2],
)


def rules_of(names: Names, library: str, arguments: Arguments) -> Rules:
    stages = windows_of(arguments)
    rules: list[Rule | Fixed] = [
        *affine(names.patches, "patch_embed", CONV),
        *norm(names.patch_norm, "patch_norm"),
    ]
    for s, depth in enumerate(arguments["depths"]):
        if s:
            name, path = names.at(names.merging, s), f"stage_{s}/downsample"
            rules += one(f"{name}.reduction.weight", f"{path}/reduction/kernel", LINEAR)
            rules += norm(f"{name}.norm", f"{path}/norm")
        for b in range(depth):
            name, path = names.at(names.block, s, b) + ".", f"stage_{s}/block_{b}"
            rules += norm(name + names.norms[0], f"{path}/norm1")
            rules += norm(name + names.norms[1], f"{path}/norm2")
            rules += affine(name + names.proj, f"{path}/attn/proj")
            for index in (0, 1):
                rules += affine(name + names.mlp[index], f"{path}/mlp/fc{index + 1}")
            if arguments["version"] == 1:
                rules += _attention_v1(names, name, f"{path}/attn")
            else:
                rules += _attention_v2(names, name, f"{path}/attn", library)
            prefix = f"{name}{names.attention}."
            rules += _fixed(prefix, stages[s].size, arguments, s, library == "torchvision")
    return [*rules, *norm(names.norm, "norm"), *affine(names.head, "head")]


def _attention_v1(names: Names, name: str, path: str) -> tuple[Rule, ...]:
    parts = [name + part for part in names.qkv]
    qkv = fused(parts, f"{path}/qkv") if len(parts) == 3 else affine(parts[0], f"{path}/qkv")
    return (*qkv, *one(name + names.table, f"{path}/relative_position_bias_table"))


def _attention_v2(names: Names, name: str, path: str, library: str) -> tuple[Rule, ...]:
    parts = [name + part for part in names.qkv]
    cpb = name + names.cpb_mlp
    if len(parts) == 3:
        kernel, biases = fused(parts, f"{path}/qkv")[0], (f"{parts[0]}.bias", f"{parts[2]}.bias")
    else:
        (kernel,) = one(f"{parts[0]}.weight", f"{path}/qkv/kernel", LINEAR)
        biases = (f"{name}attn.q_bias", f"{name}attn.v_bias")
    whole = library == "torchvision"  # it has a bias for the key too, and takes none of it
    bias = (f"{parts[0]}.bias",) if whole else biases
    return (
        kernel,
        Rule(bias, (f"{path}/qkv_bias",), COPY if whole else _Q_V),
        *one(f"{name}{names.attention}.logit_scale", f"{path}/logit_scale"),
        *affine(f"{cpb}.0", f"{path}/cpb_mlp/hidden"),
        *one(f"{cpb}.2.weight", f"{path}/cpb_mlp/heads/kernel", LINEAR),
    )


def _fixed(
    prefix: str, window: Sides, arguments: Arguments, stage: int, torchvision: bool
) -> list[Fixed]:
    """Indices and offsets: torchvision's files have them, of the others' only older ones."""

    def index() -> np.ndarray:
        found = position_index(window)
        return found.reshape(-1) if torchvision else found

    def offsets() -> np.ndarray:
        given = arguments["pretrained_windows"]
        return position_offsets(window, given[stage] if given else 0)[None]

    fixed = [Fixed(f"{prefix}relative_position_index", index, written=torchvision)]
    if arguments["version"] == 2:
        name = f"{prefix}relative_coords_table"
        fixed.append(Fixed(name, offsets, exact=False, written=torchvision))
    return fixed


def windows_of(arguments: Arguments, library: str | None = None) -> tuple[Windows, ...]:
    """The windows of such a model, by another library's rules if one is named."""
    return plan_windows(
        arguments["image_size"],
        arguments["patch_size"],
        arguments["windows"],
        library or arguments["library"],
        arguments["version"],
        arguments.get("always_partition", False),
    )


def modules_of(library: str, arguments: Arguments) -> dict[str, str]:
    stages = range(len(arguments["depths"]))
    if library == "timm":
        named = {f"stage_{s}": f"layers.{s}" for s in stages}
        return {"embed": "patch_embed", **named, "pooled": "head.global_pool"}
    if library == "torchvision":
        named = {f"stage_{s}": f"features.{2 * s + 1}" for s in stages}
        return {"embed": "features.0", **named, "pooled": "flatten"}
    # A stage's own output is merged already.
    last = {f"stage_{s}": arguments["depths"][s] - 1 for s in stages}
    named = {f"stage_{s}": f"{{p}}encoder.layers.{s}.blocks.{last[f'stage_{s}']}" for s in stages}
    return {"embed": "{p}embeddings", **named, "pooled": "{p}pooler"}
