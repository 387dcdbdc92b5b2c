"""The standard graphs are parsed and built by a real TensorRT-RTX that has no GPU."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from knnmoe.export.exporter import export
from knnmoe.export.storage import QuantizeOptions
from knnmoe.runtime.bundle import GATE_GRAPHS, Bundle
from tiny import KINDS, make_tiny, make_tiny_olmoe

SCRIPT = Path(__file__).parent / "std_in_tensorrt.py"
DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "model"

OPERATORS, PRECISIONS, EXPERTS = (
    ("primitive", "modern"), ("float32", "float16"), ("gathered", "dense"),
)  # fmt: skip
WAYS = [
    {"operators": operators, "precision": precision, "experts": experts}
    for operators, precision, experts in itertools.product(OPERATORS, PRECISIONS, EXPERTS)
]
MOE = [
    {"operators": operators, "precision": precision, "experts": "moe"}
    for operators, precision in itertools.product(OPERATORS, PRECISIONS)
]
TOKENS = {"gathered": 16, "dense": 128, "moe": 128}
ALL = ["SM86", "SM89", "SM120"]

Builder = Callable[[Path, list[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    spec = find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None or find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("tensorrt-rtx is not installed")
    libraries, links = Path(spec.origin).parent, tmp_path_factory.mktemp("links")
    (found,) = libraries.glob("libtensorrt_rtx.so.?")
    (links / "libtensorrt_rtx.so").symlink_to(found)

    def run(bundle: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, SCRIPT, bundle, json.dumps(jobs)],
            capture_output=True, text=True, check=False, timeout=600,
            env={**os.environ, "LD_LIBRARY_PATH": f"{links}:{libraries}"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        results = [json.loads(line) for line in done.stdout.splitlines()]
        for result in results:
            assert "errors" not in result, result
            assert result.get("bytes", 1) > 0, (result, done.stderr[-4000:])
        return results

    return run


def exported(root: Path, family: str, kind: str) -> Path:
    return export(make_tiny(root / "checkpoint", family, kind), root / "bundle").bundle


def segments(bundle: Path) -> range:
    return range(len(Bundle.open(bundle, verify=False).manifest.segments))


def job(graph: object, way: dict[str, str], *capabilities: str) -> dict[str, Any]:
    """Without capabilities the graph is parsed only."""
    tokens = TOKENS[way["experts"]]
    return {"graph": str(graph), **way, "tokens": tokens, "capabilities": list(capabilities)}


def test_every_segment_is_parsed_as_what_it_is(tensorrt: Builder, tiny_bundle: Path) -> None:
    for result in tensorrt(tiny_bundle, [job(i, way) for way in WAYS for i in range(4)]):
        made_for_transformers = {"ATTENTION_INPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING"}
        modern = result["operators"] == "modern" and result["graph"] != "3"
        found = made_for_transformers & set(result["layers"])
        assert found == (made_for_transformers if modern else set())


def test_the_experts_of_a_gate_are_parsed_as_one_layer_of_tensorrts_own(
    tensorrt: Builder, tiny_bundle: Path
) -> None:
    """Parsed only: this TensorRT builds for no device that has the layer."""
    shape = Bundle.open(tiny_bundle, verify=False).manifest.architecture
    jobs = [job(graph, way) for way in MOE for graph in (*range(4), "fused")]
    for result in tensorrt(tiny_bundle, jobs):
        gates = {"0": 0, "fused": shape.num_gates}.get(result["graph"], 1)
        assert len(result["moe"]) == gates, result
        for layer in result["moe"]:
            half = "HALF" if result["precision"] == "float16" else "FLOAT"
            assert layer["activation"] == "SILU"
            assert layer["dtypes"] == [half, "INT32", *[half] * 5]
            hidden, ids, scores, gate, up, down, mixed = layer["shapes"]
            assert hidden == mixed == [1, -1, shape.hidden_size]
            assert ids == scores
            assert gate == up == [shape.num_experts, shape.hidden_size, down[1]]
            assert down == [shape.num_experts, gate[2], shape.hidden_size]


def test_biases_and_a_clamped_activation_are_parts_of_that_layer(
    tensorrt: Builder, tmp_path: Path
) -> None:
    bundle = exported(tmp_path, "gpt_oss", "plain")
    for result in tensorrt(bundle, [job(i, way) for way in MOE for i in segments(bundle)[1:]]):
        (layer,) = result["moe"]
        assert layer["swiglu"] == pytest.approx([1.702, 1.0, 2.0])
        assert layer["activation"] == "SILU"
        assert layer["shapes"][6:9] == [[8, 32], [8, 32], [8, 64]]
        assert len(set(layer["dtypes"]) - {"INT32"}) == 1


def test_a_segment_is_built_in_float16_and_where_no_fused_attention_is(
    tensorrt: Builder, tiny_bundle: Path
) -> None:
    half = [way for way in WAYS if way["precision"] == "float16"]
    unfused = {"operators": "modern", "precision": "float32", "experts": "dense"}
    tensorrt(tiny_bundle, [job(1, way, "SM86") for way in (*half, unfused)])


def test_every_segment_of_every_family_is_parsed(tensorrt: Builder, tmp_path: Path) -> None:
    ways = [way for way in WAYS if way["precision"] == "float16"]
    both = ways[::3], ways[1:3]  # each half has both sets of operators and both ways to experts
    kinds = [
        ("qwen3_moe", "first and last layers dense, two in a row"),
        ("mixtral", "a window of 5, wide heads, many experts"),
        ("qwen2_moe", "windows of 6 in every other layer, last layer dense"),
        ("gpt_oss", "plain"),
        ("deepseek_v3", "plain"),
        ("glm4_moe", "plain"),
    ]
    bundles = [exported(tmp_path / family, family, kind) for family, kind in kinds]
    jobs = [
        job(i, way) | {"bundle": str(bundle)}
        for number, bundle in enumerate(bundles)
        for way in both[number % 2] for i in segments(bundle)
    ]  # fmt: skip
    tensorrt(bundles[0], jobs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"), [(f, kind) for f in KINDS if f != "olmoe" for kind in KINDS[f]]
)
def test_every_segment_of_every_family_is_built(
    tensorrt: Builder, tmp_path: Path, family: str, kind: str
) -> None:
    bundle = exported(tmp_path, family, kind)
    tensorrt(bundle, [job(i, way, "SM86") for way in WAYS for i in segments(bundle)])
    tensorrt(bundle, [job("fused", way, "SM86") for way in WAYS if way["experts"] == "gathered"])


@pytest.mark.slow
def test_every_segment_is_built_for_three_architectures(
    tensorrt: Builder, tiny_bundle: Path
) -> None:
    tensorrt(tiny_bundle, [job(i, way, *ALL) for way in WAYS for i in range(4)])


@pytest.mark.slow
@pytest.mark.parametrize("operators", OPERATORS)
def test_the_blend_is_built_as_a_function_where_there_is_no_plugin(
    tensorrt: Builder, tiny_bundle: Path, operators: str
) -> None:
    way = {"operators": operators, "precision": "float16", "experts": "gathered"}
    graphs = ["fused", *(f"gate {name}" for name in GATE_GRAPHS)]
    for result in tensorrt(tiny_bundle, [job(graph, way, *ALL) for graph in graphs]):
        assert "PLUGIN_V3" not in result["layers"]


def in_blocks(root: Path, precision: str, **sizes: int) -> Path:
    """A bundle, with a head in blocks and, of 4 bits, zero points."""
    options = None
    if precision != "fp16":
        options = QuantizeOptions(
            head_bits=8, zero_points=precision == "int4" and not sizes, search=False
        )
    sizes = {"hidden_size": 128, "intermediate_size": 64} | sizes
    checkpoint = make_tiny_olmoe(root / f"c {precision}", **sizes)
    return export(checkpoint, root / precision, precision=precision, options=options).bundle


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_every_segment_over_weights_in_blocks_is_parsed(
    tensorrt: Builder, tmp_path: Path, precision: str
) -> None:
    bundle = in_blocks(tmp_path, precision)
    half = [way for way in WAYS if way["precision"] == "float16"]
    for result in tensorrt(bundle, [job(i, way) for way in half for i in segments(bundle)]):
        assert "DEQUANTIZE" in result["layers"], result


@pytest.mark.slow
def test_a_segment_over_weights_in_blocks_is_built(tensorrt: Builder, tmp_path: Path) -> None:
    bundle = in_blocks(tmp_path, "int4")
    half = [way for way in WAYS if way["precision"] == "float16" and way["operators"] == "modern"]
    tensorrt(bundle, [job(1, way, "SM86") for way in half])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))
def test_every_segment_over_weights_in_blocks_is_built(
    tensorrt: Builder, tmp_path: Path, way: dict[str, str], precision: str
) -> None:
    bundle = in_blocks(tmp_path, precision)
    tensorrt(bundle, [job(i, way, *ALL) for i in segments(bundle)])
    tensorrt(bundle, [job("fused", way, "SM86")])


@pytest.mark.slow
def test_an_engine_holds_codes_and_not_what_they_stand_for(
    tensorrt: Builder, tmp_path: Path
) -> None:
    way = {"operators": "modern", "precision": "float16"}
    stored, built = {}, {}
    for precision in ("int4", "int8", "fp16"):
        bundle = in_blocks(tmp_path, precision, hidden_size=512, intermediate_size=512)
        stored[precision] = (bundle / "segments" / "01.safetensors").stat().st_size
        jobs = [job(1, way | {"experts": experts}, "SM86") for experts in EXPERTS]
        for result in tensorrt(bundle, jobs):
            built[precision, result["experts"]] = result["bytes"]
    for precision, experts in itertools.product(("int4", "int8"), EXPERTS):
        # Beside the weights an engine has some megabytes of code.
        less = built["fp16", experts] - built[precision, experts]
        assert less == pytest.approx(stored["fp16"] - stored[precision], rel=0.1)


@pytest.mark.slow
def test_a_float16_engine_holds_its_weights_in_float16(tensorrt: Builder, tmp_path: Path) -> None:
    export(DEMO, tmp_path / "demo")
    results = tensorrt(tmp_path / "demo", [job(i, way, *ALL) for way in WAYS for i in range(5)])
    sizes = {
        (r["graph"], r["operators"], r["experts"], r["precision"]): r["bytes"] for r in results
    }
    stored = (tmp_path / "demo" / "segments" / "04.safetensors").stat().st_size
    for operators, experts in itertools.product(OPERATORS, EXPERTS):
        # The last segment is all weights of products, but for one norm.
        whole, half = (sizes["4", operators, experts, precision] for precision in PRECISIONS)
        assert whole - half == pytest.approx(stored / 2, rel=0.1)
