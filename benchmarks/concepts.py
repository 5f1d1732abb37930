"""LASSO codes against scikit-learn's ``lasso_cd`` on the same atoms, vectors and penalty.

``random``: normal vectors on normal atoms, whose codes are dense. ``features``: vectors of clusters in few
directions on the centroids of bisecting k-means, with codes as sparse as those of networks' features. Both at
K = 2048, C = 256. scikit-learn gets a tenth of the vectors, its time counts tenfold. Times are of the processor,
with one thread on either side; ours are of the clock on a GPU. ``excess``: the largest difference of a vector's
objective from scikit-learn's, relative to it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from sklearn.cluster import BisectingKMeans
from sklearn.decomposition import sparse_encode
from torch import Tensor

from benchmarks.timing import row, timed
from xai_core.concepts import lasso_codes

ATOMS, CHANNELS, VECTORS = 2048, 256, 2000
PENALTY = 0.1
REPEATS = 3
SHARE = 10


def run(device: str) -> None:
    """Prints the rows of this benchmark."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, make in (("random", random), ("features", features)):
            atoms, vectors = (torch.nn.functional.normalize(one, dim=1) for one in make())
            compare(name, atoms, vectors, device)
    finally:
        torch.set_num_threads(threads)


def random() -> tuple[Tensor, Tensor]:
    """Normal atoms and vectors."""
    torch.manual_seed(0)
    return torch.randn(ATOMS, CHANNELS), torch.randn(VECTORS, CHANNELS)


def features() -> tuple[Tensor, Tensor]:
    """Centroids and other vectors of a mixture: shared mean, falling variances, sparse parts."""
    torch.manual_seed(0)
    spread = torch.arange(1, CHANNELS + 1).pow(-0.5)
    mean = torch.randn(CHANNELS)
    parts = torch.randn(600, CHANNELS)
    chosen = (torch.rand(12_000, 600) < 4 / 600) * torch.rand(12_000, 600)
    vectors = mean + chosen @ parts + 3 * torch.randn(12_000, CHANNELS) * spread
    clustering = BisectingKMeans(ATOMS, bisecting_strategy="largest_cluster", random_state=0)
    centroids = clustering.fit(vectors[VECTORS:].numpy()).cluster_centers_
    return torch.from_numpy(centroids).float(), vectors[:VECTORS]


def compare(name: str, atoms: Tensor, vectors: Tensor, device: str) -> None:
    """One row: our time and scikit-learn's over ours, for the default tolerance of its function."""
    few = vectors[: VECTORS // SHARE]
    call = partial(lasso_codes, atoms.to(device), vectors.to(device), PENALTY)
    # The first call warms up.
    found = call().cpu()
    theirs, ours = [], []
    for _ in range(REPEATS):
        seconds, codes = clocked(partial(peer, atoms, few))
        theirs.append(SHARE * seconds)
        ours.append(clocked(call)[0] if device == "cpu" else timed(call, device))
    excess = objective(atoms, few, found[: len(few)]) / objective(atoms, few, codes) - 1
    row(
        f"lasso {name} K={ATOMS} C={CHANNELS} N={VECTORS}",
        **{
            "seconds": median(ours),
            "scikit-learn's": median(theirs),
            "over ours": median(theirs) / median(ours),
            "atoms a vector": found.count_nonzero(dim=1).float().mean().item(),
            "excess": excess.abs().max().item(),
        },
    )


def peer(atoms: Tensor, vectors: Tensor) -> Tensor:
    """scikit-learn's codes in float64, where it converges; it warns where its rounds do not do."""
    first, second = atoms.double().numpy(), vectors.double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        codes = sparse_encode(second, first, gram=first @ first.T, algorithm="lasso_cd", alpha=PENALTY)
    return torch.from_numpy(codes)


def clocked(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds of the processor and the result."""
    started = time.process_time()
    result = function()
    return time.process_time() - started, result


def objective(atoms: Tensor, vectors: Tensor, codes: Tensor) -> Tensor:
    """Equation 12 of iERF, in float64."""
    error = vectors.double() - codes.double() @ atoms.double()
    return error.square().sum(dim=1) / 2 + PENALTY * codes.double().abs().sum(dim=1)
