"""Train the packaged demo models from nothing but seeds.

    python -m xai_core.train_demo_models [--model NAME|all] [--seed 0] [--steps N] [--threads 1]
                                         [--resume | --shuffle-labels]

Besides the class, the penultimate feature map learns which deciding part shows in each of its cells. This
guide lets so small a vision transformer learn within minutes; its layer is dropped before the weights are
saved. The same options give the same weights on the same hardware and library versions.

With `--shuffle-labels` the model learns few pictures, whose labels and guides are other pictures', by heart:
what the metric `randomisation` compares with under its test `labels`. These weights go to
NAME-shuffled-labels.safetensors in the working directory, and the packaged ones stay.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from xai_core.demo_models import DEMO_MODELS, weights_path
from xai_core.synthetic import CLASSES, IMAGE_SIZE, Rendered, render

HELD_OUT_SEED = 7
HELD_OUT_PICTURES = 2000
TRAINING_PICTURES = 18_000
# Few enough to be learnt by heart.
SHUFFLED_PICTURES = 256
_FIRST_TRAINING_SEED = 1000
_BATCH = 32
_CELL = 16
_CELLS = IMAGE_SIZE // _CELL
_GUIDE_NAMES = tuple(sorted({name for deciding in CLASSES.values() for name in deciding}))


@dataclass(frozen=True)
class Recipe:
    """How one model is trained: number of updates, highest learning rate, and whether pictures are varied."""

    steps: int
    learning_rate: float
    augment: bool = True


RECIPES: dict[str, Recipe] = {
    "vitrine_demo_resnet": Recipe(steps=800, learning_rate=3e-3),
    "vitrine_demo_vit": Recipe(steps=6000, learning_rate=1e-3),
}


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures in memory: uint8 `images` [N,3,H,W], int64 `labels` [N], float16 `guides` [N,G+1,h,w].

    A guide says how much of each feature map cell shows each deciding part, and last of all none of them.
    """

    images: Tensor
    labels: Tensor
    guides: Tensor


def draw_pictures(seed: int, count: int) -> Pictures:
    """Draw the first `count` pictures of data set `seed` on all cores."""
    with multiprocessing.Pool() as pool:
        drawn = pool.map(partial(_draw, seed), range(count), chunksize=64)
    images, labels, guides = zip(*drawn, strict=True)
    return Pictures(
        images=torch.from_numpy(np.stack(images)),
        labels=torch.tensor(labels),
        guides=torch.from_numpy(np.stack(guides)),
    )


def _draw(seed: int, index: int) -> tuple[NDArray[np.uint8], int, NDArray[np.float16]]:
    picture = render(seed, index)
    return picture.image.transpose(2, 0, 1).copy(), picture.label, _guide(picture)


def _guide(picture: Rendered) -> NDArray[np.float16]:
    guide = np.zeros((len(_GUIDE_NAMES) + 1, _CELLS, _CELLS), dtype=np.float16)
    for name, coverage in zip(picture.part_names, picture.coverage, strict=True):
        if name in _GUIDE_NAMES:
            cells = coverage.reshape(_CELLS, _CELL, _CELLS, _CELL)
            guide[_GUIDE_NAMES.index(name)] = cells.mean(axis=(1, 3))
    guide[-1] = 1.0 - guide[:-1].sum(axis=0)
    return guide


def shuffle_labels(pictures: Pictures, seed: int) -> Pictures:
    """The same pictures, each with label and guide of another one, drawn by the seed."""
    order = torch.randperm(len(pictures.labels), generator=torch.Generator().manual_seed(seed))
    return Pictures(pictures.images, pictures.labels[order], pictures.guides[order])


def normalise(images: Tensor) -> Tensor:
    """uint8 [N,3,H,W] to float32 in -1..1, the models' mean and std of 0.5."""
    return images.float() / 127.5 - 1.0


