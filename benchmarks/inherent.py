"""IA, EA and PA learn CIFAR-10 within minutes of a CPU: accuracy, sparsity, and accuracy by threshold.

Small networks on few pictures for few epochs, so these are no figures to compare architectures by (the configs in
``configs/training`` are for that). They show that both stages learn, and what it costs to hide the patches that IA
calls unimportant, or the others. Seconds are the process' CPU time for the training.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import row
from xai_core.inherent.evaluation import ThresholdRow, evaluate
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.registry import build_options
from xai_core.training import CrossEntropy, Recipe, Training, kinds, save_trained
from xai_core.training import evaluate as measured

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
PICTURES, HELD_OUT, TEST = 10_000, 1000, 2000
RECIPE = Recipe(epochs=5, precision="bf16", shift=0, crop=0.6)
# Both heirs begin where the IA ended.
HEIRS = replace(RECIPE, epochs=3)
NETWORK: dict[str, Any] = {"num_classes": 10, "img_size": 32, "patch_size": 4, "importance_width": 16}
EMBEDDINGS: dict[str, Any] = {**NETWORK, "embed_dim": 64, "component_width": 16}
BACKBONE: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256], "output_stride": 8}
MASKED = 0.2

Labelled = tuple[Tensor, Tensor]


def run(device: str) -> None:
    """Prints the rows of this benchmark."""
    pictures, labels = read("train", PICTURES + HELD_OUT)
    learnt = (pictures[HELD_OUT:], labels[HELD_OUT:]), (pictures[:HELD_OUT], labels[:HELD_OUT])
    test = read("test", TEST)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "ia.safetensors"
        report("IA(4, 64)", train("ia", EMBEDDINGS, {}, RECIPE, learnt, device, file), test)
        heir = {"checkpoint": str(file)}
        context = {**EMBEDDINGS, "context_width": 32}
        report("EA(4, 64)", train("ea", context, heir, HEIRS, learnt, device), test)
        backbone = {**NETWORK, "backbone": "resnet18", "backbone_args": BACKBONE}
        model = train("pa", backbone, {}, HEIRS, learnt, device)
        row("PA(4, 0)", accuracy=measured(CrossEntropy(model.module, model.normalise), test, Recipe())["score"])
        model = train("pa", {**backbone, "threshold": MASKED}, heir, HEIRS, learnt, device)
        report(f"PA(4, {MASKED})", model, test)


def read(split: str, count: int) -> Labelled:
    """The first pictures of a split as bytes ``[N, 3, 32, 32]``, and their labels."""
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(CIFAR / f"{split}.parquet").slice(0, count)
    files = (one["bytes"] for one in table["image"].to_pylist())
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())


def train(
    kind: str,
    create_args: Mapping[str, Any],
    options: Mapping[str, Any],
    recipe: Recipe,
    learnt: tuple[Labelled, Labelled],
    device: str,
    file: Path | None = None,
) -> Classifier:
    """A trained network of a kind, with the weights of its best epoch on the held-out pictures."""
    entry = kinds.get(kind)
    model = load_classifier(ModelSpec(f"vitrine_{kind}", False, create_args=create_args), device)
    chosen = build_options(entry, options)
    training = Training(entry.function(model, chosen), *learnt[0], recipe, held_out=learnt[1], device=device)
    began = time.process_time()
    training.advance()
    scores = [row.value for row in training.log if (row.split, row.name) == ("held_out", "score")]
    row(
        f"{kind}: held-out accuracy by epoch",
        seconds=time.process_time() - began,
        scores=" ".join(f"{score:.3f}" for score in scores),
    )
    if file is not None:
        about = {"kind": kind, "config": entry.config(model, chosen), "weights": None, "model": {}}
        save_trained(file, training.weights(), about)
    model.module.load_state_dict(training.weights())
    return Classifier(model.module, model.spec)


def report(label: str, model: Classifier, test: Labelled) -> None:
    """Prints what an evaluation on the test pictures finds."""
    found = evaluate(model, *test)
    own = found.thresholds[0]
    row(label, accuracy=own.accuracy, masked=own.masked, **{one.metric: one.value for one in found.semanticity})
    for direction in ("insertion", "deletion"):
        curve = [one for one in found.thresholds if one.direction == direction]
        row(f"  {direction}: accuracy (masked)", **{str(one.threshold): _pair(one) for one in curve})


def _pair(one: ThresholdRow) -> str:
    return f"{100 * one.accuracy:.1f} ({100 * one.masked:.0f})"
