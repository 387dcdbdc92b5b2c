from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from fake_pipeline import FakeCache
from knnmoe.runtime.errors import SettingError
from knnmoe.runtime.profiling.environment import environment
from knnmoe.runtime.profiling.measure import (
    Measured,
    Profile,
    ProfileSettings,
    Samples,
    measure,
)
from knnmoe.runtime.profiling.report import percentiles, print_profile, to_json

Call = tuple[str, str, int, int]


@dataclass
class Recorder:
    """A pipeline that notes each step: (name, way, tokens before, tokens of the step)."""

    name: str
    calls: list[Call]
    vocab_size: int = 10
    max_positions: int = 40
    seen: list[list[int]] = field(default_factory=list)

    def new_cache(self, batch: int, capacity: int) -> FakeCache:
        return FakeCache(capacity, np.zeros(batch, np.int64))

    def _advance(self, way: str, cache: FakeCache, ids: NDArray[np.int64]) -> None:
        self.calls.append((self.name, way, int(cache.lengths[0]), ids.shape[1]))
        self.seen.append(ids[0].tolist())
        cache.lengths += ids.shape[1]
        assert cache.lengths[0] <= cache.capacity <= self.max_positions

    def step(self, cache: FakeCache, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self._advance("step", cache, input_ids)
        return np.zeros((1, self.vocab_size), np.float32)

    def timed_step(self, cache: FakeCache, input_ids: NDArray[np.int64]) -> dict[str, float]:
        self._advance("timed", cache, input_ids)
        return {"segment 0": 2.0, "gate 0": 0.5, "segment 1": 1.0}


def run(frozen: bool = True, **settings: Any) -> tuple[Profile, Recorder, Recorder, int]:
    calls: list[Call] = []
    loaded, other = Recorder("loaded", calls), Recorder("frozen", calls)
    ticks: list[None] = []
    profile = measure(
        loaded,
        other if frozen else None,
        ProfileSettings(**settings),
        lambda: ticks.append(None),
    )
    return profile, loaded, other, len(ticks)


def test_every_decode_step_has_the_same_context() -> None:
    _, loaded, _, _ = run(context=12, prompts=(), steps=3, warmup=2)
    assert loaded.calls[:2] == [("loaded", "step", 0, 12), ("frozen", "step", 0, 12)]
    assert set(loaded.calls[2:]) == {("loaded", "timed", 12, 1), ("frozen", "timed", 12, 1)}


def test_the_two_take_turns_and_neither_always_goes_first() -> None:
    _, loaded, _, _ = run(context=1, prompts=(), steps=4, warmup=0)
    rounds = [name for name, way, _, _ in loaded.calls if way == "timed"]
    assert rounds == ["loaded", "frozen", "frozen", "loaded"] * 2


def test_both_run_the_same_tokens() -> None:
    _, loaded, other, _ = run(context=5, prompts=(7,), steps=6, prefills=2)
    assert loaded.seen == other.seen
    assert len({tuple(ids) for ids in loaded.seen}) > 6


def test_warm_up_is_run_but_not_counted() -> None:
    profile, _, _, ticks = run(context=3, prompts=(4, 9), steps=5, prefills=2, warmup=3)
    assert len(profile.decode.loaded.whole) == 5
    assert len(profile.decode.loaded.parts["gate 0"]) == 5
    assert [len(measured.loaded.whole) for measured in profile.prefill] == [2, 2]
    assert [(m.tokens, m.past) for m in profile.prefill] == [(4, 0), (9, 0)]
    assert ticks == profile.settings.ticks == 8 + 2 * 5


def test_prefill_starts_from_an_empty_context() -> None:
    _, loaded, _, _ = run(context=3, prompts=(4,), steps=1, prefills=3)
    assert {call[2] for call in loaded.calls if call[3] == 4} == {0}


def samples(whole: list[float], **parts: list[float]) -> Samples:
    return Samples(whole, {name.replace("_", " "): times for name, times in parts.items()})


def test_the_gates_share_is_what_they_take_beyond_routing_alone() -> None:
    loaded = samples([10, 10], segment_0=[4, 4], gate_0=[1.5, 1.5], gate_1=[2.5, 2.5])
    frozen = samples([8, 8], segment_0=[4, 4], gate_0=[0.5, 0.5], gate_1=[0.5, 0.5])
    assert Measured(1, 5, loaded, frozen).gate_share == pytest.approx((4.0 - 1.0) / 8)


def test_a_machine_that_stalls_each_step_elsewhere_is_seen_and_leaves_the_share_alone() -> None:
    loaded = samples([12, 12, 12], segment_0=[10, 1, 1], gate_0=[1, 10, 1], segment_1=[1, 1, 10])
    frozen = samples([2, 2, 2], segment_0=[1, 1, 1], gate_0=[0, 0, 0], segment_1=[1, 1, 1])
    assert Measured(1, 5, loaded, frozen).gate_share == pytest.approx(1 / 3)
    assert Measured(1, 5, loaded, frozen).disturbed
    assert not Measured(1, 5, frozen, None).disturbed


def test_fused_gates_show_in_whole_steps_only() -> None:
    share = Measured(1, 5, samples([12, 12], fused=[11, 11]), samples([9, 9], fused=[9, 9]))
    assert share.gate_share == pytest.approx(2 / 11)


def test_without_a_memory_retrieval_takes_nothing() -> None:
    profile, _, other, _ = run(frozen=False, context=3, prompts=(4,), steps=2, prefills=1)
    assert profile.decode.gate_share == 0
    assert to_json(profile)["frozen"] is None
    assert other.seen == []


def test_percentiles_are_those_of_the_samples() -> None:
    assert percentiles(range(101)) == {"p50": 50, "p90": 90, "p99": 99}


def test_the_json_has_what_scripts_rely_on() -> None:
    profile, *_ = run(context=3, prompts=(4, 9), steps=5, prefills=2)
    figures = json.loads(json.dumps(to_json(profile), allow_nan=False))
    assert figures["decode_ms_p50"] > 0
    assert figures["decode_ms_p50"] <= figures["decode_ms_p90"] <= figures["decode_ms_p99"]
    assert figures["parts"] == {"segment 0": 2.0, "gate 0": 0.5, "segment 1": 1.0}
    assert list(figures["parts"]) == ["segment 0", "gate 0", "segment 1"]
    assert figures["parts_p99"] == figures["frozen"]["parts_p90"] == figures["parts"]
    assert isinstance(figures["gate_share"], float)
    assert [entry["prompt"] for entry in figures["prefill"]] == [4, 9]
    assert all(entry["first_token_ms_p50"] > 0 for entry in figures["prefill"])


@pytest.mark.parametrize("frozen", [True, False])
def test_the_tables_name_every_part_and_shape(frozen: bool) -> None:
    profile, *_ = run(frozen=frozen, context=3, prompts=(4, 9), steps=5, prefills=2)
    out = io.StringIO()
    print_profile(profile, Console(file=out, width=100))
    lines = out.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 100
    for name in ("segment 0", "gate 0", "segment 1", "decode", "prompt of 4", "prompt of 9"):
        assert any(name in line for line in lines)
    (gate,) = (line for line in lines if "gate 0" in line)
    assert "14.3%" in gate  # 0.5 of 3.5


def test_settings_are_made_to_fit_the_model() -> None:
    assert ProfileSettings.fitting(2048).context == 128
    small = ProfileSettings.fitting(64)
    assert (small.context, small.prompts) == (63, (32, 64))
    assert ProfileSettings.fitting(16).prompts == (16,)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"context": 64}, "context: out of range; expected 1 to 63; found 64"),
        ({"context": 0}, "context"),
        ({"prompts": (8, 65)}, "prompt length: out of range; expected 1 to 64; found 65"),
        ({"steps": 0}, "steps"),
        ({"prefills": 0}, "prefills"),
        ({"warmup": -1}, "warmup"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        ProfileSettings.fitting(64, **settings)


def test_the_environment_says_where_and_when() -> None:
    where = environment()
    json.dumps(where)
    assert where["cpu"]
    assert where["cores"] >= 1
    assert {"numpy", "onnxruntime", "python", "knnmoe"} <= set(where)
    assert datetime.fromisoformat(where["date"]).utcoffset() is not None
