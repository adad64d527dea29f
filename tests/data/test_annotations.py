"""Readers of boxes: right files to the number, hostile ones to one line."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from vision_jax.data.annotations import examine_annotations, read_annotations
from vision_jax.doctor.examine import examine
from vision_jax.errors import UserError

SIZES = {"a.jpg": (40, 60), "b.png": (33, 21), "sub/c.jpg": (50, 50)}  # (height, width)


@pytest.fixture
def images(tmp_path, rng):
    """Three images, one in a folder below, and the file that nobody may reach."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name, (height, width) in SIZES.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
    (tmp_path / "outside.jpg").write_bytes((folder / "a.jpg").read_bytes())
    return folder


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """f64[count, 4] xywh, of quarters, so that all formats hold them exactly."""
    return np.concatenate([rng.integers(0, 60, (count, 2)), rng.integers(4, 80, (count, 2))], 1) / 4


def coco(images=None, annotations=None, categories=None) -> dict:
    """A small right file; what is given takes the place of a part."""
    return {
        "info": {"year": 2026},
        "images": images
        if images is not None
        else [
            {"id": 7 + i, "file_name": name, "height": h, "width": w}
            for i, (name, (h, w)) in enumerate(SIZES.items())
        ],
        "annotations": annotations
        if annotations is not None
        else [{"id": 1, "image_id": 8, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 0}],
        "categories": categories
        if categories is not None
        else [{"id": 3, "name": "cat", "supercategory": "animal"}, {"id": 90, "name": "dog"}],
    }


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def refused(spec: str, images=None) -> str:
    with pytest.raises(UserError) as caught:
        read_annotations(spec, images)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 2000
    return message


# --- right files --------------------------------------------------------------------------------


def test_coco(images, tmp_path, rng):
    boxes = random_boxes(rng, 50)
    image, category = rng.integers(0, 3, 50), rng.integers(0, 2, 50)
    area, crowd = rng.uniform(1, 100, 50), rng.integers(0, 2, 50)
    entries = [
        {
            "id": 100 + i,
            "image_id": 7 + int(image[i]),
            "category_id": (3, 90)[category[i]],
            "bbox": boxes[i].tolist(),
            "iscrowd": int(crowd[i]),
            "segmentation": [[1, 2, 3, 4, 5, 6]],
        }
        | ({"area": float(area[i])} if i % 2 else {})
        for i in range(50)
    ]
    spec = write(tmp_path / "boxes.json", coco(annotations=entries))
    for read in (read_annotations(spec), read_annotations(spec, images)):  # images/ is found
        read = pickle.loads(pickle.dumps(read))
        assert read.paths == tuple(SIZES)
        assert read.folder == images
        assert read.sizes.tolist() == [list(size) for size in SIZES.values()]
        assert read.image_ids == (7, 8, 9)
        assert read.category_ids == (3, 90)
        assert read.category_names == ("cat", "dog")
        assert read.supercategories == ("animal", "")
        assert np.array_equal(read.box_image, image)
        assert np.array_equal(read.box_category, category)
        assert np.array_equal(read.boxes_xywh_px, boxes)
        assert np.array_equal(read.area[1::2], area[1::2])
        assert np.array_equal(read.area[::2], boxes[::2, 2] * boxes[::2, 3])
        assert np.array_equal(read.crowd, crowd.astype(bool))
        assert read.place(11) == f"{spec}: annotations[11]"
        assert read.reader.read(1).shape == (33, 21, 3)
        kinds = [read.sizes, read.box_image, read.boxes_xywh_px, read.area, read.crowd]
        assert [a.dtype for a in kinds] == [np.int32, np.int32, np.float64, np.float64, np.bool_]


def test_coco_of_other_habits(images, tmp_path):
    """Text ids, whole floats as ids, no sizes, no categories, a BOM, swapped corners left alone."""
    content = {
        "images": [{"id": "x", "file_name": "a.jpg"}, {"id": 2.0, "file_name": "b.png"}],
        "annotations": [
            {"image_id": 2, "category_id": 5.0, "bbox": [9, 9, -3, 4]},
            {"image_id": "x", "category_id": "k", "bbox": [0.5, 0, 1, 1], "iscrowd": True},
        ],
    }
    path = tmp_path / "boxes.json"
    path.write_bytes(b"\xef\xbb\xbf\n " + json.dumps(content).encode())
    read = read_annotations(str(path), images)
    assert read.image_ids == ("x", 2)
    assert read.sizes.tolist() == [[0, 0], [0, 0]]
    assert read.category_ids == (5, "k")
    assert read.category_names == ("5", "k")
    assert read.boxes_xywh_px.tolist() == [[9, 9, -3, 4], [0.5, 0, 1, 1]]
    assert read.area.tolist() == [-12, 1]
    assert read.crowd.tolist() == [False, True]


