"""Near-duplicates inside of a set: which are found, what is kept, and the list for training."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from vision_jax.config import load_config
from vision_jax.data.decode import decode_thumbnail
from vision_jax.data.sources import read_unlabelled
from vision_jax.doctor.__main__ import main
from vision_jax.doctor.scan import Scan, near_duplicates
from vision_jax.errors import UserError
from vision_jax.tasks.classification import task as classification
from vision_jax.tasks.pretraining import task as pretraining


def photo(rng, size=(96, 72)) -> Image.Image:
    """Shapes of many sizes, as photos have them."""
    layers = [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8)).resize(size, 3), np.float32
        )
        / n
        for n in (2, 4, 8, 16)
    ]
    mixed = sum(layers)
    return Image.fromarray((255 * (mixed - mixed.min()) / np.ptp(mixed)).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def scan_of(thumbnails: np.ndarray) -> Scan:
    digests = tuple(thumbnail.tobytes() for thumbnail in thumbnails)
    return Scan((None,) * len(thumbnails), {}, digests, thumbnails)


def compare_all(thumbnails: np.ndarray) -> dict[int, int]:
    """As docs/doctor.md defines it, in float64, pair by pair."""
    kept_of: dict[int, int] = {}
    for b, second in enumerate(thumbnails.astype(np.float64)):
        for a, first in enumerate(thumbnails[:b].astype(np.float64)):
            if a in kept_of or b in kept_of:
                continue
            equal = np.array_equal(first, second)
            if not equal and min(first.std(), second.std()) < 4:
                continue
            if not equal:
                gap = (first - first.mean()) / first.std() - (second - second.mean()) / second.std()
            if equal or ((gap**2).mean() <= 0.01 and np.abs(gap).max() <= 0.5):
                kept_of[b] = a
    return kept_of


def test_equals_the_comparison_of_all_pairs(rng):
    base = rng.integers(0, 256, (12, 256)).astype(np.float64)
    flat = np.full((2, 256), 90.0)
    drift = rng.normal(0, 1, (8, 256)).cumsum(0) * 4  # a chain: near the next, far from the last
    noisy = base[rng.integers(12, size=60)]
    noisy = noisy * rng.uniform(0.5, 1, (60, 1)) + rng.normal(0, rng.choice([2, 6, 12], (60, 1)))
    rows = np.concatenate([base, flat, base[:1] + drift, noisy, base[3:5]])
    thumbnails = rows[rng.permutation(len(rows))].clip(0, 255).astype(np.uint8)
    found = near_duplicates(scan_of(thumbnails))
    assert found == compare_all(thumbnails)
    assert 20 < len(found) < 80
    assert not set(found) & set(found.values())


def test_many_alike_are_asked_for_once(rng, monkeypatch):
    """A still camera's pictures: time that grows with their number, not with its square."""
    from vision_jax.doctor import scan

    asked = []
    near = scan._Near.__call__
    monkeypatch.setattr(scan._Near, "__call__", lambda *a: asked.append(1) or near(*a))
    monkeypatch.setattr(scan, "MOST_NEAR_ONE", 100)
    scene = rng.integers(0, 256, 256)
    frames = (scene + rng.normal(0, 2, (400, 256))).clip(0, 255).astype(np.uint8)
    found = near_duplicates(scan_of(frames))
    assert len(found) > 340
    assert len(asked) == 400 - len(found)


def test_encodings_of_a_photo_are_found_and_other_photos_are_not(rng):
    photos = [photo(rng) for _ in range(15)]
    thumbnails, of = [], []
    for i, image in enumerate(photos):
        for data in (
            encode(image, "png"),
            encode(image, "jpeg", quality=40),
            encode(image.resize((48, 36), 2), "jpeg", quality=85),
            encode(image.resize((150, 113), 3), "webp", quality=80),
            encode(image.point(lambda v: int(v * 0.9)), "jpeg", quality=90),  # darker
        ):
            thumbnails.append(decode_thumbnail(data, name="").ravel())
            of.append(5 * i)
    found = near_duplicates(scan_of(np.stack(thumbnails)))
    assert set(found.items()) <= {(row, first) for row, first in enumerate(of) if row != first}
    assert len(found) >= 0.97 * 4 * 15


