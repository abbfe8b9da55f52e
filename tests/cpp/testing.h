// What the C++ tests share: checks that count, random numbers, 16-bit floats of their own, and owning arrays whose
// buffers end exactly where their elements end, so that AddressSanitizer sees any access past them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kvk/kvk.h"

namespace test {

inline constexpr double kInf = std::numeric_limits<double>::infinity();

struct Counts {
  int64_t checks = 0;
  int64_t failures = 0;
};
inline Counts counts;

inline void check(bool ok, const std::string& what) {
  ++counts.checks;
  if (ok) return;
  if (++counts.failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

template <class T>
void check_equal(const T& got, const T& want, const std::string& what) {
  check(got == want, what + ": got " + std::to_string(got) + ", want " + std::to_string(want));
}

inline void check_equal(const std::string& got, const std::string& want, const std::string& what) {
  check(got == want, what + ": got \"" + got + "\", want \"" + want + "\"");
}

// NaN wants NaN, an infinity the same infinity, anything else to within `tolerance`.
inline void check_near(double got, double want, double tolerance, const std::string& what) {
  const bool same = std::isnan(want)   ? std::isnan(got)
                    : std::isinf(want) ? got == want
                                       : std::abs(got - want) <= tolerance;
  if (same) {
    ++counts.checks;
    return;
  }
  check(false, what + ": got " + std::to_string(got) + ", want " + std::to_string(want));
}

// The error that `call` throws; "no error" when it throws none.
template <class F>
std::string error_of(F&& call) {
  try {
    call();
  } catch (const kvk::Error& error) {
    return error.what();
  }
  return "no error";
}

// Runs the body of a test program, prints the level it ran at and how it went.
template <class F>
int run(F&& body) {
  try {
    std::printf("level=%s\n", kvk::cpu_level());
    body();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "FAILED: %s\n", error.what());
    return 2;
  }
  std::printf("checks=%lld failures=%lld\n", static_cast<long long>(counts.checks),
              static_cast<long long>(counts.failures));
  return counts.failures == 0 && counts.checks > 0 ? 0 : 1;
}

// splitmix64 (Steele, Lea, Flood 2014)
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  float uniform() { return static_cast<float>(bits() >> 40) * 0x1p-23f - 1.0f; }  // [-1, 1)

 private:
  uint64_t state_;
};

inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

inline double decode_bf16(uint16_t bits) {
  const uint32_t u = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline double decode_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double x = exponent == 0    ? std::ldexp(mantissa, -24)
             : exponent == 31 ? (mantissa ? std::nan("") : kInf)
                              : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -x : x;
}

// Truncated, not rounded: the tests need some value of the type, no particular one.
inline uint16_t encode_bf16(float x) { return static_cast<uint16_t>(float_bits(x) >> 16); }

// |x| < 65536; what is too small for a normal number becomes 0.
inline uint16_t encode_f16(float x) {
  const uint32_t u = float_bits(x);
  if (std::isnan(x)) return 0x7e00;
  const int exponent = static_cast<int>(u >> 23 & 255) - 127 + 15;
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
  if (exponent <= 0) return sign;
  return static_cast<uint16_t>(sign | exponent << 10 | (u >> 13 & 1023));
}

inline double element(const kvk::Tensor& t, std::initializer_list<int64_t> index) {
  int64_t at = 0;
  int dim = 0;
  for (const int64_t i : index) at += i * t.stride[dim++];
  switch (t.dtype) {
    case kvk::DType::f32: return t.ptr<float>()[at];
    case kvk::DType::bf16: return decode_bf16(t.ptr<uint16_t>()[at]);
    case kvk::DType::f16: return decode_f16(t.ptr<uint16_t>()[at]);
    case kvk::DType::i32: return t.ptr<int32_t>()[at];
    default: return static_cast<double>(t.ptr<int64_t>()[at]);
  }
}

// A contiguous tensor with its memory.
class Array {
 public:
  Array(kvk::DType dtype, std::initializer_list<int64_t> shape) {
    view_.dtype = dtype;
    view_.ndim = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), view_.shape);
    int64_t stride = 1;
    for (int i = view_.ndim - 1; i >= 0; --i) {
      view_.stride[i] = stride;
      stride *= view_.shape[i];
    }
    memory_ = std::make_unique<unsigned char[]>(bytes());
    view_.data = memory_.get();
  }

  static Array of(const std::vector<int32_t>& values) {
    Array a(kvk::DType::i32, {static_cast<int64_t>(values.size())});
    if (!values.empty()) std::memcpy(a.view_.data, values.data(), a.bytes());
    return a;
  }

  static Array random(kvk::DType dtype, std::initializer_list<int64_t> shape, Random& random, float scale = 1.0f) {
    Array a(dtype, shape);
    for (int64_t i = 0; i < a.view_.numel(); ++i) a.set(i, scale * random.uniform());
    return a;
  }

  const kvk::Tensor& view() const { return view_; }
  size_t bytes() const { return static_cast<size_t>(view_.numel() * kvk::element_size(view_.dtype)); }

  // Element i in memory order.
  void set(int64_t i, float x) {
    switch (view_.dtype) {
      case kvk::DType::bf16: view_.ptr<uint16_t>()[i] = encode_bf16(x); break;
      case kvk::DType::f16: view_.ptr<uint16_t>()[i] = encode_f16(x); break;
      default: view_.ptr<float>()[i] = x;
    }
  }

  // NaN in every float type: what an op must overwrite, or must not read.
  void poison() { std::memset(memory_.get(), 0xff, bytes()); }

  bool same_bytes(const Array& other) const { return std::memcmp(memory_.get(), other.memory_.get(), bytes()) == 0; }

 private:
  kvk::Tensor view_;
  std::unique_ptr<unsigned char[]> memory_;
};

// The pool [N, P, Hkv, D] seen with P and Hkv stored the other way round (HND).
inline kvk::Tensor swap_tokens_and_heads(kvk::Tensor t) {
  std::swap(t.shape[1], t.shape[2]);
  std::swap(t.stride[1], t.stride[2]);
  return t;
}

// Half a unit in the last place, relative: the one rounding of a result.
inline double rounding(kvk::DType dtype) {
  return dtype == kvk::DType::bf16 ? 0x1p-8 : dtype == kvk::DType::f16 ? 0x1p-11 : 0x1p-24;
}

inline const char* name(kvk::DType dtype) {
  return dtype == kvk::DType::bf16 ? "bf16" : dtype == kvk::DType::f16 ? "f16" : "f32";
}

}  // namespace test
