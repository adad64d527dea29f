"""The filter beside filterpy's and `trackers`', and figures of tracks beside motmetrics'."""

import numpy as np
import pytest
import scenes

from vision_jax.video import evaluate, track

filterpy = pytest.importorskip("filterpy.kalman")
trackers = pytest.importorskip("trackers")
motmetrics = pytest.importorskip("motmetrics")

SETTINGS = track.Settings()


def filterpy_filter(size):
    one = filterpy.KalmanFilter(8, 4)
    return one, ("x", "P", "F", "Q", "H", "R")


def trackers_filter(size):
    from trackers.utils.kalman_filter import KalmanFilter

    names = ("state", "state_covariance", "transition_mtx", "process_noise", "observation_mtx")
    return KalmanFilter(8, 4), (*names, "measurement_noise")


@pytest.mark.parametrize("make", [filterpy_filter, trackers_filter])
def test_the_filter_over_100_uneven_steps(rng, make):
    """In float64, to 1e-12 of the largest; the noise is a continuous white acceleration's."""
    box = np.array([300.0, 200.0, 40.0, 90.0])
    size = np.sqrt(box[2] * box[3])
    theirs, (x, P, F, Q, H, R) = make(size)
    spread = SETTINGS.speed * size * np.array([1, 1, 0.3, 0.3])
    setattr(theirs, x, np.concatenate([box, np.zeros(4)])[:, None])
    setattr(theirs, P, np.diag([*[(SETTINGS.position * size) ** 2] * 4, *spread**2]))
    setattr(theirs, H, np.hstack([np.eye(4), np.zeros((4, 4))]))
    none = np.zeros(1, np.int64)
    state = track.State(
        None, 1, none, none, *[np.zeros(1)] * 3, none, none, np.array([size]), box[None],
        np.zeros((1, 4)), np.full((1, 4), (SETTINGS.position * size) ** 2), np.zeros((1, 4)),
        spread[None] ** 2,
    )  # fmt: skip
    for step in range(100):
        seconds = float(rng.uniform(0.01, 0.5))
        setattr(theirs, F, np.eye(8) + seconds * np.eye(8, k=4))
        block = filterpy_noise(seconds) * (SETTINGS.acceleration * size) ** 2
        setattr(theirs, Q, np.kron(block, np.eye(4)))
        setattr(theirs, R, np.eye(4) * (SETTINGS.position * size) ** 2)
        theirs.predict()
        state = track.predict(state, seconds, SETTINGS)
        if step % 7 < 5:  # hidden now and then
            box = np.maximum(box + rng.normal(0, 4, 4), 10)
            theirs.update(box[:, None])
            state = track.correct(state, np.array([0]), box[None], SETTINGS)
            size = np.sqrt(box[2] * box[3])
        mean, spread = getattr(theirs, x)[:, 0], getattr(theirs, P)
        ours = np.concatenate([state.mean[0], state.velocity[0]])
        np.testing.assert_allclose(ours, mean, rtol=0, atol=1e-12 * np.abs(mean).max())
        table = np.block([
            [np.diag(state.var[0]), np.diag(state.cov[0])],
            [np.diag(state.cov[0]), np.diag(state.var_velocity[0])],
        ])  # fmt: skip
        np.testing.assert_allclose(table, spread, rtol=0, atol=1e-12 * np.abs(spread).max())


def filterpy_noise(seconds):
    from filterpy.common import Q_continuous_white_noise

    return Q_continuous_white_noise(2, seconds, 1.0)


def test_mota_and_idf1_beside_motmetrics(rng):
    truth, found = scenes.sequences(rng, frames=80)
    ours = evaluate.tracking_figures(truth, found)
    account = motmetrics.MOTAccumulator(auto_id=True)
    for frame in sorted(found):
        own = truth[frame]
        distance = 1 - evaluate.pairwise_iou(own.boxes_xyxy_px, found[frame].boxes_xyxy_px)
        distance[distance > 1 - evaluate.IOU] = np.nan
        account.update(own.ids, found[frame].ids, distance)
    names = ["mota", "idf1", "precision", "recall", "num_switches"]
    theirs = motmetrics.metrics.create().compute(account, metrics=names).iloc[0]
    assert ours["idf1"] == pytest.approx(theirs["idf1"], abs=1e-12)
    # motmetrics prefers pairs that were there before, over frames without one and at the cost of
    # others; TrackEval only those of the frame before. So a pair or a switch in hundreds differs.
    count = sum(len(truth[frame].ids) for frame in found)
    for name in ("precision", "recall"):
        assert ours[name] == pytest.approx(theirs[name], abs=3.5 / count), name
    more = ours["switches"] - theirs["num_switches"]
    assert ours["mota"] + more / count == pytest.approx(theirs["mota"], abs=7 / count)
    assert abs(more) <= 10


def test_mot_files_are_measured_as_trackers_does(rng, tmp_path):
    """Whole files, with distractors, classes that don't count and rows whose confidence is 0."""
    from trackers.eval import evaluate_mot_sequence

    truth, found = scenes.sequences(rng, frames=60, people=9)
    own, tracks = tmp_path / "gt.txt", tmp_path / "tracks.txt"
    for path, boxes in ((own, truth), (tracks, found)):
        with path.open("w") as file:
            for frame, (ids, corners) in boxes.items():
                for i, (left, top, right, bottom) in zip(ids, corners.tolist(), strict=True):
                    kind = (1, 7, 8, 3, 2, 12)[i % 6] if path == own and i % 2 else 1
                    counts = int(kind == 1 and i % 10 != 4)
                    row = frame + 1, i, left, top, right - left, bottom - top, counts, kind, 1
                    file.write(",".join(map(str, row)) + "\n")
    theirs = evaluate_mot_sequence(own, tracks, ["CLEAR", "HOTA", "Identity"])
    read = evaluate.read_mot(own)
    assert any(one.distractors.any() for one in read.others.values())
    kept = evaluate.without_distractors(read, found)
    counts = [sum(len(one.ids) for one in boxes.values()) for boxes in (found, kept)]
    assert counts[0] - counts[1] > 20
    ours = evaluate.tracking_figures(read.boxes, kept)
    wanted = {"mota": theirs.CLEAR.MOTA, "idf1": theirs.Identity.IDF1, "hota": theirs.HOTA.HOTA}
    wanted |= {"recall": theirs.CLEAR.CLR_Re, "precision": theirs.CLEAR.CLR_Pr}
    for name, value in wanted.items():
        assert ours[name] == pytest.approx(value, abs=1e-12), name
