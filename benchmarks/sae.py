"""Training steps of sparse autoencoders over the bare matrix products that they need.

The yardstick are six products of a batch ``[B, C]`` with a dictionary of K = 8 C latents, two forward and four
backward, with nothing around them, timed in the same rounds. "of bare speed" is their time over that of a step;
the target is 0.7. It can exceed 1: the offset is folded into the encoder's bias, which saves one of the six.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.timing import alternate, median, row
from xai_core.concepts.sae import VARIANTS, Training
from xai_core.precision import own_modes
from xai_core.registry import build_options, extractors

# Channels of DeiT-tiny and of a ResNet-50's third stage; a GPU has use for larger batches and layers.
SIZES = {"cpu": ((192, 256), (192, 1024), (512, 1024)), "cuda": ((768, 4096), (1024, 16384))}
OVERCOMPLETE = 8
STEPS = 10
ROUNDS = 5


def run(device: str) -> None:
    """Prints the rows of this benchmark."""
    for channels, batch in SIZES[device]:
        compare(channels, batch, device)


def compare(channels: int, batch: int, device: str) -> None:
    """One row for each variant, at one size."""
    functions: dict[str, Callable[[], object]] = {
        "bare": partial(bare_products, batch, channels, device),
        **{name: training(name, channels, batch, device) for name in VARIANTS},
    }
    times = alternate(functions, ROUNDS, device)
    for name in VARIANTS:
        ratios = [bare / ours for bare, ours in zip(times["bare"], times[name], strict=True)]
        row(
            f"{name} C={channels} K={OVERCOMPLETE * channels} B={batch}",
            **{"ms/step": 1000 * median(times[name]) / STEPS, "of bare speed": median(ratios)},
        )


def training(name: str, channels: int, batch: int, device: str) -> Callable[[], object]:
    """Some steps of a training in the middle of its way."""
    atoms = OVERCOMPLETE * channels
    vectors = torch.randn(max(atoms, 4 * batch), channels, generator=torch.Generator().manual_seed(0))
    options = build_options(extractors.get(name), {"batch_size": batch, "steps": 1_000_000})
    begun = Training([vectors.to(device)], extractor=name, options=options, atoms=atoms, device=device)
    return partial(begun.advance, STEPS)


def bare_products(batch: int, channels: int, device: str) -> None:
    """The products alone: codes and vectors forward; gradients of both matrices, of the codes and of the input."""
    x, error = (torch.empty(batch, channels, device=device).normal_() for _ in range(2))
    encoder, decoder = (torch.empty(OVERCOMPLETE * channels, channels, device=device).normal_() for _ in range(2))
    with own_modes("fp32", device):
        for _ in range(STEPS):
            codes = x @ encoder.T
            _ = codes @ decoder
            gradient = error @ decoder.T
            _ = codes.T @ error
            _ = gradient.T @ x
            _ = gradient @ encoder
