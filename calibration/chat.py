"""Conversations as text, by the chat template that belongs to the tokenizer.

The template is rendered by transformers. Which part is the assistant's is found without the help of
the template: what it writes for the messages before a reply, with the prompt for one, is the
context; what it adds when the reply is there is the reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knnmoe.runtime.errors import BackendError, CheckpointError, InputError
from knnmoe.runtime.manifest import parse_object

from .references import Document, Span, check_unicode

ASSISTANT = "assistant"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template; use `ChatTemplate.load`.

    Attributes:
        directory: Where it comes from, for errors.
        source: Jinja, or None if the tokenizer has none.
        special: The special tokens that templates write by name.
    """

    directory: Path
    source: str | None
    special: dict[str, str]

    @staticmethod
    def load(directory: str | Path) -> ChatTemplate:
        """From `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`.

        Raises:
            CheckpointError: If a file is there and cannot be read.
        """
        root = Path(directory)
        config: dict[str, Any] = {}
        path = root / "tokenizer_config.json"
        try:
            if path.is_file():
                config = parse_object(path.read_bytes())
            path = root / "chat_template.jinja"
            found = path.read_text(encoding="utf-8") if path.is_file() else None
        except (OSError, ValueError) as error:
            raise CheckpointError(path, "cannot be read", found=error) from error
        source = found if found is not None else _stated(config.get("chat_template"))
        special = {}
        for name in _SPECIAL:
            token = config.get(name)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                special[name] = content
        return ChatTemplate(root, source, special)

    def documents(self, where: str, record: dict[str, Any]) -> list[Document]:
        """A record with `messages` (and perhaps `tools`) as documents whose replies are credited.

        One document, unless the template writes earlier replies in another way once more follows
        (some drop the reasoning): then each reply stands at the end of a document of its own, as it
        does when the model is used.

        Raises:
            InputError: If messages are malformed, none is the assistant's, or the template refuses.
            CheckpointError: If there is no template.
        """
        messages = _checked(where, record["messages"])
        documents: list[list[Span]] = []
        written = ""
        for index, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            context = self._render(where, messages[:index], record, prompt=True)
            whole = self._render(where, messages[: index + 1], record, prompt=False)
            if not whole.startswith(context):
                raise InputError(
                    where,
                    f"the chat template does not begin message {index + 1} as it asks for it",
                    expected=f"{context[-40:]!r} before the reply",
                    found=repr(whole[max(0, len(context) - 40) : len(context)]),
                    fix="Give the conversation as prompt and completion.",
                )
            if not (written and context.startswith(written)):
                documents.append([])
                written = ""
            documents[-1] += [Span(context[len(written) :], credited=False),
                              Span(whole[len(context) :])]  # fmt: skip
            written = whole
        return [Document(where, iter(spans), rendered=True) for spans in documents]

    def _render(
        self,
        where: str,
        messages: Sequence[dict[str, Any]],
        record: dict[str, Any],
        *,
        prompt: bool,
    ) -> str:
        if self.source is None:
            raise CheckpointError(
                self.directory,
                "its tokenizer has no chat template, which conversations need",
                expected="chat_template in tokenizer_config.json, or a file chat_template.jinja",
                fix=f'Add the model\'s template, or give {where} as {{"text"}} or as '
                '{"prompt", "completion"}.',
            )
        try:
            from transformers.utils.chat_template_utils import render_jinja_template
        except ModuleNotFoundError as error:
            raise BackendError(
                "chat templates",
                f"need the package {error.name}, which is not installed",
                fix="Run `pip install 'knnmoe[train]'`.",
            ) from error
        try:
            render: Any = render_jinja_template
            rendered = render(
                conversations=[list(messages)],
                tools=record.get("tools"),
                chat_template=self.source,
                add_generation_prompt=prompt,
                **self.special,
            )
        except ImportError as error:  # jinja2 is missing or too old
            raise BackendError("chat templates", str(error).splitlines()[0]) from error
        except Exception as error:  # a template may raise whatever it likes
            raise InputError(
                where,
                f"the chat template refuses the conversation ({_first_line(error)})",
                fix="Change the order or the roles of its messages.",
            ) from error
        # One conversation comes back as its text or, by version, as a list inside a tuple.
        while not isinstance(rendered, str):
            rendered = rendered[0]
        return rendered


def _checked(where: str, messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise InputError(where, "messages are malformed", expected="a list of at least one message",
                         found=str(messages)[:60])  # fmt: skip
    for number, message in enumerate(messages, start=1):
        found = message if isinstance(message, dict) else {}
        content, calls = found.get("content"), found.get("tool_calls")
        if not isinstance(found.get("role"), str) or not (
            isinstance(content, str) or (content is None and calls)
        ):
            raise InputError(
                where,
                f"message {number} is malformed",
                expected='an object with strings "role" and "content"',
                found=str(message)[:60],
            )
        check_unicode(where, content or "")
    if not any(message["role"] == ASSISTANT for message in messages):
        raise InputError(
            where,
            "has no message of the assistant, so nothing to learn from",
            expected=f'a message with "role": "{ASSISTANT}"',
            found=", ".join(message["role"] for message in messages[:8]),
            fix="Leave the line out.",
        )
    return messages


def _stated(template: Any) -> str | None:
    """`chat_template` is one template, or a list of named ones."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template
                 if isinstance(entry, dict)}  # fmt: skip
        template = named.get("default")
    return template if isinstance(template, str) else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
