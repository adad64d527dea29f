"""transformers' EoMT in float64 too, and with the shares of masked queries of published weights."""

from collections.abc import Mapping
from typing import Any

import torch


def prepare(model: Any) -> Any:
    """The model, whose attention masks are as precise as the tokens, and whose shares are 0.

    New ones are 1: then a mask's logits next to 0 decide what a query sees, so that two orders of
    summation in float32 can differ as much as they like.
    """
    for layer in model.layers:
        layer.attention.register_forward_pre_hook(_widen, with_kwargs=True)
    model.attn_mask_probs.zero_()
    return model


def _widen(module: Any, given: tuple[torch.Tensor, ...], keywords: Mapping[str, Any]) -> Any:
    mask = keywords.get("attention_mask")
    if mask is None:
        return None
    return given, {**keywords, "attention_mask": mask.to(given[0].dtype)}
