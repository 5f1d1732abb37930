"""Metrics over the forwards they need, against Quantus and pytorch-grad-cam, and in bf16.

``over_bare``: our time over that of a loop that forwards as many ready pictures. ``peer``: the peer's time for the
same metric, or for all of them one after the other, over ours; both get the same pictures, maps, masks and
explanation function, and as many steps, samples and percentages. Quantus knows no insertion: its pixel flipping
runs on the reversed map instead. Its areas fail under NumPy 2.4 (the curves are left as they are), its IROF and
ROAD on colour pictures: for ROAD the peer is pytorch-grad-cam.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import alternate, median, row, timed
from xai_core.attribution import attribute
from xai_core.attribution.explainer import Explainer
from xai_core.metrics import Evaluation, Evidence, Truth, evaluate
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.parts import parse_parts
from xai_core.precision import Precision
from xai_core.registry import build_options, metrics

DATA = Path(__file__).parents[2] / "shared" / "data"
STEPS = 48
SAMPLES = 10
PERCENTAGES = tuple(range(10, 100, 10))
BATCH_SIZE = 32


@dataclass(frozen=True)
class Network:
    """A network with random weights, how many pictures are measured on it, and how often."""

    title: str
    spec: ModelSpec
    images: int
    repeats: int


SMALL = {"channels": (16, 32, 64, 64), "stem_width": 16, "num_classes": 10}
NETWORKS = (
    Network("DeiT-tiny", ModelSpec("deit_tiny_patch16_224", False), 2, 1),
    Network("ResNet-50", ModelSpec("resnet50", False), 2, 1),
    Network(
        "small CNN, 32 x 32",
        ModelSpec("resnet10t", False, create_args=SMALL, transform={"input_size": (3, 32, 32)}),
        64,
        3,
    ),
)


@dataclass(frozen=True)
class Pair:
    """A metric of ours with its options, and the class of Quantus that measures the same."""

    ours: str
    options: dict[str, Any]
    theirs: str
    arguments: Callable[[Subject], dict[str, Any]] = field(default=lambda subject: {})
    reverse: bool = False


def _flipping(subject: Subject) -> dict[str, Any]:
    # It counts the three channels of a pixel one by one, and wants a divisor of the pixels: 48 steps.
    portion = subject.images[0, 0].numel() * 3 // STEPS
    return {"features_in_step": portion, "perturb_baseline": "black"}


CURVE = {"baseline": "black", "steps": STEPS}
PAIRS = (
    Pair("deletion", CURVE, "PixelFlipping", _flipping),
    Pair("insertion", CURVE, "PixelFlipping", _flipping, reverse=True),
    Pair("faithfulness_correlation", {"samples": 100}, "FaithfulnessCorrelation", lambda _: {"nr_runs": 100}),
    Pair("avg_sensitivity", {"samples": SAMPLES}, "AvgSensitivity", lambda _: {"nr_samples": SAMPLES}),
    Pair("max_sensitivity", {"samples": SAMPLES}, "MaxSensitivity", lambda _: {"nr_samples": SAMPLES}),
    Pair("stability", {"samples": SAMPLES}, "LocalLipschitzEstimate", lambda _: {"nr_samples": SAMPLES}),
    Pair("gini", {}, "Sparseness"),
    Pair("entropy", {}, "Complexity"),
    Pair("effective_complexity", {}, "EffectiveComplexity"),
    Pair("pointing_game", {}, "PointingGame"),
    Pair("attribution_localisation", {}, "AttributionLocalisation"),
    Pair("top_k_intersection", {"k": 100}, "TopKIntersection", lambda _: {"k": 100}),
)


@dataclass(frozen=True)
class Subject:
    """What is measured: a model, pictures, their maps by plain gradients, parts and masks."""

    model: Classifier
    images: Tensor
    targets: Tensor
    maps: Tensor
    parts: Tensor
    mask: Tensor

    @classmethod
    def of(cls, network: Network, device: str) -> Subject:
        """Random pictures of the network's size."""
        model = load_classifier(network.spec, device)
        height, width = model.input_size
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(network.images, 3, height, width, generator=generator).to(device)
        with torch.no_grad():
            targets = model(images).argmax(dim=1)
        mask = torch.zeros(network.images, height, width, dtype=torch.uint8, device=device)
        mask[:, height // 4 : -(height // 4), width // 4 : -(width // 4)] = 1
        maps = attribute(model, images, targets, method="gradient", batch_size=BATCH_SIZE)
        return cls(model, images, targets, maps, parse_parts(model, images, parser="grid", k=12), mask)

    def evidence(self, precision: Precision = "fp32") -> Evidence:
        """Fresh evidence: nothing is derived yet."""
        explainer = Explainer("gradient", batch_size=BATCH_SIZE)
        return Evidence(
            self.model,
            self.images,
            self.targets,
            self.maps,
            parts=self.parts,
            truth=Truth(mask=self.mask),
            explainer=explainer,
            batch_size=BATCH_SIZE,
            precision=precision,
        )


def run(device: str) -> None:
    """Prints the rows of this benchmark."""
    warnings.filterwarnings("ignore")
    for network in NETWORKS:
        subject = Subject.of(network, device)
        over_bare_forwards(network, subject, device)
        against_quantus(network, subject, device)
        against_pytorch_grad_cam(network, subject, device)
    in_half_precision(device)


def chosen(*pairs: Pair) -> list[tuple[Any, Any]]:
    """Our metrics with their options."""
    return [(metrics.get(pair.ours), build_options(metrics.get(pair.ours), pair.options)) for pair in pairs]


def measure(subject: Subject, wanted: list[tuple[Any, Any]], precision: Precision = "fp32") -> Evaluation:
    """Our values from nothing derived before."""
    return evaluate(subject.evidence(precision), wanted)


def over_bare_forwards(network: Network, subject: Subject, device: str) -> None:
    """The whole family of curves at T = 50 over the forwards that it needs."""
    names = ("insertion", "deletion", "aopc", "srg", "p_insertion", "p_deletion", "p_aopc")
    wanted = [(metrics.get(name), metrics.get(name).options()) for name in names]
    pictures = count_pictures(subject, wanted)
    batch = torch.randn(BATCH_SIZE, *subject.images.shape[1:], device=device)
    times = alternate(
        {"ours": partial(measure, subject, wanted), "bare": partial(plain_loop, subject.model, batch, pictures)},
        max(3, network.repeats),
        device,
    )
    shares = [ours / bare for ours, bare in zip(times["ours"], times["bare"], strict=True)]
    row(f"{network.title}, {len(names)} curve metrics", pictures=str(pictures), over_bare=median(shares))


def count_pictures(subject: Subject, wanted: list[tuple[Any, Any]]) -> int:
    """How many pictures go through the network."""
    seen: list[int] = []
    handle = subject.model.module.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    try:
        measure(subject, wanted)
    finally:
        handle.remove()
    return sum(seen)


def plain_loop(model: Classifier, batch: Tensor, pictures: int) -> None:
    """So many pictures in full batches and a rest, nothing else."""
    with torch.no_grad():
        for first in range(0, pictures, BATCH_SIZE):
            model(batch[: min(BATCH_SIZE, pictures - first)])


def against_quantus(network: Network, subject: Subject, device: str) -> None:
    """One row a metric, and one for all of them: Quantus' time over ours."""
    theirs = {pair.ours: partial(quantus, pair, subject, device) for pair in PAIRS}
    ours = {pair.ours: partial(measure, subject, chosen(pair)) for pair in PAIRS}
    totals: list[float] = []
    for name, peer in theirs.items():
        times = alternate({"ours": ours[name], "peer": peer}, network.repeats, device)
        totals.append(median(times["peer"]))
        row(f"{network.title}, {name}", ours_s=median(times["ours"]), peer=totals[-1] / median(times["ours"]))
    together = median([timed(partial(measure, subject, chosen(*PAIRS)), device) for _ in range(network.repeats)])
    row(f"{network.title}, all {len(PAIRS)}", ours_s=together, peer=sum(totals) / together)


def quantus(pair: Pair, subject: Subject, device: str) -> Any:
    """Quantus' values of one metric."""
    import quantus as peer

    metric = getattr(peer, pair.theirs)(
        **pair.arguments(subject), disable_warnings=True, display_progressbar=False
    )
    maps = subject.maps.amax() - subject.maps if pair.reverse else subject.maps
    return metric(
        model=subject.model.module,
        x_batch=subject.images.cpu().numpy(),
        y_batch=subject.targets.cpu().numpy(),
        a_batch=maps[:, None].cpu().numpy(),
        s_batch=subject.mask[:, None].cpu().numpy().astype(bool),
        explain_func=partial(_explain, classifier=subject.model),
        softmax=True,
        device=device,
        batch_size=BATCH_SIZE,
    )


def _explain(model: nn.Module, inputs: Any, targets: Any, *, classifier: Classifier, **_more: Any) -> np.ndarray:
    """Our explanation function as Quantus calls it."""
    images = torch.as_tensor(np.asarray(inputs), dtype=torch.float32, device=classifier.device)
    classes = torch.as_tensor(np.asarray(targets), dtype=torch.long, device=classifier.device)
    return attribute(classifier, images, classes, method="gradient", batch_size=BATCH_SIZE)[:, None].cpu().numpy()


def against_pytorch_grad_cam(network: Network, subject: Subject, device: str) -> None:
    """ROAD, both orders combined: the peer's time over ours."""
    from pytorch_grad_cam.metrics.road import ROADCombined
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    peer = ROADCombined(percentiles=list(PERCENTAGES))
    wanted = [(metrics.get("road"), metrics.get("road").options())]
    targets = [ClassifierOutputSoftmaxTarget(int(target)) for target in subject.targets]
    times = alternate(
        {
            "ours": partial(measure, subject, wanted),
            "peer": lambda: peer(subject.images, subject.maps.cpu().numpy(), targets, subject.model.module),
        },
        network.repeats,
        device,
    )
    row(
        f"{network.title}, road, pytorch-grad-cam",
        ours_s=median(times["ours"]),
        peer=median(times["peer"]) / median(times["ours"]),
    )


def in_half_precision(device: str) -> None:
    """Insertion and deletion of Grad-CAM on photographs: time in float32 over bf16, and the largest change."""
    checkpoint = DATA / "models" / "deit_tiny_patch16_224.safetensors"
    if not checkpoint.is_file():
        print(f"bf16: needs {checkpoint}, which is not part of the repository")
        return
    from PIL import Image

    model = load_classifier(ModelSpec("deit_tiny_patch16_224", checkpoint=str(checkpoint)), device)
    files = sorted((DATA / "imagenet-sample" / "images").rglob("*.jpg"))[::62][:16]
    images = torch.stack([model.preprocess(Image.open(file).convert("RGB")) for file in files]).to(device)
    with torch.no_grad():
        targets = model(images).argmax(dim=1)
    maps = attribute(model, images, targets, method="grad_cam")
    subject = Subject(model, images, targets, maps, torch.zeros_like(maps), torch.zeros_like(maps))
    wanted = [(metrics.get(name), metrics.get(name).options()) for name in ("insertion", "deletion")]
    times = alternate(
        {"fp32": partial(measure, subject, wanted), "bf16": partial(measure, subject, wanted, "bf16")}, 3, device
    )
    whole, half = measure(subject, wanted), measure(subject, wanted, "bf16")
    changes = [float((whole.values[name] - half.values[name]).abs().max()) for name in whole.values]
    row(
        "DeiT-tiny (trained), insertion and deletion",
        fp32_over_bf16=median(times["fp32"]) / median(times["bf16"]),
        largest_change=max(changes),
        images=str(len(images)),
    )