def test_plain(images, tmp_path):
    def entry(name, *corners, category=4):
        h, w = SIZES[name]
        box = dict(zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
        return {"file_name": name, "width": w, "height": h, "category_id": category} | box

    entries = [entry("a.jpg", 1, 2, 5, 10), entry("b.png", 0, 0, 21, 33, category=2)]
    entries += [entry("a.jpg", 3, 3, 4.5, 4), {"file_name": "sub/c.jpg", "width": 50, "height": 50}]
    read = read_annotations(write(tmp_path / "plain.json", {"images": entries}), images)
    assert read.paths == read.image_ids == ("a.jpg", "b.png", "sub/c.jpg")
    assert read.box_image.tolist() == [0, 1, 0]
    assert read.boxes_xywh_px.tolist() == [[1, 2, 4, 8], [0, 0, 21, 33], [3, 3, 1.5, 1]]
    assert read.category_ids == (4, 2)
    assert read.category_names == ("4", "2")
    assert read.area.tolist() == [32, 693, 1.5]
    assert read.place(2) == f"{tmp_path}/plain.json: images[2]"
    named = {"images": entries, "categories": [{"id": 2, "name": "two"}, {"id": 4, "name": "four"}]}
    read = read_annotations(write(tmp_path / "plain.json", named), images)
    assert read.category_names == ("two", "four")
    assert read.box_category.tolist() == [1, 0, 1]
    entries[2]["width"] = 61
    assert "images[2]: another width" in refused(write(tmp_path / "p.json", named), images)


def xml(name, size, *objects) -> str:
    """`objects`: (name, xmin, ymin, xmax, ymax, difficult)."""
    parts = "".join(
        f"<object><name>{n}</name><difficult>{d}</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
        f"<xmax>{c}</xmax><ymax>{e}</ymax></bndbox></object>"
        for n, a, b, c, e, d in objects
    )
    return (
        f"<annotation><filename>{name}</filename><size><width>{size[1]}</width>"
        f"<height>{size[0]}</height><depth>3</depth></size>{parts}</annotation>"
    )


@pytest.fixture
def voc(images, tmp_path):
    images.rename(tmp_path / "JPEGImages")
    (tmp_path / "Annotations/sub").mkdir(parents=True)
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    write(
        tmp_path / "Annotations/a.xml",
        xml("a.jpg", (40, 60), ("dog", 1, 1, 60, 40, 0), ("cat", 2, 3, 2, 5, 1)),
    )
    write(tmp_path / "Annotations/b.xml", xml("C:\\elsewhere\\x.png", (33, 21)))
    write(tmp_path / "Annotations/sub/c.xml", xml("c.jpg", (50, 50), ("cow", 5, 5, 9, 9, 0)))
    return tmp_path


def test_voc(voc):
    """Pixels count from 1 and the last is included: a box of 1..60 is 60 wide and begins at 0."""
    read = read_annotations(str(voc))
    assert read.paths == tuple(SIZES)
    assert read.image_ids == ("a", "b", "sub/c")
    assert read.sizes.tolist() == [list(size) for size in SIZES.values()]
    assert read.category_ids == read.category_names == ("cat", "cow", "dog")
    assert read.boxes_xywh_px.tolist() == [[0, 0, 60, 40], [1, 2, 1, 3], [4, 4, 5, 5]]
    assert read.area.tolist() == [2400, 3, 25]
    assert read.crowd.tolist() == [False, True, False]
    assert read.box_category.tolist() == [2, 0, 1]
    assert read.place(1) == f"{voc}/Annotations/a.xml: object 2"
    listed = write(voc / "ImageSets/Main/cow_train.txt", "sub/c  1\n\nb -1\n")
    assert read_annotations(listed).paths == ("sub/c.jpg", "b.png")
    assert read_annotations(str(voc / "Annotations")).paths == tuple(SIZES)
    one = read_annotations(str(voc / "Annotations/a.xml"), voc / "JPEGImages")
    assert one.paths == ("a.jpg",)


def test_voc_of_plain_coordinates(voc):
    write(voc / "Annotations/sub/c.xml", xml("c.jpg", (0, 0), ("cow", 0, 5, 9.5, 9, 0)))
    read = read_annotations(str(voc))
    assert read.boxes_xywh_px.tolist() == [[1, 1, 59, 39], [2, 3, 0, 2], [0, 5, 9.5, 4]]
    assert read.sizes[2].tolist() == [0, 0]


def test_voc_beside_its_images(voc):
    (voc / "Annotations/a.xml").rename(voc / "JPEGImages/a.xml")
    read = read_annotations(str(voc / "JPEGImages"))
    assert read.paths == ("a.jpg",)
    assert read.boxes_xywh_px.shape == (2, 4)


def yolo_row(category, box, size) -> str:
    x, y, w, h = box
    shares = [(x + w / 2) / size[1], (y + h / 2) / size[0], w / size[1], h / size[0]]
    return f"{category} " + " ".join(f"{share:.17g}" for share in shares)


@pytest.fixture
def yolo(images, tmp_path, rng):
    """images/, labels/, data.yaml; b.png has no labels."""
    boxes = random_boxes(rng, 5)
    (tmp_path / "labels/sub").mkdir(parents=True)
    rows = [yolo_row(i % 2, boxes[i], SIZES["a.jpg"]) for i in range(4)]
    write(tmp_path / "labels/a.txt", "\n".join(rows) + "\n\n")
    write(tmp_path / "labels/sub/c.txt", yolo_row(1, boxes[4], SIZES["sub/c.jpg"]))
    write(
        tmp_path / "data.yaml", "path: .\ntrain: images\nval: [images/sub]\nnames: {0: cat, 1: dog}"
    )
    return tmp_path, boxes


def test_yolo(yolo):
    folder, boxes = yolo
    for spec in (folder, folder / "images", folder / "data.yaml", f"{folder}/data.yaml:train"):
        read = read_annotations(str(spec))
        assert {p.removeprefix("images/") for p in read.paths} == set(SIZES)
        assert read.reader.read(1).shape == (33, 21, 3)
        assert read.sizes.tolist() == [list(size) for size in SIZES.values()]
        assert read.category_ids == (0, 1)
        assert read.category_names == ("cat", "dog")
        np.testing.assert_allclose(read.boxes_xywh_px, boxes, atol=1e-12)
        assert read.box_image.tolist() == [0, 0, 0, 0, 2]
        assert read.box_category.tolist() == [0, 1, 0, 1, 1]
        assert read.place(4) == f"{folder}/labels/sub/c.txt: line 1"
    assert read_annotations(f"{folder}/data.yaml:val").paths == ("images/sub/c.jpg",)
    assert read_annotations(str(folder / "images/sub")).paths == ("c.jpg",)
    assert "of train, val, test: train, val" in refused(f"{folder}/data.yaml:nope")
    (folder / "data.yaml").unlink()
    assert read_annotations(str(folder)).category_names == ("0", "1")
    write(folder / "labels/classes.txt", "Katze\nHund\n")
    assert read_annotations(str(folder)).category_names == ("Katze", "Hund")


def test_yolo_layouts(yolo):
    """A list of images; Roboflow's ../train; labels beside images; folders of any name."""
    folder, boxes = yolo
    write(folder / "part.txt", "./images/sub/c.jpg\nimages/a.jpg\n")
    write(folder / "data.yaml", "train: part.txt\nval: ../images\nnames: [x, y]")
    assert read_annotations(f"{folder}/data.yaml").paths == ("images/sub/c.jpg", "images/a.jpg")
    assert len(read_annotations(f"{folder}/data.yaml:val").paths) == 3
    other = read_annotations(str(folder / "labels"), folder / "images")
    np.testing.assert_allclose(other.boxes_xywh_px, boxes, atol=1e-12)
    (folder / "labels/a.txt").rename(folder / "images/a.txt")
    (folder / "labels/sub/c.txt").rename(folder / "images/sub/c.txt")
    (folder / "labels/sub").rmdir()
    (folder / "labels").rmdir()
    beside = read_annotations(str(folder / "images"))
    np.testing.assert_allclose(beside.boxes_xywh_px, boxes, atol=1e-12)


def test_yolo_boxes_are_shares_of_the_upright_image(yolo):
    folder, boxes = yolo
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / "images/a.jpg").rotate(90, expand=True).save(
        folder / "images/a.jpg", exif=exif.tobytes()
    )
    read = read_annotations(str(folder))
    assert read.sizes[0].tolist() == [40, 60]
    assert read.reader.read(0).shape == (40, 60, 3)
    np.testing.assert_allclose(read.boxes_xywh_px, boxes, atol=1e-12)


