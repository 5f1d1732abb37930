"""The trained networks that a study evaluates: what their files say, and the networks themselves."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from storage.canonical import digest_json
from tasks.config import StudyConfig
from xai_core.errors import UsageError
from xai_core.inherent.evaluation import check_importance
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.training.kinds import kinds
from xai_core.training.weights_file import checkpoint_id, digest_of, read_about

# Networks that a process keeps: all of a study's, for most studies, since each shard asks all of them.
KEPT = 8
# Characters of the digest of a set's members in its id.
_SHOWN = 12


@dataclass(frozen=True)
class Network:
    """A trained network: its file, the content's digest, and the file's header; ``id`` is the stage's variant."""

    id: str
    path: str
    digest: str
    about: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """``ia``, ``ea`` or ``pa``."""
        return str(self.about["kind"])

    @property
    def patch_size(self) -> int:
        """p, in pixels of its own pictures."""
        return int(self.about["config"]["create_args"]["patch_size"])

    @property
    def seed(self) -> int | None:
        """The seed of its training, where its file tells."""
        seed = self.about.get("recipe", {}).get("seed")
        return None if seed is None else int(seed)


@dataclass(frozen=True)
class SeedSet:
    """Networks that one config trained with different seeds; ``id``: how many, and a digest of their files."""

    id: str
    members: tuple[Network, ...]


def seed_sets(networks: Sequence[Network]) -> tuple[SeedSet, ...]:
    """The sets of at least two IAs that differ in nothing but the seed, as far as their files tell.

    An EA and a PA have the importance of the IA that they name: over seeds of their own nothing of it varies.
    Where a seed occurs twice in what would be a set, its networks differ in something that their files do not tell
    (their pictures, say), and there is none.
    """
    alike: dict[str, list[Network]] = defaultdict(list)
    for network in networks:
        if network.kind == "ia" and network.seed is not None:
            recipe = {name: value for name, value in network.about["recipe"].items() if name != "seed"}
            same = [network.about["config"], network.about["model"], recipe]
            alike[json.dumps(same, sort_keys=True)].append(network)
    return tuple(_set_of(some) for some in alike.values() if len({one.seed for one in some}) == len(some) > 1)


def _set_of(members: list[Network]) -> SeedSet:
    ordered = tuple(sorted(members, key=lambda network: (network.seed or 0, network.digest)))
    digest = digest_json([network.digest for network in ordered])[:_SHOWN]
    return SeedSet(f"{ordered[0].kind}[seeds={len(ordered)},{digest}]", ordered)


def networks_of(config: StudyConfig) -> tuple[Network, ...]:
    """The networks of a study in the config's order; none where it evaluates none.

    Raises:
        UsageError: no such file, none of a trained IA, EA or PA, or one that is named twice, be it as a copy.
    """
    found: dict[str, Network] = {}
    for position, path in enumerate(config.importance.networks if config.importance else ()):
        key = f"importance.networks.{position}"
        try:
            network = _described(path, digest_of(path))
        except UsageError as error:
            raise UsageError(f"{key}: {error}") from None
        if network.id in found:
            raise UsageError(
                f"{key}: expected networks that differ, got {path} with the content of {found[network.id].path}; "
                "remove one"
            )
        found[network.id] = network
    return tuple(found.values())


def load_network(network: Network, device: str = "cpu") -> Classifier:
    """The network on a device, built once a process.

    Raises:
        UsageError: weights that do not fit what the file says of them, or no importance: a PA(p, 0).
    """
    return _loaded(network.path, network.digest, network.kind, device)


def title(model: Classifier) -> str:
    """What a network is, as the paper writes it: ``IA(4, 64)``, ``PA(16, 0.1)``."""
    config: Any = model.module.config
    second = getattr(config, "embed_dim", getattr(config, "threshold", None))
    inverted = ", inverted" if getattr(config, "inverted", False) else ""
    return f"{model.spec.name.removeprefix('vitrine_').upper()}({config.patch_size}, {second:g}{inverted})"


@lru_cache(maxsize=64)
def _described(path: str, digest: str) -> Network:
    """Read once a process and content, since every unit of a plan asks."""
    about = read_about(path, kinds=[entry.name for entry in kinds if entry.group == "importance"])
    return Network(f"{about['kind']}[{checkpoint_id(path)}]", path, digest, about)


@lru_cache(maxsize=KEPT)
def _loaded(path: str, digest: str, kind: str, device: str) -> Classifier:
    model = load_classifier(ModelSpec(f"vitrine_{kind}", False, path), device)
    check_importance(model)
    return model
