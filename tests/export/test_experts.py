"""Experts are forced to the ids and weights given, whatever these are."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from knnmoe.export.exporter import export
from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.checkpoint import Checkpoint
from tiny import make_tiny_olmoe

T, D, E, ROOM = 6, 64, 8, 3


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(a checkpoint, the session of its last segment: experts of the last gate, norm and head)."""
    root = tmp_path_factory.mktemp("experts")
    export(make_tiny_olmoe(root / "checkpoint"), root / "bundle", experts_per_token=ROOM)
    bundle = Bundle.open(root / "bundle")
    last = bundle.manifest.segments[-1]
    return Checkpoint.open(root / "checkpoint"), onnxruntime.InferenceSession(
        bundle.file(last.file)
    )


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "hidden": rng.normal(size=(2, 3, D)).astype(np.float32),
        "router_input": rng.normal(size=(T, D)).astype(np.float32),
        "expert_ids": np.argsort(rng.random((T, E)), axis=1)[:, :ROOM].astype(np.int32),
        "expert_weights": rng.random((T, ROOM)).astype(np.float32),
        "logit_rows": np.arange(T),
    }


def expected_logits(checkpoint: Checkpoint, feeds: dict[str, np.ndarray]) -> np.ndarray:
    def weight(name: str) -> np.ndarray:
        return checkpoint.tensor(f"{name}.weight").astype(float)

    stream = feeds["hidden"].reshape(T, D).astype(float)
    for t in range(T):
        x = feeds["router_input"][t].astype(float)
        for e, w in zip(feeds["expert_ids"][t], feeds["expert_weights"][t], strict=True):
            p = f"model.layers.2.mlp.experts.{e}"
            gate = weight(f"{p}.gate_proj") @ x
            hidden = gate / (1 + np.exp(-gate)) * (weight(f"{p}.up_proj") @ x)
            stream[t] += w * (weight(f"{p}.down_proj") @ hidden)
    rms = np.sqrt((stream**2).mean(axis=1, keepdims=True) + 1e-5)
    return stream / rms * weight("model.norm") @ weight("lm_head").T


def check(exported, feeds: dict[str, np.ndarray]) -> None:
    checkpoint, session = exported
    (logits,) = session.run(None, feeds)
    np.testing.assert_allclose(logits, expected_logits(checkpoint, feeds), atol=1e-4)


def test_any_ids_and_weights_are_used_as_given(exported):
    check(exported, inputs())


def test_weights_may_sum_to_more_than_one(exported):
    feeds = inputs()
    feeds["expert_weights"] *= 20
    check(exported, feeds)


def test_experts_of_weight_zero_do_nothing(exported):
    feeds = inputs()
    feeds["expert_weights"][:, 1:] = 0
    check(exported, feeds)


def test_a_token_without_any_weight_keeps_its_stream(exported):
    feeds = inputs()
    feeds["expert_weights"][2] = 0
    check(exported, feeds)


def test_padding_may_repeat_an_expert_that_is_in_use(exported):
    feeds = inputs()
    feeds["expert_ids"][:, 2] = feeds["expert_ids"][:, 0]
    feeds["expert_weights"][:, 2] = 0
    check(exported, feeds)


def test_only_the_rows_asked_for_get_logits(exported):
    _, session = exported
    feeds = inputs()
    (every,) = session.run(None, feeds)
    (some,) = session.run(None, feeds | {"logit_rows": np.array([4, 1])})
    np.testing.assert_allclose(some, every[[4, 1]], atol=1e-6)
