"""A small NAT-style model with kvk.neighborhood_attention: every pixel of a scene says which digit it belongs to.

    pip install 'kvk[examples]'
    python examples/python/neighborhood_vision.py [--steps 400] [--output vision.png]

Scenes of 32 x 32 pixels hold handwritten digits of scikit-learn's data set, 8 x 8 each, anywhere, with noise. A pixel
alone says nothing, so the model has to look around: three blocks of neighborhood attention (Hassani et al. 2023), 7 x 7
keys a query, the second with dilation 2. The picture shows the loss, a held-out scene, and what a pixel attends to.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import kvk
import torch
from kvk import reference
from rich.progress import Progress
from torch import Tensor, nn

SIZE, DIGITS, BACKGROUND = 32, 5, 10
INK = 5.0  # of 16: what is darker belongs to the digit


class Scenes:
    """Random scenes of some of the images."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self.images, self.labels = images, labels
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """(scenes [count, SIZE, SIZE] from 0 to about 1, the digit of every pixel int64 [count, SIZE, SIZE])."""
        scenes = torch.zeros(count, SIZE, SIZE)
        classes = torch.full((count, SIZE, SIZE), BACKGROUND)
        which = torch.randint(len(self.images), (count, DIGITS), generator=self.generator)
        places = torch.randint(SIZE - 7, (count, DIGITS, 2), generator=self.generator)
        for scene, labels, images, corners in zip(scenes, classes, which, places, strict=True):
            for image, (y, x) in zip(images, corners.tolist(), strict=True):
                ink = self.images[image] >= INK
                scene[y : y + 8, x : x + 8][ink] = self.images[image][ink] / 16
                labels[y : y + 8, x : x + 8][ink] = self.labels[image]
        return scenes + 0.1 * torch.randn(scenes.shape, generator=self.generator), classes


def digits() -> tuple[Scenes, Scenes]:
    """Scenes to train on, and held-out ones of other images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.from_numpy(data.images).float(), torch.from_numpy(data.target).long()
    return Scenes(images[:1500], labels[:1500], seed=0), Scenes(images[1500:], labels[1500:], seed=1)


class NeighborhoodAttention(nn.Module):
    """Multi-head attention of every pixel to the 7 x 7 pixels around it."""

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.heads, self.dilation = dim // 32, dilation
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        out, _ = kvk.neighborhood_attention(q, k, v, 7, dilation=self.dilation)
        return self.out(out.flatten(-2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, Y, X, heads, 32]: views of one tensor."""
        return self.qkv(x).unflatten(-1, (3, self.heads, 32)).unbind(-3)

    def weights(self, x: Tensor, y: int, column: int) -> Tensor:
        """[heads, Y, X]: what the pixel of the first scene attends to, written out."""
        q, k, _ = self.project(x[:1])
        scores = torch.einsum("hd,yxhd->hyx", q[0, y, column], k[0]) / math.sqrt(32)
        seen = reference.neighborhood_mask((SIZE, SIZE), 7, dilation=self.dilation)[y * SIZE + column]
        return scores.flatten(1).masked_fill(~seen, -math.inf).softmax(-1).view_as(scores)


class Block(nn.Module):
    """Attention and a feed-forward net, each behind a norm and beside a residual."""

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.attention = NeighborhoodAttention(dim, dilation)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """Scenes to logits of every pixel, [B, SIZE, SIZE, 11]."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, dim, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(dim, dilation) for dilation in (1, 2, 1)))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 11))

    def forward(self, scenes: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(scenes[:, None]).permute(0, 2, 3, 1)))


def loss_of(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy; a pixel of the background, of which there are most, counts a tenth."""
    weight = torch.ones(11)
    weight[BACKGROUND] = 0.1
    return nn.functional.cross_entropy(logits.flatten(0, 2), classes.flatten(), weight)


@torch.no_grad()
def accuracy(model: Model, scenes: Tensor, classes: Tensor) -> float:
    """Share of the digits' pixels that are told right."""
    ink = classes != BACKGROUND
    return (model(scenes).argmax(-1)[ink] == classes[ink]).float().mean().item()


def train(model: Model, scenes: Scenes, steps: int, batch: int = 16) -> list[float]:
    """The loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(2, steps), pct_start=0.2)
    losses: list[float] = []
    with Progress() as progress:
        task = progress.add_task("training", total=steps)
        for _ in range(steps):
            batch_scenes, classes = scenes.draw(batch)
            loss = loss_of(model(batch_scenes), classes)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"loss {losses[-1]:.3f}")
    return losses


@torch.no_grad()
def draw(path: Path, model: Model, losses: list[float], scenes: Tensor, classes: Tensor) -> None:
    """Loss, a scene, its true and told digits, and what one of its pixels attends to in the last block, a head each."""
    from matplotlib.figure import Figure

    last = model.blocks[-1]
    inner = last.norms[0](model.blocks[:-1](model.embed(scenes[:1, None]).permute(0, 2, 3, 1)))
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[8:-8, 8:-8] = classes[0, 8:-8, 8:-8] != BACKGROUND
    y, x = inside.nonzero()[int(inside.sum()) // 2].tolist() if inside.any() else (SIZE // 2, SIZE // 2)
    attention = last.attention.weights(inner, y, x)

    figure = Figure(figsize=(15, 3.2), layout="constrained")
    axes = figure.subplots(1, 4 + len(attention))
    axes[0].plot(losses)
    axes[0].set(title="loss", xlabel="step")
    told = model(scenes[:1]).argmax(-1)[0]
    axes[1].imshow(scenes[0].numpy(), cmap="gray_r")
    axes[1].set_title("held-out scene")
    for axis, title, image in zip(
        axes[2:4], ("its digits", "what the model tells"), (classes[0], told), strict=True
    ):
        axis.imshow(image.numpy(), cmap="tab20", vmin=0, vmax=19)
        axis.set_title(title)
    for head, (axis, weights) in enumerate(zip(axes[4:], attention, strict=True)):
        axis.imshow(scenes[0].numpy(), cmap="gray_r", alpha=0.4)
        axis.imshow(weights.numpy(), cmap="Reds", alpha=0.8 * (weights > 0).numpy())
        axis.plot(x, y, "b+")
        axis.set_title(f"attention of +, head {head}")
    for axis in axes[1:]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("vision.png"))
    options = parser.parse_args()

    torch.manual_seed(0)
    training, held_out = digits()
    model = Model()
    scenes, classes = held_out.draw(64)
    before = accuracy(model, scenes, classes)
    losses = train(model, training, options.steps)
    after = accuracy(model, scenes, classes)
    draw(options.output, model, losses, scenes, classes)
    print(f"loss {losses[0]:.2f} -> {sum(losses[-20:]) / len(losses[-20:]):.2f} in {options.steps} steps")
    print(f"pixels of digits told right, held-out: {before:.0%} -> {after:.0%}; picture: {options.output}")


if __name__ == "__main__":
    main()
