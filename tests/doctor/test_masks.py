"""The doctor on images with masks: quiet on clean sets, and each defect found and named."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.segmentation import read_segmentation_source
from vision_jax.doctor.__main__ import main
from vision_jax.doctor.examine import examine
from vision_jax.errors import UserError

HEIGHT, WIDTH, COUNT = 24, 32, 6
COLORS = [0, 0, 0, 128, 0, 0, 0, 128, 0]
TABLE = {"0": "background", "1": "cat", "2": "dog"}


def draw(folder: Path, rng: np.random.Generator, name: str = "") -> None:
    """Images of noise, masks of a box with an ignored border, in PNGs with a palette."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    (folder / "classes.json").write_text(json.dumps(TABLE))
    for i in range(COUNT):
        image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(image).save(folder / f"images/{name}{i}.png")
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[2:12, 2:12], mask[13:20, 4:20], mask[20] = 1, 2, 255
        save(folder / f"masks/{name}{i}.png", mask, COLORS)


def save(path: Path, mask: np.ndarray, colors: list[int]) -> None:
    image = Image.fromarray(mask)
    image.putpalette(colors + [0] * (768 - len(colors)))
    image.save(path)


def diagnose(folder: Path) -> dict:
    found = examine(str(folder), segmentation=read_segmentation_source)[1]
    return {finding.code: finding for finding in found}


def training_does(folder: Path) -> str:
    """What becomes of the images when training reads them."""
    try:
        source = read_segmentation_source(str(folder))
        left_out = 0
        for i in range(len(source)):
            try:
                source[i]
            except DamagedImageError:
                left_out += 1
    except UserError:
        return "refuses"
    return "leaves out" if left_out else "trains"


@pytest.fixture
def folder(tmp_path, rng):
    draw(tmp_path / "set", rng)
    return tmp_path / "set"


