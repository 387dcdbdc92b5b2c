"""Train the demo's tokenizer and its small OLMoE, on two CPU cores in half an hour to an hour.

The result is a checkpoint like any other: `AutoModelForCausalLM.from_pretrained(out)`.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

END, PAD = "<|endoftext|>", "<|padding|>"
VOCABULARY = 3072
LENGTH = 512  # tokens of a training sequence, and the longest context the model knows
# Descriptions of web services outweigh the prose of libraries, of which the general set is made:
# a pass reads the latter four times. One domain is rare in training, the other is not there.
SERVICES = ("botocore", "google-api-python-client")
RARE = ("bible-cli",)
REPEAT_LIBRARIES = 4


def read_texts(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# --- tokenizer ----------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: any text can be written, the training text is short."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[NDArray[np.uint16]]:
    encoded = tokenizer.encode_batch([text + END for text in texts])
    return [np.array(e.ids, dtype=np.uint16) for e in encoded]


# --- model --------------------------------------------------------------------------------


def make_config() -> OlmoeConfig:
    return OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        max_position_embeddings=LENGTH,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=1,
    )


class SortedExperts(torch.autograd.Function):
    """The experts of one layer with the tokens sorted by expert: one product an expert."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        count = ids.shape[1]
        order = torch.argsort(ids.reshape(-1), stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel())
        ends = torch.bincount(ids.reshape(-1), minlength=gate_up.shape[0]).cumsum(0).tolist()
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        token = order // count
        xs, ws = x[token], weights.reshape(-1)[order][:, None]
        both = x.new_empty(len(order), gate_up.shape[1])
        for (a, b), matrix in zip(spans, gate_up, strict=True):
            torch.mm(xs[a:b], matrix.T, out=both[a:b])
        gate, up = both.chunk(2, -1)
        hidden = torch.nn.functional.silu(gate) * up
        ys = torch.empty_like(xs)
        for (a, b), matrix in zip(spans, down, strict=True):
            torch.mm(hidden[a:b], matrix.T, out=ys[a:b])
        ctx.spans = spans
        ctx.save_for_backward(xs, ws, both, hidden, ys, token, back, gate_up, down)
        return (ys * ws)[back].view(-1, count, x.shape[1]).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        xs, ws, both, hidden, ys, token, back, gate_up, down = ctx.saved_tensors
        (grad,) = grads
        count = len(back) // len(grad)
        d_ys = grad[token]
        d_weights = (d_ys * ys).sum(-1)[back].view(-1, count)
        d_ys *= ws
        d_hidden, d_down = torch.empty_like(hidden), torch.empty_like(down)
        for e, (a, b) in enumerate(ctx.spans):
            torch.mm(d_ys[a:b], down[e], out=d_hidden[a:b])
            torch.mm(d_ys[a:b].T, hidden[a:b], out=d_down[e])
        gate, up = both.chunk(2, -1)
        s = torch.sigmoid(gate)
        d_both = torch.cat((d_hidden * up * s * (1 + gate * (1 - s)), d_hidden * gate * s), -1)
        d_xs, d_gate_up = torch.empty_like(xs), torch.empty_like(gate_up)
        for e, (a, b) in enumerate(ctx.spans):
            torch.mm(d_both[a:b], gate_up[e], out=d_xs[a:b])
            torch.mm(d_both[a:b].T, xs[a:b], out=d_gate_up[e])
        d_x = d_xs[back].view(-1, count, grad.shape[1]).sum(1)
        return d_x, None, d_weights, d_gate_up, d_down


def sorted_experts(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    apply: Any = SortedExperts.apply  # untyped in torch
    result: Tensor = apply(x, ids, weights, module.gate_up_proj, module.down_proj)
    return result


ALL_EXPERTS_FUNCTIONS.register("demo_sorted", sorted_experts)


def check_experts(model: OlmoeForCausalLM) -> None:
    """Loss and gradients with our experts are those of the library's."""
    tokens = torch.randint(2, VOCABULARY, (2, 64))
    results = []
    for implementation in ("eager", "demo_sorted"):
        model.set_experts_implementation(implementation)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


# --- training -----------------------------------------------------------------------------


def training_stream(
    training: list[dict[str, str]], rng: np.random.Generator
) -> tuple[Tokenizer, NDArray[np.uint16]]:
    """The tokenizer, and one pass over the training text as one long row of tokens."""
    services = [t["text"] for t in training if t["source"].startswith(SERVICES)]
    rare = [t["text"] for t in training if t["source"].startswith(RARE)]
    libraries = [t["text"] for t in training if not t["source"].startswith(SERVICES + RARE)]
    tokenizer = train_tokenizer([*libraries, *services[::4], *rare])
    documents = encode(tokenizer, services) + encode(tokenizer, rare)
    documents += encode(tokenizer, libraries) * REPEAT_LIBRARIES
    return tokenizer, np.concatenate([documents[i] for i in rng.permutation(len(documents))])


def batches(stream: NDArray[np.uint16], size: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Rows of LENGTH tokens, each once a pass, in a new order and with a new offset each pass."""
    while True:
        start = int(rng.integers(LENGTH))
        rows = stream[start : start + (len(stream) - start) // LENGTH * LENGTH]
        rows = rows.reshape(-1, LENGTH)
        for chosen in np.array_split(rng.permutation(len(rows)), max(1, len(rows) // size)):
            yield torch.from_numpy(rows[chosen].astype(np.int64))


@torch.no_grad()
def mean_nll(model: OlmoeForCausalLM, documents: list[NDArray[np.uint16]]) -> float:
    """Mean negative log-likelihood of a token, each document read by itself from its start."""
    model.train(False)
    total, count = 0.0, 0
    for document in documents:
        tokens = torch.from_numpy(document[:LENGTH].astype(np.int64))[None]
        loss = model(tokens, labels=tokens, output_router_logits=False).loss
        total += float(loss) * (tokens.shape[1] - 1)
        count += tokens.shape[1] - 1
    model.train()
    return total / count


def held_out(tokenizer: Tokenizer, texts: Path, split: str) -> dict[str, list[NDArray[np.uint16]]]:
    """A split of every set, by the set's name."""
    return {
        path.parent.name: encode(tokenizer, [t["text"] for t in read_texts(path)])
        for path in sorted(texts.glob(f"*/{split}.jsonl"))
    }


def learning_rate(fraction: float, peak: float) -> float:
    """Warm up over 2 %, then a cosine down to a twentieth."""
    if fraction < 0.02:
        return peak * max(fraction, 1e-4) / 0.02
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0))))


