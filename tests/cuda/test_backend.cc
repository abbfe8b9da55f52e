// Ops over the fake driver: what KVK_CHECK=1 adds to a call, and that without it nothing is added.
#include "cases.h"
#include "cuda/backend.h"
#include "kvk/device/append_kv_params.h"
#include "kvk/device/check_values_params.h"

namespace test {
namespace {

using kvk::device::BadValue;

// The card's memory is the test's own: it holds what a check "finds".
class FoundMemory final : public kvk::Allocator {
 public:
  void* allocate(kvk::Device, int64_t bytes) override {
    check_equal(bytes, static_cast<int64_t>(sizeof(BadValue)), "bytes of a check");
    return &found;
  }
  BadValue found;
};

kvk::Tensor tensor(kvk::DType dtype, std::initializer_list<int64_t> shape) {
  kvk::Tensor t;
  t.dtype = dtype;
  t.device = {kvk::DeviceType::cuda, 0};
  for (const int64_t extent : shape) t.shape[t.ndim++] = extent;
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.stride[i] = stride;
    stride *= t.shape[i];
  }
  return t;
}

// append_kv of 3 tokens into 2 pages of 4.
std::string append_error(kvk::Allocator* allocator) {
  setenv("KVK_DEVICE_SOURCES", KVK_INCLUDE, 1);
  kvk::AppendKvArgs args;
  args.k = args.v = tensor(kvk::DType::bf16, {3, 2, 64});
  args.k_pages = args.v_pages = tensor(kvk::DType::bf16, {2, 4, 2, 64});
  args.slot_mapping = tensor(kvk::DType::i64, {3});
  kvk::Context context;
  context.allocator = allocator;
  return error_of([&] { kvk::cuda::append_kv(args, context); });
}

KVK_CASE(append_unchecked) {
  const Fakes fakes;
  fakes.cuda.set("params_size", sizeof(kvk::device::AppendKvParams));
  check_equal(append_error(nullptr), "no error", "append_kv");
  const std::string calls = fakes.cuda.calls();
  check_has(calls, "cuLaunchKernel lowered(kvk::device::append_kv_kernel<2>)", "append_kv");
  for (const char* extra : {"check_slots_kernel", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"}) {
    check_lacks(calls, extra, "append_kv without KVK_CHECK");
  }
}

KVK_CASE(append_checked) {
  setenv("KVK_CHECK", "1", 1);
  const TemporaryCache cache;
  const FakeCuda cuda(
      library("kvk_fake_cuda_old"));  // does not tell sizes of parameters: two kernels of different ones
  const FakeNvrtc nvrtc(library("kvk_fake_nvrtc"));
  FoundMemory memory;
  check_equal(append_error(&memory), "no error", "good slots");
  const std::string calls = cuda.calls();
  const size_t checked = calls.find("cuLaunchKernel lowered(kvk::device::check_slots_kernel<512>)");
  const size_t copied = calls.find("cuMemcpyDtoHAsync_v2"), ran = calls.find("append_kv_kernel<2>) device=0");
  check(checked < copied && copied < ran && ran != std::string::npos,
        "a check, what it found, and then the op:\n" + calls);

  memory.found.kind = BadValue::kSlot;
  memory.found.index = 2;
  memory.found.value = 8;
  check_equal(append_error(&memory), "kvk::append_kv: slot_mapping: token 2 goes to slot 8 of a pool of 2 pages of 4",
              "a bad slot");
  check_lacks(cuda.calls(), "append_kv_kernel", "the op's kernel after a bad slot");
  check_equal(append_error(nullptr),
              "kvk::append_kv: needs " + std::to_string(sizeof(BadValue)) +
                  " bytes on the card, and the context has no allocator",
              "no memory");

  cuda.set("capture", 1);
  check_has(append_error(&memory), "kvk: KVK_CHECK=1 reads back", "captured");
  // What recording reads (csrc/core/dump.h): nothing during a capture, a copy and a wait else.
  char byte = 0;
  const auto read = [&] { kvk::cuda::read_memory({kvk::DeviceType::cuda, 0}, nullptr, &byte, &byte, 1); };
  check_has(error_of(read), "nothing is read from a card while a CUDA graph is being captured", "captured");
  cuda.set("capture", 0);
  cuda.calls();
  check_equal(error_of(read), "no error", "read");
  check_has(cuda.calls(), "cuMemcpyDtoHAsync_v2", "read");
  check_equal(cuda.context_depth(), 0, "context");
}

}  // namespace
}  // namespace test
