"""Masks, regions and volumes that can't be meant, through the command: a line, or a count.

`STOPS` end it with exit code 2 and one line, `COUNTED` are findings with their number: training
leaves such images out, or refuses.
"""

import base64
import gzip
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision_jax.doctor.__main__ import main

HEIGHT, WIDTH, COUNT = 24, 32, 3
IMAGE = {"id": 1, "file_name": "0.png", "height": HEIGHT, "width": WIDTH}
RING = [1, 1, 9, 1, 9, 9]
Make = Callable[[Path], str | None]  # in a sound set; of another specification than its folder


@pytest.fixture
def folder(tmp_path, rng):
    """A sound set: images of noise, masks of two classes, and their table."""
    for kind, top in (("images", 256), ("masks", 2)):
        (tmp_path / kind).mkdir()
        for i in range(COUNT):
            shape = (HEIGHT, WIDTH, 3)[: 3 if kind == "images" else 2]
            pixels = rng.integers(0, top, shape).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{i}.png")
    (tmp_path / "classes.json").write_text('["ground", "cat"]')
    return tmp_path


def mask(content: bytes | np.ndarray | Image.Image, kind: str = "png", **how) -> Make:
    """The first mask is this."""

    def make(folder: Path) -> None:
        path = folder / "masks/0.png"
        if isinstance(content, bytes):
            path.write_bytes(content)
            return
        image = content if isinstance(content, Image.Image) else Image.fromarray(content)
        image.save(path, kind, **how)

    return make


def array(content: np.ndarray, head: Callable[[bytes], bytes] = lambda data: data) -> Make:
    """The first mask is a .npy file."""

    def make(folder: Path) -> None:
        (folder / "masks/0.png").unlink()
        file = io.BytesIO()
        np.save(file, content, allow_pickle=True)
        (folder / "masks/0.npy").write_bytes(head(file.getvalue()))

    return make


def table(text: str, name: str = "classes.json") -> Make:
    def make(folder: Path) -> None:
        (folder / "classes.json").unlink()
        (folder / name).write_text(text)

    return make


def regions(content: object, name: str = "images/x.json") -> Make:
    """A file of regions beside the images."""

    def make(folder: Path) -> str:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
        return str(folder / name)

    return make


def coco(*segmentations: object, image: dict | None = None, **more) -> Make:
    entries = [
        {"image_id": 1, "category_id": 1, "segmentation": one} | more for one in segmentations
    ]
    content = {"images": [IMAGE | (image or {})], "categories": [{"id": 1, "name": "cat"}]}
    return regions(content | {"annotations": entries})


def labelme(*shapes: dict, **more) -> Make:
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH, "imagePath": "0.png"}
    return regions(size | {"version": "6", "shapes": list(shapes)} | more)


def shape(points: object, kind: str = "polygon", **more) -> dict:
    return {"label": "cat", "points": points, "shape_type": kind} | more


def cvat(body: str, size: str = f'width="{WIDTH}" height="{HEIGHT}"') -> Make:
    xml = f'<annotations><image id="0" name="0.png" {size}>{body}</image></annotations>'
    return regions(xml, "images/x.xml")


def studio(kind: str, image: str = "0.png", turned: int = 0, **value) -> Make:
    size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": turned}
    result = size | {"type": f"{kind}labels", "value": value | {f"{kind}labels": ["cat"]}}
    return regions([{"data": {"image": image}, "annotations": [{"result": [result]}]}])


def panoptic(*segments: dict, file: str = "0.png", pixels: int = 5) -> Make:
    def make(folder: Path) -> str:
        (folder / "images/x").mkdir()
        color = np.full((HEIGHT, WIDTH, 3), (pixels, 0, 0), np.uint8)
        Image.fromarray(color).save(folder / "images/x/0.png")
        entry = {"image_id": 1, "file_name": file, "segments_info": list(segments)}
        categories = [{"id": 1, "name": "cat"}]
        content = {"images": [IMAGE], "categories": categories, "annotations": [entry]}
        return regions(content)(folder) or ""

    return make


