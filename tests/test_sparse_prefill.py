"""Patterns computed from q and k, prompts through an attention of one's own, and the recipes made of both."""

from __future__ import annotations

from typing import Any

import kvk
import pytest
import torch
from kvk import patterns, reference
from kvk.patterns import pooled_block_mask, vertical_slash_index
from torch import Tensor

pytest.importorskip("transformers")

from hf_models import VOCAB, example_padding, generate, logits, tiny
from kvk.integrations.transformers import KvkCache
from kvk.integrations.transformers_prefill import register_prefill
from kvk.recipes.duo_attention import choose_streaming_heads, register_duo_attention
from kvk.recipes.minference import (
    AShape,
    TopBlocks,
    VerticalSlash,
    choose_patterns,
    register_minference,
    sparse_prefill,
)

ALL = VerticalSlash(10**6, 1)  # every key


def prompt(tokens: int, keys: int | None = None, heads: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    k, v = (torch.randn(keys or tokens, 2, 32, generator=generator) for _ in range(2))
    return torch.randn(tokens, heads, 32, generator=generator), k, v


class TestVerticalSlashIndex:
    @pytest.mark.parametrize(("tokens", "keys", "last"), [(50, 70, 16), (9, 9, 64), (1, 40, 64)])
    def test_sums_of_columns_and_diagonals(self, tokens: int, keys: int, last: int) -> None:
        """Against sums written out; the first keys and the near distances come before all others."""
        q, k, _ = prompt(tokens, keys)
        got = vertical_slash_index(q, k, 12, 8, last=last, first_keys=3, near=2, softmax_scale=0.3)
        for head in range(6):
            columns, diagonals = torch.zeros(keys), torch.zeros(keys)
            for i in range(max(0, tokens - last), tokens):
                position = keys - tokens + i
                weights = (k[: position + 1, head // 3] @ q[i, head] * 0.3).softmax(0)
                for j, weight in enumerate(weights):
                    columns[j] += weight
                    diagonals[position - j] += weight
            columns[:3] = diagonals[:2] = torch.inf
            for sums, count, chosen in ((columns, 12, got[0]), (diagonals, 8, got[1])):
                assert chosen.dtype == torch.int32
                assert chosen[0, head].tolist() == sorted(sums.topk(min(count, keys)).indices.tolist())

    def test_it_finds_what_is_there(self) -> None:
        """Key 40 of strong products with every query, and products with the key 17 before it."""
        tokens = 200
        q, k = torch.zeros(tokens, 1, 300), torch.zeros(tokens, 1, 300)
        q[:, 0, 0] = k[40, 0, 0] = 20.0
        for i in range(tokens):
            k[i, 0, 20 + i] = q[i, 0, 20 + max(0, i - 117)] = 20.0
        vertical, slash = vertical_slash_index(q, k, 31, 101)
        assert vertical[0, 0].tolist() == [*range(30), 40] and slash[0, 0].tolist() == [*range(100), 117]

    @pytest.mark.parametrize("arguments", [(0, 1), (1, 0)])
    def test_refused(self, arguments: tuple[int, int]) -> None:
        q, k, _ = prompt(4)
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            vertical_slash_index(q, k, *arguments)
        with pytest.raises(ValueError, match="q has 4 tokens, more than the 3 keys"):
            vertical_slash_index(q, k[:3], 1, 1)


class TestPooledBlockMask:
    @pytest.mark.parametrize(
        ("tokens", "keys", "block_q", "block_k"), [(100, 100, 16, 16), (37, 90, 16, 32), (64, 70, 32, 16)]
    )
    def test_means(self, tokens: int, keys: int, block_q: int, block_k: int) -> None:
        q, k, _ = prompt(tokens, keys)
        got = pooled_block_mask(q, k, block_q, block_k, 2)
        for head in range(6):
            for m, rows in enumerate(q[:, head].split(block_q)):
                last = keys - tokens + m * block_q + len(rows) - 1
                blocks = k[:, head // 3].split(block_k)[: last // block_k + 1]
                scores = torch.stack([rows.mean(0) @ block.mean(0) for block in blocks])
                best = scores.topk(min(2, len(blocks))).indices
                assert got[head, m].nonzero().flatten().tolist() == sorted(best.tolist())

    def test_refused(self) -> None:
        q, k, _ = prompt(4)
        with pytest.raises(ValueError, match="top must be at least 1, got 0"):
            pooled_block_mask(q, k, 16, 16, 0)
        with pytest.raises(ValueError, match="more than the 3 keys"):
            pooled_block_mask(q, k[:3], 16, 16, 1)


class TestSparsePrefill:
    @pytest.mark.parametrize("tokens", [1, 63, 64, 200])
    def test_patterns_that_see_everything_are_dense(self, tokens: int) -> None:
        q, k, v = prompt(tokens)
        heads = [ALL, TopBlocks(4), AShape(0, 4), None, VerticalSlash(1, 200), AShape(4, 0)]
        want = sparse_prefill(q, k, v, [None] * 6, 0.2)
        torch.testing.assert_close(sparse_prefill(q, k, v, heads, 0.2), want, atol=2e-6, rtol=1e-5)
        mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        csr = kvk.block_mask_to_csr(mask)
        truth, _ = reference.block_sparse_attention(q, k, v, *csr, 64, 64, causal=True, softmax_scale=0.2)
        torch.testing.assert_close(want.double(), truth, atol=2e-6, rtol=1e-5)

    def test_each_head_has_its_own(self) -> None:
        """A head's result is that of a call in which all heads have its pattern."""
        q, k, v = prompt(300)
        heads = [
            VerticalSlash(31, 101),
            TopBlocks(2),
            AShape(1, 2),
            None,
            VerticalSlash(60, 120),
            TopBlocks(1),
        ]
        got = sparse_prefill(q, k, v, heads, None)
        for head, pattern in enumerate(heads):
            want = sparse_prefill(q, k, v, [pattern] * 6, None)
            torch.testing.assert_close(got[:, head], want[:, head], atol=2e-6, rtol=1e-5)
        streaming = patterns.streaming_mask(5, 5, 1, 2)[None, None]
        want, _ = reference.block_sparse_attention(
            q, k, v, *kvk.block_mask_to_csr(streaming), 64, 64, causal=True
        )
        torch.testing.assert_close(got[:, 2].double(), want[:, 2], atol=2e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, VOCAB, (2, 150), generator=torch.Generator().manual_seed(2))


class TestInAModel:
    def test_patterns_that_see_everything(self, llama: Any, ids: Tensor) -> None:
        """With a cache and without; padding is left out; what is generated is sdpa's."""
        register_minference("test_all", [[ALL, None, TopBlocks(3), AShape(1, 2), ALL, None]] * 2)
        want = logits(llama, "sdpa", ids)
        torch.testing.assert_close(logits(llama, "test_all", ids), want, atol=2e-4, rtol=1e-4)
        mask = example_padding()
        batch = ids[:1, :13].expand(3, -1) * mask
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6}
        got = generate(llama, "test_all", batch, past_key_values=KvkCache(page_size=4), **options)
        assert torch.equal(got.sequences, generate(llama, "sdpa", batch, **options).sequences)

    def test_only_whole_prompts_are_taken(self, llama: Any, ids: Tensor) -> None:
        calls: list[tuple[int, int]] = []

        def prefill(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
            calls.append((layer, q.shape[0]))
            return sparse_prefill(q, k, v, [None] * q.shape[1], scale)

        register_prefill("test_counted", prefill)
        want = logits(llama, "sdpa", ids)
        cache = KvkCache(page_size=16)
        parts = [
            logits(llama, "test_counted", part, past_key_values=cache) for part in ids.split([100, 49, 1], 1)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), want, atol=2e-4, rtol=1e-4)
        assert calls == [(0, 100), (0, 100), (1, 100), (1, 100)]  # two rows a layer, the first part alone
        windowed = tiny("Mistral", sliding_window=20)
        got = logits(windowed, "test_counted", ids)
        torch.testing.assert_close(got, logits(windowed, "sdpa", ids), atol=2e-4, rtol=1e-4)
        assert len(calls) == 4

    def test_what_no_attention_of_kvk_can_do_is_refused(self, llama: Any, ids: Tensor) -> None:
        register_minference("test_refusing", [[None] * 6] * 2)
        llama.set_attn_implementation("test_refusing")
        with pytest.raises(ValueError, match="has no gradient"):
            llama(ids)

    def test_choose_patterns(self, llama: Any, ids: Tensor) -> None:
        """The candidate without an error is every head's."""
        llama.set_attn_implementation("sdpa")
        chosen = choose_patterns(llama, ids[:1], [AShape(1, 1), ALL, TopBlocks(1)])
        assert chosen == [[ALL] * 6] * 2 and llama.config._attn_implementation == "sdpa"

    def test_streaming_heads(self, llama: Any, ids: Tensor) -> None:
        pattern = AShape(1, 1)
        none, half, every = (
            choose_streaming_heads(llama, ids[:1], share, pattern) for share in (0.0, 0.5, 1.0)
        )
        assert none == [[False] * 2] * 2 and every == [[True] * 2] * 2 and sum(map(sum, half)) == 2
        want = logits(llama, "sdpa", ids)
        errors = []
        for i, streaming in enumerate((none, half, every)):
            register_duo_attention(f"test_duo{i}", streaming, pattern)
            errors.append((logits(llama, f"test_duo{i}", ids) - want).norm().item())
        assert errors[0] < 1e-3 < errors[1] < errors[2]
        with pytest.raises(ValueError, match=r"share must be from 0 to 1, got 1\.5"):
            choose_streaming_heads(llama, ids[:1], 1.5)
