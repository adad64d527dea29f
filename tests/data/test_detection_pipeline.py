import itertools
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.detection import DetectionSource, Ragged
from vision_jax.data.detection_pipeline import (
    make_detection_eval_batches,
    make_detection_train_iterator,
    note_crowded,
)
from vision_jax.data.detection_transforms import (
    DetectionAugmentation,
    DetectionPreprocessing,
    default_buckets,
    resized_size,
)
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.sources import FileReader
from vision_jax.errors import UserError

MEAN, STD = (0.5,) * 3, (0.5,) * 3
SMALL = DetectionPreprocessing(
    32, 53, False, "bilinear", MEAN, STD, ((32, 32), (32, 44), (44, 32), (32, 64), (64, 32))
)
ALL = DetectionAugmentation(
    shorts=(20, 26, 32), crop=0.5, brightness=0.3, contrast=0.3, saturation=0.3
)
PLAIN = DetectionAugmentation(flip=False)


@dataclass(frozen=True)
class ListReader:
    images: tuple[np.ndarray, ...]
    damaged: frozenset[int] = frozenset()

    def read(self, row: int) -> np.ndarray:
        if row in self.damaged:
            raise DamagedImageError(f"{self.example_name(row)}: damaged")
        return self.images[row]

    def example_name(self, row: int) -> str:
        return f"image {row}"


def random_source(
    rng: np.random.Generator, count: int, *, damaged=(), boxes: int = 6, sizes=None
) -> DetectionSource:
    sizes = rng.integers(12, 40, (count, 2)) if sizes is None else np.array(sizes)
    counts = rng.integers(0, boxes + 1, count)
    image = np.repeat(np.arange(count), counts)
    corners = np.sort(rng.uniform(0, 1, (len(image), 2, 2)), axis=1)  # [M, corner, xy]
    scaled = (corners * sizes[image][:, None, ::-1]).reshape(-1, 4)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return DetectionSource(
        "random",
        ("a", "b", "c"),
        (1, 2, 3),
        tuple(range(count)),
        tuple(f"{i}.png" for i in range(count)),
        sizes.astype(np.int32),
        Ragged(scaled, offsets),
        Ragged(rng.integers(0, 3, len(image)).astype(np.int32), offsets),
        Ragged(rng.random(len(image)) < 0.2, offsets),
        Ragged((scaled[:, 2:] - scaled[:, :2]).prod(1), offsets),
        np.arange(count),
        ListReader(
            tuple(rng.integers(1, 256, (*size, 3), np.uint8) for size in sizes), frozenset(damaged)
        ),
    )


def train_iterator(source, **changes):
    arguments = {
        "batch_size": 4,
        "preprocessing": SMALL,
        "augmentation": ALL,
        "max_boxes": 5,
        "seed": 7,
        "num_threads": 2,
        "max_damaged": 0.0,
    }
    return make_detection_train_iterator(source, **(arguments | changes))


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


def check_layout(batch, canvases, rows=4, boxes=5):
    assert batch["image"].shape[1:3] in canvases
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    del shapes["image"]
    assert shapes == {
        "size": ((rows, 2), "int32"),
        "boxes_cxcywh_01": ((rows, boxes, 4), "float32"),
        "label": ((rows, boxes), "int32"),
        "target_mask": ((rows, boxes), "bool"),
        "mask": ((rows,), "bool"),
        "index": ((rows,), "int32"),
    } | ({"original_size": ((rows, 2), "int32")} if "original_size" in batch else {})
    assert batch["image"].dtype == np.uint8
    for image, (height, width) in zip(batch["image"], batch["size"], strict=True):
        assert 0 < height <= image.shape[0]
        assert 0 < width <= image.shape[1]
        assert not image[height:].any()
        assert not image[:, width:].any()
    shares, mask = batch["boxes_cxcywh_01"], batch["target_mask"]
    assert not shares[~mask].any()
    assert not batch["label"][~mask].any()
    assert (shares[mask][:, 2:] > 0).all()
    assert (shares[..., :2] - shares[..., 2:] / 2 >= -1e-6).all()
    assert (shares[..., :2] + shares[..., 2:] / 2 <= 1 + 1e-6).all()


def test_fixed_shapes(rng):
    source = random_source(rng, 60)
    batches = take(train_iterator(source), 60)
    for batch in batches:
        check_layout(batch, SMALL.buckets)
        assert batch["mask"].all()
    assert len({batch["image"].shape for batch in batches}) > 1


