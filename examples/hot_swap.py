"""A memory for each domain, swapped while the model stays loaded.

python examples/hot_swap.py BUNDLE NAME=PACK... reads lines "NAME: text" from standard input.
"""

import sys

from knnmoe.runtime import Model

model = Model.load(sys.argv[1])
packs = dict(argument.split("=", 1) for argument in sys.argv[2:])
for line in sys.stdin:
    domain, _, prompt = line.rstrip("\n").partition(": ")
    model.swap_memory(packs.get(domain))  # from the next step on; no pack: the frozen router
    score = model.score(model.tokenizer.encode(prompt)).mean()
    print(f"{domain}: {score:.4f} nats a token, {'memory' if model.memory else 'frozen'}")
