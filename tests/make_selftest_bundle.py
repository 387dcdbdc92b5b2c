"""Writes the tiny bundle that `python -m knnmoe.runtime.selftest` runs, and what it must compute.

Run it where the schema of bundles changes: PYTHONPATH=tests python tests/make_selftest_bundle.py
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from knnmoe.export.exporter import export
from tiny import make_tiny_olmoe

TARGET = Path(__file__).resolve().parent.parent / "runtime" / "selftest"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
TOKENS = [72, 101, 108, 108, 111, 44, 32, 119]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_tiny_olmoe(Path(folder) / "checkpoint", **SIZES)
        shutil.rmtree(TARGET / "bundle", ignore_errors=True)
        export(checkpoint, TARGET / "bundle")
        known = {"tokens": TOKENS, "last_logits": reference(checkpoint)}
    text = json.dumps(known)
    (TARGET / "known.json").write_text(text + "\n", encoding="utf-8")


def reference(checkpoint: Path) -> list[float]:
    """What transformers computes after the last token, rounded to five digits."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([TOKENS])).logits[0, -1]
    return [round(float(number), 5) for number in logits]


if __name__ == "__main__":
    main()
