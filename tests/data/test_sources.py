import hashlib
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.sources import ASSETS, read_source, split_source, subset
from vision_jax.errors import UserError

rng = np.random.default_rng()


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


def test_cifar10(tmp_path):
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
            (str(folder / "cat" / "1.png"), "use a path relative to"),
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
            "a.jsonl:2: not a line of JSON",
        ),
        ("a.jsonl", "[1]\n", "a.jsonl:1: not of the form"),
        ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1: not a line of JSON"),
        ("a.jsonl", b"\xff\n", "a.jsonl:1: not a line of JSON"),
        ("a.jsonl", '{"path": "cat/1.png"}\n', "label None"),
        ("a.jsonl", '{"path": "cat/1.png", "label": true}\n', "label True"),
        ("a.jsonl", '{"path": "cat/1.png", "label": 1.0}\n', "label 1.0"),
        ("a.jsonl", '{"path": 3, "label": 1}\n', "path 3"),
        ("a.jsonl", '{"path": "a\\u0000b", "label": 1}\n', "give the file's path"),
    ],
)
def test_malformed_lists(folder, name, text, message):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_source(str(folder / name))


def test_a_byte_order_mark_is_no_part_of_the_header(folder):
    (folder / "a.csv").write_bytes(b"\xef\xbb\xbfpath,label\ncat/1.png,cat\n")
    assert read_source(str(folder / "a.csv")).class_names == ("cat",)


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
from vision_jax.data.sources import read_source
from vision_jax.errors import UserError

def png(value):
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(file, "png")
    file.seek(0)
    return file

class TinyShapes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=["round", "square"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": ((i, {"image": png(i), "label": i % 2}) for i in range(12))}

    def _generate_examples(self):
        pass

folder = sys.argv[1]
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
