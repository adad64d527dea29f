"""Tracks: the filter by dense matrices, the assignment by trying all, and identities."""

import dataclasses
import itertools
from fractions import Fraction

import numpy as np
import pytest
import scenes

from vision_jax.video import track

SETTINGS = track.Settings()


def run(frames, times, settings=SETTINGS):
    """The tracks of each frame."""
    state, tracks = track.init(), []
    for found, time in zip(frames, times, strict=True):
        state, seen = track.update(state, found, time, settings)
        tracks.append(seen)
    return tracks


def dense(steps, size):
    """The textbook's filter on 8 numbers: (seconds, cxcywh) -> states and covariances."""
    H = np.hstack([np.eye(4), np.zeros((4, 4))])
    P = np.diag(
        [(SETTINGS.position * size) ** 2] * 4
        + [(SETTINGS.speed * size * k) ** 2 for k in (1, 1, 0.3, 0.3)]
    )
    x = np.concatenate([steps[0][1], np.zeros(4)])
    yield x, P
    for seconds, box in steps[1:]:
        F = np.eye(8) + seconds * np.eye(8, k=4)
        block = [[seconds**3 / 3, seconds**2 / 2], [seconds**2 / 2, seconds]]
        Q = np.kron(block, np.eye(4)) * (SETTINGS.acceleration * size) ** 2
        x, P = F @ x, F @ P @ F.T + Q
        S = H @ P @ H.T + np.eye(4) * (SETTINGS.position * size) ** 2
        K = P @ H.T @ np.linalg.inv(S)
        x, P = x + K @ (box - H @ x), (np.eye(8) - K @ H) @ P
        size = np.sqrt(box[2] * box[3])
        yield x, P


def test_the_filter_is_that_of_dense_matrices(rng):
    box = np.array([100.0, 200.0, 30.0, 80.0])
    steps = [(0.0, box)]
    for _ in range(30):
        box = np.maximum(box + rng.normal(0, 3, 4), 10)
        steps.append((float(rng.uniform(0.02, 0.7)), box))
    settings = dataclasses.replace(SETTINGS, jump=1e9, growth=1e9)
    state = None
    for (seconds, box), (x, P) in zip(steps, dense(steps, np.sqrt(30 * 80)), strict=True):
        if state is None:
            first = scenes.Found(np.array([[85.0, 160.0, 115.0, 240.0]]), np.ones(1), np.zeros(1))
            state, _ = track.update(track.init(), first, Fraction(0), settings)
        else:
            state = track.predict(state, seconds, settings)
            state = track.correct(state, np.array([0]), box[None], settings)
        for ours, theirs in (
            (state.mean[0], x[:4]),
            (state.velocity[0], x[4:]),
            (state.var[0], np.diag(P)[:4]),
            (state.cov[0], np.diag(P[:4, 4:])),
            (state.var_velocity[0], np.diag(P)[4:]),
        ):
            np.testing.assert_allclose(
                ours, theirs, rtol=0, atol=1e-12 * max(abs(x).max(), P.max())
            )


def test_two_steps_are_one_of_their_sum(rng):
    state, _ = track.update(track.init(), scenes.found((100, 200, 30, 80, 0.9, 0)), Fraction(0))
    state = state._replace(velocity=rng.normal(0, 50, (1, 4)), cov=rng.normal(0, 1, (1, 4)))
    first, second = rng.uniform(0, 2, 2)
    twice = track.predict(track.predict(state, first, SETTINGS), second, SETTINGS)
    once = track.predict(state, first + second, SETTINGS)
    for name in ("mean", "velocity", "var", "cov", "var_velocity"):
        np.testing.assert_allclose(getattr(twice, name), getattr(once, name), rtol=1e-12)


def best_by_trying(distance):
    """The most that the pairs of any assignment can be worth."""
    rows, columns = distance.shape
    worth = np.maximum(track.GATE - distance, 0)
    padded = np.zeros((rows, columns + rows))
    padded[:, :columns] = worth
    ways = itertools.permutations(range(columns + rows), rows)
    return max(sum(padded[i, j] for i, j in enumerate(way)) for way in ways)


