// What the emulator's test programs share: device arrays, named expectations, the exit status.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "emulator/emulator.h"

namespace kvk::emu {

// A device buffer of n elements.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t n, const char* name = "output") : n_(n), data_(allocate(n, Use::output, name)) {}
  explicit DeviceArray(const std::vector<T>& values, Use use = Use::input, const char* name = "input")
      : n_(values.size()), data_(allocate(n_, use, name)) {
    device_write(data_, values.data(), n_ * sizeof(T));
  }
  ~DeviceArray() { device_free(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  size_t size() const { return n_; }
  std::vector<T> host() const {
    std::vector<T> values(n_);
    std::memcpy(static_cast<void*>(values.data()), data_, n_ * sizeof(T));
    return values;
  }

 private:
  static T* allocate(size_t n, Use use, const char* name) {
    return static_cast<T*>(device_malloc(n * sizeof(T), use, name));
  }
  size_t n_;
  T* data_;
};

inline int failures = 0;

// KVK_EMU_STOP ends the program at the first failure: a mutation test needs no second one.
inline void expect(bool ok, const std::string& what) {
  failures += !ok;
  std::printf("%s  %s\n", ok ? "ok  " : "FAIL", what.c_str());
  if (!ok && std::getenv("KVK_EMU_STOP") != nullptr) std::exit(1);
}

// That `f` throws an Error of this kind, or nothing when the kind is "nothing".
template <class F>
void expect_error(const std::string& kind, const std::string& what, F f) {
  std::string got = "nothing", message;
  try {
    f();
  } catch (const Error& e) {
    got = e.kind;
    message = e.what();
  }
  expect(got == kind, what + ": " + kind + (got == kind ? "" : ", got " + got + " " + message));
  if (got == kind && !message.empty()) std::printf("      %s\n", message.c_str());
}

// Runs the tests; the exit status of main.
template <class F>
int run_tests(F tests) {
  try {
    tests();
  } catch (const std::exception& e) {
    expect(false, e.what());
  }
  std::printf("%d failed\n", failures);
  return failures ? 1 : 0;
}

}  // namespace kvk::emu
