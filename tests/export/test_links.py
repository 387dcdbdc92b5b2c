"""`--link`: what a checkpoint stores as its bundle would is used where it is."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from knnmoe.export import cli
from knnmoe.export.exporter import export, plan_export
from knnmoe.export.lowering.std_weights import stored_weights
from knnmoe.runtime import Model
from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.checkpoint import Checkpoint
from knnmoe.runtime.errors import BundleError, CheckpointError, OutputError, SettingError
from tiny import FAMILIES, make_tiny

SHARD = "segments/checkpoint/model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("source"), "qwen2_moe", shards=2)


def inode(path: Path) -> int:
    return path.stat().st_ino


def logits(bundle: Path) -> np.ndarray:
    return Model.load(bundle).logits([1, 7, 42, 9])


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def weight_bytes(bundle: Bundle) -> dict[str, bytes]:
    """Every weight's bytes, as whoever builds engines of the bundle finds them."""
    found = {}
    for name, stored in stored_weights(bundle).items():
        with (bundle.path / "segments" / stored.location).open("rb") as stream:
            stream.seek(stored.offset)
            found[name] = stream.read(stored.length)
    return found


def written(path: Path) -> int:
    return sum(p.stat().st_size for p in (path / "segments").glob("*.safetensors"))


def test_a_linked_bundle_computes_the_same_with_fewer_bytes(checkpoint, tmp_path):
    before = content(checkpoint)
    plain = export(checkpoint, tmp_path / "plain")
    report = export(checkpoint, tmp_path / "linked", link=True)
    assert plain.linked_bytes == 0
    assert report.linked_bytes > 200_000
    assert (
        abs(written(tmp_path / "plain") - written(tmp_path / "linked") - report.linked_bytes) < 5000
    )
    np.testing.assert_array_equal(logits(tmp_path / "plain"), logits(tmp_path / "linked"))
    weights = [weight_bytes(Bundle.open(tmp_path / name)) for name in ("plain", "linked")]
    assert weights[0] == weights[1]
    assert content(checkpoint) == before


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_of_every_family_the_same_bytes_are_read(tmp_path, family):
    source = make_tiny(tmp_path / "c", family)
    save_file(load_file(source / "model.safetensors"), source / "model.safetensors")  # by name
    found = []
    for link in (False, True):
        export(source, tmp_path / str(link), link=link, fused=False)
        found.append(weight_bytes(Bundle.open(tmp_path / str(link), verify=False)))
    assert found[0] == found[1]


def test_embedding_head_norms_and_what_lies_in_a_row_are_linked_and_nothing_else(tmp_path):
    source = make_tiny(tmp_path, "qwen2_moe")
    save_file(load_file(source / "model.safetensors"), source / "model.safetensors")  # by name
    plan = plan_export(source, link=True)
    parts = {name.rsplit(".", 1)[-1] for name in plan.links.stored}
    assert parts == {
        "embedding", "head", "final_norm", "input_norm", "router_norm", "output", "router",
        "shared_gate_up", "shared_down", "shared_router", "dense_gate_up", "dense_down",
    }  # fmt: skip
    rest = {tensor.name.rsplit(".", 1)[-1] for file in plan.weights for tensor in file.tensors}
    assert rest == {"cos", "sin", "qkv", "qkv_bias", "gate_up", "down"}


def test_the_manifest_lists_the_checkpoints_files_which_are_the_same_files(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "b", link=True)
    manifest = Bundle.open(tmp_path / "b").manifest
    names = [p.name for p in sorted(checkpoint.glob("*.safetensors"))]
    assert manifest.linked == tuple(f"segments/checkpoint/{name}" for name in names)
    for name, file in zip(names, manifest.linked, strict=True):
        assert manifest.files[file].size == (checkpoint / name).stat().st_size
        assert inode(tmp_path / "b" / file) == inode(checkpoint / name)


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_fp16_checkpoints_are_linked_where_weights_are_stored_as_fp16(tmp_path, precision):
    source = make_tiny(tmp_path / "c", dtype="float16")
    plain = export(source, tmp_path / "plain", precision=precision)
    linked = export(source, tmp_path / "linked", precision=precision, link=True)
    assert linked.linked_bytes >= 2 * 272 * 64 * 2  # embedding and head
    assert linked.errors == plain.errors
    np.testing.assert_array_equal(logits(tmp_path / "plain"), logits(tmp_path / "linked"))


def test_a_linked_half_that_is_no_number_is_refused_as_ever(tmp_path):
    source = make_tiny(tmp_path / "c", dtype="float16")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][3, 3] = np.inf
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="weight head: has a value that fp16 cannot hold"):
        export(source, tmp_path / "b", precision="fp16", link=True)


