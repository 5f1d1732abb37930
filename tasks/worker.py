"""What a worker process keeps between shards: models built once, and the pictures of the last shards."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from storage.canonical import digest_bytes, digest_json
from storage.errors import SourceError
from storage.sources import decode_image
from tasks.config import ModelConfig
from tasks.sources import open_source
from tasks.stage import Bad, Context
from xai_core.errors import UsageError
from xai_core.models import Classifier, load_classifier

# Shards whose pictures stay in memory: the methods of one shard run one after the other.
KEPT_SHARDS = 2


@lru_cache(maxsize=2)
def classifier(config_json: str, device: str) -> Classifier:
    """The model of a config, built once per process; only its spec ever travels."""
    return load_classifier(ModelConfig.model_validate_json(config_json).spec(), device)


def resolve_device(device: str) -> str:
    """The device kind that ``auto`` stands for here.

    Raises:
        UsageError: a GPU is asked for and none is there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("run.device: expected a CUDA device, found none; set run.device to auto or cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def study_classifier(context: Context) -> Classifier:
    """The study's model on the context's device."""
    return classifier(context.config.model.model_dump_json(), context.device)


@dataclass(frozen=True)
class Pictures:
    """The readable images of a shard as model inputs.

    ``rows`` are their positions inside the shard, ``image_ids`` their ids, ``inputs`` ``[n, 3, H, W]``;
    ``bad`` are those that can no longer be read as they were listed.
    """

    rows: np.ndarray
    image_ids: np.ndarray
    paths: tuple[str, ...]
    digests: tuple[str, ...]
    inputs: Tensor
    bad: tuple[Bad, ...]

    def __len__(self) -> int:
        return len(self.rows)


_kept: OrderedDict[str, Pictures] = OrderedDict()


def load_pictures(context: Context) -> Pictures:
    """The pictures of the context's shard, on its device; decoded once for all methods of a shard."""
    manifest = context.record("manifest")
    model = study_classifier(context)
    name = digest_json([manifest.key, model.data_config, context.device, context.work.store])
    if name not in _kept:
        _kept[name] = _decode(context, model)
        while len(_kept) > KEPT_SHARDS:
            _kept.popitem(last=False)
    _kept.move_to_end(name)
    return _kept[name]


def _decode(context: Context, model: Classifier) -> Pictures:
    rows = context.store.read_table(context.record("manifest"), "manifest").to_pylist()
    source = open_source(context.config.dataset)
    good, inputs, bad = [], [], []
    for row in rows:
        try:
            content = source.read(row["path"])
            _refuse_changed(content, row["sha256"])
            inputs.append(model.preprocess(decode_image(content)))
            good.append(row)
        except (OSError, SourceError) as error:
            bad.append(Bad(row["image_id"], row["path"], type(error).__name__, str(error)))
    size = (0, 3, *model.input_size)
    image_ids = np.array([row["image_id"] for row in good], np.int64)
    return Pictures(
        rows=image_ids - context.work.start,
        image_ids=image_ids,
        paths=tuple(row["path"] for row in good),
        digests=tuple(row["sha256"] for row in good),
        inputs=(torch.stack(inputs) if inputs else torch.zeros(size)).to(context.device),
        bad=tuple(bad),
    )


def _refuse_changed(content: bytes, expected: str) -> None:
    if digest_bytes(content) != expected:
        raise SourceError("the image changed after it was listed; run again to take the new one")
