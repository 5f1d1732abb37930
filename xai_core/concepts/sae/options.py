"""The options of sparse autoencoders: what all variants share, and what each adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from xai_core.errors import UsageError
from xai_core.registry import refuse_unread

Centre = Literal["geometric_median", "mean"]

TOP_K = 32
# A latent can hardly stand for one concept where every fourth of them fires on every vector.
FEWEST_ATOMS_PER_ACTIVE = 4


@dataclass(frozen=True)
class TrainingOptions:
    """How a sparse autoencoder is trained.

    ``learning_rate`` is relative to 1 / sqrt(C), the size of one coordinate of an atom; it rises for the share
    ``warm_up`` of the steps and falls linearly to zero over all of them. ``centre`` is where the decoder's offset
    starts. A latent is dead once it has not fired on ``dead_after`` vectors. ``buffer`` vectors are shuffled among
    each other: memory holds no more of them. Every ``log_every`` steps and the last one are logged.
    """

    steps: int = 1000
    batch_size: int = 256
    learning_rate: float = 0.04
    warm_up: float = 0.05
    centre: Centre = "geometric_median"
    dead_after: int = 20_000
    buffer: int = 65_536
    log_every: int = 50

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch_size", "dead_after", "log_every")
        _at_least(self, 2, "buffer")
        if self.learning_rate <= 0:
            raise UsageError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if not 0 <= self.warm_up <= 1:
            raise UsageError(f"warm_up: expected a share of the steps from 0 to 1, got {self.warm_up}")
        if self.centre not in get_args(Centre):
            raise UsageError(f"centre: expected one of {', '.join(get_args(Centre))}, got {self.centre!r}")

    def active(self, atoms: int) -> int:
        """How many of so many latents may fire on a vector."""
        return atoms

    def resampling_steps(self) -> frozenset[int]:
        """The numbers of steps after which dead latents begin anew."""
        return frozenset()

    def revived(self, channels: int) -> tuple[int, float]:
        """Of how many dead latents a vector takes an auxiliary loss, and its weight."""
        return 0, 0.0


@dataclass(frozen=True)
class SaeOptions(TrainingOptions):
    """``l1`` weighs the codes as the LASSO's penalty does, relative to the mean norm of the vectors.

    Dead latents begin anew after the shares ``resample_at`` of the steps, at vectors that are rebuilt badly.
    """

    l1: float = 0.1
    resample_at: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l1 < 0:
            raise UsageError(f"l1: expected 0 or more, got {self.l1}")
        if not all(0 < share < 1 for share in self.resample_at):
            raise UsageError(
                f"resample_at: expected shares of the steps between 0 and 1, got {self.resample_at}; "
                "leave it empty to resample never"
            )

    def resampling_steps(self) -> frozenset[int]:
        """The shares, as steps."""
        return frozenset(round(share * self.steps) for share in self.resample_at)


@dataclass(frozen=True)
class TopKOptions(TrainingOptions):
    """``k`` latents fire on a vector (None: 32, or a quarter of the atoms where these are fewer than 128).

    Dead latents learn to rebuild what the others leave, by a loss of weight ``auxiliary`` (0: none) on the
    ``auxiliary_k`` strongest of them for each vector (None: half as many as there are channels).
    """

    k: int | None = None
    auxiliary: float = 1 / 32
    auxiliary_k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "auxiliary_k"):
            if getattr(self, name) is not None:
                _at_least(self, 1, name)
        if self.auxiliary < 0:
            raise UsageError(f"auxiliary: expected 0 or more, got {self.auxiliary}")
        if not self.auxiliary:
            refuse_unread(self, "while auxiliary is 0", "auxiliary_k")

    def active(self, atoms: int) -> int:
        """How many of so many latents fire on a vector.

        Raises:
            UsageError: more than there are.
        """
        if self.k is None:
            return max(1, min(TOP_K, atoms // FEWEST_ATOMS_PER_ACTIVE))
        if self.k > atoms:
            raise UsageError(
                f"k: expected at most {atoms} (the number of atoms), got {self.k}; ask for fewer active latents "
                "or more atoms"
            )
        return self.k

    def revived(self, channels: int) -> tuple[int, float]:
        """``auxiliary_k`` and ``auxiliary``."""
        return self.auxiliary_k or max(1, channels // 2), self.auxiliary


@dataclass(frozen=True)
class BatchTopKOptions(TopKOptions):
    """As those of TopK; ``k`` latents fire on a vector on average over a batch."""


@dataclass(frozen=True)
class MatryoshkaOptions(BatchTopKOptions):
    """As those of BatchTopK; the first ``prefixes`` (shares of the latents, rising to 1) each rebuild alone."""

    prefixes: tuple[float, ...] = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(low < high for low, high in zip((0.0, *self.prefixes), self.prefixes, strict=False))
        if not self.prefixes or not rising or self.prefixes[-1] != 1:
            raise UsageError(
                f"prefixes: expected rising shares above 0 of which the last is 1, got {self.prefixes}"
            )

    def bounds(self, atoms: int) -> tuple[int, ...]:
        """The sizes of the nested dictionaries, without those that so few atoms make empty or equal."""
        sizes = {round(share * atoms) for share in self.prefixes}
        return tuple(sorted(sizes - {0}))


def _at_least(options: TrainingOptions, least: int, *names: str) -> None:
    for name in names:
        if getattr(options, name) < least:
            raise UsageError(f"{name}: expected at least {least}, got {getattr(options, name)}")