def test_a_folder_of_one_json(images):
    write(images / "_annotations.coco.json", coco())
    assert read_annotations(str(images)).image_ids == (7, 8, 9)
    write(images / "second.json", coco())
    message = refused(str(images))
    assert f"give one of {images}/_annotations.coco.json, {images}/second.json" in message


def test_boxes_at_once_are_boxes_one_by_one(images, tmp_path, monkeypatch, rng):
    """The quick way gives exactly what the careful one does, with and without categories."""
    for categories in (None, []):
        entries = [
            {
                "id": i,
                "image_id": int(rng.integers(7, 10)),
                "category_id": int(rng.choice([3, 90])),
                "bbox": random_boxes(rng, 1)[0].tolist(),
            }
            | ({"area": 3} if i % 3 else {"area": None})
            | ({"iscrowd": i % 2} if i % 5 else {})
            for i in range(200)
        ]
        spec = write(tmp_path / "boxes.json", coco(annotations=entries, categories=categories))
        with monkeypatch.context() as patch:
            careful = "vision_jax.data.annotation_formats.coco._add_boxes"
            patch.setattr(careful, lambda *a: pytest.fail("not at once"))
            quick = read_annotations(spec, images)
        with monkeypatch.context() as patch:
            patch.setattr(
                "vision_jax.data.annotation_formats.coco._add_sound_boxes", lambda *a: False
            )
            one_by_one = read_annotations(spec, images)
        for name in vars(quick):
            one, other = getattr(quick, name), getattr(one_by_one, name)
            if isinstance(one, np.ndarray):
                assert one.dtype == other.dtype
                assert np.array_equal(one, other), name
            else:
                assert one == other, name


def test_boxes_from_polygons(images, tmp_path):
    """A missing bbox is the polygons' own, as pycocotools derives it; nothing else is guessed."""
    polygons = [[10, 20, 30, 20, 30, 44.5], [5, 25, 12, 25, 12, 30, 6, 30]]
    entry = {"id": 1, "image_id": 7, "category_id": 3, "segmentation": polygons, "iscrowd": None}
    read = read_annotations(write(tmp_path / "a.json", coco(annotations=[entry])), images)
    assert read.boxes_xywh_px.tolist() == [[5, 20, 25, 24.5]]
    for other in ({"counts": [1, 2], "size": [40, 60]}, [], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, "6"]]):
        entry["segmentation"] = other
        spec = write(tmp_path / "a.json", coco(annotations=[entry]))
        assert "bbox None: give 4 finite numbers" in refused(spec, images)
    for missing in (None, []):  # as loadRes takes them
        entries = [entry | {"bbox": missing, "segmentation": polygons}]
        read = read_annotations(write(tmp_path / "a.json", coco(annotations=entries)), images)
        assert read.boxes_xywh_px.tolist() == [[5, 20, 25, 24.5]]


def test_data_beside_labels_json(images, tmp_path):
    """FiftyOne's layout of COCO."""
    images.rename(tmp_path / "data")
    write(tmp_path / "labels.json", coco())
    for spec in (tmp_path, tmp_path / "labels.json"):
        read = read_annotations(str(spec))
        assert (read.folder, read.paths) == (tmp_path / "data", tuple(SIZES))


