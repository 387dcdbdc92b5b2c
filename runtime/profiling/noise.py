"""How quiet the machine is: a loop that does nothing but look at the clock sees who else runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter_ns
from typing import Any

import numpy as np

LOOK_MS = 200.0
GAP_US = 50.0  # longer than the loop ever takes by itself
NOISY_SHARE = 0.05
NOISY_LOAD = 0.5  # of the cores, by others
JIFFIES_A_SECOND = 100


def spin(
    milliseconds: float = LOOK_MS, clock: Callable[[], int] = perf_counter_ns
) -> dict[str, float]:
    """Look at the clock again and again for so long.

    Returns:
        `lost_share`: of the time, spent in gaps of more than 50 us, when something else had the
        core; `longest_gap_us` and `gaps_a_second` of them.
    """
    end = clock() + round(milliseconds * 1e6)
    stamps = [clock()]
    while stamps[-1] < end:
        stamps.append(clock())
    steps = np.diff(stamps) / 1e3
    gaps = steps[steps > GAP_US]
    total = float(steps.sum())
    return {
        "lost_share": round(float(gaps.sum()) / total, 4),
        "longest_gap_us": round(float(steps.max()), 1),
        "gaps_a_second": round(len(gaps) / total * 1e6, 1),
    }


def noise_warnings(
    before: Mapping[str, Any], after: Mapping[str, Any], seconds: float, cores: int
) -> list[str]:
    """What makes the figures doubtful, as sentences.

    Args:
        before, after: Of `sensors`, each with the result of `spin` under `spin`.
        seconds: Between them.
        cores: That the process may use.
    """
    found = []
    lost = max(moment["spin"]["lost_share"] for moment in (before, after))
    if lost > NOISY_SHARE:
        found.append(f"Other work took {lost:.0%} of a core that was looking on.")
    load = before.get("load_average")
    if load and load[0] > NOISY_LOAD * cores:
        found.append(f"The load was {load[0]:.1f} on {cores} cores before anything was measured.")
    if "steal_jiffies" in before and "steal_jiffies" in after:
        stolen = (after["steal_jiffies"] - before["steal_jiffies"]) / JIFFIES_A_SECOND
        if stolen > NOISY_SHARE * seconds * cores:
            share = stolen / (seconds * cores)
            found.append(f"The host gave {share:.0%} of the cores to other guests (steal).")
    return found
