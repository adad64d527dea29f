"""Tar shards beside the webdataset library: the same samples from files written at random."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from vision_jax.data.shards import find_shards
from vision_jax.data.sources import IMAGE_SUFFIXES, read_source
from vision_jax.data.tar_shards import list_tars

webdataset = pytest.importorskip("webdataset")


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (value, 0, 0)).save(file, "png")
    return file.getvalue()


def test_samples_are_those_of_webdataset(tmp_path, rng):
    """Names with dots, folders and capital letters; files in between that belong to none."""
    for round_ in range(20):
        files = []
        for i in range(30):
            folder = rng.choice(["", "a/", "./", "a.b/c/", "x" * 120 + "/"])
            key = f"{folder}{rng.choice(['n', 'N_', '-'])}{i}"
            beside = {
                "cls": str(i % 3),
                "txt": f"text {i}",
                "seg.png": "no",
                "json": '{"label": 9}',
            }
            own = [(f"{key}.{rng.choice(['png', 'PNG'])}", png(i))] * bool(rng.random() < 0.8)
            own += [(f"{key}.{k}", v.encode()) for k, v in beside.items() if rng.random() < 0.6]
            files += [own[j] for j in rng.permutation(len(own))]
            if rng.random() < 0.2:
                files.append((f"{folder}README", b""))
        form = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT][round_ % 2]
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
            for name, content in files:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        theirs = [
            sample
            for sample in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
            if "png" in sample
        ]
        listed = list_tars(find_shards(str(tmp_path / "a.tar"))[0], IMAGE_SUFFIXES)
        assert len(listed.labels) == len(theirs) > 10
        for row, sample in enumerate(theirs):
            assert listed.reader.encoded(row) == sample["png"]
            label = sample["cls"].decode() if "cls" in sample else 9 if "json" in sample else None
            assert listed.labels[row] == label
            assert listed.captions[row] == (sample["txt"].decode() if "txt" in sample else None)


def test_what_webdataset_writes(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(5):
            image = Image.new("RGB", (3, 2), (i, 0, 0))
            writer.write({"__key__": f"{i:04}", "png": image, "cls": i % 2, "json": {"a": 1}})
    source = read_source(str(tmp_path / "a.tar"))
    assert source.labels.tolist() == [0, 1, 0, 1, 0]
    assert [int(np.asarray(source[i]["image"]).max()) for i in range(5)] == list(range(5))
