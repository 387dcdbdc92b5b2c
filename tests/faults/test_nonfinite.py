"""Numbers that are not finite are traced to the segment or gate that left them first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import make_entries, make_identity
from knnmoe.runtime import memory as memory_module
from knnmoe.runtime.calibration import preset
from knnmoe.runtime.errors import BackendError
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pack_writing import write_pack

IDS = list(range(20, 32))


@pytest.fixture
def infinite(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryPack:
    """A memory whose values at gate 1 are infinite, let through what would refuse it."""
    identity = make_identity(tiny_bundle)
    huge = np.full((300, identity.num_experts), 3e38, np.float32)
    monkeypatch.setattr(memory_module, "_check_finite", lambda path, memory: None)
    return write_pack(
        tmp_path / "huge", model=identity,
        gates={
            0: make_entries(identity, 0),
            1: replace(make_entries(identity, 1), router_logits=huge, residuals=huge),
        },
        variant="logits", neighbors=8, similarity="cosine", calibration=preset("logits"),
        origins=None, provenance={},
    )  # fmt: skip


@pytest.mark.parametrize(("layout", "part"), [("split", "gate 1"), ("fused", "fused")])
def test_infinite_values_of_a_memory_are_traced_to_their_gate(
    tiny_bundle: Path, infinite: MemoryPack, layout: str, part: str
) -> None:
    model = Model.load(tiny_bundle, memory=infinite, layout=layout, threads=1)
    stated = f"step over tokens 0 to 11: {part}: leaves numbers that are not finite"
    with pytest.raises(BackendError, match=stated):
        model.generate(IDS, max_new_tokens=3)
    prompts = [IDS[:3], IDS, IDS[:5]]
    with pytest.raises(BackendError, match=rf"text 0, step over tokens 0 to 2: {part}: leaves"):
        model.generate_batch(prompts, max_new_tokens=3)
    assert model.metrics.finished == {"error": 4}
    model.disable_memory()  # and all is well again
    alone = [model.generate(prompt, max_new_tokens=3).token_ids for prompt in prompts]
    together = model.generate_batch(prompts, max_new_tokens=3)
    assert [one.token_ids for one in together] == alone


def test_a_batch_names_the_text_and_the_step(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.load(tiny_bundle, threads=1)
    step, steps = type(model.pipeline).step, []

    def spoiling(pipeline, cache, *arguments):  # the second text's past, behind its second step
        if len(steps) == 2:
            for layer in cache.values.values():
                layer[1] = np.nan
        steps.append(None)
        return step(pipeline, cache, *arguments)

    monkeypatch.setattr(type(model.pipeline), "step", spoiling)
    with pytest.raises(BackendError, match=r"text 1, step over tokens 13 to 13: segment \d"):
        model.generate_batch([IDS[:4], IDS], max_new_tokens=6)
