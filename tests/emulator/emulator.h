// Runs kvk's CUDA kernels on the CPU and checks them (docs/emulator.md). This header is for the code around the
// kernels: options, device memory, launches. It defines no CUDA words; cuda_language.h does.
//
// A CUDA thread is a fiber, blocks run one after another on the calling OS thread, and launches of several OS threads
// wait for each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace kvk::emu {

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// What a launch throws. `kind` is a short stable word, for example "race" or "deadlock"; what() says who and where.
struct Error : std::runtime_error {
  std::string kind;
  Error(std::string kind_, const std::string& message) : std::runtime_error(message), kind(std::move(kind_)) {}
};

struct Options {
  enum class Order { in_order, reverse, random };  // which ready thread runs next, and the order of the blocks
  enum class Async { late, early, mixed };         // when an asynchronous copy lands between its issue and its wait
  Order order = Order::in_order;
  Async async = Async::late;
  uint64_t seed = 1;
  size_t stack_bytes = 0;  // of a thread; 0 = 64 KiB, or 256 KiB under ASan
  int arch = 900;          // sets the limit of shared memory
};
// Starts as KVK_EMU_ORDER (in_order, reverse, random), KVK_EMU_ASYNC (late, early, mixed), KVK_EMU_SEED, KVK_EMU_ARCH say.
Options& options();

struct Stats {
  uint64_t launches, blocks, threads, switches, barriers, collectives;
  uint64_t mma, wgmma, ldmatrix, ldmatrix_conflicts;  // conflicts: extra passes that bank conflicts cost
  uint64_t cp_async, bulk_copies;
  uint64_t accesses;                                 // loads and stores that were checked
  uint64_t global_read_bytes, global_written_bytes;  // of those; race builds check all
};
Stats& stats();

// Most shared memory a block may have on options().arch.
size_t max_smem_bytes();

// Whether this build checks every load and store (races, never-written memory); the plain and ASan builds do not.
bool checks_every_access();

// ---------------------------------------------------------------------------------------------- device memory
enum class Use {
  input,   // defined, and no kernel may write it
  in_out,  // defined
  output,  // undefined until a kernel or device_write writes it: outputs, workspaces
};
// 256-byte aligned memory filled with 0xff (NaN in every float type), with guard zones.
void* device_malloc(size_t bytes, Use use, const char* name = "buffer");
void device_free(void* p);
// Makes memory of somebody else known as a device buffer, until abandon(p). It must not overlap another buffer.
void adopt(void* p, size_t bytes, Use use, const char* name = "buffer");
void abandon(void* p);
// adopt for the life of this object; nothing when bytes is 0. Views of one allocation overlap: adopt the allocation once.
class Adopted {
 public:
  Adopted(void* p, size_t bytes, Use use, const char* name) : p_(bytes ? p : nullptr) {
    if (p_) adopt(p_, bytes, use, name);
  }
  ~Adopted() {
    if (p_) abandon(p_);
  }
  Adopted(const Adopted&) = delete;
  Adopted& operator=(const Adopted&) = delete;

 private:
  void* p_;
};
// Copies and fills by the host, outside of launches; the bytes count as written.
void device_write(void* dst, const void* src, size_t bytes);
void device_fill(void* dst, int byte, size_t bytes);
// Bytes of the buffer at p that nobody has written; only where checks_every_access().
size_t unwritten_bytes(const void* p);

// ---------------------------------------------------------------------------------------------- launches
struct LaunchConfig {
  Dim3 grid, block;
  size_t smem_bytes = 0;
};
// A kernel behind a uniform face: calls it with the parameters at `params`.
struct Kernel {
  std::string name;
  void (*call)(const void* params) = nullptr;
  size_t params_bytes = 0;
};
void launch(const Kernel& kernel, const LaunchConfig& config, const void* params);

// A kernel has one parameter, its struct.
template <auto kFunction>
struct KernelOf;
template <class Params, void (*kFunction)(Params)>
struct KernelOf<kFunction> {
  static Kernel get(const std::string& name) {
    return {name, [](const void* params) { kFunction(*static_cast<const Params*>(params)); }, sizeof(Params)};
  }
};

template <auto kFunction, class Params>
void launch_kernel(const char* name, const LaunchConfig& config, const Params& params) {
  const Kernel kernel = KernelOf<kFunction>::get(name);
  launch(kernel, config, &params);
}

// Launch of a kernel named as NVRTC names it, for example "kvk::device::copy<kvk::device::bf16, 8>"; blanks do not
// count. The test binary must hold KVK_EMULATED_KERNEL of that instantiation.
void launch_by_name(const std::string& expression, const LaunchConfig& config, const void* params, size_t params_bytes);
std::vector<std::string> known_kernels();

struct RegisterKernel {
  explicit RegisterKernel(const Kernel& kernel);
};

}  // namespace kvk::emu

#define KVK_EMU_JOIN2(a, b) a##b
#define KVK_EMU_JOIN(a, b) KVK_EMU_JOIN2(a, b)
// At namespace scope: KVK_EMULATED_KERNEL(kvk::device::copy<kvk::device::bf16, 8>);
#define KVK_EMULATED_KERNEL(...)                        \
  static const ::kvk::emu::RegisterKernel KVK_EMU_JOIN( \
      kvk_emulated_kernel_, __COUNTER__)(::kvk::emu::KernelOf<&__VA_ARGS__>::get(#__VA_ARGS__))
// In a function: KVK_EMU_LAUNCH(config, params, kernel<Args...>);
#define KVK_EMU_LAUNCH(config, params, ...) ::kvk::emu::launch_kernel<&__VA_ARGS__>(#__VA_ARGS__, config, params)
