"""YOLOX in PyTorch, pixeltable-yolox's, so that its raw outputs can be compared.

Images come red first, and the network takes blue first; its outputs would be decoded and scored.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from yolox.config import YoloxConfig
from yolox.models import YoloPafpn, YoloxHead, YoloxModule

PREDICTIONS = {"logits": "cls_preds", "object_logits": "obj_preds", "box_deltas": "reg_preds"}


class Yolox(YoloxModule):
    """Images [B, 3, H, W] from 0 to 255 -> logits, object_logits and box_deltas [B, A, ...].

    The arguments are YoloxConfig's.
    """

    def __init__(self, num_classes: int = 80, depth: float = 1.0, width: float = 1.0, **rest: Any):
        config = YoloxConfig("yolox", num_classes, depth, width, **rest)
        parts = {"depthwise": config.depthwise, "act": config.act}
        backbone = YoloPafpn(config.depth, config.width, **parts)
        super().__init__(backbone, YoloxHead(config.num_classes, config.width, **parts))
        config.model = self  # type: ignore[attr-defined]
        config.get_model()  # sets what BatchNorm computes with, and the heads' biases

    def forward(self, images: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        if self.training:
            return super().forward(images.flip(1), targets)
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in PREDICTIONS}

        def keep(name: str, module: Any, inputs: Any, output: torch.Tensor) -> None:
            seen[name].append(output.detach().flatten(2).transpose(1, 2).clone())

        hooks = [
            layer.register_forward_hook(partial(keep, name))
            for name, kind in PREDICTIONS.items()
            for layer in getattr(self.head, kind)
        ]
        super().forward(images.flip(1))
        for hook in hooks:
            hook.remove()
        found = {name: torch.cat(levels, dim=1) for name, levels in seen.items()}
        found["object_logits"] = found["object_logits"][..., 0]
        return SimpleNamespace(**found)


def named(variant: str) -> Yolox:
    """A published variant, "yolox_s"."""
    config = YoloxConfig.get_named_config(variant)
    assert config is not None, variant
    return Yolox(config.num_classes, config.depth, config.width, depthwise=config.depthwise)
