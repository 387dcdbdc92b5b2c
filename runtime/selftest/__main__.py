"""`python -m knnmoe.runtime.selftest`."""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from ..cli_support import EXIT_CODES, CommandLine, outcome
from ..commands.common import PATH, json_option, output
from ..errors import KnnMoeError, VerificationError

EPILOG = f"""\b
Examples:
  python -m knnmoe.runtime.selftest
  python -m knnmoe.runtime.selftest --bundle my-bundle --memory my-memory

{EXIT_CODES}"""


@click.command(
    "selftest",
    cls=CommandLine,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--bundle", type=PATH, metavar="BUNDLE",
              help="Check with this bundle instead of the tiny one of the self-test.")  # fmt: skip
@click.option("--memory", type=PATH, metavar="PACK",
              help="A memory of that bundle, besides random ones.")  # fmt: skip
@json_option
def main(bundle: Path | None, memory: Path | None, as_json: bool) -> None:
    """Check that knnmoe computes on this machine what it should.

    Routing rules and blends are compared with numbers worked out by hand, a tiny model with what
    transformers computes, every gate that runs here with NumPy; changed files have to be noticed,
    the same seed has to give the same text. Needs neither torch nor onnx. GPUs are not looked at:
    for these there is `benchmarks/gpu_check.py`.
    """
    with outcome(as_json) as result:
        if memory is not None and bundle is None:
            raise click.UsageError("--memory needs the --bundle that it belongs to.")
        results = run(bundle, memory)
        failed = [name for name, entry in results.items() if entry["result"] == "failed"]
        if failed and as_json:
            raise VerificationError(
                "self-test",
                f"failed: {', '.join(failed)}",
                found="; ".join(f"{name}: {results[name]['detail']}" for name in failed),
                fix="Run it without --json for the whole table.",
            )
        result({"checks": results}, lambda: _show(results))
        if failed:
            raise VerificationError("self-test", f"failed: {', '.join(failed)}")


def run(bundle: Path | None = None, memory: Path | None = None) -> dict[str, dict[str, Any]]:
    """Make all checks: by name `result` (`ok`, `failed` or `skipped`), `detail` and `seconds`.

    Raises:
        BundleError, MemoryPackError: If what was given cannot be opened.
    """
    from .checks import CHECKS, HERE, Bench, NotHere

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(bundle or HERE / "bundle", bundle is None, Path(folder), memory)
        if not bench.shipped:
            bench.opened, bench.memory  # noqa: B018 - what is given has to be right
        for name, check in CHECKS.items():
            start = perf_counter()
            try:
                outcome_of, detail = "ok", check(bench)
            except NotHere as reason:
                outcome_of, detail = "skipped", str(reason)
            except KnnMoeError as error:
                outcome_of, detail = "failed", str(error)
            except Exception as error:  # whatever goes wrong here, the other checks are made too
                outcome_of, detail = "failed", traceback.format_exception_only(error)[-1].strip()
            seconds = perf_counter() - start
            results[name] = {"result": outcome_of, "detail": detail, "seconds": seconds}
    return results


def _show(results: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "failed": "bold red", "skipped": "dim"}
    table = Table(box=None, pad_edge=False)
    for column in ("check", "result", "", "s"):
        table.add_column(column, justify="right" if column == "s" else "left")
    for name, entry in results.items():
        shown = Text(entry["result"], style=styles[entry["result"]])
        table.add_row(name, shown, Text(entry["detail"]), f"{entry['seconds']:.1f}")
    output().print(table)


if __name__ == "__main__":
    main(prog_name="python -m knnmoe.runtime.selftest")