@pytest.mark.parametrize(
    ("dtype", "precision", "found"),
    [("bfloat16", "fp32", "BF16"), ("bfloat16", "int4", "BF16"), ("float16", "fp32", "F16")],
)
def test_link_without_anything_to_link_is_refused(tmp_path, dtype, precision, found):
    source = make_tiny(tmp_path / "c", dtype=dtype)
    with pytest.raises(SettingError, match=f"nothing of this .* float16; found {found}.*--link"):
        export(source, tmp_path / "b", precision=precision, link=True)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_hub_cache_of_symbolic_links_is_linked_at_its_blobs(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    make_tiny(blobs)
    snapshot.mkdir(parents=True)
    for file in list(blobs.iterdir()):
        blob = file.rename(blobs / f"{abs(hash(file.name)):x}")
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    export(snapshot, tmp_path / "b", link=True)
    link = tmp_path / "b" / "segments" / "checkpoint" / "model.safetensors"
    assert not link.is_symlink()
    assert inode(link) == inode((snapshot / "model.safetensors").resolve())
    assert logits(tmp_path / "b").shape == (4, 272)


def test_data_that_a_processor_cannot_read_in_place_is_written(tmp_path):
    source = make_tiny(tmp_path / "c")
    file = source / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" "
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(SettingError, match="nothing of this checkpoint"):
        plan_export(source, link=True)


@pytest.mark.parametrize(
    ("number", "problem", "advice"),
    [(errno.EXDEV, "on another file system", "Choose a bundle on the file system of"),
     (errno.EPERM, "Operation not permitted", "be the owner of the file"),
     (errno.EMLINK, "Too many links", "or export without --link")],
)  # fmt: skip
def test_where_links_are_impossible_the_error_says_what_to_do(
    checkpoint, tmp_path, monkeypatch, number, problem, advice
):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OutputError, match=f"cannot be hard-linked .*{problem}") as caught:
        export(checkpoint, tmp_path / "b", link=True)
    assert advice in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_replacing_and_removing_a_linked_bundle_leaves_the_checkpoint(checkpoint, tmp_path):
    before = content(checkpoint)
    export(checkpoint, tmp_path / "b", link=True)
    export(checkpoint, tmp_path / "b", link=True, overwrite=True)
    assert content(checkpoint) == before
    export(checkpoint, tmp_path / "b", overwrite=True)
    assert Bundle.open(tmp_path / "b").manifest.linked is None
    export(checkpoint, tmp_path / "c", link=True)
    shutil.rmtree(tmp_path / "c")
    assert content(checkpoint) == before
    assert Checkpoint.open(checkpoint)


def test_a_shard_changed_in_place_is_named_when_the_bundle_is_loaded(tmp_path):
    source = make_tiny(tmp_path / "c", shards=2)
    export(source, tmp_path / "b", link=True)
    shard = source / "model-00001-of-00002.safetensors"
    with shard.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x55")
    with pytest.raises(BundleError, match=f"{SHARD}: has been changed.*the checkpoint's own file"):
        Model.load(tmp_path / "b")
    with shard.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(BundleError, match=f"{SHARD}: has another size.*the checkpoint's own file"):
        Bundle.open(tmp_path / "b", verify=False)


def test_a_shard_that_is_downloaded_anew_leaves_the_bundle_as_it_was(tmp_path):
    source = make_tiny(tmp_path / "c")
    export(source, tmp_path / "b", link=True)
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").write_bytes(b"another file of that name")
    assert logits(tmp_path / "b").shape == (4, 272)


def test_a_copy_of_a_linked_bundle_is_whole(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "b", link=True)
    shutil.copytree(tmp_path / "b", tmp_path / "copy")
    np.testing.assert_array_equal(logits(tmp_path / "b"), logits(tmp_path / "copy"))


@pytest.mark.parametrize("linked", ["x", [1], ["segments/none.safetensors"]])
def test_a_manifest_with_impossible_links_is_refused(checkpoint, tmp_path, linked):
    export(checkpoint, tmp_path / "b", link=True)
    path = tmp_path / "b" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"linked": linked}))
    with pytest.raises(BundleError, match="linked: "):
        Bundle.open(tmp_path / "b")


def test_the_command_says_what_linking_saves(checkpoint, tmp_path):
    def call(*words: object) -> str:
        done = CliRunner().invoke(cli.main, [str(checkpoint), *map(str, words)])
        assert done.exit_code == 0, done.output
        return done.stdout

    planned = json.loads(call("--dry-run", "--link", "--json"))["linked_bytes"]
    assert json.loads(call(tmp_path / "a", "--link", "--json"))["linked_bytes"] == planned > 0
    assert "need not be written" in call("--dry-run", "--link")
    assert "checkpoint's own files" in " ".join(call(tmp_path / "b", "--link").split())
    assert json.loads(call("--dry-run", "--json"))["linked_bytes"] == 0
