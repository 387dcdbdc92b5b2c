"""Parameters of which a part is tested fast and the rest slowly (`make test-all`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def thinned(
    cases: Iterable[tuple[Any, ...]],
    fast: Callable[..., bool],
    name: Callable[..., str] | None = None,
) -> list[Any]:
    """Cases for `parametrize`, marked slow but for those that `fast` is true of.

    Args:
        cases: The values of each.
        fast: Of those values, whether they are among the fast ones.
        name: Of those values, the name of the case; pytest's own if not given.
    """
    made = [
        pytest.param(
            *case,
            id=None if name is None else name(*case),
            marks=() if fast(*case) else pytest.mark.slow,
        )
        for case in cases
    ]
    assert any(not case.marks for case in made), "no case is fast"
    return made
