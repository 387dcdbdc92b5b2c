"""Makes the benchmarks importable, and the emulated device of the kernels' tests."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
for folder in ("benchmarks", "tests/trt_plugins"):
    sys.path.insert(0, str(ROOT / folder))
