"""`make gpu-check` as far as it goes without a card, so that it works the day there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from building import ROOT

sys.path.insert(0, str(ROOT / "tests" / "gpu"))
import check as check_script
import conformance
import parts
import wrappers

pytestmark = pytest.mark.xdist_group("gpu-check")  # one dry run serves all

CHECK = ROOT / "tests" / "gpu" / "check.py"


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHECK), *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=2400)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dry run, and what it left."""
    output = tmp_path_factory.mktemp("gpu-check")
    done = check("--dry-run", f"--output={output}")
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout


class TestDryRun:
    def test_every_part_passes(self, made):
        output, text = made
        record = json.loads((output / "gpu-check.json").read_text())
        assert {name: part["status"] for name, part in record["parts"].items()} == dict.fromkeys(
            ("compile", "conformance", "tests", "bench", "sanitizer"), "passed"
        )
        assert record["dry_run"] and record["wrappers_hash"] == wrappers.wrappers_hash()
        numbers = {name: part["numbers"] for name, part in record["parts"].items()}
        assert numbers["tests"]["tests"] > 250 and numbers["compile"]["kernels"] > 30
        assert numbers["compile"]["wrapper_kernels"] == numbers["conformance"]["kernels"] > 25
        assert "| conformance | passed |" in (output / "gpu-check.md").read_text() and "| compile |" in text

    def test_its_answers_serve_a_run_on_a_card(self, made):
        """What the card's run reads instead of the emulator: complete, and refused when the sources change."""
        output, _ = made
        kept = output / "conformance.json"
        setting = parts.Setting(output, False, "sm_90a", kept, dict(os.environ), 60)
        cases = {case["kernel"]: case for case in parts.expectation(setting)["cases"]}
        assert "kvk::device::conform_mma_bf16" in cases and "kvk::device::conform_tma_2d" in cases
        stale = output / "stale.json"
        stale.write_text(json.dumps({**json.loads(kept.read_text()), "sources": "other"}))
        with pytest.raises(RuntimeError, match="is of other sources"):
            parts.expectation(replace(setting, expect=stale))
        with pytest.raises(RuntimeError, match="does not exist"):
            parts.expectation(replace(setting, expect=output / "none.json"))


