// Kernels of block-sparse and neighborhood attention by their arguments: a test names the instances that it launches.
#pragma once

#define KVK_GRID(T, D, DV, SCHEDULE, ...)                 \
  KVK_EMULATED_KERNEL(kvk::device::grid_attention_kernel< \
                      kvk::device::GridConfig<kvk::device::T, D, DV, kvk::device::SCHEDULE, __VA_ARGS__>>)

#define KVK_GRADIENT(T, D, DV, SCHEDULE, ...)            \
  KVK_EMULATED_KERNEL(kvk::device::grid_gradient_kernel< \
                      kvk::device::GridGradientConfig<kvk::device::T, D, DV, kvk::device::SCHEDULE, __VA_ARGS__>>)
