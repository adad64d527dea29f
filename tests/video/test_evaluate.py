"""Figures of tracks beside a second implementation, and of alarms by hand."""

import numpy as np
import pytest
import scenes

from vision_jax.errors import UserError
from vision_jax.video import evaluate
from vision_jax.video.evaluate import NOBODY, Boxes, Interval, alarm_figures


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def hota_by_words(truth, found):
    """HOTA as its paper words it (Luiten et al. 2021, sections 5 and 8), with sets and no tricks.

    The alignment that picks among matchings is TrackEval's, which the paper leaves to it.
    """
    from scipy.optimize import linear_sum_assignment

    pairs, true_count, found_count = {}, {}, {}
    overlaps = {}
    for frame, other in found.items():
        own = truth.get(frame, evaluate.NOBODY)
        table = np.array([[iou(a, b) for b in other.boxes_xyxy_px] for a in own.boxes_xyxy_px])
        overlaps[frame] = table.reshape(len(own.ids), len(other.ids))
        for i in own.ids:
            true_count[i] = true_count.get(i, 0) + 1
        for j in other.ids:
            found_count[j] = found_count.get(j, 0) + 1
        for a, i in enumerate(own.ids):
            for b, j in enumerate(other.ids):
                s = overlaps[frame]
                whole = s[a].sum() + s[:, b].sum() - s[a, b]
                pairs[i, j] = pairs.get((i, j), 0) + (s[a, b] / whole if whole else 0)
    scores = []
    for alpha in np.arange(0.05, 0.99, 0.05):
        matches, misses, false = [], 0, 0
        for frame, other in found.items():
            own, s = truth.get(frame, evaluate.NOBODY), overlaps[frame]
            align = np.array([
                [pairs[i, j] / (true_count[i] + found_count[j] - pairs[i, j]) for j in other.ids]
                for i in own.ids
            ]).reshape(s.shape)  # fmt: skip
            rows, columns = linear_sum_assignment(-align * s) if s.size else ((), ())
            good = [
                (own.ids[a], other.ids[b])
                for a, b in zip(rows, columns, strict=True)
                if s[a, b] >= alpha - np.finfo(float).eps
            ]
            matches += good
            misses += len(own.ids) - len(good)
            false += len(other.ids) - len(good)
        total = 0.0
        for i, j in matches:
            both = sum(1 for pair in matches if pair == (i, j))
            total += both / (true_count[i] + found_count[j] - both)
        ass = total / max(len(matches), 1)
        det = len(matches) / (len(matches) + misses + false)
        scores.append((np.sqrt(ass * det), det, ass))
    return np.mean(scores, 0)


def test_hota_is_that_of_its_words(rng):
    pytest.importorskip("trackers", reason="the extra tracking")
    truth, found = scenes.sequences(rng)
    figures = evaluate.tracking_figures(truth, found)
    expected = hota_by_words(truth, found)
    ours = [figures[name] for name in ("hota", "deta", "assa")]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    assert 0.1 < figures["hota"] < 0.95
    assert figures["frames"] == 40


def test_perfect_tracks_and_frames_that_were_not_looked_at(rng):
    pytest.importorskip("trackers", reason="the extra tracking")
    truth, _ = scenes.sequences(rng)
    own = {frame: Boxes(boxes.ids + 7, boxes.boxes_xyxy_px) for frame, boxes in truth.items()}
    every_third = {frame: boxes for frame, boxes in own.items() if frame % 3 == 0}
    for found in (own, every_third):
        figures = evaluate.tracking_figures(truth, found)
        assert [figures[name] for name in ("mota", "idf1", "hota", "switches")] == [1, 1, 1, 0]
    with pytest.raises(UserError, match="no box in any frame"):
        evaluate.tracking_figures(truth, {1000: evaluate.NOBODY})


def test_files_of_tracks(tmp_path):
    from vision_jax.video.track import Track

    path = tmp_path / "gt.txt"
    path.write_text(
        "1,4,10,20,30,40,1,1,0.5\n1,5,10,20,30,40,0,1,1\n\n3,4,11.5,20,30,40\n"
        "3,4,50,60,10,20,0,8,1\n3,9,5,6,7,8,1,3,1\n"
    )
    read, others = evaluate.read_mot(path)
    assert set(read) == {0, 2}
    assert others[0].distractors.tolist() == [False]
    assert others[2].distractors.tolist() == [True, False]
    assert others[2].boxes_xyxy_px.tolist() == [[50, 60, 60, 80], [5, 6, 12, 14]]
    assert read[0].ids.tolist() == [4]
    assert read[2].boxes_xyxy_px.tolist() == [[11.5, 20, 41.5, 60]]
    track = Track(7, (11.5, 20, 41.5, 60), 0, 0.5, 1, 0, (0, 0))
    hidden = track._replace(id=8, unseen=0.5)
    evaluate.write_mot([(2, [track, hidden])], path)
    again = evaluate.read_mot(path).boxes
    assert (again[2].ids.tolist(), again[2].boxes_xyxy_px.tolist()) == ([7], [[11.5, 20, 41.5, 60]])


