"""Regions as COCO, LabelMe, CVAT, Label Studio and Cityscapes state them, to masks.

pycocotools itself: tests/parity/test_regions.py.
"""

import base64
import io
import json
import pickle
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
import runs
from hotcoco import mask as hotcoco
from PIL import Image

from vision_jax.config import load_config
from vision_jax.data.decode import DamagedImageError
from vision_jax.data.mask_formats.files import is_of_regions, read_regions
from vision_jax.data.mask_formats.regions import ellipse, rasterize, turned
from vision_jax.data.mask_formats.runs import parse_brush, parse_counts, parse_row_lengths
from vision_jax.data.segmentation import read_segmentation_source
from vision_jax.errors import UserError
from vision_jax.tasks.segmentation.task import read_sources

HEIGHT, WIDTH = 24, 32


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "images/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / name)
    return tmp_path


def write(path: Path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def box(left, top, right, bottom) -> list[int]:
    return [left, top, right, top, right, bottom, left, bottom]


def drawn(*boxes: tuple[int, int, int, int, int], start: int = 0) -> np.ndarray:
    """Boxes (left, top, right, bottom, label) over each other; right and bottom are outside."""
    mask = np.full((HEIGHT, WIDTH), start, np.uint8)
    for left, top, right, bottom, label in boxes:
        mask[top:bottom, left:right] = label
    return mask


# --- runs ---------------------------------------------------------------------------------------


def plain_counts(mask: np.ndarray) -> list[int]:
    """COCO's list of a mask, written again here."""
    flat = mask.ravel(order="F").astype(int).tolist()
    counts, last, length = [], 0, 0
    for value in flat:
        if value != last:
            counts.append(length)
            last, length = value, 0
        length += 1
    return [*counts, length]


def test_counts(rng):
    for _ in range(40):
        height, width = rng.integers(1, 60, 2).tolist()
        mask = (rng.random((height, width)) < rng.choice([0, 0.02, 0.5, 1])).astype(np.uint8)
        text = hotcoco.encode(np.asfortranarray(mask))["counts"]
        for counts in (plain_counts(mask), text.decode() if isinstance(text, bytes) else text):
            lengths = parse_counts(counts, height * width)
            flat = np.repeat(np.arange(len(lengths)) % 2, lengths)
            assert np.array_equal(flat.reshape(width, height).T, mask)


def test_long_runs():
    """A number of seven characters, and a difference below zero."""
    mask = np.zeros((4000, 4000), np.uint8, order="F")
    mask[:, 3000:] = 1
    mask[:5, 3999] = 0
    text = hotcoco.encode(mask)["counts"]
    lengths = parse_counts(text.decode() if isinstance(text, bytes) else text, mask.size)
    assert lengths.tolist() == plain_counts_of_runs(mask)


def plain_counts_of_runs(mask: np.ndarray) -> list[int]:
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    return np.diff([0, *edges, flat.size]).tolist()


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ([20, -4], "negative length -4"),
        ([1, 3], "4 pixels together and not 16"),
        ([1, 170], "171 pixels together"),
        ([2**53, 16], "whole numbers"),
        ([1.0, 15], "whole numbers"),
        ([True, 15], "whole numbers"),
        (["16"], "whole numbers"),
        ([], "0 pixels together"),
        (None, "neither a list nor text"),
        ("", "none at all"),
        ("~~", "none of COCO's"),
        ("é", "none of COCO's"),
        ("o", "break off"),
        ("oooooooooo0", "too many digits"),
        ("@", "negative length"),
        ("0", "0 pixels together"),
    ],
)
def test_bad_counts(counts, reason):
    with pytest.raises(ValueError, match=reason):
        parse_counts(counts, 16)


