"""Dictionary learning: concepts are atoms fitted together with the sparse codes of the vectors."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.concepts.dictionary import Dictionary
from xai_core.concepts.lasso import LASSO_PENALTY, lasso_codes
from xai_core.errors import UsageError
from xai_core.registry import extractors

# Vectors whose codes are held at once when the users of each atom are counted.
_CHUNK = 4096


@dataclass(frozen=True)
class DictionaryLearningOptions:
    """``alpha`` weighs the codes in the fit as the LASSO's penalty does afterwards, relative to unit vectors.

    ``batch_size`` vectors make a step; ``max_iter`` is the most passes over all vectors, and fewer are made once
    the atoms hardly change (``tol``) or ten batches in a row did not lower the smoothed cost.
    """

    alpha: float = LASSO_PENALTY
    batch_size: int = 256
    max_iter: int = 5
    tol: float = 1e-3

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and self.batch_size >= 1 and self.max_iter >= 1 and self.tol >= 0):
            raise UsageError(
                "dictionary_learning: expected alpha > 0, batch_size >= 1, max_iter >= 1 and tol >= 0, got "
                f"{self.alpha}, {self.batch_size}, {self.max_iter} and {self.tol}"
            )


@extractors.register(
    "dictionary_learning",
    options=DictionaryLearningOptions,
    paper="iERF, section VI-A1; Mairal et al. 2009, Online Dictionary Learning for Sparse Coding",
)
def dictionary_learning(vectors: Tensor, atoms: int, options: DictionaryLearningOptions, seed: int) -> Dictionary:
    """Unit-norm atoms of scikit-learn's MiniBatchDictionaryLearning on unit-scaled vectors (Mairal et al. 2009).

    ``sizes`` counts the vectors that use each atom in their LASSO codes of penalty ``alpha``.
    """
    from sklearn.decomposition import MiniBatchDictionaryLearning
    from sklearn.exceptions import ConvergenceWarning

    unit = F.normalize(vectors.double(), dim=1).cpu().numpy()
    learner = MiniBatchDictionaryLearning(
        n_components=atoms,
        alpha=options.alpha,
        batch_size=min(options.batch_size, len(unit)),
        max_iter=options.max_iter,
        tol=options.tol,
        fit_algorithm="cd",
        random_state=seed,
    )
    with warnings.catch_warnings():
        # Codes within a step need not be exact: the next step starts from other atoms.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = torch.from_numpy(learner.fit(unit).components_)
    unit_atoms = F.normalize(found, dim=1).float().to(vectors.device)
    sizes = sum(
        lasso_codes(unit_atoms, chunk, options.alpha).count_nonzero(dim=0) for chunk in vectors.split(_CHUNK)
    )
    return Dictionary(atoms=unit_atoms, sizes=torch.as_tensor(sizes))
