"""What the gallery's pictures are made of: tiles, and rows of committed arrays."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
import xarray
from PIL import Image

from storage.results import Results
from tasks.stage import Context
from tasks.worker import study_classifier
from xai_core.attribution import upsample_map
from xai_core.render import overlay

LONGEST_SIDE = 224
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Tile:
    """A picture as a data URI, or None where there is none; ``note`` says why."""

    name: str
    uri: str | None
    alternative: str
    note: str = ""


class Rows:
    """Rows of committed arrays by image, each array opened once and read where it is asked for."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._names = frozenset(results.array_names())
        self._arrays: dict[str, xarray.DataArray] = {}

    def row(self, name: str, image_id: int) -> xarray.DataArray | None:
        """An image's row of an array, or None where it has none."""
        if name not in self._names:
            return None
        if name not in self._arrays:
            self._arrays[name] = self._results.xarray(name)
        rows = self._arrays[name]
        if image_id not in rows.indexes["image"]:
            return None
        row = rows.sel(image=image_id)
        return row if bool(row["valid"]) else None


def stored_map(context: Context, rows: Rows, method: str, image_id: int) -> np.ndarray:
    """A method's map at input resolution ``[H, W]``, empty ``[0, 0]`` where the image has none."""
    values = rows.row(f"attribute/{method}/maps", image_id)
    scale = rows.row(f"attribute/{method}/scale", image_id)
    if values is None or scale is None:
        return np.zeros((0, 0))
    scaled = torch.from_numpy(values.values.astype(np.float32)) * float(scale)
    size = study_classifier(context).input_size
    return upsample_map(scaled.unsqueeze(0), size, values.attrs["upsampling"] or None)[0].numpy()


def map_tile(method: str, values: np.ndarray, picture: np.ndarray, has_sign: bool, subject: str) -> Tile:
    """A map over its picture; a note where there is none, or where it says nothing."""
    if values.size == 0:
        return Tile(method, None, f"no map by {method} of {subject}", "no map")
    note = "constant map" if values.min() == values.max() else ""
    uri = data_uri(overlay(picture, values, signed=has_sign))
    return Tile(method, uri, f"relevance by {method} over {subject}", note)


def data_uri(picture: np.ndarray) -> str:
    """A picture as a small JPEG inside a data URI."""
    stream = io.BytesIO()
    image = Image.fromarray(picture)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    image.save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
