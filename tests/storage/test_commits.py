"""Commit records, keys and what tells two of them apart."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.canonical import canonical_json, digest_json
from storage.commits import CommitLog, CommitRecord, StoredObject, Unit, differences, key_of, slug

INGREDIENTS = {
    "stage": "metrics",
    "version": 1,
    "variant": "grad_cam",
    "config": {"metrics": [{"name": "insertion", "steps": 50}], "precision": "fp32"},
    "model": {"name": "vit", "weights": "ab" * 32},
    "upstream": {"manifest #0": "cd" * 32},
    "images": "ef" * 32,
}


def record(key: str = "", **facts: object) -> CommitRecord:
    return CommitRecord(
        key or key_of(INGREDIENTS),
        Unit("metrics", "grad_cam", 3),
        INGREDIENTS,
        (StoredObject("tables/metrics/x.parquet", 12, "00" * 32),),
        {"images": 4, "ok": 4, "quarantined": 0, **facts},
    )


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    log = CommitLog(tmp_path)
    written = record()
    log.write(written)
    assert log.read(written.unit, written.key) == written
    assert list(log) == [written]
    assert log.of_unit(written.unit) == [written]


@pytest.mark.parametrize(("old", "new"), [('"ok":4', '"ok":5'), ('"bytes":12', '"bytes":13'), ("ef", "ee")])
def test_an_altered_record_counts_as_none(tmp_path: Path, old: str, new: str) -> None:
    log = CommitLog(tmp_path)
    written = record()
    log.write(written)
    path = log.path(written.unit, written.key)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert log.read(written.unit, written.key) is None
    assert list(log) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"body": 3, "digest": "x"}', b"\xff\xfe"])
def test_bytes_that_are_no_record_count_as_none(content: bytes) -> None:
    assert CommitRecord.from_bytes(content) is None


def test_a_record_cut_anywhere_counts_as_none() -> None:
    whole = record().to_bytes()
    assert CommitRecord.from_bytes(whole) is not None
    assert all(CommitRecord.from_bytes(whole[:length]) is None for length in range(len(whole)))


def test_a_record_under_another_key_of_the_same_beginning_is_not_taken(tmp_path: Path) -> None:
    log = CommitLog(tmp_path)
    written = record(key="a" * 64)
    log.write(written)
    assert log.read(written.unit, "a" * 60 + "bbbb") is None


@pytest.mark.parametrize("name", sorted(INGREDIENTS))
def test_every_ingredient_changes_the_key(name: str) -> None:
    assert key_of({**INGREDIENTS, name: "another"}) != key_of(INGREDIENTS)


def test_the_order_of_ingredients_does_not_change_the_key() -> None:
    assert key_of(dict(reversed(INGREDIENTS.items()))) == key_of(INGREDIENTS)


@given(st.lists(st.text(max_size=120), min_size=2, max_size=8, unique=True))
def test_distinct_variants_have_distinct_folders_of_plain_characters(variants: list[str]) -> None:
    slugs = [slug(variant) for variant in variants]
    assert len(set(slugs)) == len(variants)
    assert all(re.fullmatch(r"[A-Za-z0-9_.=,+-]{1,90}", one) for one in slugs)
    assert all(one not in (".", "..") for one in slugs)


def test_differences_name_the_changed_entries_with_both_values() -> None:
    changed = {**INGREDIENTS, "version": 2, "config": {**INGREDIENTS["config"], "precision": "bf16"}}
    assert differences(INGREDIENTS, changed) == [
        'config.precision: "fp32" -> "bf16"',
        "version: 1 -> 2",
    ]
    assert differences(INGREDIENTS, INGREDIENTS) == []
    assert differences({}, {"k": 3}) == ["k: null -> 3"]


def test_long_values_are_shortened_but_stay_distinct() -> None:
    (found,) = differences({"a": "x" * 200}, {"a": "x" * 199 + "y"})
    before, after = found.removeprefix("a: ").split(" -> ")
    assert before != after
    assert len(found) < 80


def test_a_record_says_its_digest_and_its_body_is_canonical_json() -> None:
    document = json.loads(record().to_bytes())
    body = canonical_json(document["body"])
    assert document["digest"] == hashlib.sha256(body).hexdigest()
    assert document["bytes"] == len(body)
    assert record().to_bytes().endswith(body + b"}")


def test_records_of_the_first_format_are_read() -> None:
    body = json.loads(record().to_bytes())["body"]
    for one in body["objects"]:
        del one["repeatable"]
    old = canonical_json({"format": 1, "digest": digest_json(body), "body": body})
    assert CommitRecord.from_bytes(old) == record()
    assert CommitRecord.from_bytes(old.replace(b"grad_cam", b"grad_cum")) is None
