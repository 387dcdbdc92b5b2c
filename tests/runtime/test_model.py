"""The loaded model: both layouts, every gate backend, batches, swaps, traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import write_tiny_pack
from knnmoe.runtime.errors import BackendError, InputError, SettingError
from knnmoe.runtime.layouts import PREFILL_CHUNK, HostLayout
from knnmoe.runtime.model import Model

IDS = np.random.default_rng(0).integers(0, 256, 60)


@pytest.fixture(scope="module")
def frozen(tiny_bundle: Path) -> Model:
    return Model.load(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def routed(tiny_bundle: Path, tiny_pack: Path) -> Model:
    return Model.load(tiny_bundle, memory=tiny_pack, threads=1)


def test_split_and_fused_are_bit_identical(tiny_bundle: Path, tiny_pack: Path) -> None:
    for memory in (None, tiny_pack):
        split = Model.load(tiny_bundle, memory=memory, gate="onnx", threads=1)
        fused = Model.load(tiny_bundle, memory=memory, layout="fused", threads=1)
        assert split.logits(IDS).tobytes() == fused.logits(IDS).tobytes()
        tokens = [
            model.generate(IDS[:9], do_sample=False, max_new_tokens=30).token_ids
            for model in (split, fused)
        ]
        assert tokens[0] == tokens[1]


def test_a_memory_changes_the_logits_and_its_absence_restores_them(
    tiny_bundle: Path, tiny_pack: Path, frozen: Model
) -> None:
    model = Model.load(tiny_bundle, memory=tiny_pack, threads=1)
    with_memory = model.logits(IDS)
    assert np.abs(with_memory - frozen.logits(IDS)).max() > 0.1
    model.disable_memory()
    assert model.logits(IDS).tobytes() == frozen.logits(IDS).tobytes()
    model.swap_memory(tiny_pack)
    assert model.logits(IDS).tobytes() == with_memory.tobytes()


def test_scale_zero_is_the_frozen_router_bit_for_bit(
    tiny_bundle: Path, tiny_pack: Path, frozen: Model
) -> None:
    for layout in ("split", "fused"):
        model = Model.load(tiny_bundle, memory=tiny_pack, scale=0.0, layout=layout, threads=1)
        assert model.logits(IDS).tobytes() == frozen.logits(IDS).tobytes()


@pytest.mark.parametrize("variant", ["residual", "logits", "assignment"])
def test_backends_give_the_same_logits(tiny_bundle: Path, tiny_pack: Path, variant: Any) -> None:
    pytest.importorskip("faiss")
    logits = {
        gate: Model.load(
            tiny_bundle, memory=tiny_pack, variant=variant, gate=gate, threads=1
        ).logits(IDS)
        for gate in ("onnx", "numpy", "numpy-float64", "faiss")
    }
    for found in logits.values():
        np.testing.assert_allclose(found, logits["numpy-float64"], atol=1e-4)


def test_a_memory_may_cover_some_gates_only(
    tmp_path: Path, tiny_bundle: Path, tiny_pack: Path, routed: Model
) -> None:
    import json

    pack = write_tiny_pack(tmp_path / "pack", tiny_bundle)
    path = pack.path / "memory.json"
    manifest = json.loads(path.read_text())
    manifest["gates"] = manifest["gates"][1:2]
    path.write_text(json.dumps(manifest))
    model = Model.load(tiny_bundle, memory=pack.path, threads=1)
    trace = model.routing_trace(IDS.tolist())
    assert [bool(gate.trace.confidence.any()) for gate in trace.gates] == [False, True, False]
    fused = Model.load(tiny_bundle, memory=pack.path, layout="fused", threads=1)
    assert fused.logits(IDS).tobytes() == model.logits(IDS).tobytes()


def test_steps_of_any_length_give_the_logits_of_one_call(routed: Model) -> None:
    whole = routed.logits(IDS)
    for cut in ([60], [1] * 60, [7, 1, 1, 30, 21]):
        cache = routed.pipeline.new_cache(capacity=60)
        start, pieces = 0, []
        for size in cut:
            piece = IDS[None, start : start + size]
            pieces.append(routed.pipeline.step(cache, piece, rows="all").copy())
            start += size
        np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-4)


def test_a_token_given_as_a_number_is_a_step_of_one(routed: Model) -> None:
    pipeline = routed.pipeline
    one, other = pipeline.new_cache(capacity=20), pipeline.new_cache(capacity=20)
    for tokens in (IDS[:5], IDS[5:6], IDS[6:7], IDS[7:10], IDS[10:11]):
        expected = pipeline.step(other, tokens[None])
        if len(tokens) == 1:
            found = pipeline.next(one, int(tokens[0]))
        else:
            found = pipeline.step(one, tokens[None])
        assert found.tobytes() == expected.tobytes()
        assert one.lengths.tolist() == other.lengths.tolist()
        assert np.array_equal(pipeline.evidence(one), pipeline.evidence(other))
    with pytest.raises(InputError, match=r"vocabulary.* found 300 to 300"):
        pipeline.next(one, 300)
    full = pipeline.new_cache(capacity=1)
    pipeline.next(full, 1)
    with pytest.raises(InputError, match="outgrows its context"):
        pipeline.next(full, 1)
    assert one.lengths.tolist() == [11]
    assert full.lengths.tolist() == [1]


def test_sequences_of_a_batch_do_not_see_each_other_nor_their_padding(routed: Model) -> None:
    lengths = np.array([20, 13, 1])
    ids = np.full((3, 20), 5)
    for row, length in enumerate(lengths):
        ids[row, :length] = IDS[row : row + length]
    cache = routed.pipeline.new_cache(batch=3, capacity=40)
    first = routed.pipeline.step(cache, ids, lengths).copy()
    more = np.array([[9, 8, 7], [3, 0, 0], [1, 2, 0]])
    then = routed.pipeline.step(cache, more, np.array([3, 1, 2])).copy()
    last = routed.pipeline.step(cache, np.array([[4], [4], [4]])).copy()
    for row, length in enumerate(lengths):
        alone = [*ids[row, :length], *more[row, : [3, 1, 2][row]], 4]
        logits = routed.logits(alone)
        np.testing.assert_allclose(first[row], logits[length - 1], atol=1e-4)
        np.testing.assert_allclose(then[row], logits[-2], atol=1e-4)
        np.testing.assert_allclose(last[row], logits[-1], atol=1e-4)


def test_a_swap_takes_effect_at_the_next_step_of_a_running_sequence(
    tiny_bundle: Path, tiny_pack: Path, frozen: Model
) -> None:
    model = Model.load(tiny_bundle, memory=tiny_pack, scale=0.0, threads=1)
    cache = model.pipeline.new_cache(capacity=60)
    other = frozen.pipeline.new_cache(capacity=60)
    model.pipeline.step(cache, IDS[None, :10])
    frozen.pipeline.step(other, IDS[None, :10])
    model.swap_memory(tiny_pack)
    changed = model.pipeline.step(cache, IDS[None, 10:11]).copy()
    same = frozen.pipeline.step(other, IDS[None, 10:11]).copy()
    assert np.abs(changed - same).max() > 1e-3


def test_a_long_prompt_is_taken_in_chunks(
    tiny_bundle: Path, routed: Model, monkeypatch: Any
) -> None:
    whole = routed.logits(IDS)
    monkeypatch.setattr(HostLayout, "prefill_chunk", 16)
    assert len(IDS) < PREFILL_CHUNK
    np.testing.assert_allclose(routed.logits(IDS), whole, atol=1e-4)
    cache = routed.pipeline.new_cache(capacity=60)
    np.testing.assert_allclose(routed.pipeline.step(cache, IDS[None])[0], whole[-1], atol=1e-4)


def test_scores_are_the_log_probabilities_of_the_tokens_that_came(frozen: Model) -> None:
    logits = frozen.logits(IDS).astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.log(probabilities[np.arange(59), IDS[1:]])
    np.testing.assert_allclose(frozen.score(IDS), expected, atol=1e-5)


def test_a_trace_says_what_each_gate_decided(
    routed: Model, tiny_bundle: Path, tiny_pack: Path
) -> None:
    trace = routed.routing_trace("Hello, gates!")
    assert len(trace.token_ids) == 13
    assert len(trace.gates) == 3
    for gate in trace.gates:
        assert gate.expert_ids.shape == (13, 2)
        assert (gate.trace.confidence > 0).all()
        assert gate.trace.neighbors.shape == (13, 8)
        assert (np.diff(gate.trace.similarities, axis=1) <= 0).all()
    fused = Model.load(tiny_bundle, memory=tiny_pack, layout="fused", threads=1)
    for gate, inside in zip(trace.gates, fused.routing_trace("Hello, gates!").gates, strict=True):
        np.testing.assert_array_equal(inside.expert_ids, gate.expert_ids)
        np.testing.assert_array_equal(inside.trace.neighbors, gate.trace.neighbors)
        np.testing.assert_array_equal(inside.trace.confidence, gate.trace.confidence)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda m: m.logits([]), InputError, "empty"),
        (lambda m: m.logits(np.zeros(129, int)), InputError, "128"),
        (lambda m: m.logits([5, 300]), InputError, "vocabulary"),
        (lambda m: m.logits([-1]), InputError, "vocabulary"),
        (lambda m: m.logits([[1, 2], [3, 4]]), InputError, "not a sequence"),
        (lambda m: m.logits([1.7, 2.0]), InputError, "whole numbers"),
        (lambda m: m.score([10**30, 1]), InputError, "whole numbers"),
        (lambda m: m.generate([1.7]), InputError, "whole numbers"),
        (lambda m: m.generate_batch([[1], [[1, 2], [3]]]), InputError, "not a sequence"),
        (lambda m: m.generate(""), InputError, "empty"),
        (lambda m: m.generate("x" * 200), InputError, "128"),
        (lambda m: m.generate(b"\xff\xfe"), InputError, "UTF-8"),
        (lambda m: m.generate("x", temperature=-1.0), SettingError, "temperature"),
        (lambda m: m.pipeline.new_cache(0), SettingError, "batch"),
        (lambda m: m.pipeline.new_cache(1, 1000), SettingError, "capacity"),
        (lambda m: m.pipeline.step(m.pipeline.new_cache(1, 4), np.zeros((1, 5))), InputError, "4"),
        (lambda m: m.pipeline.step(m.pipeline.new_cache(2), np.zeros((1, 5))), InputError, "shape"),
    ],
)
def test_bad_input_is_named(frozen: Model, call: Any, error: Any, named: str) -> None:
    with pytest.raises(error, match=named):
        call(frozen)


@pytest.mark.parametrize(
    "settings", [{"gate": "cuda"}, {"layout": "sideways"}], ids=lambda s: next(iter(s))
)
def test_unknown_backends_are_named(tiny_bundle: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match=next(iter(settings))):
        Model.load(tiny_bundle, **settings)


def test_the_fused_graph_refuses_a_memory_of_another_kind(
    tiny_bundle: Path, tiny_pack: Path
) -> None:
    with pytest.raises(BackendError, match="split"):
        Model.load(tiny_bundle, memory=tiny_pack, variant="assignment", layout="fused")


def test_a_swap_forgets_the_evidence_about_the_old_memory(
    tiny_bundle: Path, tiny_pack: Path
) -> None:
    model = Model.load(tiny_bundle, memory=tiny_pack, threads=1)
    cache = model.pipeline.new_cache(capacity=60)
    model.pipeline.step(cache, IDS[None, :10])
    assert cache.states[:, 0, 1].tolist() == [10, 10, 10]
    model.swap_memory(tiny_pack)
    model.pipeline.step(cache, IDS[None, 10:11])
    assert cache.states[:, 0, 1].tolist() == [1, 1, 1]
    assert cache.lengths.tolist() == [11]


@pytest.mark.parametrize(
    "own", [{"variant": "logits"}, {"neighbors": 4}, {"similarity": "rbf"}, {"scale": 0.5}]
)
def test_settings_of_a_memory_need_one(tiny_bundle: Path, own: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="replaces the memory's own, and there is none"):
        Model.load(tiny_bundle, **own)
