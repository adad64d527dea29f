"""What every architecture promises: names, counts, layers, features, gradients, equal forms.

A new family adds a case and its list of names, tests/golden/parameters/FAMILY.txt.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.models.families import (
    FAMILIES,
    GENERATION,
    build_model,
    find_variant,
    unrolled,
)
from vision_jax.models.taps import apply_with_taps, tap_shapes
from vision_jax.trees import lora
from vision_jax.trees.paths import flatten

GOLDEN = Path(__file__).parents[1] / "golden/parameters"


@dataclass(frozen=True)
class Case:
    """A tiny model of a family.

    Attributes:
      arguments: of the form that is computed.
      features: names of its features beside those of `pyramid`.
      layers: of some parameters, for rates by layer.
      unused: how many of its layers no parameter of this form is in.
      forms: other arguments, of which shapes alone are computed.
      form_features: of a form that has others.
      cells: (side, stride) -> cells of a feature along a side that is no multiple of the stride;
        None where the library decides (the family's own test says so).
      without_gradient: paths of parameters whose gradient is zero but for rounding.
      grouped: paths of the kernels in groups, which take no adapter.
      rounding: how much more of it there is in training than elsewhere: BatchNorm of few cells in
        many layers, one after the other, is chaotic (https://arxiv.org/abs/1902.08129).
    """

    arguments: Mapping[str, Any]
    features: tuple[str, ...]
    layers: Mapping[str, int]
    size: tuple[int, int] = (33, 46)
    forms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    form_features: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cells: Callable[[int, int], int] | None = lambda side, stride: math.ceil(side / stride)
    without_gradient: str = "none"
    unused: int = 0
    grouped: str = "none"
    rounding: float = 1.0


CASES = {
    "vit": Case(
        {"num_classes": 3, "image_size": (12, 8), "patch_size": 4, "width": 16, "depth": 2,
         "num_heads": 2, "mlp_width": 24, "layer_scale": 0.5, "num_registers": 1},
        features=("embed", "block_0", "block_1", "pooled"),
        layers={"pos_embed": 0, "cls_token": 0, "block_1/mlp/fc1/kernel": 2, "norm/scale": 2},
        size=(12, 8),
        forms={
            "everything": {"pool": "map", "distillation_token": True, "num_registers": 2,
                           "pre_norm": True, "qk_norm": True, "gated_mlp": True},
            "distilled": {"distillation_token": True},
            "norm after pool": {"norm_after_pool": True, "pool": "avg"},
        },
        without_gradient=r".*/k_norm/bias",  # the same for all keys: softmax doesn't see it
    ),
    "autoencoder_kl": Case(
        {"widths": (8, 12), "stage_depth": 1, "groups": 4, "latent_channels": 3},
        features=("encoder_0", "encoder_1", "encoder_middle", "decoder_middle", "decoder_0",
                  "decoder_1"),
        layers={"encoder/stage_1/block_0/shortcut/kernel": 2, "encoder/middle/attn/qkv/bias": 3,
                "quant_conv/kernel": 3, "post_quant_conv/bias": 4, "decoder/middle/norm/scale": 4,
                "decoder/stage_0/block_1/norm1/scale": 5, "decoder/norm/bias": 7},
        size=(16, 24),
        forms={
            "SD 3": {"quant_conv": False, "post_quant_conv": False, "scaling_factor": 1.5,
                     "shift_factor": 0.06, "mid_attention": False},
            "one stage": {"widths": (8,)},
        },
        form_features={
            "one stage": ("encoder_0", "encoder_middle", "decoder_middle", "decoder_0"),
        },
    ),
    "autoencoder_tiny": Case(
        {"encoder_width": 8, "decoder_width": 6, "encoder_depths": (1, 2), "decoder_depths": (2, 1),
         "latent_channels": 3},
        features=("encoder_0", "encoder_1", "decoder_0", "decoder_1"),
        layers={"encoder/stage_1/downsample/kernel": 2, "encoder/conv_out/bias": 3,
                "decoder/conv_in/kernel": 4, "decoder/stage_0/upsample/kernel": 5,
                "decoder/stage_1/block_0/conv3/bias": 6},
        size=(16, 24),
    ),
    "beit": Case(
        {"num_classes": 3, "image_size": (17, 25), "patch_size": 8, "width": 16, "depth": 2,
         "num_heads": 2, "mlp_width": 20, "absolute_positions": True, "shared_relative_bias": True},
        features=("embed", "block_0", "block_1", "pooled"),
        layers={"cls_token": 0, "pos_embed": 0, "relative_position_bias_table": 0,
                "block_0/attn/relative_position_bias_table": 1, "block_1/norm2/bias": 2,
                "norm/scale": 3},
        size=(17, 25),
        forms={
            "bare": {"relative_bias": False, "shared_relative_bias": False, "qkv_bias": False,
                     "absolute_positions": False, "layer_scale": None},
        },
    ),
    "convnext": Case(
        {"num_classes": 3, "depths": (1, 2), "widths": (8, 12), "layer_scale": 0.5},
        features=("stem", "pooled"),
        layers={"stem_norm/scale": 0, "stage_1/downsample_conv/kernel": 2,
                "stage_1/block_0/norm/bias": 2, "stage_1/block_1/mlp/fc1/kernel": 3,
                "norm/scale": 4},
        forms={
            "v2": {"grn": True, "layer_scale": None},
            "overlapping stem": {"stem_widths": (6,)},
            "patches of 2": {"patch_size": 2, "first_stride": 2},
            "hidden head": {"head_hidden": 5, "kernel_size": 3, "mlp_ratio": 2},
            "1 x 1 convolutions": {"conv_mlp": True},
        },
        cells=None,
        grouped=r".*conv_dw",
    ),
    "deeplab": Case(
        {"num_classes": 3, "depths": (1, 1, 1, 2), "widths": (4, 4, 8, 8), "stem_width": 8,
         "rates": (2, 3), "width": 8, "auxiliary_head": True},
        features=("stem", "context"),
        layers={"backbone/stage_3/block_1/conv1/kernel": 5, "aspp_2/conv/kernel": 6,
                "aspp_pool/bn/scale": 6, "auxiliary_class_head/bias": 6},
        size=(40, 64),
        forms={"basic": {"block": "basic"}, "stride 16": {"dilation": True}},
        rounding=100.0,
    ),
    "detr": Case(
        {"num_classes": 3, "depths": (1, 1, 2, 2), "widths": (4, 4, 8, 8), "stem_width": 8,
         "num_queries": 7, "width": 32, "num_heads": 4, "mlp_width": 48, "encoder_depth": 2,
         "decoder_depth": 2},
        features=("stem", "input_proj", "encoder_0", "encoder_1", "decoder_0", "decoder_1"),
        layers={"backbone/stage_3/block_1/conv1/kernel": 6, "input_proj/kernel": 7,
                "encoder_0/fc1/kernel": 7, "query_embed": 9, "decoder_0/norm1/scale": 9,
                "decoder_norm/scale": 11, "box_head/fc1/bias": 11},
        size=(40, 64),
        forms={
            "basic": {"block": "basic"},
            "dc5": {"dilation": True},
            "grid queries": {"grid_queries": True},
        },
        # What decoder_0 attends to is zero, and softmax doesn't see the bias of the keys.
        without_gradient=r"decoder_0/self_attn/|.*attn/k/bias",
    ),
    "dit": Case(
        {"num_classes": 3, "image_size": (12, 8), "patch_size": 4, "width": 16, "depth": 2,
         "num_heads": 2, "mlp_width": 24, "in_channels": 3},
        features=("condition", "embed", "block_0", "block_1"),
        layers={"time_embed/fc1/kernel": 0, "class_embed": 0, "block_1/ada/kernel": 2,
                "head_ada/bias": 3},
        size=(12, 8),
        forms={
            "of latents": {"in_channels": 4, "learned_variance": True, "predicts": "noise",
                           "time_shift": 1, "mlp_norm_eps": 1e-5},
        },
    ),
    "efficientnet": Case(
        {"num_classes": 3, "depths": (1, 2), "widths": (8, 12), "kernels": (3, 5),
         "expansions": (1, 2), "strides": (1, 2), "stem_width": 8, "head_width": 16,
         "se_ratio": 0.25, "activation": "silu"},
        features=("stem", "stage_0/block_0", "stage_1/block_0", "last", "pooled"),
        layers={"stem_bn/scale": 0, "stage_0/block_0/project_conv/kernel": 1,
                "stage_1/block_1/depthwise_bn/bias": 3, "last_conv/kernel": 3},
        forms={
            "mobile": {"se_ratio": 0.0, "activation": "relu6"},
            "mobile v3": {"se_ratio": (0.0, 0.25), "hard_gate": True, "activation": "hard_swish",
                          "relu_stages": 1, "expansions": (1, (2, 3)), "head_hidden": 6},
            "TensorFlow": {"same_padding": True, "batch_norm_eps": 1e-3},
        },
        # What follows begins with a convolution and a norm, which takes a shift out again.
        without_gradient=r".*/project_bn/bias",
        grouped=r".*depthwise_conv",
    ),
    "eomt": Case(
        {"num_classes": 3, "image_size": (12, 8), "patch_size": 4, "width": 16, "depth": 3,
         "num_heads": 2, "mlp_width": 24, "num_registers": 1, "position_prefix": 0,
         "layer_scale": 0.5, "num_queries": 5, "num_blocks": 2},
        features=("embed", "block_0", "block_1", "block_2", "normed"),
        layers={"pos_embed": 0, "cls_token": 0, "block_1/mlp/fc1/kernel": 2, "norm/scale": 3,
                "query_embed": 4, "mask_head/upscale_1/conv1_bias": 4},
        size=(12, 8),
        forms={
            "everything": {"distillation_token": True, "num_registers": 2, "pre_norm": True,
                           "qk_norm": True, "gated_mlp": True, "layer_scale": None},
            "annealed": {"mask_annealing": ((0, 10), (10, 20))},
            "patches alone": {"class_token": False, "num_registers": 0, "num_blocks": 3,
                              "upscale_blocks": 1},
        },
        without_gradient=r".*/k_norm/bias",
        grouped=r".*conv_dw",
    ),
    "faster_rcnn": Case(
        {"num_classes": 3, "depths": (1, 1, 1, 2), "widths": (4, 4, 8, 8), "stem_width": 8,
         "width": 8, "anchor_sizes": (8, 16, 32, 64, 128), "proposals": 12, "head_width": 16,
         "most": 5},
        features=("stem", "level_0", "level_1", "level_2", "level_3", "level_4"),
        layers={"backbone/stage_3/block_1/conv1/kernel": 5, "fpn/inner_0/conv/bias": 6,
                "rpn/conv_0/conv/kernel": 7, "roi_head/fc1/kernel": 7},
        size=(40, 64),
        forms={
            "basic": {"block": "basic"},
            "v2": {"fpn_norm": True, "rpn_depth": 2, "head_convs": 4, "head_layers": 1},
            "mobile": {"body": "mobilenet_v3", "kernels": (3, 5, 3, 3), "strides": (2, 2, 2, 2),
                       "expansions": (1, 2, 2, (2, 3)), "se_ratio": (0.25, 0.0, 0.25, 0.25),
                       "relu_stages": 2, "anchor_sizes": ((8, 16), (32, 64), (64, 128)),
                       "least_proposal_score": 0.05},
        },
        form_features={
            "mobile": ("stem", *(f"stage_{i}{end}" for i in range(4) for end in ("", "/block_0")),
                       "last", "level_0", "level_1", "level_2"),
        },
        cells=lambda side, stride: math.ceil(side / 32) * 32 // stride,
    ),
    "fcos": Case(
        {"num_classes": 3, "depths": (1, 1, 1, 2), "widths": (4, 4, 8, 8), "stem_width": 8,
         "width": 8, "head_depth": 2, "head_groups": 4, "candidates": 20, "most": 5},
        features=("stem", "level_0", "level_1", "level_2", "level_3", "level_4"),
        layers={"backbone/stage_3/block_1/conv1/kernel": 5, "fpn/p6/kernel": 6,
                "box_tower/norm_1/scale": 7, "center_head/bias": 7},
        size=(40, 64),
        forms={"basic": {"block": "basic"}, "without norms": {"head_groups": 0}},
        cells=lambda side, stride: math.ceil(side / 32) * 32 // stride,
    ),
    "retinanet": Case(
        {"num_classes": 3, "depths": (1, 1, 1, 2), "widths": (4, 4, 8, 8), "stem_width": 8,
         "width": 8, "anchor_sizes": (8, 16, 32, 64, 128), "head_depth": 2, "candidates": 20,
         "most": 5},
        features=("stem", "level_0", "level_1", "level_2", "level_3", "level_4"),
        layers={"backbone/stage_3/block_1/conv1/kernel": 5, "fpn/inner_0/conv/bias": 6,
                "fpn/p7/bias": 6, "class_tower/conv_0/kernel": 7},
        size=(40, 64),
        forms={
            "v2": {"head_groups": 4, "coarse_of_map": True, "box_loss": "giou",
                   "anchor_sizes": ((8, 10), (16, 20), (32, 40), (64, 80), (128, 160))},
            "all maps": {"first_map": 0, "anchor_sizes": (8, 16, 32, 64, 128, 256)},
        },
        form_features={"all maps": ("stem", *(f"level_{index}" for index in range(6)))},
        cells=lambda side, stride: math.ceil(side / 32) * 32 // stride,
    ),
    "inception": Case(
        {"num_classes": 3, "unit": 1},
        features=("conv_1a", "conv_2a", "conv_2b", "conv_3b", "conv_4a",
                  "mixed_5b", "mixed_5c", "mixed_5d", "mixed_6a", "mixed_6b", "mixed_6c",
                  "mixed_6d", "mixed_6e", "mixed_7a", "mixed_7b", "mixed_7c",
                  "pooled"),
        layers={"conv_1a/conv/kernel": 0, "conv_4a/bn/scale": 4, "mixed_5b/branch1x1/bn/bias": 5,
                "mixed_7c/branch3x3_2a/conv/kernel": 15, "head/bias": 16},
        size=(80, 93),
        forms={"of the FID": {"fid": True}},
        rounding=100.0,
    ),
    "mae": Case(
        {"num_classes": 0, "image_size": (12, 8), "patch_size": 4, "width": 16, "depth": 2,
         "num_heads": 2, "mlp_width": 24, "num_registers": 1, "decoder_width": 8,
         "decoder_depth": 1, "decoder_num_heads": 2, "decoder_mlp_width": 12},
        features=("embed", "block_0", "block_1", "encoded"),
        layers={"pos_embed": 0, "cls_token": 0, "block_1/mlp/fc1/kernel": 2, "norm/scale": 2,
                "decoder/pos_embed": 3, "decoder/block_0/norm1/scale": 3},
        size=(12, 8),
        forms={
            "everything": {"distillation_token": True, "num_registers": 2, "pre_norm": True,
                           "qk_norm": True, "gated_mlp": True, "layer_scale": 0.5},
            "patches alone": {"class_token": False, "position_prefix": 0, "pool": "avg",
                              "num_registers": 0},
        },
        # Nothing is hidden here; the key's norm has a bias that is the same for all keys.
        without_gradient=r"decoder/mask_token|.*/k_norm/bias",
    ),
    "mit": Case(
        {"num_classes": 3, "depths": (1, 2), "widths": (8, 12), "num_heads": (1, 3),
         "reductions": (2, 1), "patch_sizes": (7, 3), "strides": (4, 2), "mlp_ratios": (2, 3)},
        features=("pooled",),
        layers={"stage_0/patch_norm/scale": 0, "stage_0/block_0/attn/sr_norm/bias": 1,
                "stage_0/norm/scale": 1, "stage_1/patch_embed/bias": 2,
                "stage_1/block_1/mlp/conv_dw/kernel": 3, "stage_1/norm/bias": 3},
        without_gradient=r".*attn/k/bias",  # softmax doesn't see it
        grouped=r".*conv_dw",
    ),
    "regnet": Case(
        {"num_classes": 3, "depths": (1, 2), "widths": (8, 24), "group_widths": (8, 12),
         "stem_width": 8, "se_ratio": 0.25},
        features=("stem", "pooled"),
        layers={"stem_bn/scale": 0, "stage_0/block_0/conv1/kernel": 1,
                "stage_1/block_0/conv_downsample/kernel": 2, "stage_1/block_1/bn1/scale": 3},
        forms={"x": {"se_ratio": 0.0}, "stride 1": {"first_stride": 1}},
        grouped=r".*conv2",
    ),
    "resnet": Case(
        {"num_classes": 3, "depths": (1, 2), "widths": (8, 16), "stem_width": 8},
        features=("stem", "pooled"),
        layers={"stage_0/block_0/conv1/kernel": 1, "stage_1/block_0/downsample_conv/kernel": 2,
                "stage_1/block_1/bn1/scale": 3},
        forms={
            "basic": {"block": "basic"},
            "resnext": {"groups": 2, "base_width": 32},
            "d": {"stem_widths": (4, 6), "pooled_shortcut": True},
            "transformers": {"stride_first": True, "first_stride": 2},
            "no pool": {"stem_pool": False},
            "for CIFAR": {"stem_size": 3, "stem_pool": False},
            "dilated": {"depths": (1, 2, 2, 2), "widths": (4, 4, 8, 8), "dilation": 2},
        },
    ),
    "rf_detr": Case(
        {"num_classes": 5, "image_size": (32, 32), "position_grid": 8, "decoder_depth": 2,
         "patch_size": 4, "feature_depths": (1, 2), "global_blocks": (1,), "backbone_width": 24,
         "backbone_depth": 2, "backbone_heads": 2, "backbone_mlp_width": 48, "width": 16,
         "projector_width": 8, "projector_blocks": 1, "num_queries": 6, "num_groups": 2,
         "num_heads": 2, "cross_heads": 4, "mlp_width": 32},
        features=("feature_0", "feature_1", "reference", "decoder_0", "decoder_1"),
        layers={"backbone/pos_embed": 0, "backbone/block_1/norm2/bias": 2, "backbone/norm/bias": 4,
                "decoder_0/norm1/bias": 4},
        size=(32, 32),
        without_gradient=r".*attn/k/bias",  # softmax doesn't see it
        unused=1,  # rfdetr's exponents leave one out between the backbone and all the rest
    ),
    "segformer": Case(
        {"num_classes": 3, "depths": (1, 2), "widths": (8, 12), "num_heads": (1, 3),
         "reductions": (2, 1), "patch_sizes": (7, 3), "strides": (4, 2), "mlp_ratios": (2, 3),
         "decoder_width": 16},
        features=("fused",),
        layers={"backbone/stage_0/patch_norm/scale": 0, "backbone/stage_1/norm/bias": 3,
                "proj_0/kernel": 4, "fuse_1/kernel": 4, "fuse_bn/scale": 4},
        # BatchNorm takes out again what all the decoder's biases add.
        without_gradient=r".*attn/k/bias|proj_\d/bias",
        grouped=r".*conv_dw",
    ),
    "siglip": Case(
        {"num_classes": 0, "image_size": (12, 8), "patch_size": 4, "width": 16, "depth": 2,
         "num_heads": 2, "mlp_width": 24, "pool": "map", "class_token": False,
         "position_prefix": 0, "vocab_size": 11, "text_length": 5, "text_width": 12,
         "text_depth": 3, "text_num_heads": 3, "text_mlp_width": 20},
        features=("embed", "block_0", "block_1", "pooled"),
        layers={"pos_embed": 0, "text/token_embed": 0, "text/block_0/norm1/scale": 1,
                "text/block_2/mlp/fc1/kernel": 2, "text/norm/scale": 2, "attn_pool/latent": 3,
                "text/head/bias": 3, "logit_scale": 3},
        size=(12, 8),
        forms={
            "everything": {"pool": "token_avg", "class_token": True, "distillation_token": True,
                           "num_registers": 2, "pre_norm": True, "qk_norm": True,
                           "gated_mlp": True, "layer_scale": 0.5},
            "norm after pool": {"norm_after_pool": True, "pool": "avg"},
            "two tokens": {"pool": "token", "class_token": True, "distillation_token": True,
                           "position_prefix": 2},
        },
        # No text is given here; the key's norm as an MAE's.
        without_gradient=r"text/.*|.*/k_norm/bias",
    ),
    "swin": Case(
        {"num_classes": 3, "image_size": (24, 40), "width": 8, "depths": (2, 2),
         "num_heads": (1, 2), "windows": ((2, 3), (2, 2))},
        features=("embed", "pooled"),
        layers={"patch_norm/scale": 0, "stage_0/block_1/mlp/fc1/kernel": 2,
                "stage_1/downsample/norm/scale": 3, "stage_1/block_0/norm1/bias": 3,
                "norm/scale": 4},
        size=(24, 40),
        forms={"v2": {"version": 2}},
        cells=None,
    ),
    "dino": Case(
        {"num_classes": 0, "image_size": (12, 8), "patch_size": 4, "width": 16, "depth": 2,
         "num_heads": 2, "mlp_width": 24, "num_registers": 1, "prototypes": 10, "head_width": 12,
         "head_depth": 2, "bottleneck": 6},
        features=("embed", "block_0", "block_1", "normed"),
        layers={"pos_embed": 0, "mask_token": 0, "block_1/mlp/fc1/kernel": 2, "norm/scale": 2,
                "dino_head/fc2/bias": 3, "dino_head/prototypes": 3},
        size=(12, 8),
        forms={
            "everything": {"distillation_token": True, "num_registers": 2, "pre_norm": True,
                           "qk_norm": True, "gated_mlp": True, "layer_scale": 0.5,
                           "patch_prototypes": 7},
            "patches alone": {"class_token": False, "position_prefix": 0, "pool": "avg",
                              "num_registers": 0},
        },
        # Nothing is masked here, and patches are not asked for; the key's norm as an MAE's.
        without_gradient=r"mask_token|ibot_head/.*|.*/k_norm/bias",
    ),
    "simclr": Case(
        {"num_classes": 0, "image_size": (12, 8), "patch_size": 4, "width": 16, "depth": 2,
         "num_heads": 2, "mlp_width": 24, "num_registers": 1, "head_width": 12, "head_depth": 3,
         "projection": 6},
        features=("embed", "block_0", "block_1", "normed"),
        layers={"pos_embed": 0, "block_1/mlp/fc1/kernel": 2, "norm/scale": 2,
                "contrastive_head/fc1/kernel": 3, "contrastive_head/fc3/bias": 3},
        size=(12, 8),
        forms={
            "everything": {"distillation_token": True, "num_registers": 2, "pre_norm": True,
                           "qk_norm": True, "gated_mlp": True, "layer_scale": 0.5},
            "patches alone": {"class_token": False, "position_prefix": 0, "pool": "avg",
                              "num_registers": 0},
        },
        without_gradient=r".*/k_norm/bias",
    ),
    "nanodet": Case(
        {"num_classes": 3, "stem_width": 4, "depths": (1, 1, 1, 2), "width": 8, "bins": 4},
        features=("stem", "level_0", "level_1", "level_2"),
        layers={"stem/bn/scale": 0, "stage_0/in_conv/conv/kernel": 1,
                "stage_3/block_1/conv2/bn/bias": 5, "lateral_0/kernel": 6,
                "head_2/side_head/bias": 6},
        size=(32, 64),
        rounding=100.0,
    ),
    "upernet": Case(
        {"num_classes": 3, "encoder": "convnext", "width": 8, "pool_sizes": (1, 3),
         "map_norm_eps": 1e-6, "auxiliary_head": True, "auxiliary_width": 6,
         "encoder_arguments": (("depths", (1, 2, 1)), ("widths", (8, 12, 8)),
                               ("layer_scale", 0.5))},
        features=("stem", "pooled_context", "fused"),
        layers={"backbone/stem_conv/kernel": 0, "backbone/stage_1/block_1/norm/bias": 3,
                "map_norm_2/scale": 5, "pool_1/conv/kernel": 5, "auxiliary_0/bn/scale": 5},
        size=(40, 64),
        forms={
            "resnet": {"encoder": "resnet", "auxiliary_head": False, "encoder_arguments": (
                ("depths", (1, 3)), ("widths", (8, 16)), ("stem_width", 8))},
            "regnet": {"encoder": "regnet", "auxiliary_head": False, "encoder_arguments": (
                ("depths", (1, 1)), ("widths", (8, 16)), ("group_widths", (8, 8)),
                ("stem_width", 8))},
            "mobile": {"encoder": "efficientnet", "auxiliary_head": False, "encoder_arguments": (
                ("depths", (1, 1)), ("widths", (8, 12)), ("kernels", (3, 3)),
                ("expansions", (1, 2)), ("strides", (1, 2)), ("stem_width", 8),
                ("head_width", 16))},
            "mit": {"encoder": "mit", "auxiliary_head": False, "encoder_arguments": (
                ("depths", (1, 1)), ("widths", (8, 12)), ("num_heads", (1, 2)),
                ("reductions", (2, 1)))},
            "swin": {"encoder": "swin", "auxiliary_head": False, "encoder_arguments": (
                ("depths", (1, 2)), ("num_heads", (1, 2)), ("width", 8),
                ("windows", ((3, 3), (3, 3))), ("image_size", (40, 64)))},
        },
        form_features={
            "mit": ("pooled_context", "fused"),
            "swin": ("embed", "pooled_context", "fused"),
            "mobile": ("stem", "stage_0", "stage_0/block_0", "stage_1/block_0",
                       "pooled_context", "fused"),
        },
        cells=None,  # ConvNeXt's stem cuts, others round up
        without_gradient=r".*/project_bn/bias|.*attn/k/bias",
        grouped=r".*(conv_dw|depthwise_conv|backbone/.*/conv2/kernel)",
    ),
    "unet": Case(
        {"num_classes": 3, "encoder": "resnet", "decoder_widths": (12, 8, 6),
         "encoder_arguments": (("depths", (1, 3)), ("widths", (8, 16)), ("stem_width", 8))},
        features=("stem", "decoder_0", "decoder_1", "decoder_2"),
        layers={"backbone/conv1/kernel": 0, "backbone/stage_1/block_1/conv1/kernel": 3,
                "decoder_0/conv1/conv/kernel": 5, "decoder_2/conv2/bn/bias": 7,
                "class_head/bias": 8},
        forms={
            "plain encoder": {"encoder": "plain", "encoder_arguments": (("widths", (6, 8)),),
                      "decoder_widths": (6,)},
            "regnet": {"encoder": "regnet", "encoder_arguments": (
                ("depths", (1, 1)), ("widths", (8, 16)), ("group_widths", (8, 8)),
                ("stem_width", 8))},
            "mobile": {"encoder": "efficientnet", "decoder_widths": (8, 6), "encoder_arguments": (
                ("depths", (1, 1)), ("widths", (8, 12)), ("kernels", (3, 3)),
                ("expansions", (1, 2)), ("strides", (1, 2)), ("stem_width", 8),
                ("head_width", 16))},
            "convnext": {"encoder": "convnext", "encoder_arguments": (
                ("depths", (1, 1)), ("widths", (8, 12)))},
        },
        form_features={
            "plain encoder": ("decoder_0",),
            "mobile": ("stem", "stage_0", "stage_0/block_0", "stage_1/block_0", "last",
                       "decoder_0", "decoder_1"),
        },
        cells=None,  # ConvNeXt's stem cuts, others round up
        # Of a norm that only a classifier's head would follow.
        without_gradient=r"backbone/norm/|.*/project_bn/bias",
        grouped=r".*(conv_dw|depthwise_conv|backbone/.*/conv2/kernel)",
        rounding=100.0,
    ),
    "yolox": Case(
        {"num_classes": 3, "csp_depth": 1, "width": 4},
        features=("stem", "level_0", "level_1", "level_2"),
        layers={"backbone/stem/bn/scale": 0, "backbone/stage_3/csp/conv3/conv/kernel": 4,
                "neck/up_0/conv1/bn/bias": 5, "head_2/box_head/bias": 6},
        size=(32, 64),
        forms={"depthwise": {"depthwise": True, "activation": "leaky_relu"}},
        grouped=r".*_depthwise/conv",
        rounding=100.0,
    ),
}  # fmt: skip
EVERY_FORM = [
    pytest.param(family, form, marks=[] if form == "plain" else pytest.mark.long)
    for family in CASES
    for form in ("plain", *CASES[family].forms)
]
CLASSIFIERS = [name for name in CASES if FAMILIES[name].task == "classification"]


def having(*arguments):
    """The families whose models have one of these arguments."""
    return [name for name in CASES if {*arguments} & {*FAMILIES[name].arguments}]


def build(family, form="plain", **arguments):
    case = CASES[family]
    return build_model(family, **{**case.arguments, **case.forms.get(form, {}), **arguments})


@functools.cache
def abstract(model, size):
    images = jnp.zeros((1, *size, model.in_channels))
    return jax.eval_shape(model.init, jax.random.key(0), images)


def random_variables(model, size):
    """Random everywhere, and such that activations keep their size."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path.endswith("count"):
            value = np.zeros(())
        elif path.endswith(("scale", "var")):
            value = 1 + 0.1 * np.abs(noise)
        elif path.endswith("kernel"):
            value = noise / noise[..., 0].size ** 0.5
        else:
            value = 0.3 * noise
        return jnp.asarray(value, leaf.dtype)

    return jax.tree.map(draw, *with_paths(abstract(model, size)))


def with_paths(tree):
    """(a tree of each leaf's path, the tree)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "/".join(str(key.key) for key in path), tree
    ), tree


def random_images(model, size, count=3):
    shape = (count, *size, model.in_channels)
    return jnp.asarray(np.random.default_rng(1).random(shape), jnp.float32)


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def check_near(ours, theirs, tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    ours, theirs = (jax.tree_util.tree_leaves_with_path(tree) for tree in (ours, theirs))
    for (path, x), (_, y) in zip(ours, theirs, strict=True):
        assert relative(x, y) <= tolerance, jax.tree_util.keystr(path)


def outputs_of(result):
    """{name: array} of what a model returns: a classifier's logits, all that a detector says."""
    return dict(result) if isinstance(result, Mapping) else {"logits": result}


def main_of(outputs):
    """The logits, features of images where texts are compared with them, or what is made."""
    names = ("logits", "image", "reconstruction", "prediction")
    return next(outputs[name] for name in names if name in outputs)


def test_every_family_is_here():
    assert set(CASES) == set(FAMILIES)


# Taps --------------------------------------------------------------------------------------------


@pytest.mark.long(but=("vit",))
@pytest.mark.parametrize("family", CASES)
def test_taps_show_and_shift_what_is_there(family):
    """Zeros change nothing, and what is given for one tap is there, and changes the outputs."""
    model, size = unrolled(build(family)), CASES[family].size
    variables, images = random_variables(model, size), random_images(model, size, 2)
    shapes = tap_shapes(model, variables, images)
    assert any(name.endswith(("/output", "/normed")) for name in shapes)
    zeros = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}

    @jax.jit
    def run(taps):
        outputs, found = apply_with_taps(model, variables, taps, images)
        return outputs_of(outputs), found

    plain = outputs_of(jax.jit(model.apply)(variables, images))
    outputs, found = run(zeros)
    check_near(outputs, plain, 1e-5)  # what is shown is not fused with what follows
    assert {name: x.shape for name, x in found.items()} == {
        name: shape.shape for name, shape in shapes.items()
    }
    first = next(iter(shapes))
    shift = jnp.asarray(np.random.default_rng(2).random(zeros[first].shape), jnp.float32)
    moved, now = run({**zeros, first: shift})
    check_near(now[first], found[first] + shift, 1e-5)
    assert relative(main_of(moved), main_of(plain)) > 1e-4
    with pytest.raises(UserError, match="has no 'nowhere'"):
        apply_with_taps(model, variables, {"nowhere": 0.0}, images)


# Parameters --------------------------------------------------------------------------------------


@pytest.mark.long(but=("vit", "resnet"))
@pytest.mark.parametrize("family", CASES)
def test_parameter_names_are_public_and_pinned(family):
    """Renaming one breaks every checkpoint: change these lists only with a migration."""
    lines = set()
    for form in ("plain", *CASES[family].forms):
        model = build(family, form)
        for path, leaf in flatten(abstract(model, CASES[family].size)).items():
            assert leaf.dtype == (jnp.int32 if path.endswith("count") else jnp.float32)
            lines.add(f"{path} {leaf.shape}")
    assert "".join(f"{line}\n" for line in sorted(lines)) == (GOLDEN / f"{family}.txt").read_text()


# timm's numbers with 1000 classes, those of regnet's and torchvision's "_tv" with torchvision;
# detectors' as published, with 91 classes: RF-DETR's without the mask token, which has no effect.
COUNTS = {
    "ti/16": 5_717_416,
    "s/16": 22_050_664,
    "s/32": 22_878_952,
    "b/8": 86_576_872,
    "b/16": 86_567_656,
    "b/32": 88_224_232,
    "l/16": 304_326_632,
    "h/14": 632_045_800,
    "g/14": 1_012_611_432,
    "autoencoder_kl_sd": 83_653_863,
    "autoencoder_kl_sdxl": 83_653_863,
    "autoencoder_kl_sd3": 83_819_683,
    "autoencoder_kl_flux": 83_819_683,
    "autoencoder_tiny_sd": 2_445_063,
    "autoencoder_tiny_sd3": 2_458_899,
    "beit_base_patch16_224": 86_530_984,
    "beit_base_patch16_384": 86_744_104,
    "beit_large_patch16_224": 304_430_568,
    "beit_large_patch16_384": 304_998_888,
    "beit_large_patch16_512": 305_674_728,
    "beitv2_base_patch16_224": 86_530_984,
    "beitv2_large_patch16_224": 304_430_568,
    "convnext_atto": 3_695_520,
    "convnext_tiny": 28_589_128,
    "convnext_base": 88_591_464,
    "convnextv2_atto": 3_708_400,
    "convnextv2_tiny": 28_635_496,
    "convnextv2_base": 88_717_800,
    "detr_resnet50": 41_524_768,
    "detr_resnet101": 60_464_672,
    "detr_resnet50_dc5": 41_524_768,
    "detr_resnet101_dc5": 60_464_672,
    "fasterrcnn_resnet50_fpn": 41_755_286,
    "fasterrcnn_resnet50_fpn_v2": 43_712_278,
    "fasterrcnn_mobilenet_v3_large_fpn": 19_386_354,
    "fasterrcnn_mobilenet_v3_large_320_fpn": 19_386_354,
    "fcos_resnet50_fpn": 32_269_600,
    "retinanet_resnet50_fpn": 34_014_999,
    "retinanet_resnet50_fpn_v2": 38_198_935,
    "mobilenetv2_100": 3_504_872,
    "mobilenetv3_large_100": 5_483_032,
    "mobilenet_v3_small": 2_542_856,
    "efficientnet_b0": 5_288_548,
    "efficientnet_lite0": 4_652_008,
    "regnetx_002": 2_684_792,
    "regnetx_004_tv": 5_495_976,
    "regnetx_080": 39_572_648,
    "regnety_002": 3_162_996,
    "regnety_004": 4_344_144,
    "regnety_016": 11_202_430,
    "regnety_032": 19_436_338,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet50d": 25_576_264,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "wide_resnet50_2": 68_883_240,
    "rf_detr_nano": 30_466_914,
    "rf_detr_small": 32_110_786,
    "rf_detr_medium": 33_687_074,
    "rf_detr_large": 33_932_834,
    "rf_detr_base": 32_174_146,
    "swin_tiny_patch4_window7_224": 28_288_354,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
    "swin_large_patch4_window7_224": 196_532_476,
    "swin_base_patch4_window12_384": 87_903_584,
    "swin_large_patch4_window12_384": 196_735_516,
    "swin_s3_tiny_224": 28_328_674,
    "swin_s3_small_224": 49_737_298,
    "swin_s3_base_224": 71_125_762,
    "swinv2_tiny_window8_256": 28_347_154,
    "swinv2_tiny_window16_256": 28_347_154,
    "swinv2_small_window8_256": 49_728_418,
    "swinv2_small_window16_256": 49_728_418,
    "swinv2_base_window8_256": 87_918_816,
    "swinv2_base_window16_256": 87_918_816,
    "swinv2_base_window12_192": 87_918_816,
    "swinv2_base_window12to16_192to256": 87_918_816,
    "swinv2_base_window12to24_192to384": 87_918_816,
    "swinv2_large_window12_192": 196_739_932,
    "swinv2_large_window12to16_192to256": 196_739_932,
    "swinv2_large_window12to24_192to384": 196_739_932,
    "mae_vit_base_patch16": 111_907_840,
    "mae_vit_large_patch16": 329_541_888,
    "dino_vits16": 43_952_640,
    # The original's count, with 1000 classes and the positions.
    "dit_s_2": 32_963_360 - 256 * 384 - 909 * 384,
    "dit_xl_2": 675_129_632 - 256 * 1152 - 909 * 1152,
    "simclr_vits16": 22_716_416,
    "siglip_base_patch16_224": 203_155_970,
    "deeplabv3_resnet50": 39_656_859,
    "deeplabv3_resnet101": 58_648_987,
    "eomt_small_640": 23_959_772,
    "eomt_base_640": 93_630_812,
    "eomt_large_640": 316_652_636,
    "inception_v3": 27_161_264 - 3_326_696,  # without the second head
    "mit_b0": 3_576_392,
    "mit_b1": 13_664_424,
    "mit_b2": 24_709_288,
    "mit_b3": 44_585_128,
    "mit_b4": 61_355_688,
    "mit_b5": 81_956_008,
    "segformer_b0": 3_737_531,
    "segformer_b1": 13_700_635,
    "segformer_b2": 27_416_603,
    "segformer_b3": 47_292_443,
    "segformer_b4": 64_063_003,
    "segformer_b5": 84_663_323,
    "nanodet_g": 3_792_885,
    "upernet_resnet18": 40_824_987,
    "upernet_swin_tiny_patch4_window7_224": 58_987_797,
    "upernet_mit_b0": 31_165_627,
    "unet_plain": 488_419 + 88 * 145,
    "unet_resnet18": 14_328_499 + 88 * 145,
    "yolox_nano": 914_304,
    "yolox_tiny": 5_059_056,
    "yolox_s": 8_972_512,
    "yolox_m": 25_332_864,
    "yolox_l": 54_217_376,
    "yolox_x": 99_082_048,
}
FIRST_OF_FAMILY = {find_variant(name)[0]: name for name in reversed(COUNTS)}


@pytest.mark.long(but=("ti/16", "resnet18", "beit_base_patch16_224"))
@pytest.mark.parametrize(
    "name",
    [
        name if name in FIRST_OF_FAMILY.values() else pytest.param(name, marks=pytest.mark.long)
        for name in COUNTS
    ],
)
def test_parameter_counts(name):
    family, arguments = find_variant(name)
    arguments = {"image_size": (224, 224), **arguments}
    if "image_size" not in FAMILIES[family].arguments:
        del arguments["image_size"]
    classes = 1000 if family in CLASSIFIERS else 91 - (family == "faster_rcnn")  # one is none
    model = build_model(family, num_classes=classes, **arguments)
    params = flatten(abstract(model, arguments.get("image_size", (64, 64)))["params"])
    count = sum(leaf.size for leaf in params.values())
    # The norms of these have no parameters.
    frozen = family in ("faster_rcnn", "fcos", "retinanet") and not name.endswith("v2")
    if family == "detr" or frozen:
        count -= sum(x.size for path, x in params.items() if "/bn" in path or "_bn/" in path)
    if family == "swin" and model.version == 2:  # the key's bias, which timm hasn't
        count -= sum(n * model.width * 2**stage for stage, n in enumerate(model.depths))
    assert count == COUNTS[name]


def test_counts_cover_every_family():
    assert set(FIRST_OF_FAMILY) == set(FAMILIES)
    assert all(family.variant("no such variant") is None for name, family in FAMILIES.items())


@pytest.mark.parametrize(("family", "form"), EVERY_FORM)
def test_layers_cover_every_parameter_in_order(family, form):
    case, model = CASES[family], build(family, form)
    layers = {p: model.layer_of(p) for p in flatten(abstract(model, case.size)["params"])}
    assert len(set(layers.values())) == model.num_layers - case.unused
    assert set(layers.values()) <= set(range(model.num_layers))
    assert layers[model.stem] == 0
    head = "head" if family in CLASSIFIERS else "class_head"
    known = {
        "mae": "decoder/pred",
        "dino": "dino_head",
        "simclr": "contrastive_head",
        "siglip": "text/head",
        "autoencoder_kl": "decoder/conv_out",
        "autoencoder_tiny": "decoder/conv_out",
        "dit": "head",
    }
    head = known.get(family, head)
    heads = [layer for path, layer in layers.items() if re.match(rf"(head_\d/)?{head}/", path)]
    assert len(heads) >= 2
    assert set(heads) == {model.num_layers - 1}
    blocks = {}  # one layer each, deeper ones later
    for path, layer in layers.items():
        if found := re.match(r"(backbone/)?(stage_(\d+)/)?block_(\d+)/(?!downsample)", path):
            blocks.setdefault((int(found[3] or 0), int(found[4])), set()).add(layer)
    assert all(len(found) == 1 for found in blocks.values())
    depths = [layer for _, (layer,) in sorted(blocks.items())]
    assert depths == sorted(depths)
    assert len(depths) == len(set(depths))
    if form == "plain":
        assert {path: layers[path] for path in case.layers} == case.layers


# Features ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("family", "form"), EVERY_FORM)
def test_features_and_strides(family, form, whole):
    case, size = CASES[family], (64, 96) if whole else (70, 50)
    arguments = {}
    if "image_size" in FAMILIES[family].arguments:
        size = (64, 64) if family == "rf_detr" else size
        arguments["image_size"] = size
    model = build(family, form, **arguments)
    images = jnp.zeros((2, *size, model.in_channels))
    if family in ("dit", "nanodet", "yolox") and not whole:
        message = rf"70 x 50 pixels: .* takes multiples of {4 if family == 'dit' else 32}"
        with pytest.raises(UserError, match=message):
            abstract(model, size)
        return
    result, features = jax.eval_shape(
        lambda key: model.init_with_output(key, images, return_features=True)[0], jax.random.key(0)
    )
    pyramid = [name for name, _ in model.pyramid]
    heads = ("head", "head_dist") if form == "distilled" else ()
    assert set(features) == {*pyramid, *case.form_features.get(form, case.features), *heads}
    assert all(len(x) == 2 for x in features.values())
    outputs = outputs_of(result)
    classes = model.num_classes + (family in ("detr", "eomt", "faster_rcnn"))  # and none of them
    if family == "mae":  # the pixels of a patch
        classes = model.patch_size**2 * model.in_channels
    elif family == "dino":
        classes = model.prototypes
    elif family == "simclr":
        classes = model.projection
    elif family == "siglip":
        classes = features["pooled"].shape[-1]
    elif FAMILIES[family].task == GENERATION:
        classes = model.in_channels
    assert main_of(outputs).shape[-1] == classes
    for name, stride in model.pyramid:
        if whole or family == "rf_detr":
            assert features[name].shape[1:3] == tuple(side // stride for side in size), name
        elif case.cells is not None:
            expected = tuple(case.cells(side, stride) for side in size)
            assert features[name].shape[1:3] == expected, name
    if family in CLASSIFIERS:
        assert outputs["logits"].shape == (2, classes)
        assert features["pooled"].ndim == (3 if heads else 2)


# Gradients and forms that agree ------------------------------------------------------------------


@functools.cache
def trained(family, form="plain", **schedule):
    """(outputs, gradients by path, new statistics) of a training pass."""
    model, size = build(family, form, **schedule), CASES[family].size
    variables, images = random_variables(model, size), random_images(model, size)

    def loss(params):
        result, new = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        outputs = outputs_of(result)
        return sum(jnp.sin(x).sum() for x in outputs.values()), (outputs, new)

    gradients, (outputs, new) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    return outputs, flatten(gradients), flatten(new)


@pytest.mark.long(but=("vit-plain", "resnet-plain"))  # the others compile for seconds
@pytest.mark.parametrize(("family", "form"), EVERY_FORM)
def test_gradients_are_finite_and_not_zero(family, form):
    outputs, gradients, _ = trained(family, form)
    assert all(np.isfinite(x).all() for x in outputs.values())
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all(), path
        if not re.match(CASES[family].without_gradient, path):
            assert np.abs(gradient).max() > 1e-6, path


SCHEDULES = [
    *((family, {"remat": True}) for family in having("remat")),
    *((family, {"scan": True}) for family in having("scan")),
    *((family, {"scan": True, "remat": True}) for family in having("scan")),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "schedule"),
    [pytest.param(*case, id="-".join([case[0], *case[1]])) for case in SCHEDULES],
)
def test_remat_and_scan_change_nothing_but_the_schedule(family, schedule):
    """The same outputs, gradients and statistics, each of these updated once."""
    outputs, gradients, statistics = trained(family)
    again, gradients_again, statistics_again = trained(family, **schedule)
    rounding = CASES[family].rounding
    check_near(again, outputs, 1e-6 * rounding)
    assert gradients_again.keys() == gradients.keys()
    for path, gradient in gradients.items():
        if re.match(CASES[family].without_gradient, path):
            np.testing.assert_allclose(gradients_again[path], gradient, atol=1e-4, err_msg=path)
        else:
            assert relative(gradients_again[path], gradient) <= 1e-4 * rounding, path
    if "freeze_norm" in FAMILIES[family].arguments:
        frozen = build(family).freeze_norm
        counts = {int(x) for path, x in statistics.items() if path.endswith("count")}
        assert counts == {0 if frozen else 1}
    moved, moved_again = (
        {path: x for path, x in tree.items() if not path.endswith("count")}
        for tree in (statistics, statistics_again)
    )
    check_near(moved_again, moved, 1e-5 * rounding)


@pytest.mark.long(but=("resnet",))
@pytest.mark.parametrize("family", having("freeze_norm"))
def test_frozen_norms_train_as_they_evaluate(family):
    model, size = build(family, freeze_norm=True), CASES[family].size
    variables, images = random_variables(model, size), random_images(model, size)
    train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    outputs, state = train(variables, images)
    check_near(outputs, jax.jit(model.apply)(variables, images), 1e-6)
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])


