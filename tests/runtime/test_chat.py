"""Conversations: rendering, replies that go on from the cache, and the command."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from chat_templates import MARKED, said
from knnmoe.runtime.chat import ChatTemplate, Turn, encode_turn
from knnmoe.runtime.cli import main
from knnmoe.runtime.errors import BackendError, BundleError, InputError
from knnmoe.runtime.model import Model
from knnmoe.runtime.tokenizer import Tokenizer
from rewritten import add_file

QUICK: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
# The tiny model sees 128 bytes: a template of few.
SHORT = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a chat template."""
    target = tmp_path_factory.mktemp("chat") / "bundle"
    return add_file(tiny_bundle, target, "chat_template.jinja", SHORT.encode())


@pytest.fixture
def model(bundle: Path, tiny_pack: Path) -> Model:
    return Model.load(bundle, memory=tiny_pack, threads=1)


# --- templates ------------------------------------------------------------------------------


def template(source: str) -> ChatTemplate:
    return ChatTemplate(Path("bundle"), source, {"bos_token": "<s>"})


def test_a_template_is_looked_for_in_this_order(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert ChatTemplate.load(tmp_path).source is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "zero"}))
    assert ChatTemplate.load(tmp_path).source == "zero"
    config.write_text(json.dumps({"chat_template": "one", "bos_token": {"content": "<s>"}}))
    assert ChatTemplate.load(tmp_path).source == "one"
    assert ChatTemplate.load(tmp_path).special == {"bos_token": "<s>"}
    two = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    config.write_text(json.dumps({"chat_template": two}))
    found = ChatTemplate.load(tmp_path)
    assert (found.source, found.tool_source) == ("three", "two")
    (tmp_path / "chat_template.jinja").write_text("four")
    assert ChatTemplate.load(tmp_path).source == "four"
    assert ChatTemplate.load(tmp_path, listed=("tokenizer_config.json",)).source == "three"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer_config.json", b"[", "cannot be read"),
        ("chat_template.json", b'{"chat_template"', "cannot be read"),
        ("chat_template.jinja", b"\xff", "cannot be read; expected UTF-8"),
        ("chat_template.jinja", b"x" * (1 << 20 | 1), "is too large"),
    ],
)
def test_a_template_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name}: {problem}"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ dict.__init__.__globals__.json }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include 'chat_template.jinja' %}",
        "{{ '%s' | format(cycler.__init__.__globals__.os) }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(attack: str) -> None:
    with pytest.raises(InputError, match="the chat template refuses"):
        template(attack).render(said("hi"))


def test_a_template_sees_none_of_the_callers_objects() -> None:
    class Sly(str):
        def wipe(self) -> str:
            raise AssertionError

    shown = template("{{ messages[0].content.wipe is defined }}").render(said(Sly("hi")))
    assert shown == "False"


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages: malformed.*at least one"),
        ("hi", "messages: malformed"),
        ([{"content": "hi"}], "messages: number 1: malformed"),
        ([*said("a"), "b"], "messages: number 2: malformed"),
        ([{"role": "user", "content": object()}], "number 1: holds what JSON cannot"),
    ],
)
def test_malformed_messages_are_named(messages: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        template(MARKED).render(messages)


def test_without_a_template_or_jinja_the_error_says_what_to_do(
    tiny_bundle: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match="has no chat template"):
        Model.load(tiny_bundle, threads=1).render_chat(said("hi"))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(BackendError, match=r"jinja2.*pip install 'knnmoe\[chat\]'"):
        model.session().chat(said("hi"))
    monkeypatch.undo()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.1.5")
    with pytest.raises(BackendError, match=r"need a newer jinja2.*3\.1\.6.*3\.1\.5"):
        model.render_chat(said("hi"))


# --- replies --------------------------------------------------------------------------------


def test_a_reply_is_what_the_rendered_text_goes_on_with(model: Model) -> None:
    messages = said("hello")
    ids = model.tokenizer.encode_rendered(model.render_chat(messages))
    assert model.render_chat(messages) == "u:hello\na:"
    assert (
        model.session().chat(messages, **QUICK).token_ids == model.generate(ids, **QUICK).token_ids
    )


def test_of_a_longer_conversation_only_what_is_new_is_run(model: Model) -> None:
    session = model.session()
    messages = said("hello")
    first = session.chat(messages, **QUICK)
    before = model.metrics.reused_tokens
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "on"}]
    prompt = session.chat_prompt(messages)
    ids = model.tokenizer.encode_rendered("u:hello\na:")
    assert prompt[: len(ids) + 6] == [*ids, *first.token_ids]
    assert session.generate(prompt, **QUICK).token_ids == model.generate(prompt, **QUICK).token_ids
    assert model.metrics.reused_tokens - before == len(ids) + 6 - 1


def test_a_conversation_that_was_changed_is_read_again(model: Model) -> None:
    session = model.session()
    session.chat(said("hello"), **QUICK)
    other = said("hello", "something else", "on")
    plain = model.tokenizer.encode_rendered(model.render_chat(other))
    assert session.chat_prompt(other) == plain
    session.reset()
    assert session.chat_prompt(said("hello")) == model.tokenizer.encode_rendered("u:hello\na:")


