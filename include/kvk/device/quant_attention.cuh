// Attention over quantized records and dense pages: the decode and prefill kernels with the format QuantPages.
#pragma once

#include "kvk/device/paged_decode.cuh"
#include "kvk/device/paged_prefill.cuh"
#include "kvk/device/quant_pages.cuh"
