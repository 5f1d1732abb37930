"""What a stage is, and what its shard function is given and gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.arrays import ArraySpec
from storage.commits import CommitRecord, Unit
from storage.store import Commit, Store
from tasks.config import StudyConfig

if TYPE_CHECKING:
    from tasks.study import Study


@dataclass(frozen=True)
class Bad:
    """An image that a stage could not treat: it becomes a row in ``quarantine``, never a silent gap."""

    image_id: int
    path: str
    error: str
    message: str


@dataclass(frozen=True)
class Outcome:
    """What a shard function did: images it was given, images it treated, and those it could not.

    An image that an earlier stage set aside is not given to the later ones.

    ``facts`` go into the commit record.
    """

    images: int
    ok: int
    bad: tuple[Bad, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """One unit of work, complete and small enough to send anywhere.

    ``start`` and ``stop`` are image ids; ``rows`` is the length of the arrays that the shard is part of
    and ``shard_rows`` the length of their shards; ``upstream`` holds the key of every unit it reads.
    """

    unit: Unit
    key: str
    ingredients: Mapping[str, Any]
    series: str
    start: int
    stop: int
    first_row: int
    rows: int
    shard_rows: int
    config: StudyConfig
    store: str
    listing: str
    facts: Mapping[str, Any]
    upstream: Mapping[Unit, str]


@dataclass
class Context:
    """What a shard function works with: its work, the store, and the commit it writes through."""

    work: Work
    store: Store
    commit: Commit
    device: str

    @property
    def config(self) -> StudyConfig:
        """The study's config."""
        return self.work.config

    def record(self, stage: str, variant: str = "", shard: int | None = None) -> CommitRecord:
        """The committed record of an upstream unit; of the same shard unless another is named."""
        unit = Unit(stage, variant, self.work.unit.shard if shard is None else shard)
        record = self.store.done(unit, self.work.upstream[unit])
        if record is None:
            raise RuntimeError(f"{unit}: expected it committed before {self.work.unit}, found no record")
        return record

    def write_array(
        self, name: str, rows: np.ndarray, values: np.ndarray, dimensions: tuple[str, ...], **attributes: Any
    ) -> None:
        """Writes values for some of the shard's rows; the others hold zeros and are marked by ``valid``.

        Args:
            rows: positions inside the shard, ``[n]``; values: ``[n, ...]``.
        """
        whole = np.zeros((self.work.stop - self.work.start, *values.shape[1:]), values.dtype)
        whole[rows] = values
        spec = ArraySpec(
            self.work.rows,
            self.work.shard_rows,
            whole.shape[1:],
            str(whole.dtype),
            ("image", *dimensions),
            attributes,
        )
        first = self.work.first_row
        self.commit.array(name, self.work.series, first, whole, spec, image=self.work.start)

    def write_valid(self, rows: np.ndarray) -> None:
        """Writes which of the shard's rows hold a result."""
        self.write_array("valid", rows, np.ones(len(rows), bool), ())

    @cached_property
    def listing_path(self) -> Path:
        """The listing that the shard's images come from."""
        return Path(self.work.listing)


def one_variant(_study: Study) -> tuple[str, ...]:
    """The variants of a stage that has only one."""
    return ("",)


@dataclass(frozen=True)
class Stage:
    """A stage of the chain, as data.

    ``version`` is part of every key: raise it when the shard function's results change. ``reads`` gives
    the frozen part of the config that results depend on, ``upstream`` the stages (with variants) it reads.
    A stage that is not ``sharded`` is one unit over all shards.
    """

    name: str
    version: int
    run: Callable[[Context], Outcome]
    reads: Callable[[Study, str], Mapping[str, Any]]
    upstream: Callable[[Study, str], tuple[tuple[str, str], ...]] = lambda study, variant: ()
    variants: Callable[[Study], tuple[str, ...]] = one_variant
    sharded: bool = True
    reads_model: bool = True
    summary: str = ""
