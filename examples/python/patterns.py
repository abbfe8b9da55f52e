"""Draws the patterns of block-sparse, vertical-slash and neighborhood attention: `python examples/python/patterns.py`.

Block masks come from kvk.patterns; what a query of a neighborhood sees comes from kvk.reference, the masks that the
kernels are tested against.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import kvk
import matplotlib.pyplot as plt
import torch
from kvk.reference.block_sparse import vertical_slash_mask
from kvk.reference.neighborhood import neighborhood_mask
from torch import Tensor

HIDDEN, SEEN, QUERY = 0, 1, 2
COLOURS = ["#f4f4f2", "#3b6ea5", "#d1495b"]


def block_masks() -> dict[str, Tensor]:
    """bool [query blocks, key blocks] by title."""
    return {
        "streaming_mask\nsink=1, local=3": kvk.patterns.streaming_mask(16, 16, sink=1, local=3),
        "strided_mask, one head\nlocal=2, stride=4": kvk.patterns.strided_mask(16, 16, 1, local=2, stride=4)[
            0
        ],
        "power_mask\nsink=1, local=1": kvk.patterns.power_mask(16, 16),
        "block_causal_mask\ngroup=4": kvk.patterns.block_causal_mask(16, 16, group=4),
        "block_diffusion_mask\nblocks=8": kvk.patterns.block_diffusion_mask(8),
        "vertical_slash_attention, 512 tokens\nkeys 0-7, 200-203; distances 0, 256": vertical_slash(),
    }


def vertical_slash() -> Tensor:
    """bool [128, 128]: one head of 512 tokens, a place for 4 of them. A distance is a band for each 64 queries."""
    vertical = torch.tensor([*range(8), *range(200, 204)])
    return vertical_slash_mask(512, 512, vertical, torch.tensor([0, 256]))[3::4, ::4]


def neighborhoods() -> dict[str, Tensor]:
    """What one query of a 16 x 16 image sees, [16, 16] of HIDDEN, SEEN and QUERY, by title."""

    def seen(at: tuple[int, int], *, stride: int = 1, dilation: int = 1, is_causal: bool = False) -> Tensor:
        mask = neighborhood_mask((16, 16), 7 if dilation == 1 else 5, stride, dilation, is_causal)
        picture = mask[at[0] * 16 + at[1]].view(16, 16).to(torch.int64)
        picture[at] = QUERY
        return picture

    return {
        "kernel_size=7\ninside": seen((8, 7)),
        "kernel_size=7\nat a corner: shifted": seen((1, 14)),
        "kernel_size=7, stride=4\nits leader's window": seen((8, 7), stride=4),
        "kernel_size=5, dilation=3": seen((8, 7), dilation=3),
        "kernel_size=7, is_causal": seen((8, 7), is_causal=True),
        "kernel_size=7, is_causal\nat a corner: cut": seen((2, 14), is_causal=True),
    }


def draw(path: Path) -> None:
    """Both rows of pictures as a PNG."""
    rows = (block_masks(), neighborhoods())
    figure, axes = plt.subplots(2, 6, figsize=(13, 5.8), layout="constrained")
    colours = plt.matplotlib.colors.ListedColormap(COLOURS)
    for axis, (title, picture) in zip(axes.flat, (item for row in rows for item in row.items()), strict=True):
        edges = "white" if len(picture) <= 16 else "none"
        axis.pcolormesh(
            picture.flip(0), cmap=colours, vmin=HIDDEN, vmax=QUERY, edgecolors=edges, linewidth=0.4
        )
        axis.set_title(title, fontsize=8)
        axis.set_aspect("equal")
        axis.axis("off")
    axes[0, 0].set_axis_on()
    axes[0, 0].set(xticks=[], yticks=[], xlabel="key blocks", ylabel="query blocks")
    axes[1, 0].set_axis_on()
    axes[1, 0].set(xticks=[], yticks=[], xlabel="keys of one query (red)")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_suffix(".png"), help="the picture")
    draw(parser.parse_args().plot)


if __name__ == "__main__":
    main()
