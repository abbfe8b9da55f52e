"""kvk.explain: the plan is the one that a call takes, nothing is run, and the counts are those of a count by hand."""

from __future__ import annotations

from pathlib import Path

import kvk
import pytest
import test_record
import torch
from kvk import explanation, saved
from kvk_testing import assert_bit_equal, threads
from paged_cases import make_case

CEILINGS = {"read": 1e9, "copy": 2e9, "arithmetic": 1e12}


def tensors_of(arguments) -> list[torch.Tensor]:
    return [x for x in arguments if isinstance(x, torch.Tensor)]


def test_every_op_is_explained_and_none_is_run(tmp_path: Path) -> None:
    """Over every op that test_record calls; in-place arguments keep their bits."""
    with kvk.recording(dump=tmp_path):
        test_record.call_everything()
    seen = set()
    for path in sorted(tmp_path.iterdir()):
        call = saved.read_call(path)
        tensors = call.tensors()
        before = {name: x.clone() for name, x in tensors.items()}
        found = kvk.explain(getattr(torch.ops.kvk, call.op), measure=False, **tensors, **call.plain())
        for name, x in tensors.items():
            assert_bit_equal(x, before[name], f"{call.op}: {name}")
        assert found.steps and found.op == call.op, call.op
        assert {step["level"] for step in found.steps} == {test_record.replay._level()}
        if call.op in test_record.replay.REFERENCES:
            assert found.cost is not None and found.cost.bytes > 0, f"kvk.costs.COSTS lacks {call.op}"
        seen.add(call.op)
    assert seen == test_record.public_ops()


def test_calls_run_again_afterwards() -> None:
    x = torch.randn(5, 64)
    kvk.explain("hadamard", x, measure=False)
    with pytest.raises(RuntimeError, match="kvk::hadamard"):
        kvk.explain("hadamard", x[:, :7], measure=False)
    assert kvk.hadamard(kvk.hadamard(x)).sub(x).abs().max() < 1e-5


def test_plan_of_decode() -> None:
    case = make_case([5000, 100], group=4, page_size=16, head_dim=64)
    with threads(2):
        found = kvk.explain(kvk.paged_decode, *case.args, measure=False)
    (step,) = found.steps
    heads = case.k_pages.shape[2]
    assert step["step"] == "attention" and step["panel_tiles"] == 0
    assert step["most_splits"] == 5  # 5000 keys, 1024 a split
    assert step["items"] == 6 * step["stream_tiles"] // 2
    assert step["rows_per_head"] == 4 and step["workers"] == 2
    dims = 128 * case.q.element_size()
    moved = (
        5100 * heads * dims
        + case.q.numel() * case.q.element_size() * 2
        + case.q.shape[0] * case.q.shape[1] * 4
    )
    assert found.cost is not None
    assert found.cost.bytes == moved + case.args[3].numel() * 4 + case.args[4].numel() * 4
    assert found.cost.flops == 2 * 128 * case.q.shape[1] * 5100


def test_plan_of_prefill() -> None:
    case = make_case([700, 30], [500, 1], group=2, page_size=16)
    found = kvk.explain("paged_prefill", *case.args, measure=False, **case.options)
    (step,) = found.steps
    assert step["stream_tiles"] > 0 and step["panel_tiles"] > 0
    dims = case.k_pages.shape[-1] + case.v_pages.shape[-1]
    pairs = sum(range(201, 701)) + 30
    assert found.cost is not None and found.cost.flops == 2 * dims * case.q.shape[1] * pairs


def test_plan_of_attention_over_ordinary_tensors() -> None:
    """A pass for the queries, and one for the keys of a gradient; tiles as run_grid has them."""
    pattern = kvk.block_mask_to_csr(torch.ones(1, 1, 4, 4, dtype=torch.bool))
    q, k, v = (torch.randn(256, heads, 64) for heads in (8, 2, 2))
    with threads(2):
        (step,) = kvk.explain("block_sparse_attention", q, k, v, *pattern, 64, 64, measure=False).steps
        out, lse = kvk.block_sparse_attention(q, k, v, *pattern, 64, 64)
        found = kvk.explain(
            "block_sparse_attention_backward", out, lse, q, k, v, out, lse, *pattern, 64, 64, measure=False
        )
    assert (step["step"], step["pass"], step["block_columns"], step["workers"]) == (
        "grid",
        "attention",
        64,
        2,
    )
    assert step["tiles"] * step["rows_per_tile"] >= 256 * 8 and step["rows_per_tile"] <= 256
    assert [s["pass"] for s in found.steps] == ["gradient of queries", "gradient of keys and values"]
    assert [s["visited_pairs"] for s in (step, *found.steps)] == [8 * 256 * 256] * 3
    assert "tiles of up to" in str(found) and "gradient of keys" in str(found)


def test_visited_pairs_are_those_of_the_tiles() -> None:
    """Windows of 13 in a row of 64, 1 and more queries a tile: at least what is seen, at most what boxes hold."""
    q, k, v = (torch.randn(1, 64, 2, 64) for _ in range(3))
    (step,) = kvk.explain("neighborhood_attention", q, k, v, [13], measure=False).steps
    box = step["rows_per_tile"] + 12
    assert 2 * 64 * 13 <= step["visited_pairs"] <= 2 * 64 * box
    causal = kvk.block_mask_to_csr(torch.ones(1, 1, 2, 2, dtype=torch.bool).tril())
    x = torch.randn(128, 1, 64)
    (step,) = kvk.explain("block_sparse_attention", x, x, x, *causal, 64, 64, measure=False).steps
    assert step["visited_pairs"] == 3 * 64 * 64


