"""Pictures of explanations: colours say what the numbers say, and odd input stays harmless."""

import numpy as np
import pytest

from xai_core.errors import UsageError
from xai_core.render import (
    explanation_sheet,
    heat_map,
    is_signed,
    overlay,
    part_colours,
    part_map,
    scored_parts,
    strength,
)
from xai_core.render.part_maps import borders


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture
def labels():
    labels = np.zeros((40, 60), np.uint8)
    labels[:, 20:40] = 1
    labels[:, 40:] = 255
    return labels


def ramp(low, high):
    return np.linspace(low, high, 2400).reshape(40, 60)


def test_strength_of_signed_maps_keeps_zero_and_is_symmetric():
    values = ramp(-2, 2)
    values[0, 0] = -1e6
    found = strength(values)
    assert found.min() == -1 and found.max() == 1
    assert np.array_equal(np.sign(found), np.sign(values))
    assert np.allclose(strength(-values), -found)


def test_one_extreme_pixel_leaves_the_rest_of_the_map_visible():
    values = ramp(0, 1)
    values[3, 3] = 1e9
    assert np.median(strength(values)) == pytest.approx(0.5, abs=0.02)


def test_a_scale_does_not_change_the_picture():
    values = ramp(-1, 3)
    assert np.array_equal(heat_map(values), heat_map(values * 1e-7))


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, np.nan])
def test_a_constant_map_has_no_strength(value):
    assert not strength(np.full((5, 7), value)).any()


def test_a_single_hot_pixel_is_shown_at_full_strength():
    values = np.zeros((40, 60))
    values[5, 5] = 0.25
    assert strength(values)[5, 5] == 1


def test_interpolation_rims_do_not_make_a_map_signed():
    assert not is_signed(ramp(-0.005, 1))
    assert is_signed(ramp(-0.05, 1))


def test_signed_palette_is_blue_against_and_red_for():
    red, _, blue = np.moveaxis(heat_map(ramp(-1, 1)).astype(int), -1, 0)
    assert blue[0, 0] > red[0, 0] and red[-1, -1] > blue[-1, -1]


def test_overlay_shows_the_faded_picture_where_there_is_nothing(picture):
    values = np.zeros((40, 60))
    values[:, 30:] = 1
    painted = overlay(picture, values)
    plain = overlay(picture, np.zeros((40, 60)))
    assert painted.dtype == np.uint8 and painted.shape == picture.shape
    assert np.array_equal(painted[:, :30], plain[:, :30])
    assert not np.array_equal(painted[:, 30:], plain[:, 30:])


@pytest.mark.parametrize("draw", [overlay, part_map, lambda a, b: scored_parts(a, b, np.ones(2))])
def test_sizes_must_agree(picture, draw):
    with pytest.raises(UsageError, match=r"\(40, 60, 3\) and \(40, 61\)"):
        draw(picture, np.zeros((40, 61), np.uint8))


def test_parts_have_distinct_colours_and_white_borders(picture, labels):
    assert len(np.unique(part_colours(12), axis=0)) == 12
    flat = part_map(np.full_like(picture, 128), labels)
    seams = borders(labels)
    assert seams.any() and (flat[seams] == 255).all()
    inside = {tuple(flat[20, column]) for column in (5, 30, 55)}
    assert len(inside) == 3


def test_parts_without_a_score_stay_faded(picture, labels):
    painted = scored_parts(picture, labels, np.array([1.0, np.nan]))
    bare = scored_parts(picture, labels, np.array([np.nan, np.nan]))
    middle = (slice(None), slice(21, 38))
    assert np.array_equal(painted[middle], bare[middle])
    assert not np.array_equal(painted[:, :18], bare[:, :18])


@pytest.mark.parametrize("methods", [0, 1, 3, 7])
def test_a_sheet_grows_with_its_methods(picture, labels, methods):
    maps = {f"method_{index}[a=$1$]": ramp(-1, 1) for index in range(methods)}
    scores = {name: np.array([0.3, np.nan]) for name in list(maps)[:2]}
    classes = [("a $very$ long name of a class that never ends", 0.7), ("b", 0.3)]
    sheet = explanation_sheet(picture, "a $title$ <b>", classes, labels, maps, scores)
    assert sheet.mode == "RGB"
    assert sheet.width > 400 and sheet.height > 400
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 50


def test_a_sheet_without_parts_or_classes(picture):
    nothing = np.full((40, 60), 255, np.uint8)
    sheet = explanation_sheet(picture, "t", [], nothing, {"m": np.zeros((40, 60))}, {"m": np.array([np.nan])})
    assert sheet.width > 400


def test_the_same_sheet_twice(picture, labels):
    one, two = (explanation_sheet(picture, "t", [("a", 1.0)], labels, {}, {}) for _ in range(2))
    assert one.tobytes() == two.tobytes()
