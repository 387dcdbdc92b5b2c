from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from knnmoe.runtime.cli import main
from knnmoe.runtime.errors import ProfileError
from knnmoe.runtime.profiling.from_device import Quantity, read_device_results
from knnmoe.runtime.profiling.html import profile_page
from knnmoe.runtime.profiling.record import write_record
from profiles import synthetic_record

# As tegrastats of an AGX Orin (JetPack 6) and of a Nano (JetPack 4) write them.
ORIN = """\
11-22-2026 10:00:00 RAM 4000/30536MB (lfb 6x4MB) SWAP 0/15268MB (cached 0MB) CPU [10%@2201,\
30%@2201,off,off] EMC_FREQ 20%@3199 GR3D_FREQ 40%@[1300,1290] CV0@-256C CPU@48.5C tj@50C \
VDD_GPU_SOC 5000mW/4000mW VIN_SYS_5V0 3000mW/3000mW
11-22-2026 10:00:01 RAM 4200/30536MB (lfb 6x4MB) SWAP 0/15268MB (cached 0MB) CPU [20%@1100,\
40%@1100,off,off] EMC_FREQ 30%@3199 GR3D_FREQ 80%@[1300,1300] CV0@-256C CPU@49.5C tj@54C \
VDD_GPU_SOC 7000mW/4500mW VIN_SYS_5V0 3000mW/3000mW
"""
NANO = "RAM 1500/3964MB (lfb 5x4MB) CPU [5%@102,off] EMC_FREQ 0% GR3D_FREQ 0% POM_5V_IN 1500/1500\n"
SMI = """\
timestamp, name, power.draw [W], temperature.gpu, clocks.current.sm [MHz], \
clocks_throttle_reasons.active
2026/11/22 10:00:00.000, NVIDIA H100, 100.50 W, 40, 1500 MHz, 0x0000000000000001
2026/11/22 10:00:01.000, NVIDIA H100, 300.50 W, 60, 1700 MHz, 0x0000000000000004
2026/11/22 10:00:02.000, NVIDIA H100, [N/A], 50, 1600 MHz, 0x0000000000000001
"""
LAYERS = [
    {"count": 100},
    {"name": "experts", "timeMs": 30.0, "averageMs": 0.3, "medianMs": 0.29, "percentage": 75.0},
    {"name": "attention", "timeMs": 10.0, "averageMs": 0.1, "percentage": 25.0},
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    root = tmp_path / "results"
    root.mkdir()
    write_record(synthetic_record(), root / "profile.json")
    (root / "tegrastats.log").write_text(ORIN)
    (root / "nvidia-smi.csv").write_text(SMI)
    (root / "layers-decode-01.json").write_text(json.dumps(LAYERS))
    (root / "notes.txt").write_text("a cold room")
    return root


def test_what_a_device_recorded_is_read(results: Path) -> None:
    found = read_device_results(results)
    assert found.record() == synthetic_record()
    log = found.sensors["tegrastats.log"]
    assert log["VDD_GPU_SOC"] == Quantity("mW", 5000, 6000, 7000, 2)
    assert log["RAM used"] == Quantity("MB", 4000, 4100, 4200, 2)
    assert log["CPU load"] == Quantity("%", 20, 25, 30, 2)
    assert log["CPU clock"] == Quantity("MHz", 1100, 1650.5, 2201, 2)
    assert log["GPU load"] == Quantity("%", 40, 60, 80, 2)
    assert log["tj temperature"] == Quantity("°C", 50, 52, 54, 2)
    assert log["CPU temperature"].largest == 49.5
    assert "CV0 temperature" not in log  # that engine is off
    gpu = found.sensors["nvidia-smi.csv"]
    assert gpu["power.draw"] == Quantity("W", 100.5, 200.5, 300.5, 2)
    assert gpu["temperature.gpu"] == Quantity("°C", 40, 50, 60, 3)
    assert gpu["clocks_throttle_reasons.active: not idle"].mean == pytest.approx(1 / 3)
    (experts, attention) = found.layers["layers-decode-01.json"]
    assert (experts.name, experts.mean_ms, experts.median_ms) == ("experts", 0.3, 0.29)
    assert attention.share == pytest.approx(0.25)
    assert attention.median_ms is None
    assert found.unread == ("notes.txt",)
    json.dumps(found.to_json(), allow_nan=False)


def test_logs_of_older_boards_are_read(results: Path) -> None:
    (results / "tegrastats.log").write_text(NANO)
    log = read_device_results(results).sensors["tegrastats.log"]
    assert log["POM_5V_IN"] == Quantity("mW", 1500, 1500, 1500, 1)
    assert log["GPU load"].mean == 0
    assert "GPU clock" not in log


def test_the_page_shows_sensors_and_layers(results: Path) -> None:
    found = read_device_results(results)
    page = profile_page(found.record(), device=found)
    for words in ("Sensors: tegrastats.log", "VDD_GPU_SOC", "Layers: layers-decode-01.json"):
        assert words in page


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tegrastats.log", "nothing of that kind\n", "has no readings"),
        ("nvidia-smi.csv", "", "has no readings"),
        ("layers-decode-01.json", "[", "not valid JSON"),
        ("layers-decode-01.json", "{}", "no profile of layers"),
        ("layers-decode-01.json", '[{"name": "x"}]', "averageMs: malformed"),
        ("layers-decode-01.json", '[{"name": "x", "averageMs": -1}]', "averageMs: malformed"),
        ("profile.json", '{"schema": "knnmoe.profile/99"}', "schema"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    results: Path, name: str, content: str, problem: str
) -> None:
    (results / name).write_text(content)
    with pytest.raises(ProfileError, match=problem) as error:
        read_device_results(results)
    assert name in str(error.value)


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ProfileError, match="holds nothing of a measurement") as error:
        read_device_results(tmp_path)
    assert "notes.txt" in str(error.value)
    with pytest.raises(ProfileError, match="cannot be read"):
        read_device_results(tmp_path / "none")


