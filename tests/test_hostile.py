"""Damaged and hostile files by the dozen: each reader of outside files reads or raises UserError.

Sound files of each format are changed at random: bytes turned, cut and repeated; words replaced by
odd ones; values of JSON by others, by numbers without end, halves of characters and deep lists.
HOSTILE_FILES says how many files of each format are tried.
"""

import contextlib
import gzip
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from PIL import Image
from safetensors.numpy import load_file, save_file

from vision_jax.commands.convert import read_model
from vision_jax.config import load_config, save_config
from vision_jax.convert import arguments_of, export_weights, read_weights, recognize
from vision_jax.convert.peft import read_adapter, write_adapter
from vision_jax.data.decode import DamagedImageError
from vision_jax.data.detection import check_boxes, read_detection_source
from vision_jax.data.segmentation import read_segmentation_source
from vision_jax.data.sources import read_source, read_unlabelled
from vision_jax.data.teacher_cache import open_teacher_cache, write_teacher_cache
from vision_jax.data.transforms import Preprocessing
from vision_jax.data.volumes import source as volumes
from vision_jax.doctor.__main__ import main as doctor
from vision_jax.errors import UserError
from vision_jax.figures import _series
from vision_jax.logging import read_metrics
from vision_jax.models.families import RUN_ARGUMENTS
from vision_jax.models.families import build_model as build_architecture
from vision_jax.models.vit import build_vit
from vision_jax.run.description import Description, build_model, load_description, save_description
from vision_jax.trees import lora
from vision_jax.trees.paths import flatten

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's and NumPy's, of damaged files
FILES = int(os.environ.get("HOSTILE_FILES", "12"))
HALF = "\ue000"  # stands for half of a surrogate pair until the text is written
ODD_WORDS = (
    *("", "0", "-1", "1e400", "-0", "nan", "inf", "1" * 5000, "9223372036854775808", "0x10", "1_0"),
    *(
        "a\0b",
        "../../etc/passwd",
        "/etc/passwd",
        "~nobody/x",
        "$x^{$",
        "[red]",
        "\x1b[31m",
        "\u202e",
    ),
    *(
        "\ufeff",
        "x" * 70_000,
        "%s%n",
        "{0.__class__}",
        "true",
        "null",
        "*",
        "&a",
        "<",
        "]]>",
        "'",
        '"',
    ),
    *(",", ":", "\n", "\r", "a/../b", "C:\\x", "CON", ".", "..", "/", "𝔘", "é"),
)
ODD_VALUES = (
    *(None, True, -1, 0, 1, 2**31, 2**63 - 1, 0.5, 1e300, -1e-300, [], {}, [[]], [None], {"": 0}),
    *ODD_WORDS,
    HALF,
)
RAW = (
    "1e400",
    "-1e400",
    "NaN",
    "Infinity",
    "1" + "0" * 5000,
    "[" * 3000 + "]" * 3000,
    "1.0",
    "-0.0",
)


def turn_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """Some bytes changed, taken away, repeated, or all after one."""
    start, length = int(rng.integers(len(data) + 1)), int(2 ** rng.integers(0, 9))
    kind = rng.integers(5)
    if kind == 0:
        return data[:start]
    if kind == 1:
        return data[:start] + data[start + length :]
    if kind == 2:
        return data[: start + length] + data[start:]
    if kind == 3:
        return data[:start] + rng.bytes(length) + data[start + length :]
    changed = np.frombuffer(data, np.uint8).copy()
    changed[rng.integers(len(data), size=3)] ^= 1 << rng.integers(8, size=3).astype(np.uint8)
    return changed.tobytes()


def replace_words(rng: np.random.Generator, data: bytes) -> bytes:
    """A few words, numbers or separators replaced by odd ones."""
    text = data.decode()
    for _ in range(rng.integers(1, 4)):
        start = int(rng.integers(len(text) + 1))
        end = start + int(rng.integers(0, 12))
        text = text[:start] + str(rng.choice(np.array(ODD_WORDS, object))) + text[end:]
    return text.encode()


