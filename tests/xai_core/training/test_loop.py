"""The training loop: it is the plain algorithm, goes on bit for bit from any step, and never keeps a NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.xai_core.training.tiny import RECIPE, Scripted, coloured, network, training
from xai_core.errors import UsageError
from xai_core.training import CrossEntropy, Recipe, Training, evaluate
from xai_core.training.chance import stream


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states are the same to the last bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].numpy().tobytes() == other[name].numpy().tobytes()
        for name in one
    )


@pytest.fixture(scope="module")
def whole() -> Training:
    found = training()
    found.advance()
    return found


# --- the algorithm --------------------------------------------------------------------------------------------


def plain_training(module: nn.Module, pictures: Tensor, labels: Tensor, recipe: Recipe) -> list[float]:
    """AdamW, linear warm-up and cosine as they are written down; returns the mean loss of every epoch."""
    weights = list(module.parameters())
    first = [torch.zeros_like(one) for one in weights]
    second = [torch.zeros_like(one) for one in weights]
    per_epoch = len(labels) // recipe.batch_size
    steps, means = recipe.epochs * per_epoch, []
    warm = int(recipe.warm_up * steps)
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(labels), generator=stream(recipe.seed, "epoch", epoch))
        losses = []
        for place in range(per_epoch):
            step = epoch * per_epoch + place
            rows = order[place * recipe.batch_size :][: recipe.batch_size]
            loss = F.cross_entropy(module(pictures[rows].double() / 255), labels[rows], label_smoothing=0.1)
            gradients = torch.autograd.grad(loss, weights)
            falling = 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
            rate = recipe.learning_rate * ((step + 1) / (warm + 1) if step < warm else falling)
            with torch.no_grad():
                for one, m, v, gradient in zip(weights, first, second, gradients, strict=True):
                    m.mul_(0.9).add_(0.1 * gradient)
                    v.mul_(0.999).add_(0.001 * gradient**2)
                    unbiased = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                    one.mul_(1 - rate * recipe.weight_decay)
                    one.sub_(rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8))
            losses.append(loss.item())
        means.append(sum(losses) / per_epoch)
    return means


@pytest.mark.parametrize("warm_up", [0.0, 0.3])
def test_the_loop_is_the_plain_algorithm(warm_up: float) -> None:
    def linear() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()

    pictures, labels = coloured(22)
    recipe = Recipe(
        epochs=3, batch_size=4, learning_rate=0.02, weight_decay=0.1, warm_up=warm_up, shift=0, mirror=False
    )
    expected, found = linear(), linear()
    losses = plain_training(expected, pictures, labels, recipe)
    run = Training(CrossEntropy(found, lambda batch: batch.double()), pictures, labels, recipe)
    run.advance()
    for name, tensor in run.weights().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-6, atol=1e-8)
    assert [row.value for row in run.log if row.name == "loss"] == pytest.approx(losses, rel=1e-6)


def test_a_constant_schedule_keeps_the_rate() -> None:
    run = training(schedule="constant", held_out=0, warm_up=0.5)
    run.advance()
    assert [row.value for row in run.log if row.name == "learning_rate"] == pytest.approx([0.00625, 0.01, 0.01])


def test_every_epoch_takes_other_pictures_once_and_progress_runs_from_0_to_below_1() -> None:
    objective = Scripted([])
    run = Training(objective, coloured(22)[0], torch.arange(22), Recipe(epochs=2, batch_size=4))
    run.advance()
    epochs = [torch.cat(objective.seen[:5]).tolist(), torch.cat(objective.seen[5:]).tolist()]
    assert [len(set(one)) for one in epochs] == [20, 20]
    assert epochs[0] != epochs[1]
    assert [row.value for row in run.log if row.name == "progress"] == pytest.approx([0.2, 0.7])


def test_fewer_pictures_than_a_batch_are_one_batch() -> None:
    objective = Scripted([])
    run = Training(objective, *coloured(3), Recipe(epochs=2, batch_size=8))
    run.advance()
    assert (run.steps, [len(one) for one in objective.seen]) == (2, [3, 3])


def test_only_what_requires_a_gradient_learns() -> None:
    module = network()
    objective = CrossEntropy(module, lambda pictures: pictures)
    module[0].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run = Training(objective, *coloured(12), Recipe(**RECIPE))
    run.advance()
    moved = {name for name, tensor in run.weights().items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith("0.") for name in moved)
    assert {"6.weight", "6.bias", "1.weight"} <= moved


# --- resuming -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, 15))
def test_a_training_goes_on_from_any_step_bit_for_bit(whole: Training, step: int) -> None:
    """Steps 5 and 10 end an epoch; dropout, batch norm, augmentation and the best weights all come along."""
    before = training()
    before.advance(step)
    state = before.state()
    torch.rand(7)  # Whatever else draws from the global generator meanwhile.
    after = training(state=state)
    assert after.step == step
    assert equal(after.state(), state)
    after.advance()
    assert equal(after.weights(), whole.weights())
    assert equal(after.state(), whole.state())
    assert after.log == whole.log


def test_a_state_is_no_view_of_the_training(whole: Training) -> None:
    run = training()
    run.advance(7)
    state = run.state()
    copy = {name: tensor.clone() for name, tensor in state.items()}
    run.advance()
    assert equal(state, copy)


def test_single_steps_are_the_same_as_all_at_once(whole: Training) -> None:
    run = training()
    while not run.done:
        run.advance(1)
    assert equal(run.state(), whole.state())


def test_the_global_generator_is_left_as_it_was_and_changes_nothing(whole: Training) -> None:
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    run = training()
    run.advance()
    assert torch.equal(torch.rand(3), expected)
    assert equal(run.state(), whole.state())


def test_another_seed_is_another_training(whole: Training) -> None:
    other = training(seed=1)
    other.advance()
    assert not equal(other.weights(), whole.weights())


@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 0.02}, {"held_out": 8}, {"precision": "bf16"}])
def test_the_state_of_another_training_is_refused(whole: Training, change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="resume with the same objective, pictures and recipe, or start anew"):
        training(state=whole.state(), **change)
    with pytest.raises(UsageError, match="got one of no training"):
        training(state={"step": torch.ones(1)})


# --- what is kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "best"), [([0.1, 0.7, 0.7, 0.3], 2), ([0.5, 0.4, math.nan, 0.2], 1), ([math.nan] * 4, 4)]
)
def test_the_weights_are_those_of_the_best_epoch(scores: list[float], best: int) -> None:
    run = Training(
        Scripted(scores),
        *coloured(8),
        Recipe(epochs=4, batch_size=4, learning_rate=1.0, weight_decay=0, schedule="constant", warm_up=0),
        held_out=coloured(6),
    )
    run.advance()
    assert run.best_epoch == best
    # Adam moves a weight with a steady gradient by the rate in every step.
    assert run.weights()["weight"].item() == pytest.approx(2 * best, rel=1e-4)


def test_the_best_weights_so_far_are_kept_when_a_training_goes_on() -> None:
    given = (*coloured(8), Recipe(epochs=3, batch_size=4, learning_rate=1.0, weight_decay=0, warm_up=0))
    run = Training(Scripted([0.9]), *given, held_out=coloured(6))
    run.advance(3)
    after = Training(Scripted([0.1, 0.2]), *given, held_out=coloured(6), state=run.state())
    after.advance()
    assert after.best_epoch == 1
    assert equal(after.weights(), run.weights())
    assert after.weights()["weight"] < after._objective.trained.weight


def test_without_held_out_pictures_the_last_epoch_is_taken() -> None:
    run = training(held_out=0)
    run.advance()
    assert run.best_epoch == 3
    assert {row.split for row in run.log} == {"train"}
    now = run._objective.trained.state_dict()
    assert all(torch.equal(tensor, now[name]) for name, tensor in run.weights().items())


def test_the_log_has_an_epoch_after_the_other(whole: Training) -> None:
    names = [(row.epoch, row.step, row.split, row.name) for row in whole.log]
    assert names == [
        (epoch, 5 * epoch, split, name)
        for epoch in (1, 2, 3)
        for split, name in (
            ("train", "accuracy"),
            ("train", "loss"),
            ("train", "learning_rate"),
            ("held_out", "loss"),
            ("held_out", "score"),
        )
    ]


def test_held_out_pictures_are_measured_as_they_are_in_evaluation_mode(whole: Training) -> None:
    module = network().eval()
    pictures, labels = coloured(9, seed=1)
    module.load_state_dict(whole.weights())
    objective = CrossEntropy(module, lambda batch: batch - 0.5)
    with torch.no_grad():
        expected = (module(pictures.float() / 255 - 0.5).argmax(1) == labels).float().mean().item()
    logged = {row.epoch: row.value for row in whole.log if (row.split, row.name) == ("held_out", "score")}
    assert logged[whole.best_epoch] == max(logged.values()) == pytest.approx(expected)
    for size in (1, 4, 100):
        assert evaluate(objective, (pictures, labels), Recipe(batch_size=size))["score"] == pytest.approx(expected)


def test_it_learns() -> None:
    run = training(epochs=20, crop=1.0)
    run.advance()
    scores = [row.value for row in run.log if (row.split, row.name) == ("held_out", "score")]
    assert max(scores) == 1.0


@pytest.mark.parametrize(("outside", "held_out"), [(False, 0), (True, 0), (False, 9)])
def test_bfloat16_learns_what_float32_does(outside: bool, held_out: int) -> None:
    """Autocast keeps copies of weights: those of the first step, or of an evaluation, must not be used again."""
    found = {}
    for precision in ("fp32", "bf16"):
        run = training(precision=precision, epochs=15, crop=1.0, held_out=held_out)
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            run.advance()
        found[precision] = [row.value for row in run.log if (row.split, row.name) == ("train", "loss")]
    assert found["bf16"][-1] < 0.75 * found["bf16"][0]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.01)
    assert torch.is_autocast_cache_enabled()


def test_bfloat16_is_used_where_it_is_asked_for() -> None:
    seen = []
    run = training(precision="bf16", epochs=1)
    run._objective.trained[0].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    run.advance()
    assert set(seen) == {torch.bfloat16}
    assert all(one.dtype != torch.bfloat16 for one in run.weights().values())


# --- what is refused ------------------------------------------------------------------------------------------


def diverging(at: int, value: float) -> Training:
    recipe = Recipe(epochs=3, batch_size=4, learning_rate=0.5)
    return Training(Scripted([], {at: value}), *coloured(22), recipe)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_it_and_names_step_and_checkpoint(value: float) -> None:
    run = diverging(7, value)
    run.advance(4)
    run.state()
    told = rf"expected a finite loss, got {value} in epoch 2 of 3; lower learning_rate \(now 0.5\)"
    with pytest.raises(UsageError, match=told) as raised:
        run.advance(8)
    assert "it came at step 7 of 15, and of the checkpoints the last good one is of step 4" in str(raised.value)
    for ask in (run.state, run.weights):
        with pytest.raises(UsageError, match="step 7 of 15"):
            ask()
    fresh = diverging(2, value)
    with pytest.raises(UsageError, match="of the checkpoints none was taken"):
        fresh.advance()


def test_weights_that_are_no_numbers_are_not_given_out_though_the_last_loss_was_finite() -> None:
    class Cliff(Scripted):
        def loss(self, *given: Any) -> tuple[Tensor, dict[str, Tensor]]:
            loss, scalars = super().loss(*given)
            self._losses = {}
            return (loss + (self.trained.weight * 0).sqrt().sum() if self._steps == 15 else loss), scalars

    run = Training(Cliff([]), *coloured(22), Recipe(epochs=3, batch_size=4))
    with pytest.raises(UsageError, match="expected a finite weight, got nan in epoch 3 of 3"):
        run.advance()
    with pytest.raises(UsageError, match="finite weight"):
        run.weights()


def test_what_cannot_be_trained_is_refused() -> None:
    pictures, labels = coloured(6)
    for wrong in (labels[:5], labels[:0]):
        with pytest.raises(UsageError, match="pictures: expected at least one picture and a label for each"):
            Training(Scripted([]), pictures[: len(wrong) or 0] if not len(wrong) else pictures, wrong, Recipe())
    frozen = Scripted([])
    frozen.trained.requires_grad_(False)
    with pytest.raises(UsageError, match="parameters that require gradients"):
        Training(frozen, pictures, labels, Recipe())

    class Scoreless(Scripted):
        def measure(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": labels.float()}

    with pytest.raises(UsageError, match="expected 'score' among it, got loss"):
        evaluate(Scoreless([]), (pictures, labels), Recipe())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"epochs": 0}, "epochs and batch_size of at least 1"),
        ({"learning_rate": math.nan}, "learning_rate > 0"),
        ({"weight_decay": -1.0}, "weight_decay >= 0"),
        ({"precision": "fp16"}, "precision: expected fp32 or bf16"),
        ({"schedule": "step"}, "schedule: expected cosine or constant"),
        ({"crop": 0.0}, "crop above 0"),
        ({"warm_up": 1.0}, "warm_up from 0 to below 1"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Recipe(**change)
