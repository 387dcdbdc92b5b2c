"""Running checks one after another, and what is kept of them."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

MOST_FAILURES = 5  # what follows rarely says more
Records = dict[str, Any]
Errors = dict[str, float]  # the largest deviations, by output


class Absent(Exception):  # noqa: N818 - not an error: something that this machine lacks
    """Something that cannot run here; the text says what is missing."""


class Check(NamedTuple):
    """One check: `run` gives its deviations, and raises where they are too large."""

    name: str
    seed: int
    group: str  # whose largest deviations are kept together
    run: Callable[[], Errors]


def tally(
    checks: Iterable[Check],
    deadline: float,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Records:
    """Run checks until the deadline; at least one, and no more after some failures."""
    count, everything = 0, True
    worst = dict[str, Errors]()
    failures = list[Records]()
    for check in checks:
        if count and clock() > deadline:
            everything = False
            break
        count += 1
        try:
            errors = check.run()
        except Absent as reason:
            return {"status": "absent", "why": str(reason)}
        except Exception as error:
            failures.append(
                {
                    "case": check.name,
                    "seed": check.seed,
                    "error": f"{type(error).__name__}: {error}"[:2000],
                    "traceback": traceback.format_exc()[-4000:],
                }
            )
            if len(failures) == MOST_FAILURES:
                break
            continue
        of_group = worst.setdefault(check.group, {})
        for name, deviation in errors.items():
            of_group[name] = max(of_group.get(name, 0.0), deviation)
    return {
        "status": "failed" if failures else "passed",
        "cases": count,
        "all_cases": everything,
        "largest_deviation": worst,
        "failures": failures,
    }
