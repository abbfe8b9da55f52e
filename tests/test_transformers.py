"""transformers' models with kvk's attention and paged cache against the same models with torch's attention."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import assert_same, example_ids, example_padding, generate, logits, tiny
from kvk.integrations.transformers import KvkCache, kvk_attention
from kvk.integrations.transformers_masks import KvkMask, kvk_mask, pack_bits
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


# -- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 4, 16, 100])
def test_generate(llama: Any, ids: torch.Tensor, page_size: int) -> None:
    cache = KvkCache(page_size=page_size)
    assert_same(generate(llama, "kvk", ids, past_key_values=cache), generate(llama, "sdpa", ids))
    # The last generated token is never fed back. No copy beside the pages: exactly the tokens' pages are in use.
    assert cache.lengths == [ids.shape[1] + 23] * 3
    pages = 3 * -(-(ids.shape[1] + 23) // page_size)
    assert cache.nbytes_used == pages * page_size * 2 * 2 * 2 * 32 * 4


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_head_ratios(ids: torch.Tensor, kv_heads: int) -> None:
    model = tiny(num_key_value_heads=kv_heads)
    assert_same(generate(model, "kvk", ids, past_key_values=KvkCache()), generate(model, "sdpa", ids))


def test_left_padding_is_not_stored(llama: Any, ids: torch.Tensor, left_padding: torch.Tensor) -> None:
    cache = KvkCache(page_size=4)
    got = generate(llama, "kvk", ids, attention_mask=left_padding, past_key_values=cache)
    assert_same(got, generate(llama, "sdpa", ids, attention_mask=left_padding))
    assert cache.lengths == [8 + 23, 13 + 23, 11 + 23]


def test_a_row_gives_the_same_bits_alone_and_padded(
    llama: Any, ids: torch.Tensor, left_padding: torch.Tensor
) -> None:
    """What is around a request in the batch does not reach its attention."""
    llama.set_attn_implementation("kvk")
    q_proj = llama.model.layers[0].self_attn
    torch.manual_seed(3)
    query, key, value = torch.randn(3, 6, 13, 32), torch.randn(3, 2, 13, 32), torch.randn(3, 2, 13, 32)

    handle, _ = KvkCache().update(key, value, 0)
    with torch.no_grad():
        batch, _ = kvk_attention(q_proj, query, handle, handle, KvkMask(padding=left_padding.bool()))
        for row, start in enumerate((5, 0, 2)):
            one = (slice(row, row + 1), slice(None), slice(start, None))
            handle, _ = KvkCache(page_size=4).update(key[one], value[one], 0)
            alone, _ = kvk_attention(q_proj, query[one], handle, handle, KvkMask())
            assert torch.equal(alone[0], batch[row, start:])
            assert bool((batch[row, :start] == 0).all())


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_chunked_prefill(llama: Any, ids: torch.Tensor, left_padding: torch.Tensor, chunk: int) -> None:
    want = logits(llama, "sdpa", ids, attention_mask=left_padding)
    cache, parts = KvkCache(page_size=4), []
    for start in range(0, ids.shape[1], chunk):
        stop = min(start + chunk, ids.shape[1])
        mask = left_padding[:, :stop]
        parts.append(logits(llama, "kvk", ids[:, start:stop], attention_mask=mask, past_key_values=cache))
    real = left_padding.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], want[real], atol=2e-4, rtol=1e-4)


def test_generate_with_prefill_chunks(llama: Any, ids: torch.Tensor, left_padding: torch.Tensor) -> None:
    options = {"attention_mask": left_padding, "prefill_chunk_size": 5}
    got = generate(llama, "kvk", ids, past_key_values=KvkCache(page_size=4), **options)
    assert_same(got, generate(llama, "sdpa", ids, attention_mask=left_padding))


def test_right_padding_and_padding_in_the_middle(llama: Any, ids: torch.Tensor) -> None:
    """Ragged rows, then ragged rows again: each goes on as it would alone."""
    first = torch.tensor([[1] * 13, [1] * 6 + [0] * 7, [0] * 3 + [1] * 9 + [0]]).bool()
    second = torch.tensor([[1] * 4, [0, 0, 1, 1], [1, 1, 0, 0]]).bool()
    more = ids.flip(0)[:, :4]
    whole = torch.cat([first, second], 1)
    positions = (whole.long().cumsum(1) - 1).clamp_min(0)
    cache = KvkCache(page_size=4)
    inputs = {"past_key_values": cache, "position_ids": positions[:, :13], "attention_mask": first}
    a = logits(llama, "kvk", ids, **inputs)
    inputs = {"past_key_values": cache, "position_ids": positions[:, 13:], "attention_mask": whole}
    b = logits(llama, "kvk", more, **inputs)
    assert cache.lengths == whole.sum(1).tolist()
    for row in range(3):
        alone = torch.cat([ids[row][first[row]], more[row][second[row]]])
        want = logits(llama, "sdpa", alone[None])[0]
        got = torch.cat([a[row][first[row]], b[row][second[row]]])
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_beam_search(llama: Any, ids: torch.Tensor, left_padding: torch.Tensor, padded: bool) -> None:
    options = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.0}
    if padded:
        options["attention_mask"] = left_padding
    cache = KvkCache(page_size=4)
    got = generate(llama, "kvk", ids, past_key_values=cache, **options)
    want = generate(llama, "sdpa", ids, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=1e-4, rtol=1e-4)
    assert cache.batch_size == 12
    dense = 12 * 36 * 2 * 2 * 2 * 32 * 4
    assert cache.nbytes_used < 0.75 * dense  # beams share what they have in common


def test_assisted_decoding_crops(llama: Any, ids: torch.Tensor) -> None:
    """Prompt look-up verifies several draft tokens at once and crops the rejected ones."""
    prompt = ids[:1].repeat(1, 3)
    cache = KvkCache(page_size=4)
    got = generate(llama, "kvk", prompt, past_key_values=cache, prompt_lookup_num_tokens=4)
    want = generate(llama, "sdpa", prompt)
    assert torch.equal(got.sequences, want.sequences)


def test_multi_turn_goes_on_from_the_cache(llama: Any, ids: torch.Tensor) -> None:
    cache = KvkCache(page_size=4)
    first = generate(llama, "kvk", ids, past_key_values=cache, max_new_tokens=6).sequences
    turn = torch.cat([first, ids[:, :5]], 1)
    got = generate(llama, "kvk", turn, past_key_values=cache, max_new_tokens=8)
    assert_same(got, generate(llama, "sdpa", turn, max_new_tokens=8))


# -- other models -----------------------------------------------------------------------------------------------------


def test_sliding_window(ids: torch.Tensor, left_padding: torch.Tensor) -> None:
    model = tiny("Mistral", sliding_window=6)
    full = tiny("Mistral", sliding_window=None)
    want = generate(model, "sdpa", ids, attention_mask=left_padding)
    assert not torch.equal(want.sequences, generate(full, "sdpa", ids, attention_mask=left_padding).sequences)
    got = generate(model, "kvk", ids, attention_mask=left_padding, past_key_values=KvkCache(page_size=4))
    assert_same(got, want)
    assert_same(generate(model, "kvk", ids, attention_mask=left_padding), want)  # dense sliding cache


def test_sliding_window_chunked_prefill(ids: torch.Tensor) -> None:
    model = tiny("Mistral", sliding_window=6)
    got = generate(model, "kvk", ids, past_key_values=KvkCache(page_size=4), prefill_chunk_size=4)
    assert_same(got, generate(model, "sdpa", ids))


def test_soft_cap_and_alternating_windows(ids: torch.Tensor, left_padding: torch.Tensor) -> None:
    """Gemma 2: soft cap, every other layer sliding, a scale of its own."""
    options = {"sliding_window": 6, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 50}
    model = tiny("Gemma2", **options)
    want = generate(model, "eager", ids, attention_mask=left_padding)
    uncapped = tiny("Gemma2", **{**options, "attn_logit_softcapping": None})
    without = generate(uncapped, "eager", ids, attention_mask=left_padding)
    assert (without.logits[0] - want.logits[0]).abs().max() > 0.01
    assert_same(generate(model, "kvk", ids, attention_mask=left_padding, past_key_values=KvkCache()), want)


def test_sinks(ids: torch.Tensor, left_padding: torch.Tensor) -> None:
    """gpt-oss: a sink logit per head, every other layer sliding."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = tiny("GptOss", sliding_window=6, **experts)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    want = generate(model, "eager", ids, attention_mask=left_padding)
    assert_same(generate(model, "kvk", ids, attention_mask=left_padding, past_key_values=KvkCache()), want)


