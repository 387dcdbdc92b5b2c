r"""Decode speed on the CPU: this runtime with and without memories against its peers.

    .venv/bin/python benchmarks/make_checkpoint.py olmoe-1b-7b --layers 4 build/olmoe-4
    .venv/bin/knnmoe-export --precision int4 --head-bits 8 build/olmoe-4 build/olmoe-4-int4
    OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/cpu_decode.py build/olmoe-4 \
        build/olmoe-4-int4 --llama-python OTHER/bin/python

Every contender runs in a process of its own on the same weights, with as many threads, and takes
turns with the frozen model of this runtime, which is there throughout: compare ratios, which are
medians over turns. `CPU time` is what the process worked, which on a busy machine is steadier than
what passed on the wall. Memories are random entries: what a scan costs does not depend on what is
found.

llama.cpp needs llama-cpp-python and gguf, perhaps in another environment (`--llama-python`); its
model is converted and quantised here once, beside the bundle. onnxruntime-genai takes a directory
that its model builder made of the same checkpoint, in a family that both know (`--genai`,
`--genai-python`):

    .venv/bin/python benchmarks/make_checkpoint.py gpt-oss-20b --layers 2 build/gpt-oss-2
    .venv/bin/knnmoe-export --precision int4 build/gpt-oss-2 build/gpt-oss-2-int4
    OTHER/bin/python -m onnxruntime_genai.models.builder -i build/gpt-oss-2 \\
        -o build/gpt-oss-2-genai -p int4 -e cpu -c build/cache

A peer that is missing is named.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import IO, Any

from decode_contenders import CONTEXT
from decode_gguf import tensor_header

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = Path(__file__).resolve().with_name("decode_contenders.py")
CONVERTER = CONTENDERS.with_name("decode_gguf.py")
BASE = "frozen"
COMPRESSED = "compressed"  # the gate two-stage over a compressed memory


@dataclass(frozen=True)
class Peer:
    """What runs in a process of its own, and the bytes of weights and keys that a token reads."""

    name: str
    kind: str
    arguments: tuple[Any, ...]
    bytes_per_token: float
    python: str = sys.executable


class Process:
    """A contender's process; use `started`."""

    def __init__(self, peer: Peer) -> None:
        command = [peer.python, str(CONTENDERS), "serve", peer.kind, json.dumps(peer.arguments)]
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.peak_mb = 0.0
        try:
            self.version = self._answer()["version"]
        except RuntimeError:
            self.stop()
            raise

    def ask(self, command: object) -> list[float]:
        """Milliseconds of what it was told to do."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.peak_mb = float(answer["peak_mb"])
        self.cpu_ms: list[float] = answer["cpu_ms"]
        times: list[float] = answer["ms"]
        return times

    def stop(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        ended = f"its process ended with {self.process.wait()}"
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"{ended}: {last[-1]}" if last else ended)


@contextmanager
def started(peer: Peer) -> Iterator[Process]:
    process = Process(peer)
    try:
        yield process
    finally:
        process.stop()


def compare(peer: Peer, base: Process, turns: int, tokens: int) -> dict[str, Any]:
    """Medians of a peer, and their ratio to the frozen model's in the same turns."""
    import numpy as np

    with started(peer) as process:
        pair = [base, process]
        decode: dict[Process, list[float]] = {base: [], process: []}
        work: dict[Process, list[float]] = {base: [], process: []}
        prefill: dict[Process, list[float]] = {base: [], process: []}
        for each in pair:
            each.ask(tokens)  # warm
        for _ in range(turns):
            for each in pair:
                decode[each].append(float(np.median(each.ask(tokens))))
                work[each].append(float(np.median(each.cpu_ms)))
            for each in pair:
                prefill[each] += each.ask("prefill")
            pair.reverse()
        over = np.array(decode[process]) / np.array(decode[base])
        worked = np.array(work[process]) / np.array(work[base])
        first = np.array(prefill[process]) / np.array(prefill[base])
        ms = float(np.median(decode[process]))
        return {
            "version": process.version,
            "tokens_per_second": 1e3 / ms,
            "decode_ms": ms,
            "decode_ms_least": float(np.min(decode[process])),
            "decode_ratio": float(np.median(over)),
            "decode_cpu_ratio": float(np.median(worked)),
            "first_token_ms": float(np.median(prefill[process])),
            "first_token_ratio": float(np.median(first)),
            "peak_mb": process.peak_mb,
            "bytes_per_token": peer.bytes_per_token,
        }


