// The CUDA language for kernels. Device code includes this (through types.h, smem.h, ptx.h) and no CUDA header, so that
// NVRTC, nvcc and a host compiler take the same source. Under a host compiler "emulator/cuda_language.h", found in the
// repository's tests folder, stands in for the language and runs the kernels on the CPU (docs/emulator.md).
//
//   template <class Config>
//   KVK_KERNEL(Config::kThreads, 2) my_kernel(const __grid_constant__ MyParams p) { ... }
//
// A kernel has one parameter, its struct of parameters.
#pragma once

#include "kvk/device/int.h"

#if defined(__CUDACC__)

#define KVK_EMULATOR 0
#if !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#endif
#define KVK_DEVICE __device__ __forceinline__
#define KVK_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define KVK_UNROLL _Pragma("unroll")
#define KVK_NO_UNROLL _Pragma("unroll 1")

// KVK_SHARED(name, type): a static object in shared memory, for example KVK_SHARED(flag, int) or KVK_SHARED(s, float[32]).
#define KVK_SHARED(name, ...)   \
  using name##_t = __VA_ARGS__; \
  __shared__ name##_t name

// Compute capability times ten, 800 and up; 0 in nvcc's host pass, which compiles no device code.
#if defined(__CUDA_ARCH__)
#define KVK_ARCH __CUDA_ARCH__
#define KVK_HAS_TMA (__CUDA_ARCH__ >= 900)
#else
#define KVK_ARCH 0
#define KVK_HAS_TMA 1
#endif
// wgmma and setmaxnreg exist for the architecture-specific target sm_90a alone.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define KVK_HAS_WGMMA 1
#else
#define KVK_HAS_WGMMA 0
#endif

// Last parameter of every wrapper: the source place, which only the emulator needs. KVK_LOC follows other parameters,
// KVK_ONLY_LOC stands alone, and KVK_PASS_LOC / KVK_PASS_ONLY_LOC hand the place on.
#define KVK_LOC
#define KVK_ONLY_LOC
#define KVK_PASS_LOC
#define KVK_PASS_ONLY_LOC

#else

#define KVK_EMULATOR 1
#include "emulator/cuda_language.h"
#define KVK_DEVICE inline
#define KVK_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define KVK_UNROLL
#define KVK_NO_UNROLL
#define KVK_SHARED(name, ...)   \
  using name##_t = __VA_ARGS__; \
  name##_t& name = ::kvk::emu::shared_object<name##_t>([] {})
#if !defined(KVK_ARCH)
#define KVK_ARCH 900
#endif
#define KVK_HAS_TMA (KVK_ARCH >= 900)
#define KVK_HAS_WGMMA (KVK_ARCH >= 900 && KVK_ARCH < 1000)
#define KVK_LOC , ::kvk::emu::Loc loc = ::kvk::emu::Loc::current()
#define KVK_ONLY_LOC ::kvk::emu::Loc loc = ::kvk::emu::Loc::current()
#define KVK_PASS_LOC , loc
#define KVK_PASS_ONLY_LOC loc

#endif
