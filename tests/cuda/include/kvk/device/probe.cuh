// Kernels for the tests of NVRTC: one that is well behaved, one that keeps an array in local memory, one that spills.
#pragma once

#include "kvk/device/probe_params.h"

namespace kvk::device {

template <int N>
__global__ void __launch_bounds__(128) probe_kernel(const ProbeParams p) {
  __shared__ float rows[128];
  rows[threadIdx.x] = p.x[threadIdx.x];
  __syncthreads();
  p.x[threadIdx.x] = N * rows[127 - threadIdx.x] + p.add;
}

template <int N>
__global__ void __launch_bounds__(128) local_memory_kernel(const ProbeParams p) {
  float values[N];
  for (int i = 0; i < N; ++i) values[i * p.index % N] = p.x[i];
  p.x[threadIdx.x] = values[p.index];
}

template <int N>
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const ProbeParams p) {
  float values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = p.x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) p.x[threadIdx.x * N + i] = values[N - 1 - i] * values[i];
}

}  // namespace kvk::device
