"""Edges of the concept graph: 20 x 20 concepts of one image and layer pair against one pass and one gradient.

ICAT by integrated gradients with 10 steps needs 10 forward and 200 backward passes of the sub-network, whatever
the number of parents. They are counted in forward-backwards of one row, and of the 10 rows of the path at once;
beside them stands what one parent and child at a time would take, extrapolated from one pair.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from benchmarks.timing import row, timed
from xai_core.concepts import Dictionary
from xai_core.concepts.graph import Alignment, Attribution, decompose
from xai_core.concepts.vectors import to_vectors
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.replay import network_between

CONCEPTS = 20
STEPS = 10
ATOMS = 512
REPEATS = 3
PAIRS = (
    ("deit_tiny_patch16_224", "blocks.5", "blocks.8"),
    ("mobilenetv2_100", "blocks.3", "blocks.5"),
    ("resnet50", "layer2", "layer3"),
)


def run(device: str) -> None:
    """Prints the rows of this benchmark."""
    with torch.no_grad():
        for network, source, target in PAIRS:
            compare(network, source, target, device)


def compare(network: str, source: str, target: str, device: str) -> None:
    """Rows of one network and layer pair: seconds of processor time on the CPU, of the clock on a GPU."""
    question = _question(load_classifier(ModelSpec(network, pretrained=False), device), source, target, device)
    queries = question.source.active.int().topk(CONCEPTS, dim=1).indices
    clock = timed if device == "cuda" else _processor_time
    attribution = Attribution.of("integrated_gradients", {"steps": STEPS})
    functions: dict[str, Callable[[], object]] = {
        "one row": partial(_forward_backward, question, 1),
        "path": partial(_forward_backward, question, STEPS),
        **{f"icat {size}": partial(attribution, question, queries, size) for size in (1, STEPS)},
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(REPEATS + 1):
        for name, function in functions.items():
            seconds = clock(function, device)
            if round_:
                times[name].append(seconds)
    one, path = median(times["one row"]), median(times["path"])
    for size in (1, STEPS):
        spent = median(times[f"icat {size}"])
        row(
            f"{network} {source} -> {target} batch={size}",
            seconds=spent,
            **{
                "over one row's forward-backward": spent / one,
                "over the path's": spent / path,
                "pair by pair over it": CONCEPTS**2 * STEPS * one / spent,
            },
        )


def _question(model: Classifier, source: str, target: str, device: str) -> Alignment:
    """Scores of 20 concepts; dictionaries of random vectors of the layers, coded by one product each."""
    torch.manual_seed(0)
    image = torch.randn(1, 3, *model.input_size, device=device)
    between = network_between(model, image, source, target)
    parts = {source: between.activation, target: between.reached}
    coded = {
        layer: decompose(model, activation, layer, _dictionary(to_vectors(model, activation, layer)[0].float()))
        for layer, activation in parts.items()
    }
    concepts = coded[target].active.int().topk(CONCEPTS, dim=1).indices
    return Alignment(model, coded[source], between, coded[target], concepts)


def _dictionary(vectors: torch.Tensor) -> Dictionary:
    atoms = torch.nn.functional.normalize(vectors[torch.randint(len(vectors), (ATOMS,))], dim=1)
    bias = -0.5 * (vectors @ atoms.T).quantile(0.9).expand(ATOMS)
    encoder = {"weight": atoms, "bias": bias, "offset": torch.zeros_like(atoms[0])}
    return Dictionary(atoms, torch.ones(ATOMS, dtype=torch.long), encoder, "sae")


def _forward_backward(question: Alignment, rows: int) -> None:
    owners = torch.zeros(rows, dtype=torch.long, device=question.concepts.device)
    leaves = (question.source.spread + question.source.offset)[owners].requires_grad_(True)
    with torch.enable_grad():
        score = question.scores(leaves, owners)[:, 0].sum()
    torch.autograd.grad(score, leaves)


def _processor_time(function: Callable[[], object], _device: str) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started
