"""How commands end: one JSON object or text for a person, and the exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from knnmoe.runtime.cli_support import outcome, print_note, printable, resumable
from knnmoe.runtime.errors import SettingError


def call(work, *, as_json: bool) -> Result:
    @click.command()
    def command() -> None:
        with outcome(as_json) as result:
            work(result)

    return CliRunner().invoke(command)


def succeed(result) -> None:
    print("a library says something")
    result({"entries": 3}, lambda: click.echo("three entries"))


def fail(_result) -> None:
    print("a library says something")
    raise SettingError("k", "out of range", expected="1 to 64", found=99, fix="Choose a smaller K.")


def test_success_for_a_script_is_one_object_on_stdout():
    done = call(succeed, as_json=True)
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"entries": 3}
    assert "a library says something" in done.stderr


def test_success_for_a_person_is_what_the_command_shows():
    done = call(succeed, as_json=False)
    assert done.exit_code == 0
    assert "three entries" in done.stdout
    assert "{" not in done.stdout


def test_a_stated_failure_for_a_script_is_one_object_on_stdout():
    done = call(fail, as_json=True)
    assert done.exit_code == 1
    assert json.loads(done.stdout) == {
        "error": "SettingError", "where": "k", "problem": "out of range", "expected": "1 to 64",
        "found": "99", "fix": "Choose a smaller K.",
    }  # fmt: skip


def test_a_stated_failure_for_a_person_is_on_stderr():
    done = call(fail, as_json=False)
    assert done.exit_code == 1
    assert "error" not in done.stdout
    for part in ("k: out of range", "expected: 1 to 64", "found: 99", "Choose a smaller K."):
        assert part in done.stderr


def test_a_defect_of_ours_is_not_dressed_up():
    def defect(_result) -> None:
        raise ZeroDivisionError

    assert isinstance(call(defect, as_json=True).exception, ZeroDivisionError)


def test_an_interrupt_ends_without_a_traceback():
    def interrupt(_result) -> None:
        raise KeyboardInterrupt

    assert call(interrupt, as_json=False).exit_code == 130


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_sigterm_runs_the_clean_up():
    cleaned = []

    def work(_result) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert call(work, as_json=False).exit_code == 143
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_strangers_text_cannot_drive_the_terminal():
    assert printable("name\x1b[2J\x07 ü\n") == "name\ufffd[2J\ufffd ü\n"


COMPLETION = [sys.executable, "-m", "knnmoe.runtime.cli", "completion", "bash"]


def test_a_reader_that_goes_away_ends_the_command_quietly():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(COMPLETION, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_full_disk_behind_standard_output_is_a_stated_failure(words):
    code = """if True:
        import click
        from knnmoe.runtime.cli_support import CommandLine, outcome
        @click.command(cls=CommandLine)
        @click.option("--json", "as_json", is_flag=True)
        def main(as_json):
            with outcome(as_json) as result:
                result({"n": 1}, lambda: click.echo("1"))
        main()
    """
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", code, *words], stdout=full,
                              stderr=subprocess.PIPE, check=False)  # fmt: skip
    assert done.returncode == 1
    assert b"standard output: cannot be written" in done.stderr
    assert b"Traceback" not in done.stderr


def test_standard_output_that_is_closed_is_no_defect():
    closed = ["sh", "-c", '"$@" >&-', "sh", *COMPLETION]
    done = subprocess.run(closed, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_colours_are_left_out_where_nobody_wants_them(monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("click._compat.isatty", lambda _stream: True)
    print_note("said")
    assert capsys.readouterr().err == "note: said\n"


@pytest.mark.parametrize("begun", [True, False])
def test_what_was_begun_can_be_gone_on_with(begun, tmp_path, capsys):
    if begun:
        (tmp_path / "pack.partial").mkdir()
    with pytest.raises(KeyboardInterrupt), resumable(tmp_path / "pack"):
        raise KeyboardInterrupt
    assert ("again to go on" in capsys.readouterr().err) == begun
