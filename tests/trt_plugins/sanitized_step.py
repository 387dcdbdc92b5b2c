"""Runs the step kernels under the sanitizers on arrays of exact size; see test_step_kernels.py."""

import ctypes
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "src")]

import fake_cupy as fake  # noqa: E402
import step_emulated  # noqa: E402
from emulated import SANITIZERS  # noqa: E402

from knnmoe.trt_plugins.step_kernels import StepKernels  # noqa: E402


class ExactMemory:
    """Of malloc itself, so that the sanitizer knows where it ends."""

    malloc = ctypes.CDLL(None).malloc
    malloc.restype, malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)

    def __init__(self, machine: fake.Machine, size: int) -> None:
        self.size, self.ptr = size, self.malloc(size)
        ctypes.memset(self.ptr, 0xFF, size)
        machine.device_ranges[self.ptr] = self.ptr + size


def main(calls: int) -> None:
    fake.DeviceMemory = ExactMemory  # type: ignore[assignment,misc]
    emulation = step_emulated.build(SANITIZERS)
    step_emulated.library = lambda: emulation  # type: ignore[assignment]
    cupy = fake.fake_cupy()
    kernels = StepKernels(cupy=cupy)
    for seed in range(calls):
        rng = np.random.default_rng(seed)
        tokens, experts = int(rng.integers(1, 10)), int(rng.choice([1, 6, 64, 65, 200, 1024]))
        columns = int(rng.integers(1, min(experts, 64) + 1))
        logits = rng.normal(size=(tokens, experts)).astype(np.float32)
        logits[rng.random(logits.shape) < 0.01] = rng.choice([np.nan, np.inf, -np.inf])
        rows, dense = cupy.asarray(logits), cupy.empty(logits.shape, np.float32)
        ids = cupy.empty((tokens, columns), np.int32)
        weights = cupy.empty((tokens, columns), np.float32)
        groups = int(rng.choice([g for g in range(1, 33) if experts % g == 0]))
        top_groups = int(rng.integers(1, groups + 1))
        selectable = min(columns, experts // groups * top_groups)
        rule = {
            "top_k": int(rng.integers(1, selectable + 1)),
            "renormalize": True,
            "scale": 1.5,
            "score": str(rng.choice(["softmax", "softmax-topk", "sigmoid"])),
            "groups": groups,
            "top_groups": top_groups,
            "group_score": str(rng.choice(["max", "top2"])) if experts > groups else "max",
            "selection_bias": cupy.asarray(rng.normal(size=experts).astype(np.float32))
            if rng.integers(2)
            else None,
        }
        kernels.route(rows, ids, weights, **rule)()
        chosen = ids.get()
        kernels.assign(rows, dense, **rule)()
        kernels.heaviest(dense, ids, weights)()
        for some in (chosen, ids.get()):
            assert ((some >= 0) & (some < experts)).all()
            assert all(len(set(row)) == columns for row in some)
        batch, heads, capacity, fresh = (int(n) for n in rng.integers(1, 6, 4))
        width, dtype = int(rng.choice([1, 7, 64])), rng.choice([np.float16, np.float32])
        pairs = [
            (
                cupy.empty((batch, heads, capacity, width), dtype),
                cupy.zeros((batch, heads, fresh, width), dtype),
            )
            for _ in range(2)
        ]
        kernels.append_many(pairs, cupy.asarray(rng.integers(-3, capacity + 3, batch)))()
        cupy.machine.synchronize()
    print("clean")


if __name__ == "__main__":
    main(int(sys.argv[1]))