def read_bandwidth(threads: int, *, megabytes: int = 256, repeats: int = 7) -> float:
    """Bytes a second that so many threads read of memory, each of its own; the best of some."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    blocks = [np.ones(megabytes << 17, np.int64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            begun = perf_counter()
            list(pool.map(np.add.reduce, blocks))
            best = max(best, sum(block.nbytes for block in blocks) / (perf_counter() - begun))
    return best


def bundle_bytes(bundle: Path) -> float:
    """What a token reads of a bundle's weights: k of E experts, no tables of which it is a row."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    experts = manifest["architecture"]["num_experts"]
    share = manifest["experts_per_token"] / experts
    total = 0.0
    for path in (bundle / "segments").glob("*.safetensors"):
        for name, tensor in tensor_header(path)[1].items():
            if name == "__metadata__" or name.startswith(("embedding", "rope")):
                continue
            begin, end = tensor["data_offsets"]
            routed = len(tensor["shape"]) == 3 and tensor["shape"][0] == experts
            total += (end - begin) * (share if routed else 1)
    return total


def checkpoint_elements(checkpoint: Path) -> tuple[float, float]:
    """Elements of a checkpoint that one token reads, without the head, and those of the head."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    experts = config.get("num_experts") or config["num_local_experts"]
    share = config["num_experts_per_tok"] / experts
    body = head = 0.0
    for path in checkpoint.glob("*.safetensors"):
        for name, tensor in tensor_header(path)[1].items():
            if name == "__metadata__" or "embed" in name:
                continue
            begin, end = tensor["data_offsets"]
            count = (end - begin) / 2 * (share if ".experts." in name else 1)
            if name.startswith("lm_head"):
                head += count
            else:
                body += count
    return body, head


def genai_bytes(model: Path, share: float) -> float:
    """What a token reads of a genai model's weights: that share of experts, no tables."""
    import onnx

    graph = onnx.load(str(model / "model.onnx"), load_external_data=False).graph
    total = 0.0
    for tensor in graph.initializer:
        if "embed_tokens" in tensor.name or tensor.name in ("cos_cache", "sin_cache"):
            continue
        stated = {entry.key: entry.value for entry in tensor.external_data}
        size = int(stated["length"]) if "length" in stated else len(tensor.raw_data)
        total += size * (share if ".experts." in tensor.name else 1)
    return total


