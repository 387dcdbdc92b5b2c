"""Conversations as documents, by the chat template that belongs to the tokenizer.

Which part is the assistant's is found without the help of the template: what it writes for the
messages before a reply, with the prompt for one, is the context; what it adds when the reply is
there is the reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat import ChatTemplate
from .documents import Document, Span
from .errors import CheckpointError, InputError
from .utf8 import check_unicode

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Conversations:
    """A tokenizer's chat template, for records of a file."""

    template: ChatTemplate

    @staticmethod
    def load(directory: str | Path) -> Conversations:
        """The template of a checkpoint's tokenizer.

        Raises:
            CheckpointError: If a file is there and cannot be read.
        """
        return Conversations(ChatTemplate.load(directory, error=CheckpointError))

    def documents(self, where: str, record: dict[str, Any]) -> list[Document]:
        """A record with `messages` (and perhaps `tools`) as documents whose replies are credited.

        One document, unless the template writes earlier replies in another way once more follows
        (some drop the reasoning): then each reply stands at the end of a document of its own, as it
        does when the model is used.

        Raises:
            InputError: If messages are malformed, none is the assistant's, or the template is
                missing or refuses.
            BackendError: If jinja2 is not installed.
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
        if self.template.source is None:
            raise InputError(
                where,
                "is a conversation, and the tokenizer has no chat template",
                expected="chat_template in tokenizer_config.json, or a file chat_template.jinja",
                found=f"neither in {self.template.directory}",
                fix='Add the model\'s template, or give {"text"} or {"prompt", "completion"}.',
            )
        try:
            return self.template.render(
                messages,
                add_generation_prompt=prompt,
                tools=record.get("tools"),
                may_be_empty=True,
            )
        except InputError as error:
            raise InputError(where, error.problem, found=error.found, fix=error.fix) from error


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
