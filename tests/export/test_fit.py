"""What a model needs on a device, against a count by hand."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from knnmoe.export.fit import GIB, Needs, fits, needs
from knnmoe.runtime.bundle import Bundle, ModelShape

OLMOE = ModelShape(2048, 50304, 16, 16, 64, 16, 16, 128, 4096)


def test_the_parts_are_what_they_are_counted_to_be() -> None:
    # OLMoE-1B-7B: 2 * 16 layers * 16 heads * 128 numbers a token; 16 gates of 10,000 entries.
    found = needs(OLMOE, 5 * GIB, context=4096, entries=10_000)
    assert found.cache == 4096 * 65_536 * 4 == 1 << 30
    assert found.memory == 16 * 10_000 * (2048 * 4 + 64 * 4 + 8)
    half = needs(OLMOE, 5 * GIB, context=4096, entries=10_000, cache_bytes=2, key_bytes=2)
    assert half.cache == found.cache // 2
    assert half.memory == 16 * 10_000 * (2048 * 2 + 64 * 4 + 8)
    assert needs(OLMOE, 1, context=1, entries=0).memory == 0


def test_a_latent_cache_is_one_array_of_one_head() -> None:
    # DeepSeek-V2-Lite: 27 layers of 512 + 64 numbers a token, where heads would be 2 · 16 · 192.
    lite = ModelShape(2048, 102400, 27, 26, 64, 16, 1, 576, 163840, latent_size=512)
    assert needs(lite, 1, context=4096, entries=0).cache == 4096 * 27 * 576 * 4


def test_devices_that_are_too_small_are_said_to_be() -> None:
    rows = {fit.device: fit for fit in fits(Needs(weights=13 * GIB, cache=GIB, memory=GIB))}
    assert not rows["Jetson Orin NX 16 GB"].fits
    assert rows["Jetson Orin NX 16 GB"].left == -GIB
    assert rows["Jetson AGX Orin 32 GB"].fits


def test_a_dry_run_says_what_the_bundle_weighs_and_writes_nothing(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from knnmoe.export.cli import main
    from knnmoe.export.exporter import export

    words = [str(tiny_checkpoint), str(tmp_path / "bundle"), "--dry-run", "--json"]
    done = CliRunner().invoke(main, [*words, "--context", "32", "--entries", "100"])
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert not any(tmp_path.iterdir())
    report = export(tiny_checkpoint, tmp_path / "bundle")
    shape = Bundle.open(report.bundle).manifest.architecture
    stored = sum(f.size for name, f in report.files.items() if name.endswith(".safetensors"))
    assert stored == said["bytes"]["weights"]
    expected = needs(shape, said["bytes"]["weights"], context=32, entries=100)
    assert said["bytes"]["total"] == expected.total
    assert (said["context"], said["gates"]) == (32, shape.num_gates)
    for precision in ("int4", "fp16"):
        done = CliRunner().invoke(main, [str(tiny_checkpoint), "--dry-run", "--json"])
        smaller = CliRunner().invoke(main, [*words[:1], *words[2:], "--precision", precision])
        sizes = [json.loads(run.stdout)["bytes"]["weights"] for run in (smaller, done)]
        assert sizes[0] < 0.6 * sizes[1]
    table = CliRunner().invoke(main, [str(tiny_checkpoint), "--dry-run"]).output
    assert "nothing was written" in table
    assert "Jetson Orin NX 16 GB" in table


def test_without_a_bundle_an_export_is_wrong_usage(tiny_checkpoint: Path) -> None:
    from knnmoe.export.cli import main

    done = CliRunner().invoke(main, [str(tiny_checkpoint)])
    assert done.exit_code == 2
    assert "BUNDLE" in done.output
