import hashlib
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.folders import list_files
from vision_jax.data.sources import (
    ASSETS,
    hold_out,
    read_source,
    read_unlabelled,
    split_source,
    subset,
)
from vision_jax.errors import UserError


def write_image(path, value: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (value, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path):
    """cat: 3 images, dog: 2, one of them in a deeper folder; and things to ignore."""
    for value, name in enumerate(
        ["cat/1.png", "cat/2.PNG", "cat/3.bmp", "dog/a/1.png", "dog/2.png"]
    ):
        write_image(tmp_path / name, value)
    for name in ("cat/notes.txt", "cat/.hidden.png", "dog/.cache/1.png", "README.md"):
        write_image(tmp_path / "1.png")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / "1.png").replace(tmp_path / name)
    (tmp_path / ".git").mkdir()
    return tmp_path


def test_embedded_fashion_mnist():
    for split, count in (("train", 4000), ("test", 1000)):
        source = read_source(f"embedded:fashion_mnist/{split}")
        assert len(source) == count
        assert np.bincount(source.labels).tolist() == [count // 10] * 10
        assert source.class_names[9] == "ankle boot"
        example = source[17]
        assert example["image"].shape == (28, 28, 3)
        assert example["image"].dtype == np.uint8
        assert (example["image"] == example["image"][..., :1]).all()
        assert example["label"] == source.labels[17]
        assert example["label"].dtype == source.labels.dtype == np.int32
        assert example["index"] == 17
    # The first image of the official training split is an ankle boot whose pixels sum to 76247.
    first = read_source("embedded:fashion_mnist/train")[0]
    assert first["label"] == 9
    assert first["image"][..., 0].astype(int).sum() == 76247


def test_embedded_files_are_listed_with_their_checksum():
    table = (ASSETS / "README.md").read_text()
    digest = hashlib.sha256((ASSETS / "fashion_mnist.npz").read_bytes()).hexdigest()
    assert digest in table
    assert "MIT" in table


def test_cifar10(tmp_path, rng):
    images = rng.integers(0, 256, (6, 32, 32, 3), np.uint8)
    arrays = {"class_names": np.array(["a", "b"])}
    for split, part in (("train", images[:4]), ("test", images[4:])):
        arrays |= {f"{split}_images": part, f"{split}_labels": np.arange(len(part)) % 2}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    source = read_source(f"cifar10:{tmp_path}/test", class_names=("b", "x", "a"))
    assert np.array_equal(source[1]["image"], images[5])
    assert source.labels.tolist() == [2, 0]
    with pytest.raises(UserError, match="use one of cifar10/train, cifar10/test"):
        read_source(f"cifar10:{tmp_path}/valid")
    with pytest.raises(UserError, match=r"fetch_cifar10\.py"):
        read_source(f"cifar10:{tmp_path}/nowhere/train")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train_images", np.zeros((4, 8, 8), np.float32), r"float32\[4, 8, 8\]: give uint8"),
        ("train_images", np.zeros((4, 8, 8, 1), np.uint8), r"uint8\[4, 8, 8, 1\]: give uint8"),
        ("train_images", np.zeros((4, 8), np.uint8), r"uint8\[4, 8\]: give uint8"),
        ("train_images", np.zeros((0, 8, 8), np.uint8), "holds no image"),
        ("train_labels", np.array(["0"] * 4), r"<U1\[4\]: give one whole number"),
        ("train_labels", np.zeros(3, int), "each of the 4 images"),
        ("train_labels", np.zeros((4, 1), int), "each of the 4 images"),
        ("train_labels", np.array([0, 1, 2, 0]), "from 0 to 2, and there are 2"),
        ("train_labels", np.array([0, 1, -1, 0]), "from -1 to 1"),
        ("class_names", np.array([0, 1]), "give a list of texts"),
        ("class_names", np.array(["a", "a"]), "has a name twice"),
        ("class_names", np.array("ab"), "give a list of texts"),
        ("train_labels", None, "has no array `train_labels`"),
    ],
)
def test_arrays_of_another_kind(tmp_path, name, array, message):
    arrays = {
        "train_images": np.zeros((4, 8, 8, 3), np.uint8),
        "train_labels": np.array([0, 1, 1, 0]),
        "class_names": np.array(["a", "b"]),
        name: array,
    }
    np.savez(tmp_path / "cifar10.npz", **{n: a for n, a in arrays.items() if a is not None})
    with pytest.raises(UserError, match=rf"cifar10\.npz: .*{message}"):
        read_source(f"cifar10:{tmp_path}/train")


