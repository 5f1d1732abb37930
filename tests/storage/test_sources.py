"""Folders and Parquet files as sources."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.errors import SourceError
from storage.sources import FolderSource, ParquetSource
from storage.sources.folder import path_of, reference_of


def test_a_folders_classes_are_its_sub_folders_in_sorted_order(tiny_folder: Path) -> None:
    (tiny_folder / "pear" / "notes.txt").write_text("no picture")
    (tiny_folder / "stray.png").write_bytes(b"outside every class")
    items = list(FolderSource(tiny_folder).items())
    assert [item.reference for item in items][:2] == ["apple/000.png", "apple/001.jpg"]
    assert [(item.label, item.label_name) for item in items] == (
        [(0, "apple")] * 5 + [(1, "pear")] * 3 + [(2, "plum")] * 3
    )
    source = FolderSource(tiny_folder)
    assert source.class_names == ("apple", "pear", "plum")
    assert source.read("apple/000.png") == (tiny_folder / "apple" / "000.png").read_bytes()


def test_pictures_in_deeper_folders_belong_to_the_class_above(tiny_folder: Path) -> None:
    (tiny_folder / "apple" / "red").mkdir()
    (tiny_folder / "apple" / "000.png").rename(tiny_folder / "apple" / "red" / "0.PNG")
    items = list(FolderSource(tiny_folder).items())
    assert ("apple/red/0.PNG", 0) in [(item.reference, item.label) for item in items]


def test_a_fingerprint_changes_with_size_and_time(tiny_folder: Path) -> None:
    def fingerprint() -> str:
        return next(FolderSource(tiny_folder).items()).fingerprint

    file = tiny_folder / "apple" / "000.png"
    before = fingerprint()
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes() + b"0")
    os.utime(file, ns=times)
    longer = fingerprint()
    os.utime(file, (1, 1))
    assert len({before, longer, fingerprint()}) == 3


def test_a_csv_gives_labels_and_readable_names(tiny_folder: Path, tmp_path: Path) -> None:
    classes = tmp_path / "classes.csv"
    classes.write_text(
        'index,folder,name\n4,plum,a plum\n\n2,apple,"an apple, red"\n7,kiwi,a kiwi\n0,pear,a pear\n'
    )
    source = FolderSource(tiny_folder, classes)
    labels = {item.reference.split("/")[0]: (item.label, item.label_name) for item in source.items()}
    assert labels == {"apple": (2, "an apple, red"), "pear": (0, "a pear"), "plum": (4, "a plum")}
    assert source.class_names == ("a pear", "", "an apple, red", "", "a plum")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index,folder\n0,apple\n1,pear\n", r"got none for \['plum'\] \(1 in all\)"),
        ("index,folder\nzero,apple\n", r"expected rows of index, folder name .+ got \['zero', 'apple'\]"),
        ("index,folder\n0\n", "expected rows of index"),
        ("index,folder\n-1,apple\n", "expected rows of index"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused(tiny_folder: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "classes.csv").write_text(content)
    with pytest.raises(SourceError, match=f"dataset.classes: .*{message}"):
        FolderSource(tiny_folder, tmp_path / "classes.csv")


def test_a_csv_that_is_not_there_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"dataset.classes: expected a CSV file, got .+no\.csv"):
        FolderSource(tiny_folder, tmp_path / "no.csv")


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "flat"])
def test_a_folder_without_classes_of_images_is_refused(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "images"
    if kind == "file":
        root.write_text("x")
    elif kind != "missing":
        (root / "class").mkdir(parents=True)
    if kind == "flat":
        (root / "picture.png").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"dataset.path: expected .+ one folder per class"):
        FolderSource(root)


def test_names_that_are_not_utf8_can_be_listed_and_read(tiny_folder: Path) -> None:
    raw = os.fsencode(tiny_folder) + b"/apple/caf\xe9 %.png"
    Path(os.fsdecode(raw)).write_bytes(b"latin")
    source = FolderSource(tiny_folder)
    (found,) = [item.reference for item in source.items() if "caf" in item.reference]
    assert found == "percent-encoded:apple/caf%E9 %25.png"
    found.encode("utf-8")
    assert source.read(found) == b"latin"


def test_class_folders_that_are_not_utf8_have_a_printable_name(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/images/na\xefve"
    os.makedirs(folder)
    Path(os.fsdecode(folder + b"/0.png")).write_bytes(b"x")
    (item,) = FolderSource(tmp_path / "images").items()
    assert item.label_name == "na\ufffdve"
    assert FolderSource(tmp_path / "images").read(item.reference) == b"x"


@pytest.mark.parametrize(
    "path", ["a/b.png", "ü/日本.png", "a b%20.png", "percent-encoded:a%41.png", "\udce9/\udcff"]
)
def test_references_lead_back_to_their_path(path: str) -> None:
    reference_of(path).encode("utf-8")
    assert path_of(reference_of(path)) == path


def write_parquet(
    path: Path, images: list[bytes | None], labels: list[int] | None, names: list[str] | None = None
):
    columns = {"image": [{"bytes": one, "path": None} for one in images]}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [pa.field("image", kind)]
    if labels is not None:
        columns["label"] = labels
        fields.append(pa.field("label", pa.int64()))
    schema = pa.schema(fields)
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=2)
    return path


def test_rows_of_a_parquet_file_come_with_the_hubs_class_names(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [b"0", b"1", b"2"], [1, 0, 1], ["cat", "dog"])
    source = ParquetSource(path)
    items = list(source.items())
    assert source.class_names == ("cat", "dog")
    assert [(item.label, item.label_name) for item in items] == [(1, "dog"), (0, "cat"), (1, "dog")]
    assert [source.read(item.reference) for item in reversed(items)] == [b"2", b"1", b"0"]


def test_labels_outside_the_named_classes_are_their_numbers(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [b"0", b"1"], [-1, 5], ["cat", "dog"])
    assert [item.label_name for item in ParquetSource(path).items()] == ["-1", "5"]


def test_a_file_of_classes_names_the_labels_of_a_parquet_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [b"0", b"1"], [2, 0], ["cat", "dog", "owl"])
    classes = tmp_path / "classes.csv"
    classes.write_text("index,key,name\n0,a,tabby\n2,c,barn owl\n")
    source = ParquetSource(path, classes)
    assert source.class_names == ("tabby", "", "barn owl")
    assert [(item.label, item.label_name) for item in source.items()] == [(2, "barn owl"), (0, "tabby")]
    # Their folders mean nothing here, so that they may all be called the same.
    classes.write_text("index,key,name\n0,,tabby\n2,,barn owl\n")
    assert ParquetSource(path, classes).class_names == ("tabby", "", "barn owl")


@pytest.mark.parametrize("label", [1, 3, -1])
def test_a_label_of_a_parquet_file_without_a_row_is_refused(tmp_path: Path, label: int) -> None:
    path = write_parquet(tmp_path / "a.parquet", [b"0", b"1"], [0, label])
    classes = tmp_path / "classes.csv"
    classes.write_text("index,key,name\n0,a,tabby\n2,c,barn owl\n")
    with pytest.raises(SourceError, match=f"a row for every label, got none for {label} in classes.csv"):
        list(ParquetSource(path, classes).items())


def test_without_names_or_labels_there_are_none(tmp_path: Path) -> None:
    source = ParquetSource(write_parquet(tmp_path / "a.parquet", [b"0"], None))
    assert source.class_names is None
    assert [(item.label, item.label_name) for item in source.items()] == [(None, None)]


def test_a_folder_of_parquet_files_is_one_source(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b#2.parquet", [b"2", b"3", b"4"], [0, 1, 0])
    write_parquet(tmp_path / "a.parquet", [b"0", b"1"], [0, 1])
    source = ParquetSource(tmp_path)
    assert [source.read(item.reference) for item in source.items()] == [b"0", b"1", b"2", b"3", b"4"]


def test_a_null_picture_and_a_row_that_is_gone_are_refused_one_by_one(tmp_path: Path) -> None:
    source = ParquetSource(write_parquet(tmp_path / "a.parquet", [None, b"1"], [0, 1]))
    first, second = (item.reference for item in source.items())
    with pytest.raises(SourceError, match="expected an encoded picture, got null"):
        source.read(first)
    assert source.read(second) == b"1"
    with pytest.raises(SourceError, match="expected a readable row"):
        source.read("a.parquet#0/9")


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    source = ParquetSource(write_parquet(tmp_path / "a.parquet", [b"old"], [0]))
    (item,) = source.items()
    assert source.read(item.reference) == b"old"
    write_parquet(tmp_path / "a.parquet", [b"new"], [0])
    os.utime(tmp_path / "a.parquet", (1, 1))
    assert source.read(item.reference) == b"new"


def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(SourceError, match=r"text\.parquet is not Parquet"):
        ParquetSource(tmp_path / "text.parquet")
    with pytest.raises(SourceError, match="expected a Parquet file or a folder of them"):
        ParquetSource(tmp_path / "missing.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="expected a Parquet file or a folder of them"):
        ParquetSource(tmp_path / "empty")
    with pytest.raises(SourceError, match="expected rows, found none"):
        ParquetSource(write_parquet(tmp_path / "zero.parquet", [], []))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": [b"0"], "label": [0]}, r"expected the columns image.+got \['img', 'label'\]"),
        ({"image": [b"0"], "label": [0]}, "expected the columns image: struct<bytes, path>"),
        ({"image": [{"path": "x"}], "label": [0]}, "expected the columns image: struct<bytes, path>"),
        ({"image": [{"bytes": b"0"}], "label": ["cat"]}, "expected label: integers in a.parquet, got string"),
    ],
)
def test_another_schema_is_refused(tmp_path: Path, columns: dict, message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=message):
        ParquetSource(tmp_path / "a.parquet")
    write_parquet(tmp_path / "Z.parquet", [b"0"], [0])
    with pytest.raises(SourceError, match=message):
        ParquetSource(tmp_path)
