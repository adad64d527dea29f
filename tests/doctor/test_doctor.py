"""The doctor: no alarm on clean sets of many kinds; each defect found, rare and throughout."""

import copy
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import fisher_exact

from vision_jax.data.annotations import read_annotations
from vision_jax.data.decode import DamagedImageError
from vision_jax.data.detection import check_boxes, read_detection_source
from vision_jax.data.sources import read_source
from vision_jax.doctor.__main__ import main
from vision_jax.doctor.boxes import diagnose_boxes
from vision_jax.doctor.examine import examine
from vision_jax.doctor.figure import draw_diagnosis
from vision_jax.doctor.finding import TRAINING, Subject
from vision_jax.doctor.images import diagnose_loose_files
from vision_jax.doctor.scan import Scan
from vision_jax.doctor.splits import compare
from vision_jax.errors import UserError

# --- clean sets ---------------------------------------------------------------------------------

NAMES = [f"class {i}" for i in range(8)]


def draw_image(rng, height: int, width: int) -> Image.Image:
    """Blots and noise, with more contrast than any flat image has."""
    blots = Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8))
    image = np.asarray(blots.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((image + rng.integers(-20, 20, image.shape)).clip(0, 255).astype("u1"))


def draw_boxes(rng, style: str, count: int, height: int, width: int) -> np.ndarray:
    """f64[count, 4] xywh inside the image, no two alike; whole numbers in half of the styles."""
    size = np.array([width, height])
    most = {"tiny": 3.0, "huge": 1e9}.get(style, 30.0)
    least = {"huge": 0.8}.get(style, 0.0) * size
    low, high = np.maximum(least, 1), np.minimum(size, most)
    wh = rng.uniform(np.minimum(low, high), high, (count, 2))
    xy = rng.uniform(0, 1, (count, 2)) * (size - wh)
    if style == "borders":
        xy = np.where(rng.random((count, 2)) < 0.5, 0, size - wh)
    boxes = np.concatenate([xy, wh], 1)
    if style in ("whole", "single", "borders"):
        boxes = np.concatenate([np.floor(xy), np.ceil(wh)], 1)
        boxes[:, :2] = np.minimum(boxes[:, :2], size - boxes[:, 2:])
    return np.unique(boxes, axis=0)


STYLES = (
    "whole",
    "parts",
    "crowded",
    "borders",
    "single",
    "few",
    "tiny",
    "huge",
    "one kind",
    "tail",
)


def draw_share(rng, style: str) -> np.ndarray:
    """How often each class occurs: what two clean splits have in common."""
    classes = {"single": 1, "few": 2}.get(style, 6)
    return rng.dirichlet(np.full(classes, 0.2 if style == "tail" else 5.0))


def make_set(folder, rng, style="parts", *, images=None, share=None, sides=(40, 90)) -> dict:
    """Writes images into `folder` and returns COCO's content for them, free of defects."""
    folder.mkdir(parents=True, exist_ok=True)
    images = images or {"few": 2, "crowded": 5}.get(style, 12)
    share = draw_share(rng, style) if share is None else share
    classes = len(share)
    content: dict = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i + 1, "name": NAMES[i]} for i in range(classes)]
    for i in range(images):
        height, width = (int(side) for side in rng.integers(*sides, 2))
        name = f"{rng.integers(2**40):x}.{'jpg' if i % 2 else 'png'}"
        draw_image(rng, height, width).save(folder / name, quality=90)
        content["images"].append({"id": i, "file_name": name, "height": height, "width": width})
        count = {"crowded": 80, "single": 1, "one kind": 50}.get(style, int(rng.integers(1, 9)))
        labels = rng.choice(classes, count, p=share)
        if style == "one kind":
            labels[:] = labels[0]
        boxes = draw_boxes(rng, style, count, height, width)
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=False):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": i,
                    "category_id": label + 1,
                    "bbox": box,
                }
            )
    return content