def nifti(*, at: int = 0, data: bytes = b"", what: str = "images", cut: int = 0) -> Make:
    """A volume of 4 x 5 x 6 voxels with its mask, bytes of one of which are others."""

    def make(folder: Path) -> str:
        head = bytearray(352)
        struct.pack_into("<i", head, 0, 348)
        struct.pack_into("<8h", head, 40, 3, 4, 5, 6, 1, 1, 1, 1)
        struct.pack_into("<2h", head, 70, 2, 8)
        struct.pack_into("<4f", head, 76, 1, 1, 1, 1)
        struct.pack_into("<f", head, 108, 352)
        struct.pack_into("<h", head, 254, 1)
        struct.pack_into("<12f", head, 280, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
        head[123:124], head[344:348] = b"\x02", b"n+1\0"
        for kind in ("images", "masks"):
            content = bytearray(head) + bytes(120)
            if kind == what:
                content[at : at + len(data)] = data
                content = content[: len(content) - cut]
            place = folder / "v" / kind
            place.mkdir(parents=True)
            (place / "a.nii").write_bytes(content)
        (folder / "v/classes.json").write_text('["around", "organ"]')
        return f"volumes:{folder}/v"

    return make


def volume(name: str, content: bytes, options: str = "?window=0:1") -> Make:
    """An image of another format, whose mask has the same bytes."""

    def make(folder: Path) -> str:
        for kind in ("images", "masks"):
            path = folder / "v" / kind / name
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
        (folder / "v/classes.json").write_text('["around", "organ"]')
        return f"volumes:{folder}/v{options}"

    return make


def nrrd(*lines: str) -> bytes:
    fixed = ("NRRD0004", "type: uint8", "dimension: 3", "sizes: 2 2 2", "encoding: raw")
    place = ("space: left-posterior-superior", "space directions: (1,0,0) (0,1,0) (0,0,1)")
    kept = [one for one in (*fixed, *place) if not any(one[:5] == line[:5] for line in lines)]
    return "\n".join([*kept, *lines, "", ""]).encode() + bytes(8)


def huge(data: bytes) -> bytes:
    """The same PNG, whose header claims four million million pixels."""
    return data[:16] + struct.pack(">2I", 2_000_000, 2_000_000) + data[24:]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


PLAIN = np.zeros((HEIGHT, WIDTH), np.uint8)
GLASS = Image.fromarray(PLAIN).convert("RGBA")
GLASS.putalpha(9)
BOMB = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><annotations>&c;</annotations>'
POINTS = [[1, 1], [9, 1], [9, 9]]
SMALL = base64.b64encode(png(np.ones((5, 5), np.uint8))).decode()
SIDES = struct.pack("<8h", 3, 32_000, 32_000, 32_000, 1, 1, 1, 1)

STOPS: dict[str, tuple[Make, str]] = {
    "a table of no JSON": (table("{"), "not readable as JSON"),
    "a table of nothing": (table("{}"), "no class in it"),
    "a table of one number": (table("3"), "not a list of names"),
    "a deep table": (table("[" * 5000), "not readable as JSON"),
    "a table of names": (table('{"one": "a"}'), "is no value"),
    "a table the wrong way round": (table('{"cat": [1, 2, 3]}'), "the name behind it"),
    "negative values": (table('{"-1": "a"}'), "is no value"),
    "values out of range": (table('{"70000": "a"}'), "values go from 0 to"),
    "a value twice": (table("name,value\na,1\nb,1\n", "classes.csv"), "two names"),
    "numbers and colors": (table('{"0": "a", "#00ff00": "b"}'), "numbers and colors"),
    "300 classes": (table(json.dumps([f"c{i}" for i in range(300)])), "300 classes"),
    "a table without columns": (table("a,b\n1,2\n", "classes.csv"), "begin with"),
    "a color out of range": (table("name,r,g,b\na,1,2,300\n", "classes.csv"), "no color"),
    "regions of no JSON": (regions("{"), "not readable as JSON"),
    "regions of nothing": (regions({}), "no regions"),
    "a list of numbers": (regions([1, 2]), "no regions"),
    "a deep list": (regions("[" * 100_000), "not readable as JSON"),
    "an entity bomb": (regions(BOMB, "images/x.xml"), "DOCTYPE"),
    "XML of no regions": (regions("<a/>", "images/x.xml"), "CVAT for images"),
    "XML that breaks off": (regions("<annotations>", "images/x.xml"), "not readable as XML"),
    "no images": (regions({"images": [], "annotations": [], "categories": []}), "no images"),
    "300 categories": (
        regions(
            {"images": [IMAGE], "annotations": [],
             "categories": [{"id": i, "name": f"c{i}"} for i in range(300)]}
        ),
        "classes",
    ),
    "no such plane": (nifti(), "axial, coronal"),
    "no such option": (nifti(), "did you mean `window`"),
    "a window of one number": (nifti(), "LOW:HIGH"),
    "a NIfTI of 10¹³ voxels": (nifti(at=40, data=SIDES), "over the limit"),
    "a NIfTI of negative sides": (nifti(at=42, data=struct.pack("<h", -4)), "a.nii"),
    "a NIfTI without a size": (nifti(at=280, data=bytes(48)), "no size"),
    "a NIfTI of NaN places": (nifti(at=280, data=struct.pack("<f", np.nan)), "a.nii"),
    "a NIfTI of complex numbers": (nifti(at=70, data=struct.pack("<2h", 32, 64)), "no plain"),
    "a NIfTI of another magic": (nifti(at=344, data=b"abcd"), "a.nii"),
        "a mask of another grid": (
        nifti(at=42, data=struct.pack("<h", 3), what="masks", cut=30), "and its image"),
    "a NRRD of 10¹² voxels": (volume("a.nrrd", nrrd("sizes: 10000 10000 10000")), "over the limit"),
    "a NRRD with its voxels elsewhere": (
        volume("a.nrrd", nrrd("data file: /etc/passwd")), "voxels are elsewhere"),
    "a NRRD of blocks": (volume("a.nrrd", nrrd("type: block")), "type 'block'"),
    "DICOM that is none": (volume("a.dcm", bytes(500)), "a.dcm"),
    "DICOM without pixels": (
        volume("a.dcm", bytes(128) + b"DICM" + b"\x02\0\0\0UL\x04\0\0\0\0\0"), "a.dcm"),
    "a TIFF that is none": (volume("a.tif", b"II*\0" + bytes(40)), "a.tif"),
    "a gzip that is none": (volume("a.nii.gz", b"\x1f\x8b" + bytes(40)), "a.nii.gz"),
    "a gzip of nothing": (volume("a.nii.gz", gzip.compress(b"")), "a.nii.gz"),
}  # fmt: skip
OPTIONS = {
    "no such plane": "?plane=x",
    "no such option": "?windw=0:1",
    "a window of one number": "?window=5",
}

COUNTED: dict[str, tuple[Make, str]] = {
    "a volume cut short": (nifti(cut=60), "unreadable-image: 6 of 6"),
    "an empty file": (mask(b""), "unreadable-mask: 1 of 3"),
    "a PNG that breaks off": (mask(png(PLAIN)[:40]), "unreadable-mask: 1 of 3"),
    "a PNG of 10¹² pixels": (mask(huge(png(PLAIN))), "unreadable-mask: 1 of 3"),
    "text": (mask(b"no image at all"), "unreadable-mask: 1 of 3"),
    "another size": (mask(PLAIN[:-1]), "mask-size: 1 of 3"),
    "a turned mask": (mask(PLAIN.T), "mask-size: 1 of 3"),
    "one pixel": (mask(PLAIN[:1, :1]), "mask-size: 1 of 3"),
    "a value of no class": (mask(PLAIN + np.uint8(9)), "mask-values: 1 of 3"),
    "a palette out of range": (
        mask(Image.fromarray(PLAIN + np.uint8(200)).convert("P")), "mask-values: 1 of 3"),
    "16 bits": (mask(np.full(PLAIN.shape, 65_535, np.uint16)), "mask-values: 1 of 3"),
    "colors": (mask(np.full((*PLAIN.shape, 3), (1, 2, 3), np.uint8)), "mask-values: 1 of 3"),
    "glass": (mask(GLASS), "mask-values: 1 of 3"),
    "a lossy format": (mask(PLAIN, "jpeg"), "mask-values: 1 of 3"),
    "pickled objects": (array(np.array([[None]])), "unreadable-mask: 1 of 3"),
    "real numbers": (array(PLAIN.astype(float)), "unreadable-mask: 1 of 3"),
    "three axes": (array(np.zeros((2, 3, 4), int)), "mask-values: 1 of 3"),
    "an array that breaks off": (
        array(PLAIN, lambda data: data[:100]), "unreadable-mask: 1 of 3"),
    "an array of 10¹² values": (
        array(PLAIN, lambda data: data.replace(b"(24, 32)", b"(9999999, 999999)")[:200]),
        "unreadable-mask: 1 of 3",
    ),
    "runs of negative length": (
        coco({"size": [HEIGHT, WIDTH], "counts": [700, -1, 69]}), "unusable-entry: 1 of"),
    "runs of another sum": (
        coco({"size": [HEIGHT, WIDTH], "counts": [7, 8]}), "unusable-entry: 1 of"),
    "runs of no text": (
        coco({"size": [HEIGHT, WIDTH], "counts": "~~"}), "unusable-entry: 1 of"),
    "runs without end": (
        coco({"size": [HEIGHT, WIDTH], "counts": "oooooooooo0"}), "unusable-entry: 1 of"),
    "runs of another size": (
        coco({"size": [WIDTH, HEIGHT], "counts": [768]}), "unusable-entry: 1 of"),
    "corners without end": (coco([[1e308, 1e308, 1, 1, 2, -1e308]]), "unusable-entry: 1 of"),
    "two corners": (coco([[1, 2, 3, 4]]), "unusable-entry: 1 of"),
    "corners of text": (coco(["1, 2, 3"]), "unusable-entry: 1 of"),
    "corners far away": (coco([[0, 0, 1e8, 0, 1e8, 1e8]]), "unusable-entry: 1 of"),
    "no segmentation": (coco(None), "unusable-entry: 1 of"),
    "half a crowd": (coco([RING], iscrowd=0.5), "unusable-entry: 1 of"),
    "no such category": (coco([RING], category_id=8), "undeclared-category: 1 of 1 entry"),
    "no such image": (coco([RING], image_id=8), "unknown-image: 1 of 1 entry"),
    "a path out of the folder": (
        coco([RING], image={"file_name": "../../etc/passwd"}), "path-outside: 1 of 1"),
    "an absolute path": (coco([RING], image={"file_name": "/etc/passwd"}), "path-outside: 1 of 1"),
    "an image of 10¹² pixels": (
        coco([RING], image={"height": 10**6, "width": 10**6}), "unreadable-mask: 1 of"),
    "points of text": (labelme(shape("1, 2")), "unusable-entry: 1 of"),
    "a circle of one point": (labelme(shape([[1, 2]], "circle")), "unusable-entry: 1 of"),
    "no such shape": (labelme(shape(POINTS, "blob")), "unusable-entry: 1 of"),
    "a mask of no base64": (
        labelme(shape([[1, 2], [3, 4]], "mask", mask="%%")), "unusable-entry: 1 of"),
    "a mask out of its image": (
        labelme(shape([[30, 2], [34, 6]], "mask", mask=SMALL)), "unusable-entry: 1 of"),
    "a negative height": (labelme(shape(POINTS), imageHeight=-3), "unusable-entry: 1 of"),
    "LabelMe's path out": (labelme(shape(POINTS), imagePath="../x.png"), "path-outside: 1 of 1"),
    "CVAT's corners of text": (
        cvat('<polygon label="cat" points="1,2;3,nan;5,6"/>'), "unusable-entry: 1 of"),
    "CVAT's negative runs": (
        cvat('<mask label="cat" rle="5,-1,26" top="1" left="1" height="5" width="6"/>'),
        "unusable-entry: 1 of",
    ),
    "CVAT's mask out of its image": (
        cvat('<mask label="cat" rle="30" top="-2" left="1" height="5" width="6"/>'),
        "unusable-entry: 1 of",
    ),
    "a turn by much": (
        cvat('<box label="cat" xtl="1" ytl="2" xbr="3" ybr="4" rotation="much"/>'),
        "unusable-entry: 1 of",
    ),
    "a brush that breaks off": (studio("brush", rle=[1, 2, 3]), "unusable-entry: 1 of"),
    "a brush of no bytes": (studio("brush", rle=[-1] * 9), "unusable-entry: 1 of"),
    "a turned image": (studio("polygon", turned=90, points=POINTS), "unusable-entry: 1 of"),
    "percent of text": (studio("polygon", points=[[1, "2"]]), "unusable-entry: 1 of"),
    "Label Studio's path out": (
        studio("polygon", image="/../../etc/x", points=POINTS), "missing-file: 1 of 1"),
    "segments of negative number": (
        panoptic({"id": -4, "category_id": 1}), "unusable-entry: 1 of"),
    "a segment twice": (
        panoptic({"id": 5, "category_id": 1}, {"id": 5, "category_id": 1}), "repeated-id: 1 of 1"),
    "a PNG out of the folder": (
        panoptic({"id": 5, "category_id": 1}, file="../0.png"), "path-outside: 1 of 1"),
    "a segment of no list": (
        panoptic({"id": 5, "category_id": 1}, pixels=9), "unreadable-mask: 1 of 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPS)
def test_one_line_and_exit_code_2(name, folder, capsys):
    make, reason = STOPS[name]
    spec = make(folder) or str(folder)
    assert main([spec + OPTIONS.get(name, ""), "--segmentation"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert reason in err


@pytest.mark.parametrize("name", COUNTED)
def test_counted_as_findings(name, folder, capsys):
    make, count = COUNTED[name]
    spec = make(folder) or str(folder)
    assert main([spec, "--segmentation"]) == 1
    screen = capsys.readouterr()
    assert count in " ".join(screen.out.split())
    assert "Traceback" not in screen.out + screen.err
