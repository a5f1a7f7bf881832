"""Pathfinder: geometry of the curves, meaning of the label, and independence of the processes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hf_hybrid.data.lra_pathfinder import (
    PathfinderSettings,
    draw_pathfinder,
    generate_pathfinder,
    pathfinder_settings,
)

EASY = pathfinder_settings(32, "easy")


@pytest.fixture(scope="module")
def scenes():
    return [draw_pathfinder(index, seed=5, settings=EASY) for index in range(24)]


def test_the_label_says_whether_one_curve_joins_the_markers(scenes):
    for scene in scenes:
        first, last = scene.markers
        beginnings = [curve[0][0] for curve in scene.targets]
        ends = [curve[-1][1] for curve in scene.targets]
        assert (beginnings.index(first) == ends.index(last)) == bool(scene.label)
    labels = [scene.label for scene in scenes]
    assert 4 <= sum(labels) <= 20


def test_curves_have_their_dashes_without_gaps(scenes):
    for scene in scenes:
        assert [len(curve) for curve in scene.targets] == [6, 6]
        assert all(len(curve) == 2 for curve in scene.distractors)
        assert len(scene.distractors) > 0
        for curve in (*scene.targets, *scene.distractors):
            for tail, head in curve:
                assert 0 <= min(*tail, *head) and max(*tail, *head) < 32
                assert 1.0 <= np.hypot(*np.subtract(head, tail)) <= 3.0  # two pixels, rounded
            for (_, head), (tail, _) in zip(curve, curve[1:]):
                assert 1.0 <= np.hypot(*np.subtract(tail, head)) <= 4.3  # two margins, rounded


def test_different_curves_do_not_touch(scenes):
    for scene in scenes:
        curves = (*scene.targets, *scene.distractors)
        for number, curve in enumerate(curves):
            for other in curves[number + 1 :]:
                points = [np.array([p for dash in dashes for p in dash]) for dashes in (curve, other)]
                assert np.abs(points[0][:, None] - points[1][None]).max(-1).min() >= 1


def test_images_show_dashes_and_markers(scenes):
    for scene in scenes:
        assert scene.image.shape == (32, 32) and scene.image.dtype == np.uint8
        for row, column in scene.markers:
            assert scene.image[row, column] == 255
        for curve in scene.targets:
            for tail, head in curve:
                middle = np.rint((np.array(tail) + np.array(head)) / 2).astype(int)
                assert scene.image[tuple(middle)] > 30
        assert scene.image[0].max() <= 60 and (scene.image == 0).mean() > 0.3


def test_first_marker_is_far_from_the_border():
    settings = replace(EASY, num_distractors=0)
    for index in range(10):
        scene = draw_pathfinder(index, settings=settings)
        row, column = scene.targets[0][0][0]
        assert 14 <= min(row, column) and max(row, column) < 18
        distance = np.hypot(*np.subtract(scene.targets[1][0][0], (row, column)))
        assert distance == pytest.approx(7, abs=0.8) and not scene.distractors


def test_straighter_with_more_continuity():
    def turning(continuity):
        settings = replace(EASY, continuity=continuity, num_distractors=0)
        turns = []
        for index in range(6):
            for curve in draw_pathfinder(index, settings=settings).targets:
                heads = np.array([head for _, head in curve], dtype=float)
                steps = np.diff(heads, axis=0)
                angles = np.arctan2(steps[:, 0], steps[:, 1])
                turns += list(np.abs(np.angle(np.exp(1j * np.diff(angles)))))
        return np.mean(turns)

    assert turning(2.0) < 0.8 * turning(1.0)


@pytest.mark.parametrize(("resolution", "distractors"), [(32, 5), (64, 5), (128, 8)])
def test_official_settings(resolution, distractors):
    settings = pathfinder_settings(resolution)
    assert settings.contour_length == 14 and settings.distractor_length == 4
    assert settings.num_distractors == distractors
    scene = draw_pathfinder(0, settings=settings)
    assert scene.image.shape == (resolution, resolution) and len(scene.targets[0]) == 14


def test_images_depend_on_the_seed_alone():
    pixels, labels = generate_pathfinder(40, seed=2, settings=EASY)
    assert pixels.shape == (40, 1024) and pixels.dtype == np.uint8 and labels.dtype == np.int64
    shared_pixels, shared_labels = generate_pathfinder(40, seed=2, settings=EASY, num_processes=2)
    assert np.array_equal(pixels, shared_pixels) and np.array_equal(labels, shared_labels)
    assert np.array_equal(generate_pathfinder(5, seed=2, settings=EASY)[0], pixels[:5])
    assert not np.array_equal(generate_pathfinder(5, seed=3, settings=EASY)[0], pixels[:5])
    assert np.array_equal(draw_pathfinder(7, seed=2, settings=EASY).image.ravel(), pixels[7])
    assert generate_pathfinder(0, settings=EASY)[0].shape == (0, 1024)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pathfinder_settings(48), "32, 64 or 128; got 48"),
        (lambda: pathfinder_settings(32, "harder"), "easy, intermediate, hard; got 'harder'"),
        (lambda: PathfinderSettings(resolution=28), "leaves no room"),
        (lambda: PathfinderSettings(margins=(0,)), "`margins` must hold positive"),
        (lambda: PathfinderSettings(dash_length=0), "`dash_length` must be at least 1"),
    ],
)
def test_impossible_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()
