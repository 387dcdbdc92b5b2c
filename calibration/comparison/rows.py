"""The rows of a comparison, as a table; what needs torch is imported when its row runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from knnmoe.runtime.errors import SettingError

from .bench import Bench
from .measured import Measured


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: As `--rows` takes it.
        label: As people read it.
        group: What kind of row it is, for the reader.
        trained: What is learned, and when.
        run: Module of this package and function in it.
        source: The paper, where it is not the one this project implements.
    """

    name: str
    label: str
    group: str
    trained: str
    run: str
    source: str = ""

    def measure(self, bench: Bench) -> Measured:
        """Run it."""
        module, _, function = self.run.partition(":")
        found = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        return cast(Callable[[Bench], Measured], found)(bench)


MEMORY, CONTROL, OTHER, BOUND = "memory", "control", "alternative", "bound"
ROWS = (
    Row("frozen", "frozen router", "base", "nothing", "retrieval:frozen"),
    Row("memory", "memory as calibrated", MEMORY, "values", "retrieval:calibrated"),
    Row("logits", "· variant logits", MEMORY, "values", "retrieval:logits"),
    Row("assignment", "· variant assignment", MEMORY, "values", "retrieval:assignment"),
    Row("residual", "· variant residual", MEMORY, "values", "retrieval:residual"),
    Row("paper", "kNN-MoE v2, published", MEMORY, "values", "retrieval:paper", "arXiv 2601.02144"),
    Row("shuffled", "values shuffled", CONTROL, "values", "retrieval:shuffled_values"),
    Row("constant", "the mean residual", CONTROL, "values", "retrieval:constant_value"),
    Row("router", "router fine-tuned", OTHER, "router", "finetune:router"),
    Row("full", "all fine-tuned", OTHER, "all weights", "finetune:everything"),
    Row("knn-lm", "kNN-LM", OTHER, "nothing", "knn_lm:knn_lm", "arXiv 1911.00172"),
    Row("laser", "load-aware (LASER)", OTHER, "nothing", "laser:load_aware", "arXiv 2510.03293"),
    Row("rerouting", "re-routing online", OTHER, "as it reads", "rerouting:rerouted",
        "arXiv 2510.14853"),
    Row("oracle", "oracle (sees the test)", BOUND, "on the test", "oracle:oracle"),
)  # fmt: skip
NAMES = tuple(row.name for row in ROWS)


def choose_rows(text: str) -> tuple[Row, ...]:
    """`all`, or names with commas; a name with a minus before it leaves that row out of all.

    Raises:
        SettingError: If a name is unknown, or nothing is left.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word.removeprefix("-") not in (*NAMES, "all")]
    if unknown or not words:
        raise SettingError("rows", "unknown", expected=f"all, or of {', '.join(NAMES)}", found=text)
    without = {word[1:] for word in words if word.startswith("-")}
    named = {word for word in words if not word.startswith("-")}
    every = "all" in named or not named
    rows = tuple(row for row in ROWS if (every or row.name in named) and row.name not in without)
    if not rows:
        raise SettingError("rows", "none is left", found=text)
    return rows