def test_chunked_attention_through_mask_bits(ids: torch.Tensor, left_padding: torch.Tensor) -> None:
    """A mask pattern that is neither causal nor a window: evaluated, and handed to the kernel as bits."""
    from transformers.masking_utils import and_masks, causal_mask_function

    def blocks_of_four(batch: Any, head: Any, q: Any, kv: Any) -> Any:
        return q // 4 == kv // 4

    pattern = and_masks(blocks_of_four, causal_mask_function)
    shape = {"batch_size": 3, "q_length": 13, "kv_length": 13}
    mask = kvk_mask(**shape, mask_function=pattern, attention_mask=left_padding.bool())
    assert mask.elements is not None and mask.padding is not None and not mask.causal
    seen = mask.elements & left_padding.bool()[:, None, None]
    model = tiny()
    got = logits(model, "kvk", ids, attention_mask=seen)
    want = logits(model, "sdpa", ids, attention_mask=seen)
    real = left_padding.bool()
    torch.testing.assert_close(got[real], want[real], atol=2e-4, rtol=1e-4)


def test_packed_sequences_without_a_cache(llama: Any, ids: torch.Tensor) -> None:
    """Several sequences in one row, told apart by their positions."""
    positions = torch.cat([torch.arange(6), torch.arange(4), torch.arange(3)])[None].expand(3, -1)
    inputs = {"position_ids": positions, "use_cache": False}
    want = logits(llama, "sdpa", ids, **inputs)
    torch.testing.assert_close(logits(llama, "kvk", ids, **inputs), want, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(want, logits(llama, "sdpa", ids, use_cache=False), atol=1e-2)


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_tree_verification_by_a_4d_mask(llama: Any, ids: torch.Tensor, additive: bool, padded: bool) -> None:
    """Draft tokens in a tree: each sees the past and its ancestors. With padding anywhere in the past as well."""
    past = torch.ones_like(ids)
    if padded:
        past[0, :5] = 0
        past[2, [0, 4, 5, 12]] = 0
    parents = [-1, 0, 0, 1, 1, 2]
    tree = torch.eye(6, dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            tree[node] |= tree[parent]
    mask = torch.cat([past.bool()[:, None, None].expand(3, 1, 6, 13), tree.expand(3, 1, 6, 6)], -1)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    depth = tree.sum(1) - 1
    positions = past.sum(1, keepdim=True) + depth
    draft = ids[:, 3:9]
    outputs = {}
    for attention, cache in (("kvk", KvkCache(page_size=4)), ("sdpa", DynamicCache())):
        starts = (past.cumsum(1) - 1).clamp_min(0)
        logits(llama, attention, ids, past_key_values=cache, attention_mask=past, position_ids=starts)
        inputs = {"past_key_values": cache, "attention_mask": mask, "position_ids": positions}
        outputs[attention] = logits(llama, attention, draft, **inputs)
    torch.testing.assert_close(outputs["kvk"], outputs["sdpa"], atol=2e-4, rtol=1e-4)
    path = torch.cat([ids[1:2], draft[1:2, [0, 1, 4]]], 1)  # row 1 has no padding
    torch.testing.assert_close(outputs["kvk"][1, 4], logits(llama, "sdpa", path)[0, -1], atol=2e-4, rtol=1e-4)


def test_pack_bits() -> None:
    mask = torch.rand(5, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    words = pack_bits(mask)
    assert words.dtype == torch.int32 and words.shape == (5, 3)
    for row in range(5):
        value = sum((int(word) % 2**32) << (32 * i) for i, word in enumerate(words[row]))
        assert value == sum(int(bit) << j for j, bit in enumerate(mask[row]))


@pytest.mark.parametrize("use_cache", [False, True])
def test_dense_keys_are_read_in_place(
    llama: Any, ids: torch.Tensor, left_padding: torch.Tensor, use_cache: bool
) -> None:
    """attn_implementation="kvk" also serves no cache at all and transformers' own DynamicCache."""
    real = left_padding.bool()
    inputs = {"attention_mask": left_padding, "use_cache": use_cache}
    want = logits(llama, "sdpa", ids, **inputs)
    torch.testing.assert_close(logits(llama, "kvk", ids, **inputs)[real], want[real], atol=2e-4, rtol=1e-4)
    assert_same(generate(llama, "kvk", ids, **inputs), generate(llama, "sdpa", ids, **inputs))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_unsupported_requests_are_refused(llama: Any, ids: torch.Tensor) -> None:
    llama.set_attn_implementation("kvk")
    with pytest.raises(ValueError, match=r"no gradient: run the model under torch\.no_grad"):
        llama(ids)
    dropping = tiny(attention_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"has no dropout: call model.eval\(\)"):
        logits(dropping, "kvk", ids)
    per_head = torch.ones(3, 6, 13, 13, dtype=torch.bool)
    with pytest.raises(ValueError, match="same for all heads, got 6 heads"):
        logits(llama, "kvk", ids, attention_mask=per_head)
    bias = torch.zeros(3, 1, 13, 13)
    bias[0, 0, 5, 3] = -1.5
    with pytest.raises(ValueError, match="other biases are not supported"):
        logits(llama, "kvk", ids, attention_mask=bias)
    with pytest.raises(ValueError, match=r"must be \[3 or 1, 1, 13, 13\], got \[3, 1, 13, 12\]"):
        logits(llama, "kvk", ids, attention_mask=per_head[:, :1, :, 1:])
    with pytest.raises(ValueError, match="does not read static caches"):
        generate(llama, "kvk", ids, cache_implementation="static")

    module, q = llama.model.layers[0].self_attn, torch.zeros(1, 6, 1, 32)
    kv = torch.zeros(1, 2, 1, 32)
    with pytest.raises(
        ValueError, match='never forms the attention weights: use attn_implementation="eager"'
    ):
        kvk_attention(module, q, kv, kv, None, output_attentions=True)
    for name in ("position_bias", "cache", "cu_seq_lens_q", "cu_seq_lens_k"):
        with pytest.raises(ValueError, match=f"does not support the argument {name}"):
            kvk_attention(module, q, kv, kv, None, **{name: q})
    with pytest.raises(ValueError, match="no two-sided window without a mask function"):
        kvk_attention(module, q, kv, kv, None, is_causal=False, sliding_window=4)


def test_the_handle_needs_kvk_attention(llama: Any, ids: torch.Tensor) -> None:
    with pytest.raises(AttributeError, match=r'call model.set_attn_implementation\("kvk"\)'):
        logits(llama, "sdpa", ids, past_key_values=KvkCache())


def test_compiled_model(llama: Any, ids: torch.Tensor, left_padding: torch.Tensor) -> None:
    """torch.compile breaks the graph at the attention and keeps the rest; results are the same."""
    want = generate(llama, "sdpa", ids, attention_mask=left_padding, max_new_tokens=4)
    llama.set_attn_implementation("kvk")
    compiled = torch.compile(llama, backend="eager")
    cache, mask, tokens = KvkCache(page_size=4), left_padding, ids
    with torch.no_grad():
        for step in range(4):
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
            inputs = {"past_key_values": cache, "attention_mask": mask, "position_ids": positions}
            out = compiled(tokens, **inputs).logits[:, -1]
            torch.testing.assert_close(out, want.logits[step], atol=2e-4, rtol=1e-4)
            tokens = out.argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)


def test_without_transformers_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['transformers'] = None; import kvk.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        "needs Hugging Face transformers 5" in done.stderr
        and "pip install 'transformers>=5.17'" in done.stderr
    )
