"""The programs as a whole: help pages, exit codes, completion."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from knnmoe.export import cli as export_cli
from knnmoe.runtime import bundle, cli_support
from knnmoe.runtime.cli import main
from knnmoe.runtime.commands.profile_command import ON_RECORDS, ProfileCommand

DOCS = Path(__file__).resolve().parents[2] / "docs"
NOWHERE = "/nonexistent"


def pages(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The words of a command and of those below it."""
    yield words
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from pages(below, (*words, name))
    if isinstance(command, ProfileCommand):
        yield from ((*words, name) for name in ON_RECORDS)


PAGES = [*pages(main, ("knnmoe",)), ("knnmoe-export",)]
GROUPS = [("knnmoe", *words) for words in ((), ("engines",), ("memory",), ("plugin",))]
COMMANDS = [words for words in PAGES if words not in GROUPS]

# What ends each command with a stated failure.
FAILING: dict[tuple[str, ...], list[str]] = {
    ("knnmoe", "chat"): [NOWHERE],
    ("knnmoe", "compare"): [
        NOWHERE, NOWHERE, "--memory", NOWHERE, "--reference", NOWHERE, "--validation", NOWHERE,
        "--text", NOWHERE,
    ],
    ("knnmoe", "doctor"): ["--require", "tensorrt-run"],
    ("knnmoe", "engines", "build"): [NOWHERE],
    ("knnmoe", "engines", "info"): [NOWHERE],
    ("knnmoe", "eval"): [NOWHERE, "--text", NOWHERE],
    ("knnmoe", "generate"): [NOWHERE, "--prompt", "x"],
    ("knnmoe", "memory", "build"): [NOWHERE, NOWHERE, NOWHERE],
    ("knnmoe", "memory", "calibrate"): [
        NOWHERE, NOWHERE, "--domain", NOWHERE, "--general", NOWHERE,
    ],
    ("knnmoe", "memory", "compress"): [NOWHERE, NOWHERE],
    ("knnmoe", "memory", "inspect"): [NOWHERE],
    ("knnmoe", "plugin", "build"): ["--tensorrt-root", NOWHERE, "--output", "/nonexistent/library"],
    ("knnmoe", "plugin", "check"): [NOWHERE],
    ("knnmoe", "profile"): [NOWHERE],
    ("knnmoe", "profile", "compare"): [NOWHERE, NOWHERE],
    ("knnmoe", "profile", "show"): [NOWHERE],
    ("knnmoe", "trace"): [NOWHERE, "--prompt-file", NOWHERE],
    ("knnmoe-export",): [NOWHERE, NOWHERE],
}  # fmt: skip
# These have nothing to fail at.
NEVER_FAIL = {("knnmoe", "completion"), ("knnmoe", "plugin", "info")}


def run(words: tuple[str, ...], *arguments: str, **options: Any) -> Result:
    program = main if words[0] == "knnmoe" else export_cli.main
    return CliRunner().invoke(program, [*words[1:], *arguments], prog_name=words[0], **options)


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_a_help_page_fits_a_terminal_and_gives_an_example(words: tuple[str, ...]) -> None:
    page = run(words, "--help", terminal_width=80)
    assert page.exit_code == 0
    assert page.stdout.startswith(f"Usage: {' '.join(words)} ")
    assert max(map(len, page.stdout.splitlines())) <= 80
    example = page.stdout[page.stdout.index("Example") :]
    assert f"  {' '.join(words)}" in example or f' "$({" ".join(words)}' in example
    if words in COMMANDS and words != ("knnmoe", "completion"):
        assert "\n  --json " in page.stdout