@pytest.fixture
def sets(tmp_path, rng):
    """train: 1 and 2 alike in another encoding, 3 to 5 not; 5 is in eval too, another size."""
    photos = [photo(rng) for _ in range(6)]
    for folder, name, image in (
        ("train/a", "1.png", photos[1]),
        ("train/b", "2.png", photos[2]),
        ("train/a", "3.jpg", photos[3]),
        ("train/b", "4.png", photos[4]),
        ("train/b", "5.png", photos[5]),
        ("train/b", "6.jpg", photos[1].resize((64, 48))),
        ("eval/a", "1.png", photos[5].resize((72, 54))),
        ("eval/b", "2.png", photos[0]),
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / folder / name, quality=90)
    return tmp_path


@pytest.mark.parametrize("labels", [True, False])
def test_doctor_writes_what_training_leaves_out(sets, capsys, labels):
    train, held_out, out = (str(sets / name) for name in ("train", "eval", "out.json"))
    flags = [f"--against={held_out}", f"--exclude={out}", *["--unlabelled"] * (not labels)]
    assert main([train, *flags]) == 1
    screen = " ".join(capsys.readouterr().out.split())
    assert "near-duplicate: 1 of 6 images" in screen
    assert "b/6.jpg: as a/1.png" in screen
    assert "near-leak: 1 of 6 images" in screen
    assert "2 images to leave out: set config.data.exclude to it" in screen
    assert json.loads((sets / "out.json").read_text()) == {
        "b/6.jpg": "a/1.png", "b/5.png": f"{held_out}: a/1.png"
    }  # fmt: skip
    name = "transfer.py" if labels else "mae_embedded.py"
    fields = {
        "data.train": train, "data.eval": held_out, "data.exclude": out, "data.subset": "0",
        "batch_size": "4",
    }  # fmt: skip
    config = load_config(f"configs/{name}", fields)
    task = classification if labels else pretraining
    source, _ = task.read_sources(config)
    names = [source.reader.relative_name(int(row)) for row in source.rows]
    assert sorted(names) == ["a/1.png", "a/3.jpg", "b/2.png", "b/4.png"]
    # Where a share of the same images is held out, also there.
    config = load_config(f"configs/{name}", fields | {"data.eval": "", "data.holdout": "0.3"})
    with pytest.raises(UserError, match="fewer than a batch") if not labels else open(out):
        task.read_sources(config)
    rest = task.read_eval_source(config, ("a", "b") if labels else ())
    assert {rest.example_name(i)[-7:] for i in range(len(rest))} < set(names)


def test_what_the_doctor_refuses(sets, capsys):
    train = str(sets / "train")
    for flags, message in (
        (["--quick", "--duplicates"], "--quick reads no pixels"),
        ([f"--exclude={sets}/no/such/out.json"], "can't be written"),
    ):
        assert main([train, *flags]) == 2
        assert message in capsys.readouterr().err
    assert main([str(sets / "train/a"), "--unlabelled", "--duplicates"]) == 0
    assert "2 images, 0 classes" in capsys.readouterr().out


def test_a_long_path_stays_in_one_piece_outside_a_terminal(tmp_path, rng, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # which says nothing about a pipe
    folder = tmp_path / ("a folder of a long name " * 8).strip() / ("b" * 150)
    folder.mkdir(parents=True)
    photo(rng).save(folder / "0.png")
    (folder / "empty.png").write_bytes(b"")
    assert main([str(folder), "--unlabelled"]) == 1
    out = capsys.readouterr().out
    assert f"{folder}: 2 images, 0 classes\n" in out
    assert f"      {folder}/empty.png: not a readable image" in out


def test_doctor_of_shards(tmp_path, rng, capsys):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        image = photo(rng)
        for name, data in (
            ("1.png", encode(image, "png")), ("1.cls", b"ant"),
            ("2.jpg", encode(image, "jpeg", quality=80)), ("2.cls", b"bee"),
            ("3.png", b"no image"), ("3.cls", b"bee"),
        ):  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    for flags in ([], ["--unlabelled"]):
        assert main([str(tmp_path / "a.tar"), "--duplicates", *flags]) == 1
        screen = " ".join(capsys.readouterr().out.split())
        assert "unreadable-image: 1 of 3" in screen
        assert "a.tar/2.jpg: as a.tar/1.png" in screen
    assert len(read_unlabelled(str(tmp_path / "a.tar"))) == 3