def brush(mask: np.ndarray) -> list[int]:
    """Label Studio's bytes of a mask: a block for each run of values, or of plain ones."""
    values = np.repeat(mask.ravel().astype(int) * 255, 4)
    values[0::4] //= 2  # red is another value than alpha
    sizes = (3, 4, 8, 16)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    at = 0
    while at < len(values):
        same = 1
        while at + same < len(values) and values[at + same] == values[at] and same < 2**16:
            same += 1
        kind = next(k for k, size in enumerate(sizes) if same <= 2**size)
        if same > 1:
            bits += f"1{kind:02b}{same - 1:0{sizes[kind]}b}{values[at]:08b}"
            at += same
        else:
            plain = values[at : at + 5]
            bits += f"000{len(plain) - 1:03b}" + "".join(f"{v:08b}" for v in plain)
            at += len(plain)
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def test_brush(rng):
    for share in (0, 0.1, 0.5, 1):
        mask = rng.random((7, 9)) < share
        lengths = parse_brush(brush(mask), mask.size)
        assert np.array_equal(np.repeat(np.arange(len(lengths)) % 2, lengths).reshape(7, 9), mask)
    bytes_ = brush(mask)
    for bad, reason in (
        (bytes_[:-3], "breaks off"),
        ([-1, *bytes_], "no bytes"),
        ([0.5], "no bytes"),
        ("abc", "no list"),
        ([], "no list"),
        ([255] * 40, "values"),
    ):
        with pytest.raises(ValueError, match=reason):
            parse_brush(bad, mask.size)
    with pytest.raises(ValueError, match="not 4 × 62"):
        parse_brush(bytes_, 62)


def test_row_lengths():
    assert parse_row_lengths("3, 5,8", 16).tolist() == [3, 5, 8]
    for text, reason in (("3,-5,18", "negative"), ("3,,13", "whole numbers"), ("1e3", "whole")):
        with pytest.raises(ValueError, match=reason):
            parse_row_lengths(text, 16)
    with pytest.raises(ValueError, match="together"):
        parse_row_lengths("999999999999999,999999999999999", 16)


# --- polygons -----------------------------------------------------------------------------------


def test_turned_corners():
    """Clockwise on a screen, whose y points down: the right side goes to the bottom."""
    assert np.allclose(turned([[2, 1]], (1, 1), 90), [1, 2])
    assert np.allclose(turned([[5, 3], [1, 3]], (3, 3), 180), [1, 3, 5, 3])


def test_ellipse_covers_its_area(rng):
    rx, ry = rng.uniform(20, 60, 2)
    for degrees in (0, 33):
        covered = rasterize([ellipse(100, 100, rx, ry, degrees)], 200, 200).sum()
        assert abs(covered / (np.pi * rx * ry) - 1) < 0.03
    wide = rasterize([ellipse(100, 100, 60, 10, 90)], 200, 200)
    rows, columns = np.nonzero(wide)
    assert np.ptp(rows) > 5 * np.ptp(columns)


# --- COCO ---------------------------------------------------------------------------------------


