"""The CUDA benchmarks' harness, with the CPU in the place of the card."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import kvk
import pytest
import torch
from building import ROOT

sys.path.insert(0, str(ROOT))
from bench import (
    bench_grid_cuda,
    bench_lightning_cuda,
    bench_linear_cuda,
    bench_paged_cuda,
    bench_quant_cuda,
    bench_sparse_cuda,
    cuda_data,
    cuda_harness,
    cuda_run,
)
from bench.cases import AttentionCase, WrongResultError
from bench.harness import Prepared
from bench.lightning_cases import LightningCase, LightningDecodeCase
from bench.linear_cases import LinearCase
from bench.masked_cases import BlockSparseCase, NeighborhoodCase

SMALL = AttentionCase(
    "bf16", q_heads=4, kv_heads=2, head_dim=64, batch=2, kv_len=200, page_size=16, headline=True
)


class Ours:
    """kvk on the CPU, by way of the benchmarks' data."""

    name = "kvk"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def unavailable(self, case):
        return None

    def build(self, data):
        import kvk

        pages = (data.k_pages, data.v_pages, data.page_indices, data.kv_lens)

        def run():
            if data.case.q_len == 1:
                out, lse = kvk.paged_decode(data.q, *pages)
            else:
                out, lse = kvk.paged_prefill(data.q, data.qo_indptr, *pages)
            return out * self.scale, lse

        return Prepared(run, lambda result: result)


class Peer(Ours):
    name = "peer"


class Broken(Ours):
    name = "broken"

    def build(self, data):
        raise ValueError("no such thing\nand more")


