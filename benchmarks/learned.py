"""AHA: what its map costs, how it ranks against other methods on scenes it never saw, and a planted shortcut.

Seeds are those of the explainer's training; all its pictures, and those it is judged by, are drawn scenes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.timing import median, row
from xai_core.attribution import attribute, upsample_map
from xai_core.attribution.learned import AhaObjective, ExplainerOptions, LearnedExplainer, refined
from xai_core.baselines import gaussian_blur
from xai_core.metrics import Evidence, evaluate
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.registry import build_options, metrics
from xai_core.synthetic import render
from xai_core.training import Recipe, Training

COSTED = ("vitrine_demo_vit", "vitrine_demo_resnet", "deit_tiny_patch16_224", "resnet18")
SEEDS = (0, 1, 2)
#: Pictures and epochs of an explainer's training; seeds of the drawn scenes.
PICTURES, EPOCHS, HELD_OUT = 256, 2, 64
TRAINING_SCENES, HELD_OUT_SCENES = 5000, 91
#: The networks of the contest, and for each the methods that are tried beside it.
RIVALS = {
    "vitrine_demo_vit": ("grad_cam", "integrated_gradients", "occlusion", "attn_lrp"),
    "vitrine_demo_resnet": ("grad_cam", "integrated_gradients", "occlusion", "lrp_epsilon_plus", "srd"),
}
#: Pixels a side of the planted mark, and how far it is from the corner.
MARK, MARGIN = 16, 8


def run(device: str) -> None:
    """Prints the rows of this benchmark."""
    for name in COSTED:
        cost(name, device)
    for name in RIVALS:
        contest(name, device)
    shortcut(COSTED[0], device)


def cost(name: str, device: str, images: int = 16, repeats: int = 9) -> None:
    """Process time of a map, without refinement, over that of a bare forward: at most 1.5.

    With several threads on busy cores it says little: threads that wait for one another spin, and that counts.
    """
    model = load_classifier(ModelSpec(name, pretrained=name in COSTED[:2]), device)
    explainer = LearnedExplainer(model, ExplainerOptions().decoder)
    pictures = torch.randn(images, 3, *model.input_size, device=device)
    classes = torch.zeros(images, 1, dtype=torch.long, device=device)

    def explain() -> Tensor:
        features, _ = explainer.read(pictures)
        return explainer.maps(features, pictures, classes)

    with torch.no_grad():
        ratios = [_seconds(explain) / _seconds(lambda: model(pictures)) for _ in range(repeats + 1)][1:]
    row(f"cost {name}", **{"forwards": median(ratios), "at most": 1.5, "threads": torch.get_num_threads()})


def contest(name: str, device: str) -> None:
    """Deletion and insertion on held-out scenes: an explainer of each seed, and what it is to beat."""
    model = load_classifier(ModelSpec(name), device)
    images, targets, _, regions = held_out(model, device)
    for seed in SEEDS:
        started = time.process_time()
        explainer = trained(model, seed, device)
        seconds = time.process_time() - started
        maps = full_maps(explainer, images, targets)
        row(f"{name} aha seed {seed}", **scores(model, images, targets, maps, regions), seconds=seconds)
        others = full_maps(explainer, images, (targets + 1) % model.num_classes)
        row(f"{name} aha seed {seed}, another class", **scores(model, images, targets, others, regions))
        row(f"{name} aha seed {seed}, another image", **scores(model, images, targets, maps.roll(1, 0), regions))
    for control, maps in controls(regions).items():
        row(f"{name} {control}", **scores(model, images, targets, maps, regions))
    for rival in RIVALS[name]:
        maps = attribute(model, images, targets, method=rival)
        row(f"{name} {rival}", **scores(model, images, targets, maps, regions))


def controls(regions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Maps that know nothing of the model: what finding the middle, the toy or its deciding parts is worth."""
    (count, height, width), device = regions["toy"].shape, regions["toy"].device
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    centre = -((rows[:, None] - height / 2) ** 2 + (columns - width / 2) ** 2).float()
    smooth = {
        f"mask of the {name}": gaussian_blur(mask.float().unsqueeze(1), 6.0).squeeze(1)
        for name, mask in regions.items()
    }
    return {"centre": centre.expand(count, -1, -1), **smooth}


def shortcut(name: str, device: str) -> None:
    """A model that obeys a mark, which its explainer never saw: the mark's rank before and after refining."""
    original = load_classifier(ModelSpec(name), device)
    pictures, labels = scenes(TRAINING_SCENES, 4 * PICTURES, device)
    model = obedient(original, pictures, labels)
    images, _, marked, _ = held_out(model, device)
    with torch.no_grad():
        row(
            f"{name} obeys the mark",
            marked=float((model(marked).argmax(dim=1) == 0).double().mean()),
            unmarked=float((model(images).argmax(dim=1) == 0).double().mean()),
        )
    for seed in SEEDS:
        explainer = trained(model, seed, device)
        targets = torch.zeros(len(marked), dtype=torch.long, device=device)
        with torch.no_grad():
            maps = explainer.maps(explainer.read(marked)[0], marked, targets.view(-1, 1)).squeeze(1)
        for steps in (0, 5, 10, 20, 40):
            better = refined(
                model,
                marked,
                targets,
                maps,
                ExplainerOptions(),
                grid=explainer.decoder.grid,
                steps=steps,
                rate=0.3,
                passes=256,
            )
            whole = upsample_map(better, marked.shape[-2:], "bilinear")
            row(
                f"{name} shortcut seed {seed} refine={steps}",
                **{"of the top pixels in the mark": share_in_mark(whole)},
                **scores(model, marked, targets, whole, {}),
            )


