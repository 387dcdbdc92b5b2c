from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # such small tensors are slower on two

SENTENCES = (
    "The spring was late that year, and the river stood high.",
    "Nobody crossed it before May.",
    "A heron waited where the bridge had been, patient as a clerk.",
    "In the evening the lamps were lit one after another, and went out again with the wind.",
)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A document of four lines of different lengths, and one of a single line."""
    path = tmp_path_factory.mktemp("text") / "reference.jsonl"
    lines = ["\\n".join(SENTENCES), SENTENCES[2]]
    path.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def background(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "background.txt"
    path.write_text("Return the number of items; raise ValueError if there are none.")
    return path