def peers(
    checkpoint: Path,
    bundle: Path,
    entries: list[int],
    threads: int,
    llama_python: str,
    gates: list[str],
    projection: dict[str, int],
    packs: Path | None,
    genai: Path | None,
    genai_python: str,
) -> tuple[list[Peer], dict[str, str]]:
    """Who takes part, and why others do not."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    shape = manifest["architecture"]
    frozen = bundle_bytes(bundle)
    found = [Peer(BASE, "knnmoe", (str(bundle), threads, 0, "auto", {}, None), frozen)]
    absent: dict[str, str] = {}
    for count in entries:
        for gate in gates:
            compressed = gate == COMPRESSED
            key = shape["hidden_size"] * (1 if gate in ("two-stage", "auto") else 4)
            if compressed:
                key = projection["scan_width"] * projection["scan_bits"] // 8
            scanned = shape["num_gates"] * count * key
            how = ("two-stage", projection) if compressed else (gate, {})
            arguments = (str(bundle), threads, count, *how, packs and str(packs))
            found.append(Peer(f"{count} entries, {gate}", "knnmoe", arguments, frozen + scanned))
    body, head = checkpoint_elements(checkpoint)
    try:
        importlib.metadata.version("transformers")
        kinds = ("transformers", "transformers, compiled")
        read = 2 * (body + head)
        found += [Peer(kind, kind, (str(checkpoint), threads), read) for kind in kinds]
    except importlib.metadata.PackageNotFoundError:
        absent["transformers"] = "not installed"
    asked = [llama_python, "-c", "import llama_cpp, gguf"]
    target = bundle.parent / f"{bundle.name}.gguf"
    if subprocess.run(asked, capture_output=True, check=False).returncode:
        absent["llama.cpp"] = "llama-cpp-python or gguf is not installed"
    elif manifest["family"] != "olmoe":
        absent["llama.cpp"] = f"no conversion of {manifest['family']} here"
    else:
        if not target.exists():
            convert = [llama_python, str(CONVERTER), str(checkpoint), str(target)]
            subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
        # Bits of Q4_0 and Q6_K.
        size = (4.5 * body + 6.5625 * head) / 8
        found.append(Peer("llama.cpp", "llama.cpp", (str(target), threads), size, llama_python))
    if genai is None:
        absent["onnxruntime-genai"] = "no --genai model; its builder (0.18) has GPT-OSS, not OLMoE"
    else:
        size = genai_bytes(genai, manifest["experts_per_token"] / shape["num_experts"])
        found.append(
            Peer("onnxruntime-genai", "onnxruntime-genai", (str(genai), threads), size,
                 genai_python)
        )  # fmt: skip
    return found, absent


def main() -> None:
    """Print the table and write it as JSON."""
    import click
    from rich.console import Console

    path = click.Path(path_type=Path, exists=True)

    @click.command(help=main.__doc__)
    @click.argument("checkpoint", type=path)
    @click.argument("bundle", type=path)
    @click.option("--entries", default="10000,100000", show_default=True)
    @click.option("--gates", default="compressed,two-stage,onnx", show_default=True)
    @click.option("--scan-width", default=256, show_default=True, help="Of compressed memories.")
    @click.option("--scan-bits", default=4, show_default=True, help="Of compressed memories.")
    @click.option("--candidates", default=32, show_default=True, help="Of compressed memories.")
    @click.option("--threads", "all_threads", default="1", show_default=True,
                  help="Numbers separated by commas.")  # fmt: skip
    @click.option("--turns", default=9, show_default=True)
    @click.option("--tokens", default=12, show_default=True, help="Of a turn.")
    @click.option("--packs", type=click.Path(path_type=Path), help="Keeps the memories here.")
    @click.option("--only", help="Names of contenders, separated by semicolons.")
    @click.option("--llama-python", default=sys.executable, help="Has llama-cpp-python and gguf.")
    @click.option(
        "--genai", type=path, help="The same model as onnxruntime-genai's builder made it."
    )
    @click.option("--genai-python", default=sys.executable, help="Has onnxruntime-genai.")
    @click.option("--json", "target", type=click.Path(path_type=Path),
                  default=ROOT / "benchmarks" / "results" / "cpu_decode.json")  # fmt: skip
    def command(
        checkpoint: Path, bundle: Path, entries: str, gates: str, all_threads: str, turns: int,
        tokens: int, only: str | None, llama_python: str, target: Path, packs: Path | None,
        genai: Path | None, genai_python: str, **projection: int,
    ) -> None:  # fmt: skip
        console = Console(width=150)
        counts = [int(count) for count in entries.split(",") if count]
        runs = []
        for threads in map(int, all_threads.split(",")):
            every, absent = peers(
                checkpoint, bundle, counts, threads, llama_python, gates.split(","), projection,
                packs, genai, genai_python,
            )  # fmt: skip
            chosen = [peer for peer in every if only is None or peer.name in only.split(";")]
            bandwidth = read_bandwidth(threads)
            rows: dict[str, Any] = {}
            with started(every[0]) as base:
                for peer in chosen:
                    try:
                        row = compare(peer, base, turns, tokens)
                    except RuntimeError as error:
                        absent[peer.name] = str(error)
                        continue
                    row["bound_ms"] = peer.bytes_per_token / bandwidth * 1e3
                    rows[peer.name] = row
                    console.print(f"{peer.name}: {row['tokens_per_second']:.1f} tokens/s")
            console.print(table(threads, rows))
            for name, reason in absent.items():
                console.print(f"absent: {name}: {reason}")
            runs.append({
                "threads": threads, "read_bandwidth": bandwidth, "contenders": rows,
                "absent": absent,
            })  # fmt: skip
        report = {
            "environment": environment(bundle), "context": CONTEXT, "turns": turns,
            "tokens": tokens, "projection": projection, "runs": runs,
        }  # fmt: skip
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    command()


def table(threads: int, rows: dict[str, Any]) -> Any:
    """The contenders with as many threads."""
    from rich.table import Table

    found = Table(title=f"{threads} thread(s), context {CONTEXT}")
    for name in ("", "tokens/s", "ms a token", "× frozen", "CPU time ×", "bound ms",
                 "first token ms", "× frozen", "peak MB"):  # fmt: skip
        found.add_column(name, justify="right" if name else "left")
    for name, row in rows.items():
        found.add_row(
            name, f"{row['tokens_per_second']:.1f}", f"{row['decode_ms']:.1f}",
            f"{row['decode_ratio']:.2f}", f"{row['decode_cpu_ratio']:.3f}",
            f"{row['bound_ms']:.1f}",
            f"{row['first_token_ms']:.0f}", f"{row['first_token_ratio']:.2f}",
            f"{row['peak_mb']:.0f}",
        )  # fmt: skip
    return found


def environment(bundle: Path) -> dict[str, Any]:
    """The machine and what runs on it."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "knnmoe": importlib.metadata.version("knnmoe"),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": models[0] if models else "",
        "processors": os.cpu_count(),
        "model": {"family": manifest["family"], "precision": manifest["precision"],
                  **manifest["architecture"]},
        "date": date.today().isoformat(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
