"""Gate graphs of every routing rule are parsed and built by a real TensorRT-RTX without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from knnmoe.runtime.routing import RoutingRule

SCRIPT = Path(__file__).parent / "rules_in_tensorrt.py"
RULES = [
    RoutingRule(6, "softmax-topk"),
    RoutingRule(6, scale=16.0, groups=8, top_groups=3),
    RoutingRule(
        6, "sigmoid", renormalize=True, scale=2.5, groups=4, top_groups=2, group_score="top2",
        selection_bias=True,
    ),
    RoutingRule(8, "sigmoid", renormalize=True, selection_bias=True),
]  # fmt: skip


def test_tensorrt_builds_the_gates_of_every_rule(tmp_path: Path) -> None:
    spec = find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None or find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("tensorrt-rtx is not installed")
    libraries = Path(spec.origin).parent
    (found,) = libraries.glob("libtensorrt_rtx.so.?")
    (tmp_path / "libtensorrt_rtx.so").symlink_to(found)
    jobs = [("frozen", opset, rule) for opset in (20, 24) for rule in RULES]
    jobs += [("cosine", 20, RULES[2]), ("rbf-assignment", 24, RULES[2])]
    done = subprocess.run(
        [sys.executable, SCRIPT, json.dumps([(n, o, rule.to_json()) for n, o, rule in jobs])],
        capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{libraries}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(built) == len(jobs)
    for (name, opset, rule), result in zip(jobs, built, strict=True):
        assert result["bytes"] > 0, (name, opset, rule, done.stderr[-4000:])
        assert ("selection_bias" in result["inputs"]) == rule.selection_bias
