"""The ops on a card, or over the device emulator, which takes the CPU's tensors for a card's.

`pytest` runs the tests that ask for `card` over the emulator, everywhere, and on the card where there is one: the same
checks, checked code and launch code (docs/emulator.md, docs/cuda.md).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import emulation
import kvk
import pytest
import torch
from kvk_testing import assert_bit_equal
from paged_cases import PagedCase, check_attention
from torch import Tensor


@cache
def load_emulated_ops() -> None:
    """Defines torch.ops.kvk_emu; KVK_EMULATED_OPS names the library of another build."""
    library = os.environ.get("KVK_EMULATED_OPS") or emulation.build("kvk_emu") / "kvk_emu.so"
    torch.ops.load_library(library)


class Card(ABC):
    """Where the ops run, and how tensors get there and back."""

    name: str

    def __init__(self, ops: Any) -> None:
        self.ops = ops

    @abstractmethod
    def put(self, tensors: Sequence[Any]) -> list[Any]:
        """Copies on the card with the same strides; views of one memory stay views of one memory."""

    def put_options(self, options: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(options, self.put(list(options.values())), strict=True))

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """NaN on the card."""
        return self.put([torch.full(tuple(shape), torch.nan, dtype=dtype)])[0]

    def run(self, case: PagedCase) -> tuple[Tensor, Tensor]:
        """The case's op, into outputs that hold NaN before; (out, lse) on the CPU."""
        rows, heads = case.q.shape[:2]
        out = self.new((rows, heads, case.v_pages.shape[-1]), case.q.dtype)
        lse = self.new((rows, heads), torch.float32)
        args, options = self.put(case.args), self.put_options(case.options)
        getattr(self.ops, case.name).out(*args, **options, out=out, lse=lse)
        return out.cpu(), lse.cpu()

    def check(self, case: PagedCase) -> tuple[Tensor, Tensor]:
        """Runs the op and holds it against the reference."""
        out, lse = self.run(case)
        check_attention(out, lse, case)
        return out, lse


class EmulatedCard(Card):
    """The emulator: the CPU's tensors themselves."""

    name = "emulated"

    def __init__(self) -> None:
        load_emulated_ops()
        super().__init__(torch.ops.kvk_emu)

    def put(self, tensors: Sequence[Any]) -> list[Any]:
        return list(tensors)


def same_message(checked: Card, call: Callable[[Any], object]) -> None:
    """call(ops) is refused with the CPU's words."""
    messages = []
    for ops in (checked.ops, torch.ops.kvk):
        with pytest.raises(RuntimeError) as caught:
            call(ops)
        messages.append(str(caught.value).splitlines()[0])
    assert messages[0] == messages[1]


class CudaCard(Card):
    """A card."""

    name = "cuda"

    def __init__(self) -> None:
        super().__init__(torch.ops.kvk)

    def put(self, tensors: Sequence[Any]) -> list[Any]:
        memories: dict[int, torch.UntypedStorage] = {}

        def copy(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            memory = x.untyped_storage()
            if memory.data_ptr() not in memories:
                memories[memory.data_ptr()] = memory.cuda()
            moved = torch.empty(0, dtype=x.dtype, device="cuda")
            return moved.set_(memories[memory.data_ptr()], x.storage_offset(), x.size(), x.stride())

        return [copy(x) for x in tensors]


def check_pages_beyond_the_pools(card: Card, op: str, fmt: Any, k_pages: Tensor, v_pages: Tensor) -> None:
    """Packs with ids outside the three pages of the source and the pools of two: only page 1 goes to record 0.

    Values on a card are trusted, but can never make a kernel write outside its output.
    """

    def ids(*pages: int) -> Tensor:
        return torch.tensor(pages, dtype=torch.int32)

    want = [pool.fill_(7) for pool in fmt.new_pool(2, 2)]
    getattr(kvk, op)(k_pages, v_pages, ids(1), *want, ids(0), fmt)
    pools = [pool.fill_(7) for pool in fmt.new_pool(2, 2)]
    k, v, src, *pools, dst = card.put([k_pages, v_pages, ids(0, 1, 2, 3, -1), *pools, ids(2, 0, -1, 1, 1)])
    getattr(card.ops, op)(k, v, src, *pools, dst, fmt.numbers)
    for got, wanted in zip(pools, want, strict=True):
        assert_bit_equal(got.cpu(), wanted)