@pytest.mark.long
@pytest.mark.parametrize("family", having("dropout", "drop_path"))
def test_rates_act_in_training_only_and_by_the_key(family):
    """With recomputation too, which draws the same."""
    size = CASES[family].size
    rates = {name: 0.3 for name in ("dropout", "drop_path") if family in having(name)}
    frozen = {"freeze_norm": True} if family in having("freeze_norm") else {}
    plain, model = build(family, **frozen), build(family, **rates, **frozen)
    variables, images = random_variables(model, size), random_images(model, size)
    still = jax.jit(model.apply)(variables, images)
    check_near(still, jax.jit(plain.apply)(variables, images), 1e-6)

    @functools.partial(jax.jit, static_argnums=0)
    def train(remat, key):
        dropped = build(family, **rates, **frozen, remat=remat)
        return dropped.apply(
            variables, images, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )[0]

    first = train(False, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, train(False, jax.random.key(1)), first)
    other = train(False, jax.random.key(2))
    assert relative(main_of(outputs_of(other)), main_of(outputs_of(first))) > 1e-3
    check_near(train(True, jax.random.key(1)), first, 1e-5)
    assert train._cache_size() == 2


@pytest.mark.long(but=("vit",))
@pytest.mark.parametrize("family", CASES)
def test_bfloat16_stays_near_float32_and_its_head_is_float32(family):
    half, size = build(family, dtype=jnp.bfloat16), CASES[family].size
    variables, images = random_variables(half, size), random_images(half, size)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract(half, size)["params"])} == {
        jnp.dtype("float32")
    }
    apply = functools.partial(half.apply, return_features=True)
    for train in (False, True):
        train_or_not = functools.partial(apply, train=train, mutable=["batch_stats"])
        (result, features), _ = jax.eval_shape(train_or_not, variables, images)
        dtypes = {x.dtype for x in outputs_of(result).values()}
        assert {x for x in dtypes if jnp.issubdtype(x, jnp.floating)} == {jnp.dtype("float32")}
        assert {x.dtype for x in features.values()} >= {jnp.dtype("bfloat16")}
    if family in CLASSIFIERS:
        logits = jax.jit(half.apply)(variables, images)
        exact = jax.jit(build(family).apply)(variables, images)
        assert 1e-6 < relative(logits, exact) < 0.1


