"""What a training leaves: a safetensors file whose header says what is in it and which model it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from xai_core.errors import UsageError
from xai_core.models import Classifier, weights_digest

_ABOUT = "trained"
# Digits of a digest that stand in ids.
_SHOWN = 12
#: What ``about`` says at least: kind, what builds the network, digest of the explained model's weights or None.
FACTS = ("kind", "config", "weights", "model")


def trained_bytes(weights: nn.Module | Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """A module's weights and buffers as a file's content.

    Args:
        weights: a module, or its state.
        about: what :data:`FACTS` name, and whatever else is to be known; plain JSON. The same weights and facts
            give the same bytes.
    """
    missing = [name for name in FACTS if name not in about]
    if missing:
        raise UsageError(f"about: expected {', '.join(FACTS)}, got no {', '.join(missing)}")
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    # One entry: the order of several differs from process to process, and with it the file.
    header = {_ABOUT: json.dumps(about, sort_keys=True)}
    return save({name: one.detach().cpu().contiguous() for name, one in sorted(tensors.items())}, header)


def save_trained(path: Path | str, module: nn.Module | Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes :func:`trained_bytes` to a file."""
    Path(path).write_bytes(trained_bytes(module, about))


def read_trained(
    path: Path | str, *, kinds: Collection[str] | None = None, weights: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file that :func:`save_trained` wrote, and what it says about them; pickles stay unread.

    Args:
        kinds: which are expected; any where None.
        weights: the digest of the model that is to be explained, see :func:`model_digest`.

    Raises:
        UsageError: no such file, not one of this project, of another kind, or of another model.
    """
    about = read_about(path, kinds=kinds, weights=weights)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (it is no mapping)


def read_about(
    path: Path | str, *, kinds: Collection[str] | None = None, weights: str | None = None
) -> dict[str, Any]:
    """The header of a file alone; arguments and errors as in :func:`read_trained`."""
    remedy = "train one with `vitrine train`"
    if not Path(path).is_file():
        got = f"no file at {path}" if str(path) else "none named"
        raise UsageError(f"checkpoint: expected a .safetensors file, got {got}; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
        found = {name: about[name] for name in FACTS}
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UsageError(
            f"checkpoint: expected a file that `vitrine train` wrote, got {path}, which is none "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from None
    if kinds is not None and found["kind"] not in kinds:
        raise UsageError(
            f"checkpoint: expected one of kind {' or '.join(kinds)}, got kind {found['kind']} in {path}; {remedy}"
        )
    if weights is not None and found["weights"] not in (None, weights):
        raise UsageError(
            f"checkpoint: expected one that was trained for the model with weights {weights}, got {path} for "
            f"{found['weights']}; name that model, or train anew for this one"
        )
    return dict(about)


def digest_of(path: Path | str) -> str:
    """sha256 of a file's content; read again only where its size or time changed.

    Raises:
        UsageError: no such file.
    """
    if not Path(path).is_file():
        got = f"none at {path}" if str(path) else "none named"
        raise UsageError(f"checkpoint: expected a file, got {got}")
    stat = Path(path).stat()
    return _digest(str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns)


def checkpoint_id(path: Path | str) -> str:
    """What stands for a file in the ids of methods: the first digits of :func:`digest_of`."""
    return digest_of(path)[:_SHOWN]


@lru_cache(maxsize=256)
def _digest(path: str, size: int, time: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_digest(model: Classifier) -> str:
    """What says whose weights these are, wherever they came from; computed again only where one of them changed.

    It is not that of the model's file: a copy with other weights still names the file that it was loaded from.
    """
    state = model.module.state_dict()
    make = tuple((name, tensor.data_ptr(), tensor._version) for name, tensor in state.items())
    before = _known.get(model.module)
    if before is None or before[0] != make:
        before = _known[model.module] = make, weights_digest(model.module)
    return before[1]


_known: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()