def test_the_assignment_is_the_best_of_all(rng):
    for _ in range(20):
        shape = rng.integers(1, 4, 2)
        distance = rng.uniform(0, 25, shape)
        distance[rng.random(shape) < 0.2] = np.inf
        rows, columns = track.assign(distance)
        assert len(set(rows.tolist())) == len(rows)
        assert len(set(columns.tolist())) == len(columns)
        assert (distance[rows, columns] < track.GATE).all()
        worth = (track.GATE - distance[rows, columns]).sum()
        np.testing.assert_allclose(worth, best_by_trying(distance), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rate", [2, 5, 10, 25])
@pytest.mark.parametrize("kept", ["float32", "float64"])
def test_a_person_who_is_hidden_for_ten_frames_stays_the_same(rng, rate, kept):
    """At each rate of frames, walking, among others who cross the way."""
    frames = 40
    person = scenes.walk((100, 200), (40, 0), frames, rate)
    other = scenes.walk((700, 260), (-40, 0), frames, rate)
    seen = []
    for i in range(frames):
        rows = [other[i]] + ([] if 15 <= i < 25 else [person[i]])
        boxes = scenes.found(*rows)
        noise = rng.normal(0, 1.5, boxes.boxes_xyxy_px.shape)
        seen.append(boxes._replace(boxes_xyxy_px=(boxes.boxes_xyxy_px + noise).astype(kept)))
    tracks = run(seen, scenes.times(frames, rate))
    assert sorted({one.id for frame in tracks for one in frame}) == [1, 2]
    x = {one.id: (one.box_xyxy_px[0] + one.box_xyxy_px[2]) / 2 for one in tracks[-1]}
    before = {one.id: (one.box_xyxy_px[0] + one.box_xyxy_px[2]) / 2 for one in tracks[14]}
    walker = min(before, key=before.get)
    assert abs(x[walker] - person[-1][0]) < 10


def test_people_who_cross_keep_their_identities(rng):
    frames = 60
    one, other = (
        scenes.walk((100, 200), (60, 0), frames),
        scenes.walk((460, 230), (-60, 0), frames),
    )
    seen = [scenes.found(a, b) for a, b in zip(one, other, strict=True)]
    tracks = run(seen, scenes.times(frames))
    ids = {t.id: t.box_xyxy_px[0] for t in tracks[2]}
    ended = {t.id: t.box_xyxy_px[0] for t in tracks[-1]}
    assert len(ids) == 2
    assert ended.keys() == ids.keys()
    assert (ids[1] < ids[2]) != (ended[1] < ended[2])


def test_a_box_that_jumps_is_nobody():
    """The person is hidden, and a false box comes up 300 pixels away: no track goes there."""
    person = scenes.walk((100, 200), (0, 0), 40)
    for hidden in (1, 5, 15):
        frames = [scenes.found(row) for row in person]
        for i in range(20, 20 + hidden):
            frames[i] = scenes.found()
        frames[20 + hidden - 1] = scenes.found((400, 200, 30, 80, 0.9, 0))
        tracks = run(frames, scenes.times(40))
        assert {one.id for frame in tracks for one in frame} == {1}
        assert all(one.box_xyxy_px[2] < 200 for frame in tracks for one in frame)


def test_classes_scores_and_lives():
    person = scenes.walk((100, 200), (0, 0), 60)
    low = [(*row[:4], 0.2, 0) for row in person]
    times = scenes.times(60)
    assert run([scenes.found(row) for row in low], times)[-1] == []  # begins nothing
    frames = [scenes.found(row) for row in person[:10] + low[10:]]
    assert [one.id for one in run(frames, times)[-1]] == [1]  # goes on
    dogs = [scenes.found((*row[:5], 2)) for row in person[30:]]
    last = run([scenes.found(row) for row in person[:30]] + dogs, times)[-1]
    assert [(one.id, one.label) for one in last] == [(2, 2)]
    gone = run([scenes.found(row) for row in person[:10]] + [scenes.found()] * 50, times)
    assert [len(frame) for frame in gone] == [0] * 2 + [1] * 28 + [0] * 30  # 2 s after frame 9


def test_boxes_that_are_none_are_left_out():
    rows = np.array([[1, 1, np.nan, 9], [5, 5, 5, 9], [9, 9, 1, 1], [1, 1, 30, 80]], np.float32)
    bad = scenes.Found(rows, np.full(4, 0.9, np.float32), np.zeros(4, np.int32))
    tracks = run([bad] * 4, scenes.times(4))
    assert len(tracks[-1]) == 1


def test_a_clock_that_jumps_ends_no_program():
    person = scenes.walk((100, 200), (0, 0), 8)
    times = [Fraction(0), Fraction(1, 10), Fraction(2, 10), Fraction(0), Fraction(1, 10)]
    times += [Fraction(10**6), Fraction(10**6) + 1, Fraction(10**6) + 2]
    tracks = run([scenes.found(row) for row in person], times)
    assert all(np.isfinite(one.box_xyxy_px).all() for frame in tracks for one in frame)


def test_update_changes_nothing_that_it_was_given():
    state = track.init()
    for row, time in zip(scenes.walk((100, 200), (9, 0), 6), scenes.times(6), strict=True):
        kept = [np.copy(part) for part in state[2:]]
        after, _ = track.update(state, scenes.found(row), time)
        for part, copy in zip(state[2:], kept, strict=True):
            np.testing.assert_array_equal(part, copy)
        state = after