class Absent(Ours):
    name = "absent"

    def unavailable(self, case):
        return "not installed"


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The harness with the CPU in the place of the card: no events and no graphs."""

    def timed(run):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    monkeypatch.setattr(cuda_harness, "timed", timed)
    monkeypatch.setattr(cuda_harness, "captured", lambda run: None)
    monkeypatch.setattr(cuda_harness, "l2_bytes", lambda: 1 << 16)
    monkeypatch.setattr(cuda_harness, "draw", lambda case, seed: cuda_data.draw(case, seed, "cpu"))
    monkeypatch.setattr(cuda_harness, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(cuda_harness, "MATRIX_SIZE", 64)
    properties = SimpleNamespace(name="A Card", multi_processor_count=4, L2_cache_size=1 << 16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def record_case(bench, width):
    small = replace(SMALL, page_size=64, head_dim=128)
    kind = type(bench.cases()[0])
    return kind(width, small, headline=True, op=bench.cases()[0].op)


@pytest.mark.parametrize(("bench", "width"), [(bench_quant_cuda.BENCH, 4), (bench_sparse_cuda.BENCH, 40)])
class TestRecords:
    """The benchmarks over records: against kvk over dense pages, which are checked for what they are."""

    def test_a_row(self, on_the_cpu, bench, width):
        case = record_case(bench, width)
        ceilings = cuda_harness.CudaCeilings("cpu")
        row = cuda_harness.CudaMeasurement(
            case, bench.implementations(case), ceilings, rounds=3, turn=1e-3
        ).run()
        assert list(row["peers"]) == ["kvk dense"] and row["notes"] == {} and row["error"] < 1e-2
        assert row["bytes"] == case.bytes < 0.6 * case.dense.bytes
        wanted = bench.aims[width]
        for ratio, verdict in ((wanted, "met"), (0.99 * wanted, "missed")):
            row["peers"]["kvk dense"]["ratio"] = ratio
            assert bench.aim(row, case) == verdict
        assert bench.aim(row, replace(case, headline=False)) is None

    def test_a_wrong_kvk_is_an_error(self, on_the_cpu, bench, width):
        case = record_case(bench, width)
        ours, _ = bench.implementations(case)
        right = ours.call
        ours.call = lambda data: (right(data)[0] * 1.1, right(data)[1])
        with pytest.raises(WrongResultError, match="out is off by"):
            cuda_harness.CudaMeasurement(case, [ours], cuda_harness.CudaCeilings("cpu"), 1, 1e-3)

    def test_names_are_unique_and_sizes_are_those_of_the_targets(self, bench, width):
        cases = bench.cases()
        assert len({(case.op, case.name) for case in cases}) == len(cases)
        headline = [case for case in cases if case.headline]
        assert {case.bits for case in headline} >= set(bench.aims)
        assert {
            (case.dense.batch, case.dense.kv_len, case.dense.q_heads, case.dense.kv_heads)
            for case in headline
        } == {(8, 32768, 32, 8)}
        for case in cases:
            assert cuda_harness.copies(case, 60 << 20) >= 2


class TestLightning:
    """Lightning attention: peers of another function are not checked, and every step starts from the first states."""

    @pytest.mark.parametrize(
        "case",
        [
            LightningCase(130, heads=2, dim=16),
            LightningCase(130, heads=2, dim=16, backward=True, decay_grad=True),
            LightningDecodeCase(3, heads=2, dim=16),
        ],
    )
    def test_a_row(self, on_the_cpu, case):
        ours, *peers = bench_lightning_cuda.implementations(case)
        flash = [bench_lightning_cuda.Ours(lambda data: None, "other function")] if len(peers) == 2 else []
        ceilings = cuda_harness.CudaCeilings("cpu")
        row = cuda_harness.CudaMeasurement(case, [ours, *peers, *flash], ceilings, rounds=3, turn=1e-3).run()
        assert row["error"] < 1e-2 and row["bytes"] == case.bytes
        headline = replace(case, headline=True)
        assert bench_lightning_cuda.aim(row, case) is None
        if isinstance(case, LightningDecodeCase):
            assert row["peers"]["torch eager"]["error"] < 1e-2
            for fraction, verdict in ((0.8, "met"), (0.7, "missed")):
                assert bench_lightning_cuda.aim({**row, "fraction": fraction}, headline) == verdict
            return
        for ratio, verdict in ((1.0, "met"), (0.9, "missed")):
            with_peer = {**row, "peers": {"fla chunks": {"ratio": ratio}}}
            assert bench_lightning_cuda.aim(with_peer, headline) == verdict

    def test_a_wrong_kvk_is_an_error(self, on_the_cpu):
        case = LightningCase(130, heads=2, dim=16)
        wrong = bench_lightning_cuda.Ours(lambda data: bench_lightning_cuda.ours(data) * 1.1)
        with pytest.raises(WrongResultError, match="is off by"):
            cuda_harness.CudaMeasurement(case, [wrong], cuda_harness.CudaCeilings("cpu"), 1, 1e-3)

    def test_a_peers_gradient(self):
        import kvk

        def forward(x):
            return kvk.lightning_attention(x.q, x.k, x.v, x.decay, scale=x.scale)[0]

        data = cuda_data.draw(LightningCase(130, heads=2, dim=16, backward=True), 0, "cpu")
        prepared = bench_lightning_cuda.gradient(forward, data, lambda grads: grads[0])
        assert data.check(prepared.result(prepared.run())) < 1e-4

    def test_names_are_unique(self):
        cases = bench_lightning_cuda.cases()
        assert len({(case.op, case.name) for case in cases}) == len(cases)
        assert all(cuda_harness.copies(case, 60 << 20) >= 2 for case in cases)


class TestGrid:
    """Attention over ordinary tensors: some heads are checked, and the aim is dense attention's rate."""

    @pytest.mark.parametrize(
        "case",
        [
            BlockSparseCase("bf16", heads=3, head_dim=32, length=256, density=0.5),
            NeighborhoodCase("bf16", heads=3, head_dim=32, extents=(8, 16), kernel=(3, 5)),
            NeighborhoodCase("bf16", heads=3, head_dim=32, extents=(8, 16), kernel=(3, 5), backward=True),
        ],
    )
    def test_a_row(self, on_the_cpu, case):
        ours, dense, *_ = bench_grid_cuda.implementations(case)
        ceilings = cuda_harness.CudaCeilings("cpu")
        row = cuda_harness.CudaMeasurement(case, [ours, dense], ceilings, rounds=3, turn=1e-3).run()
        assert row["error"] < 2e-2 and row["bytes"] == case.bytes
        assert bench_grid_cuda.aim(row, case) is None
        for ratio, verdict in ((case.tokens**2 / case.pairs, "met"), (0.5, "missed")):
            with_peer = {**row, "peers": {"kvk dense": {"ratio": ratio}}}
            assert bench_grid_cuda.aim(with_peer, replace(case, headline=True)) == verdict

    def test_a_wrong_kvk_is_an_error(self, on_the_cpu):
        case = BlockSparseCase("bf16", heads=3, head_dim=32, length=256, density=0.5)
        right = bench_grid_cuda.Kvk()

        class Wrong:
            name = right.name
            unavailable = right.unavailable

            def build(self, data):
                prepared = right.build(data)
                return Prepared(prepared.run, lambda result: (result[0] * 1.2, result[1]))

        with pytest.raises(WrongResultError, match="is off by"):
            cuda_harness.CudaMeasurement(case, [Wrong()], cuda_harness.CudaCeilings("cpu"), 1, 1e-3)

    def test_a_peers_gradient(self):
        case = NeighborhoodCase("f32", heads=3, head_dim=32, extents=(8, 16), kernel=(3, 5), backward=True)
        data = cuda_data.draw(case, 0, "cpu")

        def forward(q, k, v):
            return kvk.neighborhood_attention(q, k, v, case.kernel)[0]

        prepared = bench_grid_cuda.gradient(forward, data, lambda x: x)
        assert data.check(prepared.result(prepared.run())) < 1e-4

    def test_names_are_unique(self):
        cases = bench_grid_cuda.cases()
        assert len({(case.op, case.name) for case in cases}) == len(cases)
        assert all(cuda_harness.copies(case, 60 << 20) >= 2 for case in cases)


