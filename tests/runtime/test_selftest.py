"""The self-test passes here, notices what is broken, and says so."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from knnmoe.runtime import bundle as bundle_module
from knnmoe.runtime import memory as memory_module
from knnmoe.runtime import sampling as sampling_module
from knnmoe.runtime import session as session_module
from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.errors import VerificationError
from knnmoe.runtime.gates import onnx as onnx_gate
from knnmoe.runtime.model import Model
from knnmoe.runtime.routing import RoutingRule
from knnmoe.runtime.selftest import __main__ as program
from knnmoe.runtime.selftest import checks
from knnmoe.runtime.selftest.checks import CHECKS, HERE, Bench


def test_all_is_well_without_torch_and_onnx() -> None:
    code = (
        "import json, sys\n"
        "from knnmoe.runtime.selftest.__main__ import run\n"
        "results = {name: entry['result'] for name, entry in run().items()}\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir'} & set(sys.modules)\n"
        "print(json.dumps([results, sorted(heavy)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    results, heavy = json.loads(done.stdout)
    assert heavy == []
    missing = {"gate faiss"} if find_spec("faiss") is None else set()
    assert results == {name: "skipped" if name in missing else "ok" for name in CHECKS}


def test_the_bundle_is_small_and_whole() -> None:
    opened = Bundle.open(HERE / "bundle")
    assert opened.total_bytes < 400_000
    assert set(opened.manifest.gates) == set(bundle_module.GATE_GRAPHS)


def wrong_rule(self: RoutingRule, logits: Any, bias: Any = None) -> Any:
    ids, weights = RIGHT_RULE(self, logits, bias)
    return ids, weights * 1.001


RIGHT_RULE = RoutingRule.apply


def wrong_inputs(memory: Any, suffix: str = "") -> Any:
    inputs = dict(RIGHT_INPUTS(memory, suffix))
    inputs[f"values{suffix}"] = inputs[f"values{suffix}"] * 1.5
    return inputs


RIGHT_INPUTS = onnx_gate.memory_inputs


def wrong_blend(*given: Any) -> Any:
    found = RIGHT_BLEND(*given)
    found.rows[...] += 1e-4
    return found


RIGHT_BLEND = checks.knn_blend
RIGHT_DRAW = np.random.default_rng

BROKEN: dict[str, tuple[Any, str, Any]] = {
    "routing rules": (RoutingRule, "apply", wrong_rule),
    "blend": (checks, "knn_blend", wrong_blend),
    "known logits": (Model, "logits", lambda self, ids: np.zeros((len(ids), 272))),
    "gate onnx": (onnx_gate, "memory_inputs", wrong_inputs),
    "hashes": (bundle_module, "_check_hash", lambda *_: None),
    "sampling": (sampling_module.np.random, "default_rng", lambda seed=None: RIGHT_DRAW()),
    "sessions": (session_module, "_shared", lambda one, other: 0),
    "swap": (memory_module, "check_file", lambda *_: None),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(HERE / "bundle", True, tmp_path, None)
    for seed in (1, 2, 3, 4) if name not in ("routing rules", "blend", "known logits") else ():
        bench.random_pack(seed=seed)
    bench.opened, bench.ids  # noqa: B018 - made before anything is broken
    monkeypatch.setattr(*BROKEN[name])
    with pytest.raises(VerificationError):
        CHECKS[name](bench)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(program.main, arguments)


def test_the_program_shows_a_table_and_ends_with_how_it_went(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_: Bench) -> str:
        raise RuntimeError("no such instruction")

    few = {name: CHECKS[name] for name in ("routing rules", "blend")}
    monkeypatch.setattr(checks, "CHECKS", few)
    shown = run()
    assert shown.exit_code == 0, shown.output
    assert "8 rules" in shown.stdout
    assert list(json.loads(run("--json").stdout)["checks"]) == list(few)
    monkeypatch.setattr(checks, "CHECKS", few | {"broken": broken})
    shown = run()
    assert shown.exit_code == 1
    assert "RuntimeError: no such instruction" in shown.stdout
    assert "self-test: failed: broken" in shown.stderr
    as_json = run("--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["problem"] == "failed: broken"


def test_a_bundle_of_ones_own_can_be_checked(
    tiny_bundle: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: CHECKS[name] for name in ("known logits", "gate onnx", "sessions")}
    monkeypatch.setattr(checks, "CHECKS", few)
    monkeypatch.setattr(Bench, "random_pack", None)  # the pack given is enough for these
    monkeypatch.setattr(checks, "KINDS", ())
    results = program.run(tiny_bundle, tiny_pack)
    assert {name: entry["result"] for name, entry in results.items()} == {
        "known logits": "skipped", "gate onnx": "ok", "sessions": "ok",
    }  # fmt: skip
    assert results["gate onnx"]["detail"].startswith("kinds of memory: 1,")


def test_what_is_given_has_to_be_right(tmp_path: Path, tiny_pack: Path) -> None:
    assert "not a bundle" in run("--bundle", str(tmp_path)).stderr
    assert run("--bundle", str(tmp_path)).exit_code == 1
    assert run("--memory", str(tiny_pack)).exit_code == 2
    assert run("--unknown").exit_code == 2