def test_plan_of_lightning_attention() -> None:
    x = torch.randn(1, 200, 1, 128)
    with threads(2):
        found = kvk.explain("lightning_attention", x, x, x, None, measure=False)
    (step,) = found.steps
    assert (step["step"], step["chunk_tokens"]) == ("chunks", 64)
    assert step["slices"] == step["items"] == 4  # two for each thread
    assert "4 slices of the columns of v, in chunks of 64 tokens" in str(found)
    assert found.cost.flops == 4 * 200 * 128 * 128


def test_window_limits_the_cost() -> None:
    case = make_case([5000], page_size=16)
    whole = kvk.explain("paged_decode", *case.args, measure=False)
    part = kvk.explain("paged_decode", *case.args, measure=False, window_left=99)
    assert whole.cost is not None and part.cost is not None
    assert part.cost.flops * 50 == whole.cost.flops
    assert part.steps[0]["most_splits"] <= 2


def test_quantized_pages_cost_their_records() -> None:
    q, k_pool, v_pool, *_ = test_record.quant_arguments()
    fmt = test_record.FMT
    records = torch.tensor([[3, 20], [29, 0]], dtype=torch.int32)
    lens = torch.tensor([64, 64], dtype=torch.int32)
    found = kvk.explain("quant_decode", q, k_pool, v_pool, records, lens, fmt, measure=False)
    others = 2 * q.numel() * 2 + 2 * 4 * 4 + records.numel() * 4 + 2 * 4
    assert found.cost is not None
    assert found.cost.bytes == 4 * 2 * (fmt.k_record_bytes + fmt.v_record_bytes) + others


def test_plan_for_a_card() -> None:
    """The launches are those that the launch code makes, with the card's number of multiprocessors and memory."""
    case = make_case([600, 0, 1100], group=7, page_size=5, dtype=torch.bfloat16, head_dim=128)
    found = kvk.explain("paged_decode", *case.args, card="sm_90a")
    assert found.device == "sm_90a" and found.ceilings == {} and found.bound is None
    decode, merge = found.steps
    assert decode["kernel"].startswith(
        "kvk::device::paged_decode_kernel<kvk::device::PagedDecodeConfig<kvk::device::bf16, 128"
    )
    assert decode["grid"][0] == 3 * case.k_pages.shape[2] and "merge_splits_kernel" in merge["kernel"]
    small = kvk.explain("paged_decode", *case.args, card="sm_86").steps[0]
    assert small["kernel"].endswith("true>>") and small["shared_bytes"] < decode["shared_bytes"]
    assert "paged_decode_kernel" in str(found)


def test_a_card_has_no_float32_attention() -> None:
    case = make_case([60], dtype=torch.float32)
    with pytest.raises(RuntimeError, match="kvk::paged_decode"):
        kvk.explain("paged_decode", *case.args, card="sm_80")


def test_bound() -> None:
    cost = explanation.Cost(10**9, 10**9, "read")
    found = explanation.Explanation("x", "cpu", (), cost, CEILINGS)
    assert found.bound == "read" and found.seconds == 1.0
    assert "at least 1 GB, 1 GFLOP (1.0 FLOP/byte)" in str(
        found
    ) and "bound by read (1 GB/s here): 1 s" in str(found)
    found = explanation.Explanation("x", "cpu", (), explanation.Cost(10**6, 10**12, "copy"), CEILINGS)
    assert found.bound == "arithmetic" and found.seconds == 1.0


def test_ceilings_are_measured(monkeypatch) -> None:
    monkeypatch.setattr(explanation, "_BYTES", 1 << 24)
    monkeypatch.setattr(explanation, "_PASSES", 2)
    found = explanation.ceilings.__wrapped__("cpu")
    assert found.keys() == CEILINGS.keys() and all(rate > 1e8 for rate in found.values())


def test_wrong_names() -> None:
    with pytest.raises(ValueError, match="there is no op 'paged_nothing'"):
        kvk.explain("paged_nothing", torch.ones(1))
    with pytest.raises(ValueError, match=r"card must be one of sm_80, .* got 'sm_70'"):
        kvk.explain("hadamard", torch.ones(8), card="sm_70")
    with pytest.raises(TypeError):
        kvk.explain("hadamard")


def test_command_line(tmp_path: Path, capsys) -> None:
    with kvk.recording(dump=tmp_path):
        kvk.paged_decode(
            *(x.bfloat16() if x.is_floating_point() else x for x in test_record.decode_arguments())
        )
        kvk.hadamard(torch.ones(4, 64))
    files = [str(path) for path in sorted(tmp_path.iterdir())]
    assert explanation.main([*files, "--no-ceilings"]) == 0
    printed = capsys.readouterr().out
    assert (
        "paged_decode on cpu\n" in printed
        and "hadamard on cpu\n" in printed
        and "straight over the pages" in printed
    )
    assert explanation.main([files[0], "--card", "sm_80"]) == 0
    assert "paged_decode on sm_80\n  paged_decode_kernel<" in capsys.readouterr().out
    assert explanation.main([__file__]) == 2
    assert explanation.main([files[1], "--card", "sm_80"]) in (0, 1)  # hadamard: once it is on cards, 0
