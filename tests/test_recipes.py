"""The recipes on small random models: what they store, and what a model makes of it."""

from __future__ import annotations

from typing import Any

import kvk
import pytest
import torch

pytest.importorskip("transformers")

from hf_models import VOCAB, generate, logits, tiny
from kvk.integrations.transformers import KvkCache
from kvk.pages import DensePages, PackedPages
from kvk.recipes.kivi import kivi_cache
from kvk.recipes.mustafar import kept, mustafar_cache
from kvk.recipes.rotated_int4 import rotated_int4_cache
from kvk.recipes.rotatekv import calibrate, rotatekv_cache


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, VOCAB, (2, 150), generator=torch.Generator().manual_seed(2))


def chunked(model: Any, cache: KvkCache, ids: torch.Tensor, chunk: int = 30, **inputs: Any) -> torch.Tensor:
    parts = []
    for start in range(0, ids.shape[1], chunk):
        now = {name: x[:, : start + chunk] for name, x in inputs.items()}
        parts.append(logits(model, "kvk", ids[:, start : start + chunk], past_key_values=cache, **now))
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    ("new_cache", "bound", "bits"),
    [
        (lambda: kivi_cache(8, tail=16), 0.02, 8 + 1),
        (lambda: kivi_cache(4, tail=16), 0.3, 4 + 1),
        (lambda: kivi_cache(3, tail=16, sinks=1), 0.5, 3 + 1),
        (lambda: kivi_cache(2, tail=16, sinks=1), 0.9, 2 + 1),
        (lambda: rotated_int4_cache(), 0.4, 4 + 1),
        (lambda: rotated_int4_cache(8), 0.03, 8 + 1),
    ],
    ids=["kivi8", "kivi4", "kivi3", "kivi2", "int4", "int8"],
)
def test_a_model_over_a_recipe(
    llama: Any, ids: torch.Tensor, new_cache: Any, bound: float, bits: int
) -> None:
    """Errors of a size that goes with the bits, and every byte where it should be; head dim 32, groups of 32."""
    cache = new_cache()
    got, want = chunked(llama, cache, ids), logits(llama, "sdpa", ids)
    error = (got - want).norm() / want.norm()
    assert 1e-5 < error < bound
    cache.pack()
    residency, layer = cache.pool._residency, cache.pool.layers[0]
    assert layer.fmt.bits_per_element == bits
    token = 2 * 2 * 32  # kv heads, K and V
    used = 32 * token * (residency.records.num_used * bits / 8 + residency.slots.num_used * 4)
    assert cache.nbytes_used == 2 * used and residency.records.num_used > 0


@pytest.mark.parametrize("rotated", [False, True])
def test_mustafar(llama: Any, ids: torch.Tensor, rotated: bool) -> None:
    """Nothing pruned is bfloat16's rounding; the more is pruned, the larger the error and the fewer the bytes."""
    want, errors, sizes = logits(llama, "sdpa", ids), [], []
    for sparsity in (0.0, 0.25, 0.5):
        cache = mustafar_cache(sparsity, rotated=rotated, page_size=16, tail=16, dtype=torch.float32)
        got = chunked(llama, cache, ids)
        errors.append(((got - want).norm() / want.norm()).item())
        cache.pack()
        residency, layer = cache.pool._residency, cache.pool.layers[0]
        assert layer.fmt.k_record_bytes == 16 * (2 * kept(sparsity, 32) + 4)
        records = residency.records.num_used * 2 * (layer.fmt.k_record_bytes + layer.fmt.v_record_bytes)
        assert cache.nbytes_used == 2 * (records + residency.slots.num_used * 16 * 2 * 2 * 32 * 4)
        sizes.append(cache.nbytes_used)
    assert 0 < errors[0] < 0.1 and 2 * errors[0] < errors[1] < errors[2]
    assert sizes == sorted(sizes, reverse=True)


def test_mustafar_counts() -> None:
    assert [kept(s, 128) for s in (0.0, 0.5, 0.7, 0.75, 0.99)] == [128, 64, 40, 32, 8]
    assert [kept(s, 64) for s in (0.5, 0.7)] == [32, 24]
    with pytest.raises(ValueError, match=r"sparsity must be at least 0 and below 1, got 1\.0"):
        mustafar_cache(1.0)


