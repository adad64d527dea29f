"""The Vision Transformers that are certified, and where their published weights are."""

import re
from typing import Any

from vision_jax.convert.table import Entry
from vision_jax.convert.vit.config import BUILDERS
from vision_jax.convert.vit.npz import ACTIVATION
from vision_jax.models.vit import VARIANTS


def _timm_entry(title: str, name: str, **arguments: Any) -> Entry:
    architecture = name.split(".")[0]
    large = re.search("large|huge|giant|so400m", name)
    return Entry(
        f"timm/{name}",
        title,
        name,
        tuple(arguments.items()),
        reduced=_TIMM_REDUCED if large else (),
        image_size=VARIANTS[architecture]["image_size"][0],
        published=f"timm://{name}",
    )


def _torchvision_entry(builder: str) -> Entry:
    known = VARIANTS[BUILDERS[builder]]
    build, arguments = builder, {}
    if "vit_b" not in builder:  # the builders have no argument for the depth
        build = "torchvision.models.VisionTransformer"
        arguments = {
            "image_size": 224,
            "patch_size": known["patch_size"],
            "num_layers": known["depth"],
            "num_heads": known["num_heads"],
            "hidden_dim": known["width"],
            "mlp_dim": known["mlp_width"],
        }
    return Entry(
        f"torchvision/{builder}",
        "ViT",
        build,
        tuple(arguments.items()),
        reduced=(("num_layers", 2),) if arguments else (),
        published=f"torchvision://{builder}",
        license="BSD-3-Clause",
    )


def _transformers_entry(
    title: str, build: str, published: str, variant: str, license: str = "apache-2.0", **more: Any
) -> Entry:
    """An entry whose config is that of a variant of timm's, and what this class says otherwise."""
    known = VARIANTS[variant]
    arguments: dict[str, Any] = {
        "image_size": known["image_size"][0],
        "patch_size": known["patch_size"],
        "hidden_size": known["width"],
        "num_hidden_layers": known["depth"],
        "num_attention_heads": known["num_heads"],
    }
    if not build.startswith("Dinov2"):
        arguments["intermediate_size"] = known["mlp_width"]
    elif known.get("gated_mlp"):
        arguments["use_swiglu_ffn"] = True
    if build.endswith(("ImageClassification", "WithTeacher")):
        arguments["num_labels"] = 1000
    large = re.search("large|huge|giant|so400m", published)
    return Entry(
        f"transformers/{published.partition('/')[2]}",
        title,
        build,
        tuple((arguments | more).items()),
        reduced=(("num_hidden_layers", 2),) if large else (),
        image_size=known["image_size"][0],
        published=f"hf://{published}",
        license=license,
    )


def _npz_entry(title: str, name: str, **arguments: Any) -> Entry:
    large = re.search("large|so400m", name)
    return Entry(
        f"npz/{name}",
        title,
        name,
        (("act_layer", ACTIVATION), *arguments.items()),
        reduced=_TIMM_REDUCED if large else (),
        image_size=VARIANTS[name]["image_size"][0],
        license="apache-2.0",
    )


