"""VAR (Visualizing Actually Relevant features): a method's map where its class outbids other classes' maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.arithmetic import wide
from xai_core.attribution.class_sets import ClassSet, by_probability, most_classes, with_targets
from xai_core.attribution.interface import MapsWithArrays, upsample_map
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.registry import MethodEntry, build_options, methods, variant_id

DEFAULT_K = 5

# Maps of input size held for one picture of a batch: what the first convolution of a ResNet puts out takes as
# much, so that the passes themselves stay the larger part of the memory.
MAPS_PER_PICTURE = 16

# Equal maps give 1/K up to the last bits of a mean of three; such a tie is no dominance.
TIE_ULPS = 4


@dataclass(frozen=True)
class VarOptions:
    """Options of VAR.

    ``of``: a method's name, or a mapping with ``name`` and its options. ``classes``: ``given`` (the classes listed
    under ``given``), ``top_k+lowest`` (the ``k`` most probable and the least probable) or ``best_worst``; the
    target joins the set where it is absent. ``inverse_temperatures``: factors of the softmax, whose results are
    averaged. ``keep_distributions``: hand out every class's share of every pixel too; it changes no map and is
    not part of the id.
    """

    of: str | Mapping[str, Any] = field(default="grad_cam", hash=False, metadata={"names": "method"})
    classes: ClassSet = "top_k+lowest"
    k: int = DEFAULT_K
    given: tuple[int, ...] = ()
    inverse_temperatures: tuple[float, ...] = (1.0, 5.0, 100.0)
    keep_distributions: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", _written_out(self.of))
        object.__setattr__(self, "given", tuple(sorted(set(self.given))))
        if self.classes not in ("given", "top_k+lowest", "best_worst"):
            raise UsageError(f"var.classes: expected given, top_k+lowest or best_worst, got {self.classes!r}")
        if self.k < 1:
            raise UsageError(f"var.k: expected at least 1, got {self.k}")
        if self.classes != "top_k+lowest" and self.k != DEFAULT_K:
            raise UsageError(f"var.k: expected with classes top_k+lowest only, got {self.k} with {self.classes}")
        if self.classes == "given" and (len(self.given) < 2 or self.given[0] < 0):
            raise UsageError(f"var.given: expected two or more class indices, got {list(self.given)}")
        if self.classes != "given" and self.given:
            raise UsageError(f"var.given: expected with classes given only, got it with {self.classes}")
        if not self.inverse_temperatures or not all(0 < one < float("inf") for one in self.inverse_temperatures):
            raise UsageError(
                "var.inverse_temperatures: expected positive finite numbers, "
                f"got {list(self.inverse_temperatures)}"
            )

    def base(self) -> tuple[MethodEntry, Any]:
        """The wrapped method and its options."""
        named = _written_out(self.of)
        entry = methods.get(named.pop("name"))
        return entry, build_options(entry, named)

    def in_id(self) -> dict[str, Any]:
        """What stands in the id: the wrapped method's own id and the class set; the rest off its default."""
        entry, options = self.base()
        shown: dict[str, Any] = {"of": variant_id(entry.name, options), "classes": self.classes}
        if self.classes == "top_k+lowest":
            shown["k"] = self.k
        if self.classes == "given":
            shown["given"] = self.given
        if self.inverse_temperatures != VarOptions.inverse_temperatures:
            shown["inverse_temperatures"] = self.inverse_temperatures
        return shown


def _written_out(of: Any) -> dict[str, Any]:
    """A method's name, or a mapping with its name and options, as a mapping with all its options."""
    named = {"name": of} if isinstance(of, str) else dict(of) if isinstance(of, Mapping) else {}
    name = named.pop("name", None)
    if not isinstance(name, str):
        raise UsageError(f"var.of: expected a method's name, or a mapping with 'name' and its options, got {of!r}")
    entry = methods.get(name)
    return {"name": name, **asdict(build_options(entry, named))}


def needs_class_maps(model: Classifier, options: VarOptions) -> str | None:
    """A wrapped method of pixel maps, one for each class."""
    entry, _ = options.base()
    if entry.wraps is not None:
        return f"'of' names {entry.name!r}, which contrasts classes already"
    if entry.output == "parts":
        return f"'of' names {entry.name!r}, which scores parts; VAR contrasts maps pixel by pixel"
    if not entry.class_specific:
        return f"'of' names {entry.name!r}, whose map is the same for every class: there is nothing to contrast"
    return None


def needs_its_classes(model: Classifier, options: VarOptions) -> str | None:
    """Two classes or more, and those that 'given' lists."""
    if model.num_classes < 2:
        return f"it contrasts classes, and the model has {model.num_classes}"
    if options.given and options.given[-1] >= model.num_classes:
        return f"'given' lists class {options.given[-1]}, and the model's are 0..{model.num_classes - 1}"
    return None


def kept_arrays(options: VarOptions) -> dict[str, tuple[str, ...]]:
    """The arrays beside the map, where they are kept, and their dimensions."""
    if not options.keep_distributions:
        return {}
    return {"distributions": ("class", "y", "x"), "classes": ("class",), "base": ("y", "x")}


