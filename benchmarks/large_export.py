"""Exports a model larger than memory should have to hold, and says what it took.

    .venv/bin/python benchmarks/large_export.py olmoe-1b-7b build/large

Makes a checkpoint of random weights in the shape of a well-known model, exports it in a process of
its own whose memory is watched, loads the bundle in another and decodes. Needs room on the disk for
checkpoint and bundle; both are removed afterwards. The decode step is timed alone, beside whatever
else the machine does; `cpu_decode.py` compares speeds.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
WATCH_EVERY = 0.05  # seconds

_DECODE = """
import json, re, sys, time
import numpy as np
from knnmoe.runtime import Model

started = time.perf_counter()
model = Model.load(sys.argv[1], threads=int(sys.argv[2]))
loaded = time.perf_counter() - started
cache = model.pipeline.new_cache(capacity=256)
ids = np.random.default_rng(0).integers(0, 256, (1, 64))
started = time.perf_counter()
model.pipeline.step(cache, ids)
prefill = time.perf_counter() - started
steps = []
for token in range(60):
    started = time.perf_counter()
    model.pipeline.step(cache, np.array([[token]]))
    steps.append(time.perf_counter() - started)
status = open("/proc/self/status").read()
print(json.dumps({
    "load_seconds": loaded,
    "prefill_64_seconds": prefill,
    "decode_ms_median": 1e3 * float(np.median(steps)),
    "decode_ms_quartiles": [1e3 * float(q) for q in np.quantile(steps, [0.25, 0.75])],
    "peak_resident_bytes": int(re.search(r"VmHWM:\\\\s+(\\\\d+)", status)[1]) << 10,
}))
"""


def watched(command: list[str]) -> tuple[float, int, int, str]:
    """Run a command: seconds, peak anonymous and peak resident bytes, what it printed."""
    started = time.perf_counter()
    anonymous = resident = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:  # it has just ended
                break
            for name in ("RssAnon", "VmHWM"):
                match = re.search(rf"{name}:\s+(\d+)", status)
                if match is None:
                    continue
                count = int(match[1]) << 10
                if name == "RssAnon":
                    anonymous = max(anonymous, count)
                else:
                    resident = max(resident, count)
            time.sleep(WATCH_EVERY)
        assert process.stdout is not None
        printed = process.stdout.read()
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - started, anonymous, resident, printed


@click.command()
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", type=int, help="Fewer layers than the model has.")
@click.option("--precision", default="int4", show_default=True)
@click.option("--no-scale-search", is_flag=True, help="As of knnmoe-export.")
@click.option("--threads", default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "large_export.json")
def main(
    name: str,
    folder: Path,
    layers: int | None,
    precision: str,
    no_scale_search: bool,
    threads: int,
    output: Path,
) -> None:
    """Make, export, load and decode NAME in FOLDER."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    folder.mkdir(parents=True, exist_ok=True)
    cut = [] if layers is None else ["--layers", str(layers)]
    make = [sys.executable, str(HERE / "make_checkpoint.py"), name, str(checkpoint), *cut]
    subprocess.run(make, check=True)
    size = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    export = [
        sys.executable, "-c", "from knnmoe.export.cli import main; main()", str(checkpoint),
        str(bundle), "--precision", precision, "--overwrite", "--json",
        *(["--no-scale-search"] if no_scale_search else []),
    ]  # fmt: skip
    seconds, anonymous, resident, printed = watched(export)
    report = json.loads(printed)
    shutil.rmtree(checkpoint)
    decode = [sys.executable, "-c", _DECODE.replace("\\\\", "\\"), str(bundle), str(threads)]
    served = json.loads(subprocess.run(decode, check=True, capture_output=True, text=True).stdout)
    shutil.rmtree(bundle)
    figures: dict[str, Any] = {
        "model": name,
        "layers": layers,
        "precision": precision,
        "scale_search": not no_scale_search,
        "checkpoint_bytes": size,
        "bundle_bytes": report["bytes"],
        "export_seconds": seconds,
        "export_peak_anonymous_bytes": anonymous,
        "export_peak_resident_bytes": resident,
        **served,
        "threads": threads,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
    }
    for key, value in figures.items():
        shown = f"{value / 2**20:,.0f} MiB" if key.endswith("_bytes") else value
        print(f"{key:30} {shown}")
    output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
