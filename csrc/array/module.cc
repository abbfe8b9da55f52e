// kvk.array's module: DLPack in, the adapters of csrc/torch, arrays of the caller's library out (csrc/array/README.md).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>

#include "array/call.h"
#include "array/dlpack.h"
#include "core/schema.h"
#include "kvk/api.h"
#include "kvk/threads.h"
#include "torch/adapter.h"

namespace py = pybind11;

namespace kvk::array {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Array;
using torch::stable::Tensor;
using torch::stable::detail::Op;
using torch::stable::detail::Value;

// What Python hands over for an array: something with __dlpack__, the dtype where DLPack cannot name it (else an empty
// text), and the caller's own object, which results give back.
struct Handed {
  py::object producer;
  std::string dtype;
  py::object owner;
};

Handed handed(const py::handle& value) {
  const auto parts = py::cast<py::tuple>(value);
  return {parts[0], py::cast<std::string>(parts[1]), parts[2]};
}

constexpr std::pair<ScalarType, const char*> kNames[] = {
    {ScalarType::Float, "float32"},  {ScalarType::BFloat16, "bfloat16"}, {ScalarType::Half, "float16"},
    {ScalarType::Double, "float64"}, {ScalarType::Long, "int64"},        {ScalarType::Int, "int32"},
    {ScalarType::Short, "int16"},    {ScalarType::Char, "int8"},         {ScalarType::Byte, "uint8"},
    {ScalarType::Bool, "bool"},
};

const char* name_of(ScalarType dtype) {
  for (const auto& [type, name] : kNames) {
    if (type == dtype) return name;
  }
  return "a dtype that kvk does not know";
}

ScalarType scalar_type(const std::string& name) {
  for (const auto& [type, known] : kNames) {
    if (name == known) return type;
  }
  throw Error("kvk.array: dtype must be one of those that kvk takes, got " + name);
}

ScalarType scalar_type(const DLDataType& dtype) {
  if (dtype.lanes != 1) return ScalarType::Undefined;
  const auto sized = [&](std::initializer_list<std::pair<int, ScalarType>> list) {
    for (const auto& [bits, type] : list) {
      if (bits == dtype.bits) return type;
    }
    return ScalarType::Undefined;
  };
  switch (dtype.code) {
    case kDLFloat: return sized({{32, ScalarType::Float}, {16, ScalarType::Half}, {64, ScalarType::Double}});
    case kDLBfloat: return sized({{16, ScalarType::BFloat16}});
    case kDLInt:
      return sized({{64, ScalarType::Long}, {32, ScalarType::Int}, {16, ScalarType::Short}, {8, ScalarType::Char}});
    case kDLUInt: return sized({{8, ScalarType::Byte}});
    case kDLBool: return sized({{8, ScalarType::Bool}});
    default: return ScalarType::Undefined;
  }
}

// What a view keeps alive: the caller's array, and what DLPack has lent of it.
struct Owner {
  std::shared_ptr<void> array, loan;
};

// Keeps a Python object alive from a thread that may not hold the GIL.
std::shared_ptr<void> keep(py::object object) {
  return std::shared_ptr<void>(object.release().ptr(), [](void* pointer) {
    const py::gil_scoped_acquire gil;
    py::handle(static_cast<PyObject*>(pointer)).dec_ref();
  });
}

py::capsule dlpack_of(const py::object& producer, const py::object& stream) {
  py::dict options;
  if (!stream.is_none()) {  // not for one on the CPU among arrays on a card: that the op refuses, in its own words
    const int kind = py::cast<int>(py::cast<py::tuple>(producer.attr("__dlpack_device__")())[0]);
    if (kind == kDLCUDA || kind == kDLCUDAManaged) options["stream"] = stream;
  }
  py::dict versioned = options.attr("copy")();
  versioned["max_version"] = py::make_tuple(1, 0);
  try {
    return py::cast<py::capsule>(producer.attr("__dlpack__")(**versioned));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;  // a producer from before DLPack 1.0 has no max_version
  }
  return py::cast<py::capsule>(producer.attr("__dlpack__")(**options));
}

Tensor import_array(const Handed& array, const py::object& stream) {
  py::capsule capsule = dlpack_of(array.producer, stream);
  auto view = std::make_shared<Array>();
  const DLTensor* source = nullptr;
  std::shared_ptr<void> managed;
  if (std::strcmp(capsule.name(), "dltensor_versioned") == 0) {
    auto* tensor = capsule.get_pointer<DLManagedTensorVersioned>();
    if (tensor->version.major != 1) throw Error("kvk.array: DLPack of another major version than 1");
    source = &tensor->dl_tensor;
    view->read_only = (tensor->flags & kReadOnly) != 0;
    managed = std::shared_ptr<void>(tensor, [tensor](void*) {
      const py::gil_scoped_acquire gil;
      if (tensor->deleter != nullptr) tensor->deleter(tensor);
    });
    capsule.set_name("used_dltensor_versioned");
  } else {
    auto* tensor = capsule.get_pointer<DLManagedTensor>();
    source = &tensor->dl_tensor;
    managed = std::shared_ptr<void>(tensor, [tensor](void*) {
      const py::gil_scoped_acquire gil;
      if (tensor->deleter != nullptr) tensor->deleter(tensor);
    });
    capsule.set_name("used_dltensor");
  }
  view->data = source->data == nullptr ? nullptr : static_cast<char*>(source->data) + source->byte_offset;
  view->dtype = array.dtype.empty() ? scalar_type(source->dtype) : scalar_type(array.dtype);
  view->element_size = source->dtype.bits / 8;
  view->device_type = source->device.device_type;
  view->device_index = source->device.device_id;
  view->shape.assign(source->shape, source->shape + source->ndim);
  if (source->strides != nullptr) {
    view->strides.assign(source->strides, source->strides + source->ndim);
  } else {
    view->strides.resize(view->shape.size());
    int64_t step = 1;
    for (size_t i = view->shape.size(); i-- > 0; step *= view->shape[i]) view->strides[i] = step;
  }
  view->owner = std::make_shared<Owner>(Owner{keep(array.owner), std::move(managed)});
  return Tensor(std::move(view));
}

py::object owner_of(const Tensor& t) {
  const auto owner = std::static_pointer_cast<Owner>(t.array().owner);
  return py::reinterpret_borrow<py::object>(static_cast<PyObject*>(owner->array.get()));
}

Value to_value(const SchemaArgument& argument, const py::handle& value, const Schema& schema,
               const py::object& stream) {
  std::string type = argument.type;
  if (type.back() == '?') {
    if (value.is_none()) return std::monostate{};
    type.pop_back();
  }
  if (type == "Tensor") {
    Tensor tensor = import_array(handed(value), stream);
    if (argument.written && tensor.array().read_only) {
      throw Error("kvk::" + schema.name + ": " + argument.name + " is written, and this array is read-only");
    }
    return tensor;
  }
  if (type == "int") return py::cast<int64_t>(value);
  if (type == "float") return py::cast<double>(value);
  if (type == "bool") return py::cast<bool>(value);
  if (type == "str") return py::cast<std::string>(value);
  if (type == "int[]") return py::cast<std::vector<int64_t>>(value);
  if (type == "str[]") return py::cast<std::vector<std::string>>(value);
  if (type == "ScalarType") return scalar_type(py::cast<std::string>(value));
  throw Error("kvk.array: " + schema.name + " has an argument of type " + argument.type);
}

py::object to_python(const Value& value) {
  return std::visit(
      [](const auto& x) -> py::object {
        using T = std::decay_t<decltype(x)>;
        if constexpr (std::is_same_v<T, Tensor>) {
          return owner_of(x);
        } else if constexpr (std::is_same_v<T, std::monostate> || std::is_same_v<T, ScalarType>) {
          return py::none();
        } else {
          return py::cast(x);
        }
      },
      value);
}

int num_threads = 0;  // 0: one for each of the machine's

// One op. arrays are Handed; allocate(owner, shape, dtype) makes one. stream: what __dlpack__ is told (None on the CPU) and
// the address of the stream to queue on.
py::tuple call(const std::string& op, const py::list& arguments, const py::object& stream, uintptr_t stream_address,
               const py::function& allocate) {
  const auto at = torch::stable::detail::registry().find(op);
  if (at == torch::stable::detail::registry().end()) throw Error("kvk.array: there is no op " + op);
  const Schema schema = parse_schema(at->second.schema);
  if (schema.arguments.size() != arguments.size()) throw Error("kvk.array: wrong number of arguments for " + op);
  std::vector<Value> stack;
  stack.reserve(arguments.size() + static_cast<size_t>(schema.results));
  for (size_t i = 0; i < schema.arguments.size(); ++i) {
    stack.push_back(to_value(schema.arguments[i], arguments[i], schema, stream));
  }
  stack.resize(std::max<size_t>(stack.size(), static_cast<size_t>(schema.results)));

  CallState state;
  state.stream = reinterpret_cast<void*>(stream_address);
  state.allocate = [&](const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
    const py::gil_scoped_acquire gil;
    // Of a dtype that kvk does not know any memory will do: the op refuses its inputs next.
    const char* name = dtype == ScalarType::Undefined ? "uint8" : name_of(dtype);
    return import_array(handed(allocate(owner_of(like), shape, name)), stream);
  };
  const CallState before = std::exchange(current_call(), state);
  try {
    const py::gil_scoped_release no_gil;
    at->second.function(stack.data(), schema.arguments.size(), static_cast<uint64_t>(schema.results));
  } catch (...) {
    current_call() = before;
    throw;
  }
  current_call() = before;
  py::tuple results(schema.results);
  for (int i = 0; i < schema.results; ++i) results[static_cast<size_t>(i)] = to_python(stack[static_cast<size_t>(i)]);
  return results;
}

// Every op: name, and of each argument name, type, default or None, written, keyword-only.
py::list ops() {
  py::list all;
  for (const auto& [name, op] : torch::stable::detail::registry()) {
    const Schema schema = parse_schema(op.schema);
    py::list arguments;
    for (const SchemaArgument& a : schema.arguments) {
      arguments.append(py::make_tuple(a.name, a.type, a.default_value ? py::cast(*a.default_value) : py::none(),
                                      a.written, a.keyword_only));
    }
    all.append(py::make_tuple(name, arguments, op.schema, schema.results));
  }
  return all;
}

}  // namespace