# Inputs and heads --------------------------------------------------------------------------------


@pytest.mark.long(but=("resnet",))
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_no_head_and_other_channels(family):
    size, channels = CASES[family].size, {"in_channels": 5, "mean": (0.5,) * 5, "std": (0.5,) * 5}
    whole, headless = build(family, **channels), build(family, **channels, num_classes=0)
    variables, images = random_variables(whole, size), random_images(whole, size)
    stem = flatten(variables["params"])[whole.stem]
    assert stem.shape[2] == 5
    bare = {name: tree for name, tree in variables["params"].items() if name != "head"}
    assert set(flatten(bare)) == set(flatten(abstract(headless, size)["params"]))
    _, features = jax.jit(lambda v, x: whole.apply(v, x, return_features=True))(variables, images)
    pooled = jax.jit(headless.apply)({**variables, "params": bare}, images)
    assert relative(pooled, features["pooled"]) <= 1e-6


@pytest.mark.long(but=("resnet",))
@pytest.mark.parametrize("family", CASES)
def test_normalization_is_inside(family):
    size = CASES[family].size
    mean, std = np.float32([0.1, 0.4, 0.6]), np.float32([0.2, 0.3, 0.9])
    raw = build(family, mean=(0.0,) * 3, std=(1.0,) * 3)
    own = build(family, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    variables, images = random_variables(raw, size), random_images(raw, size)
    normalized = (images - mean.reshape(1, 1, 1, 3)) / std.reshape(1, 1, 1, 3)
    ours = jax.jit(own.apply)(variables, images)
    check_near(ours, jax.jit(raw.apply)(variables, normalized), 2e-6)


@pytest.mark.parametrize("family", [name for name in having("image_size") if name in CLASSIFIERS])
def test_an_image_of_another_size_is_refused(family):
    height, width = CASES[family].size
    message = rf"images are \({width}, {height}\), the model takes \({height}, {width}\)"
    with pytest.raises(ValueError, match=message):
        abstract(build(family), (width, height))


@pytest.mark.long(but=("resnet",))
@pytest.mark.parametrize("family", CASES)
def test_adapters_fit_every_kernel(family):
    """At first they change nothing; then they say what merged weights say."""
    model, size = build(family), CASES[family].size
    variables, images = random_variables(model, size), random_images(model, size)
    rule = f"(?!{CASES[family].grouped}).*kernel"
    tree = lora.attach(variables["params"], (rule,), key=jax.random.key(0), rank=2, alpha=4.0)
    base, adapters = lora.detach(tree)
    paths = flatten(variables["params"])
    assert set(adapters) == {path for path in paths if re.fullmatch(rule, path)}
    apply = jax.jit(lambda params: outputs_of(model.apply({**variables, "params": params}, images)))
    plain = apply(variables["params"])
    check_near(apply(tree), plain, 1e-6)
    moved = {
        path: dataclasses.replace(leaf, b=jnp.full_like(leaf.b, 0.05))
        for path, leaf in adapters.items()
    }
    adapted = apply(lora.apply_adapters(base, moved))
    assert relative(main_of(adapted), main_of(plain)) > 1e-3
    check_near(adapted, apply(lora.merge(lora.apply_adapters(base, moved))), 1e-5)
