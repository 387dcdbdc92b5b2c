"""How the machine is doing at a moment: load, clocks, temperatures, throttling, power, limits.

Read from Linux's proc and sys, so on other systems most of it is absent. What is absent is left
out, since boards differ in what they have. `root` is where these trees are mounted, for tests.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path("/")
NVIDIA_SMI_SECONDS = 10
# What is asked of nvidia-smi, by the name it has in a record.
NVIDIA_SMI = {
    "name": "name",
    "driver": "driver_version",
    "temperature_c": "temperature.gpu",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "throttle_reasons": "clocks_throttle_reasons.active",
    "memory_used_mib": "memory.used",
    "memory_total_mib": "memory.total",
}


def sensors(root: Path = ROOT) -> dict[str, Any]:
    """What the machine's sensors say now; only what is there."""
    readings: Mapping[str, Callable[[Path], Any]] = {
        "load_average": _load_average,
        "steal_jiffies": _steal,
        "cpu_mhz": _cpu_clocks,
        "cpu_throttled": _cpu_throttled,
        "gpu_mhz": _gpu_clock,
        "temperatures_c": _temperatures,
        "cooling": _cooling,
        "power_w": _power,
        "gpus": lambda _: nvidia_gpus(),
    }
    found = {name: read(root) for name, read in readings.items()}
    return {name: value for name, value in found.items() if value not in (None, {}, [])}


def limits(root: Path = ROOT) -> dict[str, Any]:
    """What does not change from moment to moment: governor, control group, Jetson's power mode."""
    readings: Mapping[str, Callable[[Path], Any]] = {
        "governor": lambda at: _text(at / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "cgroup_cpus": _cgroup_cpus,
        "cgroup_memory_bytes": _cgroup_memory,
        "board": lambda at: _text(at / "proc/device-tree/model"),
        "jetson_power_mode": _power_mode,
    }
    found = {name: read(root) for name, read in readings.items()}
    return {name: value for name, value in found.items() if value is not None}


def nvidia_gpus() -> list[dict[str, str]]:
    """What nvidia-smi says of every GPU; an empty list without it."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ",".join(NVIDIA_SMI.values())
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(NVIDIA_SMI, row, strict=True)) for row in rows if len(row) == len(NVIDIA_SMI)]


def throttled(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What slowed the machine down between two readings, as clauses; empty if nothing did."""
    found = []
    counted = after.get("cpu_throttled", 0) - before.get("cpu_throttled", 0)
    if counted > 0:
        found.append(f"the processor was throttled {counted} times")
    for name, state in after.get("cooling", {}).items():
        if state > 0:
            found.append(f"{name} was active")
    for gpu in after.get("gpus", []):
        reasons = gpu["throttle_reasons"]
        # Bit 0 is an idle GPU, bit 1 clocks that somebody set.
        if reasons.startswith("0x") and int(reasons, 16) & ~0b11:
            found.append(f"{gpu['name']} was throttled ({reasons})")
    return found


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return None


def _number(path: Path, scale: float = 1.0) -> float | None:
    text = _text(path)
    try:
        return None if text is None else round(float(text) * scale, 3)
    except ValueError:
        return None


def _matching(root: Path, pattern: str) -> Iterator[Path]:
    try:
        yield from sorted(root.glob(pattern))
    except OSError:
        return


def _load_average(root: Path) -> list[float] | None:
    text = _text(root / "proc/loadavg")
    return [float(part) for part in text.split()[:3]] if text else None


def _steal(root: Path) -> int | None:
    """Time that other guests of the same host had the cores for, in hundredths of a second."""
    text = _text(root / "proc/stat")
    fields = text.splitlines()[0].split() if text else []
    return int(fields[8]) if len(fields) > 8 else None


def _cpu_clocks(root: Path) -> list[float]:
    files = _matching(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    clocks = [_number(file, 1e-3) for file in files]
    return [clock for clock in clocks if clock is not None]


def _cpu_throttled(root: Path) -> int | None:
    files = _matching(root, "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")
    counts = [count for file in files if (count := _number(file)) is not None]
    return int(sum(counts)) if counts else None


def _gpu_clock(root: Path) -> dict[str, float]:
    """Of a GPU that is part of the chip: now and at most."""
    for device in _matching(root, "sys/class/devfreq/*"):
        if any(part in device.name for part in ("gpu", "ga10b", "gv11b", "gb10b")):
            clocks = {
                "now": _number(device / "cur_freq", 1e-6),
                "most": _number(device / "max_freq", 1e-6),
            }
            return {name: clock for name, clock in clocks.items() if clock is not None}
    return {}


def _temperatures(root: Path) -> dict[str, float]:
    found = {}
    for zone in _matching(root, "sys/class/thermal/thermal_zone*"):
        name, degrees = _text(zone / "type"), _number(zone / "temp", 1e-3)
        if name and degrees is not None:
            found[name] = degrees
    return found


def _cooling(root: Path) -> dict[str, float]:
    """Cooling that slows something down; fans do not."""
    found: dict[str, float] = {}
    for device in _matching(root, "sys/class/thermal/cooling_device*"):
        name, state = _text(device / "type"), _number(device / "cur_state")
        if name and state is not None and "fan" not in name:
            found[name] = max(state, found.get(name, 0))
    return found


def _power(root: Path) -> dict[str, float]:
    """Watts of each rail that a monitor on the board measures, as on a Jetson."""
    found = {}
    for monitor in _matching(root, "sys/class/hwmon/hwmon*"):
        if _text(monitor / "name") != "ina3221":
            continue
        for label in _matching(monitor, "in[0-9]*_label"):
            channel = label.name.removeprefix("in").removesuffix("_label")
            volts = _number(monitor / f"in{channel}_input", 1e-3)
            amperes = _number(monitor / f"curr{channel}_input", 1e-3)
            name = _text(label)
            if name and volts is not None and amperes is not None:
                found[name] = round(volts * amperes, 3)
    return found


def _power_mode(root: Path) -> str | None:
    """Number and name of the mode that nvpmodel has set."""
    status = _text(root / "var/lib/nvpmodel/status")
    if status is None or not status.startswith("pmode:"):
        return None
    digits = status.removeprefix("pmode:").strip()
    if not digits.isdecimal():
        return None
    mode = str(int(digits))
    for line in (_text(root / "etc/nvpmodel.conf") or "").splitlines():
        words = line.replace("=", " ").split()
        if "POWER_MODEL" in words and "ID" in words and "NAME" in words:
            stated = words[words.index("ID") + 1], words[words.index("NAME") + 1]
            if stated[0] == mode:
                return f"{mode} ({stated[1]})"
    return mode


def _cgroup_cpus(root: Path) -> float | None:
    """Cores that the control group allows; None where it sets no limit."""
    quota, period = [*(_text(root / "sys/fs/cgroup/cpu.max") or "max").split(), "1"][:2]
    if quota == "max":
        older = root / "sys/fs/cgroup/cpu"
        quota = _text(older / "cpu.cfs_quota_us") or "-1"
        period = _text(older / "cpu.cfs_period_us") or "100000"
    return round(int(quota) / int(period), 2) if int(quota) > 0 else None


def _cgroup_memory(root: Path) -> int | None:
    text = _text(root / "sys/fs/cgroup/memory.max")
    if text is None:
        text = _text(root / "sys/fs/cgroup/memory/memory.limit_in_bytes")
    if text is None or not text.isdecimal():
        return None
    return int(text) if int(text) < 1 << 60 else None