def test_images_in_one_folder_and_their_xml_in_another(voc):
    """FiftyOne's data/ and labels/, and images/ and annotations/ of many sets."""
    whole = read_annotations(str(voc))
    (voc / "Annotations").rename(voc / "labels")
    (voc / "JPEGImages").rename(voc / "data")
    read = read_annotations(str(voc))
    assert read.paths == tuple(f"data/{name}" for name in SIZES)
    assert np.array_equal(read.boxes_xywh_px, whole.boxes_xywh_px)
    (voc / "more").mkdir()
    shutil.copy(voc / "data/a.jpg", voc / "more/a.jpg")  # which of them?
    assert "'a.jpg': no such file" in refused(str(voc))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_json_of_other_encodings(encoding, images, tmp_path):
    content = json.dumps(coco(), ensure_ascii=False)
    (tmp_path / "a.json").write_bytes((content).encode(encoding))
    assert read_annotations(str(tmp_path / "a.json"), images).category_names == ("cat", "dog")


def test_without_orjson(images, tmp_path, monkeypatch):
    spec = write(tmp_path / "a.json", coco())
    read = read_annotations(spec, images)
    monkeypatch.setattr("vision_jax.data.annotation_formats.json_file.orjson", None)
    assert read.image_ids == read_annotations(spec, images).image_ids


STATED = [
    "{images}/sub/c.jpg",
    "/home/somebody/coco/sub/c.jpg",
    "/home/somebody/c.jpg/sub/c.jpg",
    "C:\\data\\sub\\c.jpg",
    "\\\\server\\data\\sub\\c.jpg",
    "sub\\c.jpg",
    "../images/sub/c.jpg",
    "images/sub/c.jpg",
]


@pytest.mark.parametrize("stated", STATED)
def test_paths_that_mean_a_file_inside(stated, images, tmp_path):
    entry = {"id": 7, "file_name": stated.format(images=images), "width": 50, "height": 50}
    content = coco(images=[entry], annotations=[])
    (tmp_path / "annotations").mkdir()
    spec = write(tmp_path / "annotations/train.json", content)
    for folder in (images, None):
        read = read_annotations(spec, folder)
        assert read.paths == ("sub/c.jpg",)
        assert read.folder == images


def test_two_paths_that_would_mean_one_file(images, tmp_path):
    entries = [{"id": i, "file_name": f"/x/{part}/a.jpg"} for i, part in enumerate(("tr", "te"))]
    spec = write(tmp_path / "a.json", coco(images=entries, annotations=[]))
    assert "'/x/tr/a.jpg' and '/x/te/a.jpg' would both be 'a.jpg'" in refused(spec, images)


@pytest.mark.parametrize(
    ("declared", "written", "label"),
    [
        ("gb2312", "gb2312", "猫"),
        ("gb2312", "gb18030", "镕€"),  # what Windows writes under this name
        ("GBK", "gbk", "猫"),
        ("shift_jis", "shift_jis", "猫〜表"),
        ("Shift_JIS", "cp932", "猫①"),
        ("euc-kr", "euc_kr", "고양이"),
        ("euc-jp", "euc_jp", "猫"),
        ("big5", "big5", "貓"),
        ("utf-16", "utf-16", "猫"),
        ("UTF-16", "utf-8", "猫"),  # .NET's StringWriter says so
        ("utf-8", "utf-8-sig", "猫"),
        ("windows-1251", "cp1251", "кот"),
    ],
)
def test_encodings_of_xml(declared, written, label, voc):
    text = f'<?xml version="1.0" encoding="{declared}"?>\n'
    text += xml("a.jpg", (40, 60), (label, 2, 3, 12.5, 13, 0))
    (voc / "Annotations/a.xml").write_bytes(text.encode(written))
    assert label in read_annotations(str(voc)).category_names
    one = read_annotations(str(voc / "Annotations/a.xml"), voc / "JPEGImages")
    assert one.category_names == (label,)
    assert one.boxes_xywh_px.tolist() == [[1, 2, 11.5, 11]]


def test_encodings_of_xml_refused(voc):
    head = '<?xml version="1.0" encoding="{}"?>'
    text = xml("a.jpg", (40, 60), ("x", 2, 3, 12, 13, 0))
    for encoding in ("idna", "zlib", "hex", "nope", "undefined"):
        (voc / "Annotations/a.xml").write_text(head.format(encoding) + text)
        assert "a.xml: not readable as XML" in refused(str(voc))
    (voc / "Annotations/a.xml").write_bytes(head.format("gb2312").encode() + b"<a>\xff\xff</a>")
    assert "a.xml: not readable as XML" in refused(str(voc))
    bomb = head.format("gb2312").encode() + BAD_XML["bomb"].split("?>", 1)[1].encode("gb2312")
    (voc / "Annotations/a.xml").write_bytes(bomb)
    assert "DOCTYPE" in refused(str(voc))
    (voc / "Annotations/a.xml").write_text("<annotations><image name='a.jpg'/></annotations>")
    assert "its root is <annotations> and not <annotation>" in refused(str(voc))


