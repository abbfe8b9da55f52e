#include "cuda/cubin_cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <set>
#include <string_view>

#include "cuda/log.h"
#include "cuda/sha256.h"

namespace kvk::cuda {
namespace {

namespace fs = std::filesystem;

// A file: this header, then the three parts of the cubin. The length and the checksum are of what follows the header.
struct Header {
  char magic[8];
  char key[64];
  uint64_t length;
  unsigned char checksum[32];
  uint64_t part_lengths[3];  // name, log, image
};
static_assert(sizeof(Header) == 136);

constexpr char kMagic[9] = "KVKCUB01";
constexpr uint64_t kMaximumLength = uint64_t{1} << 30;  // what a damaged length may make us allocate
constexpr auto kAbandoned = std::chrono::hours(1);
constexpr const char* kTemporary = ".tmp";

std::string file_of(const std::string& folder, const std::string& key) { return folder + "/" + key + ".cubin"; }

class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  ~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool open() const { return descriptor_ >= 0; }
  bool read(void* to, size_t size) const {
    for (char* at = static_cast<char*>(to); size > 0;) {
      const ssize_t n = ::read(descriptor_, at, size);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return false;
      at += n;
      size -= static_cast<size_t>(n);
    }
    return true;
  }
  bool write(const void* from, size_t size) const {
    for (const char* at = static_cast<const char*>(from); size > 0;) {
      const ssize_t n = ::write(descriptor_, at, size);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return false;
      at += n;
      size -= static_cast<size_t>(n);
    }
    return true;
  }
  bool close() {  // some file systems report a full disk only here
    const int descriptor = descriptor_;
    descriptor_ = -1;
    return ::close(descriptor) == 0;
  }
  int descriptor() const { return descriptor_; }

 private:
  int descriptor_;
};

// Temporary files of writers that were killed; once per folder and process.
void clear_abandoned(const std::string& folder) {
  static std::mutex mutex;
  static std::set<std::string> cleared;
  {
    const std::lock_guard lock(mutex);
    if (!cleared.insert(folder).second) return;
  }
  std::error_code ignored;
  for (fs::directory_iterator entry(folder, ignored), end; !ignored && entry != end; entry.increment(ignored)) {
    if (entry->path().extension() != kTemporary) continue;
    std::error_code error;
    const auto written = fs::last_write_time(entry->path(), error);
    if (!error && fs::file_time_type::clock::now() - written > kAbandoned) fs::remove(entry->path(), error);
  }
}

// The folders that are missing; private, since whoever can write here can run code on the card in our name.
bool make_folder(const std::string& folder) {
  for (size_t slash = folder.find('/', 1);; slash = folder.find('/', slash + 1)) {
    const std::string part = folder.substr(0, slash);
    if (::mkdir(part.c_str(), 0700) != 0 && errno != EEXIST && slash == std::string::npos) return false;
    if (slash == std::string::npos) return true;
  }
}

bool write_entry(const File& file, const std::string& key, const Cubin& cubin) {
  const std::string_view parts[3] = {cubin.lowered_name, cubin.log, cubin.image};
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof header.magic);
  std::memcpy(header.key, key.data(), sizeof header.key);
  Sha256 hash;
  for (int i = 0; i < 3; ++i) {
    header.part_lengths[i] = parts[i].size();
    header.length += parts[i].size();
    hash.field(parts[i]);
  }
  const Sha256::Digest checksum = hash.finish();
  std::memcpy(header.checksum, checksum.data(), checksum.size());
  if (!file.write(&header, sizeof header)) return false;
  for (const std::string_view part : parts) {
    if (!file.write(part.data(), part.size())) return false;
  }
  return true;
}

bool read_entry(const File& file, const std::string& key, Cubin& cubin) {
  Header header;
  struct stat status;
  if (::fstat(file.descriptor(), &status) != 0 || !file.read(&header, sizeof header)) return false;
  if (std::memcmp(header.magic, kMagic, sizeof header.magic) != 0) return false;
  if (std::memcmp(header.key, key.data(), sizeof header.key) != 0) return false;
  if (header.length > kMaximumLength || static_cast<uint64_t>(status.st_size) != sizeof header + header.length) {
    return false;
  }
  uint64_t sum = 0;
  for (const uint64_t length : header.part_lengths) {
    if (length > header.length) return false;
    sum += length;
  }
  if (sum != header.length) return false;
  std::string* parts[3] = {&cubin.lowered_name, &cubin.log, &cubin.image};
  Sha256 hash;
  for (int i = 0; i < 3; ++i) {
    parts[i]->resize(header.part_lengths[i]);
    if (!file.read(parts[i]->data(), parts[i]->size())) return false;
    hash.field(*parts[i]);
  }
  const Sha256::Digest checksum = hash.finish();
  return std::memcmp(header.checksum, checksum.data(), checksum.size()) == 0;
}

}  // namespace

std::string cache_folder() {
  const char* named = std::getenv("KVK_CACHE");
  if (named != nullptr && *named != '\0') return std::strcmp(named, "off") == 0 ? "" : named;
  const char* xdg = std::getenv("XDG_CACHE_HOME");
  if (xdg != nullptr && *xdg == '/') return std::string(xdg) + "/kvk/cubins";  // its specification wants it absolute
  const char* home = std::getenv("HOME");
  return home != nullptr && *home == '/' ? std::string(home) + "/.cache/kvk/cubins" : "";
}

std::optional<Cubin> load_cubin(const std::string& folder, const std::string& key) {
  if (folder.empty() || key.size() != sizeof Header::key) return std::nullopt;
  const std::string path = file_of(folder, key);
  const File file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file.open()) {
    if (errno != ENOENT) log("cannot read ", path, ": ", std::strerror(errno));
    return std::nullopt;
  }
  Cubin cubin;
  if (read_entry(file, key, cubin)) return cubin;
  log("damaged, will be made again: ", path);
  return std::nullopt;
}

bool store_cubin(const std::string& folder, const std::string& key, const Cubin& cubin) {
  if (folder.empty() || key.size() != sizeof Header::key) return false;
  const auto give_up = [&](const char* what) {
    log("the cache ", folder, " does not take the cubin: ", what, ": ", std::strerror(errno));
    return false;
  };
  if (!make_folder(folder)) return give_up("cannot make the folder");
  clear_abandoned(folder);
  std::string temporary = folder + "/" + key.substr(0, 16) + ".XXXXXX" + kTemporary;
  File file(::mkostemps(temporary.data(), static_cast<int>(std::strlen(kTemporary)), O_CLOEXEC));
  if (!file.open()) return give_up("cannot make a file");
  ::fchmod(file.descriptor(), 0644);
  // No fsync: what a crash of the machine leaves half written, the checksum finds.
  if (write_entry(file, key, cubin) && file.close() && ::rename(temporary.c_str(), file_of(folder, key).c_str()) == 0) {
    return true;
  }
  const int why = errno;
  ::unlink(temporary.c_str());
  errno = why;
  return give_up("cannot write");
}

}  // namespace kvk::cuda
