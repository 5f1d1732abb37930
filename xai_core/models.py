"""timm classifiers behind one handle: loading, preprocessing, layer and token access."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xai_core.create_args import refuse_pickles, weight_files
from xai_core.errors import UsageError, nearest
from xai_core.registry import Family


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build a model again in another process.

    ``transform`` overrides entries of timm's data config (mean, std, interpolation, crop_pct, ...).
    Without ``checkpoint`` and with ``pretrained=False`` the weights are random, drawn from ``seed``.
    """

    name: str
    pretrained: bool = True
    checkpoint: str | None = None
    create_args: Mapping[str, Any] = field(default_factory=dict)
    transform: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


class Classifier:
    """A frozen timm classifier with what explanation needs to know of it.

    Parameters carry no gradient; only inputs and activations ever do. Calling it maps normalised images
    ``[B, 3, H, W]`` to logits ``[B, C]``.
    """

    def __init__(self, module: nn.Module, spec: ModelSpec) -> None:
        from timm.data import resolve_data_config

        self.module = module.eval().requires_grad_(False)
        self.spec = spec
        transform = {"input_size": _built_size(module), **spec.transform}
        transform = {name: value for name, value in transform.items() if value is not None}
        self.data_config: dict[str, Any] = resolve_data_config(args=transform, model=module)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``[B, C]`` of normalised images ``[B, 3, H, W]``."""
        return self.module(images)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the weights."""
        return next(self.module.parameters()).dtype

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width that the preprocessing yields."""
        _, height, width = self.data_config["input_size"]
        return height, width

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return int(self.module.num_classes)

    @cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes where timm knows them, else None."""
        names = (getattr(self.module, "pretrained_cfg", None) or {}).get("label_names")
        if names:
            return tuple(names)
        return _imagenet_names(self.module)

    @cached_property
    def layout(self) -> str:
        """Layout of the final features: ``NLC`` (tokens), ``NCHW`` or ``NHWC``."""
        if self._final_shape.numel() and len(self._final_shape) == 3:
            return "NLC"
        return str(getattr(self.module, "output_fmt", "NCHW"))

    @cached_property
    def _final_shape(self) -> torch.Size:
        zeros = torch.zeros(1, 3, *self.input_size, device=self.device, dtype=self.dtype)
        with torch.no_grad():
            return self.module.forward_features(zeros).shape

    @property
    def final_size(self) -> tuple[int, int]:
        """Rows and columns of the final features: the map's, or the patch tokens'."""
        if self.layout == "NLC":
            return self.token_grid
        rows, columns = self._final_shape[1:3] if self.layout == "NHWC" else self._final_shape[2:]
        return rows, columns

    @property
    def family(self) -> Family:
        """``vit`` where the features are tokens, else ``cnn`` (maps, windowed attention included)."""
        return "vit" if self.layout == "NLC" else "cnn"

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens that stand before the patch tokens."""
        return int(getattr(self.module, "num_prefix_tokens", 0) or 0) if self.family == "vit" else 0

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of patch tokens."""
        patches = self.module.patch_embed
        height, width = self.input_size
        patch_height, patch_width = patches.patch_size
        return height // patch_height, width // patch_width

    def layer(self, name: str) -> nn.Module:
        """The submodule of that name.

        Raises:
            UsageError: the model has no such layer; the message gives the nearest ones.
        """
        with suppress(AttributeError):
            if name:
                return self.module.get_submodule(name)
        known = [known for known, _ in self.module.named_modules() if known]
        raise UsageError(
            f"layer {name!r}: expected a module of {self.spec.name}, got none of that name; "
            + nearest(name, known if len(known) < 40 else _outer_layers(self.module, name, known))
        )

    @cached_property
    def _transform(self) -> Any:
        from timm.data import create_transform

        return create_transform(**self.data_config, is_training=False)

    @cached_property
    def _mask_transform(self) -> Any:
        from timm.data import create_transform

        geometry = {key: self.data_config[key] for key in ("input_size", "crop_pct", "crop_mode")}
        return create_transform(
            **geometry,
            # What a border adds to the picture belongs to no object: 255.
            mean=(1.0, 1.0, 1.0),
            interpolation="nearest",
            is_training=False,
            use_prefetcher=True,
            normalize=False,
        )

    def preprocess(self, picture: Any) -> Tensor:
        """A PIL picture through the model's own evaluation transform: ``[3, H, W]``, normalised."""
        return self._transform(picture.convert("RGB"))

    def preprocess_mask(self, mask: Any) -> Tensor:
        """A PIL mask of one byte a pixel through the same geometry, nearest neighbour: integer ``[H, W]``."""
        from PIL import Image

        plane = Image.fromarray(np.asarray(mask, dtype=np.uint8))
        planes = self._mask_transform(Image.merge("RGB", (plane, plane, plane)))
        return torch.as_tensor(planes)[0].to(torch.int64)

    def normalise(self, pictures: Tensor) -> Tensor:
        """Pictures in [0, 1], ``[B, 3, H, W]``, to the model's input space."""
        return (pictures - self._statistic("mean", pictures)) / self._statistic("std", pictures)

    def denormalise(self, images: Tensor) -> Tensor:
        """Model inputs back to pictures in [0, 1]."""
        return (images * self._statistic("std", images) + self._statistic("mean", images)).clamp(0, 1)

    def as_pictures(self, images: Tensor) -> np.ndarray:
        """Model inputs ``[B, 3, H, W]`` as pictures to look at, uint8 ``[B, H, W, 3]``."""
        shown = self.denormalise(images).permute(0, 2, 3, 1)
        return (shown * 255).round().to(torch.uint8).cpu().numpy()

    def _statistic(self, name: str, like: Tensor) -> Tensor:
        return torch.tensor(self.data_config[name], device=like.device, dtype=like.dtype).view(1, -1, 1, 1)


