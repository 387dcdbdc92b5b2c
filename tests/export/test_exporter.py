"""What an export writes, and what it leaves behind when it cannot finish."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from knnmoe.export import exporter, partial
from knnmoe.export.exporter import export
from knnmoe.runtime import atomic
from knnmoe.runtime.bundle import GATE_GRAPHS, Bundle
from knnmoe.runtime.checkpoint import Checkpoint
from knnmoe.runtime.errors import CheckpointError, OutputError, SettingError, VerificationError
from tiny import make_tiny_olmoe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_tiny_olmoe(tmp_path_factory.mktemp("source"))


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_a_bundle_has_a_segment_more_than_gates_and_lists_every_file(checkpoint, tmp_path):
    report = export(checkpoint, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    manifest = bundle.manifest
    assert (report.gates, report.segments) == (3, 4) == (3, len(manifest.segments))
    assert manifest.fingerprint == Checkpoint.open(checkpoint).fingerprint()
    assert [segment.layers for segment in manifest.segments] == [(0,), (1,), (2,), ()]
    assert tuple(manifest.gates) == GATE_GRAPHS
    assert manifest.fused is not None
    assert manifest.fused.gate == "cosine"
    on_disk = {
        str(p.relative_to(tmp_path / "b")) for p in (tmp_path / "b").rglob("*") if p.is_file()
    }
    assert on_disk - {"manifest.json"} == set(manifest.files)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
    ):
        assert (tmp_path / "b" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_inputs_and_outputs_are_those_of_the_contract(checkpoint, tmp_path):
    import onnxruntime

    export(checkpoint, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    first, middle, last = (bundle.manifest.segments[i] for i in (0, 1, 3))

    def of(specs):
        return {spec.name: (spec.dtype, spec.shape) for spec in specs}

    cache = ("float32", ("batch", 2, "capacity", 16))
    assert of(first.inputs) == {
        "input_ids": ("int64", ("batch", "sequence")), "seqlens_k": ("int32", ("batch",)),
        "total_sequence_length": ("int32", ()), "past_key_0": cache, "past_value_0": cache,
    }  # fmt: skip
    assert of(middle.inputs) == {
        "hidden": ("float32", ("batch", "sequence", 64)),
        "router_input": ("float32", ("tokens", 64)), "expert_ids": ("int32", ("tokens", 2)),
        "expert_weights": ("float32", ("tokens", 2)), "seqlens_k": ("int32", ("batch",)),
        "total_sequence_length": ("int32", ()), "past_key_1": cache, "past_value_1": cache,
    }  # fmt: skip
    assert of(middle.outputs) == {
        "hidden_out": ("float32", ("batch", "sequence", 64)),
        "router_input_out": ("float32", ("tokens", 64)),
        "router_logits_out": ("float32", ("tokens", 8)),
        "present_key_1": cache, "present_value_1": cache,
    }  # fmt: skip
    assert set(of(last.inputs)) == {
        "hidden", "router_input", "expert_ids", "expert_weights", "logit_rows",
    }  # fmt: skip
    assert of(last.outputs) == {"logits": ("float32", ("rows", 272))}
    gate = bundle.manifest.gates["cosine"]
    assert [spec.name for spec in gate.inputs] == [
        "router_input", "router_logits", "keys", "key_scales", "values", "evidence_weights",
        "n_valid", "k", "center", "calibration", "state", "lengths",
    ]  # fmt: skip
    assert [spec.name for spec in gate.outputs] == [
        "expert_ids", "expert_weights", "state_out", "confidence", "neighbors", "similarities",
    ]  # fmt: skip
    fused = {spec.name for spec in bundle.manifest.fused.inputs}
    assert {"input_ids", "lengths", "logit_rows", "keys_0", "k_2", "state_1"} <= fused
    graphs = (*bundle.manifest.segments, bundle.manifest.fused, *bundle.manifest.gates.values())
    kinds = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32"}
    for graph in graphs:
        session = onnxruntime.InferenceSession(bundle.file(graph.file))
        stated = [(spec.name, spec.dtype, list(spec.shape)) for spec in graph.inputs]
        assert [(i.name, kinds[i.type], i.shape) for i in session.get_inputs()] == stated
        stated = [(spec.name, spec.dtype) for spec in graph.outputs]
        assert [(o.name, kinds[o.type]) for o in session.get_outputs()] == stated


def test_weights_are_plain_safetensors_with_aligned_data(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "b")
    source = Checkpoint.open(checkpoint)
    for path in sorted((tmp_path / "b" / "segments").glob("*.safetensors")):
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert (8 + header) % 64 == 0
    with safe_open(tmp_path / "b" / "segments" / "01.safetensors", "np") as stream:
        stack = stream.get_tensor("layers.0.gate_up")
        for expert in range(8):
            p = f"model.layers.0.mlp.experts.{expert}"
            gate, up = (source.tensor(f"{p}.{part}_proj.weight") for part in ("gate", "up"))
            np.testing.assert_array_equal(stack[expert, 0::2], gate)
            np.testing.assert_array_equal(stack[expert, 1::2], up)


def test_the_fused_layout_shares_the_weights_and_can_be_left_out(checkpoint, tmp_path):
    with_fused = export(checkpoint, tmp_path / "a")
    without = export(checkpoint, tmp_path / "b", fused=False)
    extra = set(with_fused.files) - set(without.files)
    assert extra == {"segments/fused.onnx"}
    assert Bundle.open(tmp_path / "b").manifest.fused is None


def test_a_checkpoint_without_generation_config_gets_one_from_its_config(tmp_path):
    source = make_tiny_olmoe(tmp_path / "c")
    (source / "generation_config.json").unlink()
    (source / "tokenizer_config.json").unlink()
    export(source, tmp_path / "b")
    stated = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert stated == {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path):
    source = make_tiny_olmoe(tmp_path / "c")
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        export(source, tmp_path / "b")
    assert names(tmp_path) == {"c"}


@pytest.mark.parametrize(
    ("options", "where"),
    [({"precision": "int3"}, "precision"), ({"experts_per_token": 1}, "experts_per_token"),
     ({"experts_per_token": 9}, "experts_per_token")],
)  # fmt: skip
def test_settings_out_of_range_are_refused_before_anything_is_written(
    checkpoint, tmp_path, options, where
):
    with pytest.raises(SettingError, match=where):
        export(checkpoint, tmp_path / "b", **options)
    assert not names(tmp_path)


def test_a_directory_with_content_is_kept(checkpoint, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            export(checkpoint, tmp_path / "b", overwrite=overwrite)
    assert names(tmp_path / "b") == {"thesis.tex"}


def test_a_bundle_is_replaced_only_if_asked(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "b")
    with pytest.raises(OutputError, match="--overwrite"):
        export(checkpoint, tmp_path / "b")
    export(checkpoint, tmp_path / "b", fused=False, overwrite=True)
    assert Bundle.open(tmp_path / "b").manifest.fused is None
    assert names(tmp_path) == {"b"}


def test_a_bundle_never_replaces_its_checkpoint(tmp_path):
    source = make_tiny_olmoe(tmp_path / "outer" / "c")
    for target in (source, tmp_path / "outer"):
        with pytest.raises(OutputError, match="checkpoint itself"):
            export(source, target, overwrite=True)
    assert Checkpoint.open(source)


def test_a_full_disk_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch):
    def full(plan, directory, progress):
        (directory / plan.name).write_bytes(plan.header)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(partial, "write_file", full)
    with pytest.raises(OutputError, match="disk is full"):
        export(checkpoint, tmp_path / "b")
    assert not names(tmp_path)


def test_too_little_room_is_noticed_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: type("U", (), {"free": 1000})())
    with pytest.raises(OutputError, match="not enough free disk space"):
        export(checkpoint, tmp_path / "b")
    assert not names(tmp_path)


def test_a_failed_check_keeps_the_old_bundle(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "b", fused=False)

    def refuse(bundle: Bundle) -> None:
        assert bundle.manifest.fused is not None
        raise VerificationError("logits", "disagree")

    with pytest.raises(VerificationError):
        export(checkpoint, tmp_path / "b", overwrite=True, check=refuse)
    assert Bundle.open(tmp_path / "b").manifest.fused is None
    assert names(tmp_path) == {"b"}


def test_a_shard_that_shrinks_meanwhile_is_an_error(tmp_path):
    source = Checkpoint.open(make_tiny_olmoe(tmp_path / "c"))
    os.truncate(source.path / "model.safetensors", 5000)
    with pytest.raises(CheckpointError):
        export(source, tmp_path / "b")
    assert names(tmp_path) == {"c"}


def test_memory_stays_far_below_the_size_of_the_model(tmp_path):
    source = make_tiny_olmoe(
        tmp_path / "c", dtype="float16", shards=2, hidden_size=512, intermediate_size=512,
        num_experts=32, num_hidden_layers=3, vocab_size=4096,
    )  # fmt: skip
    tracemalloc.start()
    try:
        report = export(source, tmp_path / "b")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.total_bytes > 300e6
    assert peak < 48e6


def test_progress_counts_up_to_the_whole(checkpoint, tmp_path):
    seen: dict[str, list[tuple[int, int]]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        seen.setdefault(stage, []).append((done, total))

    export(checkpoint, tmp_path / "b", progress=progress)
    assert set(seen) == {"fingerprint", "weights"}
    for reports in seen.values():
        assert [done for done, _ in reports] == sorted(done for done, _ in reports)
        last, total = reports[-1]
        assert 0 <= total - last <= 4096  # the headers are not counted


def test_the_exporter_module_needs_neither_torch_nor_transformers():
    code = "import sys, knnmoe.export.exporter, knnmoe.export.cli, " \
           "knnmoe.export.verification.verify; " \
           "assert not {'torch', 'transformers'} & set(sys.modules)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)
    assert exporter.export is export