@methods.register(
    "var",
    options=VarOptions,
    paper="Walter et al. 2025, Now you see me! Attribution Distributions Reveal What is Truly Important",
    equation="2, 3.3",
    needs=(needs_class_maps, needs_its_classes),
    cost="1 forward for the class set + the wrapped method for K classes",
    arrays=kept_arrays,
    wraps=VarOptions.base,
)
def var(
    model: Classifier, images: Tensor, classes: Tensor, options: VarOptions, batch_size: int, **learned: Any
) -> Tensor | MapsWithArrays:
    """VAR: another method's map times its class's share of each pixel, 0 where that is no more than 1/K.

    ``learned`` is what the wrapped method is given beside the rest, where it learns from data.
    """
    base, base_options = options.base()

    def explain(images: Tensor, classes: Tensor) -> Tensor:
        return base.function(model, images, classes, base_options, batch_size, **learned)

    slots = most_classes(options.classes, options.k, options.given, model.num_classes)
    held = slots + classes.shape[1] - 1
    together = min(batch_size, max(1, MAPS_PER_PICTURE * batch_size // held))
    groups = -(-len(images) // together)
    found = run_batches(
        lambda rows: _contrasted(model, explain, images[rows], classes[rows], options, slots),
        len(images),
        -(-len(images) // groups),
    )
    maps = torch.cat([one.maps for one in found])
    if not options.keep_distributions:
        return maps
    return MapsWithArrays(maps, {name: torch.cat([one.arrays[name] for one in found]) for name in found[0].arrays})


def _contrasted(
    model: Classifier,
    explain: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    targets: Tensor,
    options: VarOptions,
    slots: int,
) -> MapsWithArrays:
    """The maps ``[B, T, H, W]`` of some images' targets, and what is kept beside them."""
    base, _ = options.base()
    contest = with_targets(_class_set(model, images, options), targets)
    maps = explain(images, contest.classes).detach()
    maps = wide(maps)
    full = upsample_map(maps.flatten(0, 1), images.shape[-2:], base.upsampling).unflatten(0, maps.shape[:2])
    results, kept = [], []
    for target in range(targets.shape[1]):
        own, members = contest.own[:, target], contest.members[:, target]
        shares = class_shares(full, members, options.inverse_temperatures)
        results.append(refined(full, shares, own, members))
        if options.keep_distributions:
            kept.append(_arrays(full, shares, own, members, contest.classes, slots))
    arrays = {name: torch.stack([one[name] for one in kept], dim=1) for name in (kept[0] if kept else ())}
    return MapsWithArrays(torch.stack(results, dim=1), arrays)


def _class_set(model: Classifier, images: Tensor, options: VarOptions) -> Tensor:
    if options.classes == "given":
        return torch.tensor([options.given], device=images.device).expand(len(images), -1)
    return by_probability(model(images), options.k if options.classes == "top_k+lowest" else 1)


def class_shares(maps: Tensor, members: Tensor, inverse_temperatures: Sequence[float]) -> Tensor:
    """Each class's share q of each pixel: softmax over classes, averaged over temperatures (VAR, equation 2).

    Args:
        maps: ``[B, U, H, W]``; members: ``[B, U]`` bool, the classes that take part.

    Returns:
        ``[B, U, H, W]``; over the members of an image they add to 1 at each pixel, the others have 0. The maps of
        an image are divided by the largest magnitude in any of them, so that they lie in [-1, 1] and keep their 0.
    """
    largest = maps.abs().amax(dim=(2, 3)).masked_fill(~members, 0.0).amax(dim=1).view(-1, 1, 1, 1)
    scaled = maps / torch.where(largest == 0, torch.ones_like(largest), largest)
    scaled = scaled.masked_fill(~members[:, :, None, None], -torch.inf)
    total = torch.zeros_like(scaled)
    for factor in inverse_temperatures:
        total += (factor * scaled).softmax(dim=1)
    return total / len(inverse_temperatures)


def refined(maps: Tensor, shares: Tensor, own: Tensor, members: Tensor) -> Tensor:
    """H q [q > 1/K] of one class an image (VAR, section 3.3), ``[B, H, W]``; own: its slot, ``[B]``."""
    slot = own.view(-1, 1, 1, 1).expand(-1, 1, *maps.shape[-2:])
    target, share = maps.gather(1, slot).squeeze(1), shares.gather(1, slot).squeeze(1)
    chance = 1.0 / members.sum(dim=1).to(share.dtype).view(-1, 1, 1)
    dominates = share > chance * (1.0 + TIE_ULPS * torch.finfo(share.dtype).eps)
    # A product, not a choice: NaN must stay NaN, so that its image is set aside.
    return target * share * dominates


def _arrays(
    maps: Tensor, shares: Tensor, own: Tensor, members: Tensor, classes: Tensor, slots: int
) -> dict[str, Tensor]:
    """Shares, class ids and the wrapped method's map; the target comes first, an empty slot has class -1."""
    place = torch.arange(classes.shape[1], device=own.device)
    rank = torch.where(place == own.unsqueeze(1), 0, torch.where(members, 1, 2))
    order = rank.argsort(dim=1, stable=True)[:, :slots]
    ids = torch.where(members, classes, -1).gather(1, order)
    ordered = shares.half().gather(1, order[:, :, None, None].expand(-1, -1, *maps.shape[-2:]))
    missing = slots - order.shape[1]
    return {
        "distributions": F.pad(ordered, (0, 0, 0, 0, 0, missing)),
        "classes": F.pad(ids, (0, missing), value=-1),
        "base": maps[torch.arange(len(maps), device=own.device), own].float(),
    }
