"""A study made ready to run: its config with the listing of its images and the digests of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from storage.canonical import digest_bytes, digest_file, digest_json
from storage.listing import Listing, build_listing
from storage.sealed import read_sealed, write_sealed
from storage.store import Store
from tasks.config import DatasetConfig, ModelConfig, StudyConfig
from tasks.importance.networks import Network, SeedSet, networks_of, seed_sets
from tasks.sources import open_source
from tasks.weight_files import file_state
from xai_core.create_args import without_paths
from xai_core.training.weights_file import digest_of


@dataclass(frozen=True)
class Shard:
    """A stretch of the listing: image ids ``start`` to ``stop``, with the digest of its listing rows."""

    index: int
    start: int
    stop: int
    digest: str


class Study:
    """A config bound to a store; says what the images are and how they are cut into shards."""

    def __init__(self, config: StudyConfig, store: Store) -> None:
        self.config = config
        self.store = store

    @cached_property
    def run_id(self) -> str:
        """The same config always has the same id, so that running again is resuming."""
        return f"{self.config.name}-{digest_json(self.config.identity())[:10]}"

    @cached_property
    def listing(self) -> Listing:
        """The ordered listing of the source's images."""
        source = open_source(self.config.dataset)
        return build_listing(source, self.store.root / "listings", self.config.dataset.order_seed)

    @property
    def dataset_path(self) -> str | None:
        """Where the images lie, as an absolute path; None for the demo."""
        path = self.config.dataset.path
        return None if path is None else str(Path(path).resolve())

    @property
    def images(self) -> int:
        """How many images the study takes."""
        return min(self.listing.rows, self.config.dataset.limit or self.listing.rows)

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The study's shards; the last one may be shorter."""
        size = self.config.run.shard_size
        starts = range(0, self.images, size)
        digests = self._listing_digests(size)
        shards = []
        for index, start in enumerate(starts):
            stop = min(start + size, self.images)
            whole = stop == min(start + size, self.listing.rows)
            digest = digests[index] if whole else digest_json(self.listing.slice(start, stop))
            shards.append(Shard(index, start, stop, digest))
        return tuple(shards)

    def _listing_digests(self, size: int) -> list[str]:
        """Digests of all whole shards of the listing, computed once and kept beside it."""
        path = self.listing.path.with_suffix(f".{size}.json")
        digests = read_sealed(path)
        if digests is None:
            digests = [
                digest_json(self.listing.slice(start, min(start + size, self.listing.rows)))
                for start in range(0, self.listing.rows, size)
            ]
            write_sealed(path, digests)
        return list(digests)

    def array_rows(self, shard: Shard) -> tuple[int, int, int]:
        """Where a shard stands in its arrays: first row, rows of the array, rows of an array shard.

        A shard cut short by ``dataset.limit`` has an array of its own: in the common one it would collide
        with the whole shard of a later run without the limit.
        """
        size = self.config.run.shard_size
        if self.is_cut(shard):
            return 0, shard.stop - shard.start, shard.stop - shard.start
        return shard.start, self.listing.rows, min(size, self.listing.rows)

    def is_cut(self, shard: Shard) -> bool:
        """Whether ``dataset.limit`` ends inside this shard."""
        return shard.stop < min(shard.start + self.config.run.shard_size, self.listing.rows)

    @cached_property
    def model(self) -> dict[str, Any]:
        """The classifier as an ingredient of keys."""
        return describe_model(self.config.model, self.store)

    @cached_property
    def backbone(self) -> dict[str, Any] | None:
        """The parser's own backbone as an ingredient of keys, or None."""
        backbone = self.config.parts.backbone
        return None if backbone is None else describe_model(backbone, self.store)

    @cached_property
    def masks(self) -> str | None:
        """A digest over names, sizes and times of the mask files, or None: an edited mask is noticed."""
        return _digest_masks(self.config.dataset.masks)

    @cached_property
    def truth_files(self) -> str | None:
        """A digest of the files that ``truth`` names: of masks as of :attr:`masks`, of boxes the whole table."""
        truth = self.config.truth
        if truth.boxes is None:
            return _digest_masks(truth.masks)
        # The plan is made before the study is checked: a table that is not there is refused then.
        return digest_file(Path(truth.boxes)) if Path(truth.boxes).is_file() else None

    @cached_property
    def labels_are_classes(self) -> bool:
        """Whether the source's labels are the model's classes: then a prediction can be right or wrong."""
        return labels_are_classes(self.config.dataset, self._num_classes)

    @cached_property
    def _num_classes(self) -> int:
        return int(model_facts(self.config.model, self.store)["num_classes"])

    @cached_property
    def test_listing(self) -> Listing | None:
        """The ordered listing of the pictures on which a training is tested, or None."""
        training = self.config.training
        if training is None or training.test is None:
            return None
        folder = self.store.root / "listings"
        return build_listing(open_source(training.test), folder, training.test.order_seed)

    @cached_property
    def networks(self) -> tuple[Network, ...]:
        """The trained networks whose importance is evaluated."""
        return networks_of(self.config)

    @cached_property
    def seed_sets(self) -> tuple[SeedSet, ...]:
        """Those of them that one config trained with different seeds."""
        return seed_sets(self.networks)

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """What shard functions need to know beside the config."""
        known = {"labels_are_classes": self.labels_are_classes}
        test = self.test_listing
        return known if test is None else {**known, "test_listing": str(test.path.resolve()), "tests": test.rows}


def labels_are_classes(dataset: DatasetConfig, num_classes: int) -> bool:
    """Whether a data set's labels are the classes of a model that has so many."""
    names = open_source(dataset).class_names
    return dataset.classes is not None or (names is not None and len(names) == num_classes)


def _digest_masks(folder: str | None) -> str | None:
    if folder is None:
        return None
    files = sorted(path for path in Path(folder).rglob("*.png"))
    return digest_json(
        [(path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    )


def with_digests(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as ingredients of keys: a file that is named as ``checkpoint`` stands there by its digest.

    Raises:
        UsageError: there is no such file.
    """
    found = {name: with_digests(one) if isinstance(one, Mapping) else one for name, one in options.items()}
    named = options.get("checkpoint")
    return {**found, "checkpoint": digest_of(named)} if named else found


def describe_model(config: ModelConfig, store: Store) -> dict[str, Any]:
    """Name, arguments, preprocessing and weights digest of a model, as key ingredients."""
    return {
        "name": config.name,
        "create_args": without_paths(config.create_args),
        "transform": dict(config.transform),
        "weights": model_facts(config, store)["weights"],
    }


def model_facts(config: ModelConfig, store: Store) -> dict[str, Any]:
    """Weights digest and number of classes of a model, kept in the store so that it is loaded once only.

    They are found again whenever a file that weights come from changed its size or time; a checkpoint's digest is
    its file's.
    """
    path = store.root / "models" / f"{digest_bytes(_model_fingerprint(config).encode())[:24]}.json"
    facts = read_sealed(path)
    if facts is None:
        facts = _load_facts(config)
        write_sealed(path, facts)
    return dict(facts)


def _model_fingerprint(config: ModelConfig) -> str:
    fingerprint = digest_json(config.model_dump(mode="json"))
    return fingerprint + "".join(f":{size}:{time}" for _, size, time in file_state(config))


def _load_facts(config: ModelConfig) -> dict[str, Any]:
    from tasks.worker import classifier
    from xai_core.models import weights_digest

    model = classifier(config.model_dump_json(), "cpu")
    weights = (
        digest_file(Path(config.checkpoint)) if config.checkpoint is not None else weights_digest(model.module)
    )
    return {"weights": weights, "num_classes": model.num_classes}
