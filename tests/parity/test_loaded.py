"""What the Python face writes, in the hands of timm and PEFT."""

import jax
import numpy as np
import peft
import timm
import torch

import vision_jax
from vision_jax.trees import lora, paths


def test_timm_and_peft_load_what_is_saved(tmp_path, rng):
    loaded = vision_jax.load("embedded:vit_cifar10", class_names=["ant", "bee", "cat"])
    rules = [r"block_\d+/(mlp/fc\d|attn/qkv)/kernel"]
    params = lora.attach(
        loaded.variables["params"], rules, key=jax.random.key(0), rank=2, alpha=4.0
    )
    flat = paths.flatten(params)
    trained = lora.adapter_paths(params) | set(loaded.new_paths)
    moved = {
        path: array + 0.1 * rng.standard_normal(array.shape).astype(np.float32)
        if path in trained
        else array
        for path, array in flat.items()
    }
    tuned = {"params": paths.unflatten(params, moved)}
    photos = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    images = loaded.preprocess(photos)
    expected = np.asarray(jax.jit(loaded.apply)(tuned, images)["logits"])
    normalized = torch.from_numpy((images - 0.5) / 0.5).permute(0, 3, 1, 2)

    def logits(model):
        with torch.no_grad():
            return model.eval()(normalized).numpy()

    vision_jax.save(tmp_path / "merged", loaded, tuned)
    merged = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True)
    assert merged.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
    np.testing.assert_allclose(logits(merged), expected, rtol=1e-4, atol=1e-4)

    vision_jax.save(tmp_path / "base", loaded, loaded.variables)
    base = timm.create_model(f"local-dir:{tmp_path / 'base'}", pretrained=True)
    assert abs(logits(base) - expected).max() > 0.1
    vision_jax.export_adapter(tmp_path / "adapter", loaded, tuned["params"], trained=trained)
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    np.testing.assert_allclose(logits(adapted), expected, rtol=1e-4, atol=1e-4)
