"""Calls that are logged, saved and replayed: the ops and the functions, over the emulator, after a crash."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import kvk
import pytest
import torch
from card import EmulatedCard
from kvk import replay, saved
from kvk_testing import assert_bit_equal
from paged_cases import make_case
from safetensors import safe_open

OPS = torch.ops.kvk
# Ops that replay can run but not judge, and why.
WITHOUT_REFERENCE: dict[str, str] = {}


def public_ops() -> set[str]:
    """Every op that is registered, bar the library's own."""
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "::" in name
             and name.startswith("kvk::")}  # fmt: skip
    return {name for name in names if not name.startswith("_")}


def pools(
    pages: int = 40, page_size: int = 16, heads: int = 2, dim: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(pages, page_size, heads, dim), torch.randn(pages, page_size, heads, dim)


def decode_arguments() -> tuple[torch.Tensor, ...]:
    k_pages, v_pages = pools()
    table = torch.tensor([[3, 17, 39], [5, 9, 99]], dtype=torch.int32)  # 99 is past a length, and not there
    return torch.randn(2, 4, 32), k_pages, v_pages, table, torch.tensor([40, 20], dtype=torch.int32)


FMT = kvk.QuantFormat(32, 32, k_bits=2, v_bits=3, v_rotate=1, k_clip=0.9)


def quant_arguments() -> tuple[torch.Tensor, ...]:
    k_pool, v_pool = FMT.new_pool(30, 2)
    dense = pools(30, 32)
    ids = torch.arange(30, dtype=torch.int32)
    kvk.quantize_pages(*dense, ids, k_pool, v_pool, ids, FMT)
    table = torch.tensor([[3, 20, 1 | 1 << 28], [29, 2 | 1 << 28, 0]], dtype=torch.int32)
    return torch.randn(2, 4, 32).half(), k_pool, v_pool, table, torch.tensor([70, 40], dtype=torch.int32)


def one_row(dim: int = 32) -> torch.Tensor:
    return torch.tensor([0], dtype=torch.int32)


def call_everything() -> None:
    """Every public op once."""
    decode = decode_arguments()
    q, k_pages, v_pages, table, lens = decode
    options = {"window_left": 30, "sinks": torch.randn(4), "key_bias": torch.randn(40, 16)}
    out, lse = kvk.paged_decode(*decode, **options)
    kvk.paged_decode(*decode, softmax_scale=0.3, out=torch.empty_like(out), lse=torch.empty_like(lse))
    starts = torch.tensor([0, 1, 4], dtype=torch.int32)
    tokens = torch.randn(4, 4, 32)
    kvk.paged_prefill(tokens, starts, k_pages, v_pages, table, lens, causal=False)
    kvk.append_kv(q[:, :2], q[:, 2:], k_pages, v_pages, torch.tensor([81, -1]))
    parts, states = torch.randn(3, 5, 2, 8), torch.randn(3, 5, 2)
    merged = kvk.merge_states(parts, states)
    OPS.merge_states_backward(*merged, parts, states)
    pattern = kvk.block_mask_to_csr(torch.tensor([[[[True, False], [True, True]]]]))
    sparse = *(torch.randn(50, heads, 32) for heads in (4, 2, 2)), *pattern, 32, 32
    out, lse = kvk.block_sparse_attention(*sparse, causal=True)
    kvk.block_sparse_attention_backward(out, lse, *sparse[:3], out, lse, *sparse[3:], causal=True)
    lists = torch.tensor([[[0, 3, 40]]], dtype=torch.int32), torch.tensor([[[0, 9]]], dtype=torch.int32)
    kvk.vertical_slash_attention(*sparse[:3], *lists)
    image = [torch.randn(1, 7, 8, heads, 32) for heads in (4, 2, 2)]
    out, lse = kvk.neighborhood_attention(*image, (3, 4), is_causal=(True, False))
    kvk.neighborhood_attention_backward(out, lse, *image, out, lse, (3, 4), is_causal=(True, False))
    x = torch.randn(3, 40)
    kvk.hadamard(x, scale=0.5, transpose=True)
    kvk.hadamard(x.clone(), out=torch.empty_like(x))
    OPS.hadamard_(x)
    rows, decay = torch.randn(3, 1, 20, 2, 16), -torch.rand(1, 20, 2)
    _, state = kvk.lightning_attention(*rows, decay, scale=0.25, cu_seqlens=torch.tensor([0, 7, 18]).int())
    OPS.lightning_attention_backward(rows[0], state[:1], *rows, decay, state[:1])
    kvk.lightning_attention(*rows, None)
    OPS.lightning_attention_backward(rows[0], None, *rows, None)
    kvk.lightning_decode(*rows[:, 0, :2], state, torch.tensor([1, -1]).int(), decay[0, :2])
    rows, other = rows.abs(), rows.flip(0).abs()
    linear = kvk.linear_attention(*rows, q_den=other[0], cu_seqlens=torch.tensor([0, 7, 18]).int(), eps=0.1)
    states = (None, None, *(x[:1] for x in linear[2:]), None)
    OPS.linear_attention_backward(
        rows[0], linear[1], *(x[:1] for x in linear[2:]), *rows, *states, block_size=3
    )
    kvk.linear_attention(*rows, causal=False, normalize=False, scale=0.25)
    features = kvk.taylor_feature_map(x)
    OPS.taylor_feature_map_backward(features, x)
    q, k_pool, v_pool, table, lens = quant = quant_arguments()
    dense = tuple(pages.half() for pages in pools(4, 32))
    bias = torch.randn(34, 32)
    kvk.quant_decode(*quant, FMT, k_pages=dense[0], v_pages=dense[1], key_bias=bias)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    kvk.quant_prefill(q, starts, k_pool, v_pool, table, lens, FMT, k_pages=dense[0], v_pages=dense[1])
    kvk.quantize_pages(*pools(4, 32), one_row(), k_pool, v_pool, one_row() + 7, FMT)
    kvk.dequantize_pages(k_pool, v_pool, one_row() + 7, FMT, torch.bfloat16)
    bitmaps = kvk.BitmapFormat(32, 32, 16, 8, torch.float16, v_rotate=1)
    k_pool, v_pool = (pool.zero_() for pool in bitmaps.new_pool(30, 2))
    mask = torch.rand(1, 32, 2, 32) < 0.1
    mask[..., 16:] = False
    kvk.compress_pages(*dense, one_row(), k_pool, v_pool, one_row() + 7, bitmaps, k_select=mask)
    kvk.decompress_pages(k_pool, v_pool, one_row() + 7, bitmaps)
    sparse = (q, k_pool, v_pool, table, lens, bitmaps)
    kvk.sparse_decode(*sparse, k_pages=dense[0], v_pages=dense[1], key_bias=bias)
    kvk.sparse_prefill(q, starts, *sparse[1:], k_pages=dense[0], v_pages=dense[1])
    codes = kvk.quantize(torch.randn(64, 32), 3, 32, -2, clip=0.8)
    kvk.dequantize(*codes, 3, 32, -2, dtype=torch.float16)


def test_every_op_is_recorded_and_replayed(tmp_path: Path, capfd) -> None:
    with kvk.recording(log=1, dump=tmp_path):
        call_everything()
    log = capfd.readouterr().err
    files = sorted(tmp_path.iterdir())
    calls = [saved.read_call(file) for file in files]
    assert len(log.splitlines()) == len(calls)
    missing = public_ops() - {call.op for call in calls}
    assert not missing, (
        f"call these ops in call_everything(), so that recording them is tested: {sorted(missing)}"
    )
    unjudged = public_ops() - set(replay.REFERENCES) - set(WITHOUT_REFERENCE)
    assert not unjudged, f"kvk.replay.REFERENCES lacks {sorted(unjudged)}; or say why in WITHOUT_REFERENCE"
    assert replay.main([str(file) for file in files]) == 0
    printed = capfd.readouterr().out
    assert printed.count("agrees") > len(calls) and "DIFFERS" not in printed
    assert printed.count("has no reference") == len(WITHOUT_REFERENCE)


def test_the_cpp_face_records_the_same_calls(tmp_path: Path, capsys) -> None:
    """With torch's face silent: the names, roles and values are those of the schemas, so that the calls replay."""
    OPS._leave_recording_to_cpp(True)
    try:
        with kvk.recording(dump=tmp_path):
            call_everything()
    finally:
        OPS._leave_recording_to_cpp(False)
    files = sorted(tmp_path.iterdir())
    calls = [saved.read_call(file) for file in files]
    missing = public_ops() - {"hadamard_"} - {call.op for call in calls}
    assert not missing, f"csrc/core/describe.cc and the C++ functions lack {sorted(missing)}"
    for call in calls:
        names = {argument.name for argument in getattr(OPS, call.op).default._schema.arguments}
        assert {a.name for a in call.arguments if a.role != "output"} <= names, call.op
    assert replay.main([str(file) for file in files]) == 0
    assert "DIFFERS" not in capsys.readouterr().out


def line_of(call, capfd, log: int) -> str:
    with kvk.recording(log=log):
        call()
    (line,) = capfd.readouterr().err.splitlines()
    return line


def test_log_line(capfd) -> None:
    arguments = decode_arguments()
    line = line_of(lambda: kvk.paged_decode(*arguments, window_left=9, softmax_scale=0.5), capfd, 1)
    assert re.fullmatch(
        r"kvk: paged_decode\(q=float32\[2, 4, 32\], k_pages=float32\[40, 16, 2, 32\], "
        r"v_pages=float32\[40, 16, 2, 32\], "
        r"page_indices=int32\[2, 3\], kv_lens=int32\[2\], softmax_scale=0\.5, window_left=9\) -> "
        r"float32\[2, 4, 32\], float32\[2, 4\] cpu \d+\.\d us",
        line,
    )


def test_verbose_log_line(capfd) -> None:
    x = torch.tensor([[1.0, -2.5] + [0.0] * 30, [torch.nan, torch.inf] + [3.0] * 30]).half()
    line = line_of(lambda: OPS.hadamard.out(x, out=x), capfd, 2)
    assert "kvk: hadamard.out(x=float16[2, 32] strides [32, 1]" in line and ", 32 nan" in line
    x = torch.tensor([[1.0, -2.5, 0.0, torch.nan, torch.inf, 0.0, 0.0, 0.0]])
    line = line_of(lambda: kvk.quantize(x.repeat(16, 1), 2, 16, -2), capfd, 2)
    assert "x=float32[16, 8] strides [8, 1] -2.5..1, 16 nan, 16 inf" in line
    decode = decode_arguments()
    line = line_of(lambda: kvk.paged_decode(*decode), capfd, 2)
    k = decode[1][[3, 5, 9, 17, 39]]
    assert (
        f"k_pages=float32[40, 16, 2, 32] strides [1024, 64, 32, 1] (5 rows named) {k.min():.6g}..{k.max():.6g}"
        in line
    )


def test_a_refused_call_is_logged(capfd) -> None:
    def call() -> None:
        with pytest.raises(RuntimeError, match="kvk::hadamard"):
            kvk.hadamard(torch.randn(3, 7))

    line = line_of(call, capfd, 1)
    assert re.fullmatch(r"kvk: hadamard\(x=float32\[3, 7\]\) cpu \d+\.\d us, refused", line)


def test_off_means_off(tmp_path: Path, capfd) -> None:
    with kvk.recording(log=1, dump=tmp_path):
        pass
    kvk.hadamard(torch.randn(3, 8))
    assert capfd.readouterr().err == "" and not list(tmp_path.iterdir())


def test_any_reader_of_safetensors_reads_a_dump(tmp_path: Path) -> None:
    arguments = decode_arguments()
    with kvk.recording(dump=tmp_path):
        kvk.paged_decode(*arguments)
    (path,) = tmp_path.iterdir()
    with safe_open(path, "pt") as file:
        assert file.metadata()["op"] == "paged_decode"
        assert set(file.keys()) == {"q", "k_pages", "v_pages", "page_indices", "kv_lens"}
        assert_bit_equal(file.get_tensor("q"), arguments[0])
        k_pages = file.get_tensor("k_pages")
    named = [3, 5, 9, 17, 39]
    assert_bit_equal(k_pages[named], arguments[1][named])
    assert k_pages.count_nonzero() == arguments[1][named].count_nonzero()  # the other pages are not saved
    assert path.stat().st_blocks * 512 < path.stat().st_size / 2


@pytest.mark.parametrize("layout", ["hnd", "halves", "padded"])
def test_strides_and_alignment_come_back(layout: str, tmp_path: Path) -> None:
    case = make_case([60, 3, 0], page_size=5, layout=layout, group=3, dtype=torch.bfloat16)
    q = torch.randn(case.q.numel() + 1).bfloat16()[1:].view(case.q.shape).copy_(case.q)
    with kvk.recording(dump=tmp_path):
        want = kvk.paged_decode(q, *case.args[1:], **case.options)
    call = saved.read_call(next(tmp_path.iterdir()))
    tensors = call.tensors()
    assert tensors["k_pages"].stride() == case.k_pages.stride()
    assert tensors["q"].data_ptr() % 64 == q.data_ptr() % 64
    got = replay.run_call(call)
    assert_bit_equal(got["out"], want[0])
    assert_bit_equal(got["lse"], want[1])


def test_expanded_input_comes_back(tmp_path: Path) -> None:
    x = torch.randn(1, 32).expand(4, 32)
    with kvk.recording(dump=tmp_path):
        want = kvk.hadamard(x)
    call = saved.read_call(next(tmp_path.iterdir()))
    assert call.tensors()["x"].stride() == (0, 1)
    assert_bit_equal(replay.run_call(call)["out"], want)


def test_a_wrong_result_is_found(tmp_path: Path, monkeypatch, capsys) -> None:
    with kvk.recording(dump=tmp_path):
        kvk.hadamard(torch.ones(2, 8), scale=1.0)
    (path,) = tmp_path.iterdir()
    right = replay.run_call(saved.read_call(path))
    wrong = right["out"].clone()
    wrong[1, 2] += 0.5
    wrong[1, 5] = torch.nan
    monkeypatch.setattr(replay, "run_call", lambda call, device: {"out": wrong})
    assert replay.main([str(path)]) == 1
    printed = capsys.readouterr().out
    assert "out      float32 [2, 8], sha256 " in printed
    assert (
        "DIFFERS at [1, 2]: got 0.5, wanted 0.0, error 5.000e-01" in printed
        and "2 of 16 elements differ" in printed
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_merged_branches_is_judged(dtype: torch.dtype, tmp_path: Path, capsys) -> None:
    """out and lse from outside: those of two patterns together; then those of the one alone, as a wrong result."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(96, heads, 32, generator=gen).to(dtype) for heads in (4, 2, 2))
    patterns = [kvk.block_mask_to_csr(torch.tensor(mask)) for mask in
                ([[[[True, False, False], [True, True, False], [False, False, True]]]],
                 [[[[False, True, False], [False, False, True], [True, False, False]]]])]  # fmt: skip
    parts = [kvk.block_sparse_attention(q, k, v, *pattern, 32, 32) for pattern in patterns]
    merged = kvk.merge_states(*(torch.stack(x) for x in zip(*parts, strict=True)))
    grads = torch.randn(96, 4, 32, generator=gen).to(dtype), torch.randn(96, 4, generator=gen)
    with kvk.recording(dump=tmp_path):
        kvk.block_sparse_attention_backward(*grads, q, k, v, *merged, *patterns[0], 32, 32)
    (path,) = tmp_path.iterdir()
    assert replay.main([str(path)]) == 0
    wrong = kvk.block_sparse_attention_backward(*grads, q, k, v, *parts[0], *patterns[0], 32, 32)
    found = replay.check_call(saved.read_call(path), dict(zip(("dq", "dk", "dv"), wrong, strict=True)))
    assert all(comparison.differs > 100 for comparison in found)


def test_one_wrong_bit_is_found(tmp_path: Path, monkeypatch, capsys) -> None:
    with kvk.recording(dump=tmp_path):
        kvk.quantize(torch.randn(16, 8), 2, 16, -2)
    (path,) = tmp_path.iterdir()
    results = replay.run_call(saved.read_call(path))
    results["codes"][3, 1] ^= 4
    monkeypatch.setattr(replay, "run_call", lambda call, device: results)
    assert replay.main([str(path)]) == 1
    assert re.search(r"codes .*DIFFERS at \[3, 1\]: .*error 4", capsys.readouterr().out)


def test_a_refused_call_replays_as_refused(tmp_path: Path, capsys) -> None:
    k_pages, v_pages = pools()
    with kvk.recording(dump=tmp_path), pytest.raises(RuntimeError):
        kvk.append_kv(torch.randn(1, 2, 32), torch.randn(1, 2, 32), k_pages, v_pages, torch.tensor([640]))
    assert replay.main([str(next(tmp_path.iterdir()))]) == 1
    assert "refused: kvk::append_kv: slot_mapping: token 0 goes to slot 640" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_a_dtype_that_is_not_saved(dtype: torch.dtype, tmp_path: Path, capsys) -> None:
    with kvk.recording(dump=tmp_path), pytest.raises(RuntimeError, match="a dtype that kvk does not know"):
        kvk.hadamard(torch.ones(3, 32).to(dtype))
    assert replay.main([str(next(tmp_path.iterdir()))]) == 2
    assert "x is of a dtype that is not saved" in capsys.readouterr().err


def test_bounds(tmp_path: Path, capfd) -> None:
    x = torch.randn(1000, 32)
    with kvk.recording(dump=tmp_path, max_calls=3):
        for _ in range(5):
            kvk.hadamard(x)
    assert len(list(tmp_path.iterdir())) == 3
    small = tmp_path / "small"
    with kvk.recording(dump=small, max_bytes=300_000):
        for _ in range(5):
            kvk.hadamard(x)
    assert len(list(small.iterdir())) == 2
    with kvk.recording(dump=small, max_bytes=300_000):  # the bound is the folder's, not the process's
        kvk.hadamard(x)
    assert len(list(small.iterdir())) == 2


def test_a_folder_that_cannot_be_written_fails_no_call(tmp_path: Path, capfd) -> None:
    (tmp_path / "file").write_text("")
    with kvk.recording(dump=tmp_path / "file" / "folder"):
        kvk.hadamard(torch.randn(3, 8))
    assert re.match(r"kvk: hadamard: not saved: .*folder", capfd.readouterr().err)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "header", "other"])
def test_unusable_files(damage: str, tmp_path: Path, capsys) -> None:
    with kvk.recording(dump=tmp_path):
        kvk.hadamard(torch.randn(30, 32))
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    other = b'{"__metadata__":{"format":"pt"}}'
    path.write_bytes(
        {
            "empty": b"",
            "text": b"no safetensors",
            "cut": data[:-1],
            "header": data[:100],
            "other": struct.pack("<Q", len(other)) + other,
        }[damage]
    )
    assert replay.main([str(path)]) == 2
    assert str(path) in capsys.readouterr().err


CRASH = """
import ctypes, kvk, numpy, torch
x = torch.randn(64, 32)
kvk.hadamard(x)
torch.ops.kvk.quantize(x, 2, 32, -2)
nowhere = torch.from_numpy(numpy.ctypeslib.as_array((ctypes.c_float * 2048).from_address(8)))
kvk.hadamard(x, out=nowhere.view(64, 32))
"""
COMPILED = """
import kvk, torch
x = torch.ones(1, 8)
kvk.hadamard(x)
torch.compile(kvk.hadamard, backend='aot_eager')(x)
"""


def test_readable_after_a_crash(tmp_path: Path) -> None:
    """The process dies in the kernel, of an output that is not there: its call is on the disk."""
    environment = {**os.environ, "KVK_DUMP": str(tmp_path), "KVK_DUMP_CALLS": "1K", "KVK_DUMP_BYTES": "1M"}
    done = subprocess.run(
        [sys.executable, "-c", CRASH], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGSEGV, done.stderr
    files = sorted(tmp_path.iterdir())
    calls = [saved.read_call(file) for file in files]
    assert [call.op for call in calls] == ["hadamard", "quantize", "hadamard"]
    assert replay.main([str(file) for file in files]) == 0


def test_environment(tmp_path: Path) -> None:
    environment = {**os.environ, "KVK_LOG": "1", "KVK_DUMP": str(tmp_path), "KVK_DUMP_CALLS": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.count("kvk: hadamard(x=float32[1, 8])") == 2
    assert "KVK_DUMP_CALLS must be a number" in done.stderr
    assert len(list(tmp_path.iterdir())) == 2


def test_a_card_is_read_back(tmp_path: Path, capfd) -> None:
    """Over the emulator: memory comes through the backend, and pools with gaps come row by row."""
    card = EmulatedCard()
    case = make_case([70, 5], page_size=7, layout="hnd", group=2, dtype=torch.bfloat16, head_dim=64)
    before = card.ops._set_recording(2, str(tmp_path), 10, 1 << 30)
    try:
        out, lse = card.run(case)
    finally:
        log, folder, calls, size = before.split("\n")
        card.ops._set_recording(int(log), folder, int(calls), int(size))
    line = capfd.readouterr().err.splitlines()[-1]
    assert "cuda:0" in line and "us to queue, saved as" in line
    call = saved.read_call(next(tmp_path.iterdir()))
    comparisons = replay.check_call(call, {"out": out, "lse": lse})
    assert comparisons is not None and not any(c.differs for c in comparisons)
    results = replay.run_call(call)  # the same call on the CPU
    comparisons = replay.check_call(call, results)
    assert comparisons is not None and not any(c.differs for c in comparisons)
