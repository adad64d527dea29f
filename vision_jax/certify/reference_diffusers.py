"""Autoencoders and transformers of diffusers, and DiT: what they are given, what is compared."""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from vision_jax.certify.conditions import sample_conditions
from vision_jax.certify.reference_dit import DiT
from vision_jax.convert.read import CONFIG_FILE


def build(name: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
    """A model by its class's name and the fields of its config."""
    return _precise(_class_of(name)(**arguments))


def load(folder: Path) -> tuple[torch.nn.Module, str]:
    """(the model that diffusers makes of a folder, its class's name).

    Raises:
      RuntimeError: diffusers finds a tensor missing, unexpected or of another shape.
    """
    name = json.loads((folder / CONFIG_FILE).read_text())["_class_name"]
    module, report = _class_of(name).from_pretrained(folder, output_loading_info=True)
    if wrong := {kind: names for kind, names in report.items() if names}:
        raise RuntimeError(f"diffusers finds {wrong}")
    return _precise(module.eval()), name


def outputs(module: Any, pixels: torch.Tensor) -> SimpleNamespace:
    """What a model makes of normalized images or noisy latents [B, C, H, W], channels last.

    An autoencoder's latents are shifted and scaled as diffusers' pipelines do it, and the mean is
    decoded. A DiT is given the same times and classes in every call.
    """
    if hasattr(module, "transformer_blocks") or isinstance(module, DiT):
        return _denoised(module, pixels)
    config = module.config
    encoded = module.encode(pixels)
    more = {}
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.mean
        more["logvar"] = encoded.latent_dist.logvar.permute(0, 2, 3, 1)
    else:
        latents = encoded.latents
    scaled = (latents - (config.shift_factor or 0)) * config.scaling_factor
    return SimpleNamespace(
        latents=scaled.permute(0, 2, 3, 1),
        reconstruction=module.decode(latents).sample.permute(0, 2, 3, 1),
        **more,
    )


def _denoised(module: Any, x: torch.Tensor) -> SimpleNamespace:
    own = isinstance(module, DiT)
    classes = module.num_classes if own else module.config.num_embeds_ada_norm
    predicts = module.predicts if own else "noise"
    time, labels = sample_conditions(len(x), classes, predicts)
    given = (torch.from_numpy(time).to(x.dtype), torch.from_numpy(labels))
    made = module(x, *given)
    made = (made if own else made.sample).permute(0, 2, 3, 1)
    halves = torch.split(made, x.shape[1], dim=-1)
    return SimpleNamespace(**dict(zip(("prediction", "variance"), halves, strict=False)))


def _precise(module: torch.nn.Module) -> torch.nn.Module:
    """The module, whose waves of the time are in float64 where all else is: they are in float32."""
    for part in module.modules():
        if type(part).__name__ == "Timesteps":
            part.forward = partial(_waves, part, part.forward)  # type: ignore[method-assign]
    return module


def _waves(part: Any, own: Any, time: torch.Tensor) -> torch.Tensor:
    if time.dtype != torch.float64:
        return own(time)
    half = part.num_channels // 2
    places = torch.arange(half, dtype=time.dtype) / (half - part.downscale_freq_shift)
    angles = time[:, None] * torch.exp(-math.log(10000) * places)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _class_of(name: str) -> Any:
    import diffusers  # takes seconds, and no other source needs it

    return cast(Any, getattr(diffusers, name))
