"""Which shapes of steps a profile measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import SettingError
from .record import Grid, Phase

DEFAULT_CONTEXT = 128
DEFAULT_PROMPTS = (32, 128)
BLOCK = 5  # decode steps that follow each other in a round
ROUNDS = 10  # wanted at least, since an interval draws rounds
MOST_STEPS = 1_000_000
ALL = "all"


@dataclass(frozen=True)
class Shape:
    """One kind of step: B sequences of `tokens` new tokens each, after `past` others."""

    phase: Phase
    batch: int
    tokens: int
    past: int


def fit_grid(
    max_positions: int,
    *,
    contexts: Sequence[int] = (),
    prompts: Sequence[int] = (),
    batches: Sequence[int] = (1,),
    entries: Sequence[int] = (0,),
    phases: Sequence[Phase] = ("decode", "prefill"),
    steps: int = 100,
    prefills: int = 10,
    warmup: int = 5,
    seed: int = 0,
) -> Grid:
    """Settings for a model of that many positions; what is not given is made to fit.

    Raises:
        SettingError: If what is given is out of its range.
    """
    largest = max_positions - 1  # a decode step takes one position more
    grid = Grid(
        batches=_unique(batches),
        prompts=_unique(prompts or [min(n, max_positions) for n in DEFAULT_PROMPTS]),
        contexts=_unique(contexts or [min(DEFAULT_CONTEXT, largest)]),
        entries=tuple(dict.fromkeys(entries)),
        steps=steps,
        prefills=prefills,
        warmup=warmup,
        seed=seed,
    )
    for context in grid.contexts:
        _check("context", context, 1, largest)
    for length in grid.prompts:
        _check("prompt length", length, 1, max_positions)
    for batch in grid.batches:
        _check("batch", batch, 1, 4096)
    for name in ("steps", "prefills"):
        _check(name, getattr(grid, name), 1, MOST_STEPS)
    _check("warmup", grid.warmup, 0, MOST_STEPS)
    return Grid(
        **{
            **vars(grid),
            "contexts": grid.contexts if "decode" in phases else (),
            "prompts": grid.prompts if "prefill" in phases else (),
        }
    )


def memory_sizes(asked: Sequence[str], entries: int | None) -> tuple[int, ...]:
    """The memory sizes asked for, largest first; by default all entries, and none (frozen).

    Args:
        asked: Numbers of a gate's entries; `all`, or 0 for the frozen router.
        entries: Of the pack, in its largest gate; None without a pack.

    Raises:
        SettingError: If one is no number, or more than the pack has.
    """
    if entries is None:
        if any(size != "0" for size in asked):
            raise SettingError("--entries", "needs a memory", fix="Give one with --memory PACK.")
        return (0,)
    sizes = set()
    for size in asked or (ALL, "0"):
        if size != ALL and not (size.isdecimal() and int(size) <= entries):
            raise SettingError(
                "--entries", "out of range", expected=f"0 to {entries}, or {ALL}", found=size
            )
        sizes.add(entries if size == ALL else int(size))
    return tuple(sorted(sizes, reverse=True))


def shapes(grid: Grid) -> tuple[Shape, ...]:
    """Every shape of a grid: decode steps, then prefills."""
    return (
        *(Shape("decode", b, 1, past) for b in grid.batches for past in grid.contexts),
        *(Shape("prefill", b, tokens, 0) for b in grid.batches for tokens in grid.prompts),
    )


def visits(grid: Grid, shape: Shape) -> tuple[int, ...]:
    """How many steps each visit to a point of that shape takes."""
    if shape.phase == "prefill":
        return (1,) * grid.prefills
    block = max(1, min(BLOCK, grid.steps // ROUNDS))
    whole, rest = divmod(grid.steps, block)
    return (block,) * whole + ((rest,) if rest else ())


def rounds(grid: Grid) -> tuple[tuple[tuple[Shape, int], ...], ...]:
    """Which shapes each round visits and for how many steps, spread evenly over all rounds."""
    planned = {shape: visits(grid, shape) for shape in shapes(grid)}
    count = max(map(len, planned.values()), default=0)
    table: list[list[tuple[Shape, int]]] = [[] for _ in range(count)]
    for shape, sizes in planned.items():
        for number, steps in enumerate(sizes):
            table[number * count // len(sizes)].append((shape, steps))
    return tuple(map(tuple, table))


def _unique(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(set(numbers)))


def _check(name: str, number: int, low: int, high: int) -> None:
    if not low <= number <= high:
        raise SettingError(name, "out of range", expected=f"{low} to {high}", found=number)
