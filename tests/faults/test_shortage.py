"""Not enough memory is a stated failure that says what needed how much, and nothing is changed."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from knnmoe.runtime.errors import BackendError, DeviceError, KnnMoeError
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.shortage import available_bytes, is_shortage, memory_for

# As they were met: NumPy, ONNX Runtime's arena, C++ behind it, torch, the loader of libraries.
ARENA = (
    "Error in execution: Non-zero status code returned while running Gemm node. Status Message: "
    "bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 31996800"
)
TORCH = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
)
MET = (
    MemoryError("Unable to allocate 9.76 MiB for an array"),
    RuntimeError(ARENA),
    RuntimeError("std::bad_alloc"),
    RuntimeError(TORCH),
    ImportError("_generator.so: failed to map segment from shared object"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("can't start new thread"),
)


@pytest.mark.parametrize("error", MET)
def test_whoever_is_refused_memory_the_failure_is_stated(error: Exception) -> None:
    assert is_shortage(error)
    with (
        pytest.raises(DeviceError, match=r"the cache: not enough memory; .* free"),
        memory_for("the cache"),
    ):
        raise error


def test_it_says_what_was_needed() -> None:
    with pytest.raises(DeviceError) as caught, memory_for("a step"):
        raise RuntimeError(ARENA)
    assert caught.value.expected == "30.5 MiB free"
    with pytest.raises(DeviceError) as caught, memory_for("a step", 1 << 20):
        raise MemoryError
    assert caught.value.expected == "1.0 MiB free"


@pytest.mark.parametrize(
    "error",
    [ValueError("size"), OSError(errno.ENOSPC, "x"), DeviceError("x", "not enough memory")],
)
def test_what_is_something_else_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory_for("a step"):
        raise error
    assert caught.value is error


def test_a_limit_of_the_process_counts() -> None:
    free = available_bytes()
    assert free is not None
    assert 0 < free < 1 << 50
    assert resource.getrlimit(resource.RLIMIT_AS)[0] in (resource.RLIM_INFINITY,) or free


def test_a_memory_that_does_not_fit_leaves_the_old_one_serving(
    tiny_bundle: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.load(tiny_bundle, memory=tiny_pack, threads=1)
    before = model.score(list(range(20)))

    def refuse(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(MemoryPack, "memory_of", refuse)
        with pytest.raises(DeviceError, match=r"the memory of .*: not enough memory; expected"):
            model.swap_memory(tiny_pack)
    np.testing.assert_array_equal(model.score(list(range(20))), before)


def test_a_cache_that_does_not_fit_is_refused_by_its_size(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knnmoe.runtime.cache import Cache

    def refuse(*_: object) -> None:
        raise MemoryError

    model = Model.load(tiny_bundle, threads=1)
    monkeypatch.setattr(Cache, "allocate", staticmethod(refuse))
    # 3 layers, 2 key heads of 16 numbers, keys and values, 4 bytes.
    with pytest.raises(DeviceError, match=r"cache of 1 x 64 tokens: .* expected 48\.0 KiB free"):
        model.pipeline.new_cache(1, 64)


def test_what_the_engine_refuses_at_a_step_is_stated(tiny_bundle: Path) -> None:
    from knnmoe.runtime.engines.onnxruntime import OrtEngine

    class Refusing:
        def run_with_iobinding(self, _: object) -> None:
            raise RuntimeError(self.text)

    engine = OrtEngine(tiny_bundle / "segments" / "00.onnx", threads=1)
    refusing = Refusing()
    inputs = {
        item.name: np.zeros([1 if isinstance(n, str) else n for n in item.shape],
                            np.int64 if item.type == "tensor(int64)" else
                            np.int32 if item.type == "tensor(int32)" else np.float32)
        for item in engine._session.get_inputs()
    }  # fmt: skip
    run = engine.bind(inputs, {})
    run.__self__._session = refusing  # type: ignore[attr-defined]
    for text, kind in ((ARENA, DeviceError), ("Got invalid dimensions\nmore", BackendError)):
        refusing.text = text  # type: ignore[attr-defined]
        with pytest.raises(kind, match=r"00\.onnx"):
            run()


LIMITED = """
import resource, sys
import numpy.random, onnxruntime, tokenizers, safetensors.numpy
import knnmoe.runtime.model
from knnmoe.runtime.cli import main

def shut():
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

if sys.argv[2] == "memory":
    # Behind the tokenizer and the model: their libraries end the process where memory lacks.
    from knnmoe.calibration import teacher
    whole = teacher.Teacher.logits
    def first(*arguments, **named):
        shut()
        teacher.Teacher.logits = whole
        return whole(*arguments, **named)
    teacher.Teacher.logits = first
else:
    shut()
main(sys.argv[2:])
"""


def limited(room: int, *arguments: object) -> KnnMoeError:
    """The error that a command ends with where it may take so many bytes more."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(room), *map(str, arguments), "--json"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    stated = json.loads(done.stdout)
    assert stated["problem"] == "not enough memory", stated
    assert stated["found"].endswith("free")
    return stated


def test_a_command_without_memory_says_so(tiny_bundle: Path) -> None:
    limited(1 << 20, "generate", tiny_bundle, "--prompt", "In the beginning")


@pytest.mark.slow
@pytest.mark.parametrize("room", [4 << 20])
def test_a_build_without_memory_says_so_and_leaves_no_pack(
    tiny_checkpoint: Path, tmp_path: Path, room: int
) -> None:
    (tmp_path / "text.txt").write_text("The spring was late that year. " * 2000)
    pack = tmp_path / "pack"
    build = ("memory", "build", tiny_checkpoint, tmp_path / "text.txt", pack)
    limited(room, *build, "--batch-tokens", 8192)
    assert not pack.exists()


def test_a_model_that_cannot_be_loaded_for_lack_of_memory_is_not_called_broken(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    from knnmoe.calibration.teacher import Teacher

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(DeviceError, match=r"the model of .*: not enough memory"):
        Teacher.load(tiny_checkpoint)
