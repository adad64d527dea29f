"""`vision_jax compress`: a finished run through all stages, and what it needs."""

import json

import numpy as np
import pytest
import runs
from safetensors.numpy import load_file

import vision_jax
from vision_jax import figures
from vision_jax.commands import compress
from vision_jax.errors import UserError


def make_config(**fields):
    return runs.tiny_config(
        **{
            "recipes": "distill",
            "trainable": ".*",
            "distill__teachers": f"('{runs.finished()}',)",
            "total_steps": 2,
            "ptq__images": 8,
            "ptq__activations": "dynamic",
            "compress__int8_steps": 2,
            "compress__formats": "('stablehlo',)",
        }
        | fields
    )


@pytest.mark.long
@pytest.mark.parametrize("by", ["prune", "factorize"])
def test_a_run_through_all_stages(by, tmp_path, monkeypatch, capsys):
    """And again, which goes on where it was: nothing is trained twice."""
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: None)
    config = make_config(compress__by=by, compress__keep=0.7 if by == "factorize" else 0.5)
    assert compress.run(config, tmp_path) == 0
    found = json.loads((tmp_path / "compression.json").read_text())
    whole, recovered, quantized = (found[name] for name in ("whole", "recovered", "quantized"))
    assert whole["macs"] > recovered["macs"] == quantized["macs"]
    assert whole["parameters"] > recovered["parameters"] == quantized["parameters"]
    sizes = [one["files"]["stablehlo"]["bytes"] for one in (whole, recovered, quantized)]
    assert sizes == sorted(sizes, reverse=True)
    for name in ("whole", "recovered", "quantized"):
        path = tmp_path / "export" / name / "model.stablehlo"
        assert found[name]["files"]["stablehlo"]["bytes"] == path.stat().st_size
        assert found[name]["files"]["stablehlo"]["cpu_ms_an_image"] > 0
        assert 0 <= found[name]["evaluation"]["top1"] <= 1
    assert whole["files"]["stablehlo"]["faster"] == 1

    # The head came along, and what trained for int8 lies on its levels.
    first = "pruned" if by == "prune" else "factored"
    smaller, last = (load_file(tmp_path / name / "model.safetensors") for name in (first, "int8"))
    head = "head.weight" if by == "prune" else "head/kernel"
    assert smaller[head].any()
    names = {
        "blocks.0.mlp.fc1.weight": 1,
        "block_0/mlp/fc1/kernel/u": 0,
        "block_0/mlp/fc1/kernel/v": 0,
    }
    found = [name for name in names if name in last]
    assert len(found) == (1 if by == "prune" else 2)
    for name in found:
        levels = last[name] / np.abs(last[name]).max(names[name], keepdims=True) * 127
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
    assert vision_jax.load(tmp_path / "quantized").class_names == runs.CLASSES

    before = (tmp_path / "recovered" / "metrics.jsonl").read_text()
    assert compress.run(config, tmp_path) == 0
    assert (tmp_path / "recovered" / "metrics.jsonl").read_text() == before
    assert "Compression" in capsys.readouterr().out


def test_what_is_pruned_is_the_teacher(tmp_path):
    for fields in (
        {"recipes": "()", "distill__teachers": "()"},
        {"distill__teachers": f"('{runs.finished()}', '{tmp_path}')"},
    ):
        with pytest.raises(UserError, match=r"set config.recipes=distill and config.distill.teach"):
            compress.run(make_config(**fields), tmp_path)
    with pytest.raises(UserError, match="is no finished run: train it first"):
        compress.run(make_config(distill__teachers=f"('{tmp_path}',)"), tmp_path)