def coco(*annotations: dict, **more) -> dict:
    images = [
        {"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
        {"id": 9, "file_name": "b.png", "height": HEIGHT, "width": WIDTH},
    ]
    names = ((3, "cat"), (1, "dog"))
    return {
        "images": images,
        "annotations": [{"image_id": 7, "bbox": [0, 0, 1, 1]} | a for a in annotations],
        "categories": [{"id": i, "name": name} for i, name in names],
    } | more


def runs_of(mask: np.ndarray, *, text: bool) -> dict:
    if text:
        encoded = hotcoco.encode(np.asfortranarray(mask.astype(np.uint8)))
        return encoded | {"counts": encoded["counts"].decode()}
    return {"size": list(mask.shape), "counts": plain_counts(mask)}


def test_instances(folder, rng):
    """Polygons, both kinds of runs, crowds below all; later regions over earlier ones."""
    blob = rng.random((HEIGHT, WIDTH)) < 0.3
    other = rng.random((HEIGHT, WIDTH)) < 0.3
    content = coco(
        {"category_id": 3, "segmentation": [box(2, 2, 10, 9), box(20, 2, 24, 9)]},
        {"category_id": 1, "segmentation": [box(8, 4, 14, 12)]},
        {"category_id": 1, "segmentation": [box(0, 0, 16, 16)], "iscrowd": 1},
        {"category_id": 3, "segmentation": runs_of(blob, text=True), "image_id": 9},
        {"category_id": 1, "segmentation": runs_of(other, text=False), "image_id": 9},
    )
    found = read_regions(write(folder / "coco.json", content))
    assert found.class_names == ("background", "cat", "dog")
    assert found.count == 2
    assert not found.note
    expected = drawn((0, 0, 16, 16, 255), (2, 2, 10, 9, 1), (20, 2, 24, 9, 1), (8, 4, 14, 12, 2))
    masks = pickle.loads(pickle.dumps(found.masks))
    assert np.array_equal(masks.read(0), expected)
    assert np.array_equal(masks.read(1), np.where(other, 2, np.where(blob, 1, 0)))
    assert masks.read(0).dtype == np.uint8


def test_as_a_source(folder):
    """What training reads: labels by the class names of another set, sizes compared."""
    content = coco({"category_id": 1, "segmentation": [box(2, 2, 10, 9)]})
    spec = write(folder / "coco.json", content)
    names = ("dog", "cow", "background", "cat")
    source = read_segmentation_source(spec, class_names=names)
    example = pickle.loads(pickle.dumps(source))[0]
    assert example["image"].shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(example["mask"], drawn((2, 2, 10, 9, 0), start=2))
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(folder / "a.png")
    with pytest.raises(DamagedImageError, match=r"33 × 24 pixels and its mask 32 × 24"):
        source[0]
    assert source[1]["mask"].max() == 2
    assert source.masks.stamp(0) != source.masks.stamp(1)
    content["annotations"][0]["segmentation"][0][0] += 1
    other = read_segmentation_source(write(folder / "coco.json", content), class_names=names)
    assert other.masks.stamp(0) != source.masks.stamp(0)
    assert other.masks.stamp(1) == source.masks.stamp(1)


def test_stated_background_and_unknown_sizes(folder):
    """A category named so is what pixels of no region are; a size is the image's if not stated."""
    content = coco(
        {"category_id": 3, "segmentation": [box(2, 2, 10, 9)]},
        categories=[{"id": 1, "name": "Background"}, {"id": 3, "name": "cat"}],
        images=[{"id": 7, "file_name": "a.png"}],
    )
    found = read_regions(write(folder / "coco.json", content))
    assert found.class_names == ("Background", "cat")
    assert np.array_equal(found.masks.read(0), drawn((2, 2, 10, 9, 1)))


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ({"segmentation": [[1, 2, 3, 4]]}, "3 corners"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "3 corners"),
        ({"segmentation": [[1, 2, 3, 4, 5, None]]}, "finite"),
        ({"segmentation": [[1, 2, 3, 4, 5, 1e999]]}, "finite"),
        ({"segmentation": [[0, 0, 1e8, 0, 1e8, 1e8]]}, "farther outside"),
        ({"segmentation": [[0, 0, 31, 23, 0, 23] * 60_000]}, "edges are"),
        ({"segmentation": ["1, 2, 3"]}, "3 corners"),
        ({"segmentation": []}, "no segmentation"),
        ({"segmentation": None}, "no segmentation"),
        ({"segmentation": {"size": [24, 32], "counts": [700, -1, 69]}}, "negative length -1"),
        ({"segmentation": {"size": [24, 32], "counts": [7, 8]}}, "15 pixels together"),
        ({"segmentation": {"size": [32, 24], "counts": [768]}}, "image is stated as"),
        ({"segmentation": {"size": [24], "counts": [768]}}, "height and width"),
        ({"segmentation": {"size": [-24, -32], "counts": [768]}}, "height and width"),
        ({"segmentation": {"counts": "0"}}, "height and width"),
        ({"segmentation": [box(1, 1, 5, 5)], "iscrowd": "yes"}, "iscrowd"),
        ({"segmentation": [box(1, 1, 5, 5)], "image_id": 8}, "not in `images`"),
        ({"segmentation": [box(1, 1, 5, 5)], "category_id": 8}, "not in `categories`"),
        ({"segmentation": [box(1, 1, 5, 5)], "category_id": None}, "category_id None"),
    ],
)
def test_bad_instances(folder, annotation, reason):
    spec = write(folder / "coco.json", coco({"category_id": 3} | annotation))
    with pytest.raises(UserError, match=reason) as error:
        read_regions(spec)
    assert str(error.value).startswith(f"{spec}: annotations[0]: ")


