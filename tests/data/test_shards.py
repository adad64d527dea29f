"""Tar and Parquet shards: what is read, in which order, and what is refused in a line."""

import io
import itertools
import json
import os
import pickle
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from vision_jax.data import order, parquet, tar_shards
from vision_jax.data.decode import DamagedImageError
from vision_jax.data.fingerprint import describe_changes, take_fingerprint
from vision_jax.data.order import BlockOrder
from vision_jax.data.pipeline import make_eval_batches, make_train_iterator
from vision_jax.data.sources import leave_out, read_source, read_unlabelled
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SMALL = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, 1.0, "bilinear", "squash")


def encode(value: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (value, 0, 0)).save(file, kind)
    return file.getvalue()


def write_tar(path, files, **header):
    """`files`: (name, content), or a TarInfo."""
    with tarfile.open(path, "w", **header) as tar:
        for one in files:
            if isinstance(one, tarfile.TarInfo):
                tar.addfile(one)
            else:
                entry = tarfile.TarInfo(one[0])
                entry.size = len(one[1])
                tar.addfile(entry, io.BytesIO(one[1]))
    return path


def write_tars(folder, shards=3, each=5):
    """Image i has i in red, the class "even" or "odd" and a caption."""
    for s in range(shards):
        files = []
        for i in range(s * each, (s + 1) * each):
            files += [
                (f"{i:04}.png", encode(i)),
                (f"{i:04}.cls", ("even", "odd")[i % 2].encode() + b"\n"),
                (f"{i:04}.txt", f"image {i}".encode()),
            ]
        write_tar(folder / f"{s:03}.tar", files)
    return str(folder / f"{{000..{shards - 1:03}}}.tar")


def write_parquet(path, values, names=("a", "b", "c"), rows=7, **columns):
    """Image i has i in red; label i modulo the number of names."""
    table = pa.table(
        {"image": [{"bytes": encode(i), "path": f"{i}.png"} for i in values]}
        | (columns or {"label": [i % len(names) for i in values]})
    )
    features = {"label": {"names": list(names), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows)
    return str(path)


def reds(source) -> list[int]:
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]


def test_tars(tmp_path):
    spec = write_tars(tmp_path)
    for one in (spec, str(tmp_path / "*.tar"), str(tmp_path), str(tmp_path / "00[0-2].tar")):
        source = read_source(one)
        assert reds(source) == list(range(15))
        assert source.class_names == ("even", "odd")
        assert source.labels.tolist() == [i % 2 for i in range(15)]
        unlabelled = read_unlabelled(one)
        assert reds(unlabelled) == list(range(15))
        assert (unlabelled.class_names, unlabelled.labels.max()) == ((), 0)
    assert source.example_name(7) == f"{tmp_path}/001.tar/0007.png"
    assert read_source(spec, class_names=("odd", "x", "even")).labels.tolist()[:3] == [2, 0, 2]
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy[11]["image"], source[11]["image"])
    assert len(read_source(str(tmp_path / "001.tar"))) == 5


def test_a_sample_is_what_stands_together_under_a_name(tmp_path):
    files = [
        ("./a.b/1.jpg", encode(10, "jpeg")),
        ("./a.b/1.json", b'{"class_name": "ant", "caption": "an ant"}'),
        ("README", b"no sample"),
        ("._2.png", b"litter"),
        ("2.PNG", encode(20)),
        ("2.features.npy", b"no image"),
        ("2.npy", b"features"),
        ("2.cls", b"bee"),
        ("3.json", b'{"label": "ant"}'),
        ("4.json", b"{"),
        ("4.webp", encode(40, "webp")),
        ("4.cls", "ant\n".encode("utf-8-sig")),
        ("x" * 150 + "/5.png", encode(50)),  # a name that tar writes in a header of its own
        ("x" * 150 + "/5.cls", b"bee"),
    ]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        source = read_source(str(write_tar(tmp_path / "a.tar", files, format=form)))
        assert [source.class_names[label] for label in source.labels] == ["ant", "bee"] * 2
        np.testing.assert_allclose(reds(source), [10, 20, 40, 50], atol=3)  # JPEG and WebP
        assert "1 samples without an image" in source.note
        assert source.reader.relative_name(0) == "a.tar/./a.b/1.jpg"


