"""examples/python/neighborhood_vision.py: its scenes, that it learns, that the picture shows what is attended to."""

from __future__ import annotations

import sys

import pytest
import torch
from building import ROOT

pytest.importorskip("sklearn")
sys.path.insert(0, str(ROOT / "examples" / "python"))
import neighborhood_vision as vision


@pytest.fixture(scope="module")
def scenes() -> tuple[vision.Scenes, vision.Scenes]:
    return vision.digits()


def test_scenes(scenes: tuple[vision.Scenes, vision.Scenes]) -> None:
    training, held_out = scenes
    assert len(training.images) == 1500 and len(held_out.images) == 297
    drawn, classes = training.draw(20)
    assert drawn.shape == classes.shape == (20, 32, 32)
    ink = classes != vision.BACKGROUND
    assert 0.05 < ink.float().mean() < 0.3 and drawn[ink].mean() > 0.5 > 0.1 > drawn[~ink].abs().mean()
    assert set(classes.unique().tolist()) == set(range(11))


def test_weights_are_those_of_the_op(scenes: tuple[vision.Scenes, vision.Scenes]) -> None:
    """The picture's weights times v are the op's result, near an edge and with dilation."""
    torch.manual_seed(0)
    attention = vision.NeighborhoodAttention(64, dilation=2)
    x = torch.randn(1, 32, 32, 64)
    with torch.no_grad():
        weights = attention.weights(x, 2, 30)
        v = attention.project(x)[2][0]
        out = attention.out(torch.einsum("hyx,yxhd->hd", weights, v).flatten())
        torch.testing.assert_close(out, attention(x)[0, 2, 30], atol=1e-5, rtol=1e-4)
    assert (weights > 0).sum((1, 2)).tolist() == [49, 49]


def test_it_learns(scenes: tuple[vision.Scenes, vision.Scenes], tmp_path) -> None:
    torch.manual_seed(0)
    training, held_out = scenes
    model = vision.Model(dim=32)
    losses = vision.train(model, training, steps=12, batch=3)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    vision.draw(tmp_path / "vision.png", model, losses, *held_out.draw(2))
    assert (tmp_path / "vision.png").stat().st_size > 10_000