def load_classifier(spec: ModelSpec, device: str | torch.device = "cpu") -> Classifier:
    """Builds the timm model of a spec with its weights, frozen and in evaluation mode.

    Raises:
        UsageError: an unknown model, a checkpoint that is not safetensors, or keys that do not fit.
    """
    import xai_core.demo_models
    import xai_core.inherent.timm_models  # noqa: F401  (these two register models of our own with timm)

    _check_name(spec)
    torch.manual_seed(spec.seed)
    module = _created(spec)
    if spec.checkpoint is not None:
        load_checkpoint(module, Path(spec.checkpoint))
    return Classifier(module.to(device), spec)


def _check_name(spec: ModelSpec) -> None:
    import timm

    if not timm.is_model(spec.name.split("/")[-1]) and ":" not in spec.name:
        raise UsageError(f"model.name: unknown timm model {spec.name!r}; {nearest(spec.name, timm.list_models())}")
    if spec.name.startswith("local-dir:"):
        raise UsageError(
            f"model.name: expected a timm architecture, got {spec.name!r}; name the architecture and set "
            "model.checkpoint to the folder's .safetensors file"
        )


def _created(spec: ModelSpec) -> nn.Module:
    """The network as timm builds it; a file of weights that its arguments name is read, if it is safetensors."""
    import timm
    from safetensors import SafetensorError

    pretrained = spec.pretrained and spec.checkpoint is None
    # A checkpoint's header names arguments too, and may come from anybody.
    arguments = {**_trained_arguments(spec), **spec.create_args}
    refuse_pickles(arguments, "model.create_args.")
    try:
        return timm.create_model(spec.name, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise UsageError(f"model.create_args: {spec.name} does not take them: {error}") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        named = [path for _, path in weight_files(arguments)]
        if named:
            raise UsageError(
                f"model.create_args: expected safetensors with weights of {spec.name} in {' and '.join(named)} "
                f"({type(error).__name__}: {_first_line(error)})"
            ) from error
        if not pretrained:
            raise
        raise UsageError(
            f"model.pretrained: the weights of {spec.name} could not be fetched ({_first_line(error)}); "
            "set model.checkpoint to a local .safetensors file, or model.pretrained to false for random weights"
        ) from error


def _trained_arguments(spec: ModelSpec) -> dict[str, Any]:
    """What builds the network of a checkpoint that says so: one of ``vitrine train``."""
    from xai_core.training.weights_file import read_about

    if spec.checkpoint is None:
        return {}
    try:
        config = read_about(spec.checkpoint)["config"]
    except UsageError:
        # Weights from elsewhere; whether they fit is seen where they are loaded.
        return {}
    return dict(config.get("create_args", {})) if config.get("name") == spec.name else {}


def load_checkpoint(module: nn.Module, path: Path) -> None:
    """Loads a safetensors file into a module, key by key; pickles are refused unread.

    Raises:
        UsageError: no such file, not safetensors, or keys or shapes that differ from the model's.
    """
    import safetensors
    from safetensors.torch import load_file

    if not path.is_file():
        raise UsageError(f"model.checkpoint: expected a .safetensors file, got no file at {path}")
    if path.suffix != ".safetensors":
        raise UsageError(
            f"model.checkpoint: expected a .safetensors file, got {path.name!r}. Pickles can run code when "
            "they are read and are never opened: convert it once with safetensors.torch.save_file(state_dict, ...)"
        )
    try:
        weights = load_file(path)
    except safetensors.SafetensorError as error:
        raise UsageError(
            f"model.checkpoint: expected safetensors content in {path.name}, got something else "
            f"({_first_line(error)}); a renamed pickle must be converted, not renamed"
        ) from error
    _refuse_misfit(module.state_dict(), weights, path.name)
    module.load_state_dict(weights)


def _refuse_misfit(own: Mapping[str, Tensor], got: Mapping[str, Tensor], name: str) -> None:
    missing = [key for key in own if key not in got]
    unexpected = [key for key in got if key not in own]
    shapes = [
        f"{key} expected {tuple(own[key].shape)}, got {tuple(got[key].shape)}"
        for key in own
        if key in got and own[key].shape != got[key].shape
    ]
    if missing or unexpected or shapes:
        raise UsageError(
            f"model.checkpoint: {name} does not fit the model: {len(missing)} keys missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(shapes)} of another shape {shapes[:3]}; "
            "check model.name and model.create_args"
        )


def weights_digest(module: nn.Module) -> str:
    """sha256 over names, shapes, types and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _imagenet_names(module: nn.Module) -> tuple[str, ...] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(module)
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))


def _built_size(module: nn.Module) -> tuple[int, int, int] | None:
    """The input size that a model was built for, where it is fixed; timm's data config does not know it."""
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    return None if size is None else (3, *size)


def _outer_layers(module: nn.Module, name: str, known: list[str]) -> list[str]:
    """Layers at the depth of ``name``: a list of every submodule would drown the near ones."""
    depth = name.count(".")
    outer = [one for one in known if one.count(".") <= depth]
    return outer or [child for child, _ in module.named_children()]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
