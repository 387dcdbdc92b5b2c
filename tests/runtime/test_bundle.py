"""Bundles: what a good one says, and that a damaged or malicious one is refused."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from knnmoe.runtime import bundle as format_
from knnmoe.runtime.bundle import Bundle, read_manifest, write_manifest
from knnmoe.runtime.errors import BundleError
from knnmoe.runtime.manifest import MAX_MANIFEST_BYTES
from knnmoe.runtime.routing import RoutingRule


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def change(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_a_good_bundle_is_opened(tiny_bundle):
    opened = Bundle.open(tiny_bundle)
    shape = opened.manifest.architecture
    assert (shape.num_gates, shape.hidden_size, shape.num_experts) == (3, 64, 8)
    assert len(opened.manifest.segments) == 4
    assert opened.manifest.routing.top_k == opened.manifest.experts_per_token == 2
    first = opened.manifest.segments[0]
    assert opened.file(first.file).is_file()
    assert opened.total_bytes == sum(
        p.stat().st_size for p in tiny_bundle.rglob("*") if p.is_file()
    ) - (tiny_bundle / "manifest.json").stat().st_size  # fmt: skip


def test_hashing_reports_progress_in_bytes(tiny_bundle):
    seen: list[int] = []
    opened = Bundle.open(tiny_bundle, progress=seen.append)
    assert sum(seen) == opened.total_bytes


def test_a_manifest_survives_writing_and_reading(tiny_bundle, tmp_path):
    manifest = read_manifest(tiny_bundle)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_a_latent_cache_is_stated_and_no_other_is(tiny_bundle, tmp_path):
    manifest = read_manifest(tiny_bundle)
    stated = json.loads((tiny_bundle / "manifest.json").read_text())
    assert "latent_size" not in stated["architecture"]
    latent = replace(manifest.architecture, num_kv_heads=1, head_size=24, latent_size=16)
    write_manifest(tmp_path, replace(manifest, architecture=latent))
    assert read_manifest(tmp_path).architecture == latent
    too_large = replace(latent, latent_size=25)
    write_manifest(tmp_path, replace(manifest, architecture=too_large))
    with pytest.raises(BundleError, match="latent_size: out of range"):
        read_manifest(tmp_path)


OLD_ROUTING = {"top_k": 2, "score": "softmax", "renormalize": False, "scale": 1.0}


def test_routing_without_groups_is_stated_as_it_always_was(tiny_bundle):
    content = json.loads((tiny_bundle / "manifest.json").read_text())
    assert content["routing"] == OLD_ROUTING


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        ({}, RoutingRule(2)),
        (
            {"groups": 1, "top_groups": 1, "group_score": "max", "selection_bias": False},
            RoutingRule(2),
        ),
        ({"score": "sigmoid", "scale": 2.5}, RoutingRule(2, "sigmoid", scale=2.5)),
        ({"score": "softmax-topk"}, RoutingRule(2, "softmax-topk")),
        (
            {"groups": 4, "top_groups": 2, "group_score": "top2"},
            RoutingRule(2, groups=4, top_groups=2, group_score="top2"),
        ),
    ],
)
def test_a_routing_rule_survives_writing_and_reading(bundle, tmp_path, more, rule):
    change(bundle, lambda m: m.update(routing=OLD_ROUTING | more))
    manifest = read_manifest(bundle)
    assert manifest.routing == rule
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_a_file_that_is_not_listed_is_not_handed_out(tiny_bundle):
    with pytest.raises(BundleError, match="does not list the file segments/99"):
        Bundle.open(tiny_bundle, verify=False).file("segments/99.onnx")


def test_what_is_no_bundle_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(BundleError, match="not a bundle"):
            Bundle.open(path)


@pytest.mark.parametrize("file", ["segments/01.onnx", "segments/02.safetensors", "tokenizer.json",
                                  "gates/rbf.onnx", "config.json"])  # fmt: skip
def test_a_changed_byte_is_noticed(bundle, file):
    data = bytearray((bundle / file).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / file).write_bytes(data)
    with pytest.raises(BundleError, match=f"{file}: has been changed"):
        Bundle.open(bundle)
    assert Bundle.open(bundle, verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_or_shorter_file_is_noticed_even_without_hashing(bundle, verify):
    path = bundle / "segments" / "03.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"03\.safetensors: has another size"):
        Bundle.open(bundle, verify=verify)
    path.unlink()
    with pytest.raises(BundleError, match=r"03\.safetensors: is missing"):
        Bundle.open(bundle, verify=verify)


def test_a_directory_in_place_of_a_file_is_refused(bundle):
    (bundle / "config.json").unlink()
    (bundle / "config.json").mkdir()
    with pytest.raises(BundleError, match=r"config\.json: is missing"):
        Bundle.open(bundle)


@pytest.mark.parametrize("place", ["segments/01.onnx", "extra", "segments/extra", "manifest.json"])
def test_symbolic_links_are_refused_wherever_they_are(bundle, tmp_path, place):
    target = tmp_path / "elsewhere"
    link = bundle / place
    if link.exists():
        shutil.move(link, target)
    else:
        target.write_text("secret")
    link.symlink_to(target)
    with pytest.raises(BundleError, match=r"symbolic link|not a bundle"):
        Bundle.open(bundle)


def test_a_linked_folder_is_refused(bundle, tmp_path):
    shutil.move(bundle / "gates", tmp_path / "gates")
    (bundle / "gates").symlink_to(tmp_path / "gates")
    with pytest.raises(BundleError, match="symbolic link"):
        Bundle.open(bundle)


def test_a_bundle_may_be_reached_through_a_link(bundle, tmp_path):
    (tmp_path / "current").symlink_to(bundle)
    assert Bundle.open(tmp_path / "current")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "segments/../../x", "a\\..\\b", "C:x",
                                  "", ".", "segments//01.onnx", "segments/", "manifest.json",
                                  "a\0b", "x" * 300])  # fmt: skip
def test_a_path_that_may_leave_the_bundle_is_refused(bundle, name):
    entry = {"sha256": "0" * 64, "size": 1}
    change(bundle, lambda manifest: manifest["files"].update({name: entry}))
    with pytest.raises(BundleError, match="files: a path that may leave the bundle"):
        Bundle.open(bundle)


def test_a_graph_must_be_among_the_files(bundle):
    change(bundle, lambda manifest: manifest["segments"][1].update(file="../../other.onnx"))
    with pytest.raises(BundleError, match="not among the manifest's files"):
        Bundle.open(bundle)


def test_another_schema_is_refused_before_anything_else_is_looked_at(bundle):
    # Graphs of /1 know neither evidence weights nor a decay.
    for number in (1, 3):
        schema = f"knnmoe.bundle/{number}"
        (bundle / "manifest.json").write_text(f'{{"schema": "{schema}", "shape": "new"}}')
        with pytest.raises(BundleError, match=r"schema: .*knnmoe\.bundle/2.*export again"):
            Bundle.open(bundle)


def test_a_huge_manifest_is_refused_unread(bundle, monkeypatch):
    with (bundle / "manifest.json").open("r+b") as stream:
        stream.truncate(MAX_MANIFEST_BYTES + 1)
    monkeypatch.setattr("knnmoe.runtime.manifest.parse_object", None)
    with pytest.raises(BundleError, match="too large"):
        Bundle.open(bundle)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b'{"a": NaN}', b'{"a": 1, "a": 2}',
                                  b"[" * 200_000])  # fmt: skip
def test_a_manifest_that_is_no_json_object_is_refused(bundle, text):
    (bundle / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError, match="is not valid JSON"):
        Bundle.open(bundle)


def set_in(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        target: Any = manifest
        for step in path[:-1]:
            target = target[step]
        if value is ...:
            del target[path[-1]]
        else:
            target[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_in("fingerprint", value=...), "fingerprint: missing"),
        (set_in("surprise", value=1), "surprise: unknown field"),
        (set_in("fingerprint", value="sha256:abc"), "fingerprint: malformed"),
        (set_in("family", value=7), "family: malformed"),
        (set_in("precision", value="int2"), "precision: unknown"),
        (set_in("architecture", value=[]), "architecture: malformed"),
        (set_in("architecture", "hidden_size", value=...), "architecture: hidden_size: missing"),
        (set_in("architecture", "hidden_size", value=0), "hidden_size: out of range"),
        (set_in("architecture", "hidden_size", value=True), "hidden_size: out of range"),
        (set_in("architecture", "hidden_size", value=1 << 60), "hidden_size: out of range"),
        (set_in("architecture", "hidden_size", value=64.0), "hidden_size: out of range"),
        (set_in("architecture", "latent_size", value=8), "latent_size: is that of one key head"),
        (set_in("architecture", "latent_size", value=0), "latent_size: "),
        (set_in("architecture", "num_gates", value=2), "segments: wrong number"),
        (set_in("architecture", "num_gates", value=9), "num_gates: out of range"),
        (set_in("architecture", "num_layers", value=10**6), "num_gates: out of range"),
        (set_in("routing", "score", value="dice"), "routing.score: unknown"),
        (set_in("routing", "top_k", value=9), "top_k: out of range"),
        (set_in("routing", "scale", value="1"), "scale: malformed"),
        (set_in("routing", "scale", value=10**400), "scale: malformed"),
        (set_in("routing", "renormalize", value=1), "renormalize: malformed"),
        (set_in("routing", "renormalize", value=...), "renormalize: missing"),
        (set_in("routing", "experts", value=8), "experts: unknown field"),
        (set_in("routing", "groups", value=3), "routing.groups: does not divide the experts"),
        (set_in("routing", "groups", value=16), "groups: out of range"),
        (set_in("routing", "groups", value=None), "groups: out of range"),
        (set_in("routing", "top_groups", value=2), "routing.top_groups: out of range"),
        (set_in("routing", "group_score", value="sum"), "routing.group_score: unknown"),
        (set_in("routing", "group_score", value=2), "group_score: malformed"),
        (set_in("routing", "groups", value=8), "routing.top_k: is more than there are experts"),
        (set_in("routing", "selection_bias", value=1), "selection_bias: malformed"),
        (
            set_in("routing", "selection_bias", value=True),
            r"selection_bias\.safetensors is missing",
        ),
        (set_in("experts_per_token", value=1), "experts_per_token: out of range"),
        (set_in("segments", value={}), "segments: malformed"),
        (set_in("segments", 0, value="00.onnx"), r"segments\[0\]: malformed"),
        (set_in("segments", 0, "layers", value=[1]), "layers are not those of the model"),
        (set_in("segments", 0, "layers", value=[99]), "layers: malformed"),
        (set_in("segments", 0, "inputs", 0, "dtype", value="object"), "dtype: unknown"),
        (set_in("segments", 0, "inputs", 0, "shape", value=[-1]), "shape: malformed"),
        (set_in("segments", 0, "inputs", 0, "shape", value=[None]), "shape: malformed"),
        (set_in("gates", "frozen", value=...), "gates.frozen: missing"),
        (set_in("gates", "cosine", value=...), "gates.cosine: missing"),
        (set_in("gates", "cosine", "file", value="nothing"), "not among the manifest's files"),
        (set_in("fused", "gate", value="other"), "gates.other: missing"),
        (set_in("files", "tokenizer.json", value=...), "tokenizer.json is missing"),
        (set_in("files", "config.json", "size", value=-1), "size: out of range"),
        (set_in("files", "config.json", "sha256", value="00"), "sha256: malformed"),
        (set_in("producer", "knnmoe", value=1), "knnmoe: malformed"),
    ],
)
def test_a_manifest_with_a_wrong_field_is_refused_by_its_name(bundle, edit, message):
    change(bundle, edit)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(bundle)
    assert caught.value.fix


def test_an_unknown_gate_graph_is_refused(bundle):
    change(bundle, lambda m: m["gates"].update(euclid=m["gates"]["frozen"]))
    with pytest.raises(BundleError, match=r"gates\.euclid: unknown gate graph"):
        Bundle.open(bundle)


def test_an_endless_directory_is_not_walked_to_its_end(bundle, monkeypatch):
    monkeypatch.setattr(format_, "MAX_DIRECTORY_ENTRIES", 20)
    for number in range(30):
        (bundle / f"{number}").touch()
    with pytest.raises(BundleError, match="too many files"):
        Bundle.open(bundle)


def test_an_unreadable_file_is_a_stated_failure(bundle, monkeypatch):
    opener = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == "config.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opener(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BundleError, match=r"config\.json: cannot be read"):
        Bundle.open(bundle)
