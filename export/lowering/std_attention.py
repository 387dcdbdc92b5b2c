"""Attention over a cache of fixed capacity, in the operators of the `std` lowering.

Token s of sequence b stands at position past_lengths[b] + s. It sees the columns of the cache below
past_lengths[b] and the tokens of the step up to itself; of these, in a layer with a window, as many
as the window has, itself the last. So a row of padding behind the tokens of a
sequence is seen by none of them, and sees at least itself: no row of the softmax is empty.

What nobody sees is still multiplied by a weight of zero, so it must be finite. A row that has
overflowed adds zeros to the cache, and its NaN stay its own; the columns not yet written are the
caller's, who allocates them as zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .base import Cached
from .ort_weights import ROPE_COS, ROPE_SIN
from .std_ops import Operators, StdOps

_UNSEEN = -1e30  # a score whose exponential is 0 beside any other


@dataclass(frozen=True)
class Heads:
    """What attention computes with: float32, before the rotary embedding.

    Attributes:
        query: [B, S, heads, head size].
        key, value: [B, S, KV heads, head size]. Without a value, it is the key after the rotary
            embedding, and the cache is one array.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value | None


@dataclass(frozen=True)
class AttentionRule:
    """What sets one layer's attention apart.

    Attributes:
        window: Tokens that a query sees, itself the last; None for all before it.
        sinks: [heads], scores of a token that takes its share of the softmax and adds nothing; or
            None.
    """

    window: int | None
    sinks: ir.Value | None


def primitive_attention(
    ops: StdOps, heads: Heads, past: Cached, past_lengths: ir.Value, rule: AttentionRule
) -> tuple[ir.Value, Cached]:
    """Attention in products and a softmax: (attended [B, S, heads, head size], (key, value)).

    The pair is what the step adds to the cache, [B, KV heads, S, head size] each; the cache itself
    is read where it lies. The queries that share a key head are rows of one product, so that keys
    are not repeated.
    """
    g, group, window = ops.g, _group(ops), rule.window
    scaled = g.op("Mul", _rotated(ops, heads.query, past_lengths), ops.number(_scale(ops)))
    query = ops.narrow(_grouped(ops, scaled, heads.query))
    rotated = _rotated(ops, heads.key, past_lengths)
    fresh = (rotated,) if heads.value is None else (rotated, heads.value)
    added = tuple(ops.narrow(_finite(ops, _by_head(ops, part))) for part in fresh)
    key, value = added[0], added[-1]
    seen_past = ops.once(
        f"seen of the past in {window}",
        lambda: _seen_past(ops, past[0], key, past_lengths, group, window),
    )
    seen_new = ops.once(f"seen of the new in {window}", lambda: _seen_new(ops, key, group, window))
    scores = g.op(
        "Concat",
        _scores(ops, query, past[0], seen_past),
        _scores(ops, query, key, seen_new),
        axis=-1,
    )
    weights = ops.narrow(_shares(ops, scores, rule.sinks))
    capacity = g.op("Shape", past[0], start=2, end=3)
    end, axis = g.ints(np.iinfo(np.int64).max), g.ints(-1)
    of_past = g.op("Slice", weights, g.ints(0), capacity, axis)
    of_new = g.op("Slice", weights, capacity, end, axis)
    attended = g.op(
        "Add",
        ops.widen(g.op("MatMul", of_past, past[-1])),
        ops.widen(g.op("MatMul", of_new, value)),
    )
    return _ungrouped(ops, attended, key, heads.query), added


