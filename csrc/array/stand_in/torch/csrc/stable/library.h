// Stands in for LibTorch's header of this name: ops are registered in a table of this module, for Python to call by name.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace torch::stable::detail {

// An argument or a result.
using Value = std::variant<std::monostate, Tensor, bool, int64_t, double, std::string, std::vector<int64_t>,
                           std::vector<std::string>, headeronly::ScalarType>;

}  // namespace torch::stable::detail

using StableIValue = torch::stable::detail::Value;

namespace torch::stable::detail {

using BoxedFunction = void (*)(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

struct Op {
  std::string schema;
  BoxedFunction function = nullptr;
};

// By name, "paged_decode.out". One function serves all devices, as in csrc/torch.
std::map<std::string, Op>& registry();

class StableLibrary {
 public:
  void def(const char* schema) {
    const std::string text = schema;
    registry()[text.substr(0, text.find('('))].schema = text;
  }
  void impl(const char* op, BoxedFunction function) { registry()[op].function = function; }
};

struct Registration {
  explicit Registration(void (*define)(StableLibrary&)) {
    StableLibrary library;
    define(library);
  }
};

template <class T>
T take(StableIValue& value) {
  if constexpr (requires {
                  typename T::value_type;
                  T().has_value();
                }) {
    if (std::holds_alternative<std::monostate>(value)) return std::nullopt;
    return take<typename T::value_type>(value);
  } else {
    return std::get<T>(std::move(value));
  }
}

template <class T, T function>
struct Boxer;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Boxer<Result (*)(Arguments...), function> {
  static void call(StableIValue* stack, uint64_t, uint64_t) { call(stack, std::index_sequence_for<Arguments...>{}); }

 private:
  template <size_t... i>
  static void call(StableIValue* stack, std::index_sequence<i...>) {
    if constexpr (std::is_void_v<Result>) {
      function(take<std::decay_t<Arguments>>(stack[i])...);
    } else {
      put(stack, function(take<std::decay_t<Arguments>>(stack[i])...));
    }
  }
  template <class... T>
  static void put(StableIValue* stack, std::tuple<T...> results) {
    std::apply([&](auto&... each) { ((*stack++ = std::move(each)), ...); }, results);
  }
  template <class T>
  static void put(StableIValue* stack, T result) {
    *stack = std::move(result);
  }
};

}  // namespace torch::stable::detail

#define TORCH_BOX(function) ::torch::stable::detail::Boxer<decltype(function), (function)>::call
#define STABLE_TORCH_LIBRARY(ns, m) KVK_ARRAY_LIBRARY_(m, __COUNTER__)
#define STABLE_TORCH_LIBRARY_FRAGMENT(ns, m) KVK_ARRAY_LIBRARY_(m, __COUNTER__)
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) KVK_ARRAY_LIBRARY_(m, __COUNTER__)
#define KVK_ARRAY_LIBRARY_(m, id) KVK_ARRAY_LIBRARY_AS_(m, id)
#define KVK_ARRAY_LIBRARY_AS_(m, id)                                                                      \
  static void kvk_array_define_##id(::torch::stable::detail::StableLibrary&);                             \
  static const ::torch::stable::detail::Registration kvk_array_registration_##id(&kvk_array_define_##id); \
  static void kvk_array_define_##id([[maybe_unused]] ::torch::stable::detail::StableLibrary& m)
