"""Arrays: whole shards only, and damage that is never read as data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray

from storage.arrays import ArraySpec, ensure_array, read_attributes, read_rows, write_shard
from storage.errors import StoreError

SPEC = ArraySpec(22, 16, (3, 5), "float32", ("image", "y", "x"), {"upsampling": "bilinear"})


def values(rows: int) -> np.ndarray:
    return np.arange(rows * 15, dtype=np.float32).reshape(rows, 3, 5) + 1


@pytest.fixture
def array(tmp_path: Path) -> Path:
    path = tmp_path / "maps"
    ensure_array(path, SPEC)
    return path


def test_whole_shards_and_the_short_last_one_come_back(array: Path) -> None:
    write_shard(array, 16, values(22)[16:])
    write_shard(array, 0, values(22)[:16])
    np.testing.assert_array_equal(read_rows(array, 0, 22), values(22))
    np.testing.assert_array_equal(read_rows(array, 14, 18), values(22)[14:18])
    assert read_attributes(array) == {"upsampling": "bilinear"}


@pytest.mark.parametrize(("start", "rows"), [(1, 16), (0, 15), (0, 8), (8, 8), (16, 5), (0, 22), (4, 18)])
def test_rows_that_are_not_one_whole_shard_are_refused(array: Path, start: int, rows: int) -> None:
    with pytest.raises(StoreError, match=r"expected rows of one whole shard of 16, got"):
        write_shard(array, start, values(rows))
    assert not (array / "c").exists()


def test_items_of_another_shape_are_refused(array: Path) -> None:
    with pytest.raises(StoreError, match=r"expected items \(3, 5\), got \(5, 3\)"):
        write_shard(array, 0, values(16).reshape(16, 5, 3))


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, rows=23),
        replace(SPEC, shard_rows=8),
        replace(SPEC, dtype="float16"),
        replace(SPEC, item_shape=(5, 3)),
    ],
)
def test_a_foreign_array_in_the_same_place_is_refused(array: Path, other: ArraySpec) -> None:
    with pytest.raises(StoreError, match="belongs to another layout: remove it"):
        ensure_array(array, other)


def test_the_same_array_may_be_ensured_again_without_losing_rows(array: Path) -> None:
    write_shard(array, 0, values(16))
    ensure_array(array, SPEC)
    np.testing.assert_array_equal(read_rows(array, 0, 16), values(16))


def test_an_all_zero_shard_is_a_file(array: Path) -> None:
    file = write_shard(array, 0, np.zeros((16, 3, 5), np.float32))
    assert file.is_file()
    assert file.stat().st_size > 0
    assert not read_rows(array, 0, 16).any()


def test_one_file_holds_one_shard(array: Path) -> None:
    files = [write_shard(array, 0, values(16)), write_shard(array, 16, values(6))]
    assert sorted(path for path in (array / "c").rglob("*") if path.is_file()) == sorted(files)


def test_every_flipped_bit_of_the_data_raises_when_read(array: Path) -> None:
    file = write_shard(array, 0, values(16))
    whole = file.read_bytes()
    for position in range(0, len(whole), 7):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            read_rows(array, 0, 16)
        except Exception:  # zarr raises what its codecs raise
            continue
        pytest.fail(f"a flipped bit at byte {position} of {len(whole)} was read as data")


def test_a_truncated_shard_raises_when_read(array: Path) -> None:
    file = write_shard(array, 0, values(16))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(Exception, match=r".+"):
        read_rows(array, 0, 16)


@pytest.mark.parametrize("shard_rows", [1, 3, 7, 11, 12, 128])
def test_any_shard_size_works(tmp_path: Path, shard_rows: int) -> None:
    spec = ArraySpec(25, min(shard_rows, 25), (2,), "uint8", ("image", "x"), {})
    ensure_array(tmp_path / "a", spec)
    whole = np.arange(50, dtype=np.uint8).reshape(25, 2)
    for start in range(0, 25, spec.shard_rows):
        write_shard(tmp_path / "a", start, whole[start : start + spec.shard_rows])
    np.testing.assert_array_equal(read_rows(tmp_path / "a", 0, 25), whole)


def test_xarray_opens_the_folder_with_named_dimensions(array: Path) -> None:
    write_shard(array, 0, values(16))
    write_shard(array, 16, values(22)[16:])
    found = xarray.open_zarr(array.parent, consolidated=False)["maps"]
    assert found.dims == ("image", "y", "x")
    assert found.shape == (22, 3, 5)
    assert found.attrs["upsampling"] == "bilinear"
    np.testing.assert_array_equal(found.values[:16], values(16))
