"""Embed a model in a program: python examples/embed.py BUNDLE PACK PROMPT..."""

import sys

from knnmoe.runtime import KnnMoeError, Model

bundle, pack, *prompts = sys.argv[1:]
try:
    with Model.load(bundle, memory=pack) as model:
        for prompt in prompts:
            reply = model.generate(prompt, max_new_tokens=20, seed=1, deadline_s=30.0)
            print(f"{prompt}{reply.text} [{reply.finish_reason}]")
        print(f"{model.metrics.new_tokens} tokens in {model.metrics.decode_s:.2f} s")
except KnnMoeError as error:  # says what is wrong, where, and what to do
    sys.exit(f"error: {error}")