@pytest.mark.parametrize("place", ["", "./", "a/"])
def test_tars_of_macos(tmp_path, place):
    """A ._NAME beside each file; webdataset takes samples in folders apart by them."""
    files = []
    for name, data in (
        ("1.png", encode(1)),
        ("1.cls", b"x"),
        ("2.png", encode(2)),
        ("2.cls", b"y"),
    ):
        files += [(f"{place}._{name}", b"\0\5\x16\7"), (place + name, data)]
    (tmp_path / "._a.tar").write_bytes(b"\0\5\x16\7")
    write_tar(tmp_path / "a.tar", files)
    source = read_source(str(tmp_path))
    assert (reds(source), source.labels.tolist(), source.note) == ([1, 2], [0, 1], "")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("1.cls", b"0")], r"a\.tar: no image in it: its images end in \.bmp"),
        ([("1.png", encode(1))], r"1\.png: has no label: pack a \.cls"),
        ([("1.png", encode(1)), ("1.json", b'{"label": true}')], "has no label"),
        ([("1.png", encode(1)), ("1.cls", b"")], "has no label"),
        ([("1.png", encode(1)), ("1.jpg", encode(1)), ("1.cls", b"0")], "several images .png, jpg"),
        ([("1.png", encode(1)), ("1.cls", b"0"), ("1.png", b"")], r"1\.png: is in it twice"),
        ([("1.png", encode(1)), ("1.cls", b"0" * 2**21)], "over the limit of 1,048,576"),
        ([("1.png", encode(1)), ("1.cls", b"-1")], "label -1 is out of range"),
    ],
)
def test_tars_that_cannot_be_used(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        read_source(str(write_tar(tmp_path / "a.tar", files)))


def test_hostile_members(tmp_path):
    """Links and devices are refused; names that lead out of a folder lead nowhere."""
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        entry = tarfile.TarInfo("0.png")
        entry.type, entry.linkname = kind, "/etc/passwd"
        write_tar(tmp_path / "a.tar", [entry])
        with pytest.raises(UserError, match=r"0\.png: a link, device or sparse file"):
            read_unlabelled(str(tmp_path / "a.tar"))
    inside = tmp_path / "inside"
    inside.mkdir()
    names = ("../../out.png", "/tmp/out.png", "C:\\out.png")
    write_tar(inside / "a.tar", [(name, encode(i)) for i, name in enumerate(names)])
    source = read_unlabelled(str(inside / "a.tar"))
    assert reds(source) == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "a.tar", "inside"]
    # More than an image may have, of zeros that cost no room on the disk.
    entry = tarfile.TarInfo("1.png")
    entry.size = 2**27
    (tmp_path / "a.tar").write_bytes(entry.tobuf())
    os.truncate(tmp_path / "a.tar", 512 + 2**27 + 1024)
    with pytest.raises(DamagedImageError, match="134,217,728 bytes, over the limit"):
        read_unlabelled(str(tmp_path / "a.tar"))[0]
    # A header in front of a header in front of ... of a file; and one of 2 GB.
    long = tarfile.TarInfo("n" * 200).tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "a.tar").write_bytes(long[:1024] * 5000)
    with pytest.raises(UserError, match="damaged or truncated"):
        read_unlabelled(str(tmp_path / "a.tar"))
    huge = tarfile.TarInfo("././@LongLink")
    huge.type, huge.size = tarfile.GNUTYPE_LONGNAME, 2**31
    (tmp_path / "a.tar").write_bytes(huge.tobuf(tarfile.GNU_FORMAT))
    os.truncate(tmp_path / "a.tar", 2**32)
    with pytest.raises(UserError, match="a header of 2,147,48"):
        read_unlabelled(str(tmp_path / "a.tar"))


def test_truncated_tars(tmp_path):
    """Wherever a shard is cut it is refused, or said to have no end mark; none is read in part."""
    write_tars(tmp_path, shards=1, each=4)
    path = tmp_path / "000.tar"
    whole = path.read_bytes()
    assert len(read_unlabelled(str(path))) == 4
    assert read_unlabelled(str(path)).note == ""
    for end in range(0, 4 * 6 * 512 + 1, 256):
        path.write_bytes(whole[:end])
        if end and end % 1024 == 0:  # between two files, each of which has one block
            source = read_unlabelled(str(path))
            assert len(source) == -(-end // 3072)
            assert "no end mark: it may have been cut short (1 of 1 shards)" in source.note
        else:
            what = "a damaged or truncated tar file" if end else "an empty file"
            with pytest.raises(UserError, match=rf"000\.tar: {what}"):
                read_unlabelled(str(path))
    damaged = bytearray(whole)
    damaged[3072 + 100] ^= 1  # tarfile alone would read one image, and stop without a word
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="no header at byte 3,072"):
        read_unlabelled(str(path))


