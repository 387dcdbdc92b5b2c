"""By which passages of the reference text was each token routed?

python examples/routing_inspector.py BUNDLE PACK REFERENCE PROMPT
"""

import sys

from knnmoe.calibration.sources import Sources
from knnmoe.runtime import MemoryPack, Model

bundle, pack, reference, prompt = sys.argv[1:]
model = Model.load(bundle, memory=pack)
sources = Sources.open(MemoryPack.open(pack), [reference], bundle)
trace = model.routing_trace(prompt)
for row, token in enumerate(trace.token_ids):
    print(repr(model.tokenizer.token_text(int(token))))
    for gate, record in enumerate(trace.gates):
        if record.trace.confidence[row] == 0:  # the router as it was
            continue
        found = sources.passage(gate, int(record.trace.neighbors[row, 0]))
        near = f"λ {record.trace.confidence[row]:.2f}, s {record.trace.similarities[row, 0]:.2f}"
        print(f"  gate {gate}, {near}: document {found.document}, token {found.position}:")
        print(f"    {found.before!r} [{found.token!r}] {found.after!r}")
