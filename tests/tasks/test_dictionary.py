"""Dictionaries in a study: streamed, killed and resumed, and refused where they do not belong."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from storage.commits import CommitRecord, Unit
from storage.digest import results_digest
from storage.gc import collect, find_garbage
from storage.store import Store, open_store
from storage.verify import verify_store
from tasks.checkpoint import Checkpoint
from tasks.config import StudyConfig
from tasks.dictionary_file import dictionary_bytes, read_dictionary
from tasks.plan import Planner
from tasks.study import Study
from tasks.vector_stream import VectorStream, chosen_vectors
from tests.conftest import TINY, Ran, config_with
from tests.faults.processes import Faults, Warm
from xai_core.concepts import Dictionary, evaluate, fit_dictionary
from xai_core.errors import UsageError

Chain = Callable[[dict[str, Any], Path], Ran]
LAYER = "blocks.2"
TRAINED = {"steps": 60, "batch_size": 16, "log_every": 10, "buffer": 20, "k": 3}
STUDY = config_with(
    TINY,
    methods=["grad_cam"],
    metrics=["p_deletion"],
    concepts={
        "per_image": 4,
        "extractors": ["bisecting_kmeans", {"name": "sae_matryoshka", **TRAINED}],
        "atoms": 12,
    },
)


@pytest.fixture(scope="module")
def ran(run_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run_chain(STUDY, tmp_path_factory.mktemp("dictionary") / "store")


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """A process that forks runs of a study, to be killed."""
    process = Warm(tmp_path_factory.mktemp("warm"))
    yield process
    process.close()


def fitted(store: Store, extractor: str = "sae_matryoshka") -> CommitRecord:
    (record,) = (
        one
        for _, one in store.records()
        if one.unit.stage == "dictionary" and one.unit.variant.startswith(f"{LAYER} / {extractor}")
    )
    return record


def stream_of(store: Store) -> VectorStream:
    records = sorted(
        (one for _, one in store.records() if one.unit.stage == "pfv"), key=lambda one: one.unit.shard
    )
    return VectorStream(store, records, LAYER)


def weights_of(store: Store) -> str:
    return Study(StudyConfig.model_validate(STUDY), store).model["weights"]


def dictionary_of(store: Store, extractor: str = "sae_matryoshka") -> Dictionary:
    record = fitted(store, extractor)
    return read_dictionary(store.read_file(record, "dictionary"), layer=LAYER, weights=weights_of(store))


def test_the_stream_is_the_stored_vectors_in_image_order(ran: Ran) -> None:
    stream = stream_of(ran.store)
    every = ran.store.array(f"pfv/{LAYER}.vectors")[:]
    count = every.shape[0] * every.shape[1]
    assert count >= 48
    assert [len(chunk) for chunk in stream] == [count // 3] * 3
    assert stream.count == count
    assert np.array_equal(torch.cat(list(stream)).numpy(), every.reshape(count, -1))
    assert torch.equal(chosen_vectors(stream, [0, 17, 47]), torch.cat(list(stream))[[0, 17, 47]])


@pytest.mark.parametrize("extractor", ["sae_matryoshka", "bisecting_kmeans"])
def test_the_stored_dictionary_is_that_of_the_vectors_in_memory(ran: Ran, extractor: str) -> None:
    vectors = torch.cat(list(stream_of(ran.store)))
    options = TRAINED if extractor == "sae_matryoshka" else {}
    expected = fit_dictionary(vectors, extractor=extractor, options=options, atoms=12)
    found = dictionary_of(ran.store, extractor)
    assert found.extractor == extractor
    assert torch.equal(found.atoms, expected.atoms)
    assert torch.equal(found.sizes, expected.sizes)
    assert found.encoder.keys() == expected.encoder.keys()
    assert all(torch.equal(found.encoder[name], tensor) for name, tensor in expected.encoder.items())
    (row,) = ran.sql(f"select distinct rel_l2, vectors from concepts where extractor like '{extractor}%'")
    assert row["rel_l2"] == pytest.approx(evaluate(expected, vectors).rel_l2, rel=1e-5)
    assert row["vectors"] == len(vectors)


def test_the_training_is_logged_in_rows(ran: Ran) -> None:
    rows = ran.sql("select * from sae_training order by step")
    assert [row["step"] for row in rows] == [0, 10, 20, 30, 40, 50, 59]
    assert [row["vectors"] for row in rows] == [16 * (row["step"] + 1) for row in rows]
    assert {row["layer"] for row in rows} == {LAYER}
    assert all(row["extractor"].startswith("sae_matryoshka[") for row in rows)
    assert rows[-1]["rel_l2"] < rows[0]["rel_l2"]
    assert rows[-1]["l0"] == 3
    assert rows[-1]["learning_rate"] < rows[1]["learning_rate"]
    assert all(0 <= row["dead"] <= 1 for row in rows)


def test_no_checkpoint_is_left_after_the_commit(ran: Ran) -> None:
    assert not (ran.store.root / "work").exists()
    assert fitted(ran.store).facts["resumed_at"] == 0
    assert verify_store(ran.store).damage == ()


def killed(warm: Warm, ran: Ran, folder: Path, moment: str) -> Path:
    """A copy of a store whose training was killed when its first checkpoint came to a moment."""
    root = shutil.copytree(ran.store.root, folder / "store")
    record = fitted(ran.store)
    open_store(root).commits.drop(record.unit, record.key)
    faults = Faults(folder, ({"moment": moment, "path": r"store/work/[^.]*\.checkpoint$"},))
    assert warm.run(STUDY, root, faults) == -signal.SIGKILL, warm.said()
    assert len(faults.fired()) == 1
    return root


def again(run_chain: Chain, root: Path) -> tuple[int, str]:
    """The step that a training began at when its study was run again, and the digest of all results."""
    rerun = run_chain(STUDY, root)
    assert rerun.counts == {"dictionary": 1}
    assert verify_store(rerun.store).damage == ()
    assert not (root / "work").exists()
    return fitted(rerun.store).facts["resumed_at"], results_digest(rerun.store, rerun.run_id)


@pytest.mark.parametrize(("moment", "step"), [("settle", 10), ("rename", 0)])
def test_a_training_that_is_killed_ends_in_the_same_dictionary(
    warm: Warm, run_chain: Chain, ran: Ran, tmp_path: Path, moment: str, step: int
) -> None:
    root = killed(warm, ran, tmp_path, moment)
    assert len(list((root / "work").iterdir())) == 1
    assert verify_store(open_store(root)).damage == ()
    assert again(run_chain, root) == (step, results_digest(ran.store, ran.run_id))


def test_a_damaged_checkpoint_makes_the_training_begin_anew(
    warm: Warm, run_chain: Chain, ran: Ran, tmp_path: Path
) -> None:
    root = killed(warm, ran, tmp_path, "settle")
    (path,) = (root / "work").glob("*.checkpoint")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert again(run_chain, root) == (0, results_digest(ran.store, ran.run_id))


def test_a_checkpoint_that_cannot_be_written_is_said_and_not_fatal(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", create=True)
    checkpoint = Checkpoint(store, "0" * 64)
    (tmp_path / "store" / "work").write_text("a file in its way")
    with pytest.warns(UserWarning, match="no checkpoint was written"):
        checkpoint.write({"a": torch.ones(2)})
    assert checkpoint.read() is None
    (tmp_path / "store" / "work").unlink()
    checkpoint.write({"a": torch.ones(2)})
    assert torch.equal(checkpoint.read()["a"], torch.ones(2))  # type: ignore[index]
    checkpoint.remove()
    checkpoint.remove()
    assert not (tmp_path / "store" / "work").exists()


def test_a_checkpoint_of_another_unit_keeps_the_folder(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", create=True)
    one, other = (Checkpoint(store, digit * 64) for digit in "01")
    one.write({"a": torch.zeros(1)})
    other.write({"a": torch.ones(1)})
    one.remove()
    assert one.read() is None
    assert torch.equal(other.read()["a"], torch.ones(1))  # type: ignore[index]


def test_a_dictionary_of_another_layer_or_model_is_refused(ran: Ran, tmp_path: Path) -> None:
    path = ran.store.read_file(fitted(ran.store), "dictionary")
    weights = weights_of(ran.store)
    with pytest.raises(UsageError, match=r"layer 'blocks.1', got one of layer 'blocks.2'"):
        read_dictionary(path, layer="blocks.1", weights=weights)
    with pytest.raises(UsageError, match=rf"weights 'other', got one of weights '{weights}'"):
        read_dictionary(path, layer=LAYER, weights="other")
    save_file({"atoms": torch.ones(2, 3)}, tmp_path / "plain.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-9])
    for wrong in (tmp_path / "plain.safetensors", cut, tmp_path / "none.safetensors"):
        with pytest.raises(UsageError, match=r"expected a dictionary of this version, got another file"):
            read_dictionary(wrong, layer=LAYER, weights=weights)


def test_a_dictionary_file_holds_all_of_a_dictionary(tmp_path: Path) -> None:
    written = Dictionary(torch.rand(3, 2), torch.tensor([4, 0, 1]), {"top_k": torch.tensor(2)}, "sae_top_k", 5)
    path = tmp_path / "one.safetensors"
    path.write_bytes(dictionary_bytes(written, layer="a", extractor="sae_top_k[k=2]", weights="w"))
    found = read_dictionary(path, layer="a", weights="w")
    assert (found.extractor, found.zero_vectors) == ("sae_top_k", 5)
    assert torch.equal(found.atoms, written.atoms)
    assert torch.equal(found.sizes, written.sizes)
    assert found.encoder["top_k"].item() == 2


def test_other_training_options_are_another_dictionary_and_nothing_else(ran: Ran, tmp_path: Path) -> None:
    root = shutil.copytree(ran.store.root, tmp_path / "store")
    changed = config_with(STUDY, concepts={"extractors": [{"name": "sae_matryoshka", **TRAINED, "steps": 61}]})
    planned = Planner(Study(StudyConfig.model_validate(changed), open_store(root))).all()
    missing = {one.unit for one in planned if one.unit.stage in ("pfv", "dictionary") and one.reason is not None}
    assert len(missing) == 1
    assert next(iter(missing)) == Unit("dictionary", next(iter(missing)).variant, 0)


def test_garbage_collection_removes_what_killed_trainings_left(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", create=True)
    checkpoint = Checkpoint(store, "0" * 64)
    checkpoint.write({"a": torch.zeros(1)})
    garbage = find_garbage(store)
    assert garbage.leftovers == (f"work/{'0' * 24}.checkpoint",)
    collect(store, garbage)
    assert checkpoint.read() is None