def test_indices_of_large_tars_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tar_shards, "KEPT_FROM", 10)
    reads = []
    read = tar_shards._read_index
    monkeypatch.setattr(tar_shards, "_read_index", lambda *a: reads.append(a) or read(*a))
    folder = tmp_path / "shards"
    folder.mkdir()
    spec = write_tars(folder)
    first = read_source(spec)
    again = read_source(spec)
    assert len(reads) == 3
    assert reds(again) == reds(first)
    assert again.labels.tolist() == first.labels.tolist()
    # A shard that has changed is listed anew, and a kept index that is damaged is of no use.
    write_tar(folder / "001.tar", [("7.png", encode(200)), ("7.cls", b"odd")])
    assert reds(read_source(spec)) == [*range(5), 200, *range(10, 15)]
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text("{}")
    assert len(read_source(spec)) == 11
    # What was listed is what is read.
    stale = read_source(spec)
    os.utime(folder / "001.tar", ns=(0, 0))
    with pytest.raises(UserError, match=r"001\.tar has changed since this run listed"):
        stale[5]


def test_patterns(tmp_path):
    for name in ("train-00000.tar", "train-00001.tar", "test-00000.tar"):
        write_tar(tmp_path / name, [("1.png", encode(1)), ("1.cls", b"0")])
    assert len(read_source(str(tmp_path / "train-*.tar"))) == 2
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more" / "train-00000.tar", [("1.png", encode(1)), ("1.cls", b"0")])
    deep = read_source(str(tmp_path / "**" / "train-*0.tar"))
    assert [deep.reader.relative_name(i) for i in range(2)] == [
        "more/train-00000.tar/1.png", "train-00000.tar/1.png"
    ]  # fmt: skip
    assert len(read_source(str(tmp_path / "{test,train}-{00000..00000}.tar"))) == 2
    for spec in (str(tmp_path), str(tmp_path / "*.tar")):
        message = r"several splits: name one of them, .*/train-\*\.tar to train on and .*/test-"
        with pytest.raises(UserError, match=message):
            read_unlabelled(spec)
    with pytest.raises(UserError, match=r"/more: shards and no images of a class: use .*/more$"):
        read_source(str(tmp_path))
    for spec, message in (
        ("train-{00000..00002}.tar", r"there is no .*train-00002\.tar: check the folder"),
        ("valid-*.tar", "there is no .*valid"),
        ("train-00000.tar.gz", "compressed shards can't be read at random"),
        ("{0..9999999}.tar", "more than 1,000,000 shards"),
        ("{0..9999}{0..9999}.tar", "more than 1,000,000 shards"),
    ):
        with pytest.raises(UserError, match=message):
            read_unlabelled(str(tmp_path / spec))
    (tmp_path / "both").mkdir()
    write_tar(tmp_path / "both" / "a.tar", [("1.png", encode(1))])
    write_parquet(tmp_path / "both" / "b.parquet", range(3))
    with pytest.raises(UserError, match=r"\.tar and \.parquet together"):
        read_unlabelled(str(tmp_path / "both"))


# Parquet ------------------------------------------------------------------------------------------


def test_parquet(tmp_path):
    for s in range(3):
        write_parquet(tmp_path / f"train-{s:05}-of-00003.parquet", range(20 * s, 20 * s + 20))
    for spec in (str(tmp_path), str(tmp_path / "train-*.parquet"), f"{tmp_path}/t*.parquet:label"):
        source = read_source(spec)
        assert reds(source) == list(range(60))
        assert source.class_names == ("a", "b", "c")
        assert source.labels.tolist() == [i % 3 for i in range(60)]
    assert source.example_name(27).endswith("train-00001-of-00003.parquet[7]")
    assert read_source(spec, class_names=("c", "b", "a")).labels.tolist()[:3] == [2, 1, 0]
    assert reds(read_unlabelled(str(tmp_path))) == list(range(60))
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy[41]["image"], source[41]["image"])


