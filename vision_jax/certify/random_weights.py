"""Random weights and images under which no error of an imported model hides."""

import re
from typing import Any

import numpy as np
import torch

from vision_jax.certify.references import Reference


def sample_images(count: int, image_size: tuple[int, int], channels: int, seed: int) -> np.ndarray:
    """Images f64[B, H, W, C] in [0, 1] with noise of all scales, as photos have it.

    Of white noise all places look alike to deep layers, and a norm would divide by next to nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    scales = (1, 2, 4, 8, 16, 32, 64, 128)
    total = torch.zeros((count, channels, *image_size), dtype=torch.float64)
    for cells in scales:
        noise = torch.randn((count, channels, cells, cells), generator=generator).double()
        total += torch.nn.functional.interpolate(noise, image_size, mode="bilinear")
    return torch.sigmoid(total / len(scales) ** 0.5).permute(0, 2, 3, 1).numpy()


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random and of order one, so that no term hides behind a zero.

    BatchNorm's are such that most activations are on: a deep random network that centers them is
    chaotic, in any library (https://arxiv.org/abs/1902.08129), and its float32 is noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    frozen = [  # scales and biases of a frozen norm are buffers
        (f"{name}.{part}", getattr(norm, part))
        for name, norm in module.named_modules()
        if norm in batch_norms(module) and not isinstance(norm.weight, torch.nn.Parameter)
        for part in ("weight", "bias")
    ]
    for name, parameter in [*module.named_parameters(), *frozen]:
        value = noise(parameter)
        if name.endswith(("logit_scale",)):
            value = 1 + 0.3 * value
        elif parameter.ndim >= 2 and (
            "bbox_embed" in name  # heads, as RF-DETR calls them
            or "class_embed" in name
            or re.search(r"\b(t|x|timestep)_embedder\.", name)  # kernels of a DiT's embeddings
            or ("emb" not in name and "token" not in name)
        ):
            value *= max(parameter[0].numel(), 1) ** -0.5
        elif parameter.ndim == 1 and name.endswith((".weight", "gamma", "lambda1")):
            value = 1 + 0.3 * value
        else:
            value *= 0.3
        if "bbox_embed" in name or "bbox_pred." in name:
            # Boxes scale by the exponent of this head, and a detector that samples a random map
            # far from its cells multiplies rounding from layer to layer.
            value *= 0.5 if "bbox_embed" in name else 0.1
        parameter.data = value.to(parameter.dtype)
    for norm in batch_norms(module):
        norm.weight.data *= 0.7
        norm.bias.data = 1 + 0.5 / 0.3 * norm.bias.data
    first, *others = getattr(module, "transformer_blocks", None) or [None]
    for block in others:  # of diffusers' DiT, each of which has a copy of the same embeddings
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return module


def batch_norms(module: torch.nn.Module) -> list[Any]:
    """The modules with running statistics."""
    return [m for m in module.modules() if getattr(m, "running_var", None) is not None]


def randomize_statistics(
    reference: Reference, image_size: tuple[int, int], channels: int, seed: int
) -> None:
    """Random BatchNorm statistics for a randomized reference (see `randomize`).

    One pass over random images sets each norm's from what reaches it, behind norms that are
    disturbed already; otherwise the disturbances would add up from layer to layer.
    """
    norms = batch_norms(reference.module)
    if not norms:
        return
    generator = torch.Generator().manual_seed(seed)

    def disturb(norm: Any, inputs: Any) -> None:
        var, mean = torch.var_mean(inputs[0], (0, 2, 3))
        spread = (var + 0.03 * inputs[0].square().mean((0, 2, 3)) + 0.01 * var.mean()).sqrt()
        width = norm.running_var.shape
        norm.running_mean = mean + 0.3 * spread * torch.randn(width, generator=generator)
        norm.running_var = spread**2 * (1 + 0.3 * (2 * torch.rand(width, generator=generator) - 1))
        if getattr(norm, "num_batches_tracked", None) is not None:
            norm.num_batches_tracked.fill_(int(torch.randint(1, 10**6, (), generator=generator)))

    hooks = [norm.register_forward_pre_hook(disturb) for norm in norms]
    images = 4 * (sample_images(4, image_size, channels, seed) - 0.5)
    images = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        reference.module(images)
    for hook in hooks:
        hook.remove()