def replace_values(rng: np.random.Generator, data: bytes) -> bytes:
    """A few values of JSON replaced, taken away, renamed or put in two places."""
    content = json.loads(data)
    raws = []
    for _ in range(rng.integers(1, 4)):
        places = list(containers(content))
        if not places:
            break
        place = places[rng.integers(len(places))]
        key = list(place)[rng.integers(len(place))] if isinstance(place, dict) else 0
        key = int(rng.integers(len(place))) if isinstance(place, list) else key
        kind = rng.integers(6)
        if kind == 0:
            del place[key]
        elif kind == 1 and isinstance(place, dict):
            place[str(rng.choice(np.array(ODD_WORDS, object)))] = place.pop(key)
        elif kind == 2:
            raws.append(RAW[rng.integers(len(RAW))])
            place[key] = f"RAW{len(raws) - 1}RAW"
        elif kind == 3:
            other = places[rng.integers(len(places))]
            place[key] = json.loads(json.dumps(other))
        else:
            value = ODD_VALUES[rng.integers(len(ODD_VALUES))]
            place[key] = json.loads(json.dumps(value))
    text = json.dumps(content).replace(json.dumps(HALF)[1:-1], "\\ud800")
    for number, raw in enumerate(raws):
        text = text.replace(f'"RAW{number}RAW"', raw)
    return text.encode()


def containers(value) -> Iterator[dict | list]:
    if isinstance(value, dict | list) and value:
        yield value
        for below in value.values() if isinstance(value, dict) else value:
            yield from containers(below)


def attack(
    rng: np.random.Generator, path: Path, read: Callable[[], object], *changes: Callable
) -> None:
    """Reads the file as it is, and then changed in many ways; nothing but a UserError may come."""
    whole = path.read_bytes()
    read()
    for _ in range(FILES):
        change = changes[rng.integers(len(changes))]
        data = change(rng, whole)
        path.write_bytes(data)
        try:
            with contextlib.suppress(UserError):
                read()
        except BaseException:
            (path.parent.parent / f"culprit{path.suffix}").write_bytes(data)
            print(f"{change.__name__} of {path}: {data[:2000]!r}")
            raise
    path.write_bytes(whole)


# --- data sets ----------------------------------------------------------------------------------


def write_images(folder: Path, names: list[str], size=(24, 32)) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)


def train_on_boxes(spec: str, images: Path | None = None) -> None:
    source = read_detection_source(spec, images)
    check_boxes(source)
    for i in range(len(source)):
        try:
            source[i]
        except DamagedImageError:
            continue


def examine(*arguments: object) -> None:
    assert doctor([*map(str, arguments)]) in (0, 1, 2)


COCO = {
    "images": [
        {"id": i, "file_name": f"{i}.png", "width": 32, "height": 24, "license": 1}
        for i in range(3)
    ],
    "annotations": [
        {"id": i, "image_id": i % 3, "category_id": 1 + i % 2, "bbox": [1.5, 2, 10, 9 + i],
         "area": 90, "iscrowd": 0, "segmentation": [[1, 2, 3, 4, 5, 6]]}
        for i in range(5)
    ],
    "categories": [
        {"id": i, "name": name, "supercategory": "all"} for i, name in ((1, "ant"), (2, "bee"))
    ],
}  # fmt: skip
PLAIN = {
    "images": [
        {"file_name": f"{i}.png", "width": 32, "height": 24, "xmin": 1, "ymin": 2, "xmax": 9.5,
         "ymax": 12, "category_id": 1}
        for i in range(3)
    ]
}  # fmt: skip
VOC = """<annotation><folder>x</folder><filename>a.png</filename><size><width>32</width><height>24
</height><depth>3</depth></size><object><name>ant</name><difficult>0</difficult><bndbox><xmin>1
</xmin><ymin>2</ymin><xmax>9</xmax><ymax>12</ymax></bndbox></object></annotation>"""


@pytest.mark.parametrize("content", [COCO, PLAIN], ids=["coco", "plain"])
def test_json_of_boxes(content, tmp_path, capsys, rng):
    path = tmp_path / "images/boxes.json"
    write_images(tmp_path / "images", ["0.png", "1.png", "2.png"])
    path.write_text(json.dumps(content))
    changes = (replace_values, replace_values, turn_bytes, replace_words)
    attack(rng, path, lambda: train_on_boxes(str(path)), *changes)
    attack(rng, path, lambda: examine(path), *changes)


