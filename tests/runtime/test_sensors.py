"""Sensors read from trees of files such as Linux has them, here made for the test."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from knnmoe.runtime.profiling.account import peak_bytes, resident_bytes
from knnmoe.runtime.profiling.bounds import physical_cores
from knnmoe.runtime.profiling.sensors import NVIDIA_SMI, limits, nvidia_gpus, sensors, throttled

# As a Jetson Orin has them.
JETSON = {
    "proc/loadavg": "0.52 0.58 0.59 1/389 12345\n",
    "proc/stat": "cpu  100 0 50 9000 3 0 2 17 0 0\ncpu0 100 0 50 9000 3 0 2 17 0 0\n",
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2201600\n",
    "sys/class/devfreq/15340000.vic/cur_freq": "115200000\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1300500000\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "47625\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "2\n",
    "sys/class/thermal/cooling_device1/type": "cpu-throttle-alert\n",
    "sys/class/thermal/cooling_device1/cur_state": "1\n",
    "sys/class/hwmon/hwmon0/name": "pwmfan\n",
    "sys/class/hwmon/hwmon1/name": "ina3221\n",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_GPU_SOC\n",
    "sys/class/hwmon/hwmon1/in1_input": "19000\n",
    "sys/class/hwmon/hwmon1/curr1_input": "320\n",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_CV\n",
    "sys/class/hwmon/hwmon1/in2_input": "19000\n",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "etc/nvpmodel.conf": "# modes\n< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n"
    "< POWER_MODEL ID=2 NAME=MODE_30W >\n",
}
SERVER = {
    "proc/loadavg": "3.0 2.0 1.0 2/300 99\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "4\n",
    "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "1\n",
    "sys/fs/cgroup/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/memory.max": "4294967296\n",
}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A path on which nothing lies but what a test puts there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_a_jetson_tells_of_clocks_temperatures_power_and_mode(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", JETSON)
    assert sensors(root) == {
        "load_average": [0.52, 0.58, 0.59],
        "steal_jiffies": 17,
        "cpu_mhz": [729.6, 2201.6],
        "gpu_mhz": {"now": 306.0, "most": 1300.5},
        "temperatures_c": {"cpu-thermal": 47.625},
        "cooling": {"cpu-throttle-alert": 1.0},
        "power_w": {"VDD_GPU_SOC": 6.08},
    }
    assert limits(root) == {
        "governor": "schedutil",
        "board": "NVIDIA Jetson AGX Orin Developer Kit",
        "jetson_power_mode": "2 (MODE_30W)",
    }
    assert throttled({}, sensors(root)) == ["cpu-throttle-alert was active"]


def test_a_container_tells_of_its_limits(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", SERVER)
    assert limits(root) == {"cgroup_cpus": 1.5, "cgroup_memory_bytes": 4 << 30}
    older = tree(
        tmp_path / "older",
        {
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert limits(older) == {"cgroup_cpus": 2.0}


def test_throttling_is_what_was_counted_meanwhile(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", SERVER)
    before = sensors(root)
    assert before["cpu_throttled"] == 5
    assert throttled(before, before) == []
    tree(root, {"sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "9\n"})
    assert throttled(before, sensors(root)) == ["the processor was throttled 8 times"]


def test_where_nothing_is_there_nothing_is_said(tmp_path: Path) -> None:
    assert sensors(tmp_path) == limits(tmp_path) == {}
    broken = tree(tmp_path / "broken", {"sys/class/thermal/thermal_zone0/type": "x\n",
                                        "sys/class/thermal/thermal_zone0/temp": "invalid\n",
                                        "var/lib/nvpmodel/status": "nothing"})  # fmt: skip
    assert sensors(broken) == limits(broken) == {}


def test_what_nvidia_smi_says_of_each_gpu_is_kept(no_gpu: Path) -> None:
    values = ["A GPU", "580.1", "41", "1980", "1980", "2619", "120.5", "700.00",
              "0x0000000000000004", "512", "81559"]  # fmt: skip
    assert len(values) == len(NVIDIA_SMI)
    script = no_gpu / "nvidia-smi"
    script.write_text("#!/bin/sh\n" + f"echo '{', '.join(values)}'\necho 'No devices'\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    (gpu,) = nvidia_gpus()
    assert (gpu["name"], gpu["sm_clock_mhz"], gpu["power_w"]) == ("A GPU", "1980", "120.5")
    json.dumps(gpu)
    assert throttled({}, {"gpus": [gpu]}) == ["A GPU was throttled (0x0000000000000004)"]
    idle = {**gpu, "throttle_reasons": "0x0000000000000001"}
    assert throttled({}, {"gpus": [idle]}) == []
    script.write_text("#!/bin/sh\nexit 9\n")
    assert nvidia_gpus() == []


def test_siblings_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    siblings = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    root = tree(tmp_path / "root", {topology.format(n): s for n, s in siblings.items()})
    assert physical_cores(root) == 2
    assert physical_cores(tmp_path / "none") == 4


def test_resident_memory_is_read_in_kibibytes(tmp_path: Path) -> None:
    stated = "Name:\tpython\nVmHWM:\t  2000 kB\nVmRSS:\t  1000 kB\n"
    root = tree(tmp_path / "root", {"proc/self/status": stated})
    assert (resident_bytes(root), peak_bytes(root)) == (1_024_000, 2_048_000)
    assert resident_bytes(tmp_path / "none") is None
    assert (peak_bytes(tmp_path / "none") or 0) > 1 << 20  # the system's own count
