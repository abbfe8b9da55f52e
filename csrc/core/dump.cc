// Dumps: safetensors, the rows of pools that a call does not look at left out as holes of the file, so that they take no
// room on the disk and read as zeros.
#include "core/dump.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <optional>
#include <sstream>

#include "core/check.h"
#include "core/json.h"
#include "core/paged_problem.h"
#include "cuda/backend.h"
#include "kvk/api.h"

namespace kvk::record {
namespace {

const char* safetensors_name(DType dtype) {
  switch (dtype) {
    case DType::f64: return "F64";
    case DType::f32: return "F32";
    case DType::bf16: return "BF16";
    case DType::f16: return "F16";
    case DType::i64: return "I64";
    case DType::i32: return "I32";
    case DType::i16: return "I16";
    case DType::i8: return "I8";
    case DType::u8: return "U8";
    case DType::boolean: return "BOOL";
    case DType::other: break;
  }
  return nullptr;
}

const Tensor* tensor_of(const Field& field) { return std::get_if<Tensor>(&field.value); }

const Tensor* find(const Fields& fields, const char* name) {
  for (const Field& field : fields) {
    if (field.name == name) return tensor_of(field);
  }
  return nullptr;
}

// Which pools an index argument names rows of, and how.
enum class Index { plain, tag0, tag1, slot };
struct IndexRule {
  const char* pool;
  const char* indices;
  Index how;
  const char* with = nullptr;  // only where the op has this argument, too
};
constexpr IndexRule kIndexRules[] = {
    {"k_pool", "page_indices", Index::tag0},
    {"v_pool", "page_indices", Index::tag0},
    {"k_pages", "page_indices", Index::tag1, "k_pool"},
    {"v_pages", "page_indices", Index::tag1, "k_pool"},
    {"k_pages", "page_indices", Index::plain},
    {"v_pages", "page_indices", Index::plain},
    {"k_pages", "src", Index::plain},
    {"v_pages", "src", Index::plain},
    {"k_pool", "dst", Index::plain},
    {"v_pool", "dst", Index::plain},
    {"k_pool", "ids", Index::plain},
    {"v_pool", "ids", Index::plain},
    {"k_pages", "slot_mapping", Index::slot},
    {"v_pages", "slot_mapping", Index::slot},
};

std::vector<int64_t> integers(const Tensor& t, void* cuda_stream) {
  std::vector<int64_t> values;
  if (t.dtype != DType::i32 && t.dtype != DType::i64) return values;
  for_each_chunk(t, {}, cuda_stream, [&](int64_t, const char* data, int64_t bytes) {
    const int64_t size = element_size(t.dtype);
    for (int64_t at = 0; at < bytes; at += size) {
      int64_t wide = 0;
      int32_t narrow = 0;
      if (size == 8) std::memcpy(&wide, data + at, 8);
      if (size == 4) std::memcpy(&narrow, data + at, 4);
      values.push_back(size == 8 ? wide : narrow);
    }
  });
  return values;
}

struct Piece {  // a tensor of the file
  const Field* field;
  const Tensor* tensor;
  Rows rows;
  int64_t begin, bytes;  // within the data
  int64_t stored() const { return rows.all ? bytes : static_cast<int64_t>(rows.rows.size()) * row_bytes(*tensor); }
};

std::string numbers(const int64_t* list, size_t n) {
  std::ostringstream text;
  for (size_t i = 0; i < n; ++i) text << (i ? "," : "[") << list[i];
  text << (n == 0 ? "[]" : "]");
  return text.str();
}

struct JsonText {
  std::string operator()(std::monostate) const { return "null"; }
  std::string operator()(const Tensor& t) const {
    const size_t n = static_cast<size_t>(t.ndim);
    std::ostringstream text;
    text << "{\"tensor\":" << json_quoted(dtype_name(t.dtype)) << ",\"shape\":" << numbers(t.shape, n)
         << ",\"stride\":" << numbers(t.stride, n) << ",\"device\":" << json_quoted(device_name(t.device))
         << ",\"alignment\":" << reinterpret_cast<uintptr_t>(t.data) % 64 << "}";
    return text.str();
  }
  std::string operator()(bool x) const { return x ? "true" : "false"; }
  std::string operator()(int64_t x) const { return std::to_string(x); }
  std::string operator()(double x) const {  // hexadecimal: every bit, and infinities and NaN too
    char text[64];
    std::snprintf(text, sizeof text, "{\"float\":\"%a\"}", x);
    return text;
  }
  std::string operator()(const std::string& x) const {
    std::ostringstream text;
    text << "{\"name\":" << json_quoted(x) << "}";
    return text.str();
  }
  std::string operator()(const std::vector<int64_t>& x) const { return numbers(x.data(), x.size()); }
};

std::string call_json(const Fields& fields) {
  std::ostringstream text;
  const char* separator = "[";
  for (const Field& field : fields) {
    const char* role = field.role == Role::input ? "input" : field.role == Role::in_out ? "in_out" : "output";
    text << separator << "{\"argument\":" << json_quoted(field.name) << ",\"role\":\"" << role
         << "\",\"value\":" << std::visit(JsonText{}, field.value) << "}";
    separator = ",";
  }
  text << "]";
  return text.str();
}

std::string header_json(const std::string& op, const std::string& overload, const Fields& fields,
                        const std::vector<Piece>& pieces) {
  std::ostringstream text;
  text << "{\"__metadata__\":{\"format\":\"kvk.call.1\",\"kvk\":" << json_quoted(version())
       << ",\"op\":" << json_quoted(op) << ",\"overload\":" << json_quoted(overload)
       << ",\"cpu_level\":" << json_quoted(cpu_level()) << ",\"call\":" << json_quoted(call_json(fields)) << "}";
  for (const Piece& piece : pieces) {
    text << "," << json_quoted(piece.field->name) << ":{\"dtype\":\"" << safetensors_name(piece.tensor->dtype)
         << "\",\"shape\":" << numbers(piece.tensor->shape, static_cast<size_t>(piece.tensor->ndim))
         << ",\"data_offsets\":[" << piece.begin << "," << piece.begin + piece.bytes << "]}";
  }
  text << "}";
  std::string header = text.str();
  header.append((128 - 8 - header.size() % 64) % 64, ' ');  // data on a multiple of 64 bytes
  return header;
}

// A file under a name that no reader takes for a dump, until it is whole and on the disk.
class NewFile {
 public:
  explicit NewFile(const std::filesystem::path& path) : path_(path), temporary_(path.parent_path()) {
    std::string name = path.filename().string();
    name.insert(name.begin(), '.');
    temporary_ /= name.append(".tmp");
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd_ < 0) fail("open");
  }
  ~NewFile() {
    if (fd_ >= 0) {
      ::close(fd_);
      ::unlink(temporary_.c_str());
    }
  }
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  void write(const void* data, size_t bytes, int64_t at) {
    const char* from = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t done = ::pwrite(fd_, from, bytes, at);
      if (done < 0 && errno == EINTR) continue;
      if (done <= 0) fail("write");
      from += done;
      at += done;
      bytes -= static_cast<size_t>(done);
    }
  }
  void resize(int64_t bytes) {
    if (::ftruncate(fd_, bytes) != 0) fail("ftruncate");
  }
  void publish() {
    if (::fsync(fd_) != 0) fail("fsync");
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail("rename");
    ::close(fd_);
    fd_ = -1;
    const int folder = ::open(path_.parent_path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) return;
    ::fsync(folder);  // the name, too; where the file system cannot, the data are safe all the same
    ::close(folder);
  }