def test_voc_and_yolo(tmp_path, capsys, rng):
    voc, yolo = tmp_path / "voc", tmp_path / "yolo"
    write_images(voc / "JPEGImages", ["a.png", "b.png"])
    (voc / "Annotations").mkdir()
    for name in "ab":
        (voc / f"Annotations/{name}.xml").write_text(VOC.replace("a.png", f"{name}.png"))
    changes = (replace_words, turn_bytes)
    path = voc / "Annotations/b.xml"
    attack(rng, path, lambda: train_on_boxes(str(voc)), *changes)
    attack(rng, path, lambda: examine(voc), *changes)
    write_images(yolo / "images", ["a.png", "b.png"])
    (yolo / "labels").mkdir()
    for name in "ab":
        (yolo / f"labels/{name}.txt").write_text("0 .5 .5 .25 .25\n1 .2 .3 .1 .1\n")
    data = "path: .\ntrain: images\nval: [images]\nnames: {0: ant, 1: bee}\nnc: 2\n"
    (yolo / "data.yaml").write_text(data)
    for path in (yolo / "labels/b.txt", yolo / "data.yaml"):
        attack(rng, path, lambda: train_on_boxes(f"{yolo / 'data.yaml'}:train"), *changes)
        attack(rng, path, lambda: examine(yolo), *changes)
    (yolo / "data.yaml").unlink()
    (yolo / "classes.txt").write_text("ant\nbee\n")
    attack(rng, yolo / "classes.txt", lambda: examine(yolo), *changes)
    (yolo / "list.txt").write_text("images/a.png\n./images/b.png\n")
    (yolo / "data.yaml").write_text(data.replace("train: images", "train: list.txt"))
    attack(rng, yolo / "list.txt", lambda: train_on_boxes(f"{yolo / 'data.yaml'}:train"), *changes)


def train_on_masks(spec: str, images: Path) -> None:
    source = read_segmentation_source(spec, images=images)
    for i in range(len(source)):
        try:
            source[i]
        except DamagedImageError:
            continue


def test_json_and_xml_of_regions(tmp_path, rng):
    """Masks as COCO, LabelMe, Label Studio and CVAT write them, whose values are odd ones."""
    images = tmp_path / "images"
    write_images(images, ["0.png", "1.png", "2.png"])
    runs = {"size": [24, 32], "counts": [100, 20, 648]}
    coco = json.loads(json.dumps(COCO))
    coco["annotations"][1]["segmentation"] = runs
    coco["annotations"][2]["segmentation"] = {
        "size": [24, 32],
        "counts": "S36b000000000000000000000000000000m8",
    }
    size = {"original_width": 32, "original_height": 24, "image_rotation": 0}
    points = [[10, 10], [50, 10], [50, 60]]
    tasks = [
        {
            "data": {"image": f"{i}.png"},
            "annotations": [
                {
                    "result": [
                        size
                        | {
                            "type": "polygonlabels",
                            "value": {"points": points, "polygonlabels": ["ant"]},
                        },
                        size
                        | {
                            "type": "rectanglelabels",
                            "value": {
                                **{"x": 1, "y": 2, "width": 3, "height": 4, "rotation": 5},
                                "rectanglelabels": ["bee"],
                            },
                        },
                    ]
                }
            ],
        }
        for i in range(2)
    ]
    shapes = [
        {"label": "ant", "points": points, "shape_type": "polygon"},
        {"label": "bee", "points": points[:2], "shape_type": "rectangle"},
        {"label": "bee", "points": points[:2], "shape_type": "circle"},
    ]
    labelme = {"shapes": shapes, "imagePath": "0.png", "imageHeight": 24, "imageWidth": 32}
    changes = (replace_values, replace_values, turn_bytes, replace_words)
    for name, content in (("coco", coco), ("tasks", tasks), ("labelme", labelme)):
        path = images / f"{name}.json"
        path.write_text(json.dumps(content))
        for _ in range(2):
            attack(rng, path, lambda path=path: train_on_masks(str(path), images), *changes)
    path = images / "cvat.xml"
    path.write_text(
        '<annotations><image name="0.png" width="32" height="24"><polygon label="ant" z_order="1"'
        ' points="1,2;20,3;4,15"/><mask label="bee" rle="3, 5, 7" top="1" left="2" width="5"'
        ' height="3"/><box label="bee" xtl="1" ytl="2" xbr="9" ybr="8" rotation="30.5"/></image>'
        "</annotations>"
    )
    attack(rng, path, lambda: train_on_masks(str(path), images), replace_words, turn_bytes)