def test_the_tokens_of_a_reply_are_those_that_were_written(model: Model) -> None:
    tokenizer = model.tokenizer
    (end,) = tokenizer.eos_token_ids
    reply = (*tokenizer.encode("yes"), end)
    name = tokenizer.token_text(end)
    turn = Turn("u:hi\na:", tuple(tokenizer.encode("u:hi\na:")), reply)
    ended = encode_turn(f"u:hi\na:yes{name}\nu:on\na:", turn, tokenizer)
    assert ended == [*turn.prompt, *reply, *tokenizer.encode("\nu:on\na:")]
    # A template that ends replies in another way than the model did.
    other = encode_turn("u:hi\na:yes\nu:on\na:", turn, tokenizer)
    assert other == [*turn.prompt, *reply[:-1], *tokenizer.encode("\nu:on\na:")]
    for text in ("u:hi\na:no\nu:on\na:", "u:hi\na:yes"):
        assert encode_turn(text, turn, tokenizer) == tokenizer.encode_rendered(text)


def test_special_tokens_that_a_template_writes_are_tokens(tiny_bundle: Path) -> None:
    tokenizer = Tokenizer.load(tiny_bundle)
    (end,) = tokenizer.eos_token_ids
    assert tokenizer.encode_rendered("a" + tokenizer.token_text(end)) == [
        *tokenizer.encode("a"),
        end,
    ]


# --- the command ----------------------------------------------------------------------------


def talk(bundle: Path, text: str, *options: object) -> Any:
    words = ["chat", str(bundle), "--greedy", "--max-new-tokens", "6", *map(str, options)]
    return CliRunner().invoke(main, words, input=text)


def test_the_command_replies_line_by_line(bundle: Path, model: Model, tiny_pack: Path) -> None:
    done = talk(bundle, "hello\n\non\n/quit\nnever\n", "--memory", tiny_pack)
    assert done.exit_code == 0, done.output
    session = model.session()
    first = session.chat(said("hello"), **QUICK).text
    second = session.chat(said("hello", first, "on"), **QUICK).text
    assert done.stdout == f"{first}\n{second}\n"


def test_the_command_swaps_resets_and_reports(bundle: Path, tiny_pack: Path) -> None:
    lines = f"hello\n/memory {tiny_pack}\n/reset\nhello\n/memory\n/reset\nhello\n/nothing\n"
    figures = json.loads(talk(bundle, lines, "--system", "s", "--json").stdout)
    frozen, memory = (
        Model.load(bundle, memory=pack, threads=1)
        .session()
        .chat(said("hello", system="s"), **QUICK)
        for pack in (None, tiny_pack)
    )
    assert frozen.token_ids != memory.token_ids
    last = {"role": "assistant", "content": frozen.text}
    assert figures["messages"] == [*said("hello", system="s"), last]
    assert [reply["new_tokens"] for reply in figures["replies"]] == [6, 6, 6]
    shown = talk(bundle, lines, "--system", "s")
    assert shown.stdout.splitlines() == [
        line for one in (frozen, memory, frozen) for line in one.text.splitlines() or [""]
    ]
    assert "no such command: /nothing" in shown.stderr


def test_a_conversation_that_fails_ends_where_nobody_watches(bundle: Path, tmp_path: Path) -> None:
    assert talk(bundle, "x" * 200 + "\n").exit_code == 1
    failed = talk(bundle, f"/memory {tmp_path}\n", "--json")
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["error"] == "MemoryPackError"


def test_a_bundle_without_a_template_is_refused_at_once(tiny_bundle: Path) -> None:
    failed = talk(tiny_bundle, "")
    assert failed.exit_code == 1
    assert "has no chat template" in failed.stderr


def test_in_a_terminal_an_interrupt_ends_the_reply_and_an_error_ends_nothing(bundle: Path) -> None:
    ours, theirs = pty.openpty()
    code = (
        "import os, signal, sys\n"
        "from knnmoe.runtime.cli import main\n"
        "from knnmoe.runtime.session import Session\n"
        "run, steps = Session._step, []\n"
        "def counted(self, *rest):\n"
        "    if not steps:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    steps.append(rest)\n"
        "    return run(self, *rest)\n"
        "Session._step = counted\n"
        "try:\n"
        f"    main(['chat', {str(bundle)!r}, '--max-new-tokens', '30', '--greedy'])\n"
        "finally:\n"
        "    print('steps:', len(steps), file=sys.stderr)\n"
    )
    environment = os.environ | {"TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE,
        env=environment,
    )  # fmt: skip
    os.write(ours, b"hello\n/memory /nowhere\n/quit\n")
    _, problems = process.communicate(timeout=60)
    shown = os.read(ours, 1 << 16).decode(errors="replace")
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0, problems
    assert b"not a memory pack" in problems
    assert b"steps: 1\n" in problems
    assert shown.count("> ") == 3
