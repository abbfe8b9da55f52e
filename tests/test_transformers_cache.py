"""The operations of KvkCache: share, fork, reorder, crop, reset, and what it refuses."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import assert_same, example_ids, example_padding, generate, logits, prefilled, tiny
from kvk.block_table import OutOfPagesError
from kvk.integrations.transformers import KvkCache, kvk_attention
from kvk.integrations.transformers_masks import KvkMask
from transformers import DynamicCache


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny()


@pytest.fixture
def ids() -> torch.Tensor:
    return example_ids()


@pytest.fixture
def left_padding() -> torch.Tensor:
    return example_padding()


def test_prefix_sharing(llama: Any, ids: torch.Tensor) -> None:
    """Two batches from one prefilled prefix: no page of the prefix is copied, and the prefix stays usable."""
    prefix = prefilled(llama, ids[:1, :10])
    used = prefix.nbytes_used
    page = used // 3
    for _ in range(2):
        batch = prefix.fork(3)
        assert batch.nbytes_used == used
        whole = torch.cat([ids[:1, :10].expand(3, -1), ids[:, :3]], 1)
        got = generate(llama, "kvk", whole, past_key_values=batch, max_new_tokens=5)
        assert_same(got, generate(llama, "sdpa", whole, max_new_tokens=5))
        assert batch.lengths == [17] * 3
        # 2 full pages of the prefix are shared, its third page is copied once per row, and each row adds 2 pages.
        assert batch.nbytes_used == used + 3 * 3 * page
        del batch, got
        gc.collect()
        assert prefix.nbytes_used == used  # a cache that nobody holds gives its pages back
    assert prefix.lengths == [10]


def test_batch_repeat_interleave_and_select(llama: Any, ids: torch.Tensor) -> None:
    cache, dense = prefilled(llama, ids), DynamicCache()
    logits(llama, "sdpa", ids, past_key_values=dense)
    for each in (cache, dense):
        each.batch_repeat_interleave(2)
        each.batch_select_indices(torch.tensor([5, 0, 2, 2]))
    new = ids.repeat(2, 1)[:4, :3]
    got = logits(llama, "kvk", new, past_key_values=cache)
    torch.testing.assert_close(got, logits(llama, "sdpa", new, past_key_values=dense), atol=2e-4, rtol=1e-4)
    cache.batch_select_indices(torch.tensor([True, False, False, True]))
    assert cache.batch_size == 2


def test_reorder_moves_and_forks(llama: Any, ids: torch.Tensor) -> None:
    cache, dense = prefilled(llama, ids), DynamicCache()
    logits(llama, "sdpa", ids, past_key_values=dense)
    used = cache.nbytes_used
    for order in ([2, 0, 1], [1, 1, 0], [0, 1, 1]):
        for each in (cache, dense):
            each.reorder_cache(torch.tensor(order))
        assert cache.nbytes_used <= used
        got = logits(llama, "kvk", ids[:, :1], past_key_values=cache)
        want = logits(llama, "sdpa", ids[:, :1], past_key_values=dense)
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
        used = cache.nbytes_used + 3 * cache.nbytes // cache.pool.layers[0].num_pages


def test_crop(llama: Any, ids: torch.Tensor, left_padding: torch.Tensor) -> None:
    left_padding[1, 9] = 0  # padding in what is cropped and before it
    left_padding[2, 12] = 0
    cache, mask = KvkCache(page_size=4), left_padding
    logits(llama, "kvk", ids, past_key_values=cache, attention_mask=mask)
    cache.crop(0)
    assert cache.lengths == mask.sum(1).tolist()
    cache.crop(-6)
    assert cache.get_seq_length() == 7 and cache.lengths == mask[:, :7].sum(1).tolist()
    mask = torch.cat([mask[:, :7], torch.ones(3, 4, dtype=torch.long)], 1)
    got = logits(llama, "kvk", ids[:, 2:6], past_key_values=cache, attention_mask=mask)
    whole = torch.cat([ids[:, :7], ids[:, 2:6]], 1)
    want = logits(llama, "sdpa", whole, attention_mask=mask)[:, 7:]
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    assert cache.lengths == mask.sum(1).tolist()
    cache.crop(-100)
    assert cache.get_seq_length() == 0 and cache.nbytes_used == 0
    with pytest.raises(ValueError, match="negative number of tokens to remove, got 3"):
        cache.crop(3)


def test_reset_frees_and_serves_another_batch(llama: Any, ids: torch.Tensor) -> None:
    cache = prefilled(llama, ids)
    held = cache.nbytes
    cache.reset()
    assert (
        cache.get_seq_length() == 0
        and cache.nbytes_used == 0
        and cache.nbytes == held
        and cache.batch_size == -1
    )
    assert_same(generate(llama, "kvk", ids[:2], past_key_values=cache), generate(llama, "sdpa", ids[:2]))


def test_deepcopy_is_independent(llama: Any, ids: torch.Tensor) -> None:
    """What transformers' documentation does with a prompt cache."""
    cache = prefilled(llama, ids)
    twin = copy.deepcopy(cache)
    assert cache.nbytes_used == prefilled(llama, ids).nbytes_used
    got = logits(llama, "kvk", ids[:, :4], past_key_values=twin)
    torch.testing.assert_close(got, logits(llama, "kvk", ids[:, :4], past_key_values=cache), atol=0, rtol=0)


