"""Versions of what a result depends on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from platform import platform, python_version

PACKAGES = (
    "vitrine",
    "torch",
    "torchvision",
    "timm",
    "captum",
    "scikit-learn",
    "scikit-image",
    "numpy",
    "zarr",
    "pyarrow",
    "duckdb",
    "prefect",
    "dask",
)


def versions() -> dict[str, str]:
    """Versions of the packages, of Python and of the system."""
    return {name: _version(name) for name in PACKAGES} | {"python": python_version(), "platform": platform()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
