"""A small language model on lightning attention: trained on a CPU, then generating from a state of constant size.

    python examples/python/lightning_lm.py --steps 600

The model is of TransNormer's kind: q, k and v of SiLU, linear attention with a decay per head, a norm and a gate behind
it, and gated linear units. It reads bytes of Python's own documentation, which comes with Python. Training and prompts
go through kvk.lightning_attention in chunks; generation through kvk.lightning_decode, a token at a time, on one matrix
a head. Both are the same function: the tokens chosen one by one are those that the whole text gives at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import kvk
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [..., heads, D] to out


def norm(x: Tensor) -> Tensor:
    """TransNormer's: RMS, nothing to learn."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Layer(nn.Module):
    """Attention and a gated linear unit, each on a norm of the residual stream."""

    decay: Tensor

    def __init__(self, dim: int, heads: int, decay: Tensor) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.gate, self.out = (nn.Linear(dim, n * dim, bias=False) for n in (3, 1, 1))
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(2 * dim, dim, bias=False)
        self.register_buffer("decay", decay)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        y = norm(x)
        q, k, v = silu(self.qkv(y)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        x = x + self.out(norm(attend(q, k, v).flatten(-2)) * torch.sigmoid(self.gate(y)))
        a, b = self.up(norm(x)).chunk(2, -1)
        return x + self.down(a * b)


class LanguageModel(nn.Module):
    """Over bytes. There are no positions: the decay tells far from near."""

    def __init__(self, dim: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.scale = (dim // heads) ** -0.5
        self.embed = nn.Embedding(256, dim)
        self.layers = nn.ModuleList(
            Layer(dim, heads, kvk.lightning_slopes(heads, i, layers)) for i in range(layers)
        )
        self.head = nn.Linear(dim, 256, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """tokens [B, T] at once: logits [B, T, 256], and every layer's state after them."""
        x, states = self.embed(tokens), []
        for layer in self.layers:

            def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor = layer.decay) -> Tensor:
                out, state = kvk.lightning_attention(q, k, v, decay, scale=self.scale)
                states.append(state)
                return out

            x = layer(x, attend)
        return self.head(norm(x)), states

    def step(self, tokens: Tensor, states: list[Tensor]) -> Tensor:
        """One token more for each row of the batch, tokens [B]: logits [B, 256]. The states change in place."""
        slots = torch.arange(len(tokens), dtype=torch.int32)
        x = self.embed(tokens)
        for layer, state in zip(self.layers, states, strict=True):

            def attend(
                q: Tensor, k: Tensor, v: Tensor, s: Tensor = state, decay: Tensor = layer.decay
            ) -> Tensor:
                return kvk.lightning_decode(q, k, v, s, slots, decay, scale=self.scale)

            x = layer(x, attend)
        return self.head(norm(x))


def read_text() -> Tensor:
    """Python's documentation of itself, as bytes."""
    return torch.frombuffer(bytearray("\n\n".join(topics.values()).encode()), dtype=torch.uint8).long()


def train(model: LanguageModel, text: Tensor, steps: int, batch: int = 16, length: int = 256) -> list[float]:
    """The loss of every step, in bits a byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(2, steps), pct_start=0.1)
    losses: list[float] = []
    columns = TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[loss]}")
    with Progress(*columns, TimeElapsedColumn()) as progress:
        bar = progress.add_task("", total=steps, loss="")
        for _ in range(steps):
            starts = torch.randint(len(text) - length, (batch, 1))
            rows = text[starts + torch.arange(length + 1)]
            logits, _ = model(rows[:, :-1])
            loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item() / 0.6931472)
            progress.update(bar, advance=1, loss=f"{losses[-1]:.2f} bits/byte")
    return losses


@torch.no_grad()
def generate(model: LanguageModel, prompt: Tensor, count: int) -> Tensor:
    """The likeliest `count` tokens after a prompt [T], one by one."""
    logits, states = model(prompt[None])
    token, tokens = logits[:, -1].argmax(-1), []
    for _ in range(count):
        tokens.append(token)
        token = model.step(token, states).argmax(-1)
    return torch.cat(tokens)


@torch.no_grad()
def at_once(model: LanguageModel, prompt: Tensor, tokens: Tensor) -> Tensor:
    """What the whole text, prompt and tokens, gives as the likeliest tokens at the same places."""
    logits, _ = model(torch.cat([prompt, tokens])[None])
    return logits[0, len(prompt) - 1 : -1].argmax(-1)


def draw(losses: list[float], path: Path) -> None:
    """The loss and its running mean."""
    from matplotlib.figure import Figure

    figure = Figure((6, 3.5), layout="constrained")
    axes = figure.subplots()
    mean = torch.tensor(losses).unfold(0, min(25, len(losses)), 1).mean(-1)
    axes.plot(losses, color="0.8", label="each step")
    axes.plot(range(len(losses) - len(mean), len(losses)), mean, color="C0", label="mean of 25")
    axes.set(
        xlabel="step", ylabel="bits per byte", ylim=(0, None), title="lightning attention, trained on a CPU"
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def decoded(tokens: Tensor) -> str:
    return bytes(tokens.tolist()).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="trains a small model on lightning attention, and lets it write"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=400, help="to generate")
    parser.add_argument("--plot", type=Path, default=Path("lightning_lm.png"))
    options = parser.parse_args()
    torch.manual_seed(0)
    model, text = LanguageModel(), read_text()
    losses = train(model, text, options.steps)
    draw(losses, options.plot)
    prompt = torch.tensor(list(b"The statement "))
    tokens = generate(model, prompt, options.tokens)
    assert torch.equal(tokens, at_once(model, prompt, tokens)), "decode and prefill disagree"
    size = sum(state.nbytes for state in model(prompt[None])[1])
    print(decoded(prompt) + decoded(tokens))
    end = sum(losses[-25:]) / len(losses[-25:])
    print(f"\n{losses[0]:.2f} bits a byte at first, {end:.2f} at the end: {options.plot}")
    print(
        f"{len(tokens)} tokens from {size / 1024:.0f} KiB of state, each as the whole text at once gives it"
    )


if __name__ == "__main__":
    main()
