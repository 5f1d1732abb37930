"""Training: streamed as in memory, stopped and resumed to the last bit, logged, and stopped where it diverges."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.xai_core.concepts.drawing import normal
from xai_core.concepts import Dictionary, fit_dictionary
from xai_core.concepts.sae import VARIANTS, Training
from xai_core.errors import UsageError

# Latents die and begin anew within these steps, and the buffer is filled up again and again.
OPTIONS: dict[str, Any] = {
    "steps": 60,
    "batch_size": 16,
    "log_every": 7,
    "buffer": 40,
    "dead_after": 60,
    "learning_rate": 0.3,
}


def options_of(extractor: str, **changes: Any) -> dict[str, Any]:
    return {**OPTIONS, **({} if extractor == "sae" else {"k": 2}), **changes}


def assert_same(found: Dictionary, expected: Dictionary) -> None:
    assert torch.equal(found.atoms, expected.atoms)
    assert torch.equal(found.sizes, expected.sizes)
    assert found.encoder.keys() == expected.encoder.keys()
    assert all(torch.equal(found.encoder[name], value) for name, value in expected.encoder.items())
    assert (found.extractor, found.zero_vectors) == (expected.extractor, expected.zero_vectors)


@pytest.mark.parametrize("extractor", VARIANTS)
@pytest.mark.parametrize("buffer", [40, 1000])
def test_a_stream_gives_the_dictionary_of_the_vectors_in_memory(extractor: str, buffer: int) -> None:
    vectors = normal(150, 5)
    vectors[[0, 40, 149]] = 0
    options = options_of(extractor, buffer=buffer)
    expected = fit_dictionary(vectors, extractor=extractor, options=options, atoms=30)
    for sizes in ([150], [1, 0, 60, 89], [50, 50, 50]):
        training = Training(vectors.split(sizes), extractor=extractor, options=options, atoms=30)
        training.advance()
        assert_same(training.dictionary(), expected)
    assert expected.zero_vectors == 3


@pytest.mark.parametrize("extractor", VARIANTS)
@pytest.mark.parametrize("buffer", [40, 1000])
def test_a_training_stopped_anywhere_ends_in_the_same_bits(extractor: str, buffer: int, tmp_path: Path) -> None:
    chunks = normal(150, 5).split(20)
    asked: dict[str, Any] = {"extractor": extractor, "options": options_of(extractor, buffer=buffer), "atoms": 30}
    whole = Training(chunks, **asked)
    whole.advance()
    assert max(row.dead for row in whole.log) > 0
    for stops in ((0,), (1, 2), (19, 20, 21, 59), (60,)):
        training = Training(chunks, **asked)
        for stop in stops:
            training.advance(stop - training.step)
            path = tmp_path / "state.safetensors"
            save_file(training.state(), path)
            # What is trained on after its state was taken has no say in it.
            training.advance(1)
            training = Training(normal(150, 5).split(33), **asked, state=load_file(path))
            assert training.step == stop
        training.advance()
        assert training.log == whole.log
        assert_same(training.dictionary(), whole.dictionary())


def test_the_log_says_what_each_step_saw() -> None:
    training = Training([normal(150, 5)], extractor="sae_top_k", options=options_of("sae_top_k"), atoms=30)
    training.advance()
    assert training.done
    assert [row.step for row in training.log] == [0, 7, 14, 21, 28, 35, 42, 49, 56, 59]
    assert [row.vectors for row in training.log] == [16 * (row.step + 1) for row in training.log]
    assert all(row.l0 <= 2 for row in training.log)
    assert all(row.loss > 0 and row.rel_l2 > 0 and 0 <= row.dead <= 1 for row in training.log)
    base = 0.3 / 5**0.5
    rates = [row.learning_rate / base for row in training.log]
    # Three steps of warm-up; then straight down.
    assert rates[0] == pytest.approx(1 / 3)
    assert rates[1:] == pytest.approx([1 - row.step / 60 for row in training.log[1:]])


def test_the_last_threshold_separates_what_fires_from_what_does_not() -> None:
    training = Training([normal(400, 5)], extractor="sae_batch_top_k", options={"k": 3, "steps": 300}, atoms=40)
    training.advance()
    learner = training._learner
    fired = learner.codes[learner.codes > 0]
    assert float(learner.threshold) == pytest.approx(float(fired.min()), rel=0.1)


@pytest.mark.parametrize("log_every", [1, 50])
def test_a_training_that_diverges_names_the_step_and_the_last_good_checkpoint(log_every: int) -> None:
    options = {"learning_rate": 1e30, "log_every": log_every, "steps": 100}
    training = Training([normal(50, 4)], extractor="sae", options=options)
    with pytest.raises(
        UsageError, match=r"at step 1 of 100; lower learning_rate .*1e\+30.*: none was taken|taken$"
    ):
        training.advance()
    with pytest.raises(UsageError, match="finite loss"):
        training.dictionary()
    with pytest.raises(UsageError, match="finite loss"):
        training.state()
    begun = Training([normal(50, 4)], extractor="sae", options=options)
    begun.state()
    with pytest.raises(UsageError, match=r"of its checkpoints the last good one is of step 0$"):
        begun.advance()


@pytest.mark.parametrize(
    "change", [{"extractor": "sae_top_k"}, {"seed": 1}, {"atoms": 29}, {"options": options_of("sae", l1=0.2)}]
)
def test_the_state_of_another_training_is_refused(change: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"extractor": "sae", "options": options_of("sae"), "atoms": 30, "seed": 0}
    state = Training([normal(150, 5)], **asked).state()
    other = {**asked, **({"options": options_of("sae_top_k")} if "extractor" in change else {}), **change}
    with pytest.raises(UsageError, match="resume with the same extractor, options, atoms and seed"):
        Training([normal(150, 5)], **other, state=state)
    with pytest.raises(UsageError, match="got one of no training"):
        Training([normal(150, 5)], **asked, state={"atoms": torch.ones(2)})


@pytest.mark.parametrize("extractor", VARIANTS)
def test_a_seed_fixes_the_dictionary_and_another_changes_it(extractor: str) -> None:
    def fit(seed: int) -> Dictionary:
        torch.manual_seed(seed + 5)
        return fit_dictionary(normal(120, 6), extractor=extractor, options=options_of(extractor), seed=seed)

    assert_same(fit(1), fit(1))
    assert not torch.equal(fit(1).atoms, fit(2).atoms)


class Watched:
    """So many chunks, made when they are read; ``most`` of them were alive at once."""

    def __init__(self, chunks: int) -> None:
        self.chunks, self.most = chunks, 0
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def __iter__(self) -> Iterator[Tensor]:
        for seed in range(self.chunks):
            chunk = normal(500, 8, seed=seed)
            # A view of a chunk keeps its storage, and not the tensor.
            self._alive.add(chunk.untyped_storage())
            self.most = max(self.most, len(self._alive))
            yield chunk
            del chunk


def test_no_more_chunks_are_held_than_the_buffer_and_the_sample_need() -> None:
    options = {"steps": 200, "buffer": 512, "batch_size": 8, "log_every": 200}
    for chunks in (10, 60):
        stream = Watched(chunks)
        training = Training(stream, extractor="sae", options=options, atoms=4)
        training.advance()
        training.dictionary()
        # A block of the survey is gathered from nine chunks and one more is read.
        assert stream.most <= 11
        assert training.state()["buffer.held"].shape == (512, 8)
