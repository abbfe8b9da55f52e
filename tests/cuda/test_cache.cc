// The cache on disk: what it keeps, and what it does with damage, full disks, other processes and killed writers.
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <sstream>
#include <vector>

#include "cases.h"
#include "cuda/sha256.h"

namespace test {
namespace {

using kvk::cuda::Cubin;
using kvk::cuda::load_cubin;
using kvk::cuda::store_cubin;

std::string key_of(int number) { return kvk::cuda::hex(kvk::cuda::sha256(std::to_string(number))); }

Cubin make_cubin(int number, size_t size = 5000) {
  Cubin cubin;
  Random random(static_cast<uint64_t>(number));
  for (size_t i = 0; i < size; ++i) cubin.image += static_cast<char>(random.bits());
  cubin.lowered_name = "_Zkernel" + std::to_string(number);
  cubin.log = number % 2 ? "" : "two\nlines\n";
  return cubin;
}

bool same(const std::optional<Cubin>& a, const Cubin& b) {
  return a && a->image == b.image && a->lowered_name == b.lowered_name && a->log == b.log;
}

std::string read_file(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

void write_file(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary | std::ios::trunc).write(text.data(), static_cast<std::streamsize>(text.size()));
}

KVK_CASE(sha256) {
  const auto digest = [](const std::string& text) { return kvk::cuda::hex(kvk::cuda::sha256(text)); };
  // FIPS 180-4 examples and the NIST test vectors.
  check_equal(digest(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "empty");
  check_equal(digest("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "abc");
  check_equal(digest("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
              "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1", "448 bits");
  check_equal(
      digest("abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrs"
             "tnopqrstu"),
      "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1", "896 bits");
  check_equal(digest(std::string(1000000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
              "a million");
  // Cut anywhere, the pieces hash as the whole.
  const std::string text(200, 'x');
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    kvk::cuda::Sha256 hash;
    hash.update(text.substr(0, cut));
    hash.update(text.substr(cut));
    check_equal(kvk::cuda::hex(hash.finish()), digest(text), "cut at " + std::to_string(cut));
  }
  kvk::cuda::Sha256 one, two;
  one.field("ab");
  one.field("c");
  two.field("a");
  two.field("bc");
  check(one.finish() != two.finish(), "fields do not run together");
}

KVK_CASE(folder) {
  setenv("HOME", "/home/someone", 1);
  unsetenv("KVK_CACHE");
  unsetenv("XDG_CACHE_HOME");
  check_equal(kvk::cuda::cache_folder(), "/home/someone/.cache/kvk/cubins", "HOME");
  setenv("XDG_CACHE_HOME", "relative", 1);
  check_equal(kvk::cuda::cache_folder(), "/home/someone/.cache/kvk/cubins", "a relative XDG_CACHE_HOME");
  setenv("XDG_CACHE_HOME", "/xdg", 1);
  check_equal(kvk::cuda::cache_folder(), "/xdg/kvk/cubins", "XDG_CACHE_HOME");
  setenv("KVK_CACHE", "/mine", 1);
  check_equal(kvk::cuda::cache_folder(), "/mine", "KVK_CACHE");
  setenv("KVK_CACHE", "off", 1);
  check_equal(kvk::cuda::cache_folder(), "", "off");
  unsetenv("KVK_CACHE");
  unsetenv("XDG_CACHE_HOME");
  unsetenv("HOME");
  check_equal(kvk::cuda::cache_folder(), "", "no home");
  check(!store_cubin("", key_of(1), make_cubin(1)), "no folder");
  check(!load_cubin("", key_of(1)), "no folder");
}

KVK_CASE(round_trip) {
  const TemporaryFolder folder;
  const std::string deep = folder.file("a/b/c");
  check(!load_cubin(deep, key_of(1)), "nothing there");
  for (const size_t size : {size_t{0}, size_t{1}, size_t{5000}, size_t{3000000}}) {
    check(store_cubin(deep, key_of(1), make_cubin(1, size)), "stored");
    check(same(load_cubin(deep, key_of(1)), make_cubin(1, size)), "the last that was stored");
  }
  struct stat status;
  stat(deep.c_str(), &status);
  check_equal(static_cast<int>(status.st_mode & 0777), 0700, "nobody else may write the folder");
  check(!load_cubin(deep, key_of(2)), "another key");
  check(!load_cubin(deep, "../" + key_of(1).substr(3)) && !load_cubin(deep, "short"), "no key");
}

KVK_CASE(damage) {
  const TemporaryFolder folder;
  const Cubin cubin = make_cubin(2, 40);
  store_cubin(folder.path(), key_of(2), cubin);
  const std::string path = folder.file(key_of(2) + ".cubin");
  const std::string good = read_file(path);
  check(same(load_cubin(folder.path(), key_of(2)), cubin), "whole");
  for (size_t size = 0; size < good.size(); ++size) {
    write_file(path, good.substr(0, size));
    check(!load_cubin(folder.path(), key_of(2)), "cut to " + std::to_string(size));
  }
  for (size_t at = 0; at < good.size(); ++at) {
    for (const int flip : {0x01, 0x80}) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ flip);
      write_file(path, bad);
      check(!load_cubin(folder.path(), key_of(2)), "byte " + std::to_string(at));
    }
  }
  write_file(path, good + "x");
  check(!load_cubin(folder.path(), key_of(2)), "one byte more");
  write_file(path, std::string(good.size(), '\0'));
  check(!load_cubin(folder.path(), key_of(2)), "zeros");
  write_file(folder.file(key_of(3) + ".cubin"), good);
  check(!load_cubin(folder.path(), key_of(3)), "the file of another key");
  std::filesystem::remove(path);
  std::filesystem::create_directory(path);
  check(!load_cubin(folder.path(), key_of(2)), "a folder in its place");
  std::filesystem::remove(path);

  // Found damaged, it is made again and replaced.
  const Fakes fakes;
  const std::string key = kvk::cuda::get_cubin(kernel(1), "sm_90a").key;
  const std::string entry = fakes.cache.file(key + ".cubin");
  const std::string whole = read_file(entry);
  for (const std::string& bad : {std::string(), whole.substr(0, whole.size() - 1), "junk" + whole.substr(4)}) {
    write_file(entry, bad);
    setenv("KVK_LOG", "1", 1);
    const std::string log = stderr_of([&] {  // in a process that does not have it in memory
      const int child = fork();
      if (child == 0) {
        setenv("KVK_NVRTC_FLAGS", "", 1);
        _exit(execl("/proc/self/exe", "kvk_test_cuda", "compile_one", static_cast<char*>(nullptr)));
      }
      int status = 0;
      waitpid(child, &status, 0);
      check_equal(status, 0, "child");
    });
    unsetenv("KVK_LOG");
    check_has(log, "kvk: damaged, will be made again: " + entry, "log");
    check_has(log, "kvk: compiled: kvk::device::probe<1>", "log");
    check(read_file(entry) == whole, "replaced");
  }
}

// Part of the cases that want a second process: compiles into the cache of the environment.
KVK_CASE(compile_one) {
  TemporaryFolder none;  // alone, not to fill the user's cache
  if (std::getenv("KVK_NVRTC") == nullptr) {
    setenv("KVK_NVRTC", library("kvk_fake_nvrtc").c_str(), 1);
    setenv("KVK_CACHE", none.path().c_str(), 1);
  }
  check(kvk::cuda::get_cubin(kernel(1), "sm_90a").cubin != nullptr, "compiled or found");
}

KVK_CASE(unwritable) {
  const TemporaryFolder folder;
  write_file(folder.file("file"), "x");
  for (const std::string& bad : {folder.file("file"), folder.file("file/below"), std::string("/proc/kvk/cubins"),
                                 std::string("/dev/null/kvk"), std::string("/sys/kvk")}) {
    check(!store_cubin(bad, key_of(1), make_cubin(1)), bad);
    check(!load_cubin(bad, key_of(1)), bad);
  }
  // Compiling goes on without the cache.
  const FakeNvrtc nvrtc(library("kvk_fake_nvrtc"));
  setenv("KVK_CACHE", folder.file("file/below").c_str(), 1);
  check(kvk::cuda::get_cubin(kernel(1), "sm_90a").origin == kvk::cuda::Origin::compiled, "compiled");
  if (geteuid() != 0) {
    chmod(folder.path().c_str(), 0500);
    check(!store_cubin(folder.path(), key_of(1), make_cubin(1)), "read-only folder");
    chmod(folder.path().c_str(), 0700);
  }
}

// A write that fails midway, as on a full disk: a limit on the size of files does the same to write().
KVK_CASE(full_disk) {
  const TemporaryFolder folder;
  const Cubin small = make_cubin(1, 100);
  check(store_cubin(folder.path(), key_of(1), small), "before");
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit limit{};
  getrlimit(RLIMIT_FSIZE, &limit);
  const rlimit tight{2000, limit.rlim_max};
  setrlimit(RLIMIT_FSIZE, &tight);
  setenv("KVK_LOG", "1", 1);
  std::string log;
  for (int i = 0; i < 2; ++i) {
    const bool stored = store_cubin(folder.path(), key_of(1 + i), make_cubin(3, 100000));
    check(!stored, "full");
  }
  setrlimit(RLIMIT_FSIZE, &limit);
  check(same(load_cubin(folder.path(), key_of(1)), small), "what was there stays");
  check(!load_cubin(folder.path(), key_of(2)), "nothing half written");
  check_equal(folder.count(".tmp"), 0, "temporary files");
  check_equal(folder.count(".cubin"), 1, "files");
}

KVK_CASE(abandoned) {
  const TemporaryFolder folder;
  write_file(folder.file("0123456789abcdef.AAAAAA.tmp"), "old");
  write_file(folder.file("0123456789abcdef.BBBBBB.tmp"), "in work");
  write_file(folder.file("other.txt"), "not ours");
  const auto old = std::filesystem::file_time_type::clock::now() - std::chrono::hours(2);
  std::filesystem::last_write_time(folder.file("0123456789abcdef.AAAAAA.tmp"), old);
  std::filesystem::last_write_time(folder.file("other.txt"), old);
  check(store_cubin(folder.path(), key_of(1), make_cubin(1)), "stored");
  check(!std::filesystem::exists(folder.file("0123456789abcdef.AAAAAA.tmp")), "an old one is cleared away");
  check(std::filesystem::exists(folder.file("0123456789abcdef.BBBBBB.tmp")), "one that may be in work is not");
  check(std::filesystem::exists(folder.file("other.txt")), "other files are left alone");
}

// Several processes write and read the same few entries at once: a reader sees a whole one of its key, or none.
KVK_CASE(processes) {
  const TemporaryFolder folder;
  constexpr int kProcesses = 4, kKeys = 3;
  std::vector<int> children;
  for (int p = 0; p < kProcesses; ++p) {
    const int child = fork();
    if (child == 0) {
      int bad = 0, found = 0;
      for (int i = 0; i < 60; ++i) {
        const int n = (i + p) % kKeys;
        if (!store_cubin(folder.path(), key_of(n), make_cubin(n, 20000))) ++bad;
        const int m = (i + 2 * p) % kKeys;
        const auto cubin = load_cubin(folder.path(), key_of(m));
        if (cubin) ++found;
        if (cubin && !same(cubin, make_cubin(m, 20000))) ++bad;
      }
      _exit(bad == 0 && found > 0 ? 0 : 1);
    }
    children.push_back(child);
  }
  for (const int child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    check_equal(status, 0, "process");
  }
  check_equal(folder.count(".cubin"), kKeys, "entries");
  check_equal(folder.count(".tmp"), 0, "temporary files");
}

// Writers killed at any moment leave whole entries and at most their one temporary file.
KVK_CASE(killed_writers) {
  const TemporaryFolder folder;
  constexpr int kWriters = 12;
  int killed = 0;
  for (int w = 0; w < kWriters; ++w) {
    const int child = fork();
    if (child == 0) {
      for (int n = 0;; n = (n + 1) % 4) store_cubin(folder.path(), key_of(n), make_cubin(n, 400000));
    }
    usleep(static_cast<useconds_t>(3000 + 2311 * w));
    kill(child, SIGKILL);
    int status = 0;
    waitpid(child, &status, 0);
    killed += WIFSIGNALED(status);
  }
  check_equal(killed, kWriters, "killed");
  for (int n = 0; n < 4; ++n) {
    const bool there = std::filesystem::exists(folder.file(key_of(n) + ".cubin"));
    check(there == same(load_cubin(folder.path(), key_of(n)), make_cubin(n, 400000)), "entry " + std::to_string(n));
  }
  check(folder.count(".tmp") <= kWriters, "temporary files");
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
    std::filesystem::last_write_time(entry.path(),
                                     std::filesystem::file_time_type::clock::now() - std::chrono::hours(2));
  }
  check(store_cubin(folder.path(), key_of(9), make_cubin(9)), "a later writer");
  check_equal(folder.count(".tmp"), 0, "temporary files after it");
}

}  // namespace
}  // namespace test
