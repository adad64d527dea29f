"""PyTorch twins of the ViT family, small, with every statistic random, as files on the disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
import transformers
from timm.models import save_for_hf

from vision_jax.convert import write_safetensors

CLASSES = 7
transformers.utils.logging.disable_progress_bar()


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random and of order one, so that no term hides behind an initial zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and "emb" not in name and "token" not in name:
            noise *= parameter[0].numel() ** -0.5
        elif name.endswith((".weight", "gamma", "lambda1")) and parameter.ndim == 1:
            noise = 1 + 0.3 * noise
        else:
            noise *= 0.3
        parameter.data = noise.to(parameter.dtype)
    return model.eval()


def timm_twin(name: str, **arguments: Any) -> Callable[[], "Twin"]:
    arguments = {"num_classes": CLASSES, "depth": 2, **arguments}

    def build() -> Twin:
        model = timm.create_model(name, **arguments)

        def save(model: torch.nn.Module, folder: Path) -> str:
            keys = ("img_size", "num_heads", "global_pool", "act_layer")
            given = {key: arguments[key] for key in keys if key in arguments}
            save_for_hf(model, folder, model_config={"model_args": given}, safe_serialization=True)
            return str(folder)

        return Twin(model, lambda model: model.blocks, lambda model, x: model(x), save)

    return build


def torchvision_twin(patch: int, width: int, size: int) -> Callable[[], "Twin"]:
    def build() -> Twin:
        model = torchvision.models.VisionTransformer(
            size, patch, 2, width // 64, width, 2 * width, num_classes=CLASSES
        )

        def save(model: torch.nn.Module, folder: Path) -> str:
            path = folder / "vit.safetensors"
            tensors = {name: value.numpy() for name, value in model.state_dict().items()}
            write_safetensors(path, tensors)
            return str(path)

        return Twin(model, lambda model: model.encoder.layers, lambda model, x: model(x), save)

    return build


def transformers_twin(
    model_class: str, config_class: str, run: Callable[..., Any], **arguments: Any
) -> Callable[[], "Twin"]:
    size = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 16,
    }

    def build() -> Twin:
        config = getattr(transformers, config_class)(**{**size, **arguments})
        model = getattr(transformers, model_class)._from_config(config, attn_implementation="sdpa")

        def save(model: torch.nn.Module, folder: Path) -> str:
            model.save_pretrained(folder)
            return str(folder)

        def blocks(model: torch.nn.Module) -> Any:
            lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
            return next(m for m in lists if len(m) == config.num_hidden_layers)

        return Twin(model, blocks, run, save)

    return build


class Twin:
    """A PyTorch model, where its blocks are, how it runs, and how it is saved."""

    def __init__(self, model: torch.nn.Module, blocks: Any, run: Any, save: Any) -> None:
        self.model, self._blocks, self._run, self.save = model, blocks, run, save

    def outputs(self, images: np.ndarray, arguments: dict[str, Any]) -> dict[str, np.ndarray]:
        """block_0, block_1 ... and logits for images f[B, H, W, 3] in [0, 1]."""
        seen: dict[str, np.ndarray] = {}

        def keep(index: int) -> Callable[..., None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                output = output[0] if isinstance(output, tuple) else output
                seen[f"block_{index}"] = output.numpy()

            return hook

        hooks = [
            block.register_forward_hook(keep(index))
            for index, block in enumerate(self._blocks(self.model))
        ]
        mean, std = (np.asarray(arguments.get(key, (0.5,) * 3)) for key in ("mean", "std"))
        dtype = next(self.model.parameters()).dtype
        normalized = torch.from_numpy((images - mean) / std).to(dtype).permute(0, 3, 1, 2)
        with torch.no_grad():
            seen["logits"] = self._run(self.model, normalized).numpy()
        for hook in hooks:
            hook.remove()
        return seen


def logits(model, x):
    return model(x).logits


def pooled(model, x):
    return model(x).pooler_output


def class_token(model, x):
    return model(x).last_hidden_state[:, 0]


def unmasked(model, x):
    # Shuffles the patches by the order of the noise: sorted noise leaves them where they are.
    patches = (x.shape[2] // 16) * (x.shape[3] // 16)
    noise = torch.linspace(0, 1, patches).expand(x.shape[0], -1)
    return model(x, noise=noise).last_hidden_state[:, 0]


TWINS: dict[str, Callable[[], Twin]] = {
    "timm ti/16": timm_twin("vit_tiny_patch16_224", img_size=48),
    "timm s/32": timm_twin("vit_small_patch32_224", img_size=96),
    "timm b/16": timm_twin("vit_base_patch16_224", img_size=32),
    "timm s/8": timm_twin("vit_small_patch8_224", img_size=32),
    "timm ti/16 not square": timm_twin("vit_tiny_patch16_224", img_size=(32, 80)),
    "timm s/16 without biases in qkv": timm_twin(
        "vit_small_patch16_224", img_size=48, qkv_bias=False
    ),
    "timm s/16 with qk_norm": timm_twin("vit_small_patch16_224", img_size=48, qk_norm=True),
    "timm deit distilled": timm_twin("deit_tiny_distilled_patch16_224", img_size=48),
    "timm deit3": timm_twin("deit3_small_patch16_224", img_size=48),
    "timm dinov2": timm_twin("vit_small_patch14_dinov2", img_size=42),
    "timm dinov2 with registers": timm_twin("vit_small_patch14_reg4_dinov2", img_size=42),
    "timm dinov2 giant": timm_twin(
        "vit_giant_patch14_reg4_dinov2", img_size=28, embed_dim=96, num_heads=4
    ),
    "timm mae": timm_twin("vit_base_patch16_224", img_size=32, global_pool="avg"),
    "timm clip quickgelu": timm_twin("vit_base_patch16_clip_quickgelu_224", img_size=32),
    "timm clip": timm_twin("vit_xsmall_patch16_clip_224", img_size=48),
    "timm siglip": timm_twin("vit_base_patch16_siglip_224", img_size=32),
    "timm siglip2 giantopt": timm_twin(
        "vit_giantopt_patch16_siglip_256", img_size=32, embed_dim=128, num_heads=4
    ),
    "timm so400m gap": timm_twin(
        "vit_so400m_patch14_siglip_gap_224", img_size=(45, 31), embed_dim=144, num_heads=2
    ),
    "timm registers and map": timm_twin(
        "vit_so150m_patch16_reg4_map_256", img_size=32, embed_dim=128, num_heads=2
    ),
    "timm registers and gap": timm_twin("vit_wee_patch16_reg1_gap_256", img_size=48),
    "torchvision b/16": torchvision_twin(16, 128, 48),
    "torchvision b/32": torchvision_twin(32, 192, 96),
    "transformers vit": transformers_twin(
        "ViTForImageClassification",
        "ViTConfig",
        logits,
        num_labels=CLASSES,
        intermediate_size=96,
        hidden_act="gelu_pytorch_tanh",
    ),
    "transformers deit distilled": transformers_twin(
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        logits,
        num_labels=CLASSES,
        intermediate_size=96,
    ),
    "transformers deit": transformers_twin(
        "DeiTForImageClassification",
        "DeiTConfig",
        logits,
        num_labels=CLASSES,
        intermediate_size=96,
    ),
    "transformers mae": transformers_twin(
        "ViTMAEModel", "ViTMAEConfig", unmasked, mask_ratio=0.0, intermediate_size=96
    ),
    "transformers dinov2": transformers_twin(
        "Dinov2ForImageClassification", "Dinov2Config", logits, num_labels=CLASSES
    ),
    "transformers dinov2 giant": transformers_twin(
        "Dinov2Model", "Dinov2Config", class_token, use_swiglu_ffn=True
    ),
    "transformers dinov2 with registers": transformers_twin(
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        logits,
        num_labels=CLASSES,
    ),
    "transformers clip": transformers_twin(
        "CLIPVisionModel", "CLIPVisionConfig", pooled, intermediate_size=96
    ),
    "transformers clip projected": transformers_twin(
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        lambda model, x: model(x).image_embeds,
        intermediate_size=96,
        projection_dim=CLASSES,
    ),
    "transformers siglip": transformers_twin(
        "SiglipVisionModel", "SiglipVisionConfig", pooled, intermediate_size=96
    ),
    "transformers siglip classifier": transformers_twin(
        "SiglipForImageClassification",
        "SiglipConfig",
        logits,
        num_labels=CLASSES,
        num_hidden_layers=2,
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 48,
            "patch_size": 16,
            "intermediate_size": 96,
        },
        text_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "vocab_size": 11,
        },
    ),
}
