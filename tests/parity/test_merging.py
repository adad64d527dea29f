"""Token merging beside timm's ViT in PyTorch, with blocks that merge as the paper says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from vit_references import timm_reference

from vision_jax import convert
from vision_jax.certify.measure import relative_error
from vision_jax.certify.random_weights import randomize
from vision_jax.models.families import build_model
from vision_jax.run.description import model_shapes
from vision_jax.trees.paths import flatten, unflatten

TINY = "vit_tiny_patch16_224"
KINDS = {
    "class token": (TINY, {}),
    "odd patches": (TINY, {"img_size": 80}),
    "mean, with class token": (TINY, {"global_pool": "avg"}),
    "mean, without class token": (TINY, {"global_pool": "avg", "class_token": False}),
    "without class token, odd": (
        TINY,
        {"global_pool": "avg", "class_token": False, "img_size": 80},
    ),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers": (TINY, {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1}),
    "attention pooling": (TINY, {"global_pool": "map", "class_token": False}),
    "norms of q and k": (TINY, {"qk_norm": True}),
}
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def merge(x, size, metric, count, prefix):
    """One image's tokens: x [N, D], size [N], metric [N, d]."""
    metric = torch.nn.functional.normalize(metric, dim=-1)
    merges = torch.arange(len(x)) >= prefix
    even = torch.arange(len(x)) % 2 == 0
    likeness = metric @ metric.T
    # Rows that may move and columns that may take: all others are infinitely unlike.
    likeness[~(even & merges)] = -torch.inf
    likeness[:, even | ~merges] = -torch.inf
    best, partner = likeness.max(-1)
    order = sorted(range(len(x)), key=lambda i: (-best[i].item(), i))[:count]
    onto = torch.arange(len(x))
    onto[order] = partner[order]
    share = torch.nn.functional.one_hot(onto, len(x)).T.to(x) * size
    total = share.sum(1)
    x = share @ x / total.clamp(min=1)[:, None]
    kept = [i for i in range(len(x)) if i not in order]
    places = [i for i in kept if i < prefix]
    for odd in (0, 1):
        places += [i for i in kept if i >= prefix and i % 2 == odd]
    return x[places], total[places]


def attend(attn, x, size):
    """timm's Attention, with the sizes on its logits: (outputs, mean keys)."""
    batch, tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    logits = q @ k.transpose(-2, -1) * attn.scale + size.log()[:, None, None]
    x = (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, -1)
    return attn.proj(x), k.mean(1)


def pool(model, x, size):
    own, prefix = size[:, model.num_prefix_tokens :], model.num_prefix_tokens
    if model.global_pool == "avg":
        shares = own / own.sum(1, keepdim=True)
        return (shares[..., None] * x[:, prefix:]).sum(1)
    if model.global_pool == "map":
        it, x = model.attn_pool, x[:, prefix:]
        batch, tokens, width = x.shape
        q = it.q(it.latent.expand(batch, -1, -1)).reshape(batch, 1, it.num_heads, -1)
        k, v = it.kv(x).reshape(batch, tokens, 2, it.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = q.transpose(1, 2) @ k.transpose(-2, -1) * it.scale + own.log()[:, None, None]
        x = it.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, 1, width))
        return (x + it.mlp(it.norm(x)))[:, 0]
    return x[:, 0]


@torch.no_grad()
def merged_logits(model, images, counts):
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    size = torch.ones(x.shape[:2], dtype=x.dtype)
    for block, count in zip(model.blocks, counts, strict=True):
        y, metric = attend(block.attn, block.norm1(x), size)
        x = x + block.ls1(y)
        both = [
            merge(*one, count, model.num_prefix_tokens) for one in zip(x, size, metric, strict=True)
        ]
        x, size = (torch.stack(part) for part in zip(*both, strict=True))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)
    if hasattr(model, "head_dist"):
        return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
    return model.head(model.fc_norm(pool(model, x, size)))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_a_reference_of_the_paper(kind, rng, tmp_path):
    name, given = KINDS[kind]
    given = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, **given}
    reference, size = timm_reference(name, given.pop("img_size"), **given)
    randomize(reference.module, int(rng.integers(2**31)))
    weights = convert.read_weights(reference.save(tmp_path))
    _, arguments = convert.recognize(weights)
    images = rng.random((3, *size, 3))
    for dtype, tolerance in TOLERANCE.items():
        with jax.enable_x64(dtype == "float64"):
            model = build_model("vit", **arguments, dtype=jnp.dtype(dtype))
            shapes = model_shapes(model, size)["params"]
            flat = convert.import_weights(weights, flatten(shapes), arguments)
            params = unflatten(shapes, {p: x.astype(dtype) for p, x in flat.items()})
            module = reference.module.to(getattr(torch, dtype)).eval()
            seen = ((images - model.mean) / model.std).astype(dtype)
            seen = torch.from_numpy(seen.transpose(0, 3, 1, 2))
            plain = merged_logits(module, seen, (0, 0, 0)).numpy()
            patches = model.grid[0] * model.grid[1]
            for merge, counts in {
                1: (1, 1, 1),
                5: (5, 5, min(5, (patches - 10) // 2)),
                0.3: {16: (5, 3, 2), 25: (8, 5, 4)}[patches],
            }.items():
                apply = jax.jit(model.clone(merge=merge).apply)
                ours = np.asarray(apply({"params": params}, images.astype(dtype)))
                theirs = merged_logits(module, seen, counts).numpy()
                assert relative_error(ours, theirs) <= tolerance, (dtype, merge)
                assert relative_error(plain, theirs) > 1e-3
