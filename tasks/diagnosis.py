"""Diagnosis of one picture: through which concepts classes compete, and what an attack changes (iERF, VI-E)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.commits import Unit
from storage.results import Results
from storage.store import Store
from tasks.concept_config import GraphConfig
from tasks.config import StudyConfig
from tasks.dictionary_file import SEPARATOR, read_dictionary
from tasks.predict import names_of_classes
from tasks.study import labels_are_classes, model_facts
from tasks.worker import classifier
from xai_core.concepts.dictionary import Dictionary
from xai_core.concepts.graph import (
    Comparison,
    ConceptGraph,
    Routes,
    compare,
    concept_graph,
    fgsm,
    strongest_routes,
)
from xai_core.errors import UsageError, nearest
from xai_core.models import Classifier

TOP = 5


@dataclass(frozen=True)
class Studied:
    """A run whose dictionaries explain pictures: its config, model and what it committed."""

    config: StudyConfig
    results: Results
    model: Classifier
    class_names: tuple[str, ...]
    extractor: str
    dictionaries: dict[str, Dictionary]

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that have a dictionary, from early to late."""
        return self.config.concepts.layers

    @property
    def graph(self) -> GraphConfig:
        """How the run makes its graphs; the defaults where it makes none."""
        return self.config.concepts.graph_or_default

    def class_of(self, wanted: str) -> int:
        """A class by its number or its name.

        Raises:
            UsageError: the model has no such class, or several of that name.
        """
        if wanted.isdigit() and int(wanted) < self.model.num_classes:
            return int(wanted)
        lower = [name.lower() for name in self.class_names]
        found = [index for index, name in enumerate(lower) if wanted.strip().lower() in (name, *name.split(", "))]
        if len(found) != 1:
            told = f"{len(found)} of that name" if found else nearest(wanted, self.class_names)
            raise UsageError(
                f"--classes: expected a class of {self.model.spec.name} by number (0 to "
                f"{self.model.num_classes - 1}) or name, got {wanted!r}; {told}"
            )
        return found[0]


@dataclass(frozen=True)
class Attack:
    """An attack by the fast gradient sign method: its picture, its most likely classes, and what it changed."""

    epsilon: float
    picture: np.ndarray
    top: list[tuple[str, float]]
    comparison: Comparison
    routes: Routes


@dataclass(frozen=True)
class Diagnosis:
    """The concept graph of one picture for several classes; pictures are uint8 ``[H, W, 3]``."""

    studied: Studied
    classes: tuple[int, ...]
    picture: np.ndarray
    top: list[tuple[str, float]]
    graph: ConceptGraph
    routes: Routes
    attack: Attack | None = None

    def lines(self) -> list[str]:
        """What is printed: the most likely classes, and for each class asked about its strongest route."""
        told = [f"{probability:6.1%}  {name}" for name, probability in self.top]
        if self.attack is not None:
            told += [f"{probability:6.1%}  {name} (attacked)" for name, probability in self.attack.top]
        return told + self.route_lines()

    def route_lines(self) -> list[str]:
        """The strongest route of each class, and what the classes share."""
        places = range(len(self.classes))
        told = [self._route(place, self.routes) for place in places]
        told.append(self._told_shared())
        if self.attack is not None:
            told += [f"after the attack: {self._route(place, self.attack.routes)}" for place in places]
        return told

    def _route(self, place: int, routes: Routes) -> str:
        name = self.studied.class_names[self.classes[place]]
        concepts = routes.concepts[0, place].tolist()
        if concepts[0] < 0:
            return f"{name}: no route of concepts that all feed the next"
        steps = [f"{layer} {concept}" for layer, concept in zip(self.studied.layers, concepts, strict=True)]
        return f"{name}: {' -> '.join(steps)} (strength {routes.strength[0, place]:.3f})"

    def _told_shared(self) -> str:
        shared = [f"{layer} {concept}" for layer in self.studied.layers for concept in self.shared(layer)]
        return f"shared by these classes: {', '.join(shared) or 'no concept'}"

    def shared(self, layer: str) -> list[int]:
        """The concepts of a layer that feed every one of the classes."""
        nodes = self.graph.nodes[layer]
        feeds_all = (nodes.importance[0] > 0).all(dim=1)
        return nodes.concepts[0][feeds_all].tolist()