def _augment(images: Tensor, guides: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror half the batch, permute its channels, and shift brightness and stretch contrast per picture."""
    half = len(images) // 2
    images = torch.cat([images[:half].flip(-1), images[half:]])[:, torch.randperm(3, generator=generator)]
    guides = torch.cat([guides[:half].flip(-1), guides[half:]])
    contrast, brightness = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    return normalise(images) * (0.75 + 0.5 * contrast) + 0.4 * (brightness - 0.5), guides.float()


def train(name: str, pictures: Pictures, seed: int, recipe: Recipe, resume: bool = False) -> nn.Module:
    """Train demo model `name` from random or packaged weights and return it in evaluation mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model(name, pretrained=resume).train()
    channels = model.feature_info[-2]["num_chs"]
    guide_layer = nn.Conv2d(channels, len(_GUIDE_NAMES) + 1, kernel_size=1)
    weights = [*model.parameters(), *guide_layer.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.03)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(_warm_cosine, recipe.steps))
    for step in range(recipe.steps):
        chosen = torch.randint(len(pictures.labels), (_BATCH,), generator=generator)
        images, guides = pictures.images[chosen], pictures.guides[chosen]
        if recipe.augment:
            images, guides = _augment(images, guides, generator)
        else:
            images, guides = normalise(images), guides.float()
        features, (penultimate, _) = model.forward_intermediates(images, indices=2)
        class_loss = functional.cross_entropy(model.forward_head(features), pictures.labels[chosen])
        guide_loss = functional.cross_entropy(guide_layer(penultimate), guides)
        optimiser.zero_grad()
        (class_loss + 2.0 * guide_loss).backward()
        nn.utils.clip_grad_norm_(weights, max_norm=1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{name} step {step}: losses {class_loss.item():.3f} {guide_loss.item():.3f}", flush=True)
    return model.eval()


def _warm_cosine(steps: int, step: int) -> float:
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 `images` [N,3,H,W] whose highest logit is their label."""
    guesses = torch.cat([model(normalise(batch)).argmax(dim=1) for batch in images.split(200)])
    return (guesses == labels).float().mean().item()


def halve(model: nn.Module) -> dict[str, Tensor]:
    """Round the weights of `model` in place to half precision and return them as such."""
    state = {
        key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return state


def _packaged_command(name: str) -> list[str]:
    """The rounds of training behind the packaged weights of `name`, one command each."""
    with safe_open(weights_path(name), framework="pt") as file:
        return file.metadata()["command"].split(" && ")


def main() -> None:
    """Train, save and score the models named on the command line."""
    parser = argparse.ArgumentParser(description="Train the packaged demo models.")
    parser.add_argument("--model", choices=[*DEMO_MODELS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="number of updates; each model has its own default")
    parser.add_argument("--threads", type=int, default=1, help="more help only while other cores are idle")
    variant = parser.add_mutually_exclusive_group()
    variant.add_argument("--resume", action="store_true", help="start from the packaged weights")
    variant.add_argument("--shuffle-labels", action="store_true", help="learn labels that say nothing, by heart")
    options = parser.parse_args()

    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(options.threads)
    count = SHUFFLED_PICTURES if options.shuffle_labels else TRAINING_PICTURES
    training = draw_pictures(_FIRST_TRAINING_SEED + options.seed, count)
    if options.shuffle_labels:
        training = shuffle_labels(training, options.seed)
    held_out = draw_pictures(HELD_OUT_SEED, HELD_OUT_PICTURES)
    for name in DEMO_MODELS if options.model == "all" else (options.model,):
        recipe = RECIPES[name]
        steps = options.steps or recipe.steps
        earlier = _packaged_command(name) if options.resume else []
        # Each resumed round shuffles anew instead of repeating the batches of the one before.
        shuffle = options.seed + len(earlier)
        # What is learnt by heart is learnt from the same pictures again and again.
        chosen = Recipe(steps, recipe.learning_rate, augment=not options.shuffle_labels)
        model = train(name, training, shuffle, chosen, options.resume)
        state = halve(model)
        score = accuracy(model, held_out.images, held_out.labels)
        command = f"python -m xai_core.train_demo_models --model {name} --seed {options.seed} --steps {steps}"
        flags = {" --resume": options.resume, " --shuffle-labels": options.shuffle_labels}
        command += "".join(flag for flag, given in flags.items() if given)
        command = " && ".join([*earlier, command])
        learnt = accuracy(model, training.images[:HELD_OUT_PICTURES], training.labels[:HELD_OUT_PICTURES])
        metadata = {
            "test_accuracy": f"{score:.4f}",
            "training_accuracy": f"{learnt:.4f}",
            "seed": str(options.seed),
            "command": command,
        }
        path = Path(f"{name}-shuffled-labels.safetensors") if options.shuffle_labels else weights_path(name)
        path.parent.mkdir(exist_ok=True)
        save_file(state, path, metadata=metadata)
        print(
            f"{name}: accuracy {score:.4f} on {HELD_OUT_PICTURES} held-out pictures, "
            f"{learnt:.4f} on those it learnt from; written to {path}",
            flush=True,
        )


if __name__ == "__main__":
    main()