def test_too_much_work(folder):
    """64 million pixels for a thousand regions, and an image of 10¹² pixels."""
    one = {"category_id": 3, "segmentation": [box(1, 1, 5, 5)]}
    image = {"id": 7, "file_name": "a.png", "height": 8000, "width": 8000}
    content = coco(*[one] * 1200, images=[image])
    with pytest.raises(DamagedImageError, match="1,200 regions of an image of 8000 × 8000"):
        read_regions(write(folder / "coco.json", content)).masks.read(0)
    image |= {"height": 1_000_000, "width": 1_000_000}
    with pytest.raises(DamagedImageError, match="cut it"):
        read_regions(write(folder / "coco.json", coco(one, images=[image]))).masks.read(0)
    many = [{"id": i, "name": str(i)} for i in range(256)]
    with pytest.raises(UserError, match="257 classes"):
        read_regions(write(folder / "coco.json", coco(categories=many)))


def write_panoptic(folder: Path, **more) -> str:
    (folder / "p").mkdir(exist_ok=True)
    ids = np.zeros((HEIGHT, WIDTH), int)
    ids[2:9, 2:10], ids[4:12, 8:14], ids[12:, :] = 70_001, 300, 5
    color = np.stack([ids % 256, ids // 256 % 256, ids // 65_536], -1).astype(np.uint8)
    Image.fromarray(color).save(folder / "p/a.png")
    segments = [
        {"id": 70_001, "category_id": 3},
        {"id": 300, "category_id": 1},
        {"id": 5, "category_id": 3, "iscrowd": 1},
    ]
    entry = {"image_id": 7, "file_name": "a.png", "segments_info": segments} | more
    return write(folder / "p.json", coco() | {"annotations": [entry]})


def test_panoptic(folder):
    found = read_regions(write_panoptic(folder), folder)
    assert found.class_names == ("cat", "dog")
    assert found.count == 1
    assert found.masks.stamp(0) > 0
    assert found.reader.relative_name(0) == "a.png"
    assert "1 images without annotation left out" in found.note
    expected = drawn((2, 2, 10, 9, 0), (8, 4, 14, 12, 1), start=255)
    assert np.array_equal(pickle.loads(pickle.dumps(found.masks)).read(0), expected)


def test_bad_panoptic(folder):
    for more, reason in (
        ({"file_name": "x.png"}, "no such file"),
        ({"file_name": "../a.png"}, "no such file"),
        ({"image_id": 8}, "not in `images`"),
        ({"segments_info": [{"id": -4, "category_id": 3}]}, "segments_info"),
        ({"segments_info": [{"id": 4, "category_id": 99}]}, "not in `categories`"),
        ({"segments_info": [{"id": 4, "category_id": 3}] * 2}, "given twice"),
    ):
        with pytest.raises(UserError, match=reason):
            read_regions(write_panoptic(folder, **more), folder)
    found = read_regions(write_panoptic(folder, segments_info=[{"id": 300, "category_id": 3}]))
    with pytest.raises(DamagedImageError, match="2 segments that segments_info does not list"):
        found.masks.read(0)


# --- LabelMe ------------------------------------------------------------------------------------


def shape(label, points, kind="polygon", **more) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None} | more


def labelme(*shapes, image="a.png", **more) -> dict:
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    return (
        {"version": "6", "shapes": list(shapes), "imagePath": image, "imageData": None}
        | size
        | more
    )


def png(mask: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def test_labelme(folder, rng):
    small = rng.random((5, 6)) < 0.5
    write(
        folder / "a.json",
        labelme(
            shape("dog", [[2, 2], [10, 2], [10, 9], [2, 9]]),
            shape("cat", [[14, 12], [8, 4]], "rectangle"),
            shape("__ignore__", [[20, 20], [30, 20], [30, 23], [20, 23]]),
            shape("cat", [[3, 15], [8, 19]], "mask", mask=png(small)),
            shape("dog", [[1, 1], [5, 5]], "line"),
            shape("dog", [[1, 1]], "point"),
        ),
    )
    write(folder / "b.json", labelme(shape("dog", [[15, 12], [15, 18]], "circle"), image="b.png"))
    found = read_regions(str(folder))
    assert is_of_regions(str(folder))
    assert found.class_names == ("background", "cat", "dog")
    assert "1 lines, 1 points" in found.note
    expected = drawn((2, 2, 10, 9, 2), (8, 4, 14, 12, 1), (20, 20, 30, 23, 255))
    expected[15:20, 3:9][small] = 1
    assert np.array_equal(found.masks.read(0), expected)
    disk = found.masks.read(1) == 2
    assert abs(disk.sum() / (np.pi * 36) - 1) < 0.05
    (folder / "labels.txt").write_text("__ignore__\n_background_\ndog\ncat\n")
    assert read_regions(str(folder)).class_names == ("_background_", "dog", "cat")
    (folder / "labels.txt").write_text("dog\n")
    with pytest.raises(UserError, match=r"labels.txt: '__ignore__' is not listed"):
        read_regions(str(folder))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (labelme(shape("a", [[1, 2], [3, 4]])), "3 corners"),
        (labelme(shape("a", [[1, 2], [3, 4, 5]])), "points"),
        (labelme(shape("a", "1,2")), "points"),
        (labelme(shape("a", [[1, 2]], "circle")), "has 2 points, and not 1"),
        (labelme(shape("a", [[1, 2]], "blob")), "not known"),
        (labelme(shape("a", [[1, 2], [3, 4]], "mask", mask="%%")), "base64"),
        (labelme(shape("a", [[1, 2], [3, 4]], "mask", mask="YQ==")), "not a readable image"),
        (labelme(shape("a", [[1, 2], [3, 4]], "mask", mask=png(np.ones((5, 5))))), "another size"),
        (labelme(shape("a", [[30, 2], [34, 6]], "mask", mask=png(np.ones((5, 5))))), "reaches out"),
        (labelme(shape("", [[1, 2]])), "label"),
        (labelme(image="../x.png"), "x.png"),
        (labelme(image=None), "imagePath"),
        (labelme(imageHeight=-3), "height -3"),
        (labelme(imageHeight=1.5), "height 1.5"),
    ],
)
def test_bad_labelme(folder, content, reason):
    with pytest.raises(UserError, match=reason):
        read_regions(write(folder / "a.json", content))