def modern_attention(
    ops: StdOps, heads: Heads, past: Cached, past_lengths: ir.Value, rule: AttentionRule
) -> tuple[ir.Value, Cached]:
    """Attention by operators of opset 24: (attended [B, S, heads, head size], (key, value)).

    The pair is the whole cache after the step, which TensorScatter has written into; past and
    present are bound to one buffer. Its capacity must have room for all S rows of every sequence,
    padding included. The softmax of float16 scores has the precision the host gives it: TensorRT
    refuses the attribute that would ask for float32. The operator knows no sinks: layers that have
    them are products and a softmax here too.
    """
    g, window = ops.g, rule.window
    query = _rotary_embedding(ops, heads.query, past_lengths)
    if rule.sinks is None:
        query = ops.narrow(query)
    rotated = _rotary_embedding(ops, heads.key, past_lengths)
    fresh = (rotated,) if heads.value is None else (rotated, _by_head(ops, heads.value))
    added = tuple(ops.narrow(_finite(ops, part)) for part in fresh)
    caches = tuple(
        g.op("TensorScatter", cached, part, past_lengths, axis=2)
        for cached, part in zip(past, added, strict=True)
    )
    key, keys, values = added[0], caches[0], caches[-1]
    seen = ops.once(
        f"seen in {window}", lambda: _seen(ops, past[0], heads.query, past_lengths, window)
    )
    if rule.sinks is not None:
        scaled = g.op("Mul", _by_head(ops, query), ops.number(_scale(ops)))
        rows = ops.once(f"seen by group in {window}", lambda: _by_group(ops, seen))
        scores = _scores(ops, ops.narrow(_grouped(ops, scaled, heads.query)), keys, rows)
        weights = ops.narrow(_shares(ops, scores, rule.sinks))
        attended = ops.widen(g.op("MatMul", weights, values))
        return _ungrouped(ops, attended, key, heads.query), caches
    attended = g.op("Attention", query, keys, values, seen, scale=_scale(ops))
    return ops.widen(_by_head(ops, attended)), caches


Attention = Callable[[StdOps, Heads, Cached, ir.Value, AttentionRule], tuple[ir.Value, Cached]]

ATTENTION: dict[Operators, Attention] = {
    "primitive": primitive_attention,
    "modern": modern_attention,
}


def _scale(ops: StdOps) -> float:
    return ops.a.softmax_scale


def _group(ops: StdOps) -> int:
    """Query heads that share a key head."""
    return ops.a.shape.num_heads // ops.a.shape.num_kv_heads


def _grouped(ops: StdOps, query: ir.Value, like: ir.Value) -> ir.Value:
    """[B, S, heads, head size], the shape of `like` → [B, KV heads, S · group, head size]."""
    g, shape = ops.g, ops.a.shape
    batch = g.op("Shape", like, start=0, end=2)
    grouped = g.op(
        "Concat", batch, g.ints(shape.num_kv_heads, _group(ops), shape.head_size), axis=0
    )
    query = g.op("Transpose", g.op("Reshape", query, grouped), perm=[0, 2, 1, 3, 4])
    return g.op("Reshape", query, g.ints(0, 0, -1, shape.head_size))


def _ungrouped(ops: StdOps, attended: ir.Value, key: ir.Value, query: ir.Value) -> ir.Value:
    """[B, KV heads, S · group, head size] → [B, S, heads, head size], as the query is.

    Args:
        key: Of the step, [B, KV heads, S, head size].
    """
    g = ops.g
    begin = g.op("Shape", key, start=0, end=3)
    back = g.op("Concat", begin, g.ints(_group(ops), ops.a.shape.head_size), axis=0)
    attended = g.op("Transpose", g.op("Reshape", attended, back), perm=[0, 2, 1, 3, 4])
    return g.op("Reshape", attended, g.op("Shape", query))