def test_names_of_voc(voc):
    """Capital suffixes, spaces in names, images found by `filename` wherever it was written."""
    (voc / "Annotations/a.xml").rename(voc / "Annotations/a.XML")
    (voc / "Annotations/b.xml").rename(voc / "Annotations/label 1.xml")
    (voc / "JPEGImages/b.png").rename(voc / "JPEGImages/x.png")
    read = read_annotations(str(voc))
    assert dict(zip(read.image_ids, read.paths, strict=True)) == {
        "a": "a.jpg",
        "label 1": "x.png",
        "sub/c": "sub/c.jpg",
    }
    listed = write(voc / "ImageSets/Main/train.txt", "label 1\nsub/c -1\n")
    assert read_annotations(listed).paths == ("x.png", "sub/c.jpg")
    listed = write(voc / "ImageSets/Main/train.txt", "label 1 1\n")
    assert read_annotations(listed).paths == ("x.png",)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("names: {'0': ant, '1': bee}", ("ant", "bee")),
        ("names:\n  1: bee\n  '0': ant", ("ant", "bee")),
        ("nc: 2\nnames: [ant, bee]", ("ant", "bee")),
        ("nc: 2", ("class_0", "class_1")),
        ("names: [0, 1.5]", ("0", "1.5")),
        ("\ufeffnames: [ant, bee]", ("ant", "bee")),
    ],
)
def test_names_of_yolo(names, expected, yolo):
    folder, _ = yolo
    write(folder / "data.yaml", f"{names}\ntrain: images")
    assert read_annotations(f"{folder}/data.yaml").category_names == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: {'0': a, 0: b}", "`names` is no list"),
        ("names: {'0': a, '2': b}", "`names` is no list"),
        ("nc: 3\nnames: [a, b]", "`nc` is 3 and `names` has 2"),
        ("nc: 100001", "`names` is no list"),
        ("names: [a, b]\nkpt_shape: [17]", "kpt_shape"),
    ],
)
def test_names_of_yolo_refused(text, message, yolo):
    folder, _ = yolo
    write(folder / "data.yaml", f"{text}\ntrain: images")
    assert message in refused(f"{folder}/data.yaml")


