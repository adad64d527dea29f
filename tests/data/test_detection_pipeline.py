import itertools
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.detection import DetectionSource, Ragged
from vision_jax.data.detection_pipeline import (
    make_detection_train_iterator,
)
from vision_jax.data.detection_transforms import (
    DetectionAugmentation,
    DetectionPreprocessing,
    resized_size,
)
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.sources import FileReader

rng = np.random.default_rng()
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


def random_source(count: int, *, damaged=(), boxes: int = 6, sizes=None) -> DetectionSource:
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


def test_fixed_shapes():
    source = random_source(60)
    batches = take(train_iterator(source), 60)
    for batch in batches:
        check_layout(batch, SMALL.buckets)
        assert batch["mask"].all()
    assert len({batch["image"].shape for batch in batches}) > 1


def test_targets_are_those_of_the_source():
    source = random_source(40)
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


def test_two_runs_and_thread_counts_are_equal_to_the_byte():
    source = random_source(30)
    runs = [take(train_iterator(source, num_threads=n), 30) for n in (2, 2, 1, 5)]
    for run in runs[1:]:
        assert_same(runs[0], run)
    assert indices(take(train_iterator(source, seed=8), 30)) != indices(runs[0])


def test_processes_share_the_global_batches():
    source = random_source(50)
    single = take(train_iterator(source, batch_size=6), 30)
    parts = [
        take(train_iterator(source, batch_size=2, process_index=i, process_count=3), 30)
        for i in range(3)
    ]
    for step in range(30):
        for i in range(3):
            own = {key: value[i::3] for key, value in single[step].items()}
            assert_same([parts[i][step]], [own])


@pytest.mark.parametrize("position", [0, 1, 7, 30, 161])
def test_resume_is_exact_also_across_periods(position):
    source = random_source(41)  # a period is 164 batches
    expected = take(train_iterator(source), position + 8)
    interrupted = train_iterator(source)
    take(interrupted, position)
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = train_iterator(source)
    resumed.set_state(state)
    assert_same(take(resumed, 8), expected[position:])


def write_images(source: DetectionSource, folder, damaged=()) -> DetectionSource:
    """The same source, read from files."""
    for path, image in zip(source.paths, source.reader.images, strict=True):
        Image.fromarray(image).save(folder / path)
    for i in damaged:
        (folder / source.paths[i]).write_bytes(b"damaged")
    return replace(source, reader=FileReader(folder, source.paths))


def test_worker_processes_do_not_change_the_batches_and_resume(tmp_path):
    """Also: damaged images that workers met are counted on this side."""
    source = write_images(random_source(23), tmp_path, damaged=(3, 11))
    arguments = {"num_threads": 1, "max_damaged": 0.5}
    logs = [DamageLog(), DamageLog()]
    expected = take(train_iterator(source, damage_log=logs[0], **arguments), 14)
    workers = train_iterator(source, damage_log=logs[1], num_workers=2, **arguments)
    assert_same(take(workers, 7), expected[:7])
    state = json.loads(json.dumps(workers.get_state()))
    assert_same(take(workers, 7), expected[7:])
    assert logs[0].names == logs[1].names
    assert logs[0].count == 2
    workers.set_state(state)
    assert_same(take(workers, 7), expected[7:])
    workers.close()
