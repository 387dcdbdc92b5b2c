"""Fixtures of the exporter's tests."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """One thread for torch: the matrices are tiny, and a second thread only waits for the first."""
    if find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
