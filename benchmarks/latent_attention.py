"""Latent attention on ONNX Runtime's CPU provider in the forms that a bundle could have.

    .venv/bin/python benchmarks/latent_attention.py --heads 16

One layer's attention without the projections around it, in the sizes of DeepSeek-V2-Lite (`--heads
128`: of DeepSeek-V3): from the queries of all heads, the latent and the turned key to the heads'
outputs. *Absorbed* attends to one key of 576 for all heads, which is the value too; *apart* does so
with a cache for each; *expanded* attends to a key and a value for every head, the value padded to
the key's size. The forms take turns, so that a busy machine slows all of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from knnmoe.export.graph import CONTRIB, GraphBuilder
from knnmoe.runtime.bundle import TensorSpec

PLAIN, ROTARY, VALUE, RANK = 128, 64, 128, 512
CAPACITY = 2304
# (tokens in the cache, tokens of the step)
STEPS = ((0, 1), (1024, 1), (2048, 1), (0, 128), (0, 512), (1536, 512))
FORMS = ("absorbed", "apart", "expanded")
Random = np.random.Generator


@dataclass(frozen=True)
class Form:
    """A graph, and the shape [B, heads, capacity, size] and number of its caches."""

    session: ort.InferenceSession
    cache: tuple[int, int, int, int]
    caches: int

    @property
    def bytes_a_token(self) -> int:
        return 4 * self.caches * self.cache[1] * self.cache[3]


def build(name: str, heads: int, random: Random) -> Form:
    """One form with random maps, for one thread."""
    g, expanded = GraphBuilder(name), name == "expanded"
    size, kv_heads = (PLAIN + ROTARY, heads) if expanded else (RANK + ROTARY, 1)
    query = g.input("query", "float32", ("tokens", heads, PLAIN + ROTARY))
    latent = g.input("latent", "float32", ("tokens", RANK + ROTARY))
    names = ("key",) if name == "absorbed" else ("key", "value")
    shape = (1, kv_heads, CAPACITY, size)
    past = [g.input(f"past_{part}", "float32", shape) for part in names]
    step = [g.input("seqlens_k", "int32", (1,)), g.input("total_sequence_length", "int32", ())]

    def matrix(*sizes: int) -> ir.Value:
        spread = sizes[-2] ** -0.5
        return g.constant(random.normal(0, spread, sizes), np.float32)

    def turned(value: ir.Value) -> ir.Value:
        return g.op("Transpose", value, perm=[1, 0, 2])

    def cut(value: ir.Value, *sizes: int) -> list[ir.Value]:
        return list(g.ops("Split", value, g.ints(*sizes), count=len(sizes), axis=-1))

    latent_part, key_rotary = cut(latent, RANK, ROTARY)
    if expanded:
        maps = g.op("MatMul", latent_part, matrix(RANK, heads * (PLAIN + VALUE)))
        key, value = cut(g.op("Reshape", maps, g.ints(-1, heads, PLAIN + VALUE)), PLAIN, VALUE)
        tokens = g.op("Shape", latent, start=0, end=1)
        wide = g.op("Concat", tokens, g.ints(heads, ROTARY), axis=0)
        shared = g.op("Expand", g.op("Unsqueeze", key_rotary, g.ints(1)), wide)
        key = g.op("Concat", key, shared, axis=2)
        value = g.op("Pad", value, g.ints(0, 0, 0, 0, 0, size - VALUE))
    else:
        plain, query_rotary = cut(query, PLAIN, ROTARY)
        absorbed = turned(g.op("MatMul", turned(plain), matrix(heads, PLAIN, RANK)))
        query = g.op("Concat", absorbed, query_rotary, axis=2)
        key = value = latent
    rows = [
        g.op("Reshape", part, g.ints(1, -1, count * size))
        for part, count in ((query, heads), (key, kv_heads), (value, kv_heads))
    ]
    outputs = g.ops(
        "GroupQueryAttention", *rows, past[0], past[-1], *step, count=3, domain=CONTRIB,
        num_heads=heads, kv_num_heads=kv_heads, scale=(PLAIN + ROTARY) ** -0.5,
    )  # fmt: skip
    attended = g.op("Reshape", outputs[0], g.ints(-1, heads, size))
    if expanded:
        attended = cut(attended, VALUE, size - VALUE)[0]
    else:
        latents = turned(cut(attended, RANK, ROTARY)[0])
        attended = turned(g.op("MatMul", latents, matrix(heads, RANK, VALUE)))
    g.output(attended, TensorSpec("attended", "float32", ("tokens", heads, VALUE)))
    for part, present in zip(("key", "value"), outputs[1:], strict=True):
        g.output(present, TensorSpec(f"present_{part}", "float32", shape))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    content = ir.to_proto(g.model()).SerializeToString()
    return Form(ort.InferenceSession(content, options), shape, len(names))


def bind(form: Form, heads: int, past: int, tokens: int, random: Random) -> Any:
    """A step with its buffers, the caches in place."""

    def value(array: Any) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(array)

    def numbers(*sizes: int) -> ort.OrtValue:
        return value(random.standard_normal(sizes, dtype=np.float32))

    binding = form.session.io_binding()
    caches = [numbers(*form.cache) for _ in range(form.caches)]
    inputs = {
        "query": numbers(tokens, heads, PLAIN + ROTARY),
        "latent": numbers(tokens, RANK + ROTARY),
        "seqlens_k": value(np.array([past + tokens - 1], np.int32)),
        "total_sequence_length": value(np.array(past + tokens, np.int32)),
    }
    inputs |= dict(zip(("past_key", "past_value"), caches, strict=False))
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, array)
    binding.bind_ortvalue_output("attended", numbers(tokens, heads, VALUE))
    binding.bind_ortvalue_output("present_key", caches[0])
    binding.bind_ortvalue_output("present_value", caches[-1])
    return binding


@click.command()
@click.option("--heads", default=16, show_default=True)
@click.option("--rounds", default=9, show_default=True)
def main(heads: int, rounds: int) -> None:
    """Print the median milliseconds of every form and step, and what a token takes in the cache."""
    random = np.random.default_rng(0)
    forms = {name: build(name, heads, random) for name in FORMS}
    for name, form in forms.items():
        click.echo(f"{name}: {form.bytes_a_token} bytes of cache a token")
    for past, tokens in STEPS:
        bound = {name: bind(form, heads, past, tokens, random) for name, form in forms.items()}
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(rounds + 1):
            for name, binding in bound.items():
                started = time.perf_counter()
                forms[name].session.run_with_iobinding(binding)
                times[name].append(time.perf_counter() - started)
        medians = {name: 1e3 * float(np.median(found[1:])) for name, found in times.items()}
        shown = ", ".join(f"{name} {ms:.2f} ms" for name, ms in medians.items())
        click.echo(f"{tokens} tokens at {past}: {shown}")


if __name__ == "__main__":
    main()
