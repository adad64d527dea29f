"""Optimizers, clipping and the loss against torch over 20 updates, in float64."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from vision_jax import convert, optim
from vision_jax.convert.tables import find_table, shapes_of
from vision_jax.models.families import build_model, initialize
from vision_jax.ops import losses
from vision_jax.trees import paths

STEPS, LR, WD, MOMENTUM, BETAS, EPS = 20, 3e-3, 0.2, 0.9, (0.85, 0.97), 1e-8


@pytest.mark.parametrize("clip_norm", [0.0, 1.5])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "lars"])
def test_same_weights_as_torch(name, clip_norm, rng):
    """Or as timm, which has what torch has not."""
    shapes = {"head/kernel": (16, 8), "head/bias": (8,)}
    start = {path: rng.normal(size=shape) for path, shape in shapes.items()}
    gradients = [
        {path: rng.normal(size=shape) for path, shape in shapes.items()} for _ in range(STEPS)
    ]

    kernel, bias = (torch.nn.Parameter(torch.tensor(array)) for array in start.values())
    groups = [{"params": [kernel], "weight_decay": WD}, {"params": [bias], "weight_decay": 0.0}]
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    elif name == "lamb":
        optimizer = timm.optim.Lamb(groups, lr=LR, betas=BETAS, eps=EPS, max_grad_norm=None)
    elif name == "lion":
        optimizer = timm.optim.Lion(groups, lr=LR, betas=BETAS)
    elif name == "lars":
        optimizer = timm.optim.Lars(groups, lr=LR, momentum=MOMENTUM)
    else:
        optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)
    for gradient in gradients:
        kernel.grad, bias.grad = (torch.tensor(array) for array in gradient.values())
        if clip_norm:
            torch.nn.utils.clip_grad_norm_([kernel, bias], clip_norm)
        optimizer.step()

    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, start)
        tx = optim.make_optimizer(
            name,
            schedule=optim.make_schedule("constant", peak=LR, total_steps=STEPS),
            params=params,
            weight_decay=WD,
            b1=BETAS[0],
            b2=BETAS[1],
            eps=EPS,
            momentum=MOMENTUM,
            clip_norm=clip_norm,
        )
        state, update = tx.init(params), jax.jit(tx.update)
        for gradient in gradients:
            updates, state = update(jax.tree.map(jnp.asarray, gradient), state, params)
            params = optax.apply_updates(params, updates)
        for path, reference in (("head/kernel", kernel), ("head/bias", bias)):
            expected = reference.detach().numpy()
            # The rate and the bias correction are float32, and torch adds 1e-6 to the norm it
            # clips by: the error is relative to what was learned.
            change = np.abs(expected - start[path]).max()
            np.testing.assert_allclose(params[path], expected, rtol=0, atol=1e-6 * change)


def test_muon_is_torchs(rng):
    """torch rounds to bfloat16 inside, which a bias correction of the momentum would exceed."""
    start = rng.normal(size=(24, 16))
    gradients = [rng.normal(size=start.shape) for _ in range(4)]
    reference = torch.nn.Parameter(torch.tensor(start.T))  # [out, in]
    optimizer = torch.optim.Muon(
        [reference], lr=LR, weight_decay=WD, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    for gradient in gradients:
        reference.grad = torch.tensor(gradient.T)
        optimizer.step()

    with jax.enable_x64(True):
        params = {"block_0/mlp/fc1/kernel": jnp.asarray(start)}
        tx = optim.make_optimizer(
            "muon",
            schedule=optim.make_schedule("constant", peak=LR, total_steps=STEPS),
            params=params,
            weight_decay=WD,
            momentum=MOMENTUM,
        )
        state = tx.init(params)
        for gradient in gradients:
            updates, state = tx.update(dict.fromkeys(params, jnp.asarray(gradient)), state, params)
            params = optax.apply_updates(params, updates)
    expected = reference.detach().numpy().T
    change = np.linalg.norm(expected - start)
    found = np.asarray(params["block_0/mlp/fc1/kernel"])
    assert np.linalg.norm(found - expected) < 0.02 * change


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_same_cross_entropy_as_torch(smoothing, rng):
    logits, labels = 4 * rng.normal(size=(32, 11)).astype(np.float32), rng.integers(0, 11, 32)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(labels), label_smoothing=smoothing, reduction="none"
    )
    targets = losses.one_hot_targets(jnp.asarray(labels), 11, smoothing)
    result = losses.cross_entropy(jnp.asarray(logits), targets)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


VIT = {"img_size": 32, "depth": 2}
BEIT = {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 1}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 2)}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
GROUPED = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "mean of tokens": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg", "qk_norm": True}),
    "SigLIP": (
        "vit_tiny_patch16_224",
        VIT
        | {"class_token": False, "global_pool": "map", "reg_tokens": 2, "init_values": 0.1}
        | {"pre_norm": True},
    ),
    "deit": ("deit_tiny_distilled_patch16_224", VIT),
    "beit": ("beit_base_patch16_224", BEIT),
    "class token of beit": ("beit_base_patch16_224", BEIT | {"global_pool": "token"}),
    "shared table": (
        "beit_base_patch16_224",
        BEIT
        | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
        | {"use_abs_pos_emb": True},
    ),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
    "convnext": ("convnext_atto", CONVNEXT),
    "norm before pooling": ("convnext_tiny_hnf", CONVNEXT),
    "convnextv2": ("convnextv2_atto", CONVNEXT),
    "resnet": ("resnet18", {"layers": (1, 2, 1, 1)}),
    "regnet": ("regnety_002", {}),
    "mobilenet": ("mobilenetv2_050", {}),
    "efficientnet": ("efficientnet_b0", {}),
}


@pytest.mark.parametrize(("name", "arguments"), GROUPED.values(), ids=GROUPED)
def test_weight_decay_and_layers_are_timms(name, arguments, tmp_path):
    """Which parameters decay, and by which power of layer_decay each one's rate is multiplied."""
    reference = timm.create_model(name, num_classes=5, **arguments)
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": name, "num_classes": 5, "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = convert.read_weights(str(tmp_path))
    family, own = convert.recognize(weights)
    model = build_model(family, **own)
    size = own.get("image_size", (64, 64))
    like = jax.eval_shape(lambda key: initialize(model, key, size), jax.random.key(0))["params"]
    shapes = paths.flatten(like)
    named = {
        tensor: rule.paths
        for rule in find_table(shapes_of(weights.tensors)).rules(convert.arguments_of(model))
        for tensor in getattr(rule, "names", ())
    }

    exempt = getattr(reference, "no_weight_decay", set)()
    names = {id(parameter): name for name, parameter in reference.named_parameters()}
    decayed = {
        names[id(parameter)]: group["weight_decay"] > 0
        for group in param_groups_weight_decay(reference, 0.1, no_weight_decay_list=exempt)
        for parameter in group["params"]
    }
    powers = {
        names[id(parameter)]: round(-math.log2(group["lr_scale"]))
        for group in param_groups_layer_decay(
            reference, layer_decay=0.5, no_weight_decay_list=exempt
        )
        for parameter in group["params"]
    }
    compared = set()
    for tensor in decayed:
        for path in set(named[tensor]) & shapes.keys():
            power = model.num_layers - 1 - model.layer_of(path)
            got = optim.is_decayed(path, shapes[path]), power
            assert got == (decayed[tensor], powers[tensor]), (tensor, path)
            compared.add(path)
    assert compared == shapes.keys()
