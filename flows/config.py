"""Reading a study's config: YAML, overrides from the command line, and errors a person can act on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tasks.config import StudyConfig
from xai_core.create_args import weight_files
from xai_core.errors import UsageError, nearest

DEMO = Path(__file__).with_name("demo.yaml")

PathKeys = tuple[tuple[str, ...], ...]

# Paths in a file are relative to the file, so that a config works from any folder.
PATH_KEYS: PathKeys = (
    ("dataset", "path"),
    ("dataset", "classes"),
    ("dataset", "masks"),
    ("truth", "masks"),
    ("truth", "boxes"),
    ("model", "checkpoint"),
    ("parts", "backbone", "checkpoint"),
    ("training", "kind", "checkpoint"),
    ("training", "test", "path"),
    ("training", "test", "classes"),
    ("importance", "networks"),
)
# The same of the files of weights that a model's arguments name, at any depth.
CREATE_ARGS = ("model", "create_args")
# And of every method and metric that is chosen.
CHOSEN_PATHS: PathKeys = (("checkpoint",), ("of", "checkpoint"))


# Pydantic's words name Python types, which YAML does not have.
PLAIN = {
    "tuple_type": "expected a list",
    "dict_type": "expected a mapping of keys",
    "model_type": "expected a mapping of keys",
    "mapping_type": "expected a mapping of keys",
}


def load_config(path: Path | None, overrides: Iterable[str] = (), limit: int | None = None) -> StudyConfig:
    """The study of a config file (none: the demo) with ``key.path=value`` overrides applied.

    Raises:
        UsageError: an unreadable file, or keys or values that are wrong; the message names each.
    """
    limits = () if limit is None else (f"dataset.limit={limit}",)
    document = _read(path or DEMO)
    for override in (*overrides, *limits):
        _apply(document, override)
    # Those that --set gave are relative to where the command was given; workers may stand elsewhere.
    _resolve_all(document, Path.cwd())
    try:
        return StudyConfig.model_validate(document)
    except ValidationError as error:
        raise UsageError("\n".join(_explain(one) for one in error.errors())) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"config: expected a YAML file, got no file at {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"config: {path} is not readable YAML: {error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"config: expected a mapping of keys in {path}, got {type(document).__name__}")
    document.setdefault("name", re.sub(r"[^A-Za-z0-9_.+=,@-]", "_", path.stem)[:100])
    _resolve_all(document, path.resolve().parent)
    return document


def _resolve_all(document: Mapping[str, Any], folder: Path) -> None:
    for keys in PATH_KEYS:
        _resolve(document, keys, folder)
    for chosen in (*_listed(document, "metrics"), *_listed(document, "methods")):
        for keys in CHOSEN_PATHS:
            _resolve(chosen, keys, folder)
    for key, _ in weight_files(_inside(document, CREATE_ARGS)):
        _resolve(document, (*CREATE_ARGS, *key.split(".")), folder)


def _listed(document: Mapping[str, Any], key: str) -> list[Any]:
    found = document.get(key)
    return found if isinstance(found, list) else []


def _inside(document: Any, keys: tuple[str, ...]) -> MutableMapping[str, Any]:
    """The mapping under the keys, an empty one where there is none; what else stands there is told later."""
    for key in keys:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document if isinstance(document, MutableMapping) else {}


def _resolve(document: Any, keys: tuple[str, ...], folder: Path) -> None:
    within = _inside(document, keys[:-1])
    if isinstance(within.get(keys[-1]), (str, list)):
        within[keys[-1]] = _resolved(within[keys[-1]], folder)


def _resolved(given: Any, folder: Path) -> Any:
    """A path, or each of several; what is none is told when the config is checked."""
    if isinstance(given, list):
        return [_resolved(one, folder) for one in given]
    return str((folder / given).resolve()) if isinstance(given, str) and given else given


def _apply(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UsageError(f"--set: expected key.path=value, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {key}: expected a YAML value, got {text!r}: {error}") from None
    _put(document, key.split("."), value)


def _put(document: Any, keys: list[str], value: Any) -> None:
    for position, key in enumerate(keys[:-1]):
        child = _child(document, key, keys[: position + 1])
        if isinstance(child, str) and not isinstance(document, list):
            # ``model: NAME`` is short for ``model: {name: NAME}``.
            child = {"name": child}
            document[key] = child
        document = child
    if isinstance(document, list):
        document[_index(document, keys[-1], keys)] = value
    elif isinstance(document, dict):
        document[keys[-1]] = value
    else:
        raise UsageError(f"--set {'.'.join(keys)}: {'.'.join(keys[:-1])} holds {document!r}, not keys")


def _child(document: Any, key: str, keys: list[str]) -> Any:
    if isinstance(document, list):
        return document[_index(document, key, keys)]
    if not isinstance(document, dict):
        raise UsageError(f"--set {'.'.join(keys)}: expected a key of a mapping, got {document!r} there")
    if document.get(key) is None:
        document[key] = {}
    return document[key]


def _index(document: list[Any], key: str, keys: list[str]) -> int:
    if not key.isdigit() or int(key) >= len(document):
        raise UsageError(f"--set {'.'.join(keys)}: expected a position below {len(document)}, got {key!r}")
    return int(key)


def _explain(error: Any) -> str:
    """One line for one wrong key: its path, what was expected and what was got."""
    where = ".".join(str(one) for one in error["loc"]) or "config"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key; {nearest(where.split('.')[-1], _known_keys(error['loc'][:-1]))}"
    message = PLAIN.get(error["type"], error["msg"].removeprefix("Value error, "))
    given = error["input"]
    shown = "" if error["type"] == "value_error" else f", got {given!r}"
    return f"{where}: {message}{shown}"


def _known_keys(location: Iterable[Any]) -> list[str]:
    model: Any = StudyConfig
    for key in location:
        model = model.model_fields[key].annotation if key in getattr(model, "model_fields", {}) else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            model = next((one for one in getattr(model, "__args__", ()) if hasattr(one, "model_fields")), None)
        if model is None:
            return []
    return list(model.model_fields)