def test_targets_are_those_of_the_source(rng):
    shapes = [(21, 21), (19, 25), (25, 19), (14, 30), (30, 14)]  # each a canvas of its own, filled
    source = random_source(rng, 40, sizes=rng.permutation(np.tile(shapes, (8, 1))))
    for batch in take(train_iterator(source, augmentation=PLAIN, max_boxes=9), 20):
        for row, index in enumerate(batch["index"]):
            size = resized_size(tuple(source.sizes[index]), SMALL)
            assert tuple(batch["size"][row]) == size
            counted = ~source.crowd[index]
            boxes = source.boxes_xyxy_px[index][counted]
            mask = batch["target_mask"][row]
            assert mask.tolist() == [True] * len(boxes) + [False] * (9 - len(boxes))
            assert batch["label"][row][mask].tolist() == source.label[index][counted].tolist()
            scale = np.tile(source.sizes[index][::-1], 2)
            expected = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
            np.testing.assert_allclose(
                batch["boxes_cxcywh_01"][row][mask],
                np.concatenate(expected, axis=1) / scale,
                rtol=0,
                atol=2e-7,
            )


def test_two_runs_and_thread_counts_are_equal_to_the_byte(rng):
    source = random_source(rng, 30)
    runs = [take(train_iterator(source, num_threads=n), 30) for n in (2, 2, 1, 5)]
    for run in runs[1:]:
        assert_same(runs[0], run)
    assert indices(take(train_iterator(source, seed=8), 30)) != indices(runs[0])


def test_processes_share_the_global_batches(rng):
    source = random_source(rng, 50)
    single = take(train_iterator(source, batch_size=6), 30)
    parts = [
        take(train_iterator(source, batch_size=2, process_index=i, process_count=3), 30)
        for i in range(3)
    ]
    for step in range(30):
        for i in range(3):
            own = {key: value[2 * i : 2 * i + 2] for key, value in single[step].items()}
            assert_same([parts[i][step]], [own])


@pytest.mark.parametrize("position", [0, 1, 7, 30, 161])
def test_resume_is_exact_also_across_periods(position, rng):
    source = random_source(rng, 41)  # a period is 164 batches
    expected = take(train_iterator(source), position + 8)
    resumed = train_iterator(source, first_batch=position)
    assert_same(take(resumed, 8), expected[position:])


def write_images(source: DetectionSource, folder, damaged=()) -> DetectionSource:
    """The same source, read from files."""
    for path, image in zip(source.paths, source.reader.images, strict=True):
        Image.fromarray(image).save(folder / path)
    for i in damaged:
        (folder / source.paths[i]).write_bytes(b"damaged")
    return replace(source, reader=FileReader(folder, source.paths))


@pytest.mark.long
def test_worker_processes_do_not_change_the_batches_and_resume(tmp_path, rng):
    """Also: damaged images that workers met are counted on this side."""
    source = write_images(random_source(rng, 23), tmp_path, damaged=(3, 11))
    arguments = {"num_threads": 1, "max_damaged": 0.5}
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


# --- order --------------------------------------------------------------------------------------