def _shares(ops: StdOps, scores: ir.Value, sinks: ir.Value | None) -> ir.Value:
    """The softmax of scores [B, KV heads, S · group, columns], less what the sinks take."""
    g = ops.g
    if sinks is None:
        return g.op("Softmax", scores, axis=-1)
    rows = g.op("Shape", scores, start=0, end=3)
    # A row is a token's share of a group: the heads of the group take turns.
    size = g.op("Div", g.op("Gather", rows, g.ints(2), axis=0), g.ints(_group(ops)))
    heads = g.op("Reshape", sinks, g.ints(ops.a.shape.num_kv_heads, 1, _group(ops)))
    turns = g.op("Concat", g.ints(1), size, g.ints(1), axis=0)
    column = g.op("Reshape", g.op("Tile", heads, turns), g.ints(1, ops.a.shape.num_kv_heads, -1, 1))
    column = g.op("Expand", column, g.op("Concat", rows, g.ints(1), axis=0))
    shares = g.op("Softmax", g.op("Concat", scores, column, axis=-1), axis=-1)
    return g.op("Slice", shares, g.ints(0), g.ints(-1), g.ints(-1))


def _by_group(ops: StdOps, seen: ir.Value) -> ir.Value:
    """[B, 1, S, columns] → [B, 1, S · group, columns]: the heads of a group see the same."""
    g, group = ops.g, _group(ops)
    if group == 1:
        return seen
    size = g.op("Shape", seen)
    begin, end = (g.op("Slice", size, g.ints(a), g.ints(b)) for a, b in ((0, 3), (3, 4)))
    wide = g.op("Concat", begin, g.ints(group), end, axis=0)
    repeated = g.op("Expand", g.op("Unsqueeze", seen, g.ints(3)), wide)
    return g.op("Reshape", repeated, g.op("Concat", g.ints(0, 1, -1), end, axis=0))


def _by_head(ops: StdOps, value: ir.Value) -> ir.Value:
    """[B, S, heads, head size] ↔ [B, heads, S, head size]."""
    return ops.g.op("Transpose", value, perm=[0, 2, 1, 3])


def _finite(ops: StdOps, part: ir.Value) -> ir.Value:
    """The part, with zeros for NaN and for what is beyond the range of the cache."""
    bound = ops.number(float(np.finfo(ops.dtype).max))
    within = ops.g.op("LessOrEqual", ops.g.op("Abs", part), bound)
    return ops.g.op("Where", within, part, ops.number(0.0))


def _positions(ops: StdOps, part: ir.Value, past_lengths: ir.Value) -> ir.Value:
    """Positions [B, S] of part [B, S, …]; padding beyond the tables stays at their end."""

    def make() -> ir.Value:
        g = ops.g
        start = g.op("Unsqueeze", past_lengths, g.ints(1))
        positions = g.op("Add", start, ops.axis_range(part, 1))
        return g.op("Min", positions, g.constant(ops.a.shape.max_positions - 1, np.int64))

    return ops.once("positions", make)


def _rotated(ops: StdOps, part: ir.Value, past_lengths: ir.Value) -> ir.Value:
    """The rotary embedding of part [B, S, n, head size]: the halves of what is turned of each head
    are the two axes.
    """
    g, half = ops.g, ops.a.rotary_size // 2
    positions = _positions(ops, part, past_lengths)

    def turns(table: str) -> ir.Value:
        """Cosines or sines, [B, S, 1, rotary size / 2]."""
        rows = g.op("Gather", ops.weight(table), positions, axis=0)
        return g.op("Unsqueeze", rows, g.ints(2))

    cos = ops.once("cosines", lambda: turns(ROPE_COS))
    sin = ops.once("sines", lambda: turns(ROPE_SIN))
    kept = ops.a.shape.head_size - 2 * half
    if ops.a.interleaved:
        # The pairs come out in halves, of queries and of keys, so that no product sees it.
        axis, end, two = g.ints(-1), g.ints(2 * half), g.ints(2)
        first, second = (g.op("Slice", part, g.ints(i), end, axis, two) for i in (0, 1))
        rest = [g.op("Slice", part, end, g.ints(np.iinfo(np.int64).max), axis)]
    else:
        sizes = g.ints(half, half, *([kept] if kept else []))
        first, second, *rest = g.ops("Split", part, sizes, count=3 if kept else 2, axis=-1)
    turned = (
        g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin)),
        g.op("Add", g.op("Mul", first, sin), g.op("Mul", second, cos)),
    )
    return g.op("Concat", *turned, *rest, axis=-1)


