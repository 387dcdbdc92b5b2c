"""What was recorded on a target and carried here: records, sensor logs, engines' layer profiles.

The directory's format is described in docs/formats.md. Files are told apart by their names; what is
not known is named and left unread.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ProfileError
from .record import SCHEMA as RECORD_SCHEMA
from .record import ProfileRecord, read_record

SCHEMA = "knnmoe.device-results/1"
MAX_LOG_BYTES = 1 << 27
SHOWN = 8  # names of files that are of no use, in an error
FORMAT = "See docs/formats.md, Results of a device."


@dataclass(frozen=True)
class Quantity:
    """What a log says of one thing over time: smallest, mean and largest of n readings."""

    unit: str
    smallest: float
    mean: float
    largest: float
    readings: int


@dataclass(frozen=True)
class Layer:
    """One layer of an engine, in milliseconds a run of the engine."""

    name: str
    mean_ms: float
    median_ms: float | None
    share: float


@dataclass(frozen=True)
class DeviceResults:
    """All of a directory.

    Attributes:
        path: The directory.
        records: Profile records by file name.
        sensors: By log: quantities by name.
        layers: By file: an engine's layers, in the order they run.
        unread: Files that are none of these.
    """

    path: Path
    records: Mapping[str, ProfileRecord]
    sensors: Mapping[str, Mapping[str, Quantity]]
    layers: Mapping[str, tuple[Layer, ...]]
    unread: tuple[str, ...]

    def record(self, name: str | None = None) -> ProfileRecord:
        """One of the records; None where there is only one.

        Raises:
            ProfileError: If there is none, no such, or several and none is named.
        """
        if name is None and len(self.records) == 1:
            return next(iter(self.records.values()))
        if name is not None and name in self.records:
            return self.records[name]
        raise ProfileError(
            self.path,
            "has no profile record" if not self.records else
            "has several records" if name is None else f"has no record {name}",
            expected="a file that `knnmoe profile --output FILE.json` wrote"
            if not self.records else f"one of {', '.join(self.records)}",
            fix="Name one: knnmoe profile show NAME --from-device DIR." if self.records
            else "Run `knnmoe profile … --output DIR/profile.json` on the device.",
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """All of it by name."""
        return {
            "schema": SCHEMA,
            "records": {name: record.to_json() for name, record in self.records.items()},
            "sensors": {
                name: {what: asdict(found) for what, found in log.items()}
                for name, log in self.sensors.items()
            },
            "layers": {
                name: [asdict(layer) for layer in layers] for name, layers in self.layers.items()
            },
            "unread": list(self.unread),
        }


def read_device_results(path: str | Path) -> DeviceResults:
    """Read a directory that was recorded on a device.

    Raises:
        ProfileError: If there is no such directory, it holds nothing of a measurement, or a file
            is not what its name says.
    """
    root = Path(path)
    try:
        files = sorted(file for file in root.iterdir() if file.is_file())
    except OSError as error:
        raise ProfileError(
            root, f"cannot be read ({error.strerror})", expected="a directory", fix=FORMAT
        ) from error
    records: dict[str, ProfileRecord] = {}
    sensors: dict[str, Mapping[str, Quantity]] = {}
    layers: dict[str, tuple[Layer, ...]] = {}
    unread = []
    for file in files:
        name = file.name
        if name.startswith("tegrastats"):
            sensors[name] = _summed_up(file, _tegrastats(file))
        elif name.startswith("nvidia-smi"):
            sensors[name] = _summed_up(file, _nvidia_smi(file))
        elif name.startswith("layers") and file.suffix == ".json":
            layers[name] = tuple(_layers(file))
        elif file.suffix == ".json" and _is_record(file):
            records[name] = read_record(file)
        else:
            unread.append(name)
    if not (records or sensors or layers):
        raise ProfileError(
            root, "holds nothing of a measurement", found=_listed(unread),
            expected="profile records, tegrastats*, nvidia-smi*, layers*.json", fix=FORMAT,
        )  # fmt: skip
    return DeviceResults(root, records, sensors, layers, tuple(unread))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN]) or "no files"
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def _is_record(file: Path) -> bool:
    """Whether it looks like one; `read_record` then says what is wrong with it."""
    with file.open("rb") as stream:
        return RECORD_SCHEMA.partition("/")[0].encode() in stream.read(4096)


def _text(file: Path) -> str:
    try:
        size = file.stat().st_size
        if size > MAX_LOG_BYTES:
            raise ProfileError(
                file, "is too large", expected=f"at most {MAX_LOG_BYTES} bytes", found=size
            )
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ProfileError(file, f"cannot be read ({error.strerror})") from error


Reading = tuple[str, str, float]  # name, unit, number

_PAIR = re.compile(r"\b((?:VDD|VIN|POM|NC|CV)\w*) (\d+)(?:mW)?/\d+(?:mW)?")
_HEAT = re.compile(r"\b([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C\b")
_CORES = re.compile(r"\bCPU \[([^\]]*)\]")
_RAM = re.compile(r"\bRAM (\d+)/(\d+)MB")
_ENGINE = re.compile(r"\b(GR3D|EMC)_FREQ (?:(\d+)%)?(?:@\[?(\d+)(?:,(\d+))?)?")
NO_SENSOR = -256.0  # what a sensor of an engine that is off says


def _tegrastats(file: Path) -> Iterator[Reading]:
    """Readings of `tegrastats --interval MS --logfile FILE`, of JetPack 4 to 7."""
    for line in _text(file).splitlines():
        if (ram := _RAM.search(line)) is not None:
            yield "RAM used", "MB", float(ram[1])
        for engine, load, clock, other in _ENGINE.findall(line):
            name = {"GR3D": "GPU", "EMC": "memory controller"}[engine]
            if load:
                yield f"{name} load", "%", float(load)
            if clock:
                yield f"{name} clock", "MHz", max(float(clock), float(other or 0))
        if (cores := _CORES.search(line)) is not None:
            running = re.findall(r"(\d+)%@(\d+)", cores[1])
            if running:
                yield "CPU load", "%", sum(float(load) for load, _ in running) / len(running)
                yield "CPU clock", "MHz", max(float(clock) for _, clock in running)
        for name, degrees in _HEAT.findall(line):
            if float(degrees) != NO_SENSOR:
                yield f"{name} temperature", "°C", float(degrees)
        for name, power in _PAIR.findall(line):
            yield name, "mW", float(power)


def _nvidia_smi(file: Path) -> Iterator[Reading]:
    """Numbers of `nvidia-smi --query-gpu=… --format=csv -l 1 -f FILE`, by their columns' heads."""
    rows = csv.reader(_text(file).splitlines(), skipinitialspace=True)
    heads = next(rows, [])
    for row in rows:
        for head, cell in zip(heads, row, strict=False):
            name, _, unit = head.partition(" [")
            number = re.fullmatch(r"(-?\d+(?:\.\d+)?)(?: .*)?", cell.strip())
            if number is not None and name not in ("index", "timestamp"):
                yield name, unit.rstrip("]") or _unit(name), float(number[1])
            elif cell.startswith("0x"):
                yield f"{name}: not idle", "", float(int(cell, 16) & ~1 != 0)


