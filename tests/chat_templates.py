"""Chat templates in the styles that released models have, written for the tests."""

from __future__ import annotations

from typing import Any

# Every message between two marks; a system message is made up where there is none.
MARKED = """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# User and assistant take turns, or it is refused; the system message goes into the first question.
INSTRUCTED = """\
{% if messages[0]['role'] == 'system' %}
    {% set system, rest = messages[0]['content'] | trim + '\\n\\n', messages[1:] %}
{% else %}
    {% set system, rest = '', messages %}
{% endif %}
{{ bos_token }}
{%- for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('user and assistant must take turns') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

# Reasoning is kept after the last question alone, found with a namespace; tools as JSON.
REASONING = """\
{%- macro body(message) -%}
    {%- if message.content is string -%}
        {{ message.content }}
    {%- else -%}
        {%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.found and message.role == 'user' %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
        {%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.reasoning_content and loop.index0 > ns.last %}
        {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- body(message) }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<call>' + call.function.name + ' ' + call.function.arguments | tojson + '</call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# Headers with the date; what the assistant says is marked for training.
DATED = """\
{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set today = strftime_now('%d %b %Y') %}
{%- endif %}
{{- '<|header|>system<|end|>Today is ' + today + '.' + '<|eot|>' }}
{%- for message in messages %}
    {{- '<|header|>' + message.role + '<|end|>\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content | trim + '<|eot|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{{- '<|header|>assistant<|end|>\\n' if add_generation_prompt }}
"""

# Messages as JSON in several spellings, with a dictionary, sorting and characters of HTML.
SERIALIZED = """\
{% set names = dict(user='<U&>', assistant="<A'>") %}
{% for message in messages %}
{{ names[message.role] }}: {{ message | tojson(indent=2) }}
{{ message | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}
{% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}?{% endif %}
"""

TEMPLATES = {
    "marked": MARKED,
    "instructed": INSTRUCTED,
    "reasoning": REASONING,
    "dated": DATED,
    "serialized": SERIALIZED,
}


def said(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """A conversation of user and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return [*first, *({"role": roles[i % 2], "content": c} for i, c in enumerate(contents))]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a place, in °C & <b>",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]

CALL = {
    "role": "assistant",
    "content": None,
    "reasoning": "They ask for the weather.\n",
    "tool_calls": [{"function": {"name": "weather", "arguments": {"place": "Åbo", "days": 2}}}],
}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a question": said(" hi <there> & 'you'\n"),
    "three turns": said("one", "two", "three", " four ", "five", system=" Be brief. "),
    "thoughts": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "\nold\n"},
        {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
        {"role": "assistant", "content": "e", "reasoning_content": "new", "thinking": None},
    ],
    "a call": [
        {"role": "user", "content": "Weather?"},
        CALL,
        {"role": "tool", "content": "3 °C"},
    ],
}
