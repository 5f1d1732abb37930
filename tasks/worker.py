"""What a worker process keeps between shards: models built once, and the pictures of the last shards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from storage.canonical import digest_json
from tasks.config import ModelConfig
from tasks.quarantine import IMAGE_ERRORS, set_aside
from tasks.sources import open_source, read_listed
from tasks.stage import Bad, Context
from tasks.weight_files import FileState, file_state
from xai_core.errors import UsageError
from xai_core.models import Classifier, load_classifier

# Shards whose pictures stay in memory: the methods of one shard run one after the other.
KEPT_SHARDS = 2


def classifier(config_json: str, device: str) -> Classifier:
    """The model of a config, built once per process and content of its files; only its spec ever travels."""
    return built_classifier(config_json, device, file_state(ModelConfig.model_validate_json(config_json)))


@lru_cache(maxsize=2)
def built_classifier(config_json: str, device: str, state: FileState) -> Classifier:
    """The same, of files in the state that is told."""
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

    @property
    def given(self) -> int:
        """How many images these are, readable or not."""
        return len(self.rows) + len(self.bad)

    def of_images(self, image_ids: Collection[int]) -> Pictures:
        """Those of some images alone, readable or not."""
        kept = np.array([image_id in image_ids for image_id in self.image_ids.tolist()], bool)
        bad = tuple(one for one in self.bad if one.image_id in image_ids)
        return self.take(np.flatnonzero(kept).tolist(), bad)

    def take(self, positions: Sequence[int], bad: tuple[Bad, ...] = ()) -> Pictures:
        """The readable ones at some positions, in their order; nothing is copied where these are all."""
        if len(positions) == len(self):
            return replace(self, bad=bad)
        return Pictures(
            rows=self.rows[positions],
            image_ids=self.image_ids[positions],
            paths=tuple(self.paths[position] for position in positions),
            digests=tuple(self.digests[position] for position in positions),
            inputs=self.inputs[positions],
            bad=bad,
        )

    def as_bad(self, failed: Mapping[int, Exception]) -> tuple[Bad, ...]:
        """The pictures at these positions with the errors that they met."""
        return tuple(
            set_aside(int(self.image_ids[position]), self.paths[position], error)
            for position, error in sorted(failed.items())
        )


_kept: OrderedDict[str, Pictures] = OrderedDict()


def load_pictures(context: Context, model: Classifier | None = None) -> Pictures:
    """The pictures of the context's shard, on its device; decoded once for all who want them in the same way.

    Args:
        model: whose preprocessing they go through; the study's where None.
    """
    manifest = context.record("manifest")
    model = study_classifier(context) if model is None else model
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
            inputs.append(model.preprocess(read_listed(source, row["path"], row["sha256"])))
            good.append(row)
        except IMAGE_ERRORS as error:
            bad.append(set_aside(row["image_id"], row["path"], error))
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