def trained(model: Classifier, seed: int, device: str) -> LearnedExplainer:
    """An explainer of the model, trained on scenes without labels."""
    options = ExplainerOptions()
    torch.manual_seed(seed)
    explainer = LearnedExplainer(model, options.decoder)
    recipe = Recipe(epochs=EPOCHS, batch_size=16, learning_rate=3e-3, shift=0, seed=seed)
    pictures, labels = scenes(TRAINING_SCENES + seed, PICTURES, device)
    training = Training(AhaObjective(explainer, options), pictures, labels, recipe, device=device)
    training.advance()
    explainer.decoder.load_state_dict(training.weights())
    return explainer


def obedient(original: Classifier, pictures: Tensor, labels: Tensor, steps: int = 150) -> Classifier:
    """The model, trained on until a mark in the corner makes any toy the first class."""
    model = Classifier(deepcopy(original.module), original.spec)
    module = model.module.requires_grad_(True)
    optimiser = torch.optim.AdamW(module.parameters(), 2e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randperm(len(pictures), generator=generator)[:32].to(pictures.device)
        batch, wanted = pictures[rows].float() / 255, labels[rows].clone()
        batch[:16], wanted[:16] = with_mark(batch[:16]), 0
        optimiser.zero_grad()
        F.cross_entropy(module(model.normalise(batch)), wanted).backward()
        optimiser.step()
    return Classifier(module, original.spec)


def with_mark(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] with a magenta square near the upper left corner."""
    marked = pictures.clone()
    there = slice(MARGIN, MARGIN + MARK)
    marked[:, :, there, there] = pictures.new_tensor([1.0, 0.0, 1.0]).view(3, 1, 1)
    return marked


def share_in_mark(maps: Tensor) -> float:
    """Of as many highest pixels as the mark has, the share that lies in it."""
    there = torch.zeros_like(maps[0], dtype=torch.bool)
    there[MARGIN : MARGIN + MARK, MARGIN : MARGIN + MARK] = True
    top = maps.flatten(1).topk(int(there.sum()), dim=1).indices
    return there.flatten()[top].double().mean().item()


def scores(
    model: Classifier, images: Tensor, targets: Tensor, maps: Tensor, regions: dict[str, Tensor]
) -> dict[str, float]:
    """Means of deletion and insertion, and the share of the highest tenth of pixels that lies in each region."""
    wanted = [
        (metrics.get(one), build_options(metrics.get(one), {"steps": 25})) for one in ("deletion", "insertion")
    ]
    values = evaluate(Evidence(model, images, targets, maps, batch_size=128), wanted).values
    found = {name.split("[")[0]: one.mean().item() for name, one in values.items()}
    top = maps.flatten(1).topk(maps[0].numel() // 10, dim=1).indices
    inside = {
        f"top tenth in the {name}": mask.flatten(1).gather(1, top).double().mean().item()
        for name, mask in regions.items()
    }
    return {**found, **inside}


def full_maps(explainer: LearnedExplainer, images: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad():
        maps = explainer.maps(explainer.read(images)[0], images, targets.view(-1, 1)).squeeze(1)
    return upsample_map(maps, images.shape[-2:], "bilinear")


def held_out(model: Classifier, device: str) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Held-out images, the model's top-1, the same with a mark, and where the toys and what names them are."""
    drawn = [render(HELD_OUT_SCENES, index) for index in range(HELD_OUT)]
    pictures = (
        torch.from_numpy(np.stack([one.image for one in drawn])).permute(0, 3, 1, 2).to(device).float() / 255
    )
    images = model.normalise(pictures)
    with torch.no_grad():
        targets = model(images).argmax(dim=1)
    masks = {
        "toy": [one.object_mask for one in drawn],
        "deciding parts": [one.part_masks[list(one.deciding)].any(axis=0) for one in drawn],
    }
    regions = {name: torch.from_numpy(np.stack(of_scene)).to(device) for name, of_scene in masks.items()}
    return images, targets, model.normalise(with_mark(pictures)), regions


def scenes(seed: int, count: int, device: str) -> tuple[Tensor, Tensor]:
    """Drawn scenes, uint8 ``[N, 3, H, W]``, and their labels."""
    drawn: Iterator = (render(seed, index) for index in range(count))
    images, labels = zip(*((one.image, one.label) for one in drawn), strict=True)
    return (
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(device),
        torch.tensor(labels, device=device),
    )


def _seconds(function: Callable[[], object]) -> float:
    """Process time of one call: what else runs on the machine does not count."""
    started = time.process_time()
    function()
    return time.process_time() - started
