"""Dictionaries as safetensors files that say which layer of which model they are of."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tasks.stage import Context
from xai_core.concepts import Dictionary
from xai_core.errors import UsageError

_ABOUT = "concepts"

#: Between layer and extractor in the variant of a unit that is about a dictionary.
SEPARATOR = " / "


def dictionary_bytes(dictionary: Dictionary, *, layer: str, extractor: str, weights: str) -> bytes:
    """A dictionary as a file's content.

    Args:
        extractor: the id under which the study names it; weights: the digest of the model's weights.
    """
    tensors = {"atoms": dictionary.atoms, "sizes": dictionary.sizes, **dictionary.encoder}
    about = {
        "layer": layer,
        "extractor": extractor,
        "name": dictionary.extractor,
        "weights": weights,
        "zero_vectors": dictionary.zero_vectors,
    }
    # One entry: the order of several differs from process to process, and with it the file.
    metadata = {_ABOUT: json.dumps(about, sort_keys=True)}
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)


def read_dictionary(path: Path, *, layer: str, weights: str) -> Dictionary:
    """The dictionary in a file, if it is of this layer of the model with these weights.

    Raises:
        UsageError: it is of another layer or model, or the file is no dictionary.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        atoms, sizes = tensors.pop("atoms"), tensors.pop("sizes")
        facts = {name: about[name] for name in ("layer", "weights", "name", "zero_vectors")}
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise _refusal(path, "a dictionary of this version", f"another file ({error!r})") from None
    for name, expected in (("layer", layer), ("weights", weights)):
        if facts[name] != expected:
            raise _refusal(path, f"a dictionary of {name} {expected!r}", f"one of {name} {facts[name]!r}")
    return Dictionary(
        atoms=atoms,
        sizes=sizes,
        encoder=tensors,
        extractor=facts["name"],
        zero_vectors=int(facts["zero_vectors"]),
    )


def committed_dictionary(context: Context, layer: str, extractor: str) -> Dictionary | None:
    """A dictionary of the run on the context's device; None where too few vectors were sampled to fit one.

    Raises:
        UsageError: it is of another layer or of another model.
    """
    record = context.record("dictionary", f"{layer}{SEPARATOR}{extractor}", 0)
    if "dictionary" not in record.facts["files"]:
        return None
    path = context.store.read_file(record, "dictionary")
    weights = context.work.ingredients["model"]["weights"]
    return read_dictionary(path, layer=layer, weights=weights).to(context.device)


def _refusal(path: Path, expected: str, found: str) -> UsageError:
    return UsageError(
        f"{path}: expected {expected}, got {found}; run the study of this model and layer again: it fits its own"
    )
