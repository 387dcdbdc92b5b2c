"""Chat in the terminal: python examples/chat.py BUNDLE [PACK]."""

import sys

from knnmoe.runtime import Model

model = Model.load(sys.argv[1], memory=sys.argv[2] if len(sys.argv) > 2 else None)
session = model.session()
messages: list[dict[str, str]] = []
while question := input("> "):  # an empty line ends
    messages.append({"role": "user", "content": question})
    reply = ""
    for event in session.stream(session.chat_prompt(messages), max_new_tokens=40, seed=1):
        print(event.text, end="", flush=True)
        reply += event.text
    messages.append({"role": "assistant", "content": reply})
    print()
