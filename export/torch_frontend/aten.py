"""torch's operators → ONNX, those that occur in decoders of transformers.

Each entry of `TABLE` takes the writer of the graph and the node, and appends what the node
computes. An operator that is not in it is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from knnmoe.export.graph import GraphBuilder

aten: Any = torch.ops.aten

# dtype of torch → of ONNX, and of NumPy
DTYPES: dict[torch.dtype, tuple[ir.DataType, type[np.generic]]] = {
    torch.float32: (ir.DataType.FLOAT, np.float32),
    torch.float64: (ir.DataType.DOUBLE, np.float64),
    torch.int64: (ir.DataType.INT64, np.int64),
    torch.int32: (ir.DataType.INT32, np.int32),
    torch.bool: (ir.DataType.BOOL, np.bool_),
}


class Writer(Protocol):
    """What an entry of the table writes with."""

    @property
    def g(self) -> GraphBuilder:
        """The graph under construction."""

    def value(self, argument: Any) -> ir.Value:
        """The value of a node."""

    def table(self, argument: Any) -> ir.Value:
        """The value of a weight whose rows are looked up, as it is stored."""

    def sizes(self, node: Node, source: Node | None = None) -> ir.Value:
        """The shape of a node's result, to which `source` is to be reshaped."""

    def lengths(self, node: Node) -> ir.Value:
        """The shape of a node's result in numbers, none of them -1 or 0."""


Entry = Callable[[Writer, Node], ir.Value]


def _val(node: Any) -> torch.Tensor:
    found: torch.Tensor = node.meta["val"]
    return found


def _args(node: Node) -> tuple[Any, ...]:
    """The arguments of a node, which its operator's schema gives their types."""
    return node.args


def _argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    if len(_args(node)) > index:
        return _args(node)[index]
    return node.kwargs.get(name, default)


def _axis(axis: int, rank: int) -> int:
    return axis % rank


def _axes(node: Node, index: int = 1) -> list[int]:
    axes = _argument(node, index, "dim")
    rank = _val(_args(node)[0]).ndim
    if axes is None or axes == []:
        return list(range(rank))
    return [_axis(a, rank) for a in ([axes] if isinstance(axes, int) else axes)]


def cast(w: Writer, value: ir.Value, dtype: torch.dtype) -> ir.Value:
    """A value in another dtype."""
    return w.g.op("Cast", value, to=int(DTYPES[dtype][0]))


def operand(w: Writer, argument: Any, dtype: torch.dtype) -> ir.Value:
    """A node or a number, in a dtype."""
    if not isinstance(argument, Node):
        number: float = argument
        return w.g.constant(number, DTYPES[dtype][1])
    value = w.value(argument)
    return value if _val(argument).dtype == dtype else cast(w, value, dtype)


def unary(op_type: str, **attributes: Any) -> Entry:
    """An operator of one tensor."""

    def entry(w: Writer, node: Node) -> ir.Value:
        return w.g.op(op_type, operand(w, _args(node)[0], _val(node).dtype), **attributes)

    return entry


def binary(op_type: str, *, swapped: bool = False) -> Entry:
    """An operator of two tensors or a tensor and a number, in the dtype of the result."""

    def entry(w: Writer, node: Node) -> ir.Value:
        dtype = _val(node).dtype
        left, right = (operand(w, argument, dtype) for argument in _args(node)[:2])
        alpha: Any = node.kwargs.get("alpha", 1)
        if alpha != 1:
            right = w.g.op("Mul", right, w.g.constant(alpha, DTYPES[dtype][1]))
        return w.g.op(op_type, right, left) if swapped else w.g.op(op_type, left, right)

    return entry


def comparison(op_type: str) -> Entry:
    """A comparison, in the dtype of what is compared."""

    def entry(w: Writer, node: Node) -> ir.Value:
        dtypes = [_val(a).dtype for a in _args(node)[:2] if isinstance(a, Node)]
        dtype = dtypes[0] if len(dtypes) == 1 else torch.promote_types(*dtypes)
        if any(isinstance(a, float) for a in _args(node)[:2]) and not dtype.is_floating_point:
            dtype = torch.float32
        return w.g.op(op_type, *(operand(w, argument, dtype) for argument in _args(node)[:2]))

    return entry


def reduction(op_type: str) -> Entry:
    """A reduction over some axes."""

    def entry(w: Writer, node: Node) -> ir.Value:
        value = operand(w, _args(node)[0], _val(node).dtype)
        keep = int(bool(_argument(node, 2, "keepdim", False)))
        return w.g.op(op_type, value, w.g.ints(*_axes(node)), keepdims=keep)

    return entry


def same(w: Writer, node: Node) -> ir.Value:
    """What changes nothing, or only the dtype."""
    return operand(w, _args(node)[0], _val(node).dtype)