# --- CVAT ---------------------------------------------------------------------------------------


def cvat(*shapes: str, name: str = "a.png", more: str = "") -> str:
    labels = "".join(f"<label><name>{n}</name></label>" for n in ("cat", "dog"))
    return (
        '<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>'
        f"<meta><task><labels>{labels}</labels></task></meta>{more}"
        f'<image id="0" name={quoteattr(name)} width="{WIDTH}" height="{HEIGHT}">'
        f"{''.join(shapes)}</image></annotations>"
    )


def element(tag: str, label: str = "cat", **values) -> str:
    attributes = " ".join(f"{key}={quoteattr(str(value))}" for key, value in values.items())
    return f'<{tag} label="{label}" source="manual" occluded="0" {attributes}></{tag}>'


def test_cvat(folder, rng):
    """Shapes by z_order; a box turned by 90° about its center; a mask along rows."""
    small = rng.random((5, 6)) < 0.5
    flat = small.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([*([0, 0] if flat[0] else [0]), *edges, flat.size])
    xml = cvat(
        element("polygon", "dog", points="2.0,2.0;10.0,2.0;10.0,9.0;2.0,9.0", z_order=1),
        element("box", "cat", xtl=8, ytl=4, xbr=14, ybr=12, z_order=0),
        element("box", "cat", xtl=18, ytl=6, xbr=28, ybr=10, rotation=90.0),
        element("mask", "dog", rle=", ".join(map(str, lengths)), top=15, left=3, height=5, width=6),
        element("polyline", points="1,1;2,2"),
        element("points", points="1,1"),
    )
    (folder / "annotations.xml").write_text(xml)
    found = read_regions(str(folder / "annotations.xml"), folder)
    assert found.class_names == ("background", "cat", "dog")
    assert "1 points, 1 polylines" in found.note
    expected = drawn((8, 4, 14, 12, 1), (21, 3, 25, 13, 1))
    expected[15:20, 3:9][small] = 2
    expected[2:9, 2:10] = 2
    assert np.array_equal(found.masks.read(0), expected)


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        (cvat(element("polygon", points="1,2;3,4")), "3 corners"),
        (cvat(element("polygon", points="1,2;3;5,6")), "x,y;x,y"),
        (cvat(element("polygon", points="1,2;3,nan;5,6")), "finite"),
        (cvat(element("box", xtl=1, ytl=2, xbr=3)), "ybr None"),
        (cvat(element("box", xtl=1, ytl=2, xbr=3, ybr=4, rotation="much")), "rotation 'much'"),
        (cvat(element("mask", rle="5,-1,26", top=1, left=1, height=5, width=6)), "negative"),
        (cvat(element("mask", rle="30", top=22, left=1, height=5, width=6)), "not in its image"),
        (cvat(element("mask", rle="30", top=-2, left=1, height=5, width=6)), "not in its image"),
        (cvat(element("mask", rle="31", top=1, left=1, height=5, width=6)), "31 pixels together"),
        (cvat(element("blob")), "<blob> is not known"),
        (cvat(element("box", "cow", xtl=1, ytl=2, xbr=3, ybr=4)), "'cow' is not in"),
        (cvat(name="/etc/passwd"), "/etc/passwd"),
        (cvat(more='<track id="0" label="cat"></track>'), "tracks of a video"),
        (cvat().replace('width="32"', 'width="-1"'), "width"),
        ("<annotation></annotation>", "CVAT for images 1.1"),
        ("<annotations>", "not readable as XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotations></annotations>', "DOCTYPE"),
    ],
)
def test_bad_cvat(folder, xml, reason):
    (folder / "a.xml").write_text(xml)
    with pytest.raises(UserError, match=reason):
        read_regions(str(folder / "a.xml"), folder)


