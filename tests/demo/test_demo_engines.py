"""The shipped model as engines: built ahead, with the plugin, by a TensorRT that has no device."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from plugin_library import built_plugin

from knnmoe.runtime.cli import main

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "demo" / "model"
GATES, SEGMENTS = 4, 5
TWO, ALL = "86,120", "86,89,120"
GATE_GRAPHS_WITH_THE_NODE = 4  # of five: not the frozen one


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from knnmoe.export.exporter import export

    return export(CHECKPOINT, tmp_path_factory.mktemp("demo") / "bundle").bundle


@pytest.fixture(scope="module")
def plugin() -> Path:
    if find_spec("tensorrt_rtx_libs") is None or find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("tensorrt-rtx is not installed")
    return built_plugin()


def build(bundle: Path, output: Path, *words: object, sm: str = "86") -> Any:
    command = [
        "engines", "build", bundle, "--backend", "tensorrt_rtx", "--sm", sm,
        "--output", output, "--json", *words,
    ]  # fmt: skip
    done = CliRunner().invoke(main, [str(word) for word in command])
    report = json.loads(done.stdout)
    assert done.exit_code == 0, report
    assert report["sm"] == sm.split(",")
    for engine in report["engines"]:
        assert (output / engine["file"]).stat().st_size == engine["bytes"] > 0
    return report


def once_and_for_all(*options: str) -> list[Any]:
    """For one architecture, and slowly for all three that this TensorRT builds for."""
    return [pytest.param("86", options), pytest.param(ALL, options, marks=pytest.mark.slow)]


@pytest.mark.parametrize(
    ("sm", "options"),
    [
        (TWO, ()), pytest.param(ALL, (), marks=pytest.mark.slow),
        *once_and_for_all("--precision", "float32"), *once_and_for_all("--operators", "modern"),
    ],
)  # fmt: skip
def test_every_segment_and_gate_is_built(
    bundle: Path, plugin: Path, tmp_path: Path, sm: str, options: tuple[str, ...]
) -> None:
    report = build(bundle, tmp_path / "set", "--plugin", plugin, *options, sm=sm)
    names = [engine["name"] for engine in report["engines"]]
    assert len(names) == 2 * SEGMENTS + GATE_GRAPHS_WITH_THE_NODE + 1
    layers = {engine["name"]: engine["plugin_layers"] for engine in report["engines"]}
    with_node = [name for name in names if name.startswith("gate-") and name != "gate-frozen"]
    assert layers == {name: int(name in with_node) for name in names}
    assert report["plugin_layers"] == GATE_GRAPHS_WITH_THE_NODE
    assert report["notes"] == []


@pytest.mark.parametrize("sm", ["86", pytest.param(ALL, marks=pytest.mark.slow)])
def test_the_fused_graph_takes_the_plugin_at_every_gate(
    bundle: Path, plugin: Path, tmp_path: Path, sm: str
) -> None:
    for keys in ("float16", "int8"):
        report = build(
            bundle, tmp_path / keys, "--plugin", plugin, "--layout", "fused", "--keys", keys, sm=sm
        )
        layers = [engine["plugin_layers"] for engine in report["engines"]]
        assert layers == [GATES, GATES], keys
        assert report["notes"] == []


@pytest.mark.parametrize("sm", ["86", pytest.param(ALL, marks=pytest.mark.slow)])
def test_without_the_plugin_the_function_is_taken_and_said_so(
    bundle: Path, tmp_path: Path, sm: str
) -> None:
    report = build(bundle, tmp_path / "set", "--plugin", "none", "--layout", "fused", sm=sm)
    assert report["plugin_layers"] == 0
    assert "TensorRT runs the gates' ONNX function, with K = 8" in report["notes"][0]
