"""Every notebook runs from top to bottom, at small size."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
import runs
from nbclient import NotebookClient

from vision_jax.logging import read_metrics

# What replaces what in a notebook's parameters, so that it runs in a moment.
SMALL = {
    "finetune_your_images": {
        "STEPS = 200": "STEPS = 4",
        "IMAGES_PER_CLASS = 400": "IMAGES_PER_CLASS = 12",
        "TRIALS = 8": "TRIALS = 2",
    },
    "any_checkpoint": {
        '"embedded:fashion_mnist/train"': '"embedded:fashion_mnist/test"',
        "(1, 20), (1, 5, 10), 5": "(1,), (1,), 2",
    },
    "robust_lora": {
        "STEPS = 200": "STEPS = 2",
        "JUDGED = 200": "JUDGED = 10",
        "(1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255)": "(8 / 255,)",
    },
    "shrink_and_export": {"STEPS = 400": "STEPS = 2", "IMAGES = 128": "IMAGES = 16"},
    "teach_a_student": {"STEPS = 400": "STEPS = 2", "STEPS = 1000": "STEPS = 2"},
    "pretrain_your_images": {
        "STEPS = 2000": "STEPS = 4",
        "FINE_STEPS = 500": "FINE_STEPS = 2",
        "PAIR_STEPS = 500": "PAIR_STEPS = 2",
    },
    "segment_your_images": {
        "STEPS = 240": "STEPS = 2",
        "SIDE = 64": "SIDE = 16",
        "THING_STEPS = 125": "THING_STEPS = 2",
    },
    "segment_your_volumes": {
        "STEPS = 100": "STEPS = 2",
        "SIDE = 48": "SIDE = 16",
        "PATIENTS = 6": "PATIENTS = 3",
    },
    "generate_your_images": {
        "STEPS = 500": "STEPS = 3",
        "COUNT = 100": "COUNT = 10",
        "JUDGE_STEPS = 200": "JUDGE_STEPS = 2",
    },
    "watch_a_video": {"FRAMES = 80": "FRAMES = 40"},
    "detect_your_objects": {"STEPS = 1500": "STEPS = 10", "SIDE = 160": "SIDE = 64"},
}


def execute(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a notebook in a folder; returns what it printed."""
    notebook = nbformat.read(runs.ROOT / "colabs" / f"{name}.ipynb", as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    for full, small in SMALL[name].items():
        assert full in parameters.source
        parameters.source = parameters.source.replace(full, small)
    # The kernel starts in an empty folder, where an editable installation is found by its path.
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(runs.ROOT), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("XLA_FLAGS", runs.xla_flags(1))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}}).execute()
    return "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )


def test_every_notebook_is_run_here():
    assert {path.stem for path in (runs.ROOT / "colabs").glob("*.ipynb")} == set(SMALL)


def installing_cell(name: str) -> str:
    notebook = nbformat.read(runs.ROOT / "colabs" / f"{name}.ipynb", as_version=4)
    return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("place", ["clone/colabs", ".", "other"])
def test_the_first_cell_installs_a_clone_wherever_it_is(place, tmp_path, monkeypatch):
    cells = {installing_cell(name) for name in SMALL}
    assert len(cells) == 1
    for folder in ("clone/vision_jax", "clone/colabs", "other"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "clone/vision_jax/main.py").write_text("")
    monkeypatch.chdir(tmp_path / place)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    commands: list[list[str]] = []
    monkeypatch.setattr("subprocess.check_call", commands.append)
    (cell,) = cells
    if place == "other":
        with pytest.raises(RuntimeError, match="clone its repository, or set REPOSITORY"):
            exec(cell, {})
        cell = cell.replace('REPOSITORY = ""', f"REPOSITORY = {str(tmp_path / 'clone')!r}")
    exec(cell, {})
    (command,) = commands
    assert command[:-1] == [sys.executable, "-m", "pip", "install", "--quiet", "--editable"]
    assert command[-1].partition("[")[0] == sys.path[0] == str((tmp_path / "clone").resolve())


def test_the_first_cell_leaves_an_installation_alone(monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda command: pytest.fail(str(command)))
    exec(installing_cell("any_checkpoint"), {})


@pytest.mark.long
def test_finetune_your_images(tmp_path, monkeypatch):
    printed = execute("finetune_your_images", tmp_path, monkeypatch)
    assert "120 images of" in printed
    run = tmp_path / "runs" / "my_images"
    assert "eval/top1" in read_metrics(run / "metrics.jsonl")[-1]
    assert (run / "predict.png").is_file()
    assert (run / "explanations" / "explanations.html").is_file()
    assert (tmp_path / "runs" / "my_images_search" / "best" / "model.safetensors").is_file()
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.long
def test_any_checkpoint(tmp_path, monkeypatch):
    printed = execute("any_checkpoint", tmp_path, monkeypatch)
    assert "block_5 (4, 64, 128)" in printed
    assert "79 tensors, bit-identical" in printed
    assert (tmp_path / "runs" / "probe" / "probe.json").is_file()
    assert (tmp_path / "converted" / "config.json").is_file()


@pytest.mark.long
def test_detect_your_objects(tmp_path, monkeypatch):
    printed = execute("detect_your_objects", tmp_path, monkeypatch)
    run = tmp_path / "runs" / "my_boxes"
    assert "eval/ap" in read_metrics(run / "metrics.jsonl")[-1]
    assert "evaluation on " in printed
    assert len(list((run / "predictions").glob("*.png"))) == 3
    assert len(list((run / "explanations").glob("*.png"))) == 2
    assert (run / "model.safetensors").is_file()