def test_no_help_page_imports_anything_heavy() -> None:
    code = (
        "import sys, click\n"
        "from knnmoe.runtime.cli import main\n"
        "from knnmoe.export.cli import main as export\n"
        f"for words in {[words[1:] for words in PAGES if words[0] == 'knnmoe']!r}:\n"
        "    main([*words, '--help'], standalone_mode=False)\n"
        "export(['--help'], standalone_mode=False)\n"
        "heavy = {'numpy', 'onnxruntime', 'rich', 'tokenizers', 'torch', 'transformers', 'onnx',\n"
        "         'onnx_ir', 'safetensors', 'jinja2', 'cupy', 'faiss'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_choices_of_the_exporter_named_twice_agree() -> None:
    assert export_cli.PRECISIONS == bundle.PRECISIONS
    assert export_cli.BLOCK_SIZES == bundle.BLOCK_SIZES


def test_every_command_has_its_failure_in_the_table() -> None:
    assert set(FAILING) | NEVER_FAIL == set(COMMANDS)


# Slow because of what it looks for; tests of its own have it fail too.
LOOKING = pytest.param(("knnmoe", "doctor"), marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "words", [LOOKING if words[1:] == ("doctor",) else words for words in FAILING], ids=str
)
def test_a_stated_failure_ends_with_one(words: tuple[str, ...]) -> None:
    shown = run(words, *FAILING[words])
    assert shown.exit_code == 1, shown.output
    assert "error: " in shown.stderr or words == ("knnmoe", "doctor")
    as_json = run(words, *FAILING[words], "--json")
    assert as_json.exit_code == 1, as_json.output
    if words != ("knnmoe", "doctor"):  # which prints all that it found
        assert {"error", "where", "problem", "fix"} <= set(json.loads(as_json.stdout))


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_wrong_usage_ends_with_two(words: tuple[str, ...]) -> None:
    shown = run(words, "--no-such-option")
    assert shown.exit_code == 2
    assert shown.stdout == ""
    assert "No such option" in shown.stderr
    assert "Traceback" not in shown.stderr
    as_json = run(words, "--no-such-option", "--json")
    assert as_json.exit_code == 2
    path = " ".join(words)
    assert json.loads(as_json.stdout) == {
        "error": "UsageError", "where": path, "expected": None, "found": None,
        "problem": json.loads(as_json.stdout)["problem"], "fix": f"See `{path} --help`.",
    }  # fmt: skip
    assert "--no-such-option" in as_json.stdout


@pytest.mark.parametrize("words", FAILING, ids=" ".join)
def test_an_interrupt_ends_with_130(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def pressed() -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(cli_support, "_clean_termination", pressed)
    done = run(words, *FAILING[words])
    assert (done.exit_code, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("program", [main, export_cli.main], ids=["knnmoe", "knnmoe-export"])
def test_an_interrupt_before_a_command_begins_ends_with_130(
    program: click.Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "parse_args", pressed)
    done = CliRunner().invoke(program, [])
    assert (done.exit_code, done.stderr.strip()) == (130, "interrupted")


def test_a_program_without_words_shows_what_there_is_and_ends_with_two() -> None:
    shown = run(("knnmoe",))
    assert shown.exit_code == 2
    assert "Commands:" in shown.stderr
    assert json.loads(run(("knnmoe", "memory"), "--json").stdout)["error"] == "UsageError"


def test_the_exit_codes_stand_in_the_help_and_in_the_docs() -> None:
    stated = cli_support.EXIT_CODES.removeprefix("\b\n")
    for words in (("knnmoe",), ("knnmoe-export",)):
        page = run(words, "--help", terminal_width=80).stdout
        assert [line.strip() for line in stated.splitlines()] == [
            line.strip() for line in page.splitlines()[-len(stated.splitlines()) :]
        ]
    if DOCS.is_dir():
        text = (DOCS / "api.md").read_text(encoding="utf-8")
        for code in ("0", "1", "2", "130", "141", "143"):
            assert f"\n| {code} |" in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_both_programs(shell: str) -> None:
    done = run(("knnmoe", "completion"), shell)
    assert done.exit_code == 0
    for part in ("_KNNMOE_COMPLETE", "_KNNMOE_EXPORT_COMPLETE", f"{shell}_complete"):
        assert part in done.stdout
    assert run(("knnmoe", "completion"), "powershell").exit_code == 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("knnmoe ge", ["generate"]),
        ("knnmoe memory c", ["calibrate", "compress"]),
        ("knnmoe generate bundle --la", ["--layout"]),
        ("knnmoe generate bundle --layout f", ["fused"]),
        ("knnmoe profile com", ["compare"]),
        ("knnmoe profile compare before.json --fa", ["--fail-above"]),
    ],
)
def test_completion_knows_commands_options_and_choices(line: str, expected: list[str]) -> None:
    words = line.split()
    environment = {
        **os.environ,
        "_KNNMOE_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "from knnmoe.runtime.cli import main; main(prog_name='knnmoe')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [entry.split(",")[1] for entry in done.stdout.split()] == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_reads_the_script() -> None:
    script = run(("knnmoe", "completion"), "bash").stdout
    done = subprocess.run(
        ["bash", "-c", script + "\ncomplete -p knnmoe knnmoe-export"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="the harness is there")
def test_without_the_harness_the_evaluation_says_what_to_install() -> None:
    command = [sys.executable, "-m", "knnmoe.runtime.lm_eval_model", "--tasks", "any"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "lm_eval: needs the package lm_eval, which is not installed" in done.stderr
    assert "Traceback" not in done.stderr
