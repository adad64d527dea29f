"""Reports of volumes: ml and parts counted by hand, and the best window by trying all."""

import json

import numpy as np
import pytest
from segmentation_runs import volumes

from vision_jax.data.segmentation import read_segmentation_source
from vision_jax.tasks.segmentation.cases import (
    CaseTally,
    best_window,
    measure_classes,
    window_iou,
    write_cases,
)

pytest.importorskip("nibabel")


def test_volumes_and_parts():
    """Two parts across slices, one voxel apart; ignored voxels count nowhere."""
    label = np.zeros((3, 4, 5), np.uint8)
    label[:, :2, :2] = 1
    label[0, 3, 4] = 255
    prediction = np.zeros_like(label)
    prediction[:2, :2, :2] = 1
    prediction[2, 3, 3] = prediction[0, 3, 4] = 1
    found = measure_classes(prediction, label, ("outside", "in", "none"), 0.5)
    assert found["in"] == {
        "voxels": 9, "true_voxels": 12, "volume_ml": 4.5, "true_volume_ml": 6.0,
        "dice": 2 * 8 / (9 + 12), "parts": 2, "largest_part_ml": 4.0, "largest_part_share": 8 / 9,
    }  # fmt: skip
    assert found["none"]["dice"] is None
    assert found["none"]["parts"] == 0
    unknown = measure_classes(prediction, label, ("outside", "in"), None)["in"]
    assert unknown["volume_ml"] is unknown["largest_part_ml"] is None
    assert unknown["voxels"] == 9
    alone = measure_classes(prediction, None, ("outside", "in"), 0.5)["in"]
    assert (alone["voxels"], "dice" in alone) == (10, False)


def test_the_best_window_of_all(rng):
    """Against trying all 32,896 windows of a histogram."""
    for _ in range(3):
        counts = rng.integers(0, 50, (2, 256))
        counts[1, 100:180] += 200
        low, high = best_window(counts)
        inside = counts[1].sum()
        highest = 0.0
        for first in range(256):
            within = np.cumsum(counts[:, first:], 1)
            highest = max(highest, float((within[1] / (inside + within[0])).max()))
        assert window_iou(counts, low, high) == pytest.approx(highest, rel=1e-12)


def test_one_report_for_each_volume(tmp_path, rng):
    """In whatever plane; true masks as predictions have Dice 1 and the volume that was drawn."""
    folder = volumes(tmp_path, rng)
    for plane in ("axial", "sagittal"):
        source = read_segmentation_source(f"volumes:{folder}?plane={plane}")
        tally = CaseTally(source)
        masks = [source.mask(row) for row in range(len(source))]
        for row, mask in enumerate(masks):
            tally.add(row, mask, mask)
        reports = tally.reports()
        assert [report["case"] for report in reports] == ["p0", "p1"]
        total = sum(report["classes"]["ball"]["volume_ml"] for report in reports)
        assert total == pytest.approx(sum(int((mask == 1).sum()) for mask in masks) * 6 / 1000)
        assert {report["classes"]["ball"]["dice"] for report in reports} == {1.0}
        assert reports[0]["classes"]["ball"]["parts"] == 1
    assert reports[1]["spacing_mm"] == [1.0, 3.0, 2.0]


def test_slices_that_are_missing_part_what_they_part(tmp_path, rng):
    folder = volumes(tmp_path, rng, patients=1)
    source = read_segmentation_source(f"volumes:{folder}?slices=3:5,7:9")
    tally = CaseTally(source)
    for row in range(len(source)):
        tally.add(row, source.mask(row), source.mask(row))
    [report] = tally.reports()
    assert report["classes"]["ball"]["parts"] == 2
    assert (report["slices"], report["slices_evaluated"]) == ([3, 8], 4)


def test_files_of_a_case(tmp_path, rng):
    """Names of volumes become names of files, whatever they hold."""
    source = read_segmentation_source(f"volumes:{volumes(tmp_path / 'data', rng, 1)}")
    tally = CaseTally(source)
    for row in range(len(source)):
        tally.add(row, source.mask(row), source.mask(row))
    [report] = tally.reports()
    odd = report | {"case": "../a\n$x"}
    odd["classes"] = {"ball": report["classes"]["ball"] | {"volume_ml": None, "parts": 0}}
    odd["pictures"] = [source.reader.read(place) for *_, place in report["strip"]]
    write_cases([odd], tmp_path / "cases")
    [record, picture] = sorted((tmp_path / "cases").iterdir())
    assert record.name == "0000_.._a__x.json"
    assert json.loads(record.read_text())["slices"] == [0, 11]
    assert picture.stat().st_size > 5000
