"""The pictures that a training learns from and is judged on: read once, decoded into a file, and dealt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from storage.canonical import digest_json
from storage.listing import Listing
from storage.sources import decode_image
from tasks.quarantine import IMAGE_ERRORS, set_aside
from tasks.sources import open_source, read_listed
from tasks.stage import Bad, Context
from tasks.training.config import TrainingConfig
from tasks.training.picture_file import PictureFile, Rows
from tasks.training.told import Telling, Word
from xai_core.errors import UsageError
from xai_core.models import Classifier

# The label of a picture that has none, for kinds that read none.
NO_LABEL = -1
# Rows of a listing that are in memory at a time.
STRETCH = 16_384


@dataclass
class Decoded:
    """Pictures of the study that could be read, row by row, and those that could not."""

    labels: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)

    @property
    def content(self) -> str:
        """A digest of what the pictures are: a checkpoint of others is of no use."""
        return digest_json([self.labels, self.digests])


@dataclass(frozen=True)
class Dealt:
    """Which rows are learnt from, and which are held out."""

    train: list[int]
    held_out: list[int]


def decode_study(context: Context, model: Classifier, file: PictureFile, telling: Telling) -> Decoded:
    """The study's pictures through the model's own geometry into a file, shard by shard."""
    source = open_source(context.config.dataset)
    found, seen = Decoded(), 0
    for unit in sorted(context.work.upstream, key=lambda unit: unit.shard):
        rows = context.store.read_table(context.record("manifest", "", unit.shard), "manifest").to_pylist()
        for row in rows:
            try:
                picture = read_listed(source, row["path"], row["sha256"])
                file.append(_as_bytes(model, picture))
            except IMAGE_ERRORS as error:
                found.bad.append(set_aside(row["image_id"], row["path"], error))
            else:
                found.labels.append(NO_LABEL if row["label"] is None else row["label"])
                found.digests.append(row["sha256"])
            seen += 1
            telling.tell(Word("pictures", seen, context.work.stop))
    return found


def decode_test(context: Context, model: Classifier, file: PictureFile) -> torch.Tensor:
    """The test pictures into a file, and their labels.

    Raises:
        UsageError: one of them cannot be read: no study lists them, so none could set it aside.
    """
    test = _training(context).test
    assert test is not None
    source = open_source(test)
    facts = context.work.facts
    labels = []
    for row in test_rows(_training(context), Listing(facts["test_listing"], "", facts["tests"])):
        try:
            file.append(_as_bytes(model, decode_image(source.read(row["reference"]))))
        except IMAGE_ERRORS as error:
            raise UsageError(
                f"training.test: expected pictures that can be read, got {row['reference']}: {error}; remove it"
            ) from None
        labels.append(NO_LABEL if row["label"] is None else row["label"])
    return torch.tensor(labels)


def _training(context: Context) -> TrainingConfig:
    training = context.config.training
    assert training is not None, "the stage has no variant without one"
    return training


def _as_bytes(model: Classifier, picture: Any) -> np.ndarray:
    image = model.preprocess(picture).unsqueeze(0)
    return model.as_pictures(image)[0].transpose(2, 0, 1)


def listed(listing: Listing, limit: int | None) -> Iterator[dict[str, Any]]:
    """The rows of a listing up to a limit; memory does not grow with it."""
    stop = min(listing.rows, limit or listing.rows)
    for start in range(0, stop, STRETCH):
        yield from listing.slice(start, min(start + STRETCH, stop))


def test_rows(training: TrainingConfig, listing: Listing) -> Iterator[dict[str, Any]]:
    """The rows of the test pictures' listing that a training takes."""
    return listed(listing, None if training.test is None else training.test.limit)


def check_labels(
    rows: Iterable[Mapping[str, Any]],
    num_classes: int,
    key: str,
    remedy: str = "set num_classes in model.create_args",
) -> None:
    """Refuses pictures whose label the model has no logit for.

    Raises:
        UsageError: naming the first of them, or that there are no pictures at all.
    """
    seen = False
    for row in rows:
        seen = True
        if row["label"] is None or not 0 <= row["label"] < num_classes:
            raise _wrong_label(key, num_classes, f"{row['label']} for {row['reference']}", remedy)
    if not seen:
        raise _wrong_label(key, num_classes, "no pictures", remedy)


def _wrong_label(key: str, num_classes: int, got: str, remedy: str) -> UsageError:
    return UsageError(f"{key}: expected pictures with labels from 0 to {num_classes - 1}, got {got}; {remedy}")


def deal(digests: Sequence[str], share: float, seed: int) -> Dealt:
    """Rows to learn from and rows to hold out, drawn by what the pictures are.

    The draw depends neither on their order nor on shards, and pictures that are the same fall on one side, but for
    those at the border between the two.

    Raises:
        UsageError: fewer pictures than it takes.
    """
    if len(digests) < 1 + (share > 0):
        raise UsageError(
            f"training: expected at least {1 + (share > 0)} pictures that can be read, got {len(digests)}; add "
            "some, or hold none out"
        )
    lots = [hashlib.blake2b(f"{seed}:{one}".encode()).digest() for one in digests]
    order = sorted(range(len(lots)), key=lambda row: (lots[row], row))
    count = min(max(round(share * len(lots)), int(share > 0)), len(lots) - 1)
    return Dealt(sorted(order[count:]), sorted(order[:count]))


def labelled(file: PictureFile, labels: Sequence[int], rows: Sequence[int]) -> tuple[Rows, torch.Tensor]:
    """Some rows as pictures with labels."""
    return Rows(file, rows), torch.tensor([labels[row] for row in rows])
