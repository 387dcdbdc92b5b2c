"""Bundles whose weights are not fp32: what is stored, what they compute, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tracemalloc
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from knnmoe.export import cli
from knnmoe.export.exporter import ExportReport, export
from knnmoe.export.quantize import unpack
from knnmoe.export.std import StdGraph, StdModel, StdOptions
from knnmoe.export.storage import QuantizeOptions
from knnmoe.export.verification.bundle_runs import SplitRunner
from knnmoe.export.verification.verify import verify
from knnmoe.runtime.bundle import Bundle, Quantization
from knnmoe.runtime.checkpoint import Checkpoint
from knnmoe.runtime.engines import requirements
from knnmoe.runtime.errors import (
    BackendError,
    BundleError,
    CheckpointError,
    SettingError,
    VerificationError,
)
from knnmoe.runtime.model import Model
from thinned import thinned
from tiny import KINDS, make_tiny, make_tiny_olmoe

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="the reference needs torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

IDS = np.random.default_rng(0).integers(0, 256, 40)
# What rounding activations to 8 bits does to these tiny models, with room.
ROUNDING = 0.03

WAYS: dict[str, tuple[str, QuantizeOptions]] = {
    "fp16": ("fp16", QuantizeOptions()),
    "int8": ("int8", QuantizeOptions()),
    "int8, head and zero points": (
        "int8", QuantizeOptions(head_bits=8, zero_points=True, search=False)
    ),
    "int4": ("int4", QuantizeOptions()),
    "int4, exact": ("int4", QuantizeOptions(exact_activations=True)),
    "int4, head and zero points": ("int4", QuantizeOptions(head_bits=8, zero_points=True)),
    "int4 in small blocks, head too": (
        "int4", QuantizeOptions(block_size=32, head_bits=4, search=False)
    ),
}  # fmt: skip
SIZES = {"hidden_size": 128, "intermediate_size": 64}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_tiny_olmoe(tmp_path_factory.mktemp("source") / "c", dtype="float16", **SIZES)


@pytest.fixture(scope="module", params=WAYS)
def way(request: Any) -> tuple[str, QuantizeOptions]:
    return WAYS[request.param]


@pytest.fixture(scope="module")
def exported(way, checkpoint, tmp_path_factory) -> ExportReport:
    precision, options = way
    return export(checkpoint, tmp_path_factory.mktemp("b") / "b", precision=precision,
                  options=options)  # fmt: skip


@pytest.fixture(scope="module")
def int4(checkpoint, tmp_path_factory) -> Path:
    return export(checkpoint, tmp_path_factory.mktemp("b") / "b", precision="int4").bundle


@needs_torch
def test_it_computes_what_transformers_computes_on_the_stored_weights(exported, checkpoint):
    report = verify(checkpoint, Bundle.open(exported.bundle))
    assert report.max_abs_error <= 1e-4
    quantization = exported.storage.quantization
    if quantization is None or quantization.activations == "fp32":
        assert report.activations is None
    else:
        assert 0 < report.activations < ROUNDING


@needs_torch
@pytest.mark.parametrize(
    ("precision", "tied"),
    thinned(
        itertools.product(("fp16", "int8", "int4"), (False, True)),
        lambda precision, tied: tied == (precision != "int8"),
    ),
)
def test_a_tied_head_and_bfloat16_are_no_exception(tmp_path, precision, tied):
    source = make_tiny_olmoe(
        tmp_path / "c", seed=2, dtype="bfloat16", tie_word_embeddings=tied, shards=2, **SIZES
    )
    options = QuantizeOptions(head_bits=None if precision == "fp16" else 8)
    export(source, tmp_path / "b", precision=precision, options=options)
    assert verify(source, Bundle.open(tmp_path / "b")).max_abs_error <= 1e-4


@needs_torch
@pytest.mark.parametrize(
    ("family", "kind"),
    thinned(
        ((family, kind) for family in KINDS if family != "olmoe" for kind in KINDS[family]),
        lambda family, kind: kind == "plain",
    ),
)
def test_every_family_can_be_quantised(tmp_path, family, kind):
    widths = {"intermediate_size": 64, "shared_expert_intermediate_size": 64}
    source = make_tiny(tmp_path / "c", family, kind, seed=1, **widths)
    export(source, tmp_path / "b", precision="int4")
    report = verify(source, Bundle.open(tmp_path / "b"))
    assert report.max_abs_error <= 1e-4
    # Latent queries are one more rounding in a row.
    assert 0 < report.activations < ROUNDING + 0.01 * family.startswith("deepseek")


@needs_torch
def test_a_wrong_code_is_noticed(tmp_path, checkpoint, int4):
    bundle = shutil.copytree(int4, tmp_path / "b")
    path = bundle / "segments" / "02.safetensors"
    with safe_open(path, "np") as stream:
        codes = stream.get_tensor("layers.1.down.codes")
    data = bytearray(path.read_bytes())
    start = data.find(codes.tobytes())
    changed = np.frombuffer(data, np.uint8, len(codes[0].tobytes()), start)
    changed[:] = (changed & 0x0F) << 4 | changed >> 4  # the halves of every byte in turn
    path.write_bytes(data)
    with pytest.raises(VerificationError, match="disagrees with transformers"):
        verify(checkpoint, Bundle.open(bundle, verify=False))


def test_split_and_fused_layouts_agree_bit_for_bit(exported):
    split, fused = (Model.load(exported.bundle, layout=layout) for layout in ("split", "fused"))
    np.testing.assert_array_equal(split.logits(IDS), fused.logits(IDS))
    caches = [model.pipeline.new_cache(capacity=64) for model in (split, fused)]
    for piece in (IDS[:9], IDS[9:10], IDS[10:11]):
        first, second = (
            model.pipeline.step(cache, piece[None]).copy()
            for model, cache in zip((split, fused), caches, strict=True)
        )
        np.testing.assert_array_equal(first, second)


def test_one_token_at_a_time_gives_what_all_at_once_gives(exported):
    model = Model.load(exported.bundle)
    whole = model.logits(IDS[:16])
    cache = model.pipeline.new_cache(capacity=16)
    steps = np.concatenate(
        [model.pipeline.step(cache, IDS[None, i : i + 1]).copy() for i in range(16)]
    )
    np.testing.assert_allclose(steps, whole, rtol=0, atol=2e-2 * np.abs(whole).max())


def test_the_manifest_says_how_the_weights_are(exported, way):
    precision, options = way
    manifest = Bundle.open(exported.bundle).manifest
    assert manifest.precision == precision
    if precision == "fp16":
        assert manifest.quantization is None
        assert manifest.minimum_onnxruntime is None
        assert "quantization" not in json.loads((exported.bundle / "manifest.json").read_text())
        return
    expected_block = options.block_size or (32 if options.zero_points else 64)
    assert manifest.quantization == Quantization(
        bits=4 if precision == "int4" else 8,
        block_size=expected_block,
        zero_points=options.zero_points,
        activations="fp32" if options.exact_activations else "int8",
        head_bits=options.head_bits,
        search=options.search,
    )
    assert manifest.minimum_onnxruntime == "1.31"


def test_the_fingerprint_is_that_of_the_checkpoint_in_every_precision(exported, checkpoint):
    manifest = Bundle.open(exported.bundle).manifest
    assert manifest.fingerprint == Checkpoint.open(checkpoint).fingerprint()


def test_the_files_hold_plain_codes_and_scales(int4, checkpoint):
    source = Checkpoint.open(checkpoint)
    stored = load_file(int4 / "segments" / "01.safetensors")
    codes, scales = stored["layers.0.gate_up.codes"], stored["layers.0.gate_up.scales"]
    assert (codes.dtype, codes.shape) == (np.uint8, (8, 128, 64))
    assert (scales.dtype, scales.shape) == (np.float32, (8, 128, 2))
    for expert in range(8):
        values = unpack(codes[expert], 4, 128).reshape(128, 2, 64).astype(np.float32) - 8
        rows = (values * scales[expert][..., None]).reshape(128, 128)
        for part, found in (("gate", rows[0::2]), ("up", rows[1::2])):
            name = f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"
            wanted = source.tensor(name).astype(np.float32)
            assert np.linalg.norm(found - wanted) < 0.11 * np.linalg.norm(wanted)
    assert stored["layers.1.qkv.codes"].shape == (256, 2, 32)
    assert stored["layers.1.qkv.scales"].shape == (256, 2)
    assert stored["layers.1.router"].dtype == np.float32
    assert stored["layers.1.router_norm"].dtype == np.float32
    assert load_file(int4 / "segments" / "03.safetensors")["head"].dtype == np.float16


def test_scales_lie_where_a_processor_reads_them(exported):
    for path in sorted((exported.bundle / "segments").glob("*.safetensors")):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if entry["dtype"] == "F32":
                assert (8 + length + entry["data_offsets"][0]) % 4 == 0, name


def test_fp16_of_an_fp16_checkpoint_changes_nothing(tmp_path, checkpoint):
    export(checkpoint, tmp_path / "wide")
    report = export(checkpoint, tmp_path / "half", precision="fp16")
    assert {(e.relative_rms, e.max_abs) for e in report.errors} == {(0.0, 0.0)}
    wide, half = (Model.load(tmp_path / name) for name in ("wide", "half"))
    np.testing.assert_array_equal(wide.logits(IDS), half.logits(IDS))


def test_fewer_bits_are_smaller_files(tmp_path, checkpoint):
    sizes = []
    for precision in ("fp32", "fp16", "int8", "int4"):
        export(checkpoint, tmp_path / precision, precision=precision, fused=False)
        files = (tmp_path / precision / "segments").glob("*.safetensors")
        sizes.append(sum(file.stat().st_size for file in files))
    fp32, fp16, int8, int4 = sizes
    assert fp16 < 0.52 * fp32
    assert int8 < 0.65 * fp16
    assert int4 < 0.70 * int8


def test_the_graphs_use_the_quantised_operators(int4):
    kinds = [
        [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
        for path in sorted((int4 / "segments").glob("0*.onnx"))
    ]
    assert kinds[0].count("MatMulNBits") == 2
    assert [kind.count("QMoE") for kind in kinds] == [0, 1, 1, 1]
    assert not any("MoE" in kind for kind in kinds)


def test_the_report_states_the_error_of_every_weight(tmp_path, checkpoint):
    result = CliRunner().invoke(
        cli.main, [str(checkpoint), str(tmp_path / "b"), "--precision", "int4", "--json"]
    )
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["precision"] == "int4"
    assert figures["quantization"]["bits"] == 4
    errors = {error["name"]: error for error in figures["weight_errors"]}
    assert set(errors) == {"embedding", "head"} | {
        f"layers.{layer}.{part}" for layer in range(3)
        for part in ("qkv", "output", "gate_up", "down")
    }  # fmt: skip
    assert 0.05 < errors["layers.0.gate_up"]["relative_rms"] < 0.11
    assert errors["layers.0.gate_up"]["stored"] == "int4/64"
    assert errors["head"] == {"name": "head", "stored": "fp16", "values": 272 * 128,
                              "relative_rms": 0.0, "max_abs": 0.0}  # fmt: skip


def test_a_person_gets_a_table_of_errors(tmp_path, checkpoint):
    result = CliRunner().invoke(
        cli.main, [str(checkpoint), str(tmp_path / "b"), "--precision", "int8", "--head-bits", "8"]
    )
    assert result.exit_code == 0, result.output
    assert "Weights as int8" in result.stdout
    assert "layers.2.down" in result.stdout


@pytest.mark.parametrize(
    ("precision", "options", "where"),
    [
        ("int3", {}, "precision"),
        ("fp32", {"zero_points": True}, "zero_points"),
        ("fp16", {"block_size": 32}, "block_size"),
        ("int8", {"exact_activations": True}, "exact_activations"),
        ("int4", {"exact_activations": True, "head_bits": 8}, "head_bits"),
        ("int8", {"head_bits": 2}, "head_bits"),
        ("int4", {"block_size": 128}, "block_size"),  # an expert's rows are 64
        ("int4", {"block_size": 64, "zero_points": True}, "block_size"),  # one block a row
        ("int4", {"block_size": 48}, "block_size"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(
    tmp_path, checkpoint, precision, options, where
):
    with pytest.raises(SettingError, match=where):
        export(checkpoint, tmp_path / "b", precision=precision, options=QuantizeOptions(**options))
    assert not list(tmp_path.iterdir())


def test_shapes_that_no_block_suits_are_refused(tmp_path):
    source = make_tiny_olmoe(tmp_path / "c", intermediate_size=24)
    with pytest.raises(SettingError, match=r"rows of 24, 64.*fp16"):
        export(source, tmp_path / "b", precision="int4")


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8"])
def test_a_checkpoint_that_is_quantised_already_is_refused(tmp_path, method):
    source = make_tiny_olmoe(tmp_path / "c")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"quantised already.*{method}"):
        export(source, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_checkpoint_in_8_bit_floats_is_refused(tmp_path):
    """As DeepSeek-V3 is released: weights in blocks, with their scales beside them."""
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    source = make_tiny(tmp_path / "c", "deepseek_v3", quantization_config=quantised)
    file = source / "model.safetensors"
    tensors = load_file(file)
    experts = [name for name in tensors if "experts" in name]
    tensors |= {name: tensors[name].astype(ml_dtypes.float8_e4m3fn) for name in experts}
    scales = {f"{name}_scale_inv": np.ones((1, 1), np.float32) for name in experts}
    save_file(tensors | scales, file)
    with pytest.raises(CheckpointError, match=r"scale_inv: is a part of .*found what fp8 writes"):
        export(source, tmp_path / "b")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"quantised already.*found fp8"):
        export(source, tmp_path / "b")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"cannot be exported; .*found F8_E4M3"):
        export(source, tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"cannot be read; .*found F8_E4M3"):
        Checkpoint.open(source).tensor("model.layers.1.mlp.experts.0.up_proj.weight")


def test_a_weight_that_fp16_cannot_hold_is_refused(tmp_path):
    source = _with_weight(tmp_path / "c", "model.layers.1.mlp.experts.3.up_proj.weight", 1e6)
    with pytest.raises(CheckpointError, match=r"layers\.1\.gate_up.*fp16 cannot hold"):
        export(source, tmp_path / "b", precision="fp16")
    export(source, tmp_path / "b", precision="int4")


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_weight_that_is_not_a_number_is_refused(tmp_path, precision):
    source = _with_weight(tmp_path / "c", "model.layers.0.self_attn.o_proj.weight", np.nan)
    with pytest.raises(CheckpointError, match=r"layers\.0\.output"):
        export(source, tmp_path / "b", precision=precision)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_memory_stays_far_below_the_size_of_the_model(tmp_path):
    source = make_tiny_olmoe(
        tmp_path / "c", dtype="float16", hidden_size=512, intermediate_size=512,
        num_experts=32, num_hidden_layers=1, vocab_size=4096,
    )  # fmt: skip
    tracemalloc.start()
    try:
        export(source, tmp_path / "b", precision="int4")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 48e6  # as fp32 the weights of one layer's experts are 100 MB


@pytest.mark.parametrize(
    ("installed", "runs"),
    [("1.23.2", False), ("1.30.0", False), ("1.31.0", True), ("1.31.0+cpu", True), ("2.0", True)],
)
def test_an_older_onnxruntime_is_refused_with_advice(int4, monkeypatch, installed, runs):
    monkeypatch.setattr(onnxruntime, "__version__", installed)
    if runs:
        Model.load(int4)
        return
    with pytest.raises(BackendError, match=rf"onnxruntime >= 1\.31.*found {installed}.*pip"):
        Model.load(int4)
    with pytest.raises(BackendError, match="newer ONNX Runtime"):
        requirements.check_onnxruntime(Bundle.open(int4))


def test_sliding_windows_want_a_newer_onnxruntime_in_every_precision(tmp_path, monkeypatch):
    """In ONNX Runtime 1.23 a query sees a token more than its window has."""
    windows = {"narrow": 5, "none": None, "as wide as the context": 128}
    for name, window in windows.items():
        source = make_tiny(tmp_path / f"c {name}", "mixtral", sliding_window=window)
        export(source, tmp_path / name, fused=False)
    stated = [Bundle.open(tmp_path / name).manifest.minimum_onnxruntime for name in windows]
    assert stated == ["1.31", None, None]
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    Model.load(tmp_path / "none")
    with pytest.raises(BackendError, match=r"its sliding windows need a newer.*found 1\.23\.2"):
        Model.load(tmp_path / "narrow")


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        ({"precision": "int8"}, "quantization"),
        ({"precision": "fp32"}, "quantization"),
        ({"quantization": None}, "quantization"),
        ({"precision": "int2"}, "precision"),
        ({"minimum_onnxruntime": "new"}, "minimum_onnxruntime"),
        ({"quantization": {"bits": 4}}, "block_size"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, int4, edit, field):
    bundle = shutil.copytree(int4, tmp_path / "b")
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(BundleError, match=field):
        Bundle.open(bundle)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("experts", ["gathered", "dense"])
def test_standard_graphs_of_fp16_weights_are_those_of_fp32(
    tmp_path, checkpoint, precision, experts
):
    outputs = []
    for stored in ("fp32", "fp16"):
        export(checkpoint, tmp_path / stored, precision=stored, fused=False)
        bundle = Bundle.open(tmp_path / stored)
        model = StdModel.of(bundle, StdOptions("primitive", precision, experts))
        outputs.append([out for index in range(4) for out in _run(bundle, model.segment(index))])
    for wide, half in zip(*outputs, strict=True):
        np.testing.assert_array_equal(wide, half)


def test_exact_and_rounded_activations_differ_by_what_rounding_costs(tmp_path, checkpoint):
    logits = {}
    for exact in (False, True):
        options = QuantizeOptions(exact_activations=exact)
        export(checkpoint, tmp_path / str(exact), precision="int4", options=options)
        logits[exact] = Model.load(tmp_path / str(exact)).logits(IDS[:1])
    difference = np.linalg.norm(logits[True] - logits[False]) / np.linalg.norm(logits[True])
    assert 1e-4 < difference < ROUNDING


def test_running_exactly_leaves_the_environment_as_it_was(int4, monkeypatch):
    monkeypatch.delenv("ORT_QMOE_CPU_QNBIT_GEMM", raising=False)
    SplitRunner(Bundle.open(int4), exact=True)
    assert "ORT_QMOE_CPU_QNBIT_GEMM" not in os.environ


def _run(bundle: Bundle, graph: StdGraph) -> list[np.ndarray]:
    """What a graph makes of random inputs, always the same: one sequence of five tokens."""
    rng = np.random.default_rng(0)
    sizes = {"batch": 1, "sequence": 5, "tokens": 5, "capacity": 8, "rows": 5}
    feeds = {}
    for spec in graph.inputs:
        shape = [sizes.get(size, size) for size in spec.shape]
        drawn = rng.normal(size=shape) if "float" in spec.dtype else rng.integers(0, 5, shape)
        feeds[spec.name] = (0 * drawn if spec.name == "past_lengths" else drawn).astype(spec.dtype)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.path / "segments")
    )
    return onnxruntime.InferenceSession(graph.content, options).run(None, feeds)


def _with_weight(path: Path, name: str, value: float) -> Path:
    """A tiny checkpoint of which one element is `value`."""
    from safetensors.numpy import save_file

    source = make_tiny_olmoe(path)
    tensors = load_file(source / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source