def test_folder(folder):
    source = read_source(str(folder))
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    values = [int(source[i]["image"][0, 0, 0]) for i in range(5)]
    assert values == [0, 1, 2, 4, 3]  # dog/2.png before dog/a/1.png
    assert source[0]["image"].shape == (3, 4, 3)
    assert "4 hidden files" in source.note
    assert source.example_name(4).endswith("dog/a/1.png")


def test_folder_labels_map_by_name(folder):
    source = read_source(str(folder), class_names=("ant", "dog", "cat"))
    assert source.labels.tolist() == [2, 2, 2, 1, 1]
    assert source.class_names == ("ant", "dog", "cat")
    with pytest.raises(UserError, match="class 'cat' is not among the 2 classes"):
        read_source(str(folder), class_names=("ant", "dog"))


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(UserError, match="no such folder or file"):
        read_source(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no class folders"):
        read_source(str(tmp_path))
    write_image(tmp_path / "cat" / "1.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(UserError, match="dog: no image in this class folder"):
        read_source(str(tmp_path))
    with pytest.raises(UserError, match="not a folder"):
        read_source(str(tmp_path / "cat" / "1.png"))


def tree(root, *paths):
    for path in paths:
        write_image(root / path)
    return root


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        (["train/ant/1.png", "train/bee/1.png", "val/ant/1.png", "val/bee/1.png"], "train"),
        (["Train/ant/1.png", "Valid/ant/1.png", "Test/ant/1.png"], "Train"),
        (["training/ant/1.png", "validation/ant/1.png"], "training"),
        (["train/ant/1.png", "train/bee/1.png", "test/1.png"], "train"),  # a test set unlabelled
        (["train/ant/1.png", "val/ant/1.png", "unlabeled/1.png"], "train"),
        (["train/ant/1.png", "meta/a.npy.txt"], "train"),
        (["seg_train/ant/1.png", "seg_test/ant/1.png"], "seg_train"),
        (["train/ant/images/1.png", "val/images/1.png"], "train"),  # tiny ImageNet
        (["val/ant/1.png", "test/ant/1.png"], "test"),
        (["test/ant/1.png", "test/bee/1.png"], "test"),
        (["data/ant/1.png", "data/bee/1.png"], "data"),  # one folder too many, from unpacking
        (["data/train/ant/1.png", "data/val/ant/1.png"], "data/train"),
    ],
)
def test_splits_are_no_classes(tmp_path, paths, named):
    """A data set's root is refused, with the name of the folder that is meant."""
    root = tmp_path / "root"
    for path in paths:
        if path.endswith(".txt"):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()
        else:
            tree(root, path)
    with pytest.raises(UserError, match=rf"use {root}/{named}( |$)"):
        read_source(str(root))


@pytest.mark.parametrize(
    "paths",
    [
        ["train/1.png", "test/1.png"],  # classes of such names hold images
        ["bus/a/1.png", "train/a/1.png", "tram/a/1.png"],
        ["test tube/a/1.png", "train station/a/1.png", "bus/1.png"],
        ["ant/left/1.png", "ant/right/1.png", "bee/1.png"],
        ["ant/1.png"],
        ["ant/old/1.png"],
    ],
)
def test_classes_named_as_splits(tmp_path, paths):
    source = read_source(str(tree(tmp_path / "root", *paths)))
    assert source.class_names == tuple(sorted({path.split("/")[0] for path in paths}))
    assert len(source) == len(paths)


def test_a_part_with_one_known_class_is_no_root(tmp_path):
    root = tree(tmp_path / "root", "ant/left/1.png", "ant/right/1.png")
    assert read_source(str(root), class_names=("ant", "bee")).labels.tolist() == [0, 0]


