"""Defects of the library's kernels for the mutation test: changes of a header's text that a test must notice."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Edit:
    """`old`, which occurs once in `header` (under include/), becomes `new`; then emulator test `test` must fail."""

    name: str
    header: str
    old: str
    new: str
    test: str
    environment: dict[str, str] = field(default_factory=dict)
    schedules: dict[str, dict[str, str]] | None = None  # default: mutation.SCHEDULES


EDITS: tuple[Edit, ...] = (
    Edit(
        name="the two elements of a word change places on packing",
        header="kvk/device/types.h",
        old="return ptx::cvt_bf16x2(lo, hi);",
        new="return ptx::cvt_bf16x2(hi, lo);",
        test="toys",
    ),
    Edit(
        name="shared memory carved with too little space",
        header="kvk/device/smem.h",
        old="return {round_up(total, align) + count * sizeof(T)};",
        new="return {round_up(total, align) + count * sizeof(T) / 2};",
        test="toys",
    ),
    Edit(
        name="a wait that leaves the tile in flight",
        header="kvk/device/paged_decode.cuh",
        old="ptx::cp_async_wait<kAhead - 1>();",
        new="ptx::cp_async_wait<kAhead>();",
        test="paged",
    ),
    Edit(
        name="no __syncwarp before a stage is read and refilled",
        header="kvk/device/paged_decode.cuh",
        old="__syncwarp();  // all lanes' copies of this stage are in",
        new="// all lanes' copies of this stage are in",
        test="paged",
    ),
    Edit(
        name="a warp's output overwrites its ring while other lanes read it",
        header="kvk/device/paged_decode.cuh",
        old="__syncwarp();\n    rows.store(",
        new="rows.store(",
        test="paged",
    ),
    Edit(
        name="splits of different blocks write one partial result",
        header="kvk/device/paged_decode.cuh",
        old="* params.split_slots + split;",
        new="* params.split_slots + split / 2;",
        test="paged",
    ),
    Edit(
        name="no barrier before a tile is read",
        header="kvk/device/attention_rows.cuh",
        old="__syncthreads();  // this stage is in for all",
        new="// this stage is in for all",
        test="paged",
    ),
    Edit(
        name="places of keys replaced while they are read",
        header="kvk/device/attention_rows.cuh",
        old="__syncthreads();  // all are done with this stage's places",
        new="",
        test="paged",
    ),
    Edit(
        name="the next split of a block overwrites rows that are still merged",
        header="kvk/device/paged_decode.cuh",
        old="__syncthreads();  // the next split's rows overwrite these",
        new="",
        test="paged",
    ),
    Edit(
        name="records expanded before all lanes have the places of their keys",
        header="kvk/device/record_pages.cuh",
        old="__syncwarp();  // the places are there for all lanes",
        new="",
        test="quant",
    ),
    Edit(
        name="an expanded tile of records read before it is whole",
        header="kvk/device/record_pages.cuh",
        old="__syncwarp();  // the tile is there for all lanes",
        new="",
        test="sparse",
    ),
    Edit(
        name="a block's tile of records read before all warps have expanded their part",
        header="kvk/device/record_pages.cuh",
        old="__syncthreads();  // the tile is there for all warps",
        new="",
        test="quant",
    ),
    Edit(
        name="scales of the group before",
        header="kvk/device/quant_pages.cuh",
        old="if (scale_row != scales_of_) {",
        new="if (scales_of_ < 0) {",
        test="quant",
    ),
    Edit(
        name="a group of tokens that starts before the keys in view has no record",
        header="kvk/device/quant_pages.cuh",
        old="return (start > begin ? start : begin) - first;",
        new="return start - first + 0 * begin;",
        test="quant",
    ),
    Edit(
        name="the last of eight kept values lost where they start at an odd place",
        header="kvk/device/sparse_bits.cuh",
        old="if (odd + count > 6) {",
        new="if (odd + count > 7) {",
        test="sparse",
    ),
    Edit(
        name="what lies behind a row's values is left undefined",
        header="kvk/device/sparse_pages.cuh",
        old="kStage.value_bytes, i % kChunks, valid);",
        new="valid ? kStage.value_bytes : 0, i % kChunks);",
        test="sparse",
    ),
    Edit(
        name="bitmaps of a row read from the start of its first chunk",
        header="kvk/device/sparse_pages.cuh",
        old="at += places[key].token * kStage.row_bytes % 16;",
        new="at += 0;",
        test="sparse",
    ),
    Edit(
        name="of equal elements every lane keeps the first",
        header="kvk/device/sparse.cuh",
        old="return lowest_bits(bits, before < n ? n - before : 0);",
        new="return lowest_bits(bits, n + 0 * before);",
        test="sparse",
    ),
    Edit(
        name="a decode step that sums what other warps still write",
        header="kvk/device/lightning_decode.cuh",
        old="__syncthreads();  // the parts of all warps are there",
        new="",
        test="lightning",
    ),
    Edit(
        name="a chunk read before all warps' copies of it are in",
        header="kvk/device/lightning.cuh",
        old="__syncthreads();  // this chunk and its decays are there for all; the other stage is free",
        new="",
        test="lightning",
    ),
    Edit(
        name="scores read before all warps have written theirs",
        header="kvk/device/lightning.cuh",
        old="__syncthreads();  // the scores of all warps are there",
        new="",
        test="lightning",
    ),
    Edit(
        name="the only stage refilled while it is read",
        header="kvk/device/lightning.cuh",
        old="__syncthreads();  // all are done with the only stage",
        new="",
        test="lightning",
    ),
    Edit(
        name="the output of a chunk read by lanes that have not written it",
        header="kvk/device/lightning.cuh",
        old="__syncwarp();  // the rows are there for all lanes",
        new="",
        test="lightning",
    ),
    Edit(
        name="from the end a token decays by its own",
        header="kvk/device/lightning.cuh",
        old="return p_.sequences.reversed ? 1 : 0;",
        new="return p_.sequences.reversed ? 0 : 0;",
        test="lightning",
    ),
    Edit(
        name="rows read before all are worked out",
        header="kvk/device/grid.cuh",
        old="__syncthreads();  // the rows are",
        new="",
        test="grid",
    ),
    Edit(
        name="one stage of words for two of columns",
        header="kvk/device/neighborhood_walk.cuh",
        old="words_[(stage * kSlots + slot) * kWords + word] = seen;",
        new="words_[(stage * 0 + slot) * kWords + word] = seen;",
        test="grid",
    ),
    Edit(
        name="a pattern's row runs on into the next one",
        header="kvk/device/block_sparse_walk.cuh",
        old="if (index >= count_) return false;",
        new="if (index > count_) return false;",
        test="grid",
    ),
    Edit(
        name="a key sees the query before its first one",
        header="kvk/device/block_sparse_walk.cuh",
        old="p_.causal ? -last_key(at) : kSeesNone + 1",
        new="p_.causal ? -last_key(at) - 1 : kSeesNone + 1",
        test="grid_gradient",
    ),
    Edit(
        name="entries placed before all starts are there",
        header="kvk/device/block_sparse_transpose.cuh",
        old="__syncthreads();  // all starts are",
        new="",
        test="grid_gradient",
    ),
    Edit(
        name="the state as one bf16 of three",
        header="kvk/device/lightning_state.cuh",
        old="kParts = 3;",
        new="kParts = 1;",
        test="lightning",
    ),
    Edit(
        name="a chunk of the decays' gradient replaced while it is read",
        header="kvk/device/lightning_decay.cuh",
        old="__syncthreads();  // all are done with the chunk before",
        new="",
        test="lightning",
    ),
    Edit(
        name="a chunk of the decays' gradient read before it is there",
        header="kvk/device/lightning_decay.cuh",
        old="__syncthreads();  // the chunk and its decays are there for all",
        new="",
        test="lightning",
    ),
    Edit(
        name="what comes from the state summed before all warps have their part",
        header="kvk/device/lightning_decay.cuh",
        old="__syncthreads();  // the sums of all warps are there",
        new="",
        test="lightning",
    ),
    Edit(
        name="the decays' gradient put together before all warps have their part",
        header="kvk/device/lightning_decay.cuh",
        old="__syncthreads();  // what all warps have found is there",
        new="",
        test="lightning",
    ),
    Edit(
        name="rows of pairs summed while lanes still sum columns",
        header="kvk/device/lightning_decay.cuh",
        old="__syncwarp();  // the sums of all columns are there",
        new="",
        test="lightning",
    ),
    Edit(
        name="the gradient of the state kept over a state that is still wanted",
        header="kvk/device/lightning_decay.cuh",
        old="keep(chunks);",
        new="keep(chunk);",
        test="lightning",
    ),
    Edit(
        name="a token past the end of a sequence decays",
        header="kvk/device/lightning_chunk.cuh",
        old="if (logs == nullptr || at >= count || at < shift) return 0.0f;",
        new="if (logs == nullptr || at < shift) return 0.0f;\n    if (at >= count) return -1.0f;",
        test="lightning",
    ),
    Edit(
        name="kept values go to memory while lanes still write them",
        header="kvk/device/sparse.cuh",
        old="__syncwarp();  // all values are there",
        new="",
        test="sparse",
    ),
)