def test_a_clean_set(folder, capsys):
    assert set(diagnose(folder)) == {"class-shares"}
    assert main([str(folder), "--segmentation"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "6 images, 3 classes" in out
    assert "'background': 71.20%, in 6 of 6 masks" in out
    assert main([str(folder), "--segmentation", "--quick"]) == 0
    assert main(["embedded:nuclei/train", "--segmentation"]) == 0


def strange_value(folder: Path, mask: np.ndarray) -> None:
    mask[3, 3] = 7
    save(folder / "masks/2.png", mask, COLORS)


def other_size(folder: Path, mask: np.ndarray) -> None:
    save(folder / "masks/2.png", mask[:, :-1], COLORS)


def damage(folder: Path, mask: np.ndarray) -> None:
    path = folder / "masks/2.png"
    path.write_bytes(path.read_bytes()[:-30])


def swap_palette(folder: Path, mask: np.ndarray) -> None:
    save(folder / "masks/2.png", mask, COLORS[:3] + COLORS[6:] + COLORS[3:6])


def show_one_class(folder: Path, mask: np.ndarray) -> None:
    for i in range(COUNT):
        save(folder / f"masks/{i}.png", np.where(mask < 255, 1, 255).astype(np.uint8), COLORS)


def show_background(folder: Path, mask: np.ndarray) -> None:
    for i in range(COUNT - 1):
        save(folder / f"masks/{i}.png", np.where(mask < 255, 0, 255).astype(np.uint8), COLORS)


def ignore_nothing(folder: Path, mask: np.ndarray) -> None:
    for i in range(COUNT):
        save(folder / f"masks/{i}.png", np.where(mask < 255, mask, 0).astype(np.uint8), COLORS)


def make_rare(folder: Path, mask: np.ndarray) -> None:
    for i in range(COUNT):
        save(folder / f"masks/{i}.png", np.where(mask == 2, 0, mask).astype(np.uint8), COLORS)
    mask[mask == 2] = 0
    mask[5, 5] = 2
    save(folder / "masks/2.png", mask, COLORS)


DEFECTS = {
    "mask-values": (strange_value, "error", 1),
    "mask-size": (other_size, "error", 1),
    "unreadable-mask": (damage, "error", 1),
    "swapped-palette": (swap_palette, "error", 1),
    "one-class-alone": (show_one_class, "error", COUNT),
    "only-background": (show_background, "warning", COUNT - 1),
    "nothing-ignored": (ignore_nothing, "information", COUNT),
    "rare-class": (make_rare, "information", 1),
    "class-shares": (make_rare, "information", 3),
}


@pytest.mark.parametrize("code", DEFECTS)
def test_each_defect(folder, code):
    """Found, counted, and training does what the finding says."""
    defect, level, count = DEFECTS[code]
    with Image.open(folder / "masks/2.png") as image:
        mask = np.array(image)
    defect(folder, mask)
    found = diagnose(folder)
    finding = found[code]
    assert (finding.level, finding.count) == (level, count)
    assert training_does(folder) == finding.training
    assert not {c for c, f in found.items() if f.level != "information"} - {code}
    if count == 1 and code != "rare-class":
        assert "2.png" in finding.examples[0]


def test_two_splits(folder, tmp_path, rng, capsys):
    other = tmp_path / "other"
    draw(other, rng, "x")
    assert main([str(folder), "--segmentation", f"--against={other}"]) == 0
    (other / "images/x1.png").write_bytes((folder / "images/1.png").read_bytes())
    (other / "classes.json").write_text(json.dumps(TABLE | {"2": "cow"}))
    assert main([str(folder), "--segmentation", f"--against={other}"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "leak: 1 of 6 images" in out
    assert "unknown-class: 1 of 3 classes" in out


def test_regions_with_faults(folder, capsys):
    """Every problem of a file of regions is listed, where training would refuse at the first."""
    images = [{"id": 1, "file_name": "0.png", "height": HEIGHT, "width": WIDTH}]
    regions = [
        {"image_id": 1, "category_id": 1, "segmentation": s}
        for s in ([[1, 2]], {"size": [24, 32], "counts": [-1]}, [])
    ]
    categories = [{"id": 1, "name": "cat"}]
    path = folder / "images/coco.json"
    content = {"images": images, "annotations": regions, "categories": categories}
    path.write_text(json.dumps(content))
    assert main([str(path), "--segmentation"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "unusable-entry: 3 of" in out
    assert "training refuses" in out


def test_a_figure_of_masks(folder, tmp_path, capsys):
    path = tmp_path / "figure.png"
    strange_value(folder, np.zeros((HEIGHT, WIDTH), np.uint8))
    assert main([str(folder), "--segmentation", f"--figure={path}"]) == 1
    assert path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--masks=x"], "--masks goes with --segmentation"),
        (["--reduce_zero"], "--reduce_zero goes with --segmentation"),
        (["--segmentation", "--unlabelled"], "leave one out"),
        (["--segmentation", "--classes=none.json"], "none.json"),
        (["--segmentation", "--masks=none"], "none"),
    ],
)
def test_bad_flags(folder, flags, reason, capsys):
    assert main([str(folder), *flags]) == 2
    err = capsys.readouterr().err
    assert reason in err
    assert err.count("\n") == 1


def hostile(name: str, folder: Path) -> str:
    """A source that can't be meant, as a specification."""
    masks = folder / "masks"
    if name == "not one mask is readable":
        for path in masks.iterdir():
            path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
        return str(folder)
    if name == "a huge PNG":
        for path in masks.iterdir():
            data = bytearray(path.read_bytes())
            data[16:24] = (2_000_000).to_bytes(4) * 2
            path.write_bytes(data)
        return str(folder)
    if name == "a pipe for a mask":
        (masks / "0.png").unlink()
        os.mkfifo(masks / "0.png")
        return str(folder)
    files = {
        "no table": ("classes.json", None),
        "a table of one value twice": ("classes.csv", "name,value\na,1\nb,1\n"),
        "a table of no numbers": ("classes.json", '{"one": "a"}'),
        "a table of negative numbers": ("classes.json", '{"-1": "a"}'),
        "a deep table": ("classes.json", "[" * 5000),
        "broken JSON": ("images/x.json", "{"),
        "JSON of nothing": ("images/x.json", "{}"),
        "regions without end": (
            "images/x.json",
            '{"images": [{"id": 1, "file_name": "0.png", "width": 32, "height": 24}],'
            ' "annotations": [{"image_id": 1, "category_id": 1,'
            ' "segmentation": [[1e999, 0, 1, 1, 2, 0]]}]}',
        ),
        "an entity bomb": (
            "images/x.xml",
            '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><annotations>&c;</annotations>',
        ),
        "no such plane": ("volumes", "?plane=x"),
        "no volumes": ("volumes", "?window=0:1"),
        "no city": ("cityscapes", "/train"),
    }
    file, content = files[name]
    if file in ("volumes", "cityscapes"):
        return f"{file}:{folder}{content}"
    for path in folder.glob("classes.*"):
        path.unlink()
    if content is not None:
        (folder / file).write_text(content)
    return str(folder / file) if file.startswith("images/") else str(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("no table", "a table of one value twice", "a table of no numbers", "a deep table"),
        *("a table of negative numbers", "broken JSON", "JSON of nothing", "an entity bomb"),
        *("no such plane", "no volumes", "no city"),
    ],
)
def test_hostile_sources_end_in_one_line(name, folder, capsys):
    assert main([hostile(name, folder), "--segmentation"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("not one mask is readable", COUNT),
        ("a huge PNG", COUNT),
        ("regions without end", 1),
    ],
)
def test_hostile_masks_are_counted(name, count, folder, capsys):
    """As findings here; training skips and counts them, or refuses."""
    assert main([hostile(name, folder), "--segmentation"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"(unreadable-mask|unusable-entry): {count} of", out)
    assert ("unreadable-mask" in out) == ("larger share than config.data.max_damaged" in out)


def test_what_reading_leaves_out_is_told(folder, capsys):
    """A pipe, which nothing opens, is no mask; its image has none then."""
    assert main([hostile("a pipe for a mask", folder), "--segmentation"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "reading-notes: 1 of 1 note" in out
    assert "1 images without a mask left out, the first 0.png" in out