def test_out_of_pages_leaves_the_cache_usable(llama: Any, ids: torch.Tensor) -> None:
    cache = KvkCache(page_size=4, max_pages=11)
    with pytest.raises(
        OutOfPagesError, match="12 more pages of 4 tokens are wanted, 11 are free of max_pages=11"
    ):
        logits(llama, "kvk", ids, past_key_values=cache)
    assert cache.batch_size == -1 and cache.nbytes == 0 and len(cache.pool.blocks) == 0
    logits(llama, "kvk", ids[:2], past_key_values=cache)
    with pytest.raises(OutOfPagesError):
        logits(llama, "kvk", ids[:2], past_key_values=cache)
    got = logits(llama, "kvk", ids[:2, :3], past_key_values=cache)  # 3 tokens still fit in the last pages
    want = logits(llama, "sdpa", torch.cat([ids[:2], ids[:2, :3]], 1))[:, 13:]
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    assert cache.nbytes == 8 * cache.pool.page_bytes


def test_bf16_pages(llama: Any, ids: torch.Tensor) -> None:
    cache = KvkCache(dtype=torch.bfloat16)
    got = logits(llama, "kvk", ids, past_key_values=cache)
    want = logits(llama, "sdpa", ids)
    error = (got - want).abs().max()
    assert 1e-4 < error < 0.05 * want.abs().max()  # really bf16, and no worse than it
    assert cache.nbytes_used == 3 * 16 * 2 * 2 * 2 * 32 * 2


def test_a_handle_stores_once(llama: Any) -> None:
    """Layers that share keys and values hand the same handle to several attentions."""
    torch.manual_seed(0)
    cache, module = KvkCache(page_size=4), llama.model.layers[0].self_attn
    query, key, value = torch.randn(2, 6, 5, 32), torch.randn(2, 2, 5, 32), torch.randn(2, 2, 5, 32)
    handle, _ = cache.update(key, value, 0)
    tree = torch.ones(5, 5).tril().bool().expand(2, 1, 5, 5)
    outputs = [kvk_attention(module, query, handle, handle, mask)[0] for mask in (None, KvkMask(), tree)]
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], outputs[0])
    assert cache.lengths == [5, 5]


def test_masks_that_disagree_with_the_cache(
    llama: Any, ids: torch.Tensor, left_padding: torch.Tensor
) -> None:
    cache = KvkCache()
    logits(llama, "kvk", ids, past_key_values=cache, attention_mask=left_padding)
    one = ids[:, :1]
    with pytest.raises(ValueError, match="must cover all 14 tokens, stored and new, got 1 columns"):
        logits(llama, "kvk", one, past_key_values=cache, attention_mask=torch.ones(3, 1))
    changed = torch.cat([left_padding.flip(0), torch.ones(3, 1)], 1)
    with pytest.raises(ValueError, match=r"\[11, 13, 8\] earlier tokens are real, \[8, 13, 11\] are stored"):
        logits(llama, "kvk", one, past_key_values=cache, attention_mask=changed)
    with pytest.raises(ValueError, match=r"\[13, 13, 13\] earlier tokens are real"):
        logits(llama, "kvk", one, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 3 rows but the batch has 2"):
        logits(llama, "kvk", one[:2], past_key_values=cache)
    mask = torch.cat([left_padding, torch.ones(3, 1)], 1)
    logits(
        llama, "kvk", one, past_key_values=cache, attention_mask=mask
    )  # none of the errors changed anything
    assert cache.lengths == [9, 14, 12]


def test_a_forward_pass_cut_short_is_noticed(llama: Any, ids: torch.Tensor) -> None:
    cache = prefilled(llama, ids)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = llama.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        logits(llama, "kvk", ids[:, :2], past_key_values=cache)
    hook.remove()
    with pytest.raises(RuntimeError, match=r"cut short \(call reset\(\)\)"):
        logits(llama, "kvk", ids[:, :2], past_key_values=cache)
    cache.reset()
    want = logits(llama, "sdpa", ids)
    torch.testing.assert_close(logits(llama, "kvk", ids, past_key_values=cache), want, atol=2e-4, rtol=1e-4)
