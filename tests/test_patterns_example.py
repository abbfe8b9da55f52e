"""examples/python/patterns.py: what its pictures show, and that it draws."""

from __future__ import annotations

import sys
from pathlib import Path

from building import ROOT

sys.path.insert(0, str(ROOT / "examples" / "python"))
import patterns


def test_block_masks() -> None:
    """Causal ones see nothing ahead; every query block sees something."""
    masks = patterns.block_masks()
    assert all(bool(mask.any(-1).all()) for mask in masks.values())
    for title in ("streaming", "strided", "power", "vertical_slash"):
        (mask,) = (mask for name, mask in masks.items() if name.startswith(title))
        assert not mask.triu(1).any() and mask.diagonal().all()


def test_neighborhoods() -> None:
    pictures = list(patterns.neighborhoods().values())
    assert [int((picture != patterns.HIDDEN).sum()) for picture in pictures] == [49, 49, 49, 25, 49, 21]
    assert all(int((picture == patterns.QUERY).sum()) == 1 for picture in pictures)


def test_draws(tmp_path: Path) -> None:
    patterns.draw(tmp_path / "patterns.png")
    assert (tmp_path / "patterns.png").read_bytes()[:4] == b"\x89PNG"