@pytest.mark.parametrize("statistic", ["sum", "max"])
def test_rotatekv(llama: Any, ids: torch.Tensor, statistic: str) -> None:
    """Keys stored before their rotary embedding give the same model: 8 bits near exact, 2 bits with sinks."""
    order = calibrate(llama, ids[:, :64], statistic=statistic)
    assert [x.shape for x in order] == [(1, 64)] * 2 and not torch.equal(order[0], order[1])
    assert torch.equal(order[0].sort().values, torch.arange(64, dtype=torch.int32)[None])
    want = logits(llama, "sdpa", ids)
    for bits, bound in ((8, 0.02), (4, 0.4), (2, 1.0)):
        got = chunked(llama, rotatekv_cache(llama, order, bits), ids)
        assert 1e-5 < (got - want).norm() / want.norm() < bound
    dense = rotatekv_cache(
        llama, order, 2, sinks=5
    )  # nothing is packed: only the embedding is off and on again
    torch.testing.assert_close(chunked(llama, dense, ids), want, atol=2e-4, rtol=1e-4)


def test_rotatekv_with_padding_and_forks(llama: Any, ids: torch.Tensor) -> None:
    order = calibrate(llama, ids[:, :64], heads=1)
    assert order[0].shape == (2, 32)
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    mask[1, 50] = 0
    padded = chunked(llama, rotatekv_cache(llama, order, 8, heads=1), ids, attention_mask=mask)
    want = logits(llama, "sdpa", ids[:1, 37:])
    assert (padded[:1, 37:] - want).norm() < 0.03 * want.norm()
    cache = rotatekv_cache(llama, order, 4, heads=1)
    chunked(llama, cache, ids[:1, :120])
    got = logits(llama, "kvk", ids[:, 120:], past_key_values=cache.fork(2))
    one = logits(llama, "kvk", ids[:1, 120:], past_key_values=cache)
    torch.testing.assert_close(one, got[:1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="made for 20 tokens; give it a larger max_len"):
        logits(llama, "kvk", ids, past_key_values=rotatekv_cache(llama, order, 4, heads=1, max_len=20))
    with pytest.raises(ValueError, match="statistic must be 'sum' or 'max', got 'mean'"):
        calibrate(llama, ids, statistic="mean")


def test_left_padding_forks_and_crop(llama: Any, ids: torch.Tensor) -> None:
    """What is done to a compressed batch gives what fresh requests of the same tokens give."""
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    padded = chunked(llama, kivi_cache(4, tail=16), ids, attention_mask=mask)
    alone = chunked(llama, kivi_cache(4, tail=16), ids[1:])
    torch.testing.assert_close(padded[1:], alone, atol=1e-4, rtol=1e-4)

    cache = kivi_cache(4, tail=16)
    chunked(llama, cache, ids[:1, :120])
    twins = cache.fork(2)
    assert twins.nbytes_used == cache.nbytes_used
    new = ids[:, 120:150]
    got = logits(llama, "kvk", new, past_key_values=twins)
    twins.crop(-30)
    again = logits(llama, "kvk", new, past_key_values=twins)
    torch.testing.assert_close(again, got, atol=1e-5, rtol=1e-5)
    one = logits(llama, "kvk", new[:1], past_key_values=cache)
    torch.testing.assert_close(one, got[:1], atol=1e-5, rtol=1e-5)


def test_layers_may_stay_dense(llama: Any, ids: torch.Tensor) -> None:
    def new_format(layer: int, head_dim: int, head_dim_v: int) -> kvk.QuantFormat | None:
        return kvk.QuantFormat(16, head_dim, 2, 2, 16, head_dim_v=head_dim_v) if layer == 1 else None

    cache = KvkCache(page_size=16, new_format=new_format, residual=0)
    chunked(llama, cache, ids)
    assert [type(layer) for layer in cache.pool.layers] == [DensePages, PackedPages]
    some = chunked(llama, KvkCache(page_size=16, new_format=new_format, residual=0), ids)
    everything = KvkCache(page_size=16, new_format=lambda _, d, dv: new_format(1, d, dv), residual=0)
    want = logits(llama, "sdpa", ids)
    assert 0 < (some - want).norm() < (chunked(llama, everything, ids) - want).norm()


def test_generate(llama: Any, ids: torch.Tensor) -> None:
    """transformers' own loop, 8 bits: the same tokens as without a cache of ours."""
    got = generate(llama, "kvk", ids, past_key_values=kivi_cache(8, tail=32), max_new_tokens=40)
    want = generate(llama, "sdpa", ids, max_new_tokens=40)
    same = (got.sequences == want.sequences).float().mean()
    assert same > 0.95


def test_formats_that_do_not_go_with_a_model(llama: Any, ids: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match="v_group must be a multiple of 8 that divides the head_dim_v of 32, got 64"
    ):
        logits(llama, "kvk", ids, past_key_values=kivi_cache(group=64))
