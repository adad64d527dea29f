"""Every notebook runs from top to bottom, at small size."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from vision_jax.logging import read_metrics

ROOT = Path(__file__).parents[1]
SMALL = {"STEPS = 200": "STEPS = 4", "IMAGES_PER_CLASS = 400": "IMAGES_PER_CLASS = 12"}


@pytest.mark.parametrize("path", sorted((ROOT / "colabs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    for full, small in SMALL.items():
        assert full in parameters.source
        parameters.source = parameters.source.replace(full, small)
    # The kernel starts in an empty folder and finds the package as an installed one would be.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XLA_FLAGS", "")
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()

    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "120 images of" in printed
    run = tmp_path / "runs" / "my_images"
    assert "eval/top1" in read_metrics(run / "metrics.jsonl")[-1]
    assert (run / "predict.png").is_file()
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
