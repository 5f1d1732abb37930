"""Arrays: whole shards only, and damage that is never read as data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

from storage.arrays import (
    ArraySpec,
    encode_shard,
    ensure_array,
    metadata_of,
    read_attributes,
    read_rows,
    shard_path,
)
from storage.errors import StoreError
from storage.files import publish_bytes

SPEC = ArraySpec(22, 16, (3, 5), "float32", ("image", "y", "x"), {"upsampling": "bilinear"})


def values(rows: int) -> np.ndarray:
    return np.arange(rows * 15, dtype=np.float32).reshape(rows, 3, 5) + 1


def write_shard(path: Path, start: int, rows: np.ndarray, spec: ArraySpec = SPEC) -> Path:
    file = shard_path(path, spec, start)
    publish_bytes(file, b"".join(encode_shard(spec, start, rows)))
    return file


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
    with pytest.raises(StoreError, match=r"expected rows of one whole shard of 16 of 22, got"):
        write_shard(array, start, values(rows))
    assert [path.name for path in array.iterdir()] == ["zarr.json"]


def test_items_of_another_shape_are_refused(array: Path) -> None:
    with pytest.raises(StoreError, match=r"expected items \(3, 5\) of float32, got \(5, 3\) of float32"):
        write_shard(array, 0, values(16).reshape(16, 5, 3))
    with pytest.raises(StoreError, match=r"of float32, got \(3, 5\) of float64"):
        write_shard(array, 0, values(16).astype(np.float64))


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
    with pytest.raises(StoreError, match="is damaged or belongs to another layout"):
        ensure_array(array, other)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"shape": 3}'])
def test_damaged_metadata_is_not_written_beside(array: Path, content: bytes) -> None:
    (array / "zarr.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"got no readable metadata; .+ see `vitrine verify`"):
        ensure_array(array, SPEC)


@pytest.mark.parametrize("item", [(), (4,), (3, 5)])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "float16", "float32", "int64"])
def test_a_shard_has_the_bytes_that_zarr_itself_writes(tmp_path: Path, item: tuple[int, ...], dtype: str) -> None:
    spec = ArraySpec(22, 16, item, dtype, ("image", "y", "x")[: 1 + len(item)], {"map_size": [7, 7]})
    whole = np.random.default_rng(0).integers(0, 2, (22, *item)).astype(dtype)
    whole[:8] = 0
    ensure_array(tmp_path / "ours", spec)
    ensure_array(tmp_path / "zarrs", spec)
    theirs = zarr.open_array(tmp_path / "zarrs", mode="r+").with_config({"write_empty_chunks": True})
    for start in (0, 16):
        write_shard(tmp_path / "ours", start, whole[start : start + 16], spec)
        theirs[start : start + 16] = whole[start : start + 16]
    files = sorted(path.name for path in (tmp_path / "zarrs").iterdir())
    assert len(files) == 3
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "zarrs" / name).read_bytes()


def test_a_specification_survives_its_record() -> None:
    again = ArraySpec.from_json(json.loads(json.dumps(SPEC.to_json())))
    assert again == SPEC
    assert metadata_of(again) == metadata_of(SPEC)


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
    assert sorted(path for path in array.iterdir() if path.name != "zarr.json") == sorted(files)


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
        write_shard(tmp_path / "a", start, whole[start : start + spec.shard_rows], spec)
    np.testing.assert_array_equal(read_rows(tmp_path / "a", 0, 25), whole)


def test_xarray_opens_the_folder_with_named_dimensions(array: Path) -> None:
    write_shard(array, 0, values(16))
    write_shard(array, 16, values(22)[16:])
    found = xarray.open_zarr(array.parent, consolidated=False)["maps"]
    assert found.dims == ("image", "y", "x")
    assert found.shape == (22, 3, 5)
    assert found.attrs["upsampling"] == "bilinear"
    np.testing.assert_array_equal(found.values[:16], values(16))
