"""The compile gate: every default kernel compiles for four architectures and keeps everything in registers."""

from __future__ import annotations

import itertools
import json
import re

import kernel_table
import pytest
import torch
from kvk import cuda
from nvrtc import ARCHITECTURES as ARCHS

# One worker compiles an architecture for both tests.
EACH_ARCH = [pytest.param(arch, marks=pytest.mark.xdist_group(arch)) for arch in ARCHS]


@pytest.mark.parametrize("arch", EACH_ARCH)
def test_default_kernels_fit_their_registers(arch):
    """No spills, no local memory, no warnings; names what breaks the rule."""
    kernels = kernel_table.compiled(arch)
    assert len(kernels) > 30
    wrong = []
    for compiled in kernels:
        assert 0 < compiled.registers <= 255
        if compiled.stack_bytes or compiled.spill_store_bytes or compiled.spill_load_bytes:
            wrong.append(
                f"{compiled.kernel.expression}: {compiled.registers} registers, "
                f"{compiled.stack_bytes} bytes of stack"
            )
        wrong += [f"{compiled.kernel.expression}: {warning}" for warning in compiled.warnings]
    assert not wrong, "\n".join(wrong)


RENEW = "docs/kernels.md is out of date: run python tests/kernel_table.py"


@pytest.mark.parametrize("arch", EACH_ARCH)
def test_table_of_resources_is_up_to_date(arch):
    """The committed table lists the default kernels; its numbers are those of the NVRTC that it names."""
    written = kernel_table.written_rows()
    expressions = [kernel.expression.replace("kvk::device::", "") for kernel in cuda.default_kernels()]
    assert list(written) == expressions, RENEW
    if kernel_table.written_version() == kernel_table.nvrtc_version():
        column = ARCHS.index(arch)
        got = [row[column] for row in written.values()]
        rows = kernel_table.table({arch: kernel_table.compiled(arch)}).splitlines()[2:]
        assert got == [row.split(" | ")[1] for row in rows], RENEW


def test_table_of_resources_has_the_shared_memory_of_the_launch():
    written = {name: int(row[-1]) for name, row in kernel_table.written_rows().items()}
    wanted = {
        name.replace("kvk::device::", ""): size for name, size in kernel_table.dynamic_shared_bytes().items()
    }
    assert written == wanted, RENEW
    assert written["paged_decode_kernel<PagedDecodeConfig<bf16, 128, 128, 1, 0>>"] > 48 * 1024


# Every part of the score, and every padding of a head dim.
OPTIONS = [
    ("paged_decode_kernel", "PagedDecodeConfig", "bf16, 128, 128, 1, {parts}"),
    ("paged_decode_kernel", "PagedDecodeConfig", "f16, 256, 256, 2, {parts}"),
    ("paged_prefill_kernel", "PagedPrefillConfig", "bf16, 128, 128, {parts}"),
    ("paged_prefill_kernel", "PagedPrefillConfig", "f16, 256, 256, {parts}"),
    # For cards with little shared memory a block.
    ("paged_decode_kernel", "PagedDecodeConfig", "bf16, 256, 256, 2, {parts}, true"),
    ("paged_prefill_kernel", "PagedPrefillConfig", "f16, 128, 128, {parts}, true"),
]


@pytest.mark.parametrize("parts", [1, 2, 4, 8, 15])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_score_options_fit_their_registers(arch, parts):
    for name, config, arguments in OPTIONS:
        header = f"kvk/device/{name.removesuffix('_kernel')}.cuh"
        expression = (
            f"kvk::device::{name}<kvk::device::{config}<kvk::device::{arguments.format(parts=parts)}>>"
        )
        compiled = cuda.compile_kernel(cuda.Kernel(header, expression), arch)
        assert compiled.stack_bytes == 0 and compiled.spill_store_bytes == 0, (expression, compiled.registers)


@pytest.mark.parametrize("head_dim, head_dim_v", [(32, 40), (72, 96), (136, 64), (248, 256)])
def test_odd_head_dims_compile(head_dim, head_dim_v):
    for name, config, tail in (
        ("paged_decode_kernel", "PagedDecodeConfig", "2, 15"),
        ("paged_prefill_kernel", "PagedPrefillConfig", "15"),
    ):
        header = f"kvk/device/{name.removesuffix('_kernel')}.cuh"
        expression = (
            f"kvk::device::{name}<kvk::device::{config}<kvk::device::bf16, {head_dim}, {head_dim_v}, {tail}>>"
        )
        assert cuda.compile_kernel(cuda.Kernel(header, expression), "sm_90a").registers > 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_wide_attention_over_ordinary_tensors_fits_its_registers(arch):
    for header, kernel, config in (
        ("grid", "grid_attention_kernel", "GridConfig<f16, 256, 256, Neighborhood, 0>"),
        ("grid", "grid_attention_kernel", "GridConfig<bf16, 256, 256, BlockSparse, 4, true>"),
        (
            "grid_gradient",
            "grid_gradient_kernel",
            "GridGradientConfig<f16, 256, 256, BlockSparse, true, 1, 4>",
        ),
    ):
        expression = re.sub(r"([A-Za-z]\w*)(?=[<,])", r"kvk::device::\1", f"{kernel}<{config}>")
        expression = expression.replace("kvk::device::true", "true")
        compiled = cuda.compile_kernel(cuda.Kernel(f"kvk/device/{header}.cuh", expression), arch)
        assert compiled.stack_bytes == 0 and compiled.spill_store_bytes == 0, (expression, compiled.registers)


def test_list_of_default_kernels():
    """What `kvk.precompile` compiles: distinct, and bf16 and f16 alike."""
    entries = json.loads(torch.ops.kvk._default_kernels())
    names = [entry["expression"] for entry in entries]
    assert len(set(names)) == len(names)
    for one, other in itertools.permutations(("bf16", "f16"), 2):
        assert {name.replace(f"::{one}", "::T") for name in names if f"::{one}" in name} == {
            name.replace(f"::{other}", "::T") for name in names if f"::{other}" in name
        }