CallState& current_call() {
  thread_local CallState state;
  return state;
}

}  // namespace kvk::array

namespace torch::stable {

Tensor new_empty(const Tensor& like, const std::vector<int64_t>& shape, std::optional<headeronly::ScalarType> dtype) {
  return kvk::array::current_call().allocate(like, shape, dtype.value_or(like.scalar_type()));
}

uint32_t get_num_threads() {
  const int wanted = kvk::array::num_threads;
  return static_cast<uint32_t>(wanted > 0 ? wanted : kvk::default_threads().count());
}

namespace detail {

std::map<std::string, Op>& registry() {
  static std::map<std::string, Op> ops;
  return ops;
}

void run_parallel(int64_t begin, int64_t end, void (*task)(const void*, int64_t, int64_t), const void* f) {
  struct Work {
    int64_t begin;
    void (*task)(const void*, int64_t, int64_t);
    const void* f;
  } work{begin, task, f};
  kvk::default_threads().run(
      static_cast<int>(end - begin),
      [](void* opaque, int worker) {
        const Work& w = *static_cast<const Work*>(opaque);
        w.task(w.f, w.begin + worker, w.begin + worker + 1);
      },
      &work);
}

}  // namespace detail
}  // namespace torch::stable

PYBIND11_MODULE(_array, m) {
  m.doc() = "The ops of kvk over DLPack; use kvk.array.";
  m.def("ops", &kvk::array::ops);
  m.def("call", &kvk::array::call);
  m.def("set_num_threads", [](int count) { kvk::array::num_threads = count; });
  m.def("get_num_threads", [] { return torch::stable::get_num_threads(); });
  m.def("version", [] { return kvk::version(); });
  m.def("cpu_level", [] { return kvk::cpu_level(); });
}
