"""The forms of latent attention that are measured run, over caches of the sizes stated."""

from __future__ import annotations

import latent_attention
import pytest
from click.testing import CliRunner


def test_every_form_runs_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_attention, "CAPACITY", 8)
    monkeypatch.setattr(latent_attention, "STEPS", ((0, 3), (3, 1)))
    done = CliRunner().invoke(latent_attention.main, ["--heads", "2", "--rounds", "1"])
    assert done.exit_code == 0, done.output
    first, second, third, *steps = done.output.splitlines()
    assert first == "absorbed: 2304 bytes of cache a token"
    assert second == "apart: 4608 bytes of cache a token"
    assert third == f"expanded: {2 * 2 * (128 + 64) * 4} bytes of cache a token"
    assert [line.partition(":")[0] for line in steps] == ["3 tokens at 0", "1 tokens at 3"]