def test_links_are_followed_and_end(folder, tmp_path_factory):
    """As torchvision does, but for links that lead back up, which it follows for ever."""
    outside = tree(tmp_path_factory.mktemp("outside"), "1.png", "deep/2.png")
    (outside / "deep/back").symlink_to(folder / "cat")
    (outside / "deep/again").symlink_to(outside)
    (folder / "cat/more").symlink_to(outside)
    (folder / "cat/up").symlink_to(folder)
    (folder / "cat/self").symlink_to(folder / "cat")
    (folder / "cat/nowhere.png").symlink_to(folder / "nowhere.png")
    (folder / "ewe").symlink_to(outside / "deep")
    source = read_source(str(folder))
    assert source.class_names == ("cat", "dog", "ewe")
    assert [p for p in source.reader.paths if p.startswith("cat")] == [
        "cat/1.png",
        "cat/2.PNG",
        "cat/3.bmp",
        "cat/more/1.png",
        "cat/more/deep/2.png",
    ]


def test_only_regular_files_are_images(folder):
    os.mkfifo(folder / "cat/0.png")
    (folder / "cat/9.png").mkdir()
    tree(folder, "__MACOSX/cat/1.png")
    assert read_source(str(folder)).labels.tolist() == [0, 0, 0, 1, 1]


def test_listing_asks_the_system_once_a_folder_and_not_once_a_file(folder, monkeypatch):
    calls = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: calls.append(path) or scandir(path))
    for name in ("stat", "lstat", "listdir", "access"):
        monkeypatch.setattr(os, name, lambda *a, **k: calls.append(a) or pytest.fail(str(a)))
    monkeypatch.setattr("os.path.realpath", str)  # of each class folder once
    list_files(folder / "cat", [".png"])
    assert len(calls) == 1
    files, others = list_files(folder, [".png", ".bmp"])
    assert files == ["cat/1.png", "cat/2.PNG", "cat/3.bmp", "dog/2.png", "dog/a/1.png"]
    assert others == 5  # three files and two hidden folders
    assert len(calls) == 1 + 4