def reshape(w: Writer, node: Node) -> ir.Value:
    """The same numbers in another shape."""
    source = _args(node)[0]
    assert isinstance(source, Node)
    return w.g.op("Reshape", w.value(source), w.sizes(node, source))


def linear(w: Writer, node: Node) -> ir.Value:
    """rows [..., in] by a weight [out, in] → [..., out]."""
    rows, weight = _args(node)[:2]
    bias = _argument(node, 2, "bias")
    found, width = w.value(rows), _val(rows).shape[-1]
    flat = _val(rows).ndim == 2
    if not flat:
        found = w.g.op("Reshape", found, w.g.ints(-1, width))
    more = [] if bias is None else [w.value(bias)]
    result = w.g.op("Gemm", found, w.value(weight), *more, transB=1)
    return result if flat else w.g.op("Reshape", result, w.sizes(node))


def embedding(w: Writer, node: Node) -> ir.Value:
    """Rows of a table."""
    weight, ids = _args(node)[:2]
    table = w.table(weight)
    rows = w.g.op("Gather", table, w.value(ids), axis=0)
    return cast(w, rows, _val(node).dtype) if table.dtype == ir.DataType.FLOAT16 else rows


def transpose(w: Writer, node: Node) -> ir.Value:
    """Two axes exchanged."""
    order = list(range(_val(node).ndim))
    one, other = (_axis(a, len(order)) for a in (_args(node)[1:3] or (0, 1)))
    order[one], order[other] = other, one
    return w.g.op("Transpose", w.value(_args(node)[0]), perm=order)


def permute(w: Writer, node: Node) -> ir.Value:
    """Axes in another order."""
    rank = _val(node).ndim
    return w.g.op(
        "Transpose", w.value(_args(node)[0]), perm=[_axis(a, rank) for a in _args(node)[1]]
    )


def expand(w: Writer, node: Node) -> ir.Value:
    """Axes of length one made longer."""
    return w.g.op("Expand", w.value(_args(node)[0]), w.lengths(node))


def cut(w: Writer, node: Node) -> ir.Value:
    """A part of an axis."""
    source, axis = _args(node)[0], _argument(node, 1, "dim", 0)
    start, end = _argument(node, 2, "start") or 0, _argument(node, 3, "end")
    step = _argument(node, 4, "step", 1)
    if _val(source).shape == _val(node).shape:
        return w.value(source)
    bounds = (start, np.iinfo(np.int64).max if end is None else end, step)
    if any(isinstance(bound, Node) for bound in bounds):
        raise NotImplementedError("a part of an axis whose bounds depend on the text's length")
    starts, ends, steps = (w.g.ints(int(bound)) for bound in bounds)
    return w.g.op("Slice", w.value(source), starts, ends, w.g.ints(axis), steps)


def paste(w: Writer, node: Node) -> ir.Value:
    """A tensor with a part of an axis replaced."""
    whole, part, axis = *_args(node)[:2], _argument(node, 2, "dim", 0)
    start, end = _argument(node, 3, "start") or 0, _argument(node, 4, "end")
    size, axis = _val(node).shape[axis], _axis(axis, _val(node).ndim)
    if _val(part).shape[axis] == size:  # all of it
        return w.value(part)
    if not all(isinstance(n, int) for n in (start, size)) or _argument(node, 5, "step", 1) != 1:
        raise NotImplementedError("a part of an axis whose bounds depend on the text's length")
    start, end = (max(0, min(size, n + size if n < 0 else n)) for n in (start, end or size))
    value, pieces = w.value(whole), [w.value(part)]
    if start:
        pieces.insert(0, w.g.op("Slice", value, w.g.ints(0), w.g.ints(start), w.g.ints(axis)))
    if end < size:
        pieces.append(w.g.op("Slice", value, w.g.ints(end), w.g.ints(size), w.g.ints(axis)))
    return w.g.op("Concat", *pieces, axis=axis)


def copy(w: Writer, node: Node) -> ir.Value:
    """One tensor in the shape and dtype of another."""
    value = operand(w, _args(node)[1], _val(node).dtype)
    same_shape = _val(_args(node)[1]).shape == _val(node).shape
    return value if same_shape else w.g.op("Expand", value, w.lengths(node))


def select(w: Writer, node: Node) -> ir.Value:
    """One index of an axis."""
    index = w.g.constant(_args(node)[2], np.int64)
    return w.g.op("Gather", w.value(_args(node)[0]), index, axis=_args(node)[1])


def concatenate(w: Writer, node: Node) -> ir.Value:
    """Tensors one behind another."""
    parts: Sequence[Any] = _args(node)[0]
    dtype, rank = _val(node).dtype, _val(node).ndim
    values = [operand(w, part, dtype) for part in parts]
    return w.g.op("Concat", *values, axis=_axis(_argument(node, 1, "dim", 0), rank))


