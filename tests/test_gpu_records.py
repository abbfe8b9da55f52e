"""Quantized and bitmap-sparse records on a card: the common formats at their usual sizes, graphs, no wait of the host.

tests/test_cuda_ops_quant*.py and tests/test_cuda_ops_sparse*.py make the small calls there too.
"""

from __future__ import annotations

import kvk
import pytest
import torch
from card import CudaCard
from cuda_record_cases import check, run
from kvk_testing import assert_bit_equal
from quant_attention_cases import make_quant_case
from test_quant_pages import random_pages

pytestmark = pytest.mark.gpu
FORMATS = {
    "kivi2": kvk.QuantFormat(64, 128),
    "kivi4": kvk.QuantFormat(64, 128, 4, 4),
    "int8_per_token": kvk.QuantFormat(64, 128, 8, 8, 64, 128, "token", "token"),
    "rotated4": kvk.QuantFormat(64, 128, 4, 4, 64, 64, "token", "token", k_rotate=1, v_rotate=1),
    "wide": kvk.QuantFormat(32, 256, 4, 2),
}
SPARSE = {
    "mustafar50": (64, 128, 64, 64),
    "mustafar70": (64, 128, 40, 40),
    "sparse_wide": (32, 256, 128, 80),
    "sparse_all": (16, 128, 128, 128),
}
EACH_FORMAT = pytest.mark.parametrize("name", [*FORMATS, *SPARSE])


def format_of(name: str, dtype: torch.dtype) -> kvk.QuantFormat | kvk.BitmapFormat:
    """Records of bitmaps hold values of one dtype."""
    return FORMATS[name] if name in FORMATS else kvk.BitmapFormat(*SPARSE[name], dtype)


@EACH_FORMAT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 4, 12])
def test_attention(name, dtype, group):
    card, fmt = CudaCard(), format_of(name, dtype)
    check(card, make_quant_case([4000, 1, 700], fmt=fmt, dtype=dtype, group=group))
    check(card, make_quant_case([900, 300], [200, 1], fmt=fmt, dtype=dtype, group=group))


@EACH_FORMAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_records(name, dtype):
    card, fmt = CudaCard(), format_of(name, torch.bfloat16 if dtype == torch.float32 else dtype)
    op = "compress_pages" if name in SPARSE else "quantize_pages"
    k_pages, v_pages = random_pages(fmt, "nhd", 40, 8, dtype)
    ids = torch.randperm(40)[:33].int()
    want = [pool.zero_() for pool in fmt.new_pool(40, 8)]
    getattr(kvk, op)(k_pages, v_pages, ids, *want, ids, fmt)
    k, v, ids, *pools = card.put([k_pages, v_pages, ids, *(torch.zeros_like(pool) for pool in want)])
    getattr(card.ops, op)(k, v, ids, *pools, ids, fmt.numbers)
    for got, right in zip(pools, want, strict=True):
        assert_bit_equal(got.cpu(), right)


@pytest.mark.parametrize("name", ["kivi4", "rotated4", "mustafar50"])
def test_graph_follows_the_lengths(name):
    """A captured step is right for other lengths, and takes nothing from the host."""
    card = CudaCard()
    case = make_quant_case([900, 400], fmt=format_of(name, torch.bfloat16), dtype=torch.bfloat16, group=4)
    run(card, case)
    args, options = card.put(case.args), card.put_options(case.options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = getattr(card.ops, case.name)(*args, case.fmt.numbers, **options)
    for lens in ([900, 400], [33, 0], [512, 399]):
        args[-1].copy_(torch.tensor(lens, dtype=torch.int32))
        graph.replay()
        want = run(card, case.with_(kv_lens=torch.tensor(lens, dtype=torch.int32)))
        assert_bit_equal(out.cpu(), want[0])
        assert_bit_equal(lse.cpu(), want[1])