@pytest.mark.parametrize(
    "places",
    [
        "path: /content/set\ntrain: images",
        "path: ../datasets/set\ntrain: images",
        "train: {folder}/images",
        "path: {folder}\ntrain: images/",
        "train: ../../images",
        "train: .\\images\\",
        "train: list.txt",
        "path: set\ntrain: [list.txt]",
    ],
)
def test_places_of_yolo(places, yolo):
    folder, boxes = yolo
    lines = ["./images/a.jpg", "/mnt/set/images/b.png", "data\\images\\sub\\c.jpg"]
    (folder / "list.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    write(folder / "data.yaml", places.format(folder=folder) + "\nnames: [cat, dog]")
    read = read_annotations(f"{folder}/data.yaml")
    assert set(read.paths) == {f"images/{name}" for name in SIZES}
    np.testing.assert_allclose(read.boxes_xywh_px, boxes, atol=1e-12)


def test_an_absent_split_is_not_another(yolo):
    """images/ of nothing but train/ must not be taken for /x/val/images."""
    folder, _ = yolo
    for place in ("/x/val/images", "../val/images", "C:\\x\\val\\images"):
        write(folder / "data.yaml", f"train: images\nval: {place}\nnames: [cat, dog]")
        assert "is not in" in refused(f"{folder}/data.yaml:val")


def test_polygons_and_keypoints_of_yolo(yolo):
    """A segment's row is the box around it, as Ultralytics trains; kpt_shape tells what follows."""
    folder, _ = yolo
    (folder / "labels/a.txt").unlink()
    write(folder / "labels/sub/c.txt", "1 .1 .2 .5 .2 .5 .6\n0 0.2 0.2 0.4 0.2 0.4 0.3 0.2 0.3\n")
    for spec in (folder, folder / "data.yaml"):
        read = read_annotations(str(spec))
        np.testing.assert_allclose(read.boxes_xywh_px, [[5, 10, 20, 20], [10, 10, 10, 5]])
        assert read.box_category.tolist() == [1, 0]
    write(folder / "labels/sub/c.txt", "1 .5 .5 .2 .4 .1 .1 2 .3 .3 0\n")
    write(folder / "data.yaml", "train: images\nnames: [cat, dog]\nkpt_shape: [2, 3]")
    read = read_annotations(f"{folder}/data.yaml")
    np.testing.assert_allclose(read.boxes_xywh_px, [[20, 15, 10, 20]])


def test_yolo_of_cvat(images, tmp_path):
    """obj_train_data/ with labels beside images, obj.names and a list beside the folder."""
    images.rename(tmp_path / "obj_train_data")
    write(tmp_path / "obj_train_data/a.txt", "1 0.5 0.5 0.2 0.2\n")
    write(tmp_path / "obj.names", "cat\ndog\n")
    write(tmp_path / "train.txt", "data/obj_train_data/a.jpg\n")
    write(tmp_path / "README.roboflow.txt", "Any words that one likes to add\n")
    read = read_annotations(str(tmp_path))
    assert {p for p in read.paths if p != "outside.jpg"} == {f"obj_train_data/{n}" for n in SIZES}
    assert read.category_names == ("cat", "dog")
    assert read.box_category.tolist() == [1]


def test_roots_of_splits(yolo, images):
    """A part's folder is named; two splits are never read as one set."""
    folder, _ = yolo
    for split in ("train", "val"):
        (folder / "images" / split).mkdir()
        (folder / "labels" / split).mkdir()
        write(folder / f"labels/{split}/1.txt", "0 .5 .5 .1 .1")
        Image.new("RGB", (8, 8)).save(folder / f"images/{split}/1.png")
    for name in ("a.txt", "sub/c.txt"):
        (folder / "labels" / name).unlink()
    assert f"give {folder}/data.yaml:train" in refused(str(folder))
    (folder / "data.yaml").unlink()
    message = refused(str(folder))
    assert f"give one of {folder}/images/train, {folder}/images/val" in message
    assert read_annotations(f"{folder}/images/val").paths == ("1.png",)
    with pytest.raises(UserError, match="holds the splits train, val"):  # the doctor says the same
        examine(str(folder))
    for split in ("train", "valid"):  # Roboflow's YOLO without its data.yaml
        (folder / "flow" / split).mkdir(parents=True)
        shutil.copytree(folder / "images/train", folder / f"flow/{split}/images")
        shutil.copytree(folder / "labels/train", folder / f"flow/{split}/labels")
    write(folder / "flow/README.dataset.txt", "words")
    assert f"give one of {folder}/flow/train, {folder}/flow/valid" in refused(str(folder / "flow"))
    assert read_annotations(str(folder / "flow/valid")).paths == ("1.png",)
    for split in ("train", "valid"):  # Roboflow's COCO
        (folder / "set" / split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / f"set/{split}/1.png")
        entries = [{"id": 1, "file_name": "1.png"}]
        content = coco(images=entries, annotations=[])
        write(folder / f"set/{split}/_annotations.coco.json", content)
    assert f"{folder}/set/train" in refused(str(folder / "set"))
    assert read_annotations(str(folder / "set/valid")).paths == ("1.png",)
    (folder / "coco/annotations").mkdir(parents=True)
    write(folder / "coco/annotations/instances_train.json", coco())
    message = refused(str(folder / "coco"))
    assert f"give one of {folder}/coco/annotations/instances_train.json" in message


TFDS_PROGRAM = """
import io, pickle, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from vision_jax.data.annotations import read_annotations
from vision_jax.errors import UserError

def png(i):
    file = io.BytesIO()
    Image.new("RGB", (64, 32), (i, 0, 0)).save(file, "png")
    file.seek(0)
    return file

class TinyBoxes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        objects = {"bbox": tfds.features.BBoxFeature(), "is_crowd": np.bool_, "area": np.int64,
                   "label": tfds.features.ClassLabel(names=["cat", "dog"])}
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "image/id": np.int64,
                    "objects": tfds.features.Sequence(objects)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        def objects(i):
            box = tfds.features.BBox(ymin=0.25, xmin=0.5, ymax=0.75, xmax=1.0)
            return [{"bbox": box, "is_crowd": k == 1, "area": 10 + k, "label": k % 2}
                    for k in range(i)]
        return {"train": ((i, {"image": png(i), "image/id": 50 + i, "objects": objects(i)})
                          for i in range(4))}

    def _generate_examples(self):
        pass

folder = sys.argv[1]
TinyBoxes(data_dir=folder, file_format="array_record").download_and_prepare()
read = pickle.loads(pickle.dumps(read_annotations(f"tfds:tiny_boxes/train@{folder}")))
assert sorted(read.image_ids) == [50, 51, 52, 53]
assert read.sizes.tolist() == [[32, 64]] * 4
assert read.boxes_xywh_px.tolist() == [[32, 8, 32, 16]] * 6
counts = np.bincount(read.box_image, minlength=4)
assert {i: counts[k] for k, i in enumerate(read.image_ids)} == {50: 0, 51: 1, 52: 2, 53: 3}
assert read.category_names == ("cat", "dog") and read.category_ids == (0, 1)
assert read.crowd.sum() == 2 and sorted(read.area) == [10, 10, 10, 11, 11, 12]
values = [int(read.reader.read(k)[0, 0, 0]) + 50 for k in range(4)]
assert tuple(values) == read.image_ids
assert read.place(0).endswith("objects[0]")

from vision_jax.doctor.examine import examine
_, findings = examine(f"tfds:tiny_boxes/train@{folder}")
found = {f.code: f.count for f in findings if f.level != "information"}
assert found == {"repeated-box": 1}, found
assert "tensorflow" not in sys.modules
"""


@pytest.mark.long
def test_tfds_without_tensorflow(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    command = [sys.executable, "-c", TFDS_PROGRAM, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


# --- broken and hostile files -------------------------------------------------------------------


def box(**changes) -> dict:
    return {"id": 5, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4]} | changes


BAD_BOXES = {
    "nan": (box(bbox=[1, 2, float("nan"), 4]), "4 finite numbers"),
    "inf": (box(bbox=[1, 2, float("inf"), 4]), "4 finite numbers"),
    "bool": (box(bbox=[1, 2, True, 4]), "4 finite numbers"),
    "text": (box(bbox=["1", "2", "3", "4"]), "4 finite numbers"),
    "three": (box(bbox=[1, 2, 3]), "4 finite numbers"),
    "nested": (box(bbox=[[1], 2, 3, 4]), "4 finite numbers"),
    "null": (box(bbox=None), "4 finite numbers"),
    "huge": (box(bbox=[1, 2, 10**400, 4]), "4 finite numbers"),
    "object": (box(bbox={"x": 1}), "4 finite numbers"),
    "area": (box(area="12"), "area '12'"),
    "area nan": (box(area=float("nan")), "area nan"),
    "crowd": (box(iscrowd=2), "iscrowd 2"),
    "crowd list": (box(iscrowd=[0]), "iscrowd"),
    "image": (box(image_id=1234), "image_id 1234 is not in `images`"),
    "image text": (box(image_id="7"), "image_id '7' is not in `images`"),
    "image bool": (box(image_id=True), "image_id True: give a number or text"),
    "image list": (box(image_id=[7]), "image_id"),
    "image missing": ({"category_id": 3, "bbox": [1, 2, 3, 4]}, "image_id None"),
    "category": (box(category_id=4), "category_id 4 is not in `categories`"),
    "category bool": (box(category_id=True), "category_id True"),
    "category dict": (box(category_id={}), "category_id {}"),
    "no object": ([1, 2, 3, 4], "is no object"),
}


@pytest.mark.parametrize("case", BAD_BOXES)
def test_bad_boxes(case, images, tmp_path):
    entry, text = BAD_BOXES[case]
    spec = write(tmp_path / "bad.json", coco(annotations=[box(id=1), entry]))
    message = refused(spec, images)
    assert text in message
    assert f"{spec}: annotations[1]: " in message
    assert "annotations[0]" not in message


def test_many_problems_are_counted(images, tmp_path):
    entries = [box(id=i, bbox=None) if i % 2 else box(id=i) for i in range(5000)]
    spec = write(tmp_path / "bad.json", coco(annotations=entries))
    message = refused(spec, images)
    assert message.count("annotations[") == 3
    assert "and 2,497 more problems" in message
    annotations, problems = examine_annotations(spec, images)
    assert len(annotations.box_image) == len(problems) == 2500
    assert {p.kind for p in problems} == {"entry"}


def image(**changes) -> dict:
    return {"id": 1, "file_name": "a.jpg", "width": 60, "height": 40} | changes


BAD_IMAGES = {
    "twice": ([image(), image(file_name="b.png")], "id 1 is given twice"),
    "no id": ([{"file_name": "a.jpg"}], "id None: give a number or text"),
    "id bool": ([image(id=False)], "id False"),
    "no name": ([{"id": 1}], "file_name None"),
    "name number": ([image(file_name=3)], "file_name 3"),
    "name empty": ([image(file_name="")], "file_name ''"),
    "name null byte": ([image(file_name="a\0.jpg")], "file_name"),
    "absolute": ([image(file_name="/etc/passwd")], "without `..`"),
    "above": ([image(file_name="../outside.jpg")], "without `..`"),
    "above inside": ([image(file_name="sub/../../outside.jpg")], "without `..`"),
    "above, Windows": ([image(file_name="..\\outside.jpg")], "without `..`"),
    "link": ([image(file_name="link.jpg")], "leads out of"),
    "linked folder": ([image(file_name="up/outside.jpg")], "leads out of"),
    "circle": ([image(file_name="circle/a.jpg")], "no such file|leads out of"),
    "long": ([image(file_name="x" * 5000)], "no such file"),
    "missing": ([image(file_name="nope.jpg")], "'nope.jpg': no such file in"),
    "half a character": ([image(file_name="\ud800/a.jpg")], "give the image's path"),
    "folder": ([image(file_name="sub")], "no such file"),
    "line break": ([image(file_name="no\npe.jpg")], "no such file"),
    "width": ([image(width=-1)], "width -1, height 40: give whole numbers"),
    "width nan": ([image(width=float("nan"))], "width nan"),
    "width inf": ([image(width=float("inf"))], "width inf"),
    "width half": ([image(width=6.5)], "width 6.5"),
    "width bool": ([image(width=True)], "width True"),
    "width text": ([image(width="60")], "width '60'"),
    "width huge": ([image(width=10**30)], r"width 1(000|e\+30)"),
    "no object": ([None], "None is no object"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(case, images, tmp_path):
    (images / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (images / "up").symlink_to(tmp_path)
    (images / "circle").symlink_to(images / "circle")
    (images / "good.jpg").symlink_to(images / "a.jpg")
    entries, text = BAD_IMAGES[case]
    content = coco(images=[image(id=0, file_name="good.jpg"), *entries], annotations=[])
    message = refused(write(tmp_path / "bad.json", content), images)
    assert re.search(text, message)
    assert f"bad.json: images[{len(entries)}]: " in message


BAD_CATEGORIES = {
    "twice": ([{"id": 3, "name": "a"}, {"id": 3, "name": "b"}], "id 3 is given twice"),
    "no name": ([{"id": 3}], "needs `id`"),
    "half a character": ([{"id": 3, "name": "\ud800"}], "needs `id`"),
    "blank": ([{"id": 3, "name": " "}], "needs `id`"),
    "no id": ([{"name": "a"}], "needs `id`"),
    "number": ([3], "3 is no object"),
    "no list": ({"3": "a"}, "`categories` is no list"),
}


@pytest.mark.parametrize("case", BAD_CATEGORIES)
def test_bad_categories(case, images, tmp_path):
    categories, text = BAD_CATEGORIES[case]
    spec = write(tmp_path / "bad.json", coco(categories=categories))
    assert text in refused(spec, images)


NO_ANNOTATIONS = {
    "empty": "",
    "text": "hello",
    "truncated": '{"images": [',
    "deep": "[" * 200_000,
    "deep and closed": "[" * 200_000 + "]" * 200_000,
    "deep objects": '{"images":' * 100_000,
    "number": "[1]",
    "nothing": "{}",
    "results": '[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]',
    "images no list": '{"images": {}, "annotations": []}',
    "annotations no list": '{"images": [], "annotations": 3}',
    "no images": '{"images": [], "annotations": [], "categories": []}',
    "long number": '{"images": [' + "9" * 10_000 + "]}",
    "surrogates": '{"images": ["\\ud800"], "annotations": []}',
    "binary": "\x00\x01\x02",
}


@pytest.mark.parametrize("case", NO_ANNOTATIONS)
def test_what_is_not_annotations(case, images, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(NO_ANNOTATIONS[case].encode("latin-1"))
    assert "bad.json" in refused(str(path), images)


def test_random_damage_never_gives_a_traceback(images, tmp_path, rng):
    """Bytes changed, removed and repeated: a right reading or one line."""
    data = json.dumps(coco()).encode()
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(damaged)))
            damaged[at : at + int(rng.integers(0, 3))] = rng.bytes(int(rng.integers(0, 3)))
        (tmp_path / "bad.json").write_bytes(damaged)
        message = ""
        try:
            read_annotations(str(tmp_path / "bad.json"), images)
        except UserError as error:
            message = str(error)
        assert "\n" not in message


def test_size_limits(images, tmp_path, monkeypatch):
    monkeypatch.setattr("vision_jax.data.annotation_formats.json_file.MAX_JSON_BYTES", 50)
    assert "over the limit of 50 bytes" in refused(write(tmp_path / "a.json", coco()), images)


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY e0 "ha">' + "".join(
    f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 11)
)
BAD_XML = {
    "bomb": BOMB + "]><annotation><filename>&e10;</filename></annotation>",
    "quadratic": f'<!DOCTYPE a [<!ENTITY e "{"x" * 50_000}">]><a>{"&e;" * 50_000}</a>',
    "external": '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><a><filename>&e;</filename></a>',
    "external DTD": '<!DOCTYPE a SYSTEM "http://localhost/x.dtd"><annotation/>',
    "truncated": "<annotation><object>",
    "deep": "<a>" * 100_000,
    "undefined entity": "<annotation><filename>&nope;</filename></annotation>",
    "odd encoding": '<?xml version="1.0" encoding="nope"?><annotation/>',
    "absolute": "<annotation><filename>/etc/passwd</filename></annotation>",
    "above": "<annotation><filename>../outside.jpg</filename></annotation>",
    "no file": "<annotation></annotation>",
}


@pytest.mark.parametrize("case", BAD_XML)
def test_bad_xml(case, voc):
    (voc / "Annotations/z.xml").write_text(BAD_XML[case])
    start = time.process_time()
    message = refused(str(voc))
    assert time.process_time() - start < 2
    assert "z.xml: " in message
    assert "root:" not in message  # of /etc/passwd
    if "DOCTYPE" in BAD_XML[case]:
        assert "DOCTYPE" in message


def test_an_entity_bomb_in_utf_16(voc):
    (voc / "Annotations/z.xml").write_bytes(BAD_XML["bomb"].encode("utf-16"))
    assert "DOCTYPE" in refused(str(voc))


@pytest.mark.parametrize("value", ["nan", "inf", "1_0", "", "x", "1e12"])
def test_bad_numbers_in_xml(value, voc):
    write(voc / "Annotations/b.xml", xml("b.png", (33, 21), ("cat", 1, 1, 5, value, 0)))
    assert "b.xml: object 1: needs `name`" in refused(str(voc))
    write(voc / "Annotations/b.xml", xml("b.png", (33, value or -1), ("cat", 1, 1, 5, 5, 0)))
    assert "b.xml: width" in refused(str(voc))


def test_bad_image_sets(voc):
    spec = write(voc / "ImageSets/Main/val.txt", "a\nnope\n../secret\na\n")
    message = refused(spec)
    assert "Annotations/nope.xml: can't be read" in message
    assert "../secret.xml: leads out of" in message
    assert "'a' is listed twice" in message


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("0 0.5 0.5 nan 0.1", "give `class cx cy w h`"),
        ("0 0.5 0.5 0.1", "give `class cx cy w h`"),
        ("0.5 0.5 0.5 0.1 0.1", "give `class cx cy w h`"),
        ("-1 0.5 0.5 0.1 0.1", "give `class cx cy w h`"),
        ("cat 0.5 0.5 0.1 0.1", "give `class cx cy w h`"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3", "a polygon beside boxes"),
        ("0 0.1 0.1 0.2 0.2 0.9", "a sixth, a confidence or an angle"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 2", "give `class cx cy w h`"),
        ("2 0.5 0.5 0.1 0.1", "category_id 2 is not in `categories`"),
    ],
)
def test_bad_yolo_rows(row, text, yolo):
    folder, _ = yolo
    write(folder / "labels/sub/c.txt", f"0 .5 .5 .1 .1\n{row}\n")
    message = refused(str(folder))
    assert f"{folder}/labels/sub/c.txt: line 2: " in message
    assert text in message


def test_bad_yolo_files(yolo):
    folder, _ = yolo
    write(folder / "labels/orphan.txt", "0 .5 .5 .1 .1")
    (folder / "labels/b.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "images/sub/c.jpg").write_bytes(b"no image")
    message = refused(str(folder))
    assert "labels/orphan.txt: labels without an image" in message
    assert "labels/b.txt: not a text file" in message
    assert "c.jpg" not in message  # training skips and counts damaged images of any format
    (folder / "labels/b.txt").unlink()
    (folder / "labels/b.txt").symlink_to("/etc/passwd")
    message = refused(str(folder))
    assert "labels/b.txt: leads out of" in message
    assert "root:" not in message


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("train: /etc", "is not in"),
        ("train: ../../..", "is not in"),
        (f"train: {'x' * 300}", "is not in"),  # too long for a file's name
        ("path: /etc\ntrain: .", "names"),
        ("path: ../..\ntrain: images\nnames: [a, b]", ""),  # found beside the file all the same
        ("train: images\nnames: 3", "`names` is no list"),
        ("train: images\nnames: {1: a, 2: b}", "`names` is no list"),
        ("train: [1]", "`train` names no folder"),
        ("{a: &a [*a]}", "not readable|names no folder"),
        ("train: !!python/object/apply:os.system [true]", "not readable as YAML"),
        ("[" * 3_000, "not readable as YAML"),
        ("- 1", "not a YOLO data set's YAML"),
        ("\t", "not readable as YAML"),
        ("train: list.txt\nnames: [a, b]", "without `..`"),
    ],
)
def test_bad_yaml(text, error, yolo):
    folder, _ = yolo
    write(folder / "list.txt", "/etc/passwd\n../outside.jpg\n")
    spec = write(folder / "data.yaml", text)
    if error:
        assert re.search(error, refused(spec))
    else:
        assert len(read_annotations(spec).paths) == 3


def test_nothing_to_read(tmp_path):
    assert "no such file or folder" in refused(str(tmp_path / "nope"))
    assert "no annotations" in refused("")
    message = refused(str(tmp_path))
    assert "Pascal VOC" in message
    assert "YOLO" in message
    assert "no such folder of images" in refused(write(tmp_path / "a.json", coco()), tmp_path / "x")
    fifo = tmp_path / "pipe.json"
    os.mkfifo(fifo)
    assert "no such file or folder" in refused(str(fifo))
