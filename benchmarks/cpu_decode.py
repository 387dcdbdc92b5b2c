r"""Decode speed on the CPU: this runtime with and without memories against its peers.

    .venv/bin/python benchmarks/make_checkpoint.py olmoe-1b-7b --layers 4 build/olmoe-4
    .venv/bin/knnmoe-export --precision int4 --quantize-head build/olmoe-4 build/olmoe-4-int4
    OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/cpu_decode.py build/olmoe-4 \
        build/olmoe-4-int4 --llama-python OTHER/bin/python

Every contender runs in a process of its own on the same weights, with as many threads, and takes
turns with the frozen model of this runtime, which is there throughout: compare ratios, which are
medians over turns. `CPU time` is what the process worked, which on a busy machine is steadier than
what passed on the wall. Memories are random entries: what a scan costs does not depend on what is
found.

llama.cpp needs llama-cpp-python and gguf, perhaps in another environment (`--llama-python`); its
model is converted and quantised here once, beside the bundle. A peer that is missing is named.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from time import perf_counter, process_time
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
SELF = Path(__file__).resolve()
CONTEXT, CAPACITY, SEED = 128, 256, 0
BASE = "frozen"
COMPRESSED = "compressed"  # the gate two-stage over a compressed memory


# --- in the process of a contender ---------------------------------------------------------------
# Nothing is imported up to here that another environment may lack.


class Contender:
    """A loaded model; `prefill` reads the prompt anew, `decode` takes tokens behind it."""

    version = ""

    def prefill(self) -> None:
        raise NotImplementedError

    def decode(self, token: int) -> None:
        """One token after the prompt, always at the same place."""
        raise NotImplementedError


def prompt(vocab_size: int) -> list[int]:
    import numpy as np

    found: list[int] = np.random.default_rng(SEED).integers(0, vocab_size, CONTEXT).tolist()
    return found


class KnnMoe(Contender):
    """This runtime."""

    def __init__(
        self,
        bundle: str,
        threads: int,
        entries: int,
        gate: str,
        projection: dict[str, int],
        packs: str | None,
    ) -> None:
        import numpy as np

        from knnmoe import __version__
        from knnmoe.runtime.model import Model

        self.version = __version__
        self.model = Model.load(bundle, threads=threads, gate=gate)
        if entries:
            with tempfile.TemporaryDirectory() as folder:
                kind = "-".join(str(number) for number in (entries, *projection.values()))
                pack = Path(packs or folder) / kind
                if not pack.exists():
                    # By another process, whose memory is not this one's.
                    command = [sys.executable, str(SELF), "--pack", bundle, str(entries), str(pack)]
                    subprocess.run([*command, json.dumps(projection)], check=True)
                self.model.swap_memory(pack)
        self.cache = self.model.pipeline.new_cache(1, CAPACITY)
        self.ids = np.array([prompt(self.model.pipeline.vocab_size)])
        self.token = np.zeros((1, 1), np.int64)

    def prefill(self) -> None:
        self.cache.lengths[:] = 0
        self.model.pipeline.step(self.cache, self.ids)

    def decode(self, token: int) -> None:
        self.cache.lengths[:] = CONTEXT
        self.token[0, 0] = token
        self.model.pipeline.step(self.cache, self.token)


def random_pack(bundle: str, entries: str, path: str, projection: str) -> None:
    """Write a memory of random entries for every gate, compressed if a projection is asked for.

    Its width is forced: keys without a direction of their own have no projection that finds them.
    """
    import numpy as np

    from knnmoe.calibration.compress import CompressSettings, compress_pack
    from knnmoe.runtime.calibration import preset
    from knnmoe.runtime.model import Model
    from knnmoe.runtime.pack_parts import GateEntries
    from knnmoe.runtime.pack_writing import write_pack

    identity = Model.load(bundle, threads=1).identity
    random = np.random.default_rng(SEED)

    def rows(width: int) -> Any:
        return random.standard_normal((int(entries), width), dtype=np.float32).astype(np.float16)

    gates = {}
    for gate in range(identity.num_gates):
        keys = rows(identity.hidden_size)
        values = rows(identity.num_experts), rows(identity.num_experts)
        gates[gate] = GateEntries(keys, *values, keys.mean(axis=0, dtype=np.float32))
    write_pack(
        path, model=identity, gates=gates, variant="residual", neighbors=8, similarity="cosine",
        calibration=preset("residual"), origins=None, provenance={"made": "at random"},
    )  # fmt: skip
    settings = json.loads(projection)
    if settings:
        compress_pack(path, f"{path}-compressed", CompressSettings(**settings))
        shutil.rmtree(path)
        Path(f"{path}-compressed").rename(path)


class Transformers(Contender):
    """Hugging Face transformers, eager, in bf16."""

    def __init__(self, checkpoint: str, threads: int) -> None:
        import torch
        import transformers

        self.version = f"{transformers.__version__}, torch {torch.__version__}, bf16"
        torch.set_num_threads(threads)
        self.torch = torch
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16
        )
        self.model = model.eval()
        self.ids = torch.tensor([prompt(self.model.config.vocab_size)])
        self.cache: Any = None

    def prefill(self) -> None:
        with self.torch.inference_mode():
            found = self.model(self.ids, use_cache=True, logits_to_keep=1)
        self.cache = found.past_key_values

    def decode(self, token: int) -> None:
        with self.torch.inference_mode():
            self.model(self.torch.tensor([[token]]), past_key_values=self.cache)
        self.cache.crop(-1)


class LlamaCpp(Contender):
    """llama.cpp through llama-cpp-python."""

    def __init__(self, gguf: str, threads: int) -> None:
        llama_cpp: Any = importlib.import_module("llama_cpp")
        self.version = f"llama-cpp-python {llama_cpp.__version__}, Q4_0"
        self.model = llama_cpp.Llama(
            gguf, n_ctx=CAPACITY, n_batch=CONTEXT, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip
        self.ids = prompt(self.model.n_vocab())

    def prefill(self) -> None:
        self.model.reset()
        self.model.eval(self.ids)

    def decode(self, token: int) -> None:
        self.model.n_tokens = CONTEXT
        self.model.eval([token])


def serve(kind: str, arguments: list[Any]) -> None:
    """Answer lines on standard input: how many tokens to decode, or `prefill`."""
    kinds = {"knnmoe": KnnMoe, "transformers": Transformers, "llama.cpp": LlamaCpp}
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    contender = kinds[kind](*arguments)
    contender.prefill()
    print(json.dumps({"version": contender.version}), file=reply, flush=True)
    for line in sys.stdin:
        command = line.strip()
        times, work = [], []
        for token in range(1 if command == "prefill" else int(command)):
            started, worked = perf_counter(), process_time()
            if command == "prefill":
                contender.prefill()
            else:
                contender.decode(token)
            times.append((perf_counter() - started) * 1e3)
            work.append((process_time() - worked) * 1e3)
        answer = {"ms": times, "cpu_ms": work, "peak_mb": peak_mb()}
        print(json.dumps(answer), file=reply, flush=True)


def peak_mb() -> float:
    """Of this process, mapped files that were read included."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def convert_to_gguf(checkpoint: str, target: str) -> None:
    """OLMoE as F16, then quantised to Q4_0 (its head to Q6_K, as llama.cpp does)."""
    import ctypes

    import numpy as np

    gguf: Any = importlib.import_module("gguf")
    llama_cpp: Any = importlib.import_module("llama_cpp")

    root = Path(checkpoint)
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    places = json.loads((root / "model.safetensors.index.json").read_text(encoding="utf-8"))
    headers = {file: _header(root / file) for file in set(places["weight_map"].values())}

    def read(name: str) -> Any:
        file = places["weight_map"][name]
        start, header = headers[file]
        begin, end = header[name]["data_offsets"]
        raw = np.fromfile(root / file, np.uint16, (end - begin) // 2, offset=start + begin)
        wide = (raw.astype(np.uint32) << 16).view(np.float32)
        return wide.reshape(header[name]["shape"])

    layers, experts = config["num_hidden_layers"], config["num_experts"]
    half = target + ".f16"
    writer = gguf.GGUFWriter(half, "olmoe", use_temp_file=True)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")

    def add(name: str, array: Any) -> None:
        matrix = array.ndim > 1 and "gate_inp" not in name
        writer.add_tensor(f"{name}.weight", array.astype(np.float16 if matrix else np.float32))

    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm", "ffn_gate_inp": "mlp.gate",
    }  # fmt: skip
    add("token_embd", read("model.embed_tokens.weight"))
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, source in names.items():
            add(f"blk.{layer}.{name}", read(f"{prefix}.{source}.weight"))
        for part in ("gate", "up", "down"):
            parts = [
                read(f"{prefix}.mlp.experts.{e}.{part}_proj.weight").astype(np.float16)
                for e in range(experts)
            ]
            add(f"blk.{layer}.ffn_{part}_exps", np.stack(parts))
    add("output_norm", read("model.norm.weight"))
    add("output", read("lm_head.weight"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, 1
    failed = llama_cpp.llama_model_quantize(
        half.encode(), f"{target}.part".encode(), ctypes.byref(settings)
    )
    if failed:
        raise SystemExit(f"llama.cpp cannot quantise {half}")
    Path(half).unlink()
    Path(f"{target}.part").rename(target)


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a .safetensors file begin, and what they are."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))


# --- in the process that compares ----------------------------------------------------------------


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
        command = [peer.python, str(SELF), "--serve", peer.kind, json.dumps(peer.arguments)]
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
        for name, tensor in _header(path)[1].items():
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
        for name, tensor in _header(path)[1].items():
            if name == "__metadata__" or "embed" in name:
                continue
            begin, end = tensor["data_offsets"]
            count = (end - begin) / 2 * (share if ".experts." in name else 1)
            if name.startswith("lm_head"):
                head += count
            else:
                body += count
    return body, head


def peers(
    checkpoint: Path,
    bundle: Path,
    entries: list[int],
    threads: int,
    llama_python: str,
    gates: list[str],
    projection: dict[str, int],
    packs: Path | None,
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
        found.append(
            Peer("transformers", "transformers", (str(checkpoint), threads), 2 * (body + head))
        )
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
            convert = [llama_python, str(SELF), "--convert", str(checkpoint), str(target)]
            subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
        # Bits of Q4_0 and Q6_K.
        size = (4.5 * body + 6.5625 * head) / 8
        found.append(Peer("llama.cpp", "llama.cpp", (str(target), threads), size, llama_python))
    absent["onnxruntime-genai"] = "its model builder has no OLMoE (0.18)"
    return found, absent


def main() -> None:
    """Print the table and write it as JSON."""
    import click
    from rich.console import Console
    from rich.table import Table

    path = click.Path(path_type=Path, exists=True)

    @click.command(help=main.__doc__)
    @click.argument("checkpoint", type=path)
    @click.argument("bundle", type=path)
    @click.option("--entries", default="10000,100000", show_default=True)
    @click.option("--gates", default="compressed,two-stage,onnx", show_default=True)
    @click.option("--scan-width", default=256, show_default=True, help="Of compressed memories.")
    @click.option("--scan-bits", default=4, show_default=True, help="Of compressed memories.")
    @click.option("--candidates", default=32, show_default=True, help="Of compressed memories.")
    @click.option("--threads", default=1, show_default=True)
    @click.option("--turns", default=9, show_default=True)
    @click.option("--tokens", default=12, show_default=True, help="Of a turn.")
    @click.option("--packs", type=click.Path(path_type=Path), help="Keeps the memories here.")
    @click.option("--only", help="Names of contenders, separated by semicolons.")
    @click.option("--llama-python", default=sys.executable, help="Has llama-cpp-python and gguf.")
    @click.option("--json", "target", type=click.Path(path_type=Path),
                  default=ROOT / "benchmarks" / "results" / "cpu_decode.json")  # fmt: skip
    def command(
        checkpoint: Path, bundle: Path, entries: str, gates: str, threads: int, turns: int,
        tokens: int, only: str | None, llama_python: str, target: Path, packs: Path | None,
        **projection: int,
    ) -> None:  # fmt: skip
        console = Console(width=150)
        counts = [int(count) for count in entries.split(",") if count]
        every, absent = peers(
            checkpoint, bundle, counts, threads, llama_python, gates.split(","), projection, packs
        )
        bandwidth = read_bandwidth(threads)
        rows: dict[str, Any] = {}
        with started(every[0]) as base:
            for peer in every:
                if only is not None and peer.name not in only.split(";"):
                    continue
                try:
                    rows[peer.name] = compare(peer, base, turns, tokens)
                except RuntimeError as error:
                    absent[peer.name] = str(error)
                    continue
                row = rows[peer.name]
                row["bound_ms"] = peer.bytes_per_token / bandwidth * 1e3
                console.print(f"{peer.name}: {row['tokens_per_second']:.1f} tokens/s")
        table = Table(title=f"{threads} thread(s), context {CONTEXT}")
        for name in ("", "tokens/s", "ms a token", "× frozen", "CPU time ×", "bound ms",
                     "first token ms", "× frozen", "peak MB"):  # fmt: skip
            table.add_column(name, justify="right" if name else "left")
        for name, row in rows.items():
            table.add_row(
                name, f"{row['tokens_per_second']:.1f}", f"{row['decode_ms']:.1f}",
                f"{row['decode_ratio']:.2f}", f"{row['decode_cpu_ratio']:.3f}",
                f"{row['bound_ms']:.1f}",
                f"{row['first_token_ms']:.0f}", f"{row['first_token_ratio']:.2f}",
                f"{row['peak_mb']:.0f}",
            )  # fmt: skip
        console.print(table)
        for name, reason in absent.items():
            console.print(f"absent: {name}: {reason}")
        report = {
            "environment": environment(bundle), "threads": threads, "context": CONTEXT,
            "turns": turns, "tokens": tokens, "read_bandwidth": bandwidth, "projection": projection,
            "contenders": rows, "absent": absent,
        }  # fmt: skip
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    command()


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
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], json.loads(sys.argv[3]))
    elif sys.argv[1:2] == ["--pack"]:
        random_pack(*sys.argv[2:6])
    elif sys.argv[1:2] == ["--convert"]:
        convert_to_gguf(*sys.argv[2:4])
    else:
        main()
