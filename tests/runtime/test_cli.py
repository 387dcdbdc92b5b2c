"""The commands as a user runs them, over a tiny exported model with a random memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from rich.table import Table

from knnmoe import __version__
from knnmoe.runtime.calibration import VARIANTS
from knnmoe.runtime.cli import LazyGroup, main
from knnmoe.runtime.commands import common
from knnmoe.runtime.device.resident import KEY_DTYPES
from knnmoe.runtime.devices import DEVICES
from knnmoe.runtime.gates.select import BACKENDS
from knnmoe.runtime.host import LAYOUTS
from knnmoe.runtime.model import Model


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Path:
    return tiny_bundle


@pytest.fixture(scope="module")
def pack(tiny_pack: Path) -> Path:
    return tiny_pack


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "test.jsonl"
    documents = ["The quick brown fox", "jumps over the lazy dog", "é" * 90]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def ok(*arguments: object, stdin: bytes | None = None) -> str:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def ok_json(*arguments: object) -> dict[str, Any]:
    """The object printed with --json; anything else on standard output fails the parser."""
    figures = json.loads(ok(*arguments, "--json"), parse_constant=pytest.fail)
    assert isinstance(figures, dict)
    return figures


def refused(*arguments: object, code: int = 1, stdin: bytes | None = None) -> str:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    return " ".join(result.stderr.split())


# generate


def test_the_text_is_that_of_the_model(bundle: Path, pack: Path) -> None:
    expected = Model.load(bundle, memory=pack).generate("hello", max_new_tokens=12)
    options = ("--memory", pack, "--prompt", "hello", "--max-new-tokens", 12)
    assert ok("generate", bundle, *options) == expected.text + "\n"
    figures = ok_json("generate", bundle, *options)
    assert figures["text"] == expected.text
    assert figures["token_ids"] == list(expected.token_ids)
    assert figures["finish_reason"] == expected.finish_reason == "length"
    assert figures["prompt_tokens"] == 5
    assert figures["new_tokens"] == len(figures["logprobs"]) == 12
    assert figures["first_token_ms"] > 0


def test_the_memory_and_its_settings_reach_the_model(bundle: Path, pack: Path) -> None:
    def logprobs(*options: object) -> list[float]:
        command = ("generate", bundle, "--prompt", "hello", "--max-new-tokens", 3, *options)
        return list(ok_json(*command)["logprobs"])

    frozen, memory = logprobs(), logprobs("--memory", pack)
    assert memory != frozen
    assert logprobs("--memory", pack, "--scale", 0) == frozen
    assert logprobs("--memory", pack, "--neighbors", 1) != memory
    assert logprobs("--memory", pack, "--variant", "logits") != memory
    assert logprobs("--memory", pack, "--layout", "fused", "--threads", 1) == pytest.approx(
        memory, abs=1e-4
    )
    for gate in ("numpy", "two-stage"):
        assert logprobs("--memory", pack, "--gate", gate) == pytest.approx(memory, abs=1e-4)


def test_sampling_is_turned_on_by_its_options_and_fixed_by_the_seed(bundle: Path) -> None:
    command = ("generate", bundle, "--prompt", "hello", "--max-new-tokens", 20)
    greedy = ok_json(*command)["token_ids"]
    seeded = ok_json(*command, "--seed", 3)["token_ids"]
    assert ok_json(*command, "--greedy")["token_ids"] == greedy
    assert ok_json(*command, "--seed", 3)["token_ids"] == seeded != greedy
    assert ok_json(*command, "--top-k", 1)["token_ids"] == greedy
    assert ok_json(*command, "--temperature", 0.001)["token_ids"] == greedy
    assert ok_json(*command, "--top-p", 0.0)["token_ids"] == greedy


def test_a_stop_string_ends_the_text(bundle: Path) -> None:
    command = ("generate", bundle, "--prompt", "hello", "--max-new-tokens", 12)
    text = ok_json(*command)["text"]
    stop = text[3:5]
    figures = ok_json(*command, "--stop", "never to be seen", "--stop", stop)
    assert figures["text"] == text[: text.index(stop)]
    assert figures["finish_reason"] == "stop"


def test_a_prompt_may_come_from_a_file_or_standard_input(bundle: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes("hé".encode())
    command = ("generate", bundle, "--max-new-tokens", 4)
    expected = ok(*command, "--prompt", "hé")
    assert ok(*command, "--prompt-file", prompt) == expected
    assert ok(*command, "--prompt-file", "-", stdin="hé".encode()) == expected


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--prompt", ""], "--prompt: empty"),
        (["--prompt", "x" * 128], "too long for this model's context"),
        (["--prompt-file", "-"], "standard input, line 1: not UTF-8"),
        (["--prompt-file", "/nonexistent/file"], "/nonexistent/file: cannot be read"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens: out of range"),
        (["--prompt", "x", "--temperature", "0"], "turn sampling off (greedy)"),
        (["--prompt", "x", "--temperature", "nan"], "temperature: out of range"),
        (["--prompt", "x", "--top-p", "1.5"], "top_p: out of range"),
        (["--prompt", "x", "--top-k", "-1"], "top_k: out of range"),
        (["--prompt", "x", "--seed", "-1"], "seed: out of range"),
        (["--prompt", "x", "--stop", ""], "stop: not a stop string"),
        (["--prompt", "x", "--threads", "0"], "threads: out of range"),
        (["--prompt", "x", "--gate", "cuda"], "gate: no backend of the CPU"),
        (["--prompt", "x", "--neighbors", "3"], "--neighbors: needs a memory"),
        (["--prompt", "x", "--memory", "/nonexistent"], "not a memory pack"),
    ],
)
def test_bad_input_is_refused_by_name(bundle: Path, options: list[str], named: str) -> None:
    assert named in refused("generate", bundle, *options, stdin=b"\xff")


@pytest.mark.parametrize(
    ("command", "options", "named"),
    [
        ("generate", ["--neighbors", "0"], "K out of range"),
        ("generate", ["--neighbors", "65"], "K out of range"),
        ("generate", ["--scale", "1.5"], "calibration.scale: out of range"),
        ("generate", ["--scale", "-0.1"], "calibration.scale: out of range"),
        ("generate", ["--scale", "nan"], "calibration.scale: out of range"),
        ("trace", ["--neighbors", "0"], "K out of range"),
        ("eval", ["--neighbors", "0"], "K out of range"),
        ("profile", ["--neighbors", "0"], "K out of range"),
    ],
)
def test_settings_of_the_memory_out_of_range_are_refused(
    bundle: Path, pack: Path, text: Path, command: str, options: list[str], named: str
) -> None:
    needed = {"eval": ["--text", text], "profile": []}.get(command, ["--prompt", "x"])
    assert named in refused(command, bundle, "--memory", pack, *needed, *options)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "BUNDLE"],
        ["generate", "BUNDLE", "--prompt", "x", "--prompt-file", "y"],
        ["generate", "BUNDLE", "--prompt", "x", "--greedy", "--temperature", "1"],
        ["generate", "BUNDLE", "--prompt", "x", "--layout", "sideways"],
        ["generate", "BUNDLE", "--prompt", "x", "--top-k", "many"],
        ["eval", "BUNDLE"],
        ["trace", "BUNDLE"],
        ["profile", "BUNDLE", "--unknown"],
        ["nothing"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_two(arguments: list[str]) -> None:
    assert "Usage: " in refused(*arguments, code=2)


@pytest.mark.parametrize("command", ["generate", "trace", "eval", "profile"])
def test_what_is_not_a_bundle_is_refused(tmp_path: Path, text: Path, command: str) -> None:
    needed = {"eval": ["--text", text], "profile": []}.get(command, ["--prompt", "x"])
    assert str(tmp_path) in refused(command, tmp_path, *needed)


def test_a_failure_is_one_json_object_too(tmp_path: Path) -> None:
    result = run("generate", tmp_path, "--prompt", "x", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == "BundleError"


def test_a_prompt_that_is_not_unicode_is_refused(bundle: Path) -> None:
    command = [sys.executable, "-m", "knnmoe.runtime.cli", "generate", str(bundle), "--prompt"]
    done = subprocess.run([*map(os.fsencode, command), b"\xff"], capture_output=True, check=False)
    assert done.returncode == 1
    assert b"--prompt: not valid Unicode" in done.stderr
    assert done.stdout == b""


# eval


def test_eval_gives_what_scripts_rely_on(bundle: Path, pack: Path, text: Path) -> None:
    figures = ok_json("eval", bundle, "--memory", pack, "--text", text)
    assert figures["tokens"] == 18 + 22 + 127 + 51  # the last document fills more than a context
    assert figures["sequences"] == 4
    assert figures["nll_memory"] != figures["nll_frozen"]
    assert figures["delta"] == pytest.approx(figures["nll_memory"] - figures["nll_frozen"])
    assert figures["delta_low"] <= figures["delta"] <= figures["delta_high"]
    assert figures["perplexity_frozen"] == pytest.approx(np.exp(figures["nll_frozen"]))
    assert 0 <= figures["accuracy_memory"] <= 1


def test_eval_scores_as_the_model_does(bundle: Path, pack: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox")
    model = Model.load(bundle, memory=pack)
    ids = model.tokenizer.encode("The quick brown fox")
    figures = ok_json("eval", bundle, "--memory", pack, "--text", path)
    assert figures["nll_memory"] == pytest.approx(-model.score(ids).mean(), abs=1e-5)
    model.disable_memory()
    assert figures["nll_frozen"] == pytest.approx(-model.score(ids).mean(), abs=1e-5)
    assert figures["delta_low"] is None  # one sequence


def test_eval_without_a_memory_gives_the_frozen_figures(bundle: Path, text: Path) -> None:
    figures = ok_json("eval", bundle, "--text", text, "--context", 16, "--max-tokens", 45)
    assert 15 <= figures["tokens"] <= 45
    assert figures["sequences"] >= 2
    assert "nll_memory" not in figures


def test_eval_takes_several_files(bundle: Path, text: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.txt"
    more.write_text("more")
    figures = ok_json("eval", bundle, "--text", text, "--text", more)
    assert figures["sequences"] == 5


def test_eval_says_what_the_memory_does(bundle: Path, pack: Path, text: Path) -> None:
    shown = ok("eval", bundle, "--memory", pack, "--text", text)
    assert "218 tokens in 4 sequences" in shown
    assert "The memory changes the NLL by" in shown
    assert "95 % interval" in shown
    assert "interval" not in ok("eval", bundle, "--text", text)


def test_eval_refuses_text_it_cannot_use(bundle: Path, tmp_path: Path, text: Path) -> None:
    assert "unknown kind of text file" in refused("eval", bundle, "--text", tmp_path)
    assert "context: out of range" in refused("eval", bundle, "--text", text, "--context", 129)


def test_names_that_look_like_markup_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    common.output().print("my[bold]:smile:bundle")
    assert capsys.readouterr().out == "my[bold]:smile:bundle\n"


def test_a_narrow_terminal_gets_whole_columns_and_fewer_of_them() -> None:
    def table_without(names: Sequence[str]) -> Table:
        table = Table()
        for name in ("gate", "entries", "scanned"):
            if name not in names:
                table.add_column(name, no_wrap=True)
        return table

    def shown(width: int) -> list[str]:
        found = common.fitting(Console(width=width), table_without, ("scanned", "entries"))
        return [str(column.header) for column in found.columns]

    assert shown(28) == ["gate", "entries", "scanned"]
    assert shown(27) == ["gate", "entries"]
    assert shown(5) == ["gate"]


def test_a_bar_that_nobody_sees_leaves_no_line(bundle: Path, text: Path) -> None:
    assert run("eval", bundle, "--text", text).stderr == ""


# trace


def test_trace_gives_the_decisions_of_every_gate(bundle: Path, pack: Path) -> None:
    figures = ok_json("trace", bundle, "--memory", pack, "--prompt", "hé", "--neighbors", 5)
    expected = Model.load(bundle, memory=pack, neighbors=5).routing_trace("hé")
    assert [token["token_id"] for token in figures["tokens"]] == expected.token_ids.tolist()
    for row, token in enumerate(figures["tokens"]):
        for gate, decision in enumerate(token["gates"]):
            record = expected.gates[gate]
            assert decision["gate"] == gate
            assert decision["expert_ids"] == record.expert_ids[row].tolist()
            assert decision["neighbors"] == record.trace.neighbors[row].tolist()
            assert decision["confidence"] == pytest.approx(float(record.trace.confidence[row]))
            assert len(decision["similarities"]) == 5


def test_trace_shows_a_line_for_each_token_and_gate(bundle: Path, pack: Path) -> None:
    command = ("trace", bundle, "--memory", pack, "--prompt", "abcd")
    lines = [line for line in ok(*command).splitlines() if "0." in line]
    assert len(lines) == 4 * 3
    assert [line for line in lines if "'b'" in line] == lines[3:4]
    only = [line for line in ok(*command, "--only", 1).splitlines() if "0." in line]
    assert [line.split()[1:] for line in only] == [line.split() for line in lines[1::3]]


def test_trace_of_the_frozen_router_has_no_neighbours(bundle: Path) -> None:
    (token,) = ok_json("trace", bundle, "--prompt", "a", "--only", 2)["tokens"]
    (decision,) = token["gates"]
    assert decision["confidence"] == 0
    assert decision["neighbors"] == []


def test_trace_refuses_what_it_cannot_show(bundle: Path, pack: Path) -> None:
    command = ("trace", bundle, "--memory", pack, "--prompt", "a")
    assert "--only: no such gate expected: 0 to 2 found: 3" in refused(*command, "--only", 3)


def test_trace_is_the_same_in_both_layouts(bundle: Path, pack: Path) -> None:
    command = ("trace", bundle, "--memory", pack, "--prompt", "ab", "--only", 1)
    split, fused = ok_json(*command), ok_json(*command, "--layout", "fused")
    for one, other in zip(split["tokens"], fused["tokens"], strict=True):
        assert one["gates"][0]["expert_ids"] == other["gates"][0]["expert_ids"]
        assert one["gates"][0]["confidence"] == pytest.approx(other["gates"][0]["confidence"])


# the group


def test_the_version_is_that_of_the_package() -> None:
    assert ok("--version") == f"knnmoe, version {__version__}\n"


@pytest.mark.parametrize("command", [[], ["generate"], ["eval"], ["profile"], ["trace"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\n"
        "from knnmoe.runtime.cli import main\n"
        f"main({[*command, '--help']!r}, standalone_mode=False)\n"
        "heavy = {'numpy', 'onnxruntime', 'rich', 'tokenizers', 'knnmoe.calibration.cli'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"Usage: ")


def test_help_lists_every_command() -> None:
    shown = ok("--help")
    for name in ("eval", "generate", "memory", "profile", "trace"):
        assert f"\n  {name} " in shown


def test_choices_named_twice_agree() -> None:
    assert common.LAYOUTS == LAYOUTS
    assert common.BACKENDS == BACKENDS
    assert common.DEVICES == DEVICES
    assert tuple(KEY_DTYPES) == common.KEYS
    assert common.VARIANTS == VARIANTS


@pytest.mark.parametrize("where", ["when imported", "when run"])
def test_a_command_whose_packages_are_missing_says_what_to_install(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = "import click\n" + ("import torch\n" if where == "when imported" else "")
    module += (
        "@click.command()\n"
        "@click.option('--json', is_flag=True)\n"
        "def memory(json):\n"
        "    import torch\n"
    )
    (tmp_path / "builder.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "builder", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it now fails
    monkeypatch.setattr(LazyGroup, "lazy", {"memory": ("builder", "memory", "Builds.", "train")})
    shown = refused("memory")
    assert "needs the package torch" in shown
    assert "pip install 'knnmoe[train]'" in shown
    as_json = json.loads(run("memory", "--json").stdout)
    assert as_json["fix"] == "Run `pip install 'knnmoe[train]'`."


def test_an_import_error_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ("knnmoe.nowhere", "memory", "Builds.", "train")
    monkeypatch.setattr(LazyGroup, "lazy", {"memory": entry})
    assert isinstance(run("memory").exception, ModuleNotFoundError)


def test_the_memory_commands_are_those_of_calibration() -> None:
    from knnmoe.calibration.cli import memory

    shown = ok("memory", "--help")
    for name in memory.commands:
        assert f"\n  {name} " in shown
