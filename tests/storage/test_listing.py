"""The listing: its order is fair from the first image on, and depends on nothing but seed and images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.listing import Listing, _uniform, build_listing, seal_of
from storage.sources import FolderSource, ImageItem


@dataclass(frozen=True)
class Made:
    """A source of so many images of every class, listed class by class."""

    counts: tuple[int, ...]
    class_names = None

    def items(self) -> Iterator[ImageItem]:
        for label, count in enumerate(self.counts):
            for index in range(count):
                yield ImageItem(f"{label}/{index}.png", "1:1", label, f"class {label}")


def rows(source: object, folder: Path, seed: int | None = 0) -> list[dict]:
    listing = build_listing(source, folder, seed)
    return listing.slice(0, listing.rows)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 2**31))
def test_every_prefix_holds_every_class_in_proportion(counts: list[int], seed: int) -> None:
    with TemporaryDirectory() as folder:
        listed = rows(Made(tuple(counts)), Path(folder), seed)
    assert [row["image_id"] for row in listed] == list(range(sum(counts)))
    assert len({row["reference"] for row in listed}) == sum(counts)
    seen: Counter[int] = Counter()
    for length, row in enumerate(listed, start=1):
        seen[row["label"]] += 1
        for label, count in enumerate(counts):
            # One image for the class's own steps, and its share of one for the steps of each class.
            allowed = 1 + len(counts) * count / sum(counts)
            assert abs(seen[label] - count * length / sum(counts)) <= allowed + 1e-9


def test_the_same_source_is_listed_the_same_way(tmp_path: Path) -> None:
    first = build_listing(Made((9, 4)), tmp_path / "a", 3)
    second = build_listing(Made((9, 4)), tmp_path / "b", 3)
    assert first.digest == second.digest
    assert first.path.read_bytes() == second.path.read_bytes()


def test_another_seed_gives_another_order_of_the_same_images(tmp_path: Path) -> None:
    first, second = rows(Made((30, 30)), tmp_path, 0), rows(Made((30, 30)), tmp_path, 1)
    assert [row["reference"] for row in first] != [row["reference"] for row in second]
    assert {row["reference"] for row in first} == {row["reference"] for row in second}


def test_without_a_seed_the_sources_order_is_kept(tmp_path: Path) -> None:
    listed = rows(Made((3, 2)), tmp_path, None)
    assert [row["reference"] for row in listed] == ["0/0.png", "0/1.png", "0/2.png", "1/0.png", "1/1.png"]


def test_an_images_place_in_its_class_does_not_depend_on_other_images(tmp_path: Path) -> None:
    assert _uniform(5, "0/1.png") == _uniform(5, "0/1.png") != _uniform(6, "0/1.png")
    alone = [row["reference"] for row in rows(Made((20,)), tmp_path / "a")]
    among = [row["reference"] for row in rows(Made((20, 7, 31)), tmp_path / "b") if row["label"] == 0]
    more = [row["reference"] for row in rows(Made((25,)), tmp_path / "c")]
    assert among == alone
    assert [one for one in more if one in alone] == alone


def test_images_without_labels_are_shuffled_as_one_class(tmp_path: Path) -> None:
    class Unlabelled(Made):
        def items(self) -> Iterator[ImageItem]:
            for item in super().items():
                yield ImageItem(item.reference, item.fingerprint, None, None)

    listed = rows(Unlabelled((40,)), tmp_path)
    assert [row["image_id"] for row in listed] == list(range(40))
    assert [row["reference"] for row in listed] != [f"0/{index}.png" for index in range(40)]


def test_any_slice_of_a_listing_of_many_row_groups_comes_back(tmp_path: Path) -> None:
    listing = build_listing(Made((20_000, 20_000)), tmp_path, 0)
    assert listing.rows == 40_000
    for start, stop in [(0, 3), (16_380, 16_390), (39_990, 40_000), (39_999, 50_000), (40_000, 40_001)]:
        found = [row["image_id"] for row in listing.slice(start, stop)]
        assert found == list(range(start, min(stop, 40_000)))


def test_the_digest_changes_when_a_file_is_touched_or_added(tiny_folder: Path, tmp_path: Path) -> None:
    def digest() -> str:
        return build_listing(FolderSource(tiny_folder), tmp_path / "listings", 0).digest

    before = digest()
    assert digest() == before
    os.utime(tiny_folder / "apple" / "000.png", (1, 1))
    touched = digest()
    (tiny_folder / "apple" / "new.png").write_bytes(b"x")
    assert len({before, touched, digest()}) == 3


def test_nothing_unfinished_is_left_beside_the_listing(tiny_folder: Path, tmp_path: Path) -> None:
    listing = build_listing(FolderSource(tiny_folder), tmp_path / "listings", 0)
    assert sorted((tmp_path / "listings").iterdir()) == [seal_of(listing.path), listing.path]


def test_a_listing_whose_seal_is_damaged_is_made_again(tiny_folder: Path, tmp_path: Path) -> None:
    listing = build_listing(FolderSource(tiny_folder), tmp_path / "listings", 0)
    whole = listing.path.read_bytes()
    for damage in (seal_of(listing.path).unlink, lambda: seal_of(listing.path).write_bytes(b"{")):
        damage()
        listing.path.write_bytes(b"damaged too")
        assert build_listing(FolderSource(tiny_folder), tmp_path / "listings", 0) == listing
        assert listing.path.read_bytes() == whole


def test_a_source_that_fails_half_way_leaves_no_listing(tmp_path: Path) -> None:
    class Failing(Made):
        def items(self) -> Iterator[ImageItem]:
            yield from super().items()
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        build_listing(Failing((5,)), tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_listing_is_found_again_by_its_path_alone(tmp_path: Path) -> None:
    listing = build_listing(Made((5,)), tmp_path, 0)
    assert Listing(listing.path, "", 0).slice(1, 3) == listing.slice(1, 3)
