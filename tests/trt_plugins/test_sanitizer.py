"""No kernel reads or writes outside of what it was given, uninitialised or not."""

from __future__ import annotations

from emulated import check_sanitized


def test_random_calls_are_clean_under_the_sanitizers() -> None:
    check_sanitized("sanitized.py", 25)
