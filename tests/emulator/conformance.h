// Runs the kernels of conformance.cuh over the emulator.
#pragma once

#include <cmath>
#include <vector>

#include "emulator/conformance.cuh"
#include "emulator/harness.h"

namespace kvk::emu {

struct ConformanceCase {
  std::string expression;  // as NVRTC names the kernel
  Kernel kernel;
  unsigned threads;
  size_t smem_bytes, out_words;
  int log2_relative_error;  // 0: exact
  TensorMapContents map;    // base is filled in by the run; rank 0: none
};

inline std::vector<ConformanceCase> conformance_cases() {
  std::vector<ConformanceCase> cases;
#define KVK_CASE(name, threads, smem, out, error) \
  cases.push_back({"kvk::device::" #name, KernelOf<&device::name>::get(#name), threads, smem, out, error, {}});
  KVK_CONFORMANCE_CASES(KVK_CASE)
#if KVK_HAS_TMA
  KVK_CONFORMANCE_TMA_CASES(KVK_CASE)
#endif
#undef KVK_CASE
#if KVK_HAS_WGMMA
#define KVK_CASE(name, type, n, transposed)                                                                \
  cases.push_back({"kvk::device::" #name "<kvk::device::" #type ", " #n ", " #transposed ">",              \
                   KernelOf<&device::name<device::type, n, transposed>>::get(#name "<" #type ", " #n ">"), \
                   128,                                                                                    \
                   64 * 32 + n * 32,                                                                       \
                   128 * n,                                                                                \
                   0,                                                                                      \
                   {}});
  KVK_CONFORMANCE_WGMMA_CASES(KVK_CASE)
#undef KVK_CASE
#endif
  for (ConformanceCase& c : cases) {
    if (c.expression.ends_with("tma_2d")) c.map = {nullptr, 2, 2, {128, 64}, {2, 256}, {64, 64}, 128};
    if (c.expression.ends_with("tma_3d")) c.map = {nullptr, 3, 2, {64, 32, 4}, {2, 128, 4096}, {64, 32, 2}, 0};
    if (c.expression.ends_with("tma_4d"))
      c.map = {nullptr, 4, 2, {64, 16, 4, 2}, {2, 128, 2048, 8192}, {32, 32, 4, 1}, 64};
  }
  return cases;
}

inline std::vector<uint32_t> conformance_input() {
  std::mt19937 random(11);
  std::vector<uint32_t> words(device::kConformanceInWords);
  for (uint32_t& word : words) word = uint32_t(random());
  return words;
}

inline std::vector<uint32_t> run_conformance(const ConformanceCase& c) {
  const DeviceArray<uint32_t> in(conformance_input());
  const std::vector<uint32_t> ones(c.out_words, 0xffffffffu), zero(1, 0u);
  const DeviceArray<uint32_t> out(ones, Use::in_out, "out"), counter(zero, Use::in_out, "counter");
  device::ConformanceParams params = {in.data(), out.data(), counter.data(), {}};
  if (c.map.rank) {
    TensorMapContents map = c.map;
    map.base = in.data();
    encode_tensor_map(&params.map, map);
  }
  launch(c.kernel, {{1}, {c.threads}, c.smem_bytes}, &params);
  return out.host();
}

}  // namespace kvk::emu