@pytest.mark.parametrize("kind", ["nii", "nii.gz", "nrrd", "dcm", "tif"])
def test_volumes(kind, tmp_path, rng, monkeypatch):
    """Headers and voxels of medical files, of which a byte is turned, cut away or repeated."""
    nibabel, pydicom = pytest.importorskip("nibabel"), pytest.importorskip("pydicom")
    tifffile, nrrd = pytest.importorskip("tifffile"), pytest.importorskip("nrrd")
    voxels = rng.integers(0, 2, (6, 5, 4)).astype(np.uint8)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / f"a.{kind}"
        if kind == "tif":
            tifffile.imwrite(path, voxels, photometric="minisblack", compression="deflate")
        elif kind == "nrrd":
            place = {"space": "lps", "space directions": np.diag([2.0, 2.0, 3.0])}
            nrrd.write(str(path), voxels, header=place | {"space origin": np.zeros(3)})
        elif kind == "dcm":
            shutil.copy(Path(pydicom.__file__).parent / "data/test_files/MR_small_RLE.dcm", path)
        else:
            nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0])), path)
    names = {str(i): "ant" for i in range(4000)} if kind == "dcm" else {"0": "ant", "1": "bee"}
    (tmp_path / "classes.json").write_text(json.dumps(names))

    def read():
        monkeypatch.setattr(volumes, "_CACHE", volumes._Cache(2**28))
        source = read_segmentation_source(f"volumes:{tmp_path}?window=0:2")
        for i in range(min(len(source), 8)):
            with contextlib.suppress(DamagedImageError):
                source[i]

    def in_header(rng, data):
        """A few bytes of the header, which says the sizes."""
        packed = kind == "nii.gz"
        changed = np.frombuffer(gzip.decompress(data) if packed else data, np.uint8).copy()
        places = rng.integers(min(len(changed), 1500 if kind == "dcm" else 352), size=3)
        changed[places] = rng.integers(0, 256, 3)
        return gzip.compress(changed.tobytes()) if packed else changed.tobytes()

    for folder in ("images", "masks"):
        attack(rng, tmp_path / folder / f"a.{kind}", read, in_header, in_header, turn_bytes)