def write_list(folder, suffix: str, rows: list[tuple]) -> str:
    path = folder / f"list.{suffix}"
    if suffix == "csv":
        lines = ["label,path,extra"] + [f'{label},"{image}",x' for image, label in rows]
    else:
        lines = [json.dumps({"path": image, "label": label}) for image, label in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
class TestLists:
    def test_names(self, folder, suffix):
        rows = [("dog/2.png", "dog"), ("cat/1.png", "cat"), ("dog/a/1.png", "dog")]
        source = read_source(write_list(folder, suffix, rows))
        assert source.class_names == ("cat", "dog")
        assert source.labels.tolist() == [1, 0, 1]
        assert [int(source[i]["image"][0, 0, 0]) for i in range(3)] == [4, 0, 3]

    def test_integers(self, folder, suffix):
        spec = write_list(folder, suffix, [("dog/2.png", 2), ("cat/1.png", 0)])
        assert read_source(spec).class_names == ("0", "1", "2")
        assert read_source(spec).labels.tolist() == [2, 0]
        given = read_source(spec, class_names=("x", "y", "z"))
        assert given.class_names == ("x", "y", "z")
        assert given.labels.tolist() == [2, 0]

    def test_names_that_look_like_integers(self, folder, suffix):
        spec = write_list(folder, suffix, [("dog/2.png", "7"), ("cat/1.png", "5")])
        assert read_source(spec, class_names=("5", "7")).labels.tolist() == [1, 0]

    @pytest.mark.parametrize(
        ("label", "class_names", "message"),
        [
            (-1, None, "label -1 is out of range"),
            (-1, ("a", "b"), "label -1 is out of range"),
            (2, ("a", "b"), "label 2 is out of range: there are 2 classes"),
            (10**12, None, "out of range"),
            ("cow", ("a", "b"), "class 'cow' is not among the 2 classes"),
            ("", None, "label '' *: use a class name"),
        ],
    )
    def test_labels_refused(self, folder, suffix, label, class_names, message):
        spec = write_list(folder, suffix, [("dog/2.png", 0), ("cat/1.png", label)])
        line = 3 if suffix == "csv" else 2
        with pytest.raises(UserError, match=rf"list\.{suffix}:{line}: .*{message}"):
            read_source(spec, class_names=class_names)

    def test_paths_that_escape(self, folder, suffix, tmp_path_factory):
        outside = tmp_path_factory.mktemp("outside")
        write_image(outside / "secret.png")
        (folder / "link.png").symlink_to(outside / "secret.png")
        (folder / "linked").symlink_to(outside)
        (folder / "inner.png").symlink_to(folder / "cat" / "1.png")
        (folder / "circle.png").symlink_to(folder / "circle.png")
        for path, message in (
            (str(outside / "secret.png"), "use a path relative to"),
            (str(outside / "cat" / "9.png"), "use a path relative to"),
            ("C:\\\\secret.png", "use a path relative to"),
            (str(outside / "linked" / "secret.png"), "use a path relative to"),
            ("cat/../../secret.png", "without `..`"),
            ("link.png", "leads out of"),
            ("linked/secret.png", "leads out of"),
            ("circle.png", "no such file"),
            ("cat", "no such file"),
            ("cat/9.png", "no such file"),
            ("x" * 5000, "no such file"),
        ):
            with pytest.raises(UserError, match=message):
                read_source(write_list(folder, suffix, [(path, 0)]))
        assert len(read_source(write_list(folder, suffix, [("inner.png", 0)]))) == 1

    @pytest.mark.parametrize(
        "stated",
        [
            "{folder}/dog/a/1.png",
            "/home/somebody/elsewhere/dog/a/1.png",
            "D:\\\\sets\\\\dog\\\\a\\\\1.png",
            "dog\\\\a\\\\1.png",
            "../{name}/dog/a/1.png",
            "{name}/dog/a/1.png",
            "./dog//a/1.png",
        ],
    )
    def test_paths_that_mean_a_file_inside(self, folder, suffix, stated):
        stated = stated.replace("\\\\", "\\").format(folder=folder, name=folder.name)
        source = read_source(write_list(folder, suffix, [(stated, 0)]))
        assert source[0]["image"][0, 0, 0] == 3

    def test_empty(self, folder, suffix):
        with pytest.raises(UserError, match="no images are listed"):
            read_source(write_list(folder, suffix, []))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "file,label\ncat/1.png,0\n", "a.csv:1: no column path"),
        ("a.csv", "", "a.csv:1: no column label, path"),
        ("a.csv", "path,label\ncat/1.png\n", "a.csv:2: label None"),
        ("a.csv", 'path,label\n"cat/1.png,0\n', "not readable as CSV"),
        ("a.csv", b"path,label\n\xff\xfe,0\n", "not readable as CSV"),
        (
            "a.jsonl",
            '{"path": "cat/1.png", "label": 0}\n{"path"\n',
            "a.jsonl:2: not readable as JSON",
        ),
        ("a.jsonl", "[1]\n", "a.jsonl:1: not of the form"),
        ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1: not readable as JSON"),
        ("a.jsonl", b"\xff\n", "a.jsonl:1: not readable as JSON"),
        ("a.jsonl", '{"path": "cat/1.png"}\n', "label None"),
        ("a.jsonl", '{"path": "cat/1.png", "label": true}\n', "label True"),
        ("a.jsonl", '{"path": "cat/1.png", "label": 1.0}\n', "label 1.0"),
        ("a.jsonl", '{"path": 3, "label": 1}\n', "path 3"),
        ("a.jsonl", '{"path": "a\\u0000b", "label": 1}\n', "give the file's path"),
        ("a.jsonl", '{"path": "\\ud800.png", "label": 1}\n', "a.jsonl:1: .*surrogates"),
        ("a.jsonl", '{"path": "cat/1.png", "label": 1' + "0" * 5000 + "}", "out of range"),
    ],
)
def test_malformed_lists(folder, name, text, message):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_source(str(folder / name))


def test_a_byte_order_mark_is_no_part_of_the_header(folder):
    (folder / "a.csv").write_bytes(b"\xef\xbb\xbfpath,label\ncat/1.png,cat\n")
    assert read_source(str(folder / "a.csv")).class_names == ("cat",)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("path;label\ncat/1.png;cat\n", "utf-8"),
        ("label\tpath\r\ncat\tcat/1.png\r\n", "utf-16"),
        ('"path", "label"\n"cat/1.png", "cat"\n\n', "utf-8"),
        ("Filename|Class\ncat/1.png|cat \n", "utf-8-sig"),
        ('id,file_name,label\n7,cat/1.png,"cat"\n', "utf-8"),
    ],
)
def test_lists_as_spreadsheets_write_them(folder, text, encoding):
    (folder / "a.csv").write_bytes(text.encode(encoding))
    source = read_source(str(folder / "a.csv"))
    assert source.class_names == ("cat",)
    assert source.example_name(0) == str(folder / "cat/1.png")