_TIMM_REDUCED = (("depth", 2),)
_TIMM_ZOO = {
    "ViT": (
        "vit_base_patch16_224.orig_in21k_ft_in1k",
        "vit_base_patch32_224.orig_in21k",
        "vit_large_patch32_384.orig_in21k_ft_in1k",
        "vit_huge_patch14_224.orig_in21k",
    ),
    "AugReg ViT": (
        "vit_tiny_patch16_224.augreg_in21k",
        "vit_small_patch16_224.augreg_in21k_ft_in1k",
        "vit_small_patch32_224.augreg_in21k_ft_in1k",
        "vit_base_patch16_224.augreg_in1k",
        "vit_base_patch16_384.augreg_in21k_ft_in1k",
        "vit_base_patch8_224.augreg_in21k_ft_in1k",
        "vit_large_patch16_224.augreg_in21k_ft_in1k",
    ),
    "DeiT": (
        "deit_tiny_patch16_224.fb_in1k",
        "deit_small_patch16_224.fb_in1k",
        "deit_base_patch16_224.fb_in1k",
        "deit_tiny_distilled_patch16_224.fb_in1k",
        "deit_base_distilled_patch16_224.fb_in1k",
    ),
    "DeiT III": (
        "deit3_small_patch16_224.fb_in1k",
        "deit3_base_patch16_224.fb_in1k",
        "deit3_large_patch16_224.fb_in1k",
        "deit3_huge_patch14_224.fb_in1k",
    ),
    "DINOv2": (
        "vit_small_patch14_dinov2.lvd142m",
        "vit_base_patch14_dinov2.lvd142m",
        "vit_large_patch14_dinov2.lvd142m",
        "vit_giant_patch14_dinov2.lvd142m",
        "vit_small_patch14_reg4_dinov2.lvd142m",
        "vit_large_patch14_reg4_dinov2.lvd142m",
        "vit_giant_patch14_reg4_dinov2.lvd142m",
    ),
    "MAE": (
        "vit_base_patch16_224.mae",
        "vit_large_patch16_224.mae",
        "vit_huge_patch14_224.mae",
    ),
    "CLIP": (
        "vit_base_patch16_clip_224.laion2b",
        "vit_base_patch32_clip_224.laion2b",
        "vit_base_patch16_clip_quickgelu_224.openai",
        "vit_large_patch14_clip_quickgelu_224.openai",
        "vit_huge_patch14_clip_224.laion2b",
    ),
    "SigLIP": (
        "vit_base_patch16_siglip_224.webli",
        "vit_base_patch16_siglip_256.v2_webli",
        "vit_base_patch32_siglip_256.v2_webli",
        "vit_large_patch16_siglip_256.webli",
        "vit_so400m_patch14_siglip_384.webli",
        "vit_giantopt_patch16_siglip_256.v2_webli",
    ),
}
_VIT, _DINO = "ViTForImageClassification", "Dinov2ForImageClassification"
_REGISTERS = "Dinov2WithRegistersForImageClassification"
_WHOLE = {"mask_ratio": 0.0}  # all patches, in their order
_TRANSFORMERS_ZOO: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    ("ViT", _VIT, "google/vit-base-patch16-224", "vit_base_patch16_224", {}),
    ("ViT", _VIT, "google/vit-base-patch32-384", "vit_base_patch32_384", {}),
    ("ViT", _VIT, "google/vit-large-patch16-224", "vit_large_patch16_224", {}),
    ("DeiT", _VIT, "facebook/deit-small-patch16-224", "deit_small_patch16_224", {}),
    *(
        (
            "DeiT",
            "DeiTForImageClassificationWithTeacher",
            f"facebook/deit-{size}-distilled-patch16-224",
            f"deit_{size}_distilled_patch16_224",
            {},
        )
        for size in ("tiny", "small")
    ),
    *(
        (
            "DINOv2",
            _DINO,
            f"facebook/dinov2-{size}-imagenet1k-1-layer",
            f"vit_{size}_patch14_dinov2",
            {},
        )
        for size in ("small", "large", "giant")
    ),
    (
        "DINOv2",
        _REGISTERS,
        "facebook/dinov2-with-registers-small-imagenet1k-1-layer",
        "vit_small_patch14_reg4_dinov2",
        {},
    ),
    (
        "DINOv2",
        "Dinov2WithRegistersModel",
        "facebook/dinov2-with-registers-giant",
        "vit_giant_patch14_reg4_dinov2",
        {},
    ),
    ("MAE", "ViTMAEModel", "facebook/vit-mae-base", "vit_base_patch16_224", _WHOLE),
    ("MAE", "ViTMAEModel", "facebook/vit-mae-large", "vit_large_patch16_224", _WHOLE),
    ("CLIP", "CLIPVisionModel", "openai/clip-vit-base-patch16", "vit_base_patch16_clip_224", {}),
    (
        "CLIP",
        "CLIPVisionModelWithProjection",
        "openai/clip-vit-base-patch32",
        "vit_base_patch32_clip_224",
        {"projection_dim": 512},
    ),
    (
        "CLIP",
        "CLIPVisionModelWithProjection",
        "openai/clip-vit-large-patch14-336",
        "vit_large_patch14_clip_quickgelu_336",
        {"projection_dim": 768},
    ),
    *(
        ("SigLIP", "SiglipVisionModel", f"google/{name}", variant, {})
        for name, variant in (
            ("siglip-base-patch16-224", "vit_base_patch16_siglip_224"),
            ("siglip-so400m-patch14-384", "vit_so400m_patch14_siglip_384"),
            ("siglip2-base-patch16-256", "vit_base_patch16_siglip_256"),
            ("siglip2-large-patch16-512", "vit_large_patch16_siglip_512"),
        )
    ),
)
_NPZ_ZOO = {
    "AugReg ViT": (
        ("vit_tiny_patch16_224", {"num_classes": 21843}),
        ("vit_small_patch16_224", {}),
        ("vit_small_patch32_384", {}),
        ("vit_base_patch16_224", {}),
        ("vit_base_patch32_224", {}),
        ("vit_base_patch8_224", {}),
        ("vit_large_patch16_384", {}),
    ),
    "SigLIP": (
        ("vit_base_patch16_siglip_224", {}),
        ("vit_base_patch16_siglip_384", {}),
        ("vit_large_patch16_siglip_256", {}),
        ("vit_so400m_patch14_siglip_224", {}),
    ),
}
ZOO = (
    *(_timm_entry(title, name) for title, names in _TIMM_ZOO.items() for name in names),
    *(_torchvision_entry(builder) for builder in BUILDERS),
    *(
        _transformers_entry(
            title, build, name, variant, "" if title == "CLIP" else "apache-2.0", **more
        )
        for title, build, name, variant, more in _TRANSFORMERS_ZOO
    ),
    *(
        _npz_entry(title, name, **arguments)
        for title, entries in _NPZ_ZOO.items()
        for name, arguments in entries
    ),
)
