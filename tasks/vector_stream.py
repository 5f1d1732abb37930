"""The vectors that all shards sampled at a layer, read shard by shard, again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from storage.commits import CommitRecord
from storage.store import Store
from tasks.stage import Context
from xai_core.concepts.streams import Blocks


class VectorStream:
    """Sampled vectors of a layer in image order: an iterable of tensors ``[n, C]``, one a shard.

    Every pass reads the store anew; memory holds one shard at a time.
    """

    def __init__(self, store: Store, records: Sequence[CommitRecord], layer: str) -> None:
        # A shard without a single image that could be sampled has no arrays.
        self._records = [record for record in records if "valid" in record.facts["arrays"]]
        self._store, self._layer = store, layer

    def __iter__(self) -> Iterator[Tensor]:
        for record in self._records:
            valid = self._store.read_array(record, "valid")
            vectors = self._store.read_array(record, f"{self._layer}.vectors")[valid]
            yield torch.from_numpy(vectors).flatten(0, 1)

    @cached_property
    def count(self) -> int:
        """How many vectors there are, those of zeros included; read from what marks the images."""
        return sum(self._of_record(record) for record in self._records)

    def _of_record(self, record: CommitRecord) -> int:
        per_image = record.facts["arrays"][f"{self._layer}.vectors"]["spec"]["item_shape"][0]
        return int(self._store.read_array(record, "valid").sum()) * int(per_image)


def sampled_vectors(context: Context, layer: str) -> VectorStream:
    """What the units that a context reads sampled at a layer."""
    units = sorted(context.work.upstream, key=lambda unit: unit.shard)
    records = [context.record(unit.stage, unit.variant, unit.shard) for unit in units]
    return VectorStream(context.store, records, layer)


def chosen_vectors(stream: VectorStream, positions: Sequence[int]) -> Tensor:
    """The vectors ``[n, C]`` at rising positions among those that are not zero, in one pass."""
    wanted = torch.tensor(positions, dtype=torch.int64)
    found, first = [], 0
    for block in Blocks(stream):
        here = wanted[(wanted >= first) & (wanted < first + len(block))]
        found.append(block[here - first])
        first += len(block)
    return torch.cat(found)
