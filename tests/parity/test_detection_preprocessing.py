"""Sizes, pixels, masks and boxes of evaluation images against transformers' image processors."""

import numpy as np
import pytest
from PIL import Image
from transformers import DetrImageProcessorPil, RfDetrImageProcessor
from transformers.image_transforms import get_size_with_aspect_ratio

from vision_jax.data.detection import DetectionSource, Ragged
from vision_jax.data.detection_pipeline import make_detection_eval_batches
from vision_jax.data.detection_transforms import (
    DetectionPreprocessing,
    default_buckets,
    resized_size,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ListReader:
    def __init__(self, images):
        self.images = images

    def read(self, row):
        return self.images[row]

    def example_name(self, row):
        return f"image {row}"


def random_source(rng: np.random.Generator, sizes) -> tuple[DetectionSource, list[dict]]:
    """A source with crowds, and boxes over the border; and the same as COCO annotations."""
    images, annotations, parts = [], [], []
    for i, (height, width) in enumerate(sizes):
        coarse = rng.integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
        images.append(np.asarray(image))
        count = int(rng.integers(0, 5))
        x, y = rng.uniform(0, [width, height], (count, 2)).T
        w, h = rng.uniform(1, [width / 2, height / 2], (count, 2)).T
        label, crowd = rng.integers(0, 3, count), rng.random(count) < 0.2
        rows = zip(x, y, w, h, label, crowd, strict=True)
        annotations.append(
            {
                "image_id": i,
                "annotations": [
                    {
                        "bbox": [float(a), float(b), float(c), float(d)],
                        "category_id": int(k),
                        "iscrowd": int(many),
                        "area": float(c * d),
                    }
                    for a, b, c, d, k, many in rows
                ],
            }
        )
        corners = np.clip(np.stack([x, y, x + w, y + h], 1), 0, [width, height, width, height])
        parts.append((corners, label.astype(np.int32), crowd, w * h))
    offsets = np.concatenate([[0], np.cumsum([len(part[1]) for part in parts])])
    boxes, labels, crowds, areas = (
        Ragged(np.concatenate(column), offsets) for column in zip(*parts, strict=True)
    )
    count = len(sizes)
    source = DetectionSource(
        "random", ("a", "b", "c"), (0, 1, 2), tuple(range(count)),
        tuple(f"{i}.png" for i in range(count)), np.array(sizes, np.int32),
        boxes, labels, crowds, areas, np.arange(count), ListReader(images),
    )  # fmt: skip
    return source, annotations


def eval_rows(source, preprocessing):
    for batch in make_detection_eval_batches(
        source, batch_size=2, preprocessing=preprocessing, max_boxes=8, num_threads=1
    ):
        for row in np.flatnonzero(batch["mask"]):
            yield {key: value[row] for key, value in batch.items()}


@pytest.mark.parametrize(("short", "longest"), [(800, 1333), (480, 640), (600, 1000), (97, 161)])
def test_sizes(short, longest, rng):
    """Every size up to 60 × 60, and random ones up to 5000."""
    preprocessing = DetectionPreprocessing(
        short, longest, False, "bilinear", MEAN, STD, default_buckets(short, longest, 4)
    )
    small = [(h, w) for h in range(1, 61) for w in range(1, 61)]
    around = [(short + i, longest + j) for i in range(-3, 4) for j in range(-3, 4)]
    large = [tuple(row) for row in rng.integers(1, 5000, (20_000, 2)).tolist()]
    for size in small + around + large:
        theirs = get_size_with_aspect_ratio(size, short, longest)
        ours = resized_size(size, preprocessing)
        if max(theirs) > longest:  # a size that transformers leaves alone, though it is too long
            assert theirs == size
            assert min(ours) == min(size)
            assert longest - 1 <= max(ours) <= longest  # rounded down
        elif min(theirs) > 0:  # transformers fails on the others
            assert ours == theirs, size


@pytest.mark.parametrize(("short", "longest"), [(160, 266), (96, 128)])
def test_detr(short, longest, rng):
    """Bit-identical pixels before normalization, the mask, labels and boxes."""
    size = {"shortest_edge": short, "longest_edge": longest}
    raw = DetrImageProcessorPil(size=size, do_rescale=False, do_normalize=False)
    whole = DetrImageProcessorPil(size=size)
    preprocessing = DetectionPreprocessing(
        short, longest, False, "bilinear", MEAN, STD, default_buckets(short, longest, 4)
    )
    sizes = [(120, 160), (160, 120), (99, 301), (301, 40), (33, 33), (400, 700), (short, 3 * short)]
    source, annotations = random_source(rng, sizes)
    seen = 0
    for ours in eval_rows(source, preprocessing):
        index = int(ours["index"])
        image = Image.fromarray(source[index]["image"])
        height, width = ours["size"]
        pixels = raw(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert pixels.shape == (height, width, 3)
        assert np.array_equal(ours["image"][:height, :width], pixels)
        theirs = whole(
            image,
            annotations=annotations[index],
            pad_size={"height": ours["image"].shape[0], "width": ours["image"].shape[1]},
            return_tensors="np",
        )
        pixel_mask = np.arange(ours["image"].shape[0])[:, None] < height
        pixel_mask = pixel_mask & (np.arange(ours["image"].shape[1]) < width)
        assert np.array_equal(theirs["pixel_mask"][0], pixel_mask)
        normalized = (ours["image"].astype(np.float64) / 255 - MEAN) / STD * pixel_mask[..., None]
        np.testing.assert_allclose(
            theirs["pixel_values"][0].transpose(1, 2, 0), normalized, rtol=0, atol=2e-6
        )
        labels = theirs["labels"][0]
        mask = ours["target_mask"]
        assert ours["label"][mask].tolist() == labels["class_labels"].tolist()
        assert ours["original_size"].tolist() == labels["orig_size"].tolist()
        # transformers' boxes are relative to the padded image; DETR's own are to the valid one.
        canvas = np.tile(np.array(ours["image"].shape[1::-1]) / [width, height], 2)
        np.testing.assert_allclose(
            ours["boxes_cxcywh_01"][mask],
            labels["boxes"].reshape(-1, 4) * canvas,
            rtol=0,
            atol=5e-7,
        )
        seen += 1
    assert seen == len(sizes)


def test_rf_detr(rng):
    """Square, bilinear without antialiasing; transformers computes in floats, the host in bytes."""
    processor = RfDetrImageProcessor(size={"height": 96, "width": 96}, do_normalize=False)
    preprocessing = DetectionPreprocessing(96, 96, True, "bilinear_aliased", MEAN, STD, ((96, 96),))
    source, _ = random_source(rng, [(120, 160), (50, 31), (300, 90), (96, 96)])
    for ours in eval_rows(source, preprocessing):
        image = Image.fromarray(source[int(ours["index"])]["image"])
        pixels = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert ours["size"].tolist() == [96, 96]
        assert (
            np.abs(ours["image"] - 255 * pixels.astype(float)).max() <= 0.51
        )  # positions are float32 there