def _unit(name: str) -> str:
    return "°C" if name.startswith("temperature") else ""


def _summed_up(file: Path, readings: Iterator[Reading]) -> dict[str, Quantity]:
    found: dict[str, tuple[str, list[float]]] = {}
    for name, unit, number in readings:
        found.setdefault(name, (unit, []))[1].append(number)
    if not found:
        raise ProfileError(
            file, "has no readings",
            expected="lines of tegrastats, or CSV of nvidia-smi with its head", fix=FORMAT,
        )  # fmt: skip
    return {
        name: Quantity(unit, min(numbers), sum(numbers) / len(numbers), max(numbers), len(numbers))
        for name, (unit, numbers) in found.items()
    }


def _layers(file: Path) -> Iterator[Layer]:
    """Layers of `trtexec --exportProfile=FILE`: a list of objects, the first of which counts."""
    try:
        content = json.loads(_text(file))
    except ValueError as error:
        raise ProfileError(file, f"is not valid JSON ({error})", fix=FORMAT) from error
    rows = [row for row in content if isinstance(row, dict) and "name" in row] if isinstance(
        content, list) else []  # fmt: skip
    if not rows:
        raise ProfileError(
            file, "is no profile of layers", expected="what `trtexec --exportProfile` writes",
            fix=FORMAT,
        )  # fmt: skip
    times = [_number(file, row, "averageMs") for row in rows]
    total = sum(times)
    for row, ms in zip(rows, times, strict=True):
        median = _number(file, row, "medianMs") if "medianMs" in row else None
        yield Layer(str(row["name"]), ms, median, ms / total if total else 0.0)


def _number(file: Path, row: Mapping[str, Any], name: str) -> float:
    found = row.get(name)
    if (
        isinstance(found, bool)
        or not isinstance(found, int | float)
        or not math.isfinite(found)
        or found < 0
    ):
        raise ProfileError(
            f"{file}: {name}", "malformed", expected="milliseconds", found=found, fix=FORMAT
        )
    return float(found)