def test_lists_and_arrays_of_classes(tmp_path, capsys, rng):
    names = [f"{kind}/{i}.png" for kind in ("ant", "bee") for i in range(2)]
    write_images(tmp_path, names)
    rows = [(name, name.partition("/")[0]) for name in names]
    (tmp_path / "a.csv").write_text("path,label\n" + "".join(f"{p},{c}\n" for p, c in rows))
    lines = [json.dumps({"path": p, "label": c}) for p, c in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")

    def a_line(rng, data):
        lines = data.splitlines()
        number = rng.integers(len(lines))
        lines[number] = replace_values(rng, lines[number])
        return b"\n".join(lines)

    def read(spec):
        source = read_source(spec)
        for i in range(len(source)):
            source[i]

    for name, changes in (("a.csv", ()), ("a.jsonl", (a_line, a_line))):
        spec = str(tmp_path / name)
        attack(rng, Path(spec), lambda spec=spec: read(spec), replace_words, turn_bytes, *changes)
        attack(
            rng, Path(spec), lambda spec=spec: examine(spec), replace_words, turn_bytes, *changes
        )

    arrays = {"train_images": np.zeros((4, 8, 8, 3), np.uint8), "train_labels": np.arange(4) % 2}
    np.savez(tmp_path / "cifar10.npz", **arrays, class_names=np.array(["a", "b"]))
    spec = f"cifar10:{tmp_path}/train"
    attack(rng, tmp_path / "cifar10.npz", lambda: read(spec), turn_bytes, rewrite_arrays)
    attack(rng, tmp_path / "cifar10.npz", lambda: examine(spec), turn_bytes, rewrite_arrays)


def test_shards(tmp_path, rng):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = []
    for i in range(8):
        file = io.BytesIO()
        Image.new("RGB", (6, 5), (i, 0, 0)).save(file, "png")
        images.append(file.getvalue())

    def read(spec):
        for source in (read_source(spec), read_unlabelled(spec)):
            for i in range(len(source)):
                with contextlib.suppress(DamagedImageError):
                    source[i]

    path = tmp_path / "a.tar"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(path, "w", format=form) as tar:
            for i, image in enumerate(images):
                long = "x" * 120 * (i == 3)
                for name, data in ((f"{long}{i}.png", image), (f"{long}{i}.json", b'{"label":1}')):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        attack(rng, path, lambda: read(str(path)), turn_bytes, turn_bytes)
        attack(rng, path, lambda: examine(path), turn_bytes)
    table = {"image": [{"bytes": image, "path": ""} for image in images], "label": list("abababab")}
    path = tmp_path / "a.parquet"
    for compression in ("none", "snappy"):
        pq.write_table(pa.table(table), path, row_group_size=3, compression=compression)
        attack(rng, path, lambda: read(str(path)), turn_bytes, turn_bytes)
        attack(rng, path, lambda: examine(path), turn_bytes)


def rewrite_arrays(rng, data):
    """A header of NumPy that says something else, in an archive that is whole."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = old.namelist()[rng.integers(len(old.namelist()))]
        for name in old.namelist():
            part = old.read(name)
            if name == chosen:
                head, rest = part[:10], part[10:]
                words = ((b"3", b"-3"), (b"8", b"9" * 30), (b"4,", b"4," * 60), (b"<", b">"))
                words += ((b"|u1", b"|O"), (b"False", b"True"), (b"'shape'", b"'x'"), (b"2", b"0"))
                before, after = words[rng.integers(len(words))]
                part = head + rest.replace(before, after, 1)
            new.writestr(name, part)
    return out.getvalue()


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tiff", "npy"])
def test_images_of_classes(suffix, tmp_path, capsys, rng):
    write_images(tmp_path, ["ant/0.png", "bee/1.png"])
    path = tmp_path / f"ant/x.{suffix}"
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    np.save(path, image) if suffix == "npy" else Image.fromarray(image).save(path)
    attack(rng, path, lambda: examine(tmp_path), turn_bytes)


def tiny_vit():
    size = {"width": 32, "depth": 1, "num_heads": 2, "mlp_width": 64, "patch_size": 8}
    return build_vit(**size, image_size=(16, 16), num_classes=3)


# --- models and runs ----------------------------------------------------------------------------


def header_of(data: bytes) -> tuple[bytes, bytes]:
    start = 8 + int.from_bytes(data[:8], "little")
    return data[8:start], data[start:]


def rewrite_header(rng, data):
    """Another header of safetensors, whose length is right."""
    header, rest = header_of(data)
    content = json.loads(header)
    own = content.get("__metadata__", {}).get("vision_jax")
    if own and rng.integers(2):
        content["__metadata__"]["vision_jax"] = replace_values(rng, own.encode()).decode()
        header = json.dumps(content).encode()
    else:
        header = replace_values(rng, header)
    return len(header).to_bytes(8, "little") + header + rest


def test_weights(tmp_path, rng):
    weights = tmp_path / "in/weights.safetensors"
    weights.parent.mkdir()
    runs.write_weights(weights)

    def read(source):
        model = read_model(str(source), False, None)
        next(iter(model.params.values()))  # reads one tensor

    attack(rng, weights, lambda: read(weights), rewrite_header, rewrite_header, turn_bytes)
    np.savez(tmp_path / "in/weights.npz", **load_file(weights))
    archive = tmp_path / "in/weights.npz"
    attack(
        rng, archive, lambda: dict(read_weights(str(archive)).tensors), turn_bytes, rewrite_arrays
    )


def test_folders_of_weights(tmp_path, rng):
    """Tensors alone, and what timm or transformers write beside them."""
    folder = tmp_path / "folder"
    folder.mkdir()
    runs.write_weights(folder / "model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors")
    timm = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "model_args": {"num_heads": 2, "patch_size": 8},
        "label_names": ["a", "b", "c"],
        "pretrained_cfg": {
            "input_size": [3, 16, 16], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
            "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic", "num_classes": 3,
        },
    }  # fmt: skip
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_normalize": True,
        "size": {"height": 16, "width": 16}, "resample": 2, "do_rescale": True,
        "rescale_factor": 0.00392156862745098, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    config = folder / "config.json"
    config.write_text(json.dumps(timm))
    changes = (replace_values, replace_values, replace_values, turn_bytes)
    attack(rng, config, lambda: read_model(str(folder), False, None), *changes)
    timm.pop("pretrained_cfg")
    config.write_text(json.dumps(timm))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    path = folder / "preprocessor_config.json"
    attack(rng, path, lambda: read_model(str(folder), False, None), *changes)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}} | index))
    attack(rng, path, lambda: read_weights(str(folder)), *changes)


def test_configs_of_detectors(tmp_path, rng):
    """What no tensor shows: torchvision's builder and its arguments."""
    sizes = {"depths": (1,) * 4, "widths": (8,) * 4, "block": "basic", "stem_width": 8, "width": 8}
    model = build_architecture("faster_rcnn", num_classes=3, **sizes, head_width=16)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    flat = {path: x for tree in like.values() for path, x in flatten(tree).items()}
    flat = {path: np.zeros(x.shape, x.dtype) for path, x in flat.items()}
    tensors, _ = export_weights(flat, "faster_rcnn", arguments_of(model), to="torchvision")
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    given = {
        "num_classes": 4, "weights_backbone": None, "min_size": [320, 640], "max_size": 640,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rpn_post_nms_top_n_test": 50,
        "rpn_score_thresh": 0.1,
    }  # fmt: skip
    config = {
        "library": "torchvision", "model": "fasterrcnn_resnet50_fpn", "kwargs": given,
        "norm_eps": 0.0, "weights": "COCO_V1", "class_names": ["a", "b", "c"],
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(config))

    def read():
        family, arguments = recognize(read_weights(str(folder)))
        build_architecture(family, **arguments)

    attack(rng, path, read, replace_values, replace_values, replace_values, turn_bytes)


def test_adapters(tmp_path, rng):
    model = {"family": "vit", "arguments": arguments_of(tiny_vit())}
    kernel = jnp.ones((32, 64))
    params = {"block_0": {"mlp": {"fc1": {"kernel": kernel, "bias": jnp.ones(64)}}}}
    adapted = lora.attach(
        params, ["block_0/mlp/fc1/kernel"], key=jax.random.key(0), rank=2, alpha=3.0
    )
    write_adapter(tmp_path / "a", adapted, base_model_name="x", naming="timm", **model)
    config = tmp_path / "a/adapter_config.json"
    content = json.loads(config.read_text()) | {
        "rank_pattern": {"fc1": 2},
        "alpha_pattern": {"x": 1},
    }
    config.write_text(json.dumps(content))
    tensors = tmp_path / "a/adapter_model.safetensors"

    def read():
        read_adapter(tmp_path / "a", params, **model)

    attack(rng, config, read, replace_values, replace_values, turn_bytes)
    attack(rng, tensors, read, rewrite_header, rewrite_header, turn_bytes)


def test_files_of_a_run(tmp_path, rng):
    config = runs.tiny_config()
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/config.json"
    save_config(config, path)
    changes = (replace_values, replace_values, turn_bytes)
    attack(rng, path, lambda: load_config(str(path), {}), *changes)
    model = tmp_path / "run/model.json"
    preprocessing = {
        "image_size": (16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0,
        "interpolation": "bicubic", "crop_mode": "center",
    }  # fmt: skip
    own = arguments_of(tiny_vit()).items()
    arguments = {name: value for name, value in own if name not in RUN_ARGUMENTS}
    description = Description(
        "classification", "vit", arguments, Preprocessing(**preprocessing), ("a", "b", "c"), "", ""
    )
    save_description(description, model)

    def rebuild():
        build_model(config, load_description(model))

    attack(rng, model, rebuild, *changes)
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_text(
        "".join(f'{{"step": {i}, "train/loss": 0.5, "time": 1.0}}\n' for i in range(5))
    )
    attack(
        rng,
        metrics,
        lambda: _series(read_metrics(metrics), "train/loss"),
        replace_words,
        turn_bytes,
    )


def test_stored_teachers(tmp_path, rng):
    path = tmp_path / "a/teacher.array_record"
    path.parent.mkdir()
    identity = {"teacher": "ab" * 32, "preprocessing": {"mean": [0.5, 0.5]}}
    arrays = {"values": np.ones((6, 3), np.float16), "classes": np.ones((6, 3), np.int32)}
    write_teacher_cache(path, [arrays], identity)
    attack(rng, path, lambda: open_teacher_cache(path, identity).read(range(6)), turn_bytes)
