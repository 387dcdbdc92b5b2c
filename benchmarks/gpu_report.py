"""From records to verdicts, a text for the terminal and a file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from gpu_timing import TWO_STAGE

SCHEMA = "knnmoe.gpu_check/1"
TARGET_SHARE = 0.70  # of the copy bandwidth, decoding one token over a large fp16 memory
TARGET_TWO_STAGE = 0.60  # of the time of fp16
LARGE, HIDDEN = 100_000, 2048
CORRECTNESS_STAGES = ("correctness", "plugin", "sanitizer", "tensorrt")
TIMING_STAGES = ("decode", "prefill", "torch", "faiss-gpu", "cuvs")

Records = dict[str, Any]


def exit_code(report: Records) -> int:
    """1 if anything that was computed is wrong, or a check of it hung or had no time; else 0.

    compute-sanitizer slows kernels a hundred times: a tool that did not finish says nothing.
    """
    bad = dict.fromkeys(CORRECTNESS_STAGES, ("failed", "not finished"))
    bad["sanitizer"] = ("failed", "failed")
    stages = report["stages"]
    return int(any(stages[name]["status"] in bad[name] for name in bad if name in stages))


def rows(report: Records, stage: str) -> list[Records]:
    """The measured rows of a stage; none if it was not run."""
    found: list[Records] = report["stages"].get(stage, {}).get("rows", [])
    return found


def finish(report: Records) -> Records:
    """The report with the share of the bandwidth in every row, and its verdicts."""
    copy = report["stages"].get("bandwidth", {}).get("copy_gb_s")
    for row in rows(report, "decode"):
        for kind in ("warm", "cold"):
            gb_s = row["key_bytes"] / row[kind]["median_us"] / 1e3
            row[kind]["gb_s"] = gb_s
            row[kind]["share_of_copy"] = gb_s / copy if copy else None
    for row in rows(report, "prefill"):
        operations = 2.0 * row["tokens"] * row["entries"] * row["hidden"]
        row["warm"]["tflop_s"] = operations / row["warm"]["median_us"] / 1e6
    return {**report, "verdicts": verdicts(report)}


def verdicts(report: Records) -> list[Records]:
    """Each target: met, missed, or not measured and why."""
    return [
        _bandwidth_verdict(report),
        *(_rival_verdict(report, stage, kind) for stage, kind in _RIVALS),
        _two_stage_verdict(report),
    ]


_RIVALS = (("torch", "warm"), ("torch", "call"), ("faiss-gpu", "call"), ("cuvs", "call"))


def _verdict(name: str, target: str, values: dict[str, float], met: bool, why: str) -> Records:
    status = "not measured" if not values else "met" if met else "missed"
    return {
        "name": name,
        "target": target,
        "status": status,
        "values": values,
        **({} if values else {"why": why}),
    }


def _bandwidth_verdict(report: Records) -> Records:
    shares = {
        f"N={row['entries']}": row["warm"]["share_of_copy"]
        for row in _decode(report, "f16", "knnmoe", "decode")
        if row["entries"] >= LARGE and row["warm"].get("share_of_copy") is not None
    }
    return _verdict(
        "decode, share of the copy bandwidth (D=2048, fp16, one token, from N=100k)",
        f"at least {TARGET_SHARE:.0%}",
        shares,
        all(share >= TARGET_SHARE for share in shares.values()),
        _why_missing(report, "decode", "bandwidth"),
    )


def _rival_verdict(report: Records, stage: str, kind: str) -> Records:
    ours = {row["entries"]: row for row in _decode(report, "f16", "knnmoe", "decode")}
    ratios = {
        f"N={row['entries']}": row[kind]["median_us"] / ours[row["entries"]][kind]["median_us"]
        for row in _decode(report, "f16", stage, stage)
        if row["entries"] in ours and kind in row
    }
    how = {"warm": "as CUDA graphs", "call": "called from Python"}[kind]
    return _verdict(
        f"one token against {stage}, {how} (D=2048, fp16), times faster",
        "more than 1",
        ratios,
        all(ratio > 1 for ratio in ratios.values()),
        _why_missing(report, stage, "decode"),
    )


def _two_stage_verdict(report: Records) -> Records:
    plain = {row["entries"]: row for row in _decode(report, "f16", "knnmoe", "decode")}
    ratios = {
        f"N={row['entries']}": row["warm"]["median_us"] / plain[row["entries"]]["warm"]["median_us"]
        for row in _decode(report, TWO_STAGE, "knnmoe", "decode")
        if row["entries"] in plain and row["entries"] >= LARGE
    }
    return _verdict(
        "two-stage search, int8 then fp16, share of the time of fp16 alone (from N=100k)",
        f"at most {TARGET_TWO_STAGE:.0%}",
        ratios,
        all(ratio <= TARGET_TWO_STAGE for ratio in ratios.values()),
        _why_missing(report, "decode"),
    )


def _decode(report: Records, key_type: str, host: str, stage: str) -> list[Records]:
    return [
        row
        for row in rows(report, stage)
        if (row["host"], row["hidden"], row["tokens"], row["key_type"])
        == (host, HIDDEN, 1, key_type)
    ]


def _why_missing(report: Records, *stages: str) -> str:
    for name in stages:
        stage = report["stages"].get(name)
        if stage is None:
            return f"stage {name} was not run"
        if stage["status"] != "done":
            return f"stage {name}: {stage['status']}, {stage.get('why', 'see its traceback')}"
    return "no row of that size; see left_out"


# --- text


def summarize(report: Records) -> str:
    """What is said at the end: device, times, targets; stages were described one by one."""
    parts = [_environment(report)]
    parts += [_timings(report, name) for name in TIMING_STAGES if rows(report, name)]
    parts.append(_verdicts(report["verdicts"]))
    return "\n\n".join(part for part in parts if part)


def _environment(report: Records) -> str:
    stage = report["stages"].get("environment", {})
    if stage.get("status") != "done":
        return ""
    device = stage["device"]
    lines = [
        f"{device['name']} (compute capability {device['compute_capability']}, "
        f"{device['multiprocessors']} SMs, {device['memory_bytes'] / 2**30:.0f} GiB, "
        f"L2 {device['l2_bytes'] / 2**20:.0f} MiB)",
        f"driver {stage['driver']}, CUDA {stage['driver_cuda']}; commit {stage['commit']}, "
        f"kernels {stage['sources']}; seed {report['seed']}",
    ]
    for name, package in stage["packages"].items():
        said = package.get("version") or package["status"]
        lines.append(f"  {name:16} {said}{': ' + package['why'] if 'why' in package else ''}")
    return "\n".join(lines)


def describe_stage(name: str, stage: Records) -> str:
    """How one stage went."""
    lines = [f"[{stage['status']}] {name} ({stage.get('seconds', 0):.0f} s)"]
    if "why" in stage:
        lines.append(f"  {stage['why']}")
    if "copy_gb_s" in stage:
        lines.append(
            f"  copy {stage['copy_gb_s']:.0f} GB/s, read {stage['read_gb_s']:.0f} GB/s "
            f"({stage['bytes'] / 2**20:.0f} MiB)"
        )
    for host, record in stage.get("hosts", {}).items():
        lines.append(_host(host, record))
        for failure in record.get("failures", [])[:2]:
            lines.append(f"    seed {failure['seed']}: {failure['case']}")
            lines.append("      " + failure["error"].strip()[:600].replace("\n", "\n      "))
    for tool, record in stage.get("tools", {}).items():
        said = "; ".join(record.get("summary", [])) or record.get("why", "")
        lines.append(f"  [{record['status']}] {tool}: {said}")
        if record["status"] == "failed":
            lines.append("    " + record.get("output", "")[:1500].replace("\n", "\n    "))
    if "traceback" in stage:
        lines.append("  " + stage["traceback"].strip()[-1500:].replace("\n", "\n  "))
    lines += [f"  not measured: {left}" for left in _grouped(stage.get("left_out", []))]
    return "\n".join(lines)


def _host(host: str, record: Records) -> str:
    if "why" in record:
        return f"  [{record['status']}] {host}: {record['why']}"
    worst = {
        key_type: max((v for k, v in errors.items() if k != "rounding_of_keys"), default=0.0)
        for key_type, errors in record.get("largest_deviation", {}).items()
    }
    said = ", ".join(f"{key_type} {error:.1e}" for key_type, error in worst.items())
    more = "" if record.get("all_cases", True) else ", out of time before the last"
    wrong = f", {len(record['failures'])} WRONG" if record.get("failures") else ""
    return f"  [{record['status']}] {host}: {record['cases']} cases{wrong}{more}; largest {said}"


def _grouped(left_out: list[Records]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for left in left_out:
        tokens = f" T={left['tokens']}" if "tokens" in left else ""
        what = f"N={left['entries']} D={left['hidden']} {left['key_type']}{tokens}"
        by_reason.setdefault(left["why"], []).append(what)
    return [
        f"{len(whats)} ({why}): {', '.join(whats[:4])}{', …' if len(whats) > 4 else ''}"
        for why, whats in by_reason.items()
    ]


_COLUMNS = ("host", "N", "D", "T", "keys", "warm µs (iqr)", "cold µs", "call µs", "GB/s", "of copy",
            "agree")  # fmt: skip


def _timings(report: Records, stage: str) -> str:
    table = [_COLUMNS]
    for row in rows(report, stage):
        if row["hidden"] != HIDDEN:
            continue  # they are in the file
        warm = row.get("warm", {})
        share = warm.get("share_of_copy")
        gb_s = f"{warm['gb_s']:.0f}" if "gb_s" in warm else ""
        if "tflop_s" in warm:
            gb_s = f"{warm['tflop_s']:.0f} TFLOP/s"
        spread = f" ({warm['q3_us'] - warm['q1_us']:.1f})" if warm else ""
        table.append(
            (
                row["host"],
                f"{row['entries']:,}",
                str(row["hidden"]),
                str(row["tokens"]),
                row["key_type"],
                f"{warm['median_us']:.1f}{spread}" if warm else "–",
                f"{row['cold']['median_us']:.1f}" if "cold" in row else "–",
                f"{row['call']['median_us']:.1f}" if "call" in row else "–",
                gb_s,
                f"{share:.0%}" if share is not None else "",
                f"{row['agreement']:.3f}" if "agreement" in row else "",
            )
        )
    used = [i for i in range(len(_COLUMNS)) if any(line[i] for line in table[1:])]
    widths = {i: max(len(line[i]) for line in table) for i in used}
    text = [f"{stage} (D={HIDDEN}; all figures are in the file):"]
    for line in table:
        cells = [
            line[i].ljust(widths[i]) if i in (0, 4) else line[i].rjust(widths[i]) for i in used
        ]
        text.append("  " + "  ".join(cells).rstrip())
    return "\n".join(text)


def _verdicts(found: list[Records]) -> str:
    lines = ["Targets:"]
    for verdict in found:
        values = ", ".join(f"{name} {value:.2f}" for name, value in verdict["values"].items())
        said = values or verdict["why"]
        lines.append(
            f"  [{verdict['status']}] {verdict['name']}: {said} (target: {verdict['target']})"
        )
    return "\n".join(lines)


def default_path(folder: Path, device: str) -> Path:
    """Where the report of a device goes."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unknown"
    return folder / f"gpu_check-{slug}.json"


def write(report: Records, path: Path) -> None:
    """Write the report whole, or leave what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)
