"""The kernels compile for every target, and need no more of a device than is pinned here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from plugin_library import ARCHITECTURE, usage_of_the_plugin

from knnmoe.runtime.errors import BackendError
from knnmoe.trt_plugins.compiler import (
    ARCHITECTURES,
    KernelUsage,
    compile_kernels,
    compile_ptx,
    usages,
)
from knnmoe.trt_plugins.plan import SOURCE
from knnmoe.trt_plugins.toolchain import find_nvcc

REGISTERS_OF_AN_SM = 65536
KERNELS = re.findall(r"X\((knnmoe_\w+), knnmoe::k(\w*)Warps, (\d)", SOURCE.read_text())
THREADS = {"": 256, "Prefill": 128, "Finish": 128}


@pytest.fixture(autouse=True)
def _nvcc() -> None:
    try:
        find_nvcc()
    except BackendError as error:
        pytest.skip(str(error))


def check(architecture: str, found: list[KernelUsage]) -> None:
    by_name = {usage.kernel: usage for usage in found}
    assert set(by_name) == {name for name, _, _ in KERNELS}
    for name, warps, blocks in KERNELS:
        usage = by_name[name]
        print(f"sm_{architecture} {name}: {usage.registers} registers")
        assert usage.spilled_bytes == 0, usage
        assert usage.stack_bytes == 0, usage
        assert usage.static_shared_bytes == 0, usage
        # As many blocks as the launch bounds ask for fit an SM's registers, given out by eights.
        granted = -(-usage.registers // 8) * 8
        assert granted * THREADS[warps] * int(blocks) <= REGISTERS_OF_AN_SM, usage


def test_kernels_of_the_two_stage_search_ask_for_as_many_blocks_as_an_exact_scan() -> None:
    """`check` then holds their registers to that: scoring again costs the scan no residence."""
    blocks = {name.removeprefix("knnmoe_"): int(number) for name, _, number in KERNELS}
    for key_type in ("f32", "f16"):
        assert blocks[f"decode_two_stage_{key_type}"] == blocks["decode_i8_1"] == 3
        assert blocks[f"decode_rescore_{key_type}"] == 2
        assert blocks[f"prefill_rescore_{key_type}"] == 2


def test_kernels_compile_without_spilling() -> None:
    """Those of the plugin, which is compiled for one architecture for other tests anyway."""
    said = usage_of_the_plugin()
    assert "warning" not in said
    check(ARCHITECTURE, usages(ARCHITECTURE, said))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_for_every_target_without_spilling(
    architecture: str, tmp_path: Path
) -> None:
    cubin = tmp_path / "knn_blend.cubin"
    check(architecture, compile_kernels(architecture, cubin))
    assert cubin.read_bytes().startswith(b"\x7fELF")


@pytest.mark.slow
def test_kernels_compile_to_ptx_that_names_them(tmp_path: Path) -> None:
    compile_ptx(tmp_path / "knn_blend.ptx")
    text = (tmp_path / "knn_blend.ptx").read_text()
    for name, _, _ in KERNELS:
        assert f".visible .entry {name}(" in text


def test_an_architecture_that_nvcc_does_not_know_is_refused_with_its_words() -> None:
    with pytest.raises(BackendError, match="sm_11"):
        compile_kernels("11")