def test_rows_of_nothing_are_none(folder):
    (folder / "a.csv").write_text("path,label\n\ncat/1.png,cat\n  \n,,\n")
    assert len(read_source(str(folder / "a.csv"))) == 1


def test_lists_of_several_splits_are_refused(folder):
    rows = [("cat/1.png", "train"), ("cat/1.png", "val")]
    for several in (True, False):
        some = rows if several else rows[:1] * 2
        table = [f"{path},cat,{split}" for path, split in some]
        (folder / "a.csv").write_text("\n".join(["path,label,Split", *table]))
        lines = [json.dumps({"path": p, "label": "cat", "split": s}) for p, s in some]
        (folder / "a.jsonl").write_text("\n".join(lines))
        for name in ("a.csv", "a.jsonl"):
            if not several:
                assert len(read_source(str(folder / name))) == 2
                continue
            with pytest.raises(
                UserError, match=rf"{name}: .* by `split`: train, val: write a list"
            ):
                read_source(str(folder / name))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lines_of_json_as_other_tools_write_them(folder, encoding):
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "cat/1.png", "label": "Kätzchen\u2028"}\n', encoding=encoding
    )
    assert read_source(str(folder / "metadata.jsonl")).class_names == ("Kätzchen\u2028",)


def test_file_that_disappears_is_damaged(folder):
    source = read_source(str(folder))
    (folder / "cat" / "1.png").unlink()
    with pytest.raises(DamagedImageError, match=r"cat/1\.png"):
        source[0]


def test_split_source():
    source = read_source("embedded:fashion_mnist/test")
    train, held_out = split_source(source, 0.15, seed=3)
    assert np.bincount(held_out.labels).tolist() == [15] * 10
    assert np.bincount(train.labels).tolist() == [85] * 10
    assert sorted([*train.rows, *held_out.rows]) == list(range(1000))
    assert np.array_equal(held_out[7]["image"], source[held_out.rows[7]]["image"])
    again = split_source(source, 0.15, seed=3)[1]
    assert np.array_equal(again.rows, held_out.rows)
    assert not np.array_equal(split_source(source, 0.15, seed=4)[1].rows, held_out.rows)


def test_split_source_keeps_one_of_each_class_on_both_sides(folder):
    for holdout in (0.01, 0.99):
        train, held_out = split_source(read_source(str(folder)), holdout, seed=0)
        assert set(train.labels) == set(held_out.labels) == {0, 1}
    for holdout in (0.0, 1.0, -1):
        with pytest.raises(UserError, match="use a share between 0 and 1"):
            split_source(read_source(str(folder)), holdout, seed=0)
    (folder / "dog" / "2.png").unlink()
    with pytest.raises(UserError, match="class 'dog' has one image"):
        split_source(read_source(str(folder)), 0.5, seed=0)


def test_images_without_labels(folder):
    """Flat or nested, and what has labels without them."""
    source = read_unlabelled(str(folder))
    assert source.reader.paths == (
        "cat/1.png", "cat/2.PNG", "cat/3.bmp", "dog/2.png", "dog/a/1.png"
    )  # fmt: skip
    assert source.class_names == ()
    assert source.labels.tolist() == [0] * 5
    assert "ignored" in source.note
    flat = read_unlabelled(str(folder / "cat"))
    assert len(flat) == 3
    assert flat[1]["image"].shape == (3, 4, 3)
    embedded = read_unlabelled("embedded:fashion_mnist/test")
    assert (len(embedded), embedded.class_names, embedded.labels.max()) == (1000, (), 0)
    (folder / "list.csv").write_text("path,label\ncat/1.png,cat\ndog/2.png,dog\n")
    assert read_unlabelled(str(folder / "list.csv")).labels.tolist() == [0, 0]
    (folder / "paths.csv").write_text("path,size\ncat/1.png,3\ndog/2.png,4\n")
    (folder / "paths.jsonl").write_text('{"path": "cat/1.png"}\n{"path": "dog/2.png"}\n')
    for name in ("paths.csv", "paths.jsonl"):
        assert read_unlabelled(str(folder / name)).reader.paths == ("cat/1.png", "dog/2.png")
        with pytest.raises(UserError, match=r"no column label|label None: use a class name"):
            read_source(str(folder / name))
    (folder / "none").mkdir()
    with pytest.raises(UserError, match="none: no image in it or below"):
        read_unlabelled(str(folder / "none"))
    with pytest.raises(UserError, match=r"no data: set config\.data\.train"):
        read_unlabelled("")


