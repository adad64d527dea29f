"""A masked run: zeros stay zero, through steps, a resume and the file that it leaves."""

import numpy as np
import pytest
import runs
from safetensors.numpy import load_file

from vision_jax import figures, train
from vision_jax.run.restore import restore
from vision_jax.trees import lora, paths

SPARSE = {"recipes": "mask", "trainable": ".*", "mask__form": "2:4"}


@pytest.mark.long
def test_zeros_stay_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: None)
    config = runs.full_config(**SPARSE)
    first = runs.Prepared(config=config)
    masks = {path: np.asarray(x) for path, x in first.frozen.items() if path.endswith("/mask")}
    assert {path.removesuffix("/kernel/mask") for path in masks} == {
        "block_0/attn/qkv", "block_0/attn/proj", "block_0/mlp/fc1", "block_0/mlp/fc2",
    }  # fmt: skip
    before = {path: np.asarray(x) for path, x in first.state.trainable.items()}
    assert train.run(config, tmp_path) == 0
    restored = restore(config, tmp_path, "last")
    for path, mask in masks.items():
        np.testing.assert_array_equal(restored.frozen[path], mask)
    trained, frozen = restored.trained.arguments[:2]
    merged = paths.flatten(lora.merge(restored.run.parameters.assemble({**trained, **frozen})))
    for path, mask in masks.items():
        kernel = np.asarray(merged[path.removesuffix("/mask")])
        assert mask.mean() == 0.5
        assert not kernel[~mask].any()
        assert np.abs(kernel - before[path.removesuffix("mask") + "base"])[mask].max() > 0
    saved = load_file(tmp_path / "model.safetensors")["blocks.0.mlp.fc1.weight"].T
    np.testing.assert_array_equal(saved, merged["block_0/mlp/fc1/kernel"])


@pytest.mark.long
def test_a_sparse_run_trains_for_int8(tmp_path, monkeypatch):
    """What it leaves has the zeros, and lies on int8's levels."""
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: None)
    fields = {"quantize__form": "int8", "quantize__train": True, "quantize__activations": "int8"}
    config = runs.full_config(**(SPARSE | fields | {"recipes": "('mask', 'quantize')"}))
    masks = {
        path: np.asarray(x)
        for path, x in runs.Prepared(config=config).frozen.items()
        if path.endswith("/mask")
    }
    assert len(masks) == 4
    assert train.run(config, tmp_path) == 0
    saved = load_file(tmp_path / "model.safetensors")
    kernel = saved["blocks.0.mlp.fc1.weight"].T
    assert not kernel[~masks["block_0/mlp/fc1/kernel/base/mask"]].any()
    levels = kernel / np.abs(kernel).max(0) * 127
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
