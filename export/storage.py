"""In what form each weight of the `ort` lowering is stored: fp32, fp16, or blocks of integers.

The lowering plans its weights as fp32; `Storage.of` turns that plan into one of what is written. A
weight in blocks becomes up to three tensors, made in one pass over the fp32 rows: codes, scales and
zero points. `Storage.restored` is what a model that reads them back computes with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.bundle import BLOCK_SIZES, PRECISIONS, QUANTIZED_BITS, Quantization
from knnmoe.runtime.errors import CheckpointError, SettingError

from .quantize import ErrorMeter, Floats, Quantized, Scheme, TensorError, quantize
from .weights import PlannedTensor

HEAD_BITS = (8, 4)  # of a quantised head, whatever the precision

CODES, SCALES, ZERO_POINTS = ".codes", ".scales", ".zero_points"

# Parts of the `ort` lowering's weights: the last component of a name.
_EXPERTS = ("gate_up", "down")
_PROJECTIONS = (
    "qkv", "query_up", "output", "dense_gate_up", "dense_down", "shared_gate_up", "shared_down",
)  # fmt: skip
# What decides which experts are taken stays fp32, as do the small vectors and those of all experts;
# and the rotary tables.
_KEPT = ("router", "shared_router", "gate_up_bias", "down_bias", "cos", "sin", "constant")
_HEAD, _EMBEDDING = "head", "embedding"

# For who has the weights by other names. Fields of a family's `TensorNames` → part; then the stacks
# that transformers makes of a layer's experts → part.
FIELD_PARTS = {
    "embedding": "embedding",
    "query": "qkv",
    "key": "qkv",
    "value": "qkv",
    "query_down": "qkv",
    "query_up": "query_up",
    "latent_down": "qkv",
    "latent_up": "key_up",
    "output": "output",
    "dense_gate": "dense_gate_up",
    "dense_up": "dense_gate_up",
    "dense_down": "dense_down",
    "shared_gate": "shared_gate_up",
    "shared_up": "shared_gate_up",
    "shared_down": "shared_down",
    "head": "head",
}
EXPERT_PARTS = {"gate_up_proj": "gate_up", "down_proj": "down"}

_PIECE = 1 << 18  # weights converted at a time
_FP16_MAX = 65504.0


@dataclass(frozen=True)
class QuantizeOptions:
    """What may be chosen about a quantised bundle.

    Attributes:
        block_size: Weights that share a scale; None takes the largest that suits the shapes, which
            is the fastest. Smaller ones are more accurate.
        zero_points: Give every block a zero point of its own: more accurate, and slower.
        exact_activations: Multiply with fp32, not with activations rounded to 8 bits. Not for int8,
            for which ONNX Runtime has no such operator.
        head_bits: Store the head too in blocks, of `HEAD_BITS`; None keeps it fp16. It is where
            errors reach the output: 4 bits cost more there than anywhere. 8 do not go with exact
            activations.
        search: Search for the scales, which takes most of the time of an export.
    """

    block_size: int | None = None
    zero_points: bool = False
    exact_activations: bool = False
    head_bits: int | None = None
    search: bool = True


@dataclass(frozen=True)
class Storage:
    """How the weights of one bundle are stored.

    Attributes:
        precision: One of the manifest's.
        quantization: The manifest's; None for fp32 and fp16.
        tied_head: Whether the head is the embedding.
        meters: Of every weight not stored as it was, filled while it is written.
        known: The same of weights that an interrupted export wrote.
    """

    precision: str
    quantization: Quantization | None
    tied_head: bool
    meters: dict[str, tuple[str, ErrorMeter]] = field(default_factory=dict)
    known: dict[str, TensorError] = field(default_factory=dict)

    @property
    def errors(self) -> tuple[TensorError, ...]:
        """What storing changed, for each weight written so far that is not stored as fp32."""
        return tuple(
            self.known[name] if name in self.known else meter.result(name, kind)
            for name, (kind, meter) in self.meters.items()
        )

    def new_errors(self) -> tuple[TensorError, ...]:
        """Those of weights written since the last call; they become known."""
        found = tuple(e for e in self.errors if e.values and e.name not in self.known)
        self.known.update({error.name: error for error in found})
        return found

    def scheme(self, part: str) -> Scheme | None:
        """How a part is quantised; None if it is not."""
        found = self.quantization
        if found is None:
            return None
        if part in _EXPERTS or part in _PROJECTIONS:
            return Scheme(found.bits, found.block_size, found.zero_points, found.search)
        if part == _HEAD and found.head_bits is not None:
            return Scheme(found.head_bits, found.block_size, found.zero_points, found.search)
        return None

    def is_half(self, part: str, rank: int) -> bool:
        """Whether a part that is not quantised is stored as fp16."""
        return self.precision != "fp32" and rank > 1 and part not in _KEPT

    def restored(self, part: str, rows: Floats) -> Floats:
        """Weights [..., K] of a part after they were stored and read back, fp32."""
        scheme = self.scheme(part)
        if scheme is not None:
            flat = rows.reshape(-1, rows.shape[-1])
            pieces = [quantize(piece, scheme).dequantized() for piece in _pieces(flat)]
            return np.concatenate(pieces).reshape(rows.shape)
        if self.is_half(part, rows.ndim):
            return rows.astype(np.float16).astype(np.float32)
        return rows

    def of(self, planned: Iterable[PlannedTensor]) -> list[PlannedTensor]:
        """What is written in place of weights planned as fp32.

        Zero points come last: they may have an odd number of bytes, and what follows must lie where
        a processor reads it.
        """
        stored: list[PlannedTensor] = []
        last: list[PlannedTensor] = []
        for tensor in planned:
            part = _part(tensor.name)
            schemes = [self.scheme(part)]
            if part == _EMBEDDING and self.tied_head:
                schemes.append(self.scheme(_HEAD))
            if schemes[0] is None:
                half = self.is_half(part, len(tensor.shape))
                stored.append(self._half(tensor) if half else tensor)
            for scheme in filter(None, schemes):
                meter = self._meter(tensor.name, kind_of(scheme))
                tensors = _Blocks(tensor, scheme, meter).tensors()
                stored += tensors[:2]
                last += tensors[2:]
        return stored + last

    def _half(self, tensor: PlannedTensor) -> PlannedTensor:
        meter = self._meter(tensor.name, "fp16")

        def chunks() -> Iterator[NDArray[Any]]:
            for rows in _all_pieces(tensor):
                largest = np.abs(rows).max(initial=0)
                if not largest <= _FP16_MAX:  # NaN too
                    raise CheckpointError(
                        f"weight {tensor.name}",
                        "has a value that fp16 cannot hold",
                        expected=f"at most {_FP16_MAX:g}",
                        found=f"{largest:g}",
                        fix="Export with --precision fp32.",
                    )
                half = rows.astype(np.float16)
                meter.add(rows, half.astype(np.float32))
                yield half

        return replace(tensor, chunks=chunks, dtype="float16")

    def _meter(self, name: str, kind: str) -> ErrorMeter:
        # The tied embedding is there twice.
        key = name if name not in self.meters else f"{name} (head)"
        self.meters[key] = (kind, ErrorMeter())
        return self.meters[key][1]


def storage_for(
    precision: str, options: QuantizeOptions, planned: Sequence[PlannedTensor], *, tied_head: bool
) -> Storage:
    """How weights planned as fp32 are stored.

    Raises:
        SettingError: If the precision is unknown, an option does not go with it, or no block size
            suits the shapes.
    """
    if precision not in PRECISIONS:
        raise SettingError(
            "precision", "not supported", expected=" or ".join(PRECISIONS), found=precision
        )
    if precision not in QUANTIZED_BITS:
        for option in fields(QuantizeOptions):
            if getattr(options, option.name) != option.default:
                raise SettingError(
                    option.name,
                    f"has no meaning with the precision {precision}",
                    expected=" or ".join(QUANTIZED_BITS),
                    found=getattr(options, option.name),
                    fix="Leave the option out, or choose another --precision.",
                )
        return Storage(precision, None, tied_head)
    if precision == "int8" and options.exact_activations:
        raise SettingError(
            "exact_activations",
            "is not to be had with the precision int8: ONNX Runtime rounds what 8-bit experts are "
            "multiplied with in any case",
            expected="int4, fp16 or fp32",
            fix="Choose another --precision, or leave --exact-activations out.",
        )
    if options.head_bits not in (None, *HEAD_BITS):
        raise SettingError(
            "head_bits",
            "is not to be had",
            expected=" or ".join(map(str, HEAD_BITS)),
            found=options.head_bits,
        )
    if options.head_bits == 8 and options.exact_activations:
        raise SettingError(
            "head_bits",
            "does not go with exact activations: ONNX Runtime would unpack the whole 8-bit head at "
            "every step, which takes longer than all else",
            expected="one of the two",
            found="both",
            fix="Leave --exact-activations out, or take --head-bits 4 or none.",
        )
    found = Quantization(
        bits=QUANTIZED_BITS[precision],
        block_size=min(BLOCK_SIZES),
        zero_points=options.zero_points,
        activations="fp32" if options.exact_activations else "int8",
        head_bits=options.head_bits,
        search=options.search,
    )
    draft = Storage(precision, found, tied_head)
    size = choose_block_size(planned, draft, options.block_size)
    return replace(draft, quantization=replace(found, block_size=size))


def kind_of(scheme: Scheme) -> str:
    """A scheme for a reader: `int4/128`, with `z` where blocks have zero points."""
    return f"int{scheme.bits}/{scheme.block}{'z' if scheme.zero_points else ''}"


def choose_block_size(planned: Sequence[PlannedTensor], storage: Storage, asked: int | None) -> int:
    """The block size for the weights that `storage` quantises, whatever size it has now.

    Args:
        planned: Every weight as fp32.
        asked: By the user; None takes the largest of `BLOCK_SIZES` that divides all rows.

    Raises:
        SettingError: If the size asked for does not divide all rows, or none does.
    """
    parts = {t.name: _HEAD if t.name == _EMBEDDING else _part(t.name) for t in planned}
    widths = sorted({t.shape[-1] for t in planned if storage.scheme(parts[t.name]) is not None})
    assert storage.quantization is not None
    # A row that is one block leaves no room for zero points in ONNX Runtime's layout.
    least = 2 if storage.quantization.zero_points else 1

    def suits(size: int) -> bool:
        return all(width % size == 0 and width >= least * size for width in widths)

    sizes = sorted(BLOCK_SIZES, reverse=True)
    found = [size for size in sizes if suits(size) and asked in (None, size)]
    if found:
        return found[0]
    blocks = " (two blocks at least, as there are zero points)" if least == 2 else ""
    raise SettingError(
        "block_size",
        "does not divide the weights' rows into whole blocks",
        expected=f"rows that are multiples of {asked or min(BLOCK_SIZES)}{blocks}",
        found=f"rows of {', '.join(map(str, widths))}",
        fix="Choose a smaller --block-size." if asked else "Export with --precision fp16 or fp32.",
    )


class _Blocks:
    """The tensors of one quantised weight; whoever writes them takes the codes first."""

    def __init__(self, tensor: PlannedTensor, scheme: Scheme, meter: ErrorMeter) -> None:
        self._tensor, self._scheme, self._meter = tensor, scheme, meter
        self._scales: list[Floats] = []
        self._zero_points: list[NDArray[np.uint8]] = []

    def tensors(self) -> list[PlannedTensor]:
        """Codes, scales and, where the scheme has them, zero points."""
        name, (*rows, width) = self._tensor.name, self._tensor.shape
        bits, blocks = self._scheme.bits, width // self._scheme.block
        # The matrix operator wants the bytes of a block as an axis of their own.
        row: tuple[int, ...] = (width * bits // 8,)
        if len(rows) == 1:
            row = (blocks, self._scheme.block * bits // 8)
        found = [
            PlannedTensor(name + CODES, (*rows, *row), self._write_codes, "uint8"),
            PlannedTensor(name + SCALES, (*rows, blocks), lambda: _drained(self._scales)),
        ]
        if self._scheme.zero_points:
            shape = (*rows, -(-blocks * bits // 8))
            found.append(
                PlannedTensor(
                    name + ZERO_POINTS, shape, lambda: _drained(self._zero_points), "uint8"
                )
            )
        return found

    def _write_codes(self) -> Iterator[NDArray[Any]]:
        self._scales.clear()
        self._zero_points.clear()
        for rows in _all_pieces(self._tensor):
            found = self._quantized(rows)
            self._meter.add(rows, found.dequantized())
            self._scales.append(found.scales)
            if self._scheme.zero_points:
                self._zero_points.append(found.packed_zero_points())
            yield found.packed_codes()

    def _quantized(self, rows: Floats) -> Quantized:
        try:
            return quantize(rows, self._scheme)
        except ValueError as error:
            raise CheckpointError(
                f"weight {self._tensor.name}",
                f"cannot be quantised: {error}",
                fix="Download the checkpoint again.",
            ) from error


def _drained(parts: list[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    yield from parts
    parts.clear()


def _all_pieces(tensor: PlannedTensor) -> Iterator[Floats]:
    """Some rows of a tensor at a time."""
    for chunk in tensor.chunks():
        yield from _pieces(chunk.reshape(-1, tensor.shape[-1]))


def _pieces(rows: Floats) -> Iterator[Floats]:
    step = max(1, _PIECE // rows.shape[-1])
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _part(name: str) -> str:
    return name.rsplit(".", 1)[-1]
