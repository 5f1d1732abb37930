"""Explaining single pictures, without a store: for people with one picture and one question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flows.config import load_config
from storage.errors import SourceError
from storage.sources import decode_image
from tasks.config import Choice, RunConfig, StudyConfig, options_of
from tasks.worker import classifier, resolve_device
from xai_core.attribution import attribute, paint_parts, score_parts
from xai_core.attribution.interface import check_method, fitting_entry
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.parts import parse_parts
from xai_core.parts.labels import mean_inside_parts
from xai_core.precision import precision_context
from xai_core.registry import methods, parsers

DEFAULT_MODEL = "deit_tiny_patch16_224"
TOP = 5


@dataclass(frozen=True)
class Request:
    """What ``vitrine explain`` was asked for beside the pictures."""

    config: Path | None
    model: str | None
    checkpoint: Path | None
    methods: tuple[str, ...]
    target: int | None
    overrides: tuple[str, ...]

    def study(self) -> StudyConfig:
        """The model, parts and methods to use, as a study's config."""
        chosen = list(self.overrides)
        if self.config is None or self.model is not None:
            # A config's own model arguments would not fit another model.
            chosen.insert(0, f"model={{name: {self.model or DEFAULT_MODEL}}}")
        if self.checkpoint is not None:
            chosen.append(f"model.checkpoint={self.checkpoint}")
        if self.methods:
            chosen.append(f"methods=[{', '.join(self.methods)}]")
        return load_config(self.config, chosen)


@dataclass(frozen=True)
class Explanation:
    """One picture explained: everything that the sheet and the printed lines show."""

    picture: np.ndarray
    classes: list[tuple[str, float]]
    target: str
    parts: np.ndarray
    maps: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]

    def lines(self) -> list[str]:
        """Top classes, and each method's three highest parts."""
        shown = [f"{probability:6.1%}  {name}" for name, probability in self.classes]
        for method, scores in self.scores.items():
            order = np.argsort(-np.nan_to_num(scores, nan=-np.inf))[:3]
            ranked = ", ".join(f"part {part} ({scores[part]:.3g})" for part in order)
            shown.append(f"{method}: {ranked}")
        return shown


def explain_pictures(paths: Sequence[Path], request: Request, output: Path) -> Iterator[tuple[Path, list[str]]]:
    """Explains pictures one by one; writes a PNG each and yields its path with the lines to print.

    Raises:
        UsageError: a picture, model, method or target that cannot be used.
    """
    from xai_core.render import explanation_sheet

    config = request.study()
    device = resolve_device(config.run.device)
    pictures = [(path, _read(path)) for path in paths]
    model = classifier(config.model.model_dump_json(), device)
    for choice in config.methods:
        _refuse_learner(choice)
        check_method(methods.get(choice.name), model, options_of(methods, choice), config.run.precision)
    if request.target is not None and not 0 <= request.target < model.num_classes:
        raise UsageError(f"--target: expected a class in 0..{model.num_classes - 1}, got {request.target}")
    for path, picture in pictures:
        with precision_context(config.run.precision, device):
            found = _explain(model, config, model.preprocess(picture).unsqueeze(0).to(device), request.target)
        sheet = explanation_sheet(
            found.picture,
            f"{path.name}: {found.target}",
            found.classes,
            found.parts,
            found.maps,
            found.scores,
        )
        target = output if len(pictures) == 1 else output.with_stem(f"{output.stem}-{path.stem}")
        sheet.save(target, "PNG")
        yield target, found.lines()


def _refuse_learner(choice: Choice) -> None:
    if fitting_entry(methods.get(choice.name), options_of(methods, choice)) is not None:
        raise UsageError(
            f"method {choice.name!r} learns from a data set before it explains, and a few pictures are none: "
            "name it under methods in a study's config, and `vitrine run`"
        )


def _read(path: Path):  # type: ignore[no-untyped-def]
    try:
        return decode_image(path.read_bytes())
    except (OSError, SourceError) as error:
        raise UsageError(f"{path}: expected a picture, {error}") from None


def _explain(model: Classifier, config: StudyConfig, image: torch.Tensor, target: int | None) -> Explanation:
    with torch.no_grad():
        probabilities = model(image).float().softmax(dim=1)[0]
    top = probabilities.topk(min(TOP, model.num_classes))
    names = model.class_names or tuple(str(index) for index in range(model.num_classes))
    chosen = int(top.indices[0]) if target is None else target
    parts = parse_parts(
        model,
        image,
        parser=config.parts.parser.name,
        options=options_of(parsers, config.parts.parser),
        k=config.parts.k,
        min_area=config.parts.min_area,
        seed=config.run.seed,
        backbone=_backbone(config, str(image.device)),
    )
    results = {
        choice.id: _one_method(model, choice, image, chosen, parts, config.run) for choice in config.methods
    }
    return Explanation(
        picture=model.as_pictures(image)[0],
        classes=[(names[index], float(value)) for value, index in zip(*top, strict=True)],
        target=names[chosen],
        parts=parts[0].cpu().numpy(),
        maps={name: maps[0].float().cpu().numpy() for name, (maps, _) in results.items()},
        scores={name: scores[0].cpu().numpy() for name, (_, scores) in results.items()},
    )


def _backbone(config: StudyConfig, device: str) -> Classifier | None:
    backbone = config.parts.backbone
    return None if backbone is None else classifier(backbone.model_dump_json(), device)


def _one_method(
    model: Classifier, choice: Choice, image: torch.Tensor, target: int, parts: torch.Tensor, run: RunConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """A method's map and its part scores (a pixel method's: the mean inside each part)."""
    targets = torch.tensor([target], device=image.device)
    shared = {
        "method": choice.name,
        "options": options_of(methods, choice),
        "batch_size": run.batch_size,
        "precision": run.precision,
    }
    if methods.get(choice.name).output == "parts":
        scores = score_parts(model, image, targets, parts, **shared).score
        return paint_parts(scores, parts), scores
    maps = attribute(model, image, targets, **shared)
    return maps, mean_inside_parts(maps, parts)
