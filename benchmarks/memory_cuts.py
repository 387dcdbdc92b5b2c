"""What a memory gains when it is cut to fewer entries or fewer gates, calibrated as it is.

Change of the negative log-likelihood on test text, nats a token (95 % interval), after `make demo`:

    python benchmarks/memory_cuts.py [--max-tokens 6000]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime import Model
from knnmoe.runtime.evaluation import Evaluation, read_for, score_sequences
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.run_config import RunConfig, pack_hash, used_gates

DEMO = Path("build/demo")
SHARES = (1, 3 / 4, 1 / 2, 1 / 4, 1 / 20)


def cuts(pack: MemoryPack) -> list[tuple[str, int, tuple[int, ...]]]:
    """Label, entries a gate and gates of everything that is measured."""
    gates, entries = used_gates(pack), pack.entries
    fewer = [(f"{s:.0%} of the entries, spread", int(s * entries), gates) for s in SHARES]
    last = [(f"last {n} gates", entries, gates[-n:]) for n in range(len(gates) - 1, 0, -1)]
    first = [(f"first {n} gates", entries, gates[:n]) for n in range(len(gates) - 1, 0, -1)]
    return [*fewer, *last, *first]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path, default=DEMO / "bundle")
    parser.add_argument("--memory", type=Path, default=DEMO / "memory-scripture")
    parser.add_argument("--text", type=Path, default=DEMO / "texts" / "scripture" / "test.jsonl")
    parser.add_argument("--max-tokens", type=int, default=6000)
    arguments = parser.parse_args()
    pack = MemoryPack.open(arguments.memory)
    config = RunConfig(pack.model.fingerprint, "", pack_hash(pack), pack.entries, used_gates(pack))
    model = Model.load(arguments.bundle, memory=pack)
    text = read_for(model, [arguments.text], context=None, max_tokens=arguments.max_tokens)
    documents: NDArray[np.int64] = np.array([each.document for each in text.sequences])
    precision = model.bundle.manifest.precision
    model.disable_memory()
    frozen = score_sequences(model, text.sequences, lambda _: None)
    for label, entries, gates in cuts(pack):
        cut = replace(config, precision=precision, entries=entries, gates=gates)
        model.swap_memory(cut.applied(pack, model.identity, precision, "cut"))
        scores = score_sequences(model, text.sequences, lambda _: None)
        mean, low, high = Evaluation(frozen, scores, documents.tolist()).delta()
        print(f"{label:32} {len(gates) * entries:7,} in all  {mean:+.4f} [{low:+.4f}, {high:+.4f}]")


if __name__ == "__main__":
    main()
