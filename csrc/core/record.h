// Calls that can be logged (KVK_LOG), saved (KVK_DUMP) and replayed: docs/record.md.
//
// A call is recorded once, by the outermost face it passes: torch and arrays record what their schemas say, and the C++
// functions record themselves when nobody above them did. Off, it costs a call one load.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "kvk/context.h"
#include "kvk/types.h"

namespace kvk::record {

struct Settings {
  int log = 0;                     // 1: a line a call; 2: with strides and the range of values
  std::string dump;                // folder; empty: nothing is saved
  int64_t dump_calls = 100;        // files the folder may hold
  int64_t dump_bytes = 1ll << 30;  // bytes on disk the folder may hold
};

// KVK_LOG, KVK_DUMP, KVK_DUMP_CALLS, KVK_DUMP_BYTES, read when the library is loaded.
Settings settings();
void set(const Settings& settings);

extern std::atomic<bool> active;
inline bool on() { return active.load(std::memory_order_relaxed); }

enum class Role { input, in_out, output };

// One argument: none, a tensor, or a plain value.
struct Field {
  std::string name;
  std::variant<std::monostate, Tensor, bool, int64_t, double, std::string, std::vector<int64_t>> value;
  Role role = Role::input;
  bool is_default = false;  // not worth printing
};
using Fields = std::vector<Field>;

// "float32[4, 32, 128]"
std::string describe(const Tensor& t);

// One recorded call: saves the inputs when it is made, prints its line when it ends.
class Call {
 public:
  Call(std::string op, std::string overload, Fields fields, void* cuda_stream);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void result(const Tensor& t) { results_.push_back(t); }

  // A call of this thread is being recorded: what happens below it is part of it.
  static bool within();

 private:
  void print(double microseconds, bool failed) const;

  std::string op_, overload_;
  Fields fields_;
  std::vector<Tensor> results_;
  void* cuda_stream_;
  Settings settings_;
  std::string file_;
  int exceptions_;
  std::chrono::steady_clock::time_point start_;
};

// In a function of the C++ face: const Scope recorded("op", context, [&] { return fields_of(args); });
class Scope {
 public:
  template <class MakeFields>
  Scope(const char* op, const Context& context, const MakeFields& fields) {
    if (on() && !Call::within()) call_ = std::make_unique<Call>(op, "", fields(), context.cuda_stream);
  }

 private:
  std::unique_ptr<Call> call_;
};

}  // namespace kvk::record