def test_without_a_card_it_says_so_and_fails(tmp_path):
    done = check(f"--output={tmp_path}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "no card" in done.stderr and "--dry-run" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_does_not_stop_the_next(tmp_path):
    done = check("--dry-run", "--parts=compile,bench", "--arch=sm_10", f"--output={tmp_path}")
    record = json.loads((tmp_path / "gpu-check.json").read_text())
    assert done.returncode == 1 and "not passed: compile" in done.stdout
    assert [part["status"] for part in record["parts"].values()] == ["failed", "passed"]
    assert "sm_10" in (tmp_path / "compile.log").read_text()


def test_a_part_that_hangs_is_ended(tmp_path):
    setting = parts.Setting(tmp_path, False, "sm_90a", None, dict(os.environ), 0.5)
    start = time.monotonic()
    done = parts.run(
        setting, [sys.executable, "-c", "import time; print('on', flush=True); time.sleep(60)"], "log"
    )
    assert done.status is None and done.verdict() == "timed out" and time.monotonic() - start < 20
    assert "on" in (tmp_path / "log").read_text()


# Conformance ------------------------------------------------------------------------------------------------


def case_of(words: list[int], log2_error: int = 0) -> dict[str, object]:
    return {"kernel": "k", "out": words, "log2_relative_error": log2_error}


def float_word(value: float) -> int:
    return int(torch.tensor(value).view(torch.int32)) & 0xFFFFFFFF


class TestComparison:
    def test_exact_words(self):
        assert conformance.compare(case_of([1, 2, 3]), [1, 2, 3]).wrong == 0
        verdict = conformance.compare(case_of([1, 2, 3]), [1, 7, 3])
        assert verdict.wrong == 1 and "word 1" in verdict.first

    def test_a_wrong_number_of_words_is_wrong(self):
        assert conformance.compare(case_of([1, 2]), [1]).wrong == 2

    @pytest.mark.parametrize(("factor", "wrong"), [(1 + 2.0**-22, 0), (1 + 2.0**-18, 1), (float("nan"), 1)])
    def test_approximate_functions(self, factor, wrong):
        case = case_of([float_word(3.5), float_word(0.25)], -21)
        verdict = conformance.compare(case, [float_word(3.5 * factor), float_word(0.25)])
        assert verdict.wrong == wrong
        assert verdict.worst_error is not None and verdict.allowed_error == 2.0**-21

    def test_architectures(self):
        kernels = [
            "conform_ex2",
            "conform_tma_2d",
            "conform_bulk_load",
            "conform_wgmma<kvk::device::bf16, 64, false>",
        ]
        names = [f"kvk::device::{kernel}" for kernel in kernels]
        runs = {
            arch: sum(conformance.runs_on(n, arch) for n in names) for arch in ("sm_80", "sm_90a", "sm_100a")
        }
        assert runs == {"sm_80": 1, "sm_90a": 4, "sm_100a": 3}


class TestOnACard:
    """The parts as they run on a card, with stand-ins for what is not here."""

    @pytest.fixture
    def setting(self, tmp_path):
        return parts.Setting(tmp_path, False, "sm_90a", None, dict(os.environ), 60)

    @pytest.mark.parametrize(
        ("script", "status", "detail"),
        [
            ('echo "16 calls, all right (cuda)"; echo "ERROR SUMMARY: 0 errors"', "passed", "0 errors"),
            (
                'echo "16 calls, all right (cuda)"; echo "ERROR SUMMARY: 3 errors"; exit 86',
                "failed",
                "3 errors",
            ),
            (
                'echo "ERROR SUMMARY: 0 errors"',
                "failed",
                "0 errors",
            ),  # the program itself never came to its end
            ('echo "Device not supported"; exit 1', "absent", "does not support"),
        ],
    )
    def test_sanitizer(self, setting, monkeypatch, script, status, detail):
        program = setting.output / "compute-sanitizer"
        program.write_text(f'#!/bin/sh\necho "tool $2"\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setattr(parts, "find_sanitizer", lambda: str(program))
        part = parts.sanitizer(setting)
        assert part.status == status and part.detail.count(detail) == 4, part
        log = (setting.output / "sanitizer.log").read_text()
        assert all(f"tool {tool}" in log for tool in parts.SANITIZERS) and "kns=_ZN3kvk6device" in log

    def test_the_record(self, monkeypatch, tmp_path, capsys):
        """A run on a card: one part fails by an error of its own, one finds no time, and both are told."""

        def failing(setting):
            raise ValueError("out of luck\nand more")

        passing = parts.Part("passed", "3 of 3", {"rows": 3}, "| a table |\n")
        monkeypatch.setattr(check_script, "PARTS", {"one": (lambda s: passing, 30), "two": (failing, 30)})
        monkeypatch.setattr(check_script, "card_facts", lambda: {"card": "A Card", "torch": "2.11"})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        arguments = ["--parts=one,two", f"--output={tmp_path}"]
        assert check_script.main(arguments) == 1
        record = json.loads((tmp_path / "gpu-check.json").read_text())
        assert record["card"] == "A Card" and not record["dry_run"] and record["schema"] == wrappers.SCHEMA
        assert record["parts"]["two"]["detail"] == "ValueError: out of luck"
        text = (tmp_path / "gpu-check.md").read_text()
        assert "| one | passed |" in text and "| a table |" in text and "kvk on A Card" in text
        assert "not passed: two" in capsys.readouterr().out
        assert check_script.main(["--parts=one", f"--output={tmp_path}"]) == 0
        assert f"bench/results/gpu-a-card-{record['date'][:10]}.json" in capsys.readouterr().out
        assert check_script.main([*arguments, "--total=8"]) == 1
        assert "no time was left" in (tmp_path / "gpu-check.md").read_text()
        with pytest.raises(SystemExit):
            check_script.main(["--parts=three"])

    def test_sanitizer_that_is_not_there(self, setting, monkeypatch):
        monkeypatch.setattr(parts, "find_sanitizer", lambda: None)
        assert parts.sanitizer(setting).status == "absent"

    @pytest.mark.parametrize(
        ("body", "status", "failures"),
        [("assert 2 + 2 == 4", "passed", 0), ("assert 2 + 2 == 5", "failed", 1)],
    )
    def test_tests(self, setting, monkeypatch, body, status, failures):
        file = setting.output / "test_it.py"
        file.write_text(f"import pytest\n@pytest.mark.gpu\ndef test_it():\n    {body}\n")
        (setting.output / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
        monkeypatch.setattr(parts, "gpu_test_files", lambda: [str(file)])
        part = parts.tests(setting)
        assert part.status == status and part.numbers["failures"] == failures, part
        assert part.numbers["tests"] == 1

    def test_conformance(self, monkeypatch, made):
        """Every case goes to the card once, and one wrong word is found."""
        expected = json.loads((made[0] / "conformance.json").read_text())

        class Card:
            def __init__(self, cubin):
                assert len(cubin) > 10_000

            def words(self, values):
                return values

            def run(self, case, symbol, words_in):
                assert symbol.startswith("_ZN3kvk6device") and len(words_in) == 4096
                wrong = "mma_f16" in case["kernel"]
                return [word ^ int(wrong and i == 5) for i, word in enumerate(case["out"])]

        monkeypatch.setattr(conformance, "Card", Card)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        lines: list[str] = []
        verdicts = conformance.run_on_card(expected, lines.append)
        assert [v.kernel for v in verdicts if v.wrong] == ["kvk::device::conform_mma_f16"]
        assert len(verdicts) == len(expected["cases"]) and sum("FAIL" in line for line in lines) == 1


# Hash of the wrappers ---------------------------------------------------------------------------------------

HEADER = """\
// A comment.
#pragma once
#if KVK_ARCH >= 900
KVK_DEVICE void copy() {
#if KVK_EMULATOR
  emu::copy();
#else
  asm volatile("copy;");
#endif
}
#endif
#if !KVK_EMULATOR
KVK_DEVICE int only_device() { return 1; }  // one
#else
int only_emulator();
#endif
"""


class TestWrappers:
    def test_only_the_device_half_counts(self):
        half = wrappers.device_half(HEADER)
        assert "asm volatile" in half and "only_device" in half and "#if KVK_ARCH >= 900" in half
        assert "emu::copy" not in half and "only_emulator" not in half and "comment" not in half
        assert half.count("#if") == half.count("#endif") == 1

    @pytest.mark.parametrize(
        ("old", "new", "changes"),
        [
            ('"copy;"', '"copy.wide;"', True),
            ("return 1", "return 2", True),
            (">= 900", ">= 1000", True),
            ("emu::copy();", "emu::copy(1);", False),
            ("// A comment.", "// Another.\n", False),
            ("  asm", "    asm", False),
        ],
    )
    def test_hash(self, tmp_path, old, new, changes):
        hashes = []
        for text in (HEADER, HEADER.replace(old, new)):
            assert old in HEADER
            (tmp_path / "ptx_x.h").write_text(text)
            hashes.append(wrappers.wrappers_hash(tmp_path))
        assert (hashes[0] != hashes[1]) == changes

    def test_every_wrapper_is_seen(self):
        text = "".join(wrappers.device_half(p.read_text()) for p in sorted(wrappers.DEVICE.glob("ptx*.h")))
        assert text.count("asm") > 30 and "emu::" not in text

    def test_the_line_of_the_summary(self, tmp_path):
        (tmp_path / "ptx_x.h").write_text(HEADER)
        record = {
            "schema": wrappers.SCHEMA,
            "date": "2026-01-02T03:04:05+00:00",
            "dry_run": False,
            "card": "A Card",
            "wrappers_hash": wrappers.wrappers_hash(tmp_path),
            "parts": {"conformance": {"status": "passed"}},
        }
        file = tmp_path / "gpu-a-card.json"

        def line(**changes):
            file.write_text(json.dumps({**record, **changes}))
            return wrappers.state_line(tmp_path, tmp_path)

        assert "never compared" in (wrappers.state_line(tmp_path, tmp_path) or "")
        assert line() is None
        assert "changed since" in line(wrappers_hash="x") and "A Card, 2026-01-02" in line(wrappers_hash="x")
        assert "never compared" in line(dry_run=True)
        assert "never compared" in line(parts={"conformance": {"status": "failed"}})


def test_the_list_of_test_files_is_that_of_the_marked_tests():
    files = {Path(file).name for file in parts.gpu_test_files()}
    assert {"test_cuda_ops.py", "test_cuda_ops_states.py", "test_gpu_paged.py", "test_gpu_graphs.py"} <= files
    marked = {
        path.name
        for path in (ROOT / "tests").glob("test_*.py")
        if "mark.gpu\n" in path.read_text() or ": Card" in path.read_text()
    }
    assert marked <= files