def save(model: OlmoeForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write a checkpoint in half precision beside `out` and move its files into place."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        model.save_pretrained(scratch)
        weights = Path(scratch) / "model.safetensors"
        half = {name: t.half().contiguous() for name, t in load_file(weights).items()}
        save_file(half, weights, metadata={"format": "pt"})
        tokenizer.save(str(Path(scratch) / "tokenizer.json"))
        settings: dict[str, dict[str, object]] = {
            "config.json": {
                **json.loads((Path(scratch) / "config.json").read_text()),
                "dtype": "float16",
                "output_router_logits": False,
            },
            "generation_config.json": {
                "do_sample": True,
                "temperature": 0.8,
                "top_p": 0.95,
                "max_new_tokens": 128,
                "eos_token_id": tokenizer.token_to_id(END),
                "pad_token_id": tokenizer.token_to_id(PAD),
            },
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": END,
                "pad_token": PAD,
                "model_max_length": LENGTH,
                "clean_up_tokenization_spaces": False,
            },
        }
        for name, content in settings.items():
            (Path(scratch) / name).write_text(json.dumps(content, indent=2) + "\n")
        for path in Path(scratch).iterdir():
            part = out / (path.name + ".part")
            shutil.copyfile(path, part)
            part.replace(out / path.name)


@click.command()
@click.argument("texts", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument(
    "out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(__file__).resolve().parent / "model",
)
@click.option("--steps", default=2400, show_default=True, help="Optimiser steps.")
@click.option("--rows", default=8, show_default=True, help="Sequences a step.")
@click.option("--peak", default=3e-3, show_default=True, help="Highest learning rate.")
@click.option("--minutes", default=float("inf"), help="Finish the schedule by then at the latest.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(
    texts: Path, out: Path, steps: int, rows: int, peak: float, minutes: float, seed: int,
    threads: int,
) -> None:  # fmt: skip
    """Train on TEXTS (made by texts.py --train) and write the checkpoint to OUT."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    rng = np.random.default_rng(seed)
    tokenizer, stream = training_stream(read_texts(texts / "train.jsonl"), rng)
    validation = held_out(tokenizer, texts, "validation")
    model = OlmoeForCausalLM(make_config())
    check_experts(model)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(stream):,} tokens a pass", flush=True)

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
        foreach=True,
    )
    started, mean, step, fraction = time.monotonic(), 0.0, 0, 0.0
    source = batches(stream, rows, rng)
    while fraction < 1.0:
        tokens = next(source)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(fraction, peak)
        result = model(tokens, labels=tokens, output_router_logits=True, use_cache=False)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        elapsed = time.monotonic() - started
        fraction = max(step / steps, elapsed / 60 / minutes)
        mean += float(result.loss.detach()) / 20
        if step % 20 == 0:
            aux = float(result.aux_loss.detach())
            speed = step * tokens.numel() / elapsed
            print(
                f"{step:5d} loss {mean:.4f} aux {aux:.3f} {speed:.0f} tokens/s"
                f" {elapsed / 60:.1f} min {fraction:.3f}",
                flush=True,
            )
            mean = 0.0
        if step % 250 == 0 or fraction >= 1.0:
            nll = {name: mean_nll(model, d[:60]) for name, d in validation.items()}
            print(f"{step:5d} {step * rows * LENGTH:,} tokens, validation {nll}", flush=True)
            save(model, tokenizer, out)
    for name, documents in held_out(tokenizer, texts, "test").items():
        nll_test = mean_nll(model, documents)
        print(f"test, {name}: NLL {nll_test:.4f}, perplexity {math.exp(nll_test):.1f}")


if __name__ == "__main__":
    main()
