"""The benchmark harness: a tiny run through every part, and wrong results that must not be timed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kvk import bench_cli

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "cases",
    "harness",
    "peers",
    "picture",
    "readme_table",
    "record",
    "report",
    "roofline",
    "bench_call_cost",
)


@pytest.fixture(scope="module")
def bench() -> Any:
    """The modules of bench/, by name. Threads are set as a benchmark run would."""
    sys.path.insert(0, str(ROOT))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"bench.{name}") for name in MODULES})
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def ceilings(bench: Any) -> Any:
    made = bench.roofline.Ceilings(threads=1, buffer_bytes=8 << 20)
    made.survey(passes=1)
    return made


def tiny(bench: Any, **changes: Any) -> Any:
    return bench.cases.AttentionCase(
        **{
            "dtype": "f32",
            "q_heads": 4,
            "kv_heads": 2,
            "kv_len": 90,
            "head_dim": 32,
            "headline": True,
            **changes,
        }
    )


def measurement(bench: Any, ceilings: Any, case: Any, implementations: list[Any]) -> Any:
    budget = bench.harness.Budget(rounds=2, turn=1e-3, slow=0.1)
    return bench.harness.Measurement(case, implementations, ceilings, budget, cache=1 << 12)


def test_tiny_run(bench: Any, ceilings: Any, tmp_path: Path) -> None:
    cases, peers, call = bench.cases, bench.peers, bench.bench_call_cost
    quick_peers = [peers.SdpaGqa(), peers.SdpaPacked(), peers.OnnxRuntime(), peers.VllmCpu()]
    merge = cases.MergeCase("bf16", parts=3, tokens=4, heads=2, head_dim=16)
    plan = [
        (tiny(bench), [peers.Kvk(), *quick_peers]),
        (tiny(bench, dtype="bf16", layout="HND"), [peers.Kvk(), *quick_peers]),
        (tiny(bench, dtype="f16", q_len=5, batch=2), [peers.Kvk(), *quick_peers]),
        (tiny(bench, q_len=90), [peers.Kvk(), *quick_peers]),
        (cases.AppendCase("f16", tokens=40, kv_heads=2, head_dim=32), [peers.Kvk(), *peers.append_peers()]),
        (merge, [peers.Kvk(), peers.TorchMerge(compiled=False)]),
        (cases.CallCase(merge), [call.OpOut(), call.Neg(True), call.PythonFunction()]),
        (cases.CallCase(tiny(bench, kv_len=1)), [call.OpOut(), call.Neg(False), call.PythonFunction()]),
    ]
    run = bench.record.Run(ceilings, quick=True)
    run.rows = [measurement(bench, ceilings, case, implementations).run() for case, implementations in plan]

    path = tmp_path / "results" / "run.json"
    bench.record.write_json(path, run.as_json())
    made = bench.record.read_json(path)
    assert made["machine"]["cpu"] and made["machine"]["isa"]["kvk"] and made["versions"]["kvk"]
    assert {(c["kind"], c["threads"]) for c in made["ceilings"]} == {
        (k, 1) for k in ("copy", "fma", "read", "triad")
    }
    assert all(0 < c["median"] <= c["best"] for c in made["ceilings"])

    assert len(made["rows"]) == len(plan)
    for row, (case, implementations) in zip(made["rows"], plan, strict=True):
        assert (row["op"], row["case"]) == (case.op, case.name)
        assert row["bytes"] > 0 and row["gb_s"] > 0 and row["seconds"]["median"] >= row["seconds"]["min"] > 0
        assert (row["gflop_s"] > 0) == (row["flops"] > 0)
        # Everyone who was asked was either timed or is missing for a stated reason.
        assert {i.name for i in implementations} - {"kvk"} == row["peers"].keys() | row["notes"].keys()
        assert row["peers"] and all(peer["ratio"] > 0 for peer in row["peers"].values())
        assert not any(note.startswith(("failed", "wrong")) for note in row["notes"].values()), row["notes"]
        if "aim_us" in row:
            assert row["bound"] is None
        else:
            assert (
                row["bound"] in ("read", "copy", "fma") and row["fraction"] > 0 and row["ceiling"]["best"] > 0
            )
    assert "onnxruntime gqa" in {*made["rows"][1]["notes"]}  # bf16: no such kernel

    from rich.console import Console

    console = Console(width=200, record=True, file=(tmp_path / "table.txt").open("w"))
    for table in bench.report.tables(made):
        console.print(table)
    text = console.export_text()
    assert all(case.name in text for case, _ in plan if not isinstance(case, cases.CallCase))
    assert "merge_states.out" in text and "5 us" in text
    for row in made["rows"]:
        assert row["op"] in bench.report.progress_line(row)

    picture = tmp_path / "roofline.png"
    bench.picture.draw(picture, made)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000

    readme = tmp_path / "README.md"
    readme.write_text("# top\n<!-- bench -->\nold\n<!-- /bench -->\ntail\n")
    command = [str(path), "--readme", str(readme)]
    assert bench.readme_table.main([*command, "--check"]) == 1
    assert bench.readme_table.main(command) == 0
    assert bench.readme_table.main([*command, "--check"]) == 0
    drawn = readme.read_text()
    assert drawn.startswith("# top\n<!--") and drawn.endswith("-->\ntail\n") and "old" not in drawn
    assert sum(line.startswith("| `paged_") for line in drawn.splitlines()) == 4


class Changed:
    """A library whose results are altered before anyone looks."""

    name = "kvk"

    def __init__(self, kvk: Any, change: Any) -> None:
        self.kvk, self.change = kvk, change

    def unavailable(self, case: Any) -> None:
        return None

    def build(self, data: Any) -> Any:
        prepared = self.kvk.build(data)
        return type(prepared)(prepared.run, lambda value: self.change(prepared.result(value)))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: (r[0] * 1.001, r[1]),
        lambda r: (r[0].index_fill(0, torch.tensor([0]), float("nan")), r[1]),
        lambda r: (r[0], r[1] + 1e-3),
        lambda r: (r[0][:, :-1], r[1][:, :-1]),
        lambda r: (r[0].flip(1), r[1].flip(1)),
    ],
    ids=["scaled", "nan", "lse", "shape", "heads swapped"],
)
def test_wrong_attention_is_not_timed(bench: Any, ceilings: Any, change: Any) -> None:
    with pytest.raises(bench.cases.WrongResultError, match="paged_decode f32"):
        measurement(bench, ceilings, tiny(bench), [Changed(bench.peers.Kvk(), change)])


def test_missing_page_is_noticed(bench: Any, ceilings: Any) -> None:
    """16-bit output of a long cache hardly changes when a page is skipped; the lse does."""

    class Short(bench.peers.Kvk):  # type: ignore[misc, name-defined]
        def build(self, data: Any) -> Any:
            data.kv_lens -= 1
            return super().build(data)

    with pytest.raises(bench.cases.WrongResultError, match="lse"):
        measurement(bench, ceilings, tiny(bench, dtype="bf16", kv_len=4096), [Short()])


def test_wrong_append_and_merge_are_not_timed(bench: Any, ceilings: Any) -> None:
    append = bench.cases.AppendCase("f32", tokens=20, kv_heads=1, head_dim=32)
    merge = bench.cases.MergeCase("f32", parts=2, tokens=3, heads=2, head_dim=8)

    class Lazy(bench.peers.Kvk):  # type: ignore[misc, name-defined]
        def build(self, data: Any) -> Any:
            return bench.harness.Prepared(lambda: (data.k_pages, data.v_pages), lambda pages: pages)

    with pytest.raises(bench.cases.WrongResultError, match="k_pages"):
        measurement(bench, ceilings, append, [Lazy()])
    # The work of one implementation must not be what the next one is judged by.
    with pytest.raises(bench.cases.WrongResultError, match="k_pages"):
        measurement(bench, ceilings, append, [*bench.peers.append_peers(), Lazy()])
    with pytest.raises(bench.cases.WrongResultError, match="out is off"):
        measurement(bench, ceilings, merge, [Changed(bench.peers.Kvk(), lambda r: (r[0] + 0.01, r[1]))])


def test_wrong_or_broken_peers_are_noted(bench: Any, ceilings: Any) -> None:
    wrong = Changed(bench.peers.SdpaGqa(), lambda r: (r[0] * 2, None))
    wrong.name = "doubled"

    class Broken(bench.peers.SdpaGqa):  # type: ignore[misc, name-defined]
        name = "broken"

        def build(self, data: Any) -> Any:
            raise ValueError("no such kernel\nand more")

    row = measurement(bench, ceilings, tiny(bench), [bench.peers.Kvk(), wrong, Broken()]).run()
    assert row["peers"] == {}
    assert row["notes"]["doubled"].startswith("wrong result: out is off")
    assert row["notes"]["broken"] == "failed: ValueError: no such kernel"


def test_small_cases_rotate_through_buffers_larger_than_the_cache(bench: Any) -> None:
    case = tiny(bench, kv_len=1024)
    assert bench.harness.rotated_copies(case, 32 << 20) * case.bytes >= 128 << 20
    assert bench.harness.rotated_copies(tiny(bench, kv_len=1 << 20), 1 << 20) == 1


def test_command_line(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    taken: list[list[str]] = []
    with monkeypatch.context() as patch:
        patch.setattr(pytest, "main", lambda arguments: taken.append(arguments) or 0)
        patch.chdir(tmp_path)
        json, plot = tmp_path / "out" / "run.json", tmp_path / "out" / "run.png"
        options = ["-k", "call_cost and merge", "--quick", "--threads", "1", "--peers", "neg"]
        assert bench_cli.main([*options, "--json", str(json), "--plot", str(plot)]) == 0
        assert bench_cli.main(["--threads", "-1"]) == 2
        patch.setattr(bench_cli, "find_checkout", lambda: None)
        assert bench_cli.main([]) == 2
    assert "checkout" in capsys.readouterr().err

    # The same arguments in a process of their own: pytest cannot run inside pytest.
    command = [sys.executable, "-m", "pytest", *taken[0], "--kvk-buffer-mib=8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "merge_states.out" in done.stdout and f"wrote {json}" in done.stdout
    (row,) = bench.record.read_json(json)["rows"]
    assert list(row["peers"]) == ["torch.neg", "aten.neg.out"]
    assert plot.read_bytes().startswith(b"\x89PNG")
