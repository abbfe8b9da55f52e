#include "torch/recorded.h"

#include <atomic>
#include <map>

#include "core/check.h"
#include "torch/adapter.h"

namespace kvk::torch_face {
namespace {

// Filled while the library is loaded, read only afterwards.
std::map<std::string, Schema, std::less<>>& schemas() {
  static std::map<std::string, Schema, std::less<>> map;
  return map;
}

// For tests: calls are recorded as the C++ face records its own.
std::atomic<bool> leave_to_cpp{false};

struct DefaultText {
  std::string operator()(std::monostate) const { return "None"; }
  std::string operator()(bool x) const { return x ? "True" : "False"; }
  std::string operator()(int64_t x) const { return std::to_string(x); }
  std::string operator()(double x) const {
    const std::string text = std::to_string(x);  // "0.000000"
    return text.substr(0, text.find('.') + 2);
  }
  template <class T>
  std::string operator()(const T&) const {
    return {};
  }
};

// The text that a schema would write this value as; exact for the numbers that are defaults.
bool is_default(const record::Field& field, const SchemaArgument& argument) {
  if (!argument.default_value) return false;
  if (const double* x = std::get_if<double>(&field.value))
    return *x == std::strtod(argument.default_value->c_str(), nullptr);
  return std::visit(DefaultText{}, field.value) == *argument.default_value;
}

}  // namespace

void Library::def(const char* text) {
  Schema schema = parse_schema(text);
  std::string op = schema.name + (schema.overload.empty() ? "" : "." + schema.overload);
  schemas().emplace(std::move(op), std::move(schema));
  library_.def(text);
}

const Schema& schema_of(const char* op) {
  const auto at = schemas().find(std::string_view(op));
  if (at == schemas().end()) throw Error(std::string("kvk: no schema of ") + op);
  return at->second;
}

record::Field field_of(const TorchTensor& t) {
  if (t.dim() > kMaxDims) return {};
  return {{}, view(t)};
}

record::Field field_of(torch::headeronly::ScalarType dtype) { return {{}, std::string(dtype_name(dtype_of(dtype)))}; }

record::Field field_of(const std::string& text) { return {{}, text}; }

std::unique_ptr<record::Call> start_recording(const char* op, record::Fields fields) {
  if (leave_to_cpp || record::Call::within()) return nullptr;
  const Schema& schema = schema_of(op);
  const Tensor* first = nullptr;
  for (size_t i = 0; i < fields.size(); ++i) {
    record::Field& field = fields[i];
    const SchemaArgument& argument = schema.arguments[i];
    field.name = argument.name;
    field.is_default = is_default(field, argument);
    if (argument.written) field.role = schema.is_output(argument) ? record::Role::output : record::Role::in_out;
    if (first == nullptr) first = std::get_if<Tensor>(&field.value);
  }
  if (first == nullptr) return nullptr;  // one that asks the library something
  return std::make_unique<record::Call>(schema.name, schema.overload, std::move(fields), current_stream(first->device));
}

void note_result(record::Call& call, const TorchTensor& t) { call.result(view(t)); }

namespace {

void leave_recording_to_cpp(bool on) { leave_to_cpp = on; }

// Log level, folder ("": none), and the folder's bounds; what was set before comes back as "log\nfolder\ncalls\nbytes".
std::string set_recording(int64_t log, std::string dump, int64_t calls, int64_t bytes) {
  const record::Settings before = record::settings();
  record::set({static_cast<int>(log), std::move(dump), calls, bytes});
  return std::to_string(before.log) + "\n" + before.dump + "\n" + std::to_string(before.dump_calls) + "\n" +
         std::to_string(before.dump_bytes);
}

}  // namespace

KVK_LIBRARY_FRAGMENT(KVK_NAMESPACE, m) {
  m.def("_leave_recording_to_cpp(bool on) -> ()");
  m.def("_set_recording(int log, str dump, int calls, int bytes) -> str");
}

KVK_LIBRARY_IMPL(KVK_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("_leave_recording_to_cpp", TORCH_BOX(&leave_recording_to_cpp));
  m.impl("_set_recording", TORCH_BOX(&set_recording));
}

}  // namespace kvk::torch_face