class TestLinear:
    """Normalised linear attention: the same rows as the CPU's, and a peer of another function, which is not checked."""

    @pytest.mark.parametrize("options", [{"block": 1}, {"block": 0}, {"block": 26, "backward": True}])
    def test_a_row(self, on_the_cpu, options):
        case = LinearCase(130, heads=2, dim=16, **options)
        ceilings = cuda_harness.CudaCeilings("cpu")
        peers = bench_linear_cuda.implementations(case)
        row = cuda_harness.CudaMeasurement(case, peers[:2], ceilings, rounds=3, turn=1e-3).run()
        assert row["error"] < 1e-2 and row["bytes"] == case.bytes
        headline = replace(case, headline=True)
        assert ("torch matmuls" in row["peers"]) == (case.block == 0)
        if case.block == 0:
            assert row["peers"]["torch matmuls"]["error"] < 1e-2
        for ratio, verdict in ((1.0, "met"), (0.9, "missed")):
            with_peer = {**row, "peers": {"torch matmuls": {"ratio": ratio}}}
            assert bench_linear_cuda.aim(with_peer, headline) == verdict
            assert bench_linear_cuda.aim(with_peer, case) is None

    def test_names_are_unique(self):
        cases = bench_linear_cuda.cases()
        assert len({(case.op, case.name) for case in cases}) == len(cases)
        assert all(cuda_harness.copies(case, 60 << 20) >= 2 for case in cases)


