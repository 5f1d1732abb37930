"""What the arguments of ``timm.create_model`` say of weights, those of networks inside a network included.

A backbone's arguments stand inside its network's, so every function here looks into mappings at any depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from xai_core.errors import UsageError

#: Files of weights; timm's ``file`` stands among the facts.
_FILES = frozenset({"checkpoint_path", "file"})
#: Where a download is kept.
_FOLDERS = frozenset({"cache_dir"})
#: Facts of weights: the file they are in, and what their pictures were prepared with.
_FACTS = frozenset({"pretrained_cfg", "pretrained_cfg_overlay"})


def that_build(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that shape the network, without any that speaks of its weights."""
    return {
        name: that_build(value) if isinstance(value, Mapping) else value
        for name, value in arguments.items()
        if name not in _FILES | _FOLDERS | _FACTS
    }


def without_paths(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without where weights lie; other facts of them stay, for mean and std prepare the pictures."""
    found = {
        name: without_paths(value) if isinstance(value, Mapping) else value
        for name, value in arguments.items()
        if name not in _FILES | _FOLDERS
    }
    return {name: value for name, value in found.items() if not (name in _FACTS and value == {})}


def weight_files(arguments: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, str]]:
    """Every file of weights that arguments name: the dotted key that names it, and its path."""
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from weight_files(value, f"{inside}{name}.")
        elif name in _FILES and value:
            yield f"{inside}{name}", str(value)


def refuse_pickles(arguments: Mapping[str, Any], inside: str = "") -> None:
    """Refuses every file of weights that is not safetensors.

    Raises:
        UsageError: the key, and the file that it names.
    """
    for key, path in weight_files(arguments, inside):
        if not path.endswith(".safetensors"):
            raise UsageError(
                f"{key}: expected a .safetensors file, got {path!r}; pickles can run code when they are read and "
                "are never opened"
            )