@pytest.mark.parametrize(
    "text",
    ["", "a,b,c\n", "1,2,3\n", "0,1,2,3,4,5\n", "1,1,2,3,0,5\n", "1,1,2,3,nan,5\n",
     "1,inf,2,3,4,5\n", "1,1,2,3,4,5,1,7,1\n", "1,1,2,3,4,5,1,inf\n",
     "1,1,2,3,4,5,1,-3.25,7.5,0\n", "1,1e300,2,3,4,5\n", "1e300,1,2,3,4,5\n", "x" * 200_000,
     "1,1,2,3,4,5\n1,1,2,3,4,5\n"],
)  # fmt: skip
def test_files_that_have_no_tracks(tmp_path, text):
    path = tmp_path / "gt.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=r"gt\.txt"):
        evaluate.read_mot(path)


def test_boxes_on_distractors_are_neither_right_nor_wrong():
    """By hand: one on a person, one on a statue, one on a car, and one that stands on nothing."""
    truth = evaluate.Truth(
        {0: Boxes(np.array([1]), np.array([[0.0, 0, 10, 20]]))},
        {0: evaluate.Others(
            np.array([[100.0, 0, 110, 20], [200, 0, 220, 20]]), np.array([True, False])
        )},
    )  # fmt: skip
    at = [[1.0, 0, 11, 20], [101, 0, 111, 20], [201, 0, 221, 20], [300, 0, 310, 20]]
    left = evaluate.without_distractors(truth, {0: Boxes(np.arange(4), np.array(at)), 5: NOBODY})
    assert left[0].ids.tolist() == [0, 2, 3]
    assert left[0].boxes_xyxy_px.tolist() == [at[0], at[2], at[3]]
    assert left[5] is NOBODY


def test_alarms_by_hand():
    true = [
        Interval("a", 10, 20),
        Interval("a", 30, 40),
        Interval("b", 5, 6),
        Interval("a", 90, 99),
    ]
    alarms = [("a", 12.0), ("a", 15.0), ("a", 28.5), ("a", 50.0), ("b", 5.5), ("c", 1.0)]
    figures = alarm_figures(true, alarms, ["a", "b", "c"], 3600.0, tolerance=2.0)
    a = figures["a"]
    assert (a["true"], a["alarms"], a["right"], a["repeats"]) == (3, 4, 2, 1)
    assert (a["precision"], a["recall"]) == (0.5, 2 / 3)
    assert (a["delay_median"], a["delay_max"], a["false_per_hour"]) == (0.25, 2.0, 2.0)
    assert (figures["c"]["precision"], figures["c"]["recall"]) == (0.0, None)
    assert (figures["all"]["right"], figures["all"]["alarms"]) == (3, 6)
    strict = alarm_figures(true, alarms, ["a"], 3600.0)["a"]
    assert (strict["right"], strict["repeats"]) == (1, 1)


def test_alarms_are_matched_as_well_as_can_be(rng):
    """As many pairs as a full assignment has, of intervals that overlap, too."""
    from scipy.optimize import linear_sum_assignment

    for _ in range(50):
        starts = np.sort(rng.uniform(0, 100, 6))
        true = [Interval("a", s, s + rng.uniform(1, 10)) for s in starts]
        alarms = rng.uniform(0, 110, 8)
        can = np.array([[i.start - 1 <= s <= i.end + 1 for s in alarms] for i in true])
        rows, columns = linear_sum_assignment(-can.astype(float))
        figures = alarm_figures(true, [("a", float(s)) for s in alarms], ["a"], 110.0, 1.0)
        assert figures["a"]["right"] == can[rows, columns].sum()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("start,end\n1,2\n", "rule,start,end"),
        ("rule,start,end\nlown,1,2\n", "did you mean `lawn`"),
        ("rule,start,end\nlawn,2,1\n", "is no time"),
        ("rule,start,end\nlawn,1,inf\n", "is no time"),
        ("rule,start,end\nlawn,1\n", "are seconds"),
    ],
)
def test_intervals_that_are_none(tmp_path, text, words):
    path = tmp_path / "true.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"true\.csv") as raised:
        evaluate.read_intervals(path, ["lawn"])
    assert words in str(raised.value)


def test_intervals_are_read(tmp_path):
    path = tmp_path / "true.csv"
    path.write_text("rule,start,end,who\nlawn,3,4,me\nlawn,1,2.5,you\n")
    assert evaluate.read_intervals(path, ["lawn"]) == [
        Interval("lawn", 1, 2.5),
        Interval("lawn", 3, 4),
    ]


def test_a_made_up_scene_is_tracked(tmp_path):
    """People who walk, whose boxes tremble and are missing now and then, measured from a log."""
    pytest.importorskip("trackers", reason="the extra tracking")
    import watch_kills

    watch_kills.write(tmp_path)
    from vision_jax.video.events import load_rules

    rules = load_rules(tmp_path)
    truth = {}
    ways = [
        scenes.walk((100 * k, 120 + 60 * k), (60 - 25 * k, 0), watch_kills.FRAMES) for k in range(5)
    ]
    for frame in range(watch_kills.FRAMES):
        boxes = scenes.found(*[(way[frame][0] % 640, *way[frame][1:]) for way in ways])
        # Who leaves at one side and comes back at the other is somebody else.
        ids = [100 * k + int(way[frame][0] // 640) + 50 for k, way in enumerate(ways)]
        truth[frame] = Boxes(np.array(ids), boxes.boxes_xyxy_px.astype(float))
    found = evaluate.seen(evaluate.tracks_of(tmp_path, rules), [0])
    figures = evaluate.tracking_figures(truth, found)
    assert figures["idf1"] > 0.9
    assert figures["mota"] > 0.85
    assert figures["switches"] <= 2
