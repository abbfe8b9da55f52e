// How the instantiations of the paged kernels are registered, under the names that the launch code gives NVRTC.
#pragma once

#include "emulator/emulator.h"
#include "kvk/device/paged_decode.cuh"
#include "kvk/device/paged_prefill.cuh"

#define KVK_DECODE(...) \
  KVK_EMULATED_KERNEL(kvk::device::paged_decode_kernel<kvk::device::PagedDecodeConfig<__VA_ARGS__>>)
#define KVK_PREFILL(...) \
  KVK_EMULATED_KERNEL(kvk::device::paged_prefill_kernel<kvk::device::PagedPrefillConfig<__VA_ARGS__>>)
