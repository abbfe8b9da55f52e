// Attention over records of bitmaps and dense pages: the decode and prefill kernels with the format BitmapPages.
#pragma once

#include "kvk/device/paged_decode.cuh"
#include "kvk/device/paged_prefill.cuh"
#include "kvk/device/sparse_pages.cuh"
