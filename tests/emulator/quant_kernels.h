// How the instantiations of the attention kernels over quantized records are registered, and formats for tests.
#pragma once

#include "emulator/emulator.h"
#include "kvk/device/quant_attention.cuh"

#define KVK_QUANT_DECODE(T, D, DV, HALVES, PARTS, SMALL, ...)                                                      \
  KVK_EMULATED_KERNEL(                                                                                             \
      kvk::device::paged_decode_kernel<kvk::device::PagedDecodeConfig<kvk::device::T, D, DV, HALVES, PARTS, SMALL, \
                                                                      kvk::device::QuantPages<__VA_ARGS__>>>)
#define KVK_QUANT_PREFILL(T, D, DV, PARTS, SMALL, ...) \
  KVK_EMULATED_KERNEL(                                 \
      kvk::device::paged_prefill_kernel<               \
          kvk::device::PagedPrefillConfig<kvk::device::T, D, DV, PARTS, SMALL, kvk::device::QuantPages<__VA_ARGS__>>>)
