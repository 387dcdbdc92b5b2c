"""Which experts engines get: TensorRT's own layer where it is, and standard operators elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from knnmoe.export.engines import build as building
from knnmoe.export.engines import cli
from knnmoe.export.engines.settings import EXPERTS, BuildSettings, limits_for
from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.errors import EngineError, SettingError

TENSORRT = BuildSettings("tensorrt")
PHASES = ("decode", "prefill")


def experts(settings: BuildSettings, *capabilities: str, version: str = "11.1.0") -> list[str]:
    """Of decoding and of prompts."""
    decided = settings.for_target(capabilities, version)
    return [decided.experts_of(phase) for phase in PHASES]


@pytest.mark.parametrize("capabilities", [("100",), ("101",), ("103",), ("110",), ("100", "110")])
def test_auto_takes_tensorrts_layer_where_every_device_has_it(capabilities):
    assert experts(TENSORRT, *capabilities) == ["moe", "moe"]


@pytest.mark.parametrize("capabilities", [("86",), ("90",), ("120",), ("121",), ("100", "120")])
def test_auto_goes_by_phase_where_a_device_lacks_the_layer(capabilities):
    assert experts(TENSORRT, *capabilities) == ["gathered", "dense"]


def test_auto_goes_by_phase_where_the_backend_lacks_the_layer():
    assert experts(TENSORRT, "110", version="10.13.3.9") == ["gathered", "dense"]
    assert experts(BuildSettings("tensorrt_rtx"), "110", version="1.7.1") == ["gathered", "dense"]
    assert experts(BuildSettings("onnxruntime"), version="1.31.0") == ["gathered", "dense"]


@pytest.mark.parametrize("chosen", ["gathered", "dense", "moe"])
def test_experts_that_are_asked_for_serve_both_phases(chosen):
    assert experts(replace(TENSORRT, experts=chosen), "110") == [chosen, chosen]


@pytest.mark.parametrize(
    ("settings", "capabilities", "version", "message"),
    [
        (TENSORRT, ("86",), "11.1.0", "expected compute capability 10.x or 11.x; found 86"),
        (TENSORRT, ("100", "120"), "11.1.0", "10.x or 11.x; found 100, 120"),
        (TENSORRT, ("110",), "10.16.1.11", "expected TensorRT 11 or newer; found 10.16.1.11"),
        (BuildSettings("tensorrt_rtx"), ("110",), "1.7.1", "backend tensorrt; found tensorrt_rtx"),
        (BuildSettings("onnxruntime"), (), "1.31.0", "backend tensorrt; found onnxruntime"),
    ],
)
def test_a_layer_that_is_not_there_is_refused(settings, capabilities, version, message):
    with pytest.raises(SettingError, match=f"experts: the target has no .*{message}"):
        replace(settings, experts="moe").for_target(capabilities, version)


def test_weights_in_blocks_do_without_the_layer():
    decided = TENSORRT.for_target(("110",), "11.1.0", in_blocks=True)
    assert [decided.experts_of(phase) for phase in PHASES] == ["gathered", "dense"]
    with pytest.raises(SettingError, match=r"experts: .* takes no weights in blocks .* found moe"):
        replace(TENSORRT, experts="moe").for_target(("110",), "11.1.0", in_blocks=True)


def test_experts_that_do_not_exist_are_named(tiny_bundle):
    shape = Bundle.open(tiny_bundle, verify=False).manifest.architecture
    unknown: Any = "some"
    settings = replace(TENSORRT, experts=unknown, limits=limits_for(shape))
    with pytest.raises(SettingError, match="experts: unknown; expected auto or gathered or dense"):
        settings.check(shape)


def test_the_command_offers_what_there_is():
    assert cli.EXPERTS == EXPERTS


@pytest.fixture
def built(tiny_bundle, tmp_path, monkeypatch):
    """Builds for a device that is not here; gives each engine's operators, and the notes."""
    bundle = Bundle.open(tiny_bundle)
    limits = limits_for(bundle.manifest.architecture)
    operators: dict[str, set[str]] = {}
    refused: set[str] = set()

    def write(_task: Any, _settings: Any, jobs: Any, directory: Path) -> Any:
        found = {
            job.name: {
                node.op_type for node in onnx.load_model_from_string(job.graph.content).graph.node
            }
            for job in jobs
        }
        if "TRT_MoE" in set().union(*found.values()) & refused:
            raise EngineError("tensorrt: decode-01", "cannot build", found="no such kernel")
        operators.update(found)
        for job in jobs:
            (directory / job.file("engine")).write_bytes(b"engine")
        return {job.name: {"plugin_layers": 0, "seconds": 0.0} for job in jobs}

    def build(
        capability: str, *, refuses: str = "", **changes: Any
    ) -> tuple[dict[str, set[str]], str]:
        refused.add(refuses)
        target = building._Target("11.1.0", (capability,), "13.0")
        monkeypatch.setattr(building, "_target", lambda _: target)
        monkeypatch.setattr(building, "_build_jobs", write)
        settings = replace(TENSORRT, plugin="none", limits=limits, **changes)
        report = building.build(bundle, settings, output=tmp_path / capability)
        return operators, " ".join(report.notes)

    return build


def test_engines_for_thor_have_the_layer_in_both_phases(built):
    operators, notes = built("110")
    assert "--experts gathered does without" in notes
    with_it = {name for name, kinds in operators.items() if "TRT_MoE" in kinds}
    assert with_it == {f"{phase}-{index:02d}" for phase in PHASES for index in (1, 2, 3)}


def test_where_tensorrt_does_not_build_the_layer_engines_do_without(built):
    operators, notes = built("100", refuses="TRT_MoE")
    assert "did not build its MoE layer (no such kernel)" in notes
    assert len(operators) == 8
    assert not any("TRT_MoE" in kinds for kinds in operators.values())
    with pytest.raises(EngineError, match="cannot build"):
        built("103", refuses="TRT_MoE", experts="moe")


def test_engines_for_other_devices_do_without(built, tmp_path):
    operators, notes = built("87")
    assert not any("TRT_MoE" in kinds for kinds in operators.values())
    assert "--experts" not in notes
    with pytest.raises(SettingError, match=r"compute capability 10\.x or 11\.x; found 89"):
        built("89", experts="moe")
    assert not (tmp_path / "89").exists()


def test_the_command_says_where_the_layer_is_not(tiny_bundle, tmp_path):
    options = ["--backend", "onnxruntime", "--experts", "moe", "--output", str(tmp_path / "set")]
    result = CliRunner().invoke(cli.engines, ["build", str(tiny_bundle), *options])
    assert result.exit_code != 0
    assert "the target has no mixture-of-experts layer" in " ".join(result.output.split())
    assert "--experts auto, gathered or dense" in " ".join(result.output.split())
