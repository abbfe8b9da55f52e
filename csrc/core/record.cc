// Settings and the log line.
#include "core/record.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <sstream>

#include "core/check.h"
#include "core/dump.h"

namespace kvk::record {
namespace {

// "500", "64K", "1G"
int64_t number(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return otherwise;
  int64_t value = 0;
  const char* end = text + std::strlen(text);
  const auto [rest, error] = std::from_chars(text, end, value);
  const std::string suffix(rest, end);
  const int shift = suffix.empty() ? 0 : suffix == "K" ? 10 : suffix == "M" ? 20 : suffix == "G" ? 30 : -1;
  if (error == std::errc() && value >= 0 && shift >= 0) return value << shift;
  std::fprintf(stderr, "kvk: %s must be a number, K, M or G behind it or not, got '%s'; %lld is taken\n", name, text,
               static_cast<long long>(otherwise));
  return otherwise;
}

Settings from_environment() {
  Settings s;
  s.log = static_cast<int>(std::min<int64_t>(2, number("KVK_LOG", 0)));
  if (const char* folder = std::getenv("KVK_DUMP")) s.dump = folder;
  s.dump_calls = number("KVK_DUMP_CALLS", s.dump_calls);
  s.dump_bytes = number("KVK_DUMP_BYTES", s.dump_bytes);
  return s;
}

bool any(const Settings& s) { return s.log > 0 || !s.dump.empty(); }

std::mutex settings_mutex;
Settings& current() {
  static Settings settings = from_environment();
  return settings;
}

thread_local int depth = 0;

void print_line(const std::string& text) {
  const std::string line = "kvk: " + text + "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);  // one call, so that lines of several threads do not mix
}

float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  } else {
    magnitude = std::ldexp(static_cast<float>(exponent ? fraction | 1024 : fraction), std::max<int>(exponent, 1) - 25);
  }
  return sign ? -magnitude : magnitude;
}

double element(const char* at, DType dtype) {
  const auto as = [at](auto zero) {
    std::memcpy(&zero, at, sizeof zero);
    return zero;
  };
  switch (dtype) {
    case DType::f64: return as(double{});
    case DType::f32: return static_cast<double>(as(float{}));
    case DType::bf16: {
      const uint32_t bits = uint32_t{as(uint16_t{})} << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return static_cast<double>(value);
    }
    case DType::f16: return static_cast<double>(half_to_float(as(uint16_t{})));
    case DType::i64: return static_cast<double>(as(int64_t{}));
    case DType::i32: return as(int32_t{});
    case DType::i16: return as(int16_t{});
    case DType::i8: return as(int8_t{});
    case DType::u8:
    case DType::boolean: return as(uint8_t{});
    case DType::other: break;
  }
  return 0.0;
}

// " -3.5..2.25, 1 nan"
std::string range(const Tensor& t, const Rows& rows, void* cuda_stream) {
  const int64_t size = element_size(t.dtype);
  if (size == 0) return "";
  double low = std::numeric_limits<double>::infinity(), high = -low;
  int64_t nans = 0, infinities = 0;
  for_each_chunk(t, rows, cuda_stream, [&](int64_t, const char* data, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += size) {
      const double x = element(data + at, t.dtype);
      nans += std::isnan(x);
      infinities += std::isinf(x);
      if (!std::isfinite(x)) continue;
      low = std::min(low, x);
      high = std::max(high, x);
    }
  });
  std::ostringstream text;
  if (low <= high) text << ' ' << low << ".." << high;
  if (nans != 0) text << ", " << nans << " nan";
  if (infinities != 0) text << ", " << infinities << " inf";
  return text.str();
}

std::string verbose(const Tensor& t, const Rows& rows, void* cuda_stream) {
  std::ostringstream text;
  text << " strides [";
  for (int i = 0; i < t.ndim; ++i) text << (i ? ", " : "") << t.stride[i];
  text << "]";
  if (!rows.all) text << " (" << rows.rows.size() << " rows named)";
  try {
    text << range(t, rows, cuda_stream);
  } catch (const Error& error) {
    text << " (values: " << error.what() << ")";
  }
  return text.str();
}

struct PlainText {
  std::string operator()(std::monostate) const { return "None"; }
  std::string operator()(const Tensor& t) const { return describe(t); }
  std::string operator()(bool x) const { return x ? "True" : "False"; }
  std::string operator()(int64_t x) const { return std::to_string(x); }
  std::string operator()(double x) const {
    std::ostringstream text;
    text << x;
    return text.str();
  }
  std::string operator()(const std::string& x) const { return x; }
  std::string operator()(const std::vector<int64_t>& list) const {
    std::string text = "[";
    for (size_t i = 0; i < list.size(); ++i) text += (i ? ", " : "") + std::to_string(list[i]);
    return text + "]";
  }
};

}  // namespace

std::atomic<bool> active{any(current())};

Settings settings() {
  const std::lock_guard lock(settings_mutex);
  return current();
}

void set(const Settings& settings) {
  const std::lock_guard lock(settings_mutex);
  current() = settings;
  active = any(settings);
}

std::string describe(const Tensor& t) { return dtype_name(t.dtype) + shape_string(t); }

bool Call::within() { return depth > 0; }

Call::Call(std::string op, std::string overload, Fields fields, void* cuda_stream)
    : op_(std::move(op)), overload_(std::move(overload)), fields_(std::move(fields)), cuda_stream_(cuda_stream),
      settings_(settings()), exceptions_(std::uncaught_exceptions()) {
  if (!settings_.dump.empty()) {
    try {
      file_ = write_dump(settings_, op_, overload_, fields_, cuda_stream_);
    } catch (const std::exception& error) {  // recording never makes a call fail
      print_line(op_ + ": not saved: " + error.what());
    }
  }
  ++depth;
  start_ = std::chrono::steady_clock::now();
}

Call::~Call() {
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start_;
  --depth;
  if (settings_.log == 0) return;
  try {
    print(took.count(), std::uncaught_exceptions() > exceptions_);
  } catch (const std::exception&) {  // out of memory while making a line of text
  }
}

void Call::print(double microseconds, bool failed) const {
  std::ostringstream line;
  line << op_ << (overload_.empty() ? "" : ".") << overload_ << '(';
  const char* separator = "";
  Device device;
  bool found = false;
  for (const Field& field : fields_) {
    if (field.is_default || std::holds_alternative<std::monostate>(field.value)) continue;
    line << separator << field.name << '=' << std::visit(PlainText{}, field.value);
    separator = ", ";
    const Tensor* t = std::get_if<Tensor>(&field.value);
    if (t == nullptr) continue;
    if (!found) device = t->device;
    found = true;
    if (settings_.log > 1 && !(failed && field.role == Role::output)) {
      line << verbose(*t, used_rows(fields_, field, cuda_stream_), cuda_stream_);
    }
  }
  line << ')';
  separator = " -> ";
  for (const Tensor& t : results_) {
    line << separator << describe(t) << (settings_.log > 1 ? verbose(t, {}, cuda_stream_) : "");
    separator = ", ";
  }
  char time[64];
  std::snprintf(time, sizeof time, " %.1f us", microseconds);
  line << ' ' << device_name(device) << time << (device.type == DeviceType::cuda ? " to queue" : "");
  if (failed) line << ", refused";
  if (!file_.empty()) line << ", saved as " << file_;
  print_line(line.str());
}

}  // namespace kvk::record
