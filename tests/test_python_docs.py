"""The Python of docs/python.md and of README's section on it runs as it stands, one block after
another; only what would be downloaded is replaced by a small file of the same architecture."""

import contextlib
import io
import re

import detection_runs
import numpy as np
import pytest
import runs
from PIL import Image

# What lies on a hub -> what is read here.
DOWNLOADED = {
    "timm://resnet50.a1_in1k": "backbone.safetensors",
    "hf://facebook/detr-resnet-50": "detector.safetensors",
}
SMALL = {"image_size=(480, 640)": "image_size=(64, 96)", "range(20)": "range(3)"}
RESNET = {"depths": (1, 1, 1, 1), "block": "basic", "widths": (8, 8, 16, 16), "stem_width": 8}


def blocks_of(page: str) -> list[str]:
    """The blocks of Python of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", (runs.ROOT / page).read_text(), re.DOTALL | re.M)


@pytest.fixture
def folder(tmp_path, rng, monkeypatch):
    """What a reader has: two photos and a folder of class folders."""
    monkeypatch.chdir(tmp_path)

    def write(path, *shape):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)

    write(tmp_path / "photo.jpg", 40, 60)
    write(tmp_path / "other.jpg", 50, 30)
    for name in ("ant", "bee"):
        for number in range(3):
            write(tmp_path / "photos" / name / f"{number}.png", 20, 20)
    runs.write_teacher(tmp_path / "backbone.safetensors", "resnet", 5, 32, **RESNET)
    detection_runs.write_detector(tmp_path / "detector.safetensors")
    return tmp_path


def execute(blocks: list[str]) -> str:
    """Runs blocks in one namespace; returns what they print."""
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, block in enumerate(blocks):
            for full, small in {**DOWNLOADED, **SMALL}.items():
                block = block.replace(full, small)
            exec(compile(block, f"block {number}", "exec"), names)
    return printed.getvalue()


@pytest.mark.long
def test_docs_python(folder):
    blocks = blocks_of("docs/python.md")
    whole = "".join(blocks)
    for replaced in (*DOWNLOADED, *SMALL):
        assert whole.count(replaced) == 1
    for block in blocks:
        assert len(block.splitlines()) <= 25
    printed = execute(blocks)
    chances = re.findall(r"^(\w+) +(0\.\d{3})$", printed, re.M)
    assert len(chances) == 3
    assert re.search(r"^4 \(1, 16, 24, 8\)$", printed, re.M)
    assert re.search(r"^top-1 under PGD-10: [01]\.\d{3}$", printed, re.M)
    assert "evaluation on 6 images: top1 " in printed
    assert "'bee':" in printed
    for file in ("model.safetensors", "config.json"):
        assert f"wrote merged/{file}" in printed
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.long
def test_the_readme_in_python(folder):
    (block,) = blocks_of("README.md")
    printed = execute([block])
    assert re.search(r"^\w+ 0\.\d\d", printed)