def test_columns_of_parquet(tmp_path):
    image = [encode(i) for i in range(4)]

    def write(**columns):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        return str(tmp_path / "a.parquet")

    plain = read_source(write(jpg=image, label=["x", "y", "x", "z"]))
    assert reds(plain) == [0, 1, 2, 3]
    assert (plain.class_names, plain.labels.tolist()) == (("x", "y", "z"), [0, 1, 0, 2])
    assert read_source(write(image=image, label=[2, 0, 0, 1])).class_names == ("0", "1", "2")
    given = read_source(write(image=image, label=[2, 0, 0, 1]), class_names=("x", "y", "z"))
    assert given.labels.tolist() == [2, 0, 0, 1]
    coded = pa.array(["x", "y", "x", "z"]).dictionary_encode()
    assert read_source(write(image=image, label=coded)).labels.tolist() == [0, 1, 0, 2]
    fine = f"{write(img=image, fine=[0, 1, 1, 0], coarse=[0, 0, 0, 1])}:coarse"
    assert read_source(fine).labels.tolist() == [0, 0, 0, 1]
    assert len(read_unlabelled(write(image=image))) == 4
    # Names of classes that look like numbers are still names.
    turned = read_source(write_parquet(tmp_path / "a.parquet", range(3), names=("2", "1", "0")))
    assert (turned.class_names, turned.labels.tolist()) == (("2", "1", "0"), [0, 1, 2])
    for columns, column, message in (
        ({"a": [1, 2], "b": ["x", "y"]}, "", r"no column of images.*columns: a .int64., b .string"),
        ({"image": image}, "", r"no column label: name it behind.*a\.parquet:COLUMN; .*: none"),
        ({"image": image, "fine": [0] * 4}, "", r"no column label.*a\.parquet:fine; .*: fine"),
        ({"image": image, "label": [0.5] * 4}, "", "`label` holds double"),
        ({"image": image, "label": [0] * 4}, "lable", "no column `lable`: did you mean `label`"),
        ({"image": image, "label": [0, 1, None, 0]}, "", r"a\.parquet\[2\]: has no label"),
        (
            {"x": image, "y": image, "label": [0] * 4},
            "",
            "several columns may be .* x, y to `image",
        ),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int32())}, "", "no rows"),
    ):
        with pytest.raises(UserError, match=message):
            read_source(write(**columns) + f":{column}" * bool(column))
    test = write_parquet(tmp_path / "a.parquet", range(3), label=[-1, -1, -1])
    with pytest.raises(UserError, match=r"\[0\]: has no label: name a split that has labels"):
        read_source(test)
    path = tmp_path / "a.parquet"
    whole = path.read_bytes()
    for data, message in (
        (b"", "empty: fetch it"),
        (whole[:-9], "or truncated Parq"),
        (whole.replace(b"label", b"labe\xf3"), "damaged .* Parquet file .'utf-8' codec"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_source(str(path))


def test_parquet_without_bytes(tmp_path):
    """As the datasets library writes local files that are not embedded."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": encode(1), "path": None}, {"bytes": None, "path": "/home/me/1.png"}, None]
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "a.parquet")
    source = read_unlabelled(str(tmp_path / "a.parquet"))
    assert source[0]["image"].max() == 1
    for row in (1, 2):
        with pytest.raises(DamagedImageError, match=rf"\[{row}\]: no image in .*store its bytes"):
            source[row]


def test_files_of_several_data_sets(tmp_path):
    write_parquet(tmp_path / "1.parquet", range(3))
    write_parquet(tmp_path / "2.parquet", range(3), names=("a", "b", "d"))
    with pytest.raises(UserError, match=r"2\.parquet: other columns or classes than .*1\.parquet"):
        read_source(str(tmp_path / "*.parquet"))


def test_row_groups_are_kept_within_a_bound(tmp_path, monkeypatch):
    reads = []
    read = parquet._read_group
    monkeypatch.setattr(parquet, "_KEPT", parquet._Kept())
    monkeypatch.setattr(parquet, "_read_group", lambda *a: reads.append(a[1]) or read(*a))
    source = read_unlabelled(write_parquet(tmp_path / "a.parquet", range(21)))
    for i in (0, 6, 7, 1, 20, 13):
        source[i]
    assert reads == [0, 1, 2]
    monkeypatch.setattr(parquet, "KEPT_BYTES", 1500)  # two groups of about 600 bytes
    monkeypatch.setattr(parquet, "_KEPT", parquet._Kept())
    reads.clear()
    for i in (0, 7, 0, 14, 7):  # the group that was not used for longest goes
        source[i]
    assert reads == [0, 1, 2, 1]


# Order and position -------------------------------------------------------------------------------


def test_blocks_are_read_once_an_epoch():
    """In each window all examples of a few blocks, in an order of its own."""
    rng = np.random.default_rng(0)
    block = np.sort(rng.integers(0, 40, 1000))
    sizes = np.full(40, 2**26)  # four in a window
    order = BlockOrder(block, sizes, 3)
    epochs = [[order(epoch * 1000 + i, 0) for i in range(1000)] for epoch in range(2)]
    for rows in epochs:
        assert sorted(rows) == list(range(1000))
        seen = block[rows]
        spans = [np.ptp(np.flatnonzero(seen == b)) for b in range(40)]
        assert max(spans) < 4 * 45
        assert 3 <= len(np.unique(seen[:60])) <= 4  # mixed from the start
        assert np.mean(np.diff(rows) == 1) < 0.05
    assert epochs[0] != epochs[1]
    again = pickle.loads(pickle.dumps(order))
    assert [again(i, 0) for i in range(1500, 1600)] == epochs[1][500:600]
    assert BlockOrder(block, sizes, 4).order(0).tolist() != epochs[0]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_run_goes_on_bit_identically(tmp_path, kind, monkeypatch):
    """At any batch, over the end of an epoch, with any number of threads and processes."""
    monkeypatch.setattr(order, "WINDOW_BYTES", 1000)
    if kind == "tar":
        spec = write_tars(tmp_path, shards=2, each=11)
    else:
        spec = write_parquet(tmp_path / "a.parquet", range(22), rows=4)

    def batches(count, **changes):
        arguments = {
            "batch_size": 4, "preprocessing": SMALL, "crop": "random_resized", "flip": True,
            "seed": 7, "num_threads": 2, "max_damaged": 0.0,
        }  # fmt: skip
        iterator = make_train_iterator(read_source(spec), **(arguments | changes))
        return list(itertools.islice(iterator, count))

    whole = batches(12)
    rows = np.concatenate([batch["index"] for batch in whole])
    assert sorted(rows[:22]) == sorted(rows[22:44]) == list(range(22))
    assert rows[:22].tolist() not in (rows[22:44].tolist(), list(range(22)))
    for first in (1, 5, 9):
        for ours, theirs in zip(
            batches(12 - first, first_batch=first, num_threads=3), whole[first:], strict=True
        ):
            for key in theirs:
                np.testing.assert_array_equal(ours[key], theirs[key])
    halves = [batches(12, batch_size=2, process_index=i, process_count=2) for i in range(2)]
    for left, right, both in zip(*halves, whole, strict=True):
        np.testing.assert_array_equal(both["image"][:2], left["image"])
        np.testing.assert_array_equal(both["image"][2:], right["image"])
    evaluated = make_eval_batches(
        read_source(spec), batch_size=8, preprocessing=SMALL, num_threads=2
    )
    index = np.concatenate([batch["index"] for batch in evaluated])
    assert index.tolist() == [*range(22), -1, -1]


def test_shards_that_change_between_runs_are_noticed(tmp_path):
    spec = write_tars(tmp_path)
    before = take_fingerprint(read_source(spec))
    assert describe_changes(before, take_fingerprint(read_source(str(tmp_path / "*.tar")))) == ""
    write_tar(tmp_path / "001.tar", [("0005.png", encode(9, "bmp")), ("0005.cls", b"odd")])
    changes = describe_changes(before, take_fingerprint(read_source(spec)))
    assert "4 removed ('001.tar/0006.png'), 1 edited ('001.tar/0005.png')" in changes
    path = tmp_path / "a.parquet"
    before = take_fingerprint(read_source(write_parquet(path, range(14))))
    after = take_fingerprint(read_source(write_parquet(path, [*range(13), 250])))
    assert describe_changes(before, after).startswith("7 edited ('a.parquet[7]')")


def test_excluded_images(tmp_path):
    source = read_source(write_tars(tmp_path))
    path = tmp_path / "exclude.json"
    path.write_text(json.dumps({"001.tar/0006.png": "001.tar/0005.png", "000.tar/0000.png": "x"}))
    left = leave_out(source, str(path))
    assert reds(left) == [1, 2, 3, 4, 5, *range(7, 15)]
    assert left.labels.tolist() == [i % 2 for i in reds(left)]
    assert "2 images left out" in left.note
    path.write_text('["001.tar/0006.png"]')
    assert len(leave_out(source, str(path))) == 14
    for content, message in (
        ('["a.png", "001.tar/0006.png"]', "1 of its 2 names are not in .*'a.png' for one"),
        ("[1]", "not a list of names"),
        ("{", "not readable as JSON"),
        (json.dumps([source.reader.relative_name(i) for i in range(15)]), "names all images"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            leave_out(source, str(path))


def test_pyarrow_is_asked_for(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", range(3))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'vision_jax\[parquet\]'"):
        read_source(path)