# --- Label Studio -------------------------------------------------------------------------------


def region(kind: str, labels=("cat",), **value) -> dict:
    own = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    more = {key: value.pop(key) for key in list(value) if key in own}
    value = value | {f"{kind}labels": list(labels)}
    return own | {"id": "x", "type": f"{kind}labels", "value": value} | more


def task(*results, image="/data/upload/1/0a1b2c3d-a.png", **more) -> dict:
    annotation = {"id": 1, "was_cancelled": False, "result": list(results)} | more
    return {"id": 1, "data": {"image": image}, "annotations": [annotation]}


def percent(left, top, right, bottom) -> list[list[float]]:
    corners = ((left, top), (right, top), (right, bottom), (left, bottom))
    return [[x / WIDTH * 100, y / HEIGHT * 100] for x, y in corners]


def test_label_studio(folder, rng):
    """A rectangle turned by 90° about its upper left corner lies left of it."""
    blob = rng.random((HEIGHT, WIDTH)) < 0.3
    turned_box = {"x": 50, "y": 25, "width": 10 / WIDTH * 100, "height": 4 / HEIGHT * 100}
    content = [
        task(
            region("polygon", ["dog"], points=percent(2, 2, 10, 9)),
            region("rectangle", x=50, y=25, width=12.5, height=25),
            region("rectangle", ["dog"], **turned_box, rotation=90),
            region("keypoint", x=1, y=1),
            {"type": "choices", "value": {"choices": ["good"]}},
        ),
        task(region("brush", rle=brush(blob)), image="https://x.org/y/b.png?token=1"),
        {"id": 3, "data": {"image": "c.png"}, "annotations": []},
    ]
    found = read_regions(write(folder / "tasks.json", content), folder)
    assert found.class_names == ("background", "cat", "dog")
    assert "1 keypoints, 1 tasks without an annotation" in found.note
    expected = drawn((2, 2, 10, 9, 2), (16, 6, 20, 12, 1), (12, 6, 16, 16, 2))
    assert np.array_equal(found.masks.read(0), expected)
    assert np.array_equal(found.masks.read(1), blob)