def stack(w: Writer, node: Node) -> ir.Value:
    """Tensors along a new axis."""
    parts: Sequence[Any] = _args(node)[0]
    axis = _axis(_argument(node, 1, "dim", 0), _val(node).ndim)
    values = [w.g.op("Unsqueeze", w.value(part), w.g.ints(axis)) for part in parts]
    return w.g.op("Concat", *values, axis=axis)


def unsqueeze(w: Writer, node: Node) -> ir.Value:
    """A new axis of length one."""
    axis = _axis(_args(node)[1], _val(node).ndim)
    return w.g.op("Unsqueeze", w.value(_args(node)[0]), w.g.ints(axis))


def repeat_interleave(w: Writer, node: Node) -> ir.Value:
    """Each number along an axis several times in a row."""
    source, times, rank = _args(node)[0], _args(node)[1], _val(node).ndim
    axis = _axis(_argument(node, 2, "dim"), rank)
    width = _val(source).shape[axis]
    index = np.repeat(np.arange(int(width)), int(times))
    return w.g.op("Gather", w.value(source), w.g.constant(index, np.int64), axis=axis)


def power(w: Writer, node: Node) -> ir.Value:
    """A tensor to the power of a number, or the other way round."""
    dtype = _val(node).dtype
    return w.g.op("Pow", *(operand(w, argument, dtype) for argument in _args(node)[:2]))


def rsqrt(w: Writer, node: Node) -> ir.Value:
    """1 / √x."""
    return w.g.op("Reciprocal", w.g.op("Sqrt", w.value(_args(node)[0])))


def silu(w: Writer, node: Node) -> ir.Value:
    """x · σ(x)."""
    value = w.value(_args(node)[0])
    return w.g.op("Mul", value, w.g.op("Sigmoid", value))


def gelu(w: Writer, node: Node) -> ir.Value:
    """GELU, exact or by tanh."""
    return w.g.op(
        "Gelu", w.value(_args(node)[0]), approximate=node.kwargs.get("approximate", "none")
    )


def softmax(w: Writer, node: Node) -> ir.Value:
    """Softmax over an axis."""
    value = operand(w, _args(node)[0], _val(node).dtype)
    return w.g.op("Softmax", value, axis=_args(node)[1])


def clamp(w: Writer, node: Node) -> ir.Value:
    """Cut off below and above."""
    dtype = _val(node).dtype
    bounds = (_argument(node, 1, "min"), _argument(node, 2, "max"))
    value = operand(w, _args(node)[0], dtype)
    for op_type, bound in zip(("Max", "Min"), bounds, strict=True):
        if bound is not None:
            value = w.g.op(op_type, value, operand(w, bound, dtype))
    return value


def layer_norm(w: Writer, node: Node) -> ir.Value:
    """A norm with mean, weight and bias."""
    source, shape = _args(node)[0], _args(node)[1]
    weight, bias = _argument(node, 2, "weight"), _argument(node, 3, "bias")
    epsilon = _argument(node, 4, "eps", 1e-5)
    if len(shape) != 1:
        raise NotImplementedError("a layer norm over several axes")
    scale = w.value(weight) if weight else w.g.constant(np.ones(shape), np.float32)
    more = [] if bias is None else [w.value(bias)]
    return w.g.op("LayerNormalization", w.value(source), scale, *more, axis=-1, epsilon=epsilon)


def rms_norm(w: Writer, node: Node) -> ir.Value:
    """A norm without mean, over the last axis."""
    source, shape = _args(node)[0], _args(node)[1]
    weight, epsilon = _argument(node, 2, "weight"), _argument(node, 3, "eps")
    if len(shape) != 1 or epsilon is None:
        raise NotImplementedError("an RMS norm over several axes, or without an epsilon")
    scale = w.value(weight) if weight else w.g.constant(np.ones(shape), np.float32)
    return w.g.op(
        "SimplifiedLayerNormalization", w.value(source), scale,
        axis=-1, epsilon=epsilon, stash_type=1,
    )  # fmt: skip


def where(w: Writer, node: Node) -> ir.Value:
    """One of two, element by element."""
    dtype = _val(node).dtype
    chosen = [operand(w, argument, dtype) for argument in _args(node)[1:3]]
    return w.g.op("Where", w.value(_args(node)[0]), *chosen)


def full(w: Writer, node: Node) -> ir.Value:
    """One number, everywhere; of `zeros` and `ones`, and of those like another tensor."""
    name = str(node.target)
    known = {"ones": 1, "zeros": 0, "empty": 0}  # what is empty is written over
    number = next((n for word, n in known.items() if word in name), None)
    number = _args(node)[1] if number is None else number
    dtype = DTYPES[_val(node).dtype][1]
    return w.g.op("Expand", w.g.constant(number, dtype), w.lengths(node))