def test_images_are_held_out_without_labels(folder):
    source = read_unlabelled(str(folder))
    train, held_out = hold_out(source, 0.4, 1)
    assert (len(train), len(held_out)) == (3, 2)
    assert sorted([*train.rows, *held_out.rows]) == list(range(5))
    again = hold_out(source, 0.4, 1)[1]
    assert again.rows.tolist() == held_out.rows.tolist() == sorted(held_out.rows)
    assert [len(part) for part in hold_out(source, 0.01, 0)] == [4, 1]
    with pytest.raises(UserError, match="one image, so none can be held out"):
        hold_out(subset(source, 1, 0), 0.5, 0)
    with pytest.raises(UserError, match="holdout 1"):
        hold_out(source, 1, 0)


def test_subset(folder):
    source = read_source("embedded:fashion_mnist/train")
    small, large = subset(source, 40, seed=1), subset(source, 95, seed=1)
    assert np.bincount(small.labels).tolist() == [4] * 10
    assert set(np.bincount(large.labels)) == {9, 10}
    assert set(small.rows) < set(large.rows)
    assert not np.array_equal(subset(source, 40, seed=2).rows, small.rows)
    assert np.bincount(subset(read_source(str(folder)), 5, seed=0).labels).tolist() == [3, 2]
    for count in (0, 4001):
        with pytest.raises(UserError, match="use 1 to 4000"):
            subset(source, count, seed=0)


def test_sources_pickle(folder):
    for spec in (str(folder), "embedded:fashion_mnist/test"):
        source = read_source(spec)
        copy = pickle.loads(pickle.dumps(source))
        assert np.array_equal(copy[2]["image"], source[2]["image"])


TFDS_PROGRAM = """
import io, pickle, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from vision_jax.data.sources import read_source, read_unlabelled
from vision_jax.errors import UserError

def png(value):
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(file, "png")
    file.seek(0)
    return file

class TinyShapes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    labels = {"label": tfds.features.ClassLabel(names=["round", "square"])}

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3))} | self.labels
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        labels = lambda i: {name: i % 2 for name in self.labels}
        return {"train": ((i, {"image": png(i)} | labels(i)) for i in range(12))}

    def _generate_examples(self):
        pass

class TinyPictures(TinyShapes):
    labels = {}

folder = sys.argv[1]
TinyPictures(data_dir=folder, file_format="array_record").download_and_prepare()
unlabelled = read_unlabelled(f"tfds:tiny_pictures/train@{folder}")
assert sorted(int(unlabelled[i]["image"][0, 0, 0]) for i in range(12)) == list(range(12))
assert unlabelled.labels.tolist() == [0] * 12
TinyShapes(data_dir=folder, file_format="array_record").download_and_prepare()
source = read_source(f"tfds:tiny_shapes/train@{folder}", class_names=("square", "round"))
source = pickle.loads(pickle.dumps(source))
values = [int(source[i]["image"][0, 0, 0]) for i in range(12)]
assert sorted(values) == list(range(12)), values
assert [1 - v % 2 for v in values] == source.labels.tolist()
assert source[0]["image"].shape == (4, 5, 3)
assert len(read_source(f"tfds:tiny_shapes/train[:5]@{folder}")) == 5
for spec in (f"tfds:tiny_shapes/nope@{folder}", f"tfds:no_such_name/train@{folder}", "tfds:x"):
    try:
        read_source(spec)
    except UserError as error:
        assert "\\n" not in str(error) and spec in str(error), error
    else:
        raise AssertionError(spec)
assert "tensorflow" not in sys.modules
"""


def test_tfds_without_tensorflow(tmp_path):
    """In a process of its own: other tests must not have imported what it says isn't needed."""
    pytest.importorskip("tensorflow_datasets")
    command = [sys.executable, "-c", TFDS_PROGRAM, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_tfds_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install 'vision_jax\[tfds\]'"):
        read_source("tfds:mnist/train")
