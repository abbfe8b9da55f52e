"""Lightning attention on a card: long sequences against the CPU, usual sizes, offsets past 2^31 elements, graphs.

tests/test_cuda_ops_lightning.py makes the small calls there too.
"""

from __future__ import annotations

import kvk
import pytest
import torch
from card import CudaCard
from kvk_testing import assert_bit_equal
from lightning_cases import LightningCase, int32, make_case
from test_cuda_ops_lightning import decode, run
from test_gpu_graphs import capture
from test_gpu_paged import room_for
from test_lightning import decode_case

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def card() -> CudaCard:
    return CudaCard()


def check_long(card: CudaCard, case: LightningCase) -> None:
    """Against the CPU's op, which is held to the recurrence elsewhere."""
    out, final = run(card, case)
    wide = case.with_(q=case.q.float(), k=case.k.float(), v=case.v.float())
    want, want_final = wide.run()
    eps = torch.finfo(case.q.dtype).eps
    torch.testing.assert_close(out.float(), want, rtol=0, atol=2 * eps * want.abs().amax().item())
    torch.testing.assert_close(final, want_final, rtol=0, atol=1e-5 * want_final.abs().amax().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (96, 200)])
@pytest.mark.parametrize("decay", ["none", "head", "token", "mixed"])
def test_long_sequences(card, dtype, dims, decay):
    check_long(card, make_case(2, 3000, 8, *dims, dtype=dtype, decay=decay))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(128, 128), (64, 256), (200, 64)])
@pytest.mark.parametrize("decay", ["head", "token"])
def test_gradients_of_long_sequences(card, dtype, dims, decay):
    """Through autograd, against the CPU's."""
    case = make_case(2, 3000, 4, *dims, dtype=dtype, decay=decay)
    names = ("q", "k", "v", "log_decay", "initial_state")
    gen = torch.Generator().manual_seed(1)
    grads = [torch.randn(case.v.shape, generator=gen).to(dtype), torch.randn(2, 4, *dims, generator=gen)]

    def gradients(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [getattr(case, name).to(device) for name in names]
        leaves = [(x if x.dtype == torch.float32 else x.to(dtype)).requires_grad_() for x in leaves]
        *rows, state = leaves
        results = kvk.lightning_attention(*rows, scale=case.scale, initial_state=state)
        wanted = [grads[0].to(device, dtype), grads[1].to(device)]
        return [x.float().cpu() for x in torch.autograd.grad(results, leaves, wanted)]

    eps = torch.finfo(dtype).eps
    for name, got, want in zip(names, gradients("cuda", dtype), gradients("cpu", torch.float32), strict=True):
        rtol = 2 * eps if name in ("q", "k", "v") else 1e-5
        torch.testing.assert_close(got, want, rtol=0, atol=rtol * want.abs().amax().item(), msg=name)


def test_many_sequences(card):
    gen = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 300, (200,), generator=gen)
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    check_long(
        card,
        make_case(1, int(starts[-1]) + 9, 4, 128, 128, dtype=torch.bfloat16, decay="head", starts=starts),
    )


def test_the_same_bits_every_time(card):
    case = make_case(2, 1000, 16, 128, 128, dtype=torch.bfloat16)
    want = run(card, case)
    for _ in range(5):
        for got, right in zip(run(card, case), want, strict=True):
            assert_bit_equal(got, right)


def test_offsets_past_2_31_elements(card):
    """Batch rows of tokens, and slots of states, that far apart."""
    room_for(20)
    case = make_case(2, 70, 2, 32, 32, dtype=torch.bfloat16)
    want = run(card, case)
    apart = (1 << 31) + 512

    def far(x: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(apart + x[0].numel(), dtype=x.dtype, device="cuda")
        view = memory.as_strided(x.shape, (apart, *x.stride()[1:]))
        return view.copy_(x)

    args = [far(case.q), far(case.k), far(case.v), case.log_decay.cuda()]
    named = {"scale": case.scale, "initial_state": case.initial_state.cuda()}
    for got, right in zip(kvk.lightning_attention(*args, **named), want, strict=True):
        assert_bit_equal(got.cpu(), right)
    del args

    step = decode_case(2, 2, 32, 32, slots=int32(1, 0))
    step[3] = step[3][:2].clone()
    want_out, want_pool = decode(card, [x.clone() for x in step])
    pool = far(step[3])
    out = kvk.lightning_decode(*(x.cuda() for x in step[:3]), pool, step[4].cuda(), step[5].cuda())
    assert_bit_equal(out.cpu(), want_out)
    assert_bit_equal(pool.cpu().contiguous(), want_pool)


def test_a_graph_follows_the_slots(card):
    """A captured step takes its slots, and a captured prompt its starts, from the card."""
    args = card.put(decode_case(6, 4, 128, 128, dtype=torch.bfloat16))
    first, out = args[3].clone(), card.new((6, 4, 128), torch.bfloat16)
    graph = capture(lambda: kvk.lightning_decode(*args, out=out))
    for slots in ([0, 1, 2, 3, 4, 5], [-1, 8, -1, 0, 7, -1]):
        args[3].copy_(first)
        args[4].copy_(int32(*slots))
        graph.replay()
        want_pool = first.clone()
        want = kvk.lightning_decode(*args[:3], want_pool, *args[4:])
        assert_bit_equal(out.cpu(), want.cpu())
        assert_bit_equal(args[3].cpu(), want_pool.cpu())
