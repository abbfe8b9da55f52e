// How the instantiations of the attention kernels over records are registered.
#pragma once

#include "emulator/emulator.h"
#include "kvk/device/quant_attention.cuh"
#include "kvk/device/sparse_attention.cuh"

#define KVK_RECORD_DECODE(T, D, DV, HALVES, PARTS, SMALL, ...) \
  KVK_EMULATED_KERNEL(                                         \
      kvk::device::paged_decode_kernel<                        \
          kvk::device::PagedDecodeConfig<kvk::device::T, D, DV, HALVES, PARTS, SMALL, kvk::device::__VA_ARGS__>>)
#define KVK_RECORD_PREFILL(T, D, DV, PARTS, SMALL, ...)  \
  KVK_EMULATED_KERNEL(kvk::device::paged_prefill_kernel< \
                      kvk::device::PagedPrefillConfig<kvk::device::T, D, DV, PARTS, SMALL, kvk::device::__VA_ARGS__>>)