@pytest.mark.long
def test_no_image_is_starved_and_groups_get_their_share(rng):
    """Groups from tiny to large; counts over each epoch, three epochs, and a whole period."""
    sizes = [(24, 32)] * 50 + [(32, 24)] * 33 + [(32, 12)] * 8 + [(16, 32)] * 5
    source = random_source(rng, len(sizes), sizes=sizes)
    batches = take(train_iterator(source, augmentation=PLAIN), 2 * 16 * 96 // 4)
    for batch in batches:  # no batch mixes shapes
        assert len({tuple(source.sizes[index]) for index in batch["index"]}) == 1
    order = np.array(indices(batches)).reshape(2, 16, 96)
    by_period = np.stack([np.bincount(period.ravel(), minlength=96) for period in order])
    assert 15 <= by_period.min() <= by_period.max() <= 17
    for epoch in order.reshape(-1, 96):
        counts = np.bincount(epoch, minlength=96)
        assert counts.max() <= 3
        shares = [counts[start:stop].sum() for start, stop in ((0, 50), (50, 83), (83, 91))]
        assert np.abs(np.array(shares) - [50, 33, 8]).max() <= 9  # two batches and a bit
    for three in order.reshape(2, 16, 96)[:, :15].reshape(-1, 3 * 96):
        assert np.bincount(three, minlength=96).min() >= 1
    # Within its group an image comes again only after all the others.
    large = order.ravel()[order.ravel() < 50]
    for epoch in large[: len(large) // 50 * 50].reshape(-1, 50):
        assert sorted(epoch) == list(range(50))
    assert Counter(map(tuple, large.reshape(-1, 4))).most_common(1)[0][1] == 1  # other company


def test_images_go_to_the_canvas_of_their_shape(rng):
    source = random_source(rng, 300)
    for batch in take(train_iterator(source, augmentation=PLAIN), 40):
        canvas = batch["image"].shape[1:3]
        for size in batch["size"]:
            fitting = [b for b in SMALL.buckets if (size <= b).all()]
            assert canvas == min(fitting, key=np.prod)


def test_images_of_rare_shapes_join_another_group(rng):
    """Three of one shape don't fill a batch; they shrink into the canvas of the others."""
    source = random_source(rng, 40, sizes=[(24, 32)] * 37 + [(32, 12)] * 3)
    batches = take(train_iterator(source, augmentation=PLAIN), 30)
    assert {batch["image"].shape[1:3] for batch in batches} == {(32, 44)}
    seen = dict(
        zip(indices(batches), np.concatenate([batch["size"] for batch in batches]), strict=True)
    )
    assert set(seen) == set(range(40))
    assert {tuple(seen[i]) for i in range(37)} == {(32, 42)}
    assert {tuple(seen[i]) for i in range(37, 40)} == {(32, 12)}
    for batch in batches:
        assert len(set(batch["index"].tolist())) == 4
    few = take(train_iterator(random_source(rng, 2), batch_size=5, augmentation=PLAIN), 4)
    assert Counter(indices(few)) == {0: 10, 1: 10}


def test_the_short_side_is_drawn_for_a_batch_and_takes_the_smallest_canvas(rng):
    small = ((16, 32), (32, 16))
    preprocessing = replace(SMALL, buckets=SMALL.buckets + small)
    augmentation = replace(PLAIN, shorts=(14, 30, 32))
    source = random_source(rng, 60, sizes=[(24, 32)] * 30 + [(32, 24)] * 30)
    found = Counter()
    for batch in take(
        train_iterator(source, preprocessing=preprocessing, augmentation=augmentation), 90
    ):
        shorts = set(batch["size"].min(1).tolist())
        assert len(shorts) == 1
        found[shorts.pop(), batch["image"].shape[1:3]] += 1
    canvases = {14: small, 30: ((32, 44), (44, 32)), 32: ((32, 44), (44, 32))}
    assert set(found) == {(short, canvas) for short, two in canvases.items() for canvas in two}
    assert min(found.values()) >= 4  # of 15 expected


def test_square_images_fill_their_canvas(rng):
    square = DetectionPreprocessing(
        24, 24, True, "bilinear", MEAN, STD, ((16, 16), (24, 24), (32, 32))
    )
    augmentation = DetectionAugmentation(shorts=(16, 24, 32), crop=0.5)
    source = random_source(rng, 30)
    batches = take(train_iterator(source, preprocessing=square, augmentation=augmentation), 30)
    for batch in batches:
        assert (batch["size"] == batch["image"].shape[1:3]).all()
    assert {batch["image"].shape[1] for batch in batches} == {16, 24, 32}
    (first, *_) = make_detection_eval_batches(
        source, batch_size=4, preprocessing=square, max_boxes=5, num_threads=1
    )
    assert first["image"].shape == (4, 24, 24, 3)
    with pytest.raises(UserError, match=r"square images of 40 need the bucket \(40, 40\)"):
        train_iterator(
            source, preprocessing=square, augmentation=replace(augmentation, shorts=(16, 40))
        )


# --- targets ------------------------------------------------------------------------------------


def test_the_largest_boxes_are_kept(rng):
    source = random_source(rng, 30, boxes=12)
    counts = [int((~crowd).sum()) for crowd in source.crowd]
    crowded = sum(count > 5 for count in counts)
    assert crowded
    note = note_crowded(source, 5).note
    assert note.startswith(f"random: {crowded} images have more than 5 boxes, up to {max(counts)}:")
    assert note_crowded(replace(source, note="random: x"), 5).note == f"random: x;{note[7:]}"
    assert note_crowded(source, 12) is source
    for batch in take(train_iterator(source, augmentation=PLAIN), 15):
        for row, index in enumerate(batch["index"]):
            counted = ~source.crowd[index]
            boxes, label = source.boxes_xyxy_px[index][counted], source.label[index][counted]
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            largest = areas >= np.sort(areas)[-5:].min(initial=np.inf)
            mask = batch["target_mask"][row]
            assert mask.sum() == min(len(boxes), 5)
            assert batch["label"][row][mask].tolist() == label[largest].tolist()
    with pytest.raises(UserError, match="max_boxes 0: use 1 or more"):
        train_iterator(source, max_boxes=0)


# --- damaged images -----------------------------------------------------------------------------


def test_damaged_images_are_replaced_counted_and_named(rng):
    source = random_source(rng, 40)
    broken = replace(source, reader=replace(source.reader, damaged=frozenset({4, 11})))
    log = DamageLog()
    batches = take(train_iterator(broken, max_damaged=0.05, damage_log=log), 30)
    assert set(log.names) == {"image 4", "image 11"}
    assert not {4, 11} & set(indices(batches))
    for damaged, sound in zip(batches, take(train_iterator(source), 30), strict=True):
        kept = ~np.isin(sound["index"], [4, 11])  # the others stand where they stood
        for key in sound:
            assert np.array_equal(damaged[key][kept], sound[key][kept]), key
    with pytest.raises(UserError, match="2 of 40 images were found damaged"):
        take(train_iterator(broken, max_damaged=0.04), 30)
    lost = replace(source, reader=replace(source.reader, damaged=frozenset(range(40))))
    with pytest.raises(UserError, match="images were found damaged"):
        take(train_iterator(lost, max_damaged=1.0), 1)


# --- evaluation ---------------------------------------------------------------------------------


def eval_batches(source, **changes):
    arguments = {"batch_size": 4, "preprocessing": SMALL, "max_boxes": 5, "num_threads": 2}
    return list(make_detection_eval_batches(source, **(arguments | changes)))


def test_evaluation_has_every_image_once_on_its_canvas(rng):
    source = random_source(rng, 43)
    batches = eval_batches(source)
    seen = [i for batch in batches for i in batch["index"][batch["mask"]].tolist()]
    assert sorted(seen) == list(range(43))
    canvases = [batch["image"].shape[1:3] for batch in batches]
    assert len(list(itertools.groupby(canvases))) == len(set(canvases)) > 1
    for batch in batches:
        check_layout(batch, SMALL.buckets)
        assert (batch["mask"] == (batch["index"] >= 0)).all()
        for row in np.flatnonzero(batch["mask"]):
            index = batch["index"][row]
            assert tuple(batch["original_size"][row]) == tuple(source.sizes[index])
            size = resized_size(tuple(source.sizes[index]), SMALL)
            assert tuple(batch["size"][row]) == size
            image = Image.fromarray(source[index]["image"]).resize(size[::-1], Image.BILINEAR)
            assert np.array_equal(batch["image"][row][: size[0], : size[1]], np.asarray(image))
            assert batch["target_mask"][row].sum() == min((~source.crowd[index]).sum(), 5)
    assert sum(not batch["mask"].all() for batch in batches) <= len(set(canvases))


@pytest.mark.parametrize("count", [1, 4, 25])
def test_evaluation_over_processes(count, rng):
    source = random_source(rng, count)
    parts = [eval_batches(source, process_index=i, process_count=3) for i in range(3)]
    shapes = [[batch["image"].shape for batch in part] for part in parts]
    assert shapes[0] == shapes[1] == shapes[2]
    seen = [i for part in parts for b in part for i in b["index"][b["mask"]].tolist()]
    assert sorted(seen) == list(range(count))


def test_evaluation_masks_and_names_damaged_images(rng):
    source = random_source(rng, 10, damaged=(6,))
    log = DamageLog()
    batches = eval_batches(source, damage_log=log)
    rows = [(i, m) for b in batches for i, m in zip(b["index"], b["mask"], strict=True)]
    assert sorted(i for i, _ in rows if i >= 0) == list(range(10))
    assert [i for i, mask in rows if i >= 0 and not mask] == [6]
    assert log.names == ("image 6",)
    assert (log.count, log.seen) == (1, 10)


def test_default_buckets_show_every_image_at_the_size_that_the_rule_gives(rng):
    preprocessing = replace(SMALL, short=40, longest=67, buckets=default_buckets(40, 67, 4))
    source = random_source(rng, 60, sizes=rng.integers(10, 120, (60, 2)))
    for batch in eval_batches(source, preprocessing=preprocessing):
        for index, size in zip(batch["index"], batch["size"], strict=True):
            if index >= 0:
                assert tuple(size) == resized_size(tuple(source.sizes[index]), preprocessing)
