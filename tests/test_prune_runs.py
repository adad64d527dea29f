"""Runs that are pruned by their own data, and what trains on from what is left."""

import json

import detection_runs
import jax
import numpy as np
import pytest
import runs

from vision_jax import figures, train
from vision_jax.logging import read_metrics
from vision_jax.main import main
from vision_jax.run.restore import restore


def check_trained_on(config, workdir):
    """Trains; returns the model of the run that was restored from it."""
    assert train.run(config, workdir) == 0
    losses = [r["train/loss"] for r in read_metrics(workdir / "metrics.jsonl") if "train/loss" in r]
    assert losses
    assert np.isfinite(losses).all()
    restored = restore(config, workdir, "last")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored.state))
    return restored.run.model


@pytest.mark.long
def test_a_classifier_learns_from_what_it_was_cut_out_of(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: None)
    whole, out = runs.finished(), tmp_path / "pruned"
    arguments = ("--keep=0.5", "--score=taylor", "--batches=2", f"--to={out}")
    assert main(["prune", str(whole), *arguments]) == 0
    before = restore(runs.full_config(), whole, "last").run.model
    config = runs.tiny_config(
        recipes="distill",
        trainable=".*",
        model__weights=str(out / "model.safetensors"),
        model__reinitialize="()",
        distill__teachers=f"('{whole}',)",
    )
    after = check_trained_on(config, tmp_path / "recovered")
    assert (2 * after.num_heads, 2 * after.mlp_width) == (before.num_heads, before.mlp_width)
    assert (after.width, after.head_size) == (before.width, before.width // before.num_heads)


@pytest.mark.long
def test_a_detector_trains_on_when_it_has_lost_a_third(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: None)
    out = tmp_path / "pruned"
    arguments = ("--keep=0.67", "--score=taylor", "--batches=2", "--multiple=1", f"--to={out}")
    assert main(["prune", str(detection_runs.finished()), *arguments]) == 0
    config = detection_runs.tiny_config(
        model__weights=str(out / "model.safetensors"), model__variant="", model__arguments="()"
    )
    before = restore(detection_runs.tiny_config(), detection_runs.finished(), "last").run.model
    after = check_trained_on(config, tmp_path / "recovered")
    assert after.widths == tuple(round(0.67 * width) for width in before.widths)
    assert after.mlp_width == round(0.67 * before.mlp_width)
    assert after.width == before.width


@pytest.mark.long
def test_a_detector_that_has_lost_a_third_is_exported_in_int8(tmp_path):
    """From the folder that `prune` leaves: narrower attention and convolutions, in int8 too."""
    out = tmp_path / "pruned"
    arguments = ("--keep=0.67", "--multiple=1", f"--to={out}")
    assert main(["prune", str(detection_runs.finished()), *arguments]) == 0
    for flags in ((), ("--quantize=weights",)):
        given = [str(out), "--to=stablehlo", f"--out={tmp_path / 'exported'}", "--seed=1", *flags]
        assert main(["export", *given]) == 0
        record = json.loads((tmp_path / "exported" / "model.stablehlo.json").read_text())
        found = record["certificate"]
        assert found["pass"], found
        assert found["compared"] > 0
        assert ("int8" in found) == bool(flags)
    assert found["int8"]["beside_float32"]["bytes"] < 1
