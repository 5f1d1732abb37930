"""The plan: every unit of a study with its key, and the reason why it would run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from storage.attempts import ATTEMPT
from storage.canonical import digest_json
from storage.commits import KEY_CHARACTERS, Unit, differences, key_of
from storage.store import series_of
from tasks.pipeline import STAGES
from tasks.stage import Stage, Work
from tasks.study import Shard, Study


@dataclass(frozen=True)
class Planned:
    """A unit of a study.

    ``key`` and ``work`` are None while its key cannot be known yet: its manifest has to run first, and if that
    finds the images as they were, the unit turns out to be done.

    ``reason`` is None where the unit is done: else ``missing``, ``code``, ``config``, ``upstream``,
    ``corrupt`` or ``retry``, and ``detail`` says which ingredient or file.
    """

    unit: Unit
    key: str | None
    reason: str | None
    detail: str = ""
    make_work: Callable[[], Work] | None = field(default=None, repr=False, compare=False)

    @property
    def work(self) -> Work | None:
        """What there is to do; made when asked for, since most units of a plan are done."""
        return self.make_work() if self.make_work else None


# Which entry of the ingredients a change in means what, in the order in which it is told.
REASONS = (
    ("version", "code"),
    ("config", "config"),
    ("model", "config"),
    ("upstream", "upstream"),
    ("images", "upstream"),
    (ATTEMPT, "retry"),
)


class Planner:
    """Plans the stages of a study one by one; each stage's keys rest on those of the stages before."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._keys: dict[Unit, str | None] = {}
        self._series: dict[tuple[str, str], str] = {}
        self._content: dict[int, str] = {}
        self._files: dict[tuple[str, str], dict[int, list[Path]]] = {}
        self._store_path = str(study.store.root.resolve())

    @cached_property
    def _listing_path(self) -> str:
        return str(self.study.listing.path.resolve())

    @cached_property
    def _attempts(self) -> Mapping[str, int]:
        return self.study.store.attempts.all()

    @cached_property
    def _facts(self) -> Mapping[str, Any]:
        return {**self.study.facts, "run_id": self.study.run_id}

    def all(self) -> list[Planned]:
        """The whole study, stage by stage."""
        return [planned for stage in STAGES.values() for planned in self.stage(stage)]

    def stage(self, stage: Stage) -> list[Planned]:
        """All units of one stage; the stages that it reads must have been planned before."""
        with _without_collections():
            planned = [
                self._plan_unit(stage, variant, shard)
                # By shard first: a worker then finds the pictures of a shard still in memory for the next method.
                for shard in (self.study.shards if stage.sharded else (None,))
                for variant in stage.variants(self.study)
            ]
        for one in planned:
            self._keys[one.unit] = one.key
        return planned

    def _plan_unit(self, stage: Stage, variant: str, shard: Shard | None) -> Planned:
        unit = Unit(stage.name, variant, shard.index if shard else 0)
        upstream = self._upstream(stage, variant, shard)
        images = self._images(stage, shard)
        if images is None or any(key is None for key in upstream.values()):
            reason = "upstream" if self._older(unit) else "missing"
            return Planned(unit, None, reason, "waits for the manifest")
        known = {one: key for one, key in upstream.items() if key is not None}
        ingredients: dict[str, Any] = {
            "stage": stage.name,
            "version": stage.version,
            "variant": variant,
            "config": stage.reads(self.study, variant),
            "model": self.study.model if stage.reads_model else None,
            "upstream": _upstream_ingredient(known, whole=shard is None),
            "images": images,
        }
        key = key_of(ingredients)
        attempt = self._attempts.get(key[:KEY_CHARACTERS])
        if attempt is not None:
            ingredients[ATTEMPT] = attempt
            key = key_of(ingredients)
        make = partial(self._work, stage, unit, shard, key, ingredients, known)
        return Planned(unit, key, *self._reason(unit, key, ingredients), make)

    def _upstream(self, stage: Stage, variant: str, shard: Shard | None) -> dict[Unit, str | None]:
        wanted = set(stage.upstream(self.study, variant))
        if shard is not None:
            units = [
                Unit(name, other, shard.index if STAGES[name].sharded else 0)
                for name, other in stage.upstream(self.study, variant)
            ]
            return {unit: self._keys[unit] for unit in units}
        return {unit: key for unit, key in self._keys.items() if (unit.stage, unit.variant) in wanted}

    def _images(self, stage: Stage, shard: Shard | None) -> str | None:
        """What a unit's images are: the listing's rows for the manifest, their content for all that follows."""
        if shard is None:
            return ""
        if stage.name == "manifest":
            return shard.digest
        if shard.index not in self._content:
            unit = Unit("manifest", "", shard.index)
            key = self._keys[unit]
            record = self.study.store.commits.read(unit, key) if key else None
            if record is None:
                return None
            self._content[shard.index] = str(record.facts["content"])
        return self._content[shard.index]

    def _work(
        self,
        stage: Stage,
        unit: Unit,
        shard: Shard | None,
        key: str,
        ingredients: Mapping[str, Any],
        upstream: Mapping[Unit, str],
    ) -> Work:
        place = shard or Shard(0, 0, self.study.images, "")
        first_row, rows, shard_rows = self.study.array_rows(place) if shard else (0, 0, 0)
        return Work(
            unit=unit,
            key=key,
            ingredients=ingredients,
            series=self._series_of(stage, unit.variant, place if shard and self.study.is_cut(place) else None),
            start=place.start,
            stop=place.stop,
            first_row=first_row,
            rows=rows,
            shard_rows=shard_rows,
            config=self.study.config,
            store=self._store_path,
            listing=self._listing_path,
            facts=self._facts,
            upstream=upstream,
        )

    def _series_of(self, stage: Stage, variant: str, cut: Shard | None) -> str:
        """What an array's shards have in common: all that goes into their keys but the shard itself."""
        if (stage.name, variant) not in self._series:
            self._series[stage.name, variant] = series_of(
                stage.name,
                stage.version,
                variant,
                stage.reads(self.study, variant),
                self.study.model if stage.reads_model else None,
                [
                    self._series_of(STAGES[name], other, None)
                    for name, other in stage.upstream(self.study, variant)
                    if stage.sharded
                ],
                self.study.listing.digest,
                self.study.config.run.shard_size,
            )
        whole = self._series[stage.name, variant]
        return whole if cut is None else series_of(whole, cut.index, cut.stop)

    def _reason(self, unit: Unit, key: str, ingredients: Mapping[str, Any]) -> tuple[str | None, str]:
        record = self.study.store.commits.read(unit, key)
        if record is not None:
            damage = self.study.store.damage(record)
            # A damaged one is made again, and may find other images.
            if unit.stage == "manifest" and not damage:
                self._content[unit.shard] = str(record.facts["content"])
            return ("corrupt", "; ".join(damage)) if damage else (None, "")
        older = self.study.store.commits.load(self._older(unit))
        return why(older[-1].ingredients, ingredients) if older else ("missing", "")

    def _older(self, unit: Unit) -> list[Path]:
        """The files of a unit's records under whatever key, from one look at the folder for all its units."""
        place = unit.stage, unit.variant
        if place not in self._files:
            self._files[place] = self.study.store.commits.of_variant(*place)
        return self._files[place].get(unit.shard, [])


@contextmanager
def _without_collections() -> Iterator[None]:
    """Holds the garbage collector: plans make no cycles, and it would look at every unit again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def why(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, str]:
    """The reason for a rerun, from the ingredients of the last commit and of the one to come."""
    for entry, reason in REASONS:
        if old.get(entry) != new.get(entry):
            return reason, "; ".join(differences({entry: old.get(entry)}, {entry: new.get(entry)}))
    return "missing", ""


def _upstream_ingredient(keys: Mapping[Unit, str], *, whole: bool) -> dict[str, str]:
    """Upstream keys by unit; a unit over all shards takes one digest of them instead of thousands.

    A shard does not depend on its manifest's key, which changes when a file is touched or moved: what the
    images are is an ingredient of its own.
    """
    named = {str(unit): key for unit, key in sorted(keys.items()) if whole or unit.stage != "manifest"}
    return {"all": digest_json(named)} if whole else named


def to_run(planned: Iterable[Planned]) -> list[Work]:
    """The works of all planned units that are not done."""
    return [work for one in planned if one.reason is not None and (work := one.work) is not None]