def test_label_studio_of_several_annotators(folder):
    content = task(region("polygon", points=percent(2, 2, 10, 9)))
    second = task(region("polygon", points=percent(1, 1, 4, 4)))["annotations"][0]
    content["annotations"].append(second | {"ground_truth": True})
    found = read_regions(write(folder / "tasks.json", [content]), folder)
    assert "1 annotations beside the first" in found.note
    assert np.array_equal(found.masks.read(0), drawn((1, 1, 4, 4, 1)))
    content["annotations"][1] = second | {"was_cancelled": True}
    found = read_regions(write(folder / "tasks.json", [content]), folder)
    assert np.array_equal(found.masks.read(0), drawn((2, 2, 10, 9, 1)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (task(region("polygon", points=[[1, 2], [3, 4]])), "3 corners"),
        (task(region("polygon", points=[[1, 2], [3, "4"], [5, 6]])), "percent"),
        (task(region("polygon", points=[[1e7, 2], [3, 4], [5, 6]])), "farther outside"),
        (task(region("rectangle", x=1, y=2, width=3)), "percent"),
        (task(region("rectangle", x=1, y=2, width=3, height=4, rotation="x")), "percent"),
        (task(region("brush", rle=[1, 2, 3])), "breaks off"),
        (task(region("brush", rle=[-1] * 9)), "no bytes"),
        (task(region("polygon", points=percent(1, 1, 3, 3), image_rotation=90)), "image_rotation"),
        (task(region("polygon", ("a", "b"), points=percent(1, 1, 3, 3))), "one to each region"),
        (task(region("polygon", points=percent(1, 1, 3, 3), original_width=0)), "original size"),
        (task(region("polygon", points=percent(1, 1, 3, 3)), image="x.png"), "no such file"),
        (task(region("polygon", points=percent(1, 1, 3, 3)), image="/../../etc/x"), "no such file"),
        (task({"type": "brushlabels", "value": 3}), "needs `value`"),
    ],
)
def test_bad_label_studio(folder, content, reason):
    with pytest.raises(UserError, match=reason):
        read_regions(write(folder / "tasks.json", [content]), folder)


# --- Cityscapes, and what is none ---------------------------------------------------------------


def test_cityscapes(tmp_path, rng):
    ids = rng.integers(0, 34, (8, 12)).astype(np.uint8)
    for city in ("aachen", "bonn"):
        for top, end, content in (
            ("leftImg8bit", "leftImg8bit", np.zeros((8, 12, 3), np.uint8)),
            ("gtFine", "gtFine_labelIds", ids),
            ("gtFine", "gtFine_instanceIds", ids.astype(np.uint16)),
        ):
            path = tmp_path / top / "train" / city / f"{city}_000000_000019_{end}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(path)
    found = read_regions(f"cityscapes:{tmp_path}/train")
    assert len(found.class_names) == 19
    assert found.groups is not None
    assert found.groups.tolist() == [0, 1]
    mask = found.masks.read(1)
    names = {7: "road", 8: "sidewalk", 23: "sky", 26: "car", 33: "bicycle", 31: "train"}
    for number, name in names.items():
        assert (mask[ids == number] == found.class_names.index(name)).all()
    assert (mask[np.isin(ids, (0, 1, 3, 4, 9, 14, 29, 30))] == 255).all()
    changes = {f"data.{part}": f"cityscapes:{tmp_path}/train" for part in ("train", "eval")}
    train, held_out = read_sources(load_config(str(runs.ROOT / "configs/cityscapes.py"), changes))
    assert np.array_equal(held_out[0]["mask"], train[1]["mask"])
    assert train.class_names[13] == "car"
    with pytest.raises(UserError, match="has no 'val'; it has train"):
        read_regions(f"cityscapes:{tmp_path}/val")
    path.unlink()
    path.with_name(path.name.replace("instance", "label")).unlink()
    with pytest.raises(UserError, match=r"bonn_000000_000019_gtFine_labelIds.png: no such file"):
        read_regions(f"cityscapes:{tmp_path}/train")


def test_no_regions(folder):
    for content, reason in (([], "a list"), ({"a": 1}, "this has 'a'"), ([{"x": 1}], "a list")):
        with pytest.raises(UserError, match=reason):
            read_regions(write(folder / "x.json", content))
    for spec, reason in (("none.json", "no such file"), ("images", "no JSON of LabelMe")):
        with pytest.raises(UserError, match=reason):
            read_regions(str(folder / spec))
    with pytest.raises(UserError, match="leftImg8bit"):
        read_regions(f"cityscapes:{folder}/train")
    assert not is_of_regions(str(folder))
