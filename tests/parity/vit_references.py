"""Small PyTorch references of the ViT family: (reference, image size in pixels) by its trait."""

from collections.abc import Callable
from typing import Any

from vision_jax.certify.references import Reference, make_reference

CLASSES = 7
Made = tuple[Reference, tuple[int, int]]


def timm_reference(name: str, size: int | tuple[int, int], **arguments: Any) -> Made:
    given = {"num_classes": CLASSES, "depth": 2, "img_size": size, **arguments}
    return make_reference("timm", name, given), _pair(size)


def npz_reference(name: str, size: int, **arguments: Any) -> Made:
    given = {"num_classes": CLASSES, "depth": 2, "img_size": size, "act_layer": "gelu_tanh"}
    return make_reference("npz", name, {**given, **arguments}), _pair(size)


def torchvision_reference(patch: int, width: int, size: int) -> Made:
    given = {
        "image_size": size,
        "patch_size": patch,
        "num_layers": 2,
        "num_heads": width // 64,
        "hidden_dim": width,
        "mlp_dim": 2 * width + 6,
        "num_classes": CLASSES,
    }
    return make_reference("torchvision", "torchvision.models.VisionTransformer", given), _pair(size)


def transformers_reference(build: str, size: int | tuple[int, int] = 48, **arguments: Any) -> Made:
    given = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": size,
        "patch_size": 16,
    }
    if "Dinov2" not in build:
        given["intermediate_size"] = 96
    if build.endswith(("ImageClassification", "WithTeacher")):
        given["num_labels"] = CLASSES
    if build == "SiglipForImageClassification":
        del given["num_labels"]
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text |= {"intermediate_size": 16, "vocab_size": 11}
        given = {"vision_config": given, "text_config": text, "num_labels": CLASSES}
    return make_reference("transformers", build, {**given, **arguments}), _pair(size)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


# Where the architecture's own width would be slow.
GIANT = {"embed_dim": 96, "num_heads": 4}

REFERENCES: dict[str, Callable[[], Made]] = {
    "timm ti/16": lambda: timm_reference("vit_tiny_patch16_224", 48),
    "timm s/32": lambda: timm_reference("vit_small_patch32_224", 96),
    "timm s/8": lambda: timm_reference("vit_small_patch8_224", 32),
    "timm not square": lambda: timm_reference("vit_tiny_patch16_224", (32, 80)),
    "timm other sizes": lambda: timm_reference(
        "vit_tiny_patch16_224", (29, 41), embed_dim=60, num_heads=5, patch_size=7, mlp_ratio=3.3
    ),
    "timm one channel": lambda: timm_reference("vit_tiny_patch16_224", 32, in_chans=1),
    "timm five channels": lambda: timm_reference("vit_tiny_patch16_224", 32, in_chans=5, depth=1),
    "timm no head": lambda: timm_reference("vit_tiny_patch16_224", 32, num_classes=0),
    "timm without biases in qkv": lambda: timm_reference(
        "vit_small_patch16_224", 48, qkv_bias=False
    ),
    "timm with qk_norm": lambda: timm_reference("vit_small_patch16_224", 48, qk_norm=True),
    "timm with pre_norm": lambda: timm_reference("vit_tiny_patch16_224", 48, pre_norm=True),
    "timm with registers": lambda: timm_reference("vit_tiny_patch16_224", 48, reg_tokens=3),
    "timm deit": lambda: timm_reference("deit_tiny_patch16_224", 48),
    "timm deit distilled": lambda: timm_reference("deit_tiny_distilled_patch16_224", 48),
    "timm deit3": lambda: timm_reference("deit3_small_patch16_224", 48),
    "timm dinov2": lambda: timm_reference("vit_small_patch14_dinov2", 42),
    "timm dinov2 with registers": lambda: timm_reference("vit_small_patch14_reg4_dinov2", 42),
    "timm dinov2 giant": lambda: timm_reference("vit_giant_patch14_reg4_dinov2", 28, **GIANT),
    "timm mae": lambda: timm_reference("vit_tiny_patch16_224", 32, global_pool="avg"),
    "timm mae, normalized before": lambda: timm_reference(
        "vit_tiny_patch16_224", 32, global_pool="avg", fc_norm=False
    ),
    "timm clip": lambda: timm_reference("vit_xsmall_patch16_clip_224", 48),
    "timm clip quickgelu": lambda: timm_reference(
        "vit_base_patch16_clip_quickgelu_224", 32, **GIANT
    ),
    "timm siglip": lambda: timm_reference("vit_base_patch16_siglip_224", 32, **GIANT),
    "timm siglip2 giantopt": lambda: timm_reference("vit_giantopt_patch16_siglip_256", 32, **GIANT),
    "timm so400m gap": lambda: timm_reference(
        "vit_so400m_patch14_siglip_gap_224", (45, 31), **GIANT
    ),
    "timm registers and map": lambda: timm_reference(
        "vit_so150m_patch16_reg4_map_256", 32, embed_dim=128, num_heads=2
    ),
    "timm registers and gap": lambda: timm_reference("vit_wee_patch16_reg1_gap_256", 48),
    "torchvision b/16": lambda: torchvision_reference(16, 128, 48),
    "torchvision b/32": lambda: torchvision_reference(32, 192, 96),
    "transformers vit": lambda: transformers_reference(
        "ViTForImageClassification", hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-3
    ),
    "transformers vit, not square": lambda: transformers_reference(
        "ViTForImageClassification", (48, 35), qkv_bias=False
    ),
    "transformers vit, one channel": lambda: transformers_reference(
        "ViTForImageClassification", num_channels=1
    ),
    "transformers deit distilled": lambda: transformers_reference(
        "DeiTForImageClassificationWithTeacher"
    ),
    "transformers deit": lambda: transformers_reference("DeiTForImageClassification"),
    "transformers mae": lambda: transformers_reference("ViTMAEModel", mask_ratio=0.0),
    "transformers dinov2": lambda: transformers_reference("Dinov2ForImageClassification"),
    "transformers dinov2 giant": lambda: transformers_reference("Dinov2Model", use_swiglu_ffn=True),
    "transformers dinov2 with registers": lambda: transformers_reference(
        "Dinov2WithRegistersForImageClassification", 35
    ),
    "transformers dinov2 giant with registers": lambda: transformers_reference(
        "Dinov2WithRegistersForImageClassification", mlp_ratio=3, use_swiglu_ffn=True
    ),
    "transformers clip": lambda: transformers_reference("CLIPVisionModel"),
    "transformers clip projected": lambda: transformers_reference(
        "CLIPVisionModelWithProjection", 50, projection_dim=CLASSES, hidden_act="gelu"
    ),
    "transformers siglip": lambda: transformers_reference("SiglipVisionModel"),
    "transformers siglip classifier": lambda: transformers_reference(
        "SiglipForImageClassification"
    ),
    "npz augreg": lambda: npz_reference("vit_tiny_patch16_224", 48),
    "npz augreg, other sizes": lambda: npz_reference(
        "vit_tiny_patch16_224", 28, embed_dim=60, num_heads=5, patch_size=7, mlp_ratio=2.4
    ),
    "npz augreg, no head": lambda: npz_reference("vit_tiny_patch16_224", 32, num_classes=0),
    "npz big_vision": lambda: npz_reference("vit_tiny_patch16_224", 32, no_embed_class=True),
    "npz gap": lambda: npz_reference("vit_base_patch16_siglip_gap_224", 32, **GIANT),
    "npz siglip": lambda: npz_reference("vit_base_patch16_siglip_224", 32, num_classes=0, **GIANT),
}
