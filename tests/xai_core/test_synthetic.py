"""The synthetic toys: reproducible, balanced, and with masks that tell the truth about the pixels."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from xai_core.synthetic import (
    CLASS_NAMES,
    CLASSES,
    IMAGE_SIZE,
    NO_PART,
    draw_scene,
    render,
    sample_scene,
)

SEED = 3
INDICES = range(60)


def test_same_seed_and_index_give_the_same_picture() -> None:
    for index in (0, 5, 41):
        assert sample_scene(SEED, index) == sample_scene(SEED, index)
        first, second = render(SEED, index), render(SEED, index)
        np.testing.assert_array_equal(first.image, second.image)
        np.testing.assert_array_equal(first.part_labels, second.part_labels)


def test_seeds_and_indices_give_different_pictures() -> None:
    pictures = {render(seed, index).image.tobytes() for seed in range(3) for index in range(9)}
    assert len(pictures) == 27


def test_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        sample_scene(-1, 0)


def test_arrays_have_the_promised_shapes() -> None:
    picture = render(SEED, 0)
    parts = len(picture.part_names)
    assert picture.image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert picture.image.dtype == picture.part_labels.dtype == np.uint8
    assert picture.part_masks.shape == picture.coverage.shape == (parts, IMAGE_SIZE, IMAGE_SIZE)
    assert picture.object_mask.dtype == picture.part_masks.dtype == np.bool_
    assert len(picture.deciding) == parts


def test_labels_are_balanced_for_any_number_of_pictures() -> None:
    labels = Counter(sample_scene(SEED, index).label for index in range(10 * len(CLASS_NAMES)))
    assert labels == dict.fromkeys(range(len(CLASS_NAMES)), 10)


def test_two_deciding_parts_name_the_class_and_one_does_not() -> None:
    assert 8 <= len(CLASS_NAMES) <= 10
    for slots in combinations(range(3), 2):
        assert len({tuple(parts[slot] for slot in slots) for parts in CLASSES.values()}) == len(CLASSES)
    shared = Counter(part for parts in CLASSES.values() for part in parts)
    assert set(shared.values()) == {3}


def test_every_toy_shows_four_to_seven_visible_parts_that_agree_with_its_class() -> None:
    for index in INDICES:
        picture = render(SEED, index)
        assert 4 <= len(picture.part_names) <= 7
        assert picture.part_masks.sum(axis=(1, 2)).min() >= 40
        deciding = {name for name, decides in zip(picture.part_names, picture.deciding, strict=True) if decides}
        assert len(deciding) >= 2
        assert deciding <= set(CLASSES[CLASS_NAMES[picture.label]])


def test_toys_fit_inside_the_picture() -> None:
    for index in INDICES:
        mask = render(SEED, index).object_mask
        assert mask[1:-1, 1:-1].sum() == mask.sum()


def test_masks_are_disjoint_and_cover_the_object() -> None:
    for index in INDICES:
        picture = render(SEED, index)
        assert picture.part_masks.sum(axis=0).max() == 1
        np.testing.assert_array_equal(picture.part_masks.any(axis=0), picture.object_mask)
        np.testing.assert_array_equal(picture.part_labels == NO_PART, ~picture.object_mask)
        np.testing.assert_array_equal(picture.coverage.sum(axis=0) >= 0.5, picture.object_mask)


@pytest.mark.parametrize("index", range(12))
def test_removing_a_part_changes_pixels_only_where_it_was_seen(index: int) -> None:
    scene = sample_scene(SEED, index, part_dropout=0.0)
    full = draw_scene(scene)
    for part, name in enumerate(full.part_names):
        bare = draw_scene(scene, without=part)
        changed = (bare.image != full.image).any(axis=2)
        assert not changed[full.coverage[part] == 0].any()
        assert changed[full.part_masks[part]].mean() > 0.9
        assert name not in bare.part_names
        np.testing.assert_array_equal(bare.coverage.sum(axis=0)[~changed], full.coverage.sum(axis=0)[~changed])
        others = np.delete(full.coverage, part, axis=0)
        assert (bare.coverage >= others).all()


def test_masks_hold_the_pixels_that_the_toy_changes() -> None:
    scene = sample_scene(SEED, 1, part_dropout=0.0)
    full = draw_scene(scene)
    empty = scene
    while empty.parts:
        empty = empty.without(0)
    changed = (draw_scene(empty).image != full.image).any(axis=2)
    assert not changed[full.coverage.sum(axis=0) == 0].any()
    assert changed[full.object_mask].mean() > 0.98


def test_removing_an_unknown_part_is_refused() -> None:
    scene = sample_scene(SEED, 0)
    for part in (-1, len(scene.parts)):
        with pytest.raises(IndexError, match="part"):
            draw_scene(scene, without=part)


def test_part_dropout_takes_at_most_one_part_and_nothing_else_changes() -> None:
    missing = 0
    for index in range(300):
        complete, drawn = sample_scene(SEED, index, part_dropout=0.0), sample_scene(SEED, index)
        assert (complete.pose, complete.backdrop, complete.label) == (drawn.pose, drawn.backdrop, drawn.label)
        assert complete.distractors == drawn.distractors
        assert set(drawn.parts) <= set(complete.parts)
        missing += len(complete.parts) - len(drawn.parts)
    assert 0.08 < missing / 300 < 0.24


def test_nothing_but_the_deciding_parts_tells_classes_apart() -> None:
    scenes = [sample_scene(SEED, index, part_dropout=0.0) for index in range(1800)]
    labels = np.array([scene.label for scene in scenes])
    facts = {
        "size": [scene.pose.scale for scene in scenes],
        "side": [scene.pose.mirrored for scene in scenes],
        "column": [scene.pose.x for scene in scenes],
        "backdrop": [scene.backdrop.colours[0][0] for scene in scenes],
        "distractors": [len(scene.distractors) for scene in scenes],
        "trimmings": [len(scene.parts) for scene in scenes],
        "body": [next(part.colour[0] for part in scene.parts if part.name == "body") for scene in scenes],
    }
    for name, values in facts.items():
        column = np.array(values, dtype=float)
        means = np.array([column[labels == label].mean() for label in range(len(CLASS_NAMES))])
        explained = means.var() / column.var()
        assert explained < 0.03, name