@pytest.mark.long
def test_segment_your_images(tmp_path, monkeypatch):
    printed = execute("segment_your_images", tmp_path, monkeypatch)
    run = tmp_path / "runs" / "my_masks"
    assert "eval/miou" in read_metrics(run / "metrics.jsonl")[-1]
    assert "evaluation on 1 images" in printed
    assert "'height': 512, 'width': 128" in printed
    assert len(list((run / "masks").glob("*.png"))) == 1
    assert (run / "explanations/explanations.html").is_file()
    things = tmp_path / "runs" / "my_things"
    assert "eval/ap" in read_metrics(things / "metrics.jsonl")[-1]
    assert (things / "precision_recall.png").is_file()


@pytest.mark.long
def test_segment_your_volumes(tmp_path, monkeypatch):
    printed = execute("segment_your_volumes", tmp_path, monkeypatch)
    run = tmp_path / "runs" / "my_volumes"
    assert "eval/miou" in read_metrics(run / "metrics.jsonl")[-1]
    assert len(list((run / "cases").glob("*.json"))) == 1
    assert "'true_volume_ml': " in printed
    assert "not a diagnosis" in " ".join(printed.split())
    assert "(48, 48, 12) [" in printed


@pytest.mark.long
def test_pretrain_your_images(tmp_path, monkeypatch):
    printed = execute("pretrain_your_images", tmp_path, monkeypatch)
    assert (tmp_path / "runs/mae/reconstructions.png").is_file()
    for name in ("from_scratch", "pretrained"):
        last = read_metrics(tmp_path / "runs" / name / "metrics.jsonl")[-1]
        assert f"{name:12} {last['eval/top1']:.3f}" in printed
    assert (
        "runs/mae" in json.loads((tmp_path / "runs/pretrained/model.json").read_text())["weights"]
    )
    assert "zero-shot top-1 0." in printed
    assert (tmp_path / "runs/words/captions.png").is_file()


@pytest.mark.long
def test_robust_lora(tmp_path, monkeypatch):
    printed = execute("robust_lora", tmp_path, monkeypatch)
    for name in ("LoRA", "LoRA_against_PGD"):
        record = json.loads((tmp_path / "runs" / name / "robustness.json").read_text())
        assert record["images"] == 10
        (under_pgd,) = record["attacks"]["pgd"]
        both = f"{record['clean']['accuracy']:.3f} {under_pgd['accuracy']:.3f}"
        assert f"{name.replace('_', ' '):18} {both}" in printed
    assert "eval/pgd_top1" in read_metrics(tmp_path / "runs/LoRA_against_PGD/metrics.jsonl")[-1]


@pytest.mark.long
def test_teach_a_student(tmp_path, monkeypatch):
    printed = execute("teach_a_student", tmp_path, monkeypatch)
    for name in ("teacher", "alone", "taught"):
        last = read_metrics(tmp_path / "runs" / name / "metrics.jsonl")[-1]
        assert f"{name:8} {last['eval/top1']:.3f}" in printed
    for name, count in (("alone", 0), ("taught", 1)):
        description = json.loads((tmp_path / "runs" / name / "model.json").read_text())
        origins = [origin for origin, _ in description["teachers"]]
        assert len(origins) == count
        assert all("runs/teacher" in origin for origin in origins)


@pytest.mark.long
def test_shrink_and_export(tmp_path, monkeypatch):
    printed = execute("shrink_and_export", tmp_path, monkeypatch)
    out = tmp_path / "runs"
    assert (out / "whole" / "quantized" / "quantization.json").is_file()
    report = json.loads((out / "factored" / "factorization.json").read_text())
    assert report["after"]["products"] <= 0.5 * report["before"]["products"]
    assert (out / "factored" / "factorization.png").is_file()
    record = json.loads((out / "file" / "model.stablehlo.json").read_text())
    assert f"model.stablehlo {record['bytes']} True" in printed
    assert "served: " in printed


@pytest.mark.long
def test_generate_your_images(tmp_path, monkeypatch):
    printed = execute("generate_your_images", tmp_path, monkeypatch)
    assert "real training images: Fréchet distance" in printed
    made = tmp_path / "runs" / "made"
    assert len(list((made / "sneaker").glob("*.png"))) == 10
    assert (made / "beside.png").is_file()
    assert len(list((tmp_path / "runs" / "mine" / "samples").glob("*.png"))) == 4  # steps 0 to 3


@pytest.mark.long
def test_watch_a_video(tmp_path, monkeypatch):
    printed = execute("watch_a_video", tmp_path, monkeypatch)
    lines = (tmp_path / "runs/yard/events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    begun = [one for one in events if one["event"] == "start"]
    assert [one["rule"] for one in begun] == ["intruder"] * len(begun)
    assert begun[0]["tracks"][0]["class"] == "kite"
    assert events[-1]["frames"] == 40
    stricter = tmp_path / "runs/stricter"
    (figures,) = json.loads((stricter / "evaluation.json").read_text()).values()
    assert (figures["sign"]["precision"], figures["sign"]["recall"]) == (1, 1)
    assert (tmp_path / "runs/yard/index.html").is_file()
    assert "1 images, 1 boxes" in printed
    assert "1 boxes left" in printed