def arange(w: Writer, node: Node) -> ir.Value:
    """Numbers in a row; how many must not depend on the text."""
    found = [a for a in _args(node) if not isinstance(a, Node)]
    if len(found) != len(_args(node)):
        raise NotImplementedError("numbers in a row, as many as the text is long")
    dtype = DTYPES[_val(node).dtype][1]
    return w.g.constant(np.arange(*found), dtype)


def addmm(w: Writer, node: Node) -> ir.Value:
    """bias + rows · matrix."""
    bias, rows, matrix = (w.value(argument) for argument in _args(node)[:3])
    return w.g.op("Gemm", rows, matrix, bias)


TABLE: dict[Any, Entry] = {
    **dict.fromkeys(
        (
            aten._to_copy.default, aten.type_as.default, aten.to.dtype, aten.to.device,
            aten.to.dtype_layout, aten.alias.default,
            aten.clone.default, aten.contiguous.default, aten.detach.default,
            aten.dropout.default,
        ),
        same,
    ),
    **dict.fromkeys(
        (
            aten.view.default, aten.reshape.default, aten._unsafe_view.default,
            aten.flatten.using_ints, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
            aten.unflatten.int,
        ),
        reshape,
    ),
    **dict.fromkeys((aten.cat.default, aten.concat.default), concatenate),
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), binary("MatMul")),
    **dict.fromkeys(
        (
            aten.full.default, aten.full_like.default, aten.zeros.default, aten.zeros_like.default,
            aten.ones.default, aten.ones_like.default, aten.new_zeros.default,
            aten.new_empty.default, aten.empty.memory_format,
            aten.new_ones.default,
        ),
        full,
    ),
    **dict.fromkeys(
        (aten.arange.default, aten.arange.start, aten.arange.start_step), arange
    ),
    **dict.fromkeys((aten.transpose.int, aten.t.default), transpose),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), binary("Add")),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), binary("Sub")),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), binary("Mul")),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), binary("Div")),
    **dict.fromkeys((aten.pow.Tensor_Scalar, aten.pow.Scalar, aten.pow.Tensor_Tensor), power),
    **dict.fromkeys((aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default), clamp),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default), softmax),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), where),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar), comparison("Equal")),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), comparison("Greater")),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), comparison("Less")),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), comparison("GreaterOrEqual")),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), comparison("LessOrEqual")),
    aten.rsub.Scalar: binary("Sub", swapped=True),
    aten.minimum.default: binary("Min"),
    aten.maximum.default: binary("Max"),
    aten.logical_and.default: binary("And"),
    aten.logical_or.default: binary("Or"),
    aten.logical_not.default: unary("Not"),
    aten.neg.default: unary("Neg"),
    aten.abs.default: unary("Abs"),
    aten.exp.default: unary("Exp"),
    aten.log.default: unary("Log"),
    aten.sqrt.default: unary("Sqrt"),
    aten.reciprocal.default: unary("Reciprocal"),
    aten.cos.default: unary("Cos"),
    aten.sin.default: unary("Sin"),
    aten.tanh.default: unary("Tanh"),
    aten.sigmoid.default: unary("Sigmoid"),
    aten.relu.default: unary("Relu"),
    aten.mean.dim: reduction("ReduceMean"),
    aten.sum.dim_IntList: reduction("ReduceSum"),
    aten.amax.default: reduction("ReduceMax"),
    aten.linear.default: linear,
    aten.addmm.default: addmm,
    aten.embedding.default: embedding,
    aten.permute.default: permute,
    aten.expand.default: expand,
    aten.slice.Tensor: cut,
    aten.slice_scatter.default: paste,
    aten.copy.default: copy,
    aten.select.int: select,
    aten.stack.default: stack,
    aten.unsqueeze.default: unsqueeze,
    aten.repeat_interleave.self_int: repeat_interleave,
    aten.rsqrt.default: rsqrt,
    aten.silu.default: silu,
    aten.gelu.default: gelu,
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: rms_norm,
}  # fmt: skip

# Operators with several results, of which `getitem` takes one; see `split`.
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)


def split(w: Writer, node: Node) -> Sequence[ir.Value]:
    """Parts of an axis, each with the length it has in the trace."""
    axis = _argument(node, 1 if node.target is aten.unbind.int else 2, "dim", 0)
    source, parts = _args(node)[0], node.meta["val"]
    axis = _axis(axis, _val(source).ndim)
    unbound = node.target is aten.unbind.int
    lengths = [1 if unbound else int(part.shape[axis]) for part in parts]
    values = w.g.ops("Split", w.value(source), w.g.ints(*lengths), count=len(lengths), axis=axis)
    if not unbound:
        return values
    return [w.g.op("Squeeze", value, w.g.ints(axis)) for value in values]
