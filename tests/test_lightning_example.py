"""examples/python/lightning_lm.py: a few steps of training, and generation from the state."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
EXAMPLE = Path(__file__).parent.parent / "examples" / "python" / "lightning_lm.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lightning_lm", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_learns_and_generates(example, tmp_path):
    torch.manual_seed(0)
    model, text = example.LanguageModel(dim=64, layers=2, heads=2), example.read_text()
    losses = example.train(model, text, 40, batch=8, length=100)
    assert losses[0] > 7.5 and sum(losses[-5:]) / 5 < 5.0  # 8 bits a byte is knowing nothing
    prompt = text[1000:1100]
    tokens = example.generate(model, prompt, 70)
    assert torch.equal(tokens, example.at_once(model, prompt, tokens))
    example.draw(losses, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_logits_of_steps_are_those_of_the_whole(example):
    torch.manual_seed(1)
    model = example.LanguageModel(dim=64, layers=3, heads=2)
    tokens = torch.randint(256, (3, 90))
    with torch.no_grad():
        want, end = model(tokens)
        _, states = model(tokens[:, :65])
        for t in range(65, 90):
            torch.testing.assert_close(model.step(tokens[:, t], states), want[:, t], rtol=1e-4, atol=1e-4)
    for state, wanted in zip(states, end, strict=True):
        torch.testing.assert_close(state, wanted, rtol=1e-4, atol=1e-4)


def test_main(example, tmp_path, monkeypatch, capsys):
    plot = tmp_path / "loss.png"
    monkeypatch.setattr(
        sys, "argv", ["lightning_lm.py", "--steps", "3", "--tokens", "5", "--plot", str(plot)]
    )
    example.main()
    assert plot.exists() and "5 tokens from 64 KiB" in capsys.readouterr().out