 private:
  [[noreturn]] void fail(const char* what) {
    throw Error(std::string(what) + " of " + temporary_.string() + ": " + std::strerror(errno));
  }
  std::filesystem::path path_, temporary_;
  int fd_ = -1;
};

// What keeps a file of `bytes` out of the folder; null: nothing.
const char* over_bounds(const Settings& settings, int64_t bytes) {
  int64_t files = 0, used = 0;
  for (const auto& entry : std::filesystem::directory_iterator(settings.dump)) {
    struct stat status = {};
    if (entry.path().extension() != ".safetensors" || ::stat(entry.path().c_str(), &status) != 0) continue;
    ++files;
    used += int64_t{status.st_blocks} * 512;
  }
  if (files >= settings.dump_calls) return "KVK_DUMP_CALLS";
  return used + bytes > settings.dump_bytes ? "KVK_DUMP_BYTES" : nullptr;
}

}  // namespace

void read_memory(const Tensor& t, void* cuda_stream, void* host, const void* from, size_t bytes) {
  switch (t.device.type) {
    case DeviceType::cpu: std::memcpy(host, from, bytes); return;
    case DeviceType::cuda: cuda::read_memory(t.device, cuda_stream, host, from, bytes); return;
    case DeviceType::other: throw Error("memory of an unknown device");
  }
}

int64_t row_bytes(const Tensor& t) {
  int64_t n = element_size(t.dtype);
  for (int i = 1; i < t.ndim; ++i) n *= t.shape[i];
  return n;
}

