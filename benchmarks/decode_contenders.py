"""One contender of `cpu_decode.py` in a process of its own, which answers lines.

Nothing is imported at the top that a peer's environment may lack.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

CONTEXT, CAPACITY, SEED = 128, 256, 0


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
                pack.parent.mkdir(parents=True, exist_ok=True)
                if not pack.exists():
                    # By another process, whose memory is not this one's.
                    command = [sys.executable, __file__, "pack", bundle, str(entries), str(pack)]
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


class CompiledTransformers(Transformers):
    """The same with a static cache and a decode step that torch compiles.

    Experts are what transformers calls `batched_mm` in a step, because the eager loop over them
    cannot be compiled whole, and `grouped_mm` in a prompt, of which `batched_mm` would copy the
    weights for each token.
    """

    def __init__(self, checkpoint: str, threads: int) -> None:
        super().__init__(checkpoint, threads)
        from transformers import StaticCache

        self.version += ", compiled"
        self.cache = StaticCache(config=self.model.config, max_cache_len=CAPACITY)
        self.step = self.torch.compile(self.model.forward)
        self.position = self.torch.tensor([[CONTEXT]])

    def prefill(self) -> None:
        self.model.set_experts_implementation("grouped_mm")
        with self.torch.inference_mode():
            self.cache.reset()
            self.model(self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.model.set_experts_implementation("batched_mm")

    def decode(self, token: int) -> None:
        with self.torch.inference_mode():
            self.step(
                input_ids=self.torch.tensor([[token]]),
                past_key_values=self.cache,
                position_ids=self.position,
                use_cache=True,
            )
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(CONTEXT)


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


class GenAI(Contender):
    """onnxruntime-genai."""

    def __init__(self, model: str, threads: int) -> None:
        genai: Any = importlib.import_module("onnxruntime_genai")
        runtime = importlib.metadata.version("onnxruntime")
        self.version = f"{genai.__version__}, onnxruntime {runtime}"
        config = genai.Config(model)
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.genai, self.model = genai, genai.Model(config)
        stated = json.loads((Path(model) / "genai_config.json").read_text(encoding="utf-8"))
        self.ids = prompt(stated["model"]["vocab_size"])
        self.generator: Any = None

    def prefill(self) -> None:
        self.generator = None  # its cache goes before another comes
        settings = self.genai.GeneratorParams(self.model)
        settings.set_search_options(max_length=CAPACITY, batch_size=1)
        self.generator = self.genai.Generator(self.model, settings)
        self.generator.append_tokens([self.ids])
        self.generator.get_logits()

    def decode(self, token: int) -> None:
        self.generator.rewind_to(CONTEXT)
        self.generator.append_tokens([[token]])
        self.generator.get_logits()


def serve(kind: str, arguments: list[Any]) -> None:
    """Answer lines on standard input: how many tokens to decode, or `prefill`."""
    kinds = {
        "knnmoe": KnnMoe, "transformers": Transformers,
        "transformers, compiled": CompiledTransformers, "llama.cpp": LlamaCpp,
        "onnxruntime-genai": GenAI,
    }  # fmt: skip
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


if __name__ == "__main__":
    if sys.argv[1] == "pack":
        random_pack(*sys.argv[2:6])
    else:
        serve(sys.argv[2], json.loads(sys.argv[3]))
