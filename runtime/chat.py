"""Conversations as prompts: a bundle's chat template, rendered as transformers renders it.

Templates are programs of strangers. They run in Jinja's immutable sandbox, and all they are given
is made of plain JSON: no object of the caller's, so no method of one.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BackendError, BundleError, InputError, KnnMoeError
from .manifest import parse_object

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

Message = Mapping[str, Any]

TEMPLATE = "chat_template.jinja"
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
PROCESSOR_TEMPLATE = "chat_template.json"
MAX_TEMPLATE_BYTES = 1 << 20
OLDEST_JINJA = (3, 1, 6)  # older ones have known ways out of the sandbox

_KEY = "chat_template"
_SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Names under which templates look for what a model thought; the first is the one to write.
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template; use `ChatTemplate.load`.

    Attributes:
        directory: Where it comes from, for errors.
        source: Jinja, or None if the tokenizer has none.
        special: The special tokens that templates write by name.
        tool_source: Used in the place of `source` where there are tools, if the tokenizer has one.
    """

    directory: Path
    source: str | None
    special: dict[str, str]
    tool_source: str | None = None

    @staticmethod
    def load(
        directory: str | Path,
        *,
        listed: Collection[str] | None = None,
        error: type[KnnMoeError] = BundleError,
    ) -> ChatTemplate:
        """Read the template that belongs to a tokenizer.

        It is `chat_template.jinja`, else `chat_template` in `tokenizer_config.json`, else that of
        `chat_template.json`; for tools, where there is one of its own, `tool_use`.

        Args:
            directory: A bundle or a checkpoint.
            listed: Names of files to look at, if not all.
            error: What to raise.

        Raises:
            KnnMoeError: As `error`, if a file is there and cannot be read.
        """
        root = Path(directory)
        config = _object(root, TOKENIZER_CONFIG, listed, error)
        stated = _by_name(_object(root, PROCESSOR_TEMPLATE, listed, error).get(_KEY))
        stated |= _by_name(config.get(_KEY))
        for name, file in (("default", TEMPLATE), ("tool_use", TOOL_TEMPLATE)):
            content = _content(root, file, listed, error)
            if content is not None:
                stated[name] = _decoded(root / file, content, error)
        special = {}
        for name in _SPECIAL:
            token = config.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                special[name] = text
        return ChatTemplate(root, stated.get("default"), special, stated.get("tool_use"))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        may_be_empty: bool = False,
    ) -> str:
        """The text of a conversation, with its special tokens in it.

        Args:
            messages: Objects with `role`, `content` and whatever else the template knows; entries
                that are None count as left out.
            add_generation_prompt: End with what begins a reply.
            tools: JSON schemas of functions.
            documents: Objects with `title` and `text`.
            variables: Whatever else the template knows, such as `enable_thinking`.
            may_be_empty: Whether there need be no message.

        Raises:
            InputError: If messages are malformed, or the template refuses them or is not valid.
            BackendError: If there is no template, or no jinja2.
        """
        self.check_usable()
        source = self.source if self.tool_source is None or not tools else self.tool_source
        given: dict[str, Any] = {
            **self.special,
            **_plain("variables", dict(variables or {})),
            "messages": [
                _checked(number, message)
                for number, message in enumerate(_listed(messages, may_be_empty), start=1)
            ],
            "tools": _plain("tools", tools),
            "documents": _plain("documents", documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text: str = _compiled(source).render(**given)
        except Exception as error:  # a template may raise whatever it likes
            raise InputError(
                "messages",
                f"the chat template refuses the conversation ({_first_line(error)})",
                fix="Change the order or the roles of the messages.",
            ) from error
        return text

    def check_usable(self) -> None:
        """Raise `BackendError` unless there is a template and what renders it."""
        if self.source is None:
            raise BackendError(
                self.directory,
                "has no chat template",
                expected=f"{TEMPLATE}, or {_KEY} in {TOKENIZER_CONFIG}",
                fix="Export a checkpoint that has one, or write the prompt yourself.",
            )
        _require_jinja()


@dataclass(frozen=True)
class Turn:
    """A conversation that was rendered and replied to.

    Attributes:
        text: As rendered, up to the reply.
        prompt: Its token ids.
        reply: Token ids of the reply; one that ended it is among them.
    """

    text: str
    prompt: tuple[int, ...]
    reply: tuple[int, ...]


def encode_turn(text: str, last: Turn | None, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a rendered conversation; where it goes on from `last`, with that turn's own.

    What a model wrote need not be what the tokenizer makes of the same text. With the tokens that
    were written, all that a cache holds of a conversation stays of use.

    Raises:
        InputError: If the text is empty or not Unicode.
    """
    if last is None or not last.reply:
        return tokenizer.encode_rendered(text, where="messages")
    reply = list(last.reply)
    said = last.text + tokenizer.decode(reply)
    if not text.startswith(said) or len(text) == len(said):
        return tokenizer.encode_rendered(text, where="messages")
    rest = text[len(said) :]
    if tokenizer.is_special(reply[-1]):
        # The template ends a reply with the token that the model ended it with, or with another.
        end = tokenizer.token_text(reply[-1])
        if rest.startswith(end):
            rest = rest[len(end) :]
        else:
            reply.pop()
    more = tokenizer.encode_rendered(rest, where="messages") if rest else []
    return [*last.prompt, *reply, *more]


def _content(
    root: Path, name: str, listed: Collection[str] | None, error: type[KnnMoeError]
) -> bytes | None:
    path = root / name
    if (listed is not None and name not in listed) or not path.is_file():
        return None
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise error(path, "cannot be read", found=problem) from problem
    if name.endswith(".jinja") and len(content) > MAX_TEMPLATE_BYTES:
        raise error(
            path, "is too large", expected=f"at most {MAX_TEMPLATE_BYTES} bytes", found=len(content)
        )
    return content


def _object(
    root: Path, name: str, listed: Collection[str] | None, error: type[KnnMoeError]
) -> dict[str, Any]:
    content = _content(root, name, listed, error)
    if content is None:
        return {}
    try:
        return parse_object(content)
    except ValueError as problem:
        raise error(root / name, "cannot be read", found=problem) from problem


def _decoded(path: Path, content: bytes, error: type[KnnMoeError]) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(path, "cannot be read", expected="UTF-8", found=problem) from problem


def _by_name(stated: Any) -> dict[str, str]:
    """`chat_template` is one template, or a list of named ones."""
    if isinstance(stated, str):
        return {"default": stated}
    entries = stated if isinstance(stated, list) else []
    pairs = [(e.get("name"), e.get("template")) for e in entries if isinstance(e, dict)]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _listed(messages: Any, may_be_empty: bool) -> list[Any]:
    listed = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not listed or not (messages or may_be_empty):
        raise InputError(
            "messages", "malformed", expected="a list of at least one message",
            found=str(messages)[:60],
        )  # fmt: skip
    return list(messages)


def _checked(number: int, message: Any) -> dict[str, Any]:
    """A message as templates get it: plain, without what is None, reasoning under every name."""
    where = f"messages: number {number}"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(
            where, "malformed", expected='an object with a string "role"', found=str(message)[:60]
        )
    plain: dict[str, Any] = _plain(
        where, {name: part for name, part in message.items() if part is not None}
    )
    thought = next((plain[name] for name in _REASONING if name in plain), None)
    if thought is not None:
        plain = {_REASONING[1]: thought} | plain | {_REASONING[0]: thought}
    return plain


def _plain(where: str, given: Any) -> Any:
    """The same of JSON's own types, or `InputError`."""
    if given is None:
        return None
    try:
        return json.loads(json.dumps(given, ensure_ascii=True))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            where, "holds what JSON cannot", expected="text, numbers, lists and objects",
            found=_first_line(error),
        ) from error  # fmt: skip


def _require_jinja() -> None:
    """Raise `BackendError` unless there is a jinja2 whose sandbox holds."""
    try:
        import jinja2  # noqa: F401 - it may be missing
    except ModuleNotFoundError as error:
        raise BackendError(
            "chat templates",
            f"need the package {error.name}, which is not installed",
            fix="Run `pip install 'knnmoe[chat]'`.",
        ) from error
    version = importlib.metadata.version("jinja2")
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < OLDEST_JINJA:
        raise BackendError(
            "chat templates",
            "need a newer jinja2",
            expected="3.1.6 or newer",
            found=version,
            fix="Run `pip install -U jinja2`.",
        )


@lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """A template with the functions, filters and tags that chat templates are written for."""
    from .chat_environment import environment

    return environment().from_string(source)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