namespace {

// Elements of row `row`, densely packed into `to`.
void read_row(const Tensor& t, int64_t row, void* cuda_stream, char* to) {
  const int64_t size = element_size(t.dtype), count = row_bytes(t) / size;
  const char* begin = static_cast<const char*>(t.data) + (t.ndim == 0 ? 0 : row * t.stride[0] * size);
  int64_t low = 0, high = 0;  // reach of the row, in elements
  for (int i = 1; i < t.ndim; ++i) (t.stride[i] < 0 ? low : high) += (t.shape[i] - 1) * t.stride[i];
  std::vector<char> copied;
  if (t.device.type != DeviceType::cpu) {
    copied.resize(static_cast<size_t>((high - low + 1) * size));
    read_memory(t, cuda_stream, copied.data(), begin + low * size, copied.size());
    begin = copied.data() - low * size;
  }
  int64_t at[kMaxDims] = {};
  for (int64_t i = 0; i < count; ++i) {
    int64_t offset = 0;
    for (int d = 1; d < t.ndim; ++d) offset += at[d] * t.stride[d];
    std::memcpy(to + i * size, begin + offset * size, static_cast<size_t>(size));
    for (int d = t.ndim - 1; d > 0 && ++at[d] == t.shape[d]; --d) at[d] = 0;
  }
}

// Rows follow each other, and their elements, without gaps.
bool is_dense(const Tensor& t) {
  int64_t step = 1;
  for (int i = t.ndim - 1; i >= 0; step *= t.shape[i--]) {
    if (t.shape[i] != 1 && t.stride[i] != step) return false;
  }
  return true;
}

}  // namespace

void read_rows(const Tensor& t, int64_t first, int64_t count, void* cuda_stream, char* to) {
  const int64_t bytes = row_bytes(t);
  if (is_dense(t)) {
    const char* from = static_cast<const char*>(t.data) + first * bytes;
    return read_memory(t, cuda_stream, to, from, static_cast<size_t>(count * bytes));
  }
  for (int64_t i = 0; i < count; ++i) read_row(t, first + i, cuda_stream, to + i * bytes);
}

Rows used_rows(const Fields& fields, const Field& pool, void* cuda_stream) {
  const Tensor& t = std::get<Tensor>(pool.value);
  for (const IndexRule& rule : kIndexRules) {
    const Tensor* indices = pool.name == rule.pool ? find(fields, rule.indices) : nullptr;
    if (indices == nullptr || t.ndim < 2 || (rule.with != nullptr && find(fields, rule.with) == nullptr)) continue;
    Rows used{false, {}};
    for (const int64_t value : integers(*indices, cuda_stream)) {
      int64_t row = value;
      const PageReference reference(value);
      if (rule.how == Index::tag0 || rule.how == Index::tag1) {
        if (reference.tag != (rule.how == Index::tag1)) continue;
        row = reference.page;
      } else if (rule.how == Index::slot) {
        row = value < 0 ? -1 : value / std::max<int64_t>(1, t.shape[1]);
      }
      if (row >= 0 && row < t.shape[0]) used.rows.push_back(row);  // others are not looked at, or refused
    }
    std::sort(used.rows.begin(), used.rows.end());
    used.rows.erase(std::unique(used.rows.begin(), used.rows.end()), used.rows.end());
    return used;
  }
  return {};
}

std::string write_dump(const Settings& settings, const std::string& op, const std::string& overload,
                       const Fields& fields, void* cuda_stream) {
  std::vector<Piece> pieces;
  for (const Field& field : fields) {
    const Tensor* t = tensor_of(field);
    if (t == nullptr || field.role == Role::output || safetensors_name(t->dtype) == nullptr) continue;
    pieces.push_back({&field, t, used_rows(fields, field, cuda_stream), 0, t->numel() * element_size(t->dtype)});
  }
  // The format allows no padding: tensors of whole 64 bytes come first, so that all of those lie on 64 bytes in the file.
  std::stable_partition(pieces.begin(), pieces.end(), [](const Piece& piece) { return piece.bytes % 64 == 0; });
  int64_t end = 0, stored = 0;
  for (Piece& piece : pieces) {
    piece.begin = end;
    end += piece.bytes;
    stored += piece.stored();
  }
  std::filesystem::create_directories(settings.dump);
  if (const char* bound = over_bounds(settings, stored)) {
    static std::atomic<int> said{0};
    if (said.fetch_add(1) == 0) {
      std::fprintf(stderr, "kvk: %s: %lld bytes are over %s; such calls are not saved from here on\n", op.c_str(),
                   static_cast<long long>(stored), bound);
    }
    return {};
  }
  static std::atomic<int> count{0};
  char name[128];
  std::snprintf(name, sizeof name, "%d-%06d-%s.safetensors", static_cast<int>(::getpid()), count.fetch_add(1),
                op.c_str());
  const std::filesystem::path path = std::filesystem::path(settings.dump) / name;
  NewFile file(path);
  const std::string header = header_json(op, overload, fields, pieces);
  const uint64_t header_bytes = header.size();
  unsigned char length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(header_bytes >> (8 * i));
  file.write(length, 8, 0);
  file.write(header.data(), header.size(), 8);
  const int64_t data = 8 + static_cast<int64_t>(header_bytes);
  file.resize(data + end);
  for (const Piece& piece : pieces) {
    if (piece.bytes == 0) continue;
    for_each_chunk(*piece.tensor, piece.rows, cuda_stream, [&](int64_t offset, const char* from, int64_t bytes) {
      file.write(from, static_cast<size_t>(bytes), data + piece.begin + offset);
    });
  }
  file.publish();
  return path.string();
}

}  // namespace kvk::record