def write(path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def alarms(findings) -> dict[str, str]:
    return {f.code: f.title for f in findings if f.level != "information"}


def examine_pair(one: str, other: str):
    (a, findings), (b, more) = examine(one), examine(other)
    return findings + more + compare(a, b)


@pytest.mark.long(but=("tiny",))
@pytest.mark.parametrize("style", STYLES)
def test_clean_sets_raise_no_alarm(style, tmp_path):
    for seed in range(4):
        rng = np.random.default_rng([seed, STYLES.index(style)])
        share = draw_share(rng, style)
        one = make_set(tmp_path / f"{seed}a", rng, style, share=share)
        other = make_set(tmp_path / f"{seed}b", rng, style, share=share)
        specs = [write(tmp_path / f"{seed}{s}/x.json", c) for s, c in (("a", one), ("b", other))]
        assert alarms(examine_pair(*specs)) == {}
        assert (
            alarms(examine(write_voc(tmp_path / f"{seed}v", tmp_path / f"{seed}a", one))[1]) == {}
        )
        yolo = write_yolo(tmp_path / f"{seed}y", tmp_path / f"{seed}a", one)
        assert alarms(examine(yolo)[1]) == {}
        plain = write_plain(tmp_path / f"{seed}b/plain.json", other)
        assert alarms(examine(plain)[1]) == {}
        assert alarms(examine(plain, quick=True)[1]) == {}


@pytest.mark.long
def test_what_the_package_brings_is_clean():
    """Real photos split by photo, composites, and small clothes on black, much alike."""
    for one, other in (
        ("embedded:aerial/train", "embedded:aerial/test"),
        ("composites:train/0/40", "composites:test/0/20"),
        ("embedded:fashion_mnist/train", "embedded:fashion_mnist/test"),
    ):
        assert alarms(examine_pair(one, other)) == {}


def by_image(content):
    for image in content["images"]:
        boxes = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        yield image, [(a["category_id"], *a["bbox"]) for a in boxes]


def write_voc(folder, images, content) -> str:
    shutil.copytree(images, folder / "JPEGImages", ignore=shutil.ignore_patterns("*.json"))
    (folder / "Annotations").mkdir()
    for image, boxes in by_image(content):
        objects = "".join(
            f"<object><name>{NAMES[c - 1]}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
            f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for c, x, y, w, h in boxes
        )
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        (folder / f"Annotations/{image['file_name'][:-4]}.xml").write_text(
            f"<annotation>{size}{objects}</annotation>"
        )
    return str(folder)


def write_yolo(folder, images, content) -> str:
    shutil.copytree(images, folder / "images", ignore=shutil.ignore_patterns("*.json"))
    (folder / "labels").mkdir()
    (folder / "classes.txt").write_text("\n".join(c["name"] for c in content["categories"]))
    for image, boxes in by_image(content):
        width, height = image["width"], image["height"]
        (folder / f"labels/{image['file_name'][:-4]}.txt").write_text(
            "\n".join(
                f"{c - 1} {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f}"
                f" {w / width:.6f} {h / height:.6f}"
                for c, x, y, w, h in boxes
            )
        )
    return str(folder)


def write_plain(path, content) -> str:
    keys = ("file_name", "width", "height")
    entries = [
        {k: image[k] for k in keys}
        | {"xmin": x, "ymin": y, "xmax": x + w, "ymax": y + h, "category_id": c}
        for image, boxes in by_image(content)
        for c, x, y, w, h in boxes
    ]
    return write(path, {"images": entries})


# --- seeded defects of boxes and files ----------------------------------------------------------


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """48 images with 8 boxes each."""
    folder = tmp_path_factory.mktemp("clean")
    rng = np.random.default_rng(0)
    content = make_set(folder, rng, images=48)
    content["annotations"] = []
    for image in content["images"]:
        for box in draw_boxes(rng, "parts", 8, image["height"], image["width"]).tolist():
            k = len(content["annotations"])
            entry = {"id": k + 1, "image_id": image["id"], "category_id": 1 + k % 6, "bbox": box}
            content["annotations"].append(entry)
    assert alarms(examine(write(folder / "x.json", content))[1]) == {}
    (folder / "x.json").unlink()
    return folder, content


def change_box(function):
    """A defect of boxes: `function(x, y, w, h, W, H)` gives the new bbox."""

    def apply(folder, content, share):
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        chosen = pick(content["annotations"], share)
        for entry in chosen:
            entry["bbox"] = list(function(*entry["bbox"], *sizes[entry["image_id"]]))
        return len(chosen)

    return apply


def pick(entries: list, share: float) -> list:
    """Evenly spread, so that it doesn't hang on luck."""
    return entries if share == 1 else entries[:: round(1 / share)]


def set_key(part: str, key: str, value):
    """`value` may be a function of the entry."""

    def apply(folder, content, share):
        chosen = pick(content[part], share)
        for entry in chosen:
            entry[key] = value(entry) if callable(value) else value
        return len(chosen)

    return apply


def change_file(function):
    def apply(folder, content, share):
        chosen = pick(content["images"], share)
        for entry in chosen:
            function(folder / entry["file_name"], entry)
        return len(chosen)

    return apply


def truncate(path, entry):
    path.write_bytes(path.read_bytes()[:-600])


def turn(path, entry):
    """The photo as a camera held upright writes it; the entry has the size of the stored file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif.tobytes())


def exchange(entry):
    entry["width"], entry["height"] = entry["height"], entry["width"]
    return entry["width"]


def copy_boxes(folder, content, share):
    chosen = copy.deepcopy(pick(content["annotations"], share))
    for entry in chosen:
        entry["id"] += 10_000
    content["annotations"] += chosen
    return len(chosen)


def drop_boxes(folder, content, share):
    bare = {image["id"] for image in pick(content["images"], share)}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in bare]
    return len(bare)


# name: (expected code, defect, how many of the seeded ones the count must show at least)
DEFECTS = {
    "swapped": ("swapped-corners", change_box(lambda x, y, w, h, W, H: (x + w, y + h, -w, -h)), 1),
    "swapped in x": ("swapped-corners", change_box(lambda x, y, w, h, W, H: (x + w, y, -w, h)), 1),
    "no width": ("zero-area", change_box(lambda x, y, w, h, W, H: (x, y, 0, h)), 1),
    "shares": (
        "relative-units",
        change_box(lambda x, y, w, h, W, H: (x / W, y / H, w / W, h / H)),
        1,
    ),
    "shares as corners": (
        "relative-units",
        change_box(lambda x, y, w, h, W, H: (x / W, y / H, (x + w) / W, (y + h) / H)),
        1,
    ),
    "corners": ("corners-as-sizes", change_box(lambda x, y, w, h, W, H: (x, y, x + w, y + h)), 0.4),
    "away": ("outside-image", change_box(lambda x, y, w, h, W, H: (x + W, y, w, h)), 1),
    "over the border": (
        "outside-image",
        change_box(lambda x, y, w, h, W, H: (W - w + 2, y, w, h)),
        1,
    ),
    "far over the border, at the top": (
        "outside-image",
        change_box(lambda x, y, w, h, W, H: (W - w + 8, 0, w, h)),
        1,
    ),
    "left of it": ("outside-image", change_box(lambda x, y, w, h, W, H: (-2, y, w, h)), 1),
    "copies": ("repeated-box", copy_boxes, 1),
    "nan": ("unusable-entry", change_box(lambda x, y, w, h, W, H: (x, y, float("nan"), h)), 1),
    "text": ("unusable-entry", set_key("annotations", "bbox", "1 2 3 4"), 1),
    "one id": ("repeated-id", set_key("annotations", "id", 2), 0.9),
    "no such image": ("unknown-image", set_key("annotations", "image_id", lambda a: "x"), 1),
    "no such class": (
        "undeclared-category",
        set_key("annotations", "category_id", lambda a: a["category_id"] + 50),
        1,
    ),
    "above": ("path-outside", set_key("images", "file_name", lambda e: "../" + e["file_name"]), 1),
    "other names": ("missing-file", set_key("images", "file_name", lambda e: f"{e['id']}.JPG"), 1),
    "deleted": ("missing-file", change_file(lambda path, entry: path.unlink()), 1),
    "truncated": ("unreadable-image", change_file(truncate), 1),
    "text files": (
        "unreadable-image",
        change_file(lambda path, entry: path.write_text("404: Not Found")),
        1,
    ),
    "wrong width": ("wrong-size", set_key("images", "width", lambda e: e["width"] + 7), 1),
    "exchanged": ("wrong-size", set_key("images", "width", exchange), 0.9),
    "turned": ("exif-rotation", change_file(turn), 0.9),
}


EMPTYING = ("swapped", "swapped in x", "no width", "away")  # all of them so: no box is left


def training_does(spec, images=None) -> str:
    """What training does with a data set: the functions through which it reads its data tell."""
    try:
        source = read_detection_source(spec, images)
        check_boxes(source)
    except UserError:
        return "refuses"
    for i in range(len(source)):
        try:
            source[i]
        except DamagedImageError:
            return "leaves out"
    stated = read_annotations(spec, images)
    x, y, w, h = stated.boxes_xywh_px.T
    same = sorted(np.stack([x, y, x + w, y + h], 1).tolist()) == sorted(
        source.boxes_xyxy_px.values.tolist()
    )
    kept = len(source.class_names) == len(stated.category_names)
    return "trains" if same and kept else "leaves out"


@pytest.mark.parametrize("share", [0.05, 1])
@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_found(name, share, clean, tmp_path):
    code, defect, least = DEFECTS[name]
    folder, content = tmp_path / "set", copy.deepcopy(clean[1])
    shutil.copytree(clean[0], folder)
    seeded = defect(folder, content, share)
    assert seeded >= 3
    _, findings = examine(write(folder / "x.json", content))
    found = {f.code: f for f in findings}
    assert code in found
    assert least * seeded <= found[code].count <= seeded
    assert found[code].examples
    told = list(alarms(findings))
    none_left = share == 1 and name in EMPTYING
    assert told == [code] + ["nothing-to-learn"] * none_left
    expected = "refuses" if none_left else found[code].training
    assert training_does(str(folder / "x.json")) == expected
    assert ("probably throughout" in found[code].title) == (name == "corners" and share == 1)


@pytest.mark.parametrize(
    ("share", "level"), [(0.05, "information"), (0.5, "warning"), (1, "warning")]
)
def test_images_without_boxes(share, level, clean, tmp_path):
    content = copy.deepcopy(clean[1])
    seeded = drop_boxes(None, content, share)
    _, findings = examine(write(tmp_path / "x.json", content), clean[0])
    found = {f.code: f for f in findings}["no-boxes"]
    assert (found.count, found.level) == (seeded, level)
    told = {f.code: f.level for f in findings if f.training == "refuses"}
    assert told == ({"nothing-to-learn": "error"} if share == 1 else {})
    assert training_does(str(tmp_path / "x.json"), clean[0]) == (
        "refuses" if share == 1 else "trains"
    )


def test_category_ids(clean, tmp_path):
    def look(categories, shift=0):
        content = copy.deepcopy(clean[1]) | {"categories": categories}
        for entry in content["annotations"]:
            entry["category_id"] += shift
        _, findings = examine(write(tmp_path / "x.json", content), clean[0])
        return {f.code: f for f in findings}, alarms(findings)

    own = clean[1]["categories"]
    found, alarm = look(own, shift=-1)
    assert list(alarm) == ["ids-off-by-one"]
    assert found["ids-off-by-one"].count == 384
    assert "declared 1 to 6, used 0 to 5" in alarm["ids-off-by-one"]
    found, alarm = look(own, shift=1)
    assert "declared 1 to 6, used 2 to 7" in alarm["ids-off-by-one"]
    found, alarm = look([*own, {"id": 90, "name": "yak"}])
    assert alarm == {}
    assert found["id-holes"].count == 83
    assert found["unused-class"].examples == ("yak",)
    roots = [{"id": 0, "name": "things", "supercategory": "none"}]
    found, alarm = look([*roots, *({**c, "supercategory": "things"} for c in own)])
    assert list(alarm) == ["root-class"]
    assert found["root-class"].examples == ("'things', id 0",)
    found, alarm = look([{**c, "name": c["name"].replace("5", "4")} for c in own])
    assert list(alarm) == ["repeated-name"]
    assert found["repeated-name"].examples == ("'class 4': ids 5, 6",)


def test_imbalance_is_no_alarm(clean, tmp_path):
    content = copy.deepcopy(clean[1])
    for k, entry in enumerate(content["annotations"]):
        entry["category_id"] = 2 if k < 3 else 1
    _, findings = examine(write(tmp_path / "x.json", content), clean[0])
    found = {f.code: f for f in findings}
    assert alarms(findings) == {}
    assert found["imbalance"].examples[0] == "'class 1': 3 boxes"


def test_pixels_in_yolo(clean, tmp_path):
    for share in (0.05, 1):
        folder = write_yolo(tmp_path / str(share), *clean)
        files = sorted((tmp_path / str(share) / "labels").iterdir())
        sizes = {i["file_name"][:-4]: (i["width"], i["height"]) for i in clean[1]["images"]}
        seeded = 0
        for file in pick(files, share):
            rows = np.loadtxt(file, ndmin=2)
            rows[:, 1:] *= np.tile(sizes[file.stem], 2)
            rows[:, 1:] = np.maximum(rows[:, 1:], 8)  # a pixel or two pass for a share
            np.savetxt(file, rows, fmt="%d %g %g %g %g")
            seeded += len(rows)
        _, findings = examine(folder)
        assert list(alarms(findings))[:1] == ["pixels-for-shares"]
        assert list(alarms(findings))[1:] == ["nothing-to-learn"] * (share == 1)
        assert training_does(folder) == ("refuses" if share == 1 else "leaves out")
        assert next(f.count for f in findings if f.code == "pixels-for-shares") == seeded


def test_rotation_that_the_annotations_know_is_no_alarm(clean, tmp_path):
    folder, content = tmp_path / "set", copy.deepcopy(clean[1])
    shutil.copytree(clean[0], folder)
    for entry in content["images"][:20]:
        file = folder / entry["file_name"]
        exif = Image.Exif()
        exif[0x0112] = 8
        Image.open(file).rotate(-90, expand=True).save(file, exif=exif.tobytes())
    assert alarms(examine(write(folder / "x.json", content))[1]) == {}


def test_files_that_nothing_refers_to(clean, tmp_path, capsys):
    folder, content = clean
    part = {**content, "images": content["images"][:40], "annotations": []}
    rest = {**content, "images": content["images"][40:], "annotations": []}
    one, two = write(tmp_path / "a.json", part), write(tmp_path / "b.json", rest)
    arguments = [one, f"--images={folder}", "--quick"]
    assert main(arguments) == 1  # no boxes at all
    assert "not-referenced: 8 of 48 files" in one_line(capsys)
    main([*arguments, f"--against={two}", f"--against_images={folder}"])
    assert "not-referenced" not in one_line(capsys)


def entry(content, part, place, **changed):
    content[part][place].update(changed)


OTHER_DEFECTS = {  # code: a defect of COCO's content
    "ids-off-by-one": lambda c: [
        a.update(category_id=a["category_id"] - 1) for a in c["annotations"]
    ],
    "repeated-name": lambda c: entry(c, "categories", 1, name=NAMES[0]),
    "root-class": lambda c: (
        [e.update(supercategory="root") for e in c["categories"]],
        c["categories"].append({"id": 90, "name": "root"}),
    ),
    "id-holes": lambda c: (
        entry(c, "categories", 5, id=9),
        [a.update(category_id=9) for a in c["annotations"] if a["category_id"] == 6],
    ),
    "unused-class": lambda c: c["categories"].append({"id": 7, "name": "seven"}),
    "imbalance": lambda c: [a.update(category_id=1) for a in c["annotations"][2:]],
    "not-referenced": lambda c: (
        c["images"].pop(),
        c.update(annotations=[a for a in c["annotations"] if a["image_id"] < 47]),
    ),
    "no-boxes": lambda c: c.update(annotations=c["annotations"][8:]),
    "nothing-to-learn": lambda c: c.update(categories=[], annotations=[]),
}


@pytest.mark.parametrize("code", OTHER_DEFECTS)
def test_what_training_does_with_other_defects(code, clean, tmp_path, capsys):
    content = copy.deepcopy(clean[1])
    OTHER_DEFECTS[code](content)
    spec = write(tmp_path / "x.json", content)
    _, findings = examine(spec, clean[0])
    findings += diagnose_loose_files(examine(spec, clean[0])[0], None)
    [found] = [finding for finding in findings if finding.code == code]
    assert training_does(spec, clean[0]) == found.training
    assert found.training != "refuses" or found.level == "error"
    main([spec, f"--images={clean[0]}", f"--json={tmp_path}/f.json"])
    assert ("training refuses" in capsys.readouterr().out) == (found.training == "refuses")


def test_what_training_does_with_files_of_other_formats(clean, tmp_path):
    folder = Path(write_voc(tmp_path / "voc", *clean))
    (folder / "Annotations" / f"{clean[1]['images'][0]['file_name'][:-4]}.xml").write_text("<a>")
    [found] = [f for f in examine(str(folder))[1] if f.level == "error"]
    assert (found.code, training_does(str(folder))) == ("unreadable-annotation", found.training)
    plain = json.loads(Path(write_plain(tmp_path / "plain.json", clean[1])).read_text())
    plain["images"][1]["width"] += 1
    spec = write(tmp_path / "plain.json", plain)
    [found] = [f for f in examine(spec, clean[0])[1] if f.level == "error"]
    assert (found.code, training_does(spec, clean[0])) == ("conflicting-size", found.training)
    # A damaged image is left out of any format, and of YOLO too, whose boxes need its size.
    yolo = write_yolo(tmp_path / "yolo", *clean)
    next(Path(yolo, "images").iterdir()).write_bytes(b"no image")
    [found] = [f for f in examine(yolo)[1] if f.level == "error"]
    assert (found.code, training_does(yolo)) == ("unreadable-image", found.training)
    # The same file twice, in one split and in two.
    images = tmp_path / "twice"
    shutil.copytree(clean[0], images)
    names = [image["file_name"] for image in clean[1]["images"]]
    same = [n for n in names if n.endswith("png")][:2]
    content = copy.deepcopy(clean[1])
    sizes = {image["file_name"]: image for image in content["images"]}
    sizes[same[1]].update({k: sizes[same[0]][k] for k in ("width", "height")})
    shutil.copy(images / same[0], images / same[1])
    keep = sizes[same[1]]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != keep]
    spec = write(images / "x.json", content)
    [found] = [f for f in examine(spec)[1] if f.code == "repeated-image"]
    assert (training_does(spec), found.level) == (found.training, "information")


def test_the_table_of_what_training_does_is_complete():
    """Each code is in a test above or below, but for those of two splits, which training reads."""
    tested = {code for code, *_ in DEFECTS.values()} | set(OTHER_DEFECTS)
    tested |= {"unreadable-annotation", "conflicting-size", "repeated-image", "pixels-for-shares"}
    tested |= {"conflicting-labels", "labels-off-by-one", "unknown-class", "single-class"}
    tested.add("near-duplicate")  # in test_duplicates.py
    tested |= {"mask-values", "unreadable-mask", "mask-size", "swapped-palette", "one-class-alone"}
    tested |= {"only-background", "class-shares", "rare-class", "nothing-ignored"}  # test_masks.py
    tested |= {
        "volume-leak",
        "patient-leak",
        "one-volume",
        "reading-notes",
    }  # tests/data/test_volumes.py
    assert set(TRAINING) - tested == {"leak", "near-leak", "class-drift"}


def one_line(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


# --- two splits ---------------------------------------------------------------------------------


def copy_smaller(source, target):
    image = Image.open(source)
    image = image.resize((3 * image.width // 4, 3 * image.height // 4))
    image.convert("RGB").save(target, "jpeg", quality=60)


@pytest.mark.parametrize("share", [0.05, 1])
@pytest.mark.parametrize(
    ("code", "copy_file"), [("leak", shutil.copy), ("near-leak", copy_smaller)]
)
def test_images_in_both_splits(code, copy_file, share, tmp_path):
    rng = np.random.default_rng(1)
    one = make_set(tmp_path / "a", rng, images=40, sides=(160, 240))
    other = make_set(tmp_path / "b", rng, images=40, sides=(160, 240))
    chosen = pick(list(zip(one["images"], other["images"], strict=True)), share)
    for a, b in chosen:
        copy_file(tmp_path / "a" / a["file_name"], tmp_path / "b" / b["file_name"])
    subjects = [
        examine(write(tmp_path / n / "x.json", c))[0] for n, c in (("a", one), ("b", other))
    ]
    [found] = [finding for finding in compare(*subjects) if finding.code != "class-drift"]
    assert (found.code, found.count) == (code, len(chosen))
    a, b = chosen[0]
    assert found.examples[0] == f"{a['file_name']} is {b['file_name']}"


def subject(rng, images: int, presence: np.ndarray) -> Subject:
    """A split of `images`, each class shown with its own probability."""
    shown = np.argwhere(rng.random((images, len(presence))) < presence)
    names = tuple(f"c{i}" for i in range(len(presence)))
    empty = Scan((), {}, (None,) * images, np.zeros((images, 256), np.uint8))
    return Subject("x", None, tuple(map(str, range(images))), names, shown, empty)


@pytest.mark.long
def test_drift_alarms_seldom_on_clean_splits_and_always_on_drifted_ones():
    rng = np.random.default_rng(2)
    alarmed = 0
    for _ in range(1000):
        presence = rng.dirichlet(np.full(12, 0.5))
        sizes = rng.integers(2, 400, 2)
        alarmed += bool(compare(subject(rng, sizes[0], presence), subject(rng, sizes[1], presence)))
    assert alarmed <= 4  # 1 of 1,000 expected at most; 5 have a chance of 0.4 %
    presence = np.array([0.3, 0.2, 0.5, 0.1])
    for changed in ([0.3, 0.02, 0.5, 0.1], [0.05, 0.6, 0.1, 0.5]):
        found = compare(subject(rng, 400, presence), subject(rng, 200, np.array(changed)))
        assert [f.code for f in found] == ["class-drift"]
        assert any("'c1'" in example for example in found[0].examples)


def test_drift_is_fishers_test():
    rng = np.random.default_rng(3)
    one, other = subject(rng, 50, np.array([0.8])), subject(rng, 40, np.array([0.1]))
    a, b = len(one.shown), len(other.shown)
    less = fisher_exact([[a, 50 - a], [b, 40 - b]], "less").pvalue
    greater = fisher_exact([[a, 50 - a], [b, 40 - b]], "greater").pvalue
    [found] = compare(one, other)
    assert f"(p = {2 * min(less, greater):.1g})" in found.examples[0]


def test_classes_that_the_other_split_does_not_know():
    rng = np.random.default_rng(4)
    one, other = subject(rng, 20, np.array([0.5])), subject(rng, 20, np.array([0.5, 0.5]))
    [found] = compare(one, other)
    assert (found.code, found.examples) == ("unknown-class", ("c1",))


# --- classification -----------------------------------------------------------------------------


def make_classes(folder, rng, classes=3, images=12) -> list[list[str]]:
    """Class folders in `folder`/images, and rows of path and label."""
    rows = []
    for i in range(images):
        name = f"{'abcdef'[i % classes]}/{i}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(rng, 40, 40).save(folder / name)
        rows.append([name, "abcdef"[i % classes]])
    return rows


def write_csv(path, rows) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], *rows])
    return str(path)


def test_clean_classes(tmp_path):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        folders = [tmp_path / f"{seed}{part}" for part in "ab"]
        rows = [make_classes(folder, rng, images=6 + seed) for folder in folders]
        assert alarms(examine_pair(*map(str, folders))) == {}
        lists = [write_csv(f / "x.csv", r) for f, r in zip(folders, rows, strict=True)]
        assert alarms(examine_pair(*lists)) == {}
        numbers = [[name, "abcdef".index(label)] for name, label in rows[0]]
        assert alarms(examine(write_csv(folders[0] / "n.csv", numbers))[1]) == {}


def test_defects_of_classes(tmp_path):
    rng = np.random.default_rng(5)
    rows = make_classes(tmp_path, rng, images=60)
    from_1 = write_csv(tmp_path / "n.csv", [[n, 1 + "abc".index(c)] for n, c in rows])
    assert alarms(examine(from_1)[1]) == {
        "labels-off-by-one": "labels begin at 1: class 0 has no image"
    }
    one = write_csv(tmp_path / "one.csv", [[name, "b"] for name, label in rows if label == "b"])
    assert alarms(examine(one)[1]) == {"single-class": "one class has all images: b"}
    assert len(read_source(one)) == sum(label == "b" for _, label in rows)  # training takes it
    for count in (2, 60):
        bad = [[f"x/{name}" if i < count else name, c] for i, (name, c) in enumerate(rows)]
        found = {f.code: f for f in examine(write_csv(tmp_path / "m.csv", bad))[1]}
        assert found["missing-file"].count == count
        bad = [["../up.png" if i < count else name, c] for i, (name, c) in enumerate(rows)]
        found = {f.code: f for f in examine(write_csv(tmp_path / "m.csv", bad))[1]}
        assert found["unusable-entry"].count == count
    (tmp_path / "empty").mkdir()
    found = {f.code: f for f in examine(str(tmp_path))[1]}
    assert "no image in this class folder" in found["unusable-entry"].examples[0]
    (tmp_path / "empty").rmdir()
    shutil.copy(tmp_path / "a/0.png", tmp_path / "b/copy.png")
    (tmp_path / "c/2.png").write_bytes(b"")
    found = {f.code: f for f in examine(str(tmp_path))[1]}
    assert found["conflicting-labels"].examples == ("b/copy.png (b) is a/0.png (a)",)
    assert found["unreadable-image"].count == 1
    quick = {f.code for f in examine(str(tmp_path), quick=True)[1]}
    assert "conflicting-labels" not in quick
    assert "unreadable-image" in quick


def test_what_training_does_with_classes(tmp_path):
    """It reads what the doctor lets pass, and refuses what the doctor says that it refuses."""
    rng = np.random.default_rng(6)
    cut, empty, whole = tmp_path / "cut", tmp_path / "empty", tmp_path / "whole"
    rows = make_classes(whole, rng, images=12)
    shutil.copy(whole / "a/0.png", whole / "b/copy.png")
    (whole / "notes.json").write_text('{"camera": 3}')  # no annotations
    from_1 = write_csv(whole / "n.csv", [[n, 1 + "abc".index(c)] for n, c in rows])
    broken = write_csv(whole / "m.csv", [*rows, ["a/nowhere.png", "a"]])
    shutil.copytree(whole / "a", empty / "a")
    (empty / "b").mkdir()
    shutil.copytree(whole / "a", cut / "a")
    shutil.copytree(whole / "b", cut / "b", ignore=shutil.ignore_patterns("copy*"))
    (cut / "a/0.png").write_bytes((cut / "a/0.png").read_bytes()[:100])
    for spec, code in (
        (str(whole), "conflicting-labels"),
        (from_1, "labels-off-by-one"),
        (broken, "missing-file"),
        (str(empty), "unusable-entry"),
        (str(cut), "unreadable-image"),
    ):
        found = {finding.code: finding for finding in examine(spec)[1]}[code]
        did = "trains"
        try:
            source = read_source(spec)
            [source[i] for i in range(len(source))]
        except DamagedImageError:
            did = "leaves out"
        except UserError:
            did = "refuses"
        assert did == found.training


@pytest.mark.parametrize(
    ("labels", "known"),
    [(["a", "b"], True), (["a", "x"], False), ([0, 1], True), ([2, 0], True), ([3, 0], False)],
)
def test_classes_of_the_other_split_are_known_as_training_knows_them(
    labels, known, tmp_path, capsys
):
    rng = np.random.default_rng(7)
    one = write_csv(tmp_path / "one.csv", make_classes(tmp_path, rng, images=12))
    names = [f"{label}{i}.png" for i, label in enumerate("ab")]
    for name in names:
        draw_image(rng, 40, 40).save(tmp_path / name)
    other = write_csv(tmp_path / "other.csv", list(zip(names, labels, strict=True)))
    main([one, f"--against={other}"])
    assert ("unknown-class" not in capsys.readouterr().out) == known
    try:
        read_source(other, class_names=read_source(one).class_names)
    except UserError:
        assert not known
    else:
        assert known


# --- the command --------------------------------------------------------------------------------


def test_command(clean, tmp_path, capsys, monkeypatch):
    content = copy.deepcopy(clean[1])
    DEFECTS["swapped"][1](None, content, 0.05)
    DEFECTS["away"][1](None, content, 0.3)
    spec = write(tmp_path / "x.json", content)
    arguments = [spec, f"--images={clean[0]}", f"--json={tmp_path}/f.json"]
    with monkeypatch.context() as terminal:
        terminal.setenv("COLUMNS", "100")
        terminal.setenv("TTY_COMPATIBLE", "1")
        assert main([*arguments, f"--figure={tmp_path}/f.png"]) == 1
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    folded = [line for line in out.splitlines() if not line.startswith("wrote ")]
    assert max(map(len, folded)) <= 100
    assert "48 images, 384 boxes, 6 classes" in " ".join(out.split())  # folded by the path's length
    assert "boxes of negative width or height" in out
    assert f"{spec}:annotations[0]:" in "".join(out.split())  # folded anywhere
    assert "Found: 1 error and 1 warning." in out
    written = json.loads((tmp_path / "f.json").read_text())["findings"]
    assert [f["code"] for f in written if f["level"] != "information"] == [
        "swapped-corners",
        "outside-image",
    ]
    with Image.open(tmp_path / "f.png") as figure:
        assert figure.size == (1300, 1020)
        assert len(figure.convert("RGB").getcolors(10**6)) > 100
    assert main([write(tmp_path / "x.json", clean[1]), f"--images={clean[0]}"]) == 0
    assert "Nothing is wrong with it" in capsys.readouterr().out
    for bad in ([str(tmp_path / "nope")], [], ["--nope"], [spec, f"--against={tmp_path / 'nope'}"]):
        assert main(bad) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_flags_that_count_for_nothing_and_files_without_a_place_are_refused(tmp_path, capsys):
    rows = make_classes(tmp_path, np.random.default_rng(6), images=3)
    spec = write_csv(tmp_path / "a.csv", rows)
    folder = str(tmp_path)
    for arguments, message in (
        ([spec, "--images", folder], "--images is for boxes"),
        ([spec, "--against", spec, "--against_images", folder], "--against_images is for boxes"),
        ([spec, "--against_images", folder], "--against_images goes with --against"),
        ([spec, "--json", f"{folder}/none/a.json"], "none/a.json: can't be written"),
        ([spec, "--figure", folder], "can't be written"),
        ([""], "no data set is named"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_words(tmp_path, capsys):
    """Names are shown as they are, but for what a terminal obeys; the same text in two runs."""
    rng = np.random.default_rng(8)
    for name in ("$x^{$", "[red]a[bold]", "b\x1b[31m", os.fsdecode(b"c\xff")):
        (tmp_path / name).mkdir()
        draw_image(rng, 40, 40).save(tmp_path / name / "0.png")
    (tmp_path / "[red]a[bold]/page.jpg").write_text("<html>Not found</html>")
    (tmp_path / "b\x1b[31m/empty.jpg").write_bytes(b"")
    (tmp_path / "no\nimages").mkdir()
    texts = []
    for _ in range(2):
        assert main([str(tmp_path), f"--figure={tmp_path}/f.png", f"--json={tmp_path}/f.json"]) == 1
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "[red]a[bold]/page.jpg: not a readable image (none of JPEG, PNG" in texts[0]
    assert "b\\x1b[31m/empty.jpg" in texts[0]
    assert "unusable-entry: 1 of 7 entries, 14 %; training refuses" in texts[0]
    assert "no\\nimages" in texts[0]
    assert f"wrote {tmp_path}/f.png" in texts[0]
    assert all(c.isprintable() or c == "\n" for c in texts[0])
    with Image.open(tmp_path / "f.png") as image:
        assert image.width == 1300
    (tmp_path / "one").mkdir()
    content = make_set(tmp_path / "one", rng, images=1)
    content["images"][0]["file_name"] = "elsewhere.png"
    main([write(tmp_path / "one/x.json", content)])
    assert "missing-file: 1 of 1 file, 100 %; training refuses" in capsys.readouterr().out


@pytest.mark.long
def test_a_figure_of_a_hundred_thousand_boxes(clean, tmp_path):
    subject, findings = examine(write(tmp_path / "x.json", clean[1]), clean[0], quick=True)
    rows = np.zeros(10**5, np.int64)  # of the first box
    stated = subject.annotations
    many = {
        name: getattr(stated, name)[rows]
        for name in ("box_image", "box_category", "boxes_xywh_px", "area", "crowd", "entries")
    }
    subject = replace(subject, annotations=replace(stated, **many))
    findings = diagnose_boxes(subject, complete=True)
    assert findings[0].code == "repeated-box"
    start = time.process_time()
    draw_diagnosis(subject, findings[:1], tmp_path / "f.png")
    assert time.process_time() - start < 30  # 1 s on an idle machine; without a bound minutes


@pytest.mark.long
def test_module_runs():
    command = [sys.executable, "-m", "vision_jax.doctor", "embedded:fashion_mnist/test", "--quick"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "1,000 images, 10 classes" in result.stdout


def test_findings_are_documented():
    """Each code stands in docs/doctor.md, with what training does."""
    text = (Path(__file__).parents[2] / "docs/doctor.md").read_text()
    for code, training in TRAINING.items():
        [line] = [line for line in text.splitlines() if re.match(rf"\|.*`{code}`.*\|.*\|", line)]
        assert line.endswith(f"| {training} |")