def open_study(store: Store, run_id: str | None, extractor: str | None, device: str) -> Studied:
    """The dictionaries of a run, with all that is needed to explain pictures by them.

    Raises:
        UsageError: no run, or one without dictionaries, or without any of that extractor.
    """
    run = store.runs.read(run_id) if run_id else store.runs.latest()
    if run is None:
        runs = ", ".join(one.run_id for one in store.runs.all()) or "none"
        raise UsageError(f"--run: expected a run of {store.root}, got {run_id}; its runs: {runs}")
    config = StudyConfig.model_validate(run.config)
    known = [choice.id for choice in config.concepts.extractors] if config.concepts.layers else []
    chosen = extractor or next(iter(config.concepts.graph_extractors or known), None)
    if chosen is None or chosen not in known:
        raise UsageError(
            f"--extractor: expected one of run {run.run_id} ({', '.join(known) or 'it has no dictionaries'}), got "
            f"{chosen}; a study fits dictionaries where it names concepts.layers"
        )
    model = classifier(config.model.model_dump_json(), device)
    names = names_of_classes(config.dataset, model, labels_are_classes(config.dataset, model.num_classes))
    weights = str(model_facts(config.model, store)["weights"])
    units = run.units()
    dictionaries = {
        layer: _read(store, units, f"{layer}{SEPARATOR}{chosen}", layer, weights).to(device)
        for layer in config.concepts.layers
    }
    return Studied(config, store.results(run.run_id), model, names, chosen, dictionaries)


def _read(store: Store, units: dict[Unit, str], variant: str, layer: str, weights: str) -> Dictionary:
    unit = Unit("dictionary", variant, 0)
    record = store.done(unit, units[unit]) if unit in units else None
    if record is None or "dictionary" not in record.facts["files"]:
        raise UsageError(
            f"--run: expected the dictionary {variant!r}, the run has none (yet): let it end, or "
            "give it more images where it had too few vectors"
        )
    return read_dictionary(store.read_file(record, "dictionary"), layer=layer, weights=weights)


def diagnose(
    studied: Studied,
    picture: Any,
    classes: Sequence[int],
    *,
    epsilon: float | None = None,
    towards: int | None = None,
) -> Diagnosis:
    """The concept graph of a picture for several classes, and what an attack changes in it.

    Args:
        picture: a PIL picture; epsilon: of an attack, of 255; towards: the class that it wants, by default the
            last of ``classes``.
    """
    model = studied.model
    image = model.preprocess(picture).unsqueeze(0).to(model.device)
    wanted = torch.tensor([list(classes)], device=model.device)
    options, size = studied.graph.options(), studied.config.run.batch_size
    of = (wanted, studied.layers, studied.dictionaries)
    graph = concept_graph(model, image, *of, options=options, batch_size=size)
    attack = None
    if epsilon is not None:
        goal = torch.tensor([classes[-1] if towards is None else towards], device=model.device)
        moved = fgsm(model, image, goal, epsilon=epsilon)
        comparison = compare(model, image, moved, *of, options=options, batch_size=size)
        shown = model.as_pictures(moved)[0]
        routes = strongest_routes(comparison.after)
        attack = Attack(epsilon, shown, _top(studied, moved), comparison, routes)
    return Diagnosis(
        studied,
        tuple(classes),
        model.as_pictures(image)[0],
        _top(studied, image),
        graph,
        strongest_routes(graph),
        attack,
    )


def _top(studied: Studied, image: Tensor) -> list[tuple[str, float]]:
    with torch.no_grad():
        probabilities = studied.model(image).float().softmax(dim=1)[0]
    best = probabilities.topk(min(TOP, len(probabilities)))
    return [(studied.class_names[index], value) for value, index in zip(*map(Tensor.tolist, best), strict=True)]