class TestBench:
    @pytest.mark.parametrize("case", [SMALL, replace(SMALL, layout="HND"), replace(SMALL, q_len=130)])
    def test_a_row(self, on_the_cpu, case):
        ceilings = cuda_harness.CudaCeilings("cpu")
        implementations = [Ours(), Peer(), Peer(1.5), Broken(), Absent()]
        implementations[2].name = "wrong peer"
        row = cuda_harness.CudaMeasurement(case, implementations, ceilings, rounds=3, turn=1e-3).run()
        assert list(row["peers"]) == ["peer"] and row["seconds"]["rounds"] == 3 and row["error"] < 1e-2
        assert 0 < row["peers"]["peer"]["ratio"] < 50 and row["fraction"] > 0
        assert "off by" in row["notes"]["wrong peer"] and row["notes"]["absent"] == "not installed"
        assert row["notes"]["broken"] == "failed: ValueError: no such thing"
        row["aim"] = bench_paged_cuda.aim(row, case)
        run = {"rows": [row], "errors": [], "not_run": ["x"], "ceilings": ceilings.as_json()}
        table = cuda_run.table(run)
        assert f"| {row['op']} | {case.name} (no graph) |" in table and "broken left out" in table
        assert "1 rows, 0 errors, no time for 1 cases" in cuda_run.last_line(run)

    def test_a_run(self, on_the_cpu, monkeypatch, tmp_path, capsys):
        """The command, with kvk and one peer: an error in one case is reported, and the next goes on."""
        from bench import cuda_peers

        small = [SMALL, replace(SMALL, kv_len=100), replace(SMALL, q_len=40, headline=False)]
        wrong = Ours()
        real = wrong.build

        def build(data):
            wrong.scale = 1.2 if data.case.kv_len == 100 else 1.0
            return real(data)

        wrong.build = build
        ceilings = cuda_harness.CudaCeilings("cpu")
        monkeypatch.setattr(bench_paged_cuda, "cases", lambda: small)
        monkeypatch.setattr(cuda_harness, "CudaCeilings", lambda: ceilings)
        monkeypatch.setattr(cuda_peers, "Kvk", lambda: wrong)
        monkeypatch.setattr(cuda_peers, "peers", lambda: [Peer(), Absent()])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        file, table = tmp_path / "bench.json", tmp_path / "bench.md"
        arguments = [f"--json={file}", f"--table={table}", "--rounds=2"]
        assert bench_paged_cuda.main(arguments) == 1
        run = json.loads(file.read_text())
        assert [row["case"] for row in run["rows"]] == [small[0].name, small[2].name]
        assert "off by" in run["errors"][0] and small[1].name in table.read_text()
        assert "2 rows, 1 errors" in capsys.readouterr().out
        assert run["machine"]["card"] == "A Card" and {c["kind"] for c in run["ceilings"]} == {
            "copy",
            "matrix",
        }

    def test_a_wrong_kvk_is_an_error(self, on_the_cpu):
        with pytest.raises(WrongResultError, match="out is off by"):
            cuda_harness.CudaMeasurement(SMALL, [Ours(1.1)], cuda_harness.CudaCeilings("cpu"), 1, 1e-3)

    def test_rotation_is_larger_than_the_cache(self):
        l2 = 60 << 20
        for case in bench_paged_cuda.cases():
            count = cuda_harness.copies(case, l2)
            assert count >= 2 and (count * case.bytes >= 4 * l2 or case.q_len > 1)
            assert count * case.bytes <= 8 << 30

    def test_names_are_unique_and_sizes_are_those_of_the_targets(self):
        cases = bench_paged_cuda.cases()
        names = [(case.op, case.name) for case in cases]
        assert len(set(names)) == len(names)
        headline = {(c.op, c.batch, c.kv_len, c.page_size) for c in cases if c.headline}
        assert headline == {
            *(("paged_decode", batch, 32768, page) for batch in (1, 8) for page in (16, 64)),
            ("paged_prefill", 1, 8192, 16),
        }

    def test_a_dense_copy_holds_the_pages(self):
        """What the peers without pages get: key i of request b is the page table's."""
        data = cuda_data.draw(SMALL, 3, "cpu")
        for b, i in ((0, 0), (1, 17), (1, 199)):
            page = data.page_indices[b, i // 16]
            assert torch.equal(data.k[b, :, i], data.k_pages[page, i % 16])
            assert torch.equal(data.v[b, :, i], data.v_pages[page, i % 16])
