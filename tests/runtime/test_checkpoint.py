"""Reading checkpoints: what a good one gives, and that a bad one is refused with a reason."""

from __future__ import annotations

import json
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from knnmoe.runtime.checkpoint import MAX_HEADER_BYTES, Checkpoint
from knnmoe.runtime.errors import CheckpointError
from tiny import make_tiny_olmoe

HEAD = "lm_head.weight"


def write(root: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A checkpoint directory with one safetensors file of exactly this header and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (root / "config.json").write_text('{"model_type": "olmoe"}')
    start = struct.pack("<Q", len(text) if length is None else length)
    (root / "model.safetensors").write_bytes(start + text + data)
    return root


def tensor(begin: int = 0, end: int = 8, dtype: str = "F32", shape: object = (2,)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_config_and_kind(tmp_path):
    checkpoint = Checkpoint.open(make_tiny_olmoe(tmp_path))
    assert checkpoint.model_type == "olmoe"
    assert checkpoint.config["num_experts"] == 8
    assert len(checkpoint.tensors) == 102
    assert checkpoint.entry(HEAD).shape == (272, 64)
    head = checkpoint.tensor(HEAD)
    assert head.dtype == np.float32
    assert head.shape == (272, 64)
    assert not head.flags.writeable
    with pytest.raises(CheckpointError, match="tensor nothing is missing"):
        checkpoint.tensor("nothing")


def test_values_are_those_that_safetensors_reads(tmp_path):
    from safetensors.numpy import load_file

    checkpoint = Checkpoint.open(make_tiny_olmoe(tmp_path, dtype="float16"))
    for name, expected in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(checkpoint.tensor(name), expected)


@pytest.mark.skipif(find_spec("ml_dtypes") is None, reason="bfloat16 needs ml_dtypes")
def test_bfloat16_is_read(tmp_path):
    exact = Checkpoint.open(make_tiny_olmoe(tmp_path / "a"))
    rounded = Checkpoint.open(make_tiny_olmoe(tmp_path / "b", dtype="bfloat16"))
    head = rounded.tensor(HEAD).astype(np.float32)
    assert (head.view(np.uint32) & 0xFFFF == 0).all()
    np.testing.assert_allclose(head, exact.tensor(HEAD), rtol=2**-8)


def test_the_fingerprint_does_not_depend_on_sharding(tmp_path):
    one = Checkpoint.open(make_tiny_olmoe(tmp_path / "a"))
    many = Checkpoint.open(make_tiny_olmoe(tmp_path / "b", shards=4))
    assert len({entry.shard for entry in many.tensors.values()}) == 4
    assert one.fingerprint() == many.fingerprint()
    assert one.fingerprint().startswith("sha256:")


def test_the_fingerprint_depends_on_every_byte_name_dtype_and_shape(tmp_path):
    names = iter("abcdef")

    def fingerprint(header: dict, data: bytes = bytes(8)) -> str:
        root = tmp_path / next(names)
        root.mkdir()
        return Checkpoint.open(write(root, header, data)).fingerprint()

    prints = [
        fingerprint({"t": tensor()}),
        fingerprint({"t": tensor()}, bytes(7) + b"\1"),
        fingerprint({"u": tensor()}),
        fingerprint({"t": tensor(dtype="I32")}),
        fingerprint({"t": tensor(shape=[1, 2])}),
    ]
    assert len(set(prints)) == 5
    assert fingerprint({"__metadata__": {"format": "pt"}, "t": tensor()}) == prints[0]


def test_the_fingerprint_reports_progress_in_bytes(tmp_path):
    checkpoint = Checkpoint.open(make_tiny_olmoe(tmp_path))
    seen: list[int] = []
    checkpoint.fingerprint(seen.append)
    assert sum(seen) == checkpoint.total_bytes


def test_empty_and_scalar_tensors_are_read(tmp_path):
    header = {"none": tensor(0, 0, shape=[0, 3]), "one": tensor(0, 4, shape=[])}
    checkpoint = Checkpoint.open(write(tmp_path, header, struct.pack("<f", 2.5)))
    assert checkpoint.tensor("none").shape == (0, 3)
    assert checkpoint.tensor("one") == 2.5


def test_what_is_no_directory_of_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "file", "empty"):
        with pytest.raises(CheckpointError, match="not a checkpoint directory"):
            Checkpoint.open(tmp_path / name)
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "empty" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a bundle, not a checkpoint"):
        Checkpoint.open(tmp_path / "empty")
    (tmp_path / "empty" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected a file model\.safetensors"):
        Checkpoint.open(tmp_path / "empty")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "\xff", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    make_tiny_olmoe(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json: is not valid JSON"):
        Checkpoint.open(tmp_path)


def test_a_missing_model_type_is_an_error_when_asked_for(tmp_path):
    make_tiny_olmoe(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model_type is missing"):
        _ = Checkpoint.open(tmp_path).model_type


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        (b"not json", 8, "malformed header"),
        (b"[]", 0, "malformed header"),
        (b'{"t": {}, "t": {}}', 0, "is there twice"),
        ({"t": {"dtype": "F32", "shape": [2]}}, 8, "header entry t"),
        ({"t": "F32"}, 8, "header entry t"),
        ({"t": tensor(shape=[-2])}, 8, "header entry t"),
        ({"t": tensor(shape=[True, 2])}, 8, "header entry t"),
        ({"t": tensor(shape="2")}, 8, "header entry t"),
        ({"t": tensor(shape=[1] * 9 + [2])}, 8, "header entry t"),
        ({"t": tensor(shape=[3])}, 8, "header entry t"),
        ({"t": tensor(8, 0)}, 8, "header entry t"),
        ({"t": tensor(shape=[1 << 62, 4])}, 8, "header entry t"),
        ({"t": tensor(dtype="F4", end=2)}, 2, "unsupported dtype"),
        ({"t": tensor(dtype=["F32"])}, 8, "unsupported dtype"),
        ({"t": tensor()}, 7, "is truncated; expected .* bytes; found"),
        ({"t": tensor()}, 9, "longer than its header"),
        ({"t": tensor(8, 16)}, 16, "overlaps another or leaves a hole"),
        ({"t": tensor(), "u": tensor()}, 8, "overlaps another or leaves a hole"),
        ({}, 0, "holds no tensors"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, header, size, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(write(tmp_path, header, bytes(size)))


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 63, 2**64 - 1, 1000])
def test_a_header_is_not_read_before_its_length_is_checked(tmp_path, length):
    with pytest.raises(CheckpointError, match="malformed header or is truncated"):
        Checkpoint.open(write(tmp_path, {"t": tensor()}, bytes(8), length=length))


def test_a_file_of_a_few_bytes_is_refused(tmp_path):
    write(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="is truncated"):
        Checkpoint.open(tmp_path)


def shards(root: Path) -> list[Path]:
    return sorted(make_tiny_olmoe(root, shards=3).glob("*.safetensors"))


def change_index(root: Path, change) -> None:
    path = root / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_missing_shard_is_named(tmp_path):
    second = shards(tmp_path)[1]
    second.unlink()
    with pytest.raises(CheckpointError, match=f"a shard is missing; expected a file {second.name}"):
        Checkpoint.open(tmp_path)


def test_a_truncated_shard_is_named(tmp_path):
    second = shards(tmp_path)[1]
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{second.name}: is truncated"):
        Checkpoint.open(tmp_path)


def test_an_index_that_disagrees_with_the_shards_is_refused(tmp_path):
    first, second, _ = shards(tmp_path)
    change_index(tmp_path, lambda weight_map: weight_map.update({"extra": first.name}))
    with pytest.raises(CheckpointError, match="disagree about tensor extra"):
        Checkpoint.open(tmp_path)
    change_index(tmp_path, lambda weight_map: weight_map.pop("extra"))
    change_index(tmp_path, lambda weight_map: weight_map.pop(HEAD))
    with pytest.raises(CheckpointError, match=f"disagree about tensor {HEAD}"):
        Checkpoint.open(tmp_path)
    change_index(tmp_path, lambda weight_map: weight_map.update({HEAD: second.name}))
    with pytest.raises(CheckpointError, match=f"disagree about tensor {HEAD}"):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    first, second, _ = shards(tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="is also in"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/x", "", ".."])
def test_an_index_that_points_elsewhere_is_refused(tmp_path, file):
    shards(tmp_path)
    change_index(tmp_path, lambda weight_map: weight_map.update({HEAD: file}))
    with pytest.raises(CheckpointError, match="same directory"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_malformed_index_is_refused(tmp_path, content):
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="weight_map is malformed"):
        Checkpoint.open(tmp_path)
