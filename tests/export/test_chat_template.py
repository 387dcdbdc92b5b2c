"""Chat templates: bundles carry the checkpoint's, and render it as transformers does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from chat_templates import CONVERSATIONS, MARKED, TEMPLATES, TOOLS, said
from knnmoe.export.exporter import export
from knnmoe.runtime import Bundle, Model
from knnmoe.runtime.chat import ChatTemplate
from knnmoe.runtime.errors import BundleError, CheckpointError, InputError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A tokenizer of transformers whose special tokens are those above."""
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


@pytest.mark.parametrize("variables", [{}, {"tools": TOOLS}, {"enable_thinking": False}], ids=str)
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "whole"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("style", TEMPLATES)
def test_a_conversation_reads_as_transformers_writes_it(
    theirs: Any, style: str, conversation: str, prompt: bool, variables: dict[str, Any]
) -> None:
    messages = CONVERSATIONS[conversation]
    ours = ChatTemplate(Path("bundle"), TEMPLATES[style], SPECIAL)
    options: dict[str, Any] = {"variables": dict(variables)}
    options["tools"] = options["variables"].pop("tools", None)
    refused = None
    try:
        expected = theirs.apply_chat_template(
            messages, chat_template=TEMPLATES[style], tokenize=False,
            add_generation_prompt=prompt, **variables,
        )  # fmt: skip
    except Exception as error:
        refused = str(error).splitlines()[0]
    if refused is None:
        assert ours.render(messages, add_generation_prompt=prompt, **options) == expected
        return
    with pytest.raises(InputError, match=rf"the chat template refuses .*{re.escape(refused)}"):
        ours.render(messages, add_generation_prompt=prompt, **options)


def test_most_of_these_are_rendered_and_not_refused(theirs: Any) -> None:
    rendered = 0
    for style in TEMPLATES.values():
        for messages in CONVERSATIONS.values():
            try:
                ChatTemplate(Path("bundle"), style, SPECIAL).render(messages, tools=TOOLS)
            except InputError:
                continue
            rendered += 1
    assert rendered >= 14


def named(default: str) -> list[dict[str, str]]:
    return [
        {"name": "default", "template": default},
        {"name": "tool_use", "template": "tools:" + default},
    ]


SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in ("config", "processor")]


@pytest.mark.parametrize("where", ["file", "named", *SLOWLY])
def test_a_bundle_carries_the_template_wherever_the_checkpoint_has_it(
    where: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    if where == "file":
        (source / "chat_template.jinja").write_text(MARKED)
        config["chat_template"] = "overruled"
    elif where == "processor":
        (source / "chat_template.json").write_text(json.dumps({"chat_template": MARKED}))
    else:
        config["chat_template"] = MARKED if where == "config" else named(MARKED)
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    bundle = export(source, tmp_path / "bundle").bundle
    files = Bundle.open(bundle).manifest.files
    assert (bundle / "chat_template.jinja").read_text() == MARKED
    assert "chat_template.jinja" in files
    assert ("additional_chat_templates/tool_use.jinja" in files) == (where == "named")
    model = Model.load(bundle, threads=1)
    expected = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert model.render_chat(said("hi"), add_generation_prompt=False) == expected
    assert model.render_chat(said("hi")) == expected + "<|im_start|>assistant\n"
    if where == "named":
        assert model.render_chat(said("hi"), tools=TOOLS).startswith("tools:")
    (bundle / "chat_template.jinja").write_text("changed")
    with pytest.raises(BundleError, match=r"chat_template\.jinja"):
        Model.load(bundle)


def test_a_template_that_cannot_be_read_stops_the_export(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, source)
    (source / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot be read"):
        export(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
