// Every small shape: page sizes 1 to 7, head dims 32 to 256 in steps of 8, 0 to 130 keys. What it looks for are reads and
// writes past an end, so it earns its keep in the sanitizer build (testing.h: buffers end where their elements end).
#include <string>

#include "paged_case.h"

namespace {

using namespace test;
using kvk::DType;

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16};

// Six lengths that step through 0 ... 130 from call to call.
std::vector<int64_t> next_lens(int64_t& next) {
  std::vector<int64_t> lens;
  for (int i = 0; i < 6; ++i) {
    lens.push_back(next);
    next = (next + 1) % 131;
  }
  return lens;
}

void head_dims() {
  int64_t next = 0;
  uint64_t seed = 0;
  for (int64_t page_size = 1; page_size <= 7; ++page_size) {
    for (int64_t head_dim = 32; head_dim <= 256; head_dim += 8) {
      ++seed;
      Spec spec{.dtype = kDTypes[seed % 3], .num_kv_heads = 1 + static_cast<int64_t>(seed % 2), .head_dim = head_dim};
      spec.num_heads = spec.num_kv_heads * (1 + static_cast<int64_t>(seed % 5));
      spec.head_dim_v = seed % 4 ? head_dim : 288 - head_dim;
      spec.page_size = page_size;
      spec.table = static_cast<Table>(seed % 4);
      spec.heads_first = seed % 7 == 0;
      spec.lens = next_lens(next);
      const std::string what = "page size " + std::to_string(page_size) + " head dim " + std::to_string(head_dim);
      Case decode(spec, seed);
      decode.run();
      decode.check(what + " decode");
      for (const int64_t len : spec.lens) spec.tokens.push_back(std::min<int64_t>(len, 1 + seed % 4));
      Case prefill(spec, seed);
      prefill.run(kvk::serial_threads());
      prefill.check(what + " prefill");
    }
  }
}

void lengths() {
  for (const DType dtype : kDTypes) {
    for (int64_t page_size = 1; page_size <= 7; page_size += 2) {
      for (int64_t len = 0; len <= 130; ++len) {
        Spec spec{.dtype = dtype, .num_heads = 2, .num_kv_heads = 1, .head_dim = 32, .head_dim_v = 40};
        spec.page_size = page_size;
        spec.lens = {len};
        const std::string what = std::to_string(len) + " keys";
        Case decode(spec, static_cast<uint64_t>(len));
        decode.run();
        decode.check(what + " decode");
        if (len % 13 != 0) continue;
        spec.tokens = {len + 3};  // three rows see no key
        Case prefill(spec, static_cast<uint64_t>(len));
        prefill.run();
        prefill.check(what + " prefill");
      }
    }
  }
}

}  // namespace

int main() {
  return run([] {
    head_dims();
    lengths();
  });
}
