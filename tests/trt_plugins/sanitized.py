"""Runs random calls under the address and undefined-behaviour sanitizers; see test_sanitizer.py."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "src")]

from blend_cases import check, random_case  # noqa: E402
from emulated import SANITIZERS, build  # noqa: E402

if __name__ == "__main__":
    emulation = build(flags=SANITIZERS)
    for seed in range(int(sys.argv[1])):
        case = random_case(seed, prefill=seed % 4 == 3, two_stage=seed % 5 in (1, 3))
        check(case, case.run(emulation=emulation))
    print("clean")
