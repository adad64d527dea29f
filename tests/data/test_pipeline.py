import itertools
import threading

import grain
import numpy as np
import pytest
from PIL import Image

from vision_jax.data import decode
from vision_jax.data.pipeline import DamageLog, make_eval_batches, make_train_iterator
from vision_jax.data.sources import ArrayReader, Source, read_source
from vision_jax.data.transforms import Preprocessing, eval_transform
from vision_jax.errors import UserError

SMALL = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, 1.0, "bilinear", "squash")


def array_source(rng: np.random.Generator, count: int) -> Source:
    images = rng.integers(0, 256, (count, 12, 10, 3), np.uint8)
    labels = np.arange(count, dtype=np.int32) % 3
    reader = ArrayReader("random", images)
    return Source("random", ("a", "b", "c"), labels, np.arange(count), reader)


def train_iterator(source: Source, **changes) -> grain.DatasetIterator:
    arguments = {
        "batch_size": 4,
        "preprocessing": SMALL,
        "crop": "random_resized",
        "flip": True,
        "seed": 7,
        "num_threads": 2,
        "max_damaged": 0.0,
    }
    return make_train_iterator(source, **(arguments | changes))


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(iterator, count))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            assert np.array_equal(a[key], b[key]), key


def indices(batches) -> list[int]:
    return np.concatenate([batch["index"] for batch in batches]).tolist()


def test_batch_layout(rng):
    source = array_source(rng, 20)
    (batch,) = take(train_iterator(source), 1)
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert shapes == {
        "image": ((4, 8, 8, 3), "uint8"),
        "label": ((4,), "int32"),
        "index": ((4,), "int32"),
        "mask": ((4,), "bool"),
    }
    assert batch["mask"].all()
    assert np.array_equal(batch["label"], source.labels[batch["index"]])


@pytest.mark.parametrize("crop", ["random_resized", "pad", "none"])
def test_two_runs_are_equal_to_the_byte(crop, rng):
    source = array_source(rng, 30)
    runs = [take(train_iterator(source, crop=crop), 20) for _ in range(2)]
    assert_same(*runs)
    other = take(train_iterator(source, crop=crop, seed=8), 20)
    assert indices(other) != indices(runs[0])


def test_images_are_what_the_crop_says(rng):
    source = array_source(rng, 30)
    for batch in take(train_iterator(source, crop="none", flip=False), 5):
        for image, index in zip(batch["image"], batch["index"], strict=True):
            assert np.array_equal(image, eval_transform(source[index]["image"], SMALL))
    views = {
        image.tobytes()
        for batch in take(train_iterator(array_source(rng, 1), crop="pad"), 50)
        for image in batch["image"]
    }
    assert len(views) == 18  # one image, shifts of -1, 0, 1 each way, and mirrored
    with pytest.raises(UserError, match="use one of random_resized, pad, none"):
        train_iterator(source, crop="middle")


