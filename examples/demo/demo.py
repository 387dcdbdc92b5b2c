"""The whole path on the demo model, by the commands a user would type; ends with a table.

Exports the model at its gates, builds a memory for a domain it knows badly, calibrates it on
validation text, and measures on test text that chose nothing: what the memory gains in its domain,
what it changes outside of it, and what each gate costs.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from knnmoe.runtime.profiling.figures import frozen_twin, gate_share
from knnmoe.runtime.profiling.intervals import median
from knnmoe.runtime.profiling.record import ProfileRecord, from_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SCRIPTS = Path(sys.executable).parent
PROMPTS = {
    "scripture": "And it came to pass in those days, that",
    "finnish": "Vaka vanha Väinämöinen",
}

console = Console(highlight=False)


@click.command()
@click.option("--texts", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "build" / "demo")
@click.option("--domain", "domains", multiple=True, type=click.Choice(list(PROMPTS)),
              default=("scripture",), show_default=True, help="May be given twice.")  # fmt: skip
def main(texts: Path, out: Path, domains: tuple[str, ...]) -> None:
    """Run the demo; --texts is what texts.py wrote."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    model, bundle = HERE / "model", out / "bundle"

    say("1. Export: the model is split at its gates into ONNX segments, and compared with torch.")
    exported = run("knnmoe-export", model, bundle, "--verify", "--overwrite")

    results: dict[str, tuple[dict[str, Any], ...]] = {}
    for domain in domains:
        say(f"2. Memory for '{domain}': routing logits learned on reference text, weights frozen.")
        pack, text = out / f"memory-{domain}", texts / domain
        built = run("knnmoe", "memory", "build", model, text / "reference.jsonl", pack, *BUILD)
        say(f"3. Calibration of '{domain}' on validation text of the domain and of general text.")
        general = texts / "general"
        held_out = ["--domain", text / HELD_OUT, "--general", general / HELD_OUT]
        run("knnmoe", "memory", "calibrate", bundle, pack, *held_out, *CALIBRATE)
        say(f"4. Test text of '{domain}', and general test text; neither has chosen anything.")
        inside = evaluate(bundle, pack, text / "test.jsonl")
        outside = evaluate(bundle, pack, general / "test.jsonl")
        results[domain] = (built, inside, outside)

    say("5. What a gate costs: a decode step, part by part.")
    pack = out / f"memory-{domains[0]}"
    profile = from_json(run("knnmoe", "profile", bundle, "--memory", pack))

    for domain in domains:
        say(f"A sample with the memory of '{domain}' (expect the style of 3 million weights).")
        pack, sampling = out / f"memory-{domain}", ("--seed", "1", "--max-new-tokens", "60")
        written = run(
            "knnmoe", "generate", bundle, "--memory", pack, "--prompt", PROMPTS[domain], *sampling
        )
        console.print(f"   [dim]{PROMPTS[domain]}[/][cyan]{written['text']}[/]")

    console.print()
    console.print("Change of the negative log-likelihood, nats a token (95 % interval):")
    console.print(gains(results))
    console.print(f"A decode step with the memory of '{domains[0]}', median milliseconds:")
    console.print(costs(profile))
    loaded = profile.points[0]
    share = gate_share(loaded, frozen_twin(loaded, profile.points))
    console.print(f"Retrieval takes {share:.0%} of it: the model is tiny and its memory is not.")
    minutes = (time.monotonic() - started) / 60
    error = exported["max_abs_error"]
    console.print(f"Largest logit error against torch: {error:.1e}. All in {minutes:.1f} min.\n")
    console.print(NEXT.format(bundle=bundle.relative_to(ROOT)), soft_wrap=True)


# Enough to show it; `--max-tokens` left out takes all there is, and gains more.
BUILD = ("--max-tokens", "20000", "--overwrite")
CALIBRATE = ("--max-tokens", "6000")
TEST = ("--max-tokens", "40000")
HELD_OUT = "validation.jsonl"

NEXT = """[bold]Next, with a checkpoint and text of your own[/]:
  knnmoe-export --list-families
  knnmoe-export CHECKPOINT my-bundle --verify
  knnmoe memory build CHECKPOINT my-domain.txt my-memory
  knnmoe memory calibrate my-bundle my-memory --domain held-out.txt --general general.txt
  knnmoe generate my-bundle --memory my-memory --prompt "..."
or look at what the demo made:
  .venv/bin/knnmoe trace {bundle} --memory build/demo/memory-scripture --prompt "In the beginning"
  .venv/bin/knnmoe memory inspect build/demo/memory-scripture"""


def say(text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


def run(command: str, *arguments: object) -> dict[str, Any]:
    """Run one of our commands with `--json`; its progress is shown, its result returned."""
    line = [command, *(str(argument) for argument in arguments)]
    shown = [str(Path(a).relative_to(ROOT)) if a.startswith(str(ROOT)) else a for a in line]
    console.print(f"[green]$ {shlex.join(shown)}[/]", soft_wrap=True)
    line = [str(SCRIPTS / command), *line[1:], "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    result: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
    if done.returncode != 0:
        console.print(f"[red]{command} failed (exit code {done.returncode})[/] {result}")
        sys.exit(1)
    return result


def evaluate(bundle: Path, pack: Path, text: Path) -> dict[str, Any]:
    return run("knnmoe", "eval", bundle, "--memory", pack, "--text", text, *TEST)


def gains(results: dict[str, tuple[dict[str, Any], ...]]) -> Table:
    table = Table()
    for name in ("memory of", "entries a gate", "measured on", "frozen", "with memory", "change"):
        table.add_column(name, justify="left" if name in ("memory of", "measured on") else "right")
    for domain, (built, inside, outside) in results.items():
        for first, (where, found) in enumerate(((domain, inside), ("general", outside))):
            change = "{delta:+.4f} [{delta_low:+.4f}, {delta_high:+.4f}]".format(**found)
            nlls = (f"{found[key]:.4f}" for key in ("nll_frozen", "nll_memory"))
            named = (domain, f"{built['entries']:,}") if not first else ("", "")
            table.add_row(*named, f"{where}, test", *nlls, change)
    return table


def costs(profile: ProfileRecord) -> Table:
    table = Table()
    table.add_column("part")
    table.add_column("ms", justify="right")
    decode = profile.points[0]
    for part in decode.parts[:-1]:  # the last is what the runtime takes around them
        table.add_row(part.name, f"{median(part.ms):.3f}")
    table.add_section()
    table.add_row("whole step", f"{median(decode.whole_ms):.3f}", style="bold")
    return table


if __name__ == "__main__":
    main()
