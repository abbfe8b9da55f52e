// Between the adapters and torch: m.def() notes the schema, TORCH_BOX() wraps the adapter's function so that KVK_LOG and
// KVK_DUMP see its calls with the schema's names. An adapter need not know of it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "core/record.h"
#include "core/schema.h"
#include "kvk/types.h"

namespace kvk::torch_face {

using BoxedFunction = void (*)(StableIValue*, uint64_t, uint64_t);

// A function as torch calls it, and the place for the name that it gets.
struct Boxed {
  BoxedFunction function;
  const char** op;
};

// What m is in KVK_LIBRARY and its kin.
class Library {
 public:
  explicit Library(torch::stable::detail::StableLibrary& library) : library_(library) {}
  void def(const char* schema);
  void impl(const char* op, Boxed boxed) {
    *boxed.op = op;
    library_.impl(op, boxed.function);
  }

 private:
  torch::stable::detail::StableLibrary& library_;
};

// Of an op that m.def() has defined, "paged_decode.out".
const Schema& schema_of(const char* op);

// An argument of an adapter as the recorder wants it. A tensor of more dimensions than kvk takes is left to the checks.
record::Field field_of(const torch::stable::Tensor& t);
record::Field field_of(torch::headeronly::ScalarType dtype);
record::Field field_of(const std::string& text);
template <class T>
record::Field field_of(const T& value) {
  if constexpr (requires { value.has_value(); }) {
    return value ? field_of(*value) : record::Field{};
  } else if constexpr (std::is_same_v<T, std::vector<int64_t>> || std::is_same_v<T, bool>) {
    return {{}, value};
  } else if constexpr (std::is_floating_point_v<T>) {
    return {{}, static_cast<double>(value)};
  } else if constexpr (std::is_integral_v<T>) {
    return {{}, static_cast<int64_t>(value)};
  } else {
    return {};
  }
}

// Names and roles from the schema; null if the call is not to be recorded (no tensor, or part of a recorded call).
std::unique_ptr<record::Call> start_recording(const char* op, record::Fields fields);
void note_result(record::Call& call, const torch::stable::Tensor& t);
template <class T>
void note_results(record::Call& call, const T& result) {
  if constexpr (std::is_same_v<T, torch::stable::Tensor>) {
    note_result(call, result);
  } else if constexpr (requires { std::tuple_size<T>::value; }) {
    std::apply([&](const auto&... each) { (note_results(call, each), ...); }, result);
  }
}

template <auto function>
struct Recorded;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Recorded<function> {
  static inline const char* op = nullptr;

  static Result call(Arguments... arguments) {
    if (!record::on()) [[likely]]
      return function(std::move(arguments)...);
    const std::unique_ptr<record::Call> recording = start_recording(op, {field_of(arguments)...});
    if constexpr (std::is_void_v<Result>) {
      function(std::move(arguments)...);
    } else {
      Result result = function(std::move(arguments)...);
      if (recording) note_results(*recording, result);
      return result;
    }
  }
};

template <auto function>
Boxed boxed() {
  return {TORCH_BOX(&Recorded<function>::call), &Recorded<function>::op};
}

}  // namespace kvk::torch_face

#undef TORCH_BOX
#define TORCH_BOX(function) ::kvk::torch_face::boxed<function>()

// The torch macros stringify their argument, so a namespace that is itself a macro needs one expansion first. Another
// KVK_NAMESPACE lets a second build live in one process.
#ifndef KVK_NAMESPACE
#define KVK_NAMESPACE kvk
#endif
#define KVK_LIBRARY(ns, m) KVK_LIBRARY_WITH_(STABLE_TORCH_LIBRARY, (ns, library), m, __COUNTER__)
#define KVK_LIBRARY_FRAGMENT(ns, m) KVK_LIBRARY_WITH_(STABLE_TORCH_LIBRARY_FRAGMENT, (ns, library), m, __COUNTER__)
#define KVK_LIBRARY_IMPL(ns, key, m) KVK_LIBRARY_WITH_(STABLE_TORCH_LIBRARY_IMPL, (ns, key, library), m, __COUNTER__)
#define KVK_LIBRARY_WITH_(macro, arguments, m, id) KVK_LIBRARY_AS_(macro, arguments, m, id)
#define KVK_LIBRARY_AS_(macro, arguments, m, id)                \
  static void kvk_register_##id(::kvk::torch_face::Library& m); \
  macro arguments {                                             \
    ::kvk::torch_face::Library recorded(library);               \
    kvk_register_##id(recorded);                                \
  }                                                             \
  static void kvk_register_##id(::kvk::torch_face::Library& m)
