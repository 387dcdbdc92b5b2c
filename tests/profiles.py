"""Profile records that no machine measured, but one could have."""

from __future__ import annotations

import numpy as np

from knnmoe.runtime.profiling.record import (
    Bound,
    Grid,
    MachineBounds,
    Part,
    Point,
    ProfiledMemory,
    ProfileRecord,
    ReadRate,
    Resident,
    Samples,
    Subject,
)

STEPS_A_ROUND = 5
INSIDE = {"scan": 0.6, "select": 0.15, "gather": 0.05, "blend": 0.2}


def synthetic_record(
    *,
    seed: int = 0,
    gates: int = 3,
    rounds: int = 12,
    slower: dict[str, float] | None = None,
    finished: bool = True,
) -> ProfileRecord:
    """Decode steps at two contexts and a prefill, with a memory and frozen, of G gates.

    Args:
        seed: Of the noise: records that differ in it alone are of the same model and machine.
        gates: G.
        rounds: Of five steps each.
        slower: By the name of a part, what its times are multiplied with.
        finished: As the record has it.
    """
    rng = np.random.default_rng(seed)
    shapes = (("decode", 1, 128), ("decode", 1, 512), ("prefill", 64, 0))
    points = tuple(
        _point(rng, phase, tokens, past, entries, gates, rounds, slower or {})
        for phase, tokens, past in shapes
        for entries in (2000, 0)
    )
    return ProfileRecord(
        subject=Subject(
            bundle="bundle", fingerprint="sha256:" + "0" * 64, model_type="olmoe",
            precision="fp32", layouts=("split",), device="cpu", backend="onnxruntime", threads=1,
            memory=ProfiledMemory("memory", 2000, gates, "logits", "cosine", 8, 1_500_000,
                                  ("onnx",)),
        ),
        environment={"cpu": "a processor", "cores": 2, "noise": {"jitter_p99_us": 12.5}},
        settings=Grid((1,), (64,), (128, 512), (2000, 0), rounds * STEPS_A_ROUND,
                      rounds * STEPS_A_ROUND, 5, seed),
        points=points,
        machine_bounds=MachineBounds(
            (ReadRate(1 << 16, 80.0), ReadRate(1 << 28, 12.0)), 9.0, 50.0, 1, "read, copied"
        ),
        resident=Resident(12_000_000, 1_000_000, 1_500_000, 4_000_000, 90_000_000, None),
        started="2026-01-02T03:04:05+00:00",
        finished=finished,
        warnings=(),
    )  # fmt: skip


def _point(
    rng: np.random.Generator,
    phase: str,
    tokens: int,
    past: int,
    entries: int,
    gates: int,
    rounds: int,
    slower: dict[str, float],
) -> Point:
    count = rounds * STEPS_A_ROUND
    drift = np.repeat(rng.normal(1.0, 0.01, rounds), STEPS_A_ROUND)

    def times(ms: float, name: str = "") -> Samples:
        """Around `ms` and never below 95 % of it, with a tail, and slower in some rounds."""
        tail = rng.gamma(2.0, 0.02, count) * drift
        return tuple(np.round(ms * slower.get(name, 1.0) * (0.95 + tail), 6).tolist())

    parts: list[Part] = []
    for index in range(gates + 1):
        ms = (0.4 + past / 2000) * tokens**0.7
        name = f"segment {index}"
        parts.append(Part(name, "segment", times(ms, name), bound=Bound(3_000_000, 900, ms / 2)))
        if index == gates:
            break
        name, ms = f"gate {index}", (0.02 + entries / 8000) * tokens**0.8
        inside = {stage: times(ms * share) for stage, share in INSIDE.items()} if entries else {}
        bound = Bound(500_000, 700, ms / 3)
        parts.append(Part(name, "gate", times(ms, name), None, inside, bound, "onnx"))
    runtime = times(0.02, "runtime")
    parts.append(Part("runtime", "runtime", runtime))
    whole = np.round(np.sum([part.host_ms for part in parts], axis=0), 6)
    visits = np.repeat(np.arange(rounds), STEPS_A_ROUND)
    return Point(
        phase=phase,  # type: ignore[arg-type]
        layout="split", batch=1, tokens=tokens, past=past, memory_entries=entries,
        cuda_graph=None, whole_ms=tuple(whole.tolist()), rounds=tuple(visits.tolist()),
        parts=tuple(parts),
    )  # fmt: skip