def _rotary_embedding(ops: StdOps, part: ir.Value, past_lengths: ir.Value) -> ir.Value:
    """The rotary embedding of part [B, S, n, head size], as [B, n, S, head size]."""
    positions = _positions(ops, part, past_lengths)
    tables = (ops.weight(ROPE_COS), ops.weight(ROPE_SIN))
    whole = ops.a.rotary_size == ops.a.shape.head_size
    return ops.g.op(
        "RotaryEmbedding", _by_head(ops, part), *tables, positions,
        rotary_embedding_dim=0 if whole else ops.a.rotary_size,
        interleaved=int(ops.a.interleaved),
    )  # fmt: skip


def _scores(ops: StdOps, query: ir.Value, keys: ir.Value, seen: ir.Value) -> ir.Value:
    """query [B, n, rows, head size] by keys [B, n, columns, head size], where they are seen."""
    g = ops.g
    product = g.op("MatMul", query, g.op("Transpose", keys, perm=[0, 1, 3, 2]))
    return g.op("Where", seen, ops.widen(product), ops.number(_UNSEEN))


def _seen_past(
    ops: StdOps,
    keys: ir.Value,
    key: ir.Value,
    past_lengths: ir.Value,
    group: int,
    window: int | None,
) -> ir.Value:
    """Which columns of the cache the rows see, [B, 1, 1, capacity]; in a window, S · group rows.

    Args:
        keys: Of the cache, [B, KV heads, capacity, head size].
        key: Of the step, [B, KV heads, S, head size].
    """
    g = ops.g
    lengths = g.op("Unsqueeze", past_lengths, g.ints(1, 2, 3))
    columns = ops.axis_range(keys, 2)
    tokens = g.op("Less", columns, lengths)
    if window is None:
        return tokens
    rows = _rows(ops, ops.axis_range(key, 2), group)
    positions = g.op("Add", lengths, rows)  # [B, 1, S · group, 1]
    return g.op("And", tokens, _within(ops, positions, columns, window))


def _seen_new(ops: StdOps, key: ir.Value, group: int, window: int | None) -> ir.Value:
    """Which of the step's tokens the rows see, [S · group, S]."""
    tokens = ops.axis_range(key, 2)
    rows = _rows(ops, tokens, group)
    seen = ops.g.op("GreaterOrEqual", rows, tokens)
    return seen if window is None else ops.g.op("And", seen, _within(ops, rows, tokens, window))


def _rows(ops: StdOps, tokens: ir.Value, group: int) -> ir.Value:
    """The token of each row of a product, [S · group, 1], of the tokens [S]."""
    g = ops.g
    rows = g.op("Unsqueeze", tokens, g.ints(1))
    if group > 1:
        size = g.op("Concat", g.op("Shape", tokens), g.ints(group), axis=0)
        rows = g.op("Reshape", g.op("Expand", rows, size), g.ints(-1, 1))
    return rows


def _seen(
    ops: StdOps, keys: ir.Value, part: ir.Value, past_lengths: ir.Value, window: int | None
) -> ir.Value:
    """Which columns of the cache the rows see, [B, 1, S, capacity]."""
    g = ops.g
    rows = g.op("Unsqueeze", _positions(ops, part, past_lengths), g.ints(1, 3))
    columns = ops.axis_range(keys, 2)
    seen = g.op("LessOrEqual", columns, rows)
    return seen if window is None else g.op("And", seen, _within(ops, rows, columns, window))


def _within(ops: StdOps, rows: ir.Value, columns: ir.Value, window: int) -> ir.Value:
    """Whether a column is among the last `window` up to the row's own, or beyond that."""
    g = ops.g
    return g.op("Greater", columns, g.op("Sub", rows, g.constant(window, np.int64)))