def test_of_several_records_one_must_be_named(results: Path) -> None:
    write_record(synthetic_record(seed=1), results / "second.json")
    found = read_device_results(results)
    assert found.record("second.json") == synthetic_record(seed=1)
    with pytest.raises(ProfileError, match="several records"):
        found.record()
    with pytest.raises(ProfileError, match=r"no record third\.json"):
        found.record("third.json")


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["profile", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_and_writes_what_was_recorded(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    code, out, _ = run("--from-device", results, "--html", page)
    assert code == 0
    for words in ("gate 0", "VDD_GPU_SOC", "experts", "Left unread: notes.txt"):
        assert words in out
    assert "VDD_GPU_SOC" in page.read_text(encoding="utf-8")
    code, out, _ = run("show", "--from-device", results, "--json")
    assert (code, json.loads(out)["schema"]) == (0, "knnmoe.device-results/1")


def test_logs_alone_are_shown_and_a_page_needs_a_record(results: Path, tmp_path: Path) -> None:
    (results / "profile.json").unlink()
    assert run("--from-device", results)[0] == 0
    code, _, err = run("--from-device", results, "--html", tmp_path / "report.html")
    assert code == 1
    assert "has no profile record" in err


def test_a_record_is_shown_written_and_answered(tmp_path: Path) -> None:
    path, page = tmp_path / "record.json", tmp_path / "report.html"
    write_record(synthetic_record(), path)
    code, out, _ = run("show", path, "--html", page)
    assert code == 0
    assert "segment 0" in out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads(run("show", path, "--json")[1])["schema"] == "knnmoe.profile/2"
    code, _, err = run("show", path, "--budget-ms", 12)
    assert code == 1
    assert "too few memory sizes" in err
    assert run("show", path, "--write-run-config", tmp_path / "run.json")[0] == 2
    assert run("show")[0] == 2