def test_each_epoch_has_each_example_once_in_another_order(rng):
    batches = take(train_iterator(array_source(rng, 22), batch_size=11), 6)
    epochs = [indices(batches[i : i + 2]) for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_threads_do_not_change_the_order(rng):
    source = array_source(rng, 30)
    runs = [take(train_iterator(source, num_threads=n), 20) for n in (1, 5)]
    assert_same(*runs)


@pytest.mark.long
def test_worker_processes_do_not_change_the_order_and_resume(tmp_path, rng):
    """Also: damaged images that workers met are counted on this side."""
    source = file_source(rng, tmp_path, 23, damaged=(3, 11))
    arguments = {"max_damaged": 0.5, "num_threads": 1}
    logs = [DamageLog(), DamageLog()]
    expected = take(train_iterator(source, damage_log=logs[0], **arguments), 14)
    workers = train_iterator(source, damage_log=logs[1], num_workers=2, **arguments)
    assert_same(take(workers, 14), expected)
    assert logs[0].names == logs[1].names
    assert logs[0].count == 2
    workers.close()
    later = train_iterator(source, num_workers=3, first_batch=7, **arguments)
    assert_same(take(later, 7), expected[7:])
    later.close()


@pytest.mark.parametrize("position", [0, 1, 3, 7, 8, 15])
def test_resume_is_exact_also_across_epochs(position, rng):
    source = array_source(rng, 30)  # an epoch is 7.5 batches
    whole = train_iterator(source)
    expected = take(whole, 20)
    resumed = train_iterator(source, first_batch=position)
    assert_same(take(resumed, 20 - position), expected[position:])


def test_processes_share_the_global_batches(rng):
    """The global batch, augmentation included, doesn't depend on how many processes read it."""
    source = array_source(rng, 23)
    single = take(train_iterator(source, batch_size=6), 12)
    parts = [
        take(train_iterator(source, batch_size=2, process_index=i, process_count=3), 12)
        for i in range(3)
    ]
    for step in range(12):
        for i in range(3):
            own = {key: value[2 * i : 2 * i + 2] for key, value in single[step].items()}
            assert_same([parts[i][step]], [own])


def test_images_are_not_decoded_on_the_training_thread(tmp_path, monkeypatch, rng):
    source = file_source(rng, tmp_path, 8)
    threads = set()
    real = decode.Image.open

    def spy(*args, **kwargs):
        threads.add(threading.get_ident())
        return real(*args, **kwargs)

    monkeypatch.setattr(decode.Image, "open", spy)
    take(train_iterator(source), 4)
    list(make_eval_batches(source, batch_size=4, preprocessing=SMALL, num_threads=2))
    assert threads
    assert threading.get_ident() not in threads


# --- damaged images -----------------------------------------------------------------------------


def file_source(
    rng: np.random.Generator, folder, count: int, damaged: tuple[int, ...] = ()
) -> Source:
    for i in range(count):
        path = folder / "data" / "ab"[i % 2] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(path)
        if i in damaged:
            path.write_bytes(path.read_bytes()[:100])
    return read_source(str(folder / "data"))


def test_damaged_images_are_replaced_counted_and_named(tmp_path, rng):
    source = file_source(rng, tmp_path, 20, damaged=(4, 5, 13))
    names = {f"{i:03}.png" for i in (4, 5, 13)}
    log = DamageLog()
    batches = take(train_iterator(source, max_damaged=0.15, damage_log=log), 15)  # 3 epochs
    assert {name[-7:] for name in log.names} == names
    for name, line in zip(log.names, log.lines, strict=True):
        assert line.startswith(f"{name}: not a readable image")
    assert log.count == 3
    assert 60 < log.seen < 90  # 3 of 20 met in each epoch, and some as replacements
    bad_rows = {i for i in range(20) if source.example_name(i)[-7:] in names}
    assert not bad_rows & set(indices(batches))
    assert all(batch["mask"].all() for batch in batches)
    # The others stand where they would stand without damage.
    order = indices(take(train_iterator(sound_twin(rng, source)), 15))
    for at, index in enumerate(order):
        if index not in bad_rows:
            assert indices(batches)[at] == index


def sound_twin(rng: np.random.Generator, source: Source) -> Source:
    """A sound source of the same length and labels."""
    count = len(source)
    images = rng.integers(0, 256, (count, 12, 10, 3), np.uint8)
    return Source(
        "sound", source.class_names, source.labels, np.arange(count), ArrayReader("", images)
    )


@pytest.mark.parametrize(("max_damaged", "least"), [(0.14, 3), (0.0, 1)])
def test_more_damaged_images_than_allowed_stop_the_run(tmp_path, max_damaged, least, rng):
    source = file_source(rng, tmp_path, 20, damaged=(4, 5, 13))
    log = DamageLog()
    with pytest.raises(UserError) as caught:
        take(train_iterator(source, max_damaged=max_damaged, damage_log=log), 10)
    message = str(caught.value)  # without the notes that grain adds
    assert message.startswith(f"{log.count} of 20 images were found damaged")
    assert f"{max_damaged:g} that config.data.max_damaged allows" in message
    assert log.names[-1] in message
    assert "\n" not in message
    assert least <= log.count <= 3


def test_nothing_but_damaged_images_stops_the_run(tmp_path, rng):
    source = file_source(rng, tmp_path, 6, damaged=tuple(range(6)))
    with pytest.raises(UserError, match="6 of 6 images"):
        take(train_iterator(source, max_damaged=1.0), 1)


# --- evaluation ---------------------------------------------------------------------------------


def eval_batches(source: Source, **changes) -> list[dict[str, np.ndarray]]:
    arguments = {"batch_size": 4, "preprocessing": SMALL, "num_threads": 2}
    return list(make_eval_batches(source, **(arguments | changes)))


def test_evaluation_order_and_padding(rng):
    source = array_source(rng, 10)
    batches = eval_batches(source)
    assert indices(batches) == [*range(10), -1, -1]
    masks = np.concatenate([batch["mask"] for batch in batches])
    assert masks.tolist() == [True] * 10 + [False] * 2
    for batch in batches:
        assert batch["image"].shape == (4, 8, 8, 3)
        for image, label, index in zip(batch["image"], batch["label"], batch["index"], strict=True):
            if index >= 0:
                assert np.array_equal(image, eval_transform(source[index]["image"], SMALL))
                assert label == source.labels[index]
    shapes = [{key: (v.shape, v.dtype) for key, v in batch.items()} for batch in batches]
    assert shapes == [shapes[0]] * 3


@pytest.mark.parametrize("count", [1, 4, 11, 12, 13, 24])
def test_evaluation_over_processes(count, rng):
    source = array_source(rng, count)
    parts = [eval_batches(source, process_index=i, process_count=3) for i in range(3)]
    assert len({len(part) for part in parts}) == 1
    seen = [
        index
        for part in parts
        for batch in part
        for index in batch["index"][batch["mask"]].tolist()
    ]
    assert sorted(seen) == list(range(count))


def test_evaluation_masks_and_names_damaged_images(tmp_path, rng):
    source = file_source(rng, tmp_path, 9, damaged=(4,))
    log = DamageLog()
    batches = eval_batches(source, damage_log=log)
    (row,) = (i for i in range(9) if source.example_name(i).endswith("004.png"))
    masks = np.concatenate([batch["mask"] for batch in batches])
    assert [i for i in range(9) if not masks[i]] == [row]
    assert indices(batches)[:9] == list(range(9))
    assert log.names == (source.example_name(row),)
    assert (log.count, log.seen) == (1, 9)
