"""A few small cases under compute-sanitizer, tool by tool."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_tally import Absent

LEAST_SECONDS = 5.0
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY:\s*(.*)")


def find_sanitizer() -> str:
    """compute-sanitizer of PATH, of CUDA_HOME or of the usual place.

    Raises:
        Absent: If there is none.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders)
    )
    if found is None:
        raise Absent("compute-sanitizer is neither on PATH nor in CUDA_HOME")
    return found


def sanitize(subset: list[str], deadline: float) -> dict[str, Any]:
    """Run a command of ours under every tool; each has an equal share of the time left.

    Args:
        subset: Arguments of a Python program that runs few cases.
        deadline: When to end, by `time.monotonic()`.
    """
    try:
        sanitizer = find_sanitizer()
    except Absent as reason:
        return {"status": "absent", "why": str(reason)}
    tools: dict[str, Any] = {}
    for position, tool in enumerate(TOOLS):
        share = max(LEAST_SECONDS, (deadline - time.monotonic()) / (len(TOOLS) - position))
        tools[tool] = _run(sanitizer, tool, subset, share)
    states = {tool["status"] for tool in tools.values()}
    worst = next((s for s in ("failed", "not finished") if s in states), "passed")
    return {"status": worst, "sanitizer": sanitizer, "tools": tools}


def _run(sanitizer: str, tool: str, subset: list[str], seconds: float) -> dict[str, Any]:
    command = [sanitizer, f"--tool={tool}", "--print-limit=20", sys.executable, *subset]
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        # In a session of its own: the program that a tool watches would outlive the tool, and be
        # on the device beside the next one.
        tool_run = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = tool_run.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(tool_run.pid, signal.SIGKILL)
            tool_run.wait()
        output.seek(0)
        said = output.read().decode(errors="replace")
    if code is None:
        return {
            "status": "not finished",
            "why": f"stopped after {seconds:.0f} seconds",
            "output": said[-3000:],
        }
    return {
        **read_summary(said, code),
        "seconds": time.monotonic() - start,
        "cases": _cases(said),
    }


def read_summary(output: str, returncode: int) -> dict[str, Any]:
    """What a tool found: its summary lines, and whether all of them say zero."""
    summaries = [found[1].strip() for found in _SUMMARY.finditer(output)]
    clean = bool(summaries) and all(_is_zero(summary) for summary in summaries)
    record: dict[str, Any] = {
        "status": "passed" if clean and returncode == 0 else "failed",
        "summary": summaries,
        "exit_code": returncode,
    }
    if record["status"] == "failed":
        marked = [line for line in output.splitlines() if line.startswith("=========")]
        record["output"] = "\n".join(marked[:60]) if marked else output[-3000:]
        record["end_of_output"] = output[-1500:]
    return record


def _is_zero(summary: str) -> bool:
    """Whether "0 errors" or "0 hazards displayed (0 errors, 0 warnings)" and no more."""
    return all(int(number) == 0 for number in re.findall(r"\d+", summary))


def _cases(output: str) -> int | None:
    found = re.search(r"^subset: (\d+) cases", output, re.MULTILINE)
    return int(found[1]) if found else None
