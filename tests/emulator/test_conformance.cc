// The emulator's instructions against independent statements of what they do: CUTLASS's fragment layouts, matrix products,
// the compiler's own 16-bit floats. With --json FILE it writes every case and its answer down, for a run on a card.
#include "emulator/conformance.h"

namespace kvk::emu {
namespace {

const std::vector<uint32_t>& in() {
  static const std::vector<uint32_t> words = conformance_input();
  return words;
}

std::vector<uint32_t> run(const std::string& kernel) {
  for (const ConformanceCase& c : conformance_cases()) {
    if (c.expression == "kvk::device::" + kernel) return run_conformance(c);
  }
  throw Error("test", "no case " + kernel);
}

float small(uint32_t word, int shift) { return float(int((word >> shift) % 17) - 8); }

// ---------------------------------------------------------------------------------------------- fragments
// A layout as CuTe writes it (cute/atom/mma_traits_sm80.hpp): (thread, value) to an element of a column-major matrix.
struct Mode {
  int size, stride;
};
int at(const std::vector<Mode>& modes, int index) {
  int offset = 0;
  for (const Mode& mode : modes) {
    offset += index % mode.size * mode.stride;
    index /= mode.size;
  }
  return offset;
}
struct Fragment {
  std::vector<Mode> thread, value;
  int rows;
  int row(int t, int v) const { return (at(thread, t) + at(value, v)) % rows; }
  int column(int t, int v) const { return (at(thread, t) + at(value, v)) / rows; }
};
const Fragment kA16 = {{{4, 32}, {8, 1}}, {{2, 16}, {2, 8}, {2, 128}}, 16};
const Fragment kB16 = {{{4, 16}, {8, 1}}, {{2, 8}, {2, 64}}, 8};
const Fragment kA32 = {{{4, 64}, {8, 1}}, {{4, 16}, {2, 8}, {2, 256}}, 16};
const Fragment kB32 = {{{4, 32}, {8, 1}}, {{4, 8}, {2, 128}}, 8};
const Fragment kC = {{{4, 32}, {8, 1}}, {{2, 16}, {2, 8}}, 16};

void test_mma(const std::string& type) {
  float a[16][16], b[8][16];
  for (int t = 0; t < 32; ++t) {
    for (int v = 0; v < 8; ++v) a[kA16.row(t, v)][kA16.column(t, v)] = small(in()[t * 4 + v / 2], v % 2 * 16);
    for (int v = 0; v < 4; ++v) b[kB16.row(t, v)][kB16.column(t, v)] = small(in()[128 + t * 2 + v / 2], v % 2 * 16);
  }
  const std::vector<uint32_t> out = run("conform_mma_" + type);
  bool same = true;
  for (int t = 0; t < 32; ++t) {
    for (int v = 0; v < 4; ++v) {
      float want = small(in()[256 + t * 4 + v], 3);
      for (int k = 0; k < 16; ++k) want += a[kC.row(t, v)][k] * b[kC.column(t, v)][k];
      same &= std::bit_cast<float>(out[t * 4 + v]) == want;
    }
  }
  expect(same, "mma.m16n8k16 " + type);
}

void test_mma_s8() {
  int a[16][32], b[8][32];
  const auto byte = [](uint32_t word, int i) { return int(int8_t(word >> (8 * i))); };
  for (int t = 0; t < 32; ++t) {
    for (int v = 0; v < 16; ++v) a[kA32.row(t, v)][kA32.column(t, v)] = byte(in()[t * 4 + v / 4], v % 4);
    for (int v = 0; v < 8; ++v) b[kB32.row(t, v)][kB32.column(t, v)] = byte(in()[128 + t * 2 + v / 4], v % 4);
  }
  const std::vector<uint32_t> out = run("conform_mma_s8");
  bool same = true;
  for (int t = 0; t < 32; ++t) {
    for (int v = 0; v < 4; ++v) {
      int want = int(in()[256 + t * 4 + v] >> 8);
      for (int k = 0; k < 32; ++k) want += a[kC.row(t, v)][k] * b[kC.column(t, v)][k];
      same &= int(out[t * 4 + v]) == want;
    }
  }
  expect(same, "mma.m16n8k32 s8");
}

void test_ldmatrix() {
  const std::vector<uint32_t> out = run("conform_ldmatrix");
  const auto element = [&](int row, int column) { return in()[row * 8 + column / 2] >> (column % 2 * 16) & 0xffff; };
  const auto want = [&](int tile, int lane, bool transposed) {
    const int row0 = tile % 2 * 8, column0 = tile / 2 * 8, g = lane / 4, t = lane % 4 * 2;
    return transposed ? element(row0 + t, column0 + g) | element(row0 + t + 1, column0 + g) << 16
                      : element(row0 + g, column0 + t) | element(row0 + g, column0 + t + 1) << 16;
  };
  bool same = true;
  const int start[6] = {0, 32, 64, 128, 192, 320}, tiles[6] = {1, 1, 2, 2, 4, 4};
  for (int form = 0; form < 6; ++form) {
    for (int tile = 0; tile < tiles[form]; ++tile) {
      for (int lane = 0; lane < 32; ++lane) same &= out[start[form] + tile * 32 + lane] == want(tile, lane, form % 2);
    }
  }
  expect(same, "ldmatrix x1, x2, x4, plain and transposed");
}

#if KVK_HAS_WGMMA
// The operands' 8 x 8 blocks of 128 bytes, as conform_wgmma lays them out.
void test_wgmma(int n, const std::string& type, bool transposed) {
  const auto pair = [&](int word, int half) { return small(in()[word], half * 16); };
  const auto a = [&](int m, int k) { return pair(m / 8 * 64 + k / 8 * 32 + m % 8 * 4 + k % 8 / 2, k % 2); };
  const auto b = [&](int column, int k) {
    if (!transposed) return pair(512 + column / 8 * 64 + k / 8 * 32 + column % 8 * 4 + k % 8 / 2, k % 2);
    return pair(512 + k / 8 * 32 * (n / 8) + column / 8 * 32 + k % 8 * 4 + column % 8 / 2, column % 2);
  };
  const std::vector<uint32_t> out =
      run("conform_wgmma<kvk::device::" + type + ", " + std::to_string(n) + ", " + (transposed ? "true>" : "false>"));
  bool same = true;
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < n / 2; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      float product = 0.0f;
      for (int k = 0; k < 16; ++k) product += a(row, k) * b(column, k);
      same &= std::bit_cast<float>(out[t * n + i]) == product + small(in()[i], 5);
      same &= std::bit_cast<float>(out[t * n + n / 2 + i]) == product;
    }
  }
  expect(same, "wgmma " + type + " n " + std::to_string(n) + (transposed ? ", B MN-major" : ""));
}
#endif

// ---------------------------------------------------------------------------------------------- conversions
void test_conversions() {
  const std::vector<uint32_t> out = run("conform_convert");
  // The nearest bf16 keeps 8 significant bits; nearbyint rounds half to even.
  const auto bf16_of = [](float x) -> uint32_t {
    if (std::isnan(x)) return 0x7fff;
    int exponent;
    std::frexp(x, &exponent);
    const int shift = 8 - std::max(exponent, -125);
    const float y = float(std::ldexp(std::nearbyint(std::ldexp(double(x), shift)), -shift));
    return std::isinf(x) ? std::bit_cast<uint32_t>(x) >> 16 : std::bit_cast<uint32_t>(y) >> 16;
  };
  const auto f16_of = [](float x) -> uint32_t {
    return std::isnan(x) ? 0x7fff : std::bit_cast<uint16_t>(static_cast<_Float16>(x));
  };
  bool same = true;
  for (int i = 0; i < 128; ++i) {
    const uint32_t a = in()[i * 2], b = in()[i * 2 + 1], c = (a & 0x807fffff) | ((96 + (a >> 23 & 63)) << 23);
    const float fa = std::bit_cast<float>(a), fb = std::bit_cast<float>(b), fc = std::bit_cast<float>(c);
    same &= out[i] == (bf16_of(fa) | bf16_of(fb) << 16) && out[256 + i] == bf16_of(fa);
    same &= out[128 + i] == (f16_of(fc) | f16_of(fb) << 16) && out[384 + i] == f16_of(fc);
    const float wide = float(std::bit_cast<_Float16>(uint16_t(b)));
    same &= out[512 + i] == (std::isnan(wide) ? 0x7fffffffu : std::bit_cast<uint32_t>(wide));
  }
  expect(same, "conversions of bf16 and f16");
  bool all_codes = true;
  for (uint32_t code = 0; code < 65536; ++code) {
    const float h = f16_value(uint16_t(code)), bf = bf16_value(uint16_t(code));
    all_codes &= std::isnan(h) ? f16_bits(h) == 0x7fff : f16_bits(h) == code;
    all_codes &= std::isnan(bf) ? bf16_bits(bf) == 0x7fff : bf16_bits(bf) == code;
  }
  expect(all_codes, "every 16-bit code there and back");
}

// ---------------------------------------------------------------------------------------------- the rest
void test_functions() {
  const auto close = [](uint32_t got, double want, int log2_error) {
    return std::fabs(double(std::bit_cast<float>(got)) - want) <= std::ldexp(std::fabs(want), log2_error);
  };
  const std::vector<uint32_t> ex2 = run("conform_ex2"), lg2 = run("conform_lg2"), rcp = run("conform_rcp"),
                              rsqrt = run("conform_rsqrt"), tanh = run("conform_tanh_approx");
  bool same = true;
  for (int i = 0; i < 512; ++i) {
    const float f = float(in()[i] >> 8) * (1.0f / 16777216);
    same &= close(ex2[i], std::exp2(double(f * 200.0f - 100.0f)), -21) &&
            close(lg2[i], std::log2(double(f * 1000.0f + 2.0f)), -20);
    same &= close(rcp[i], 1 / double(f * 1000.0f + 0.001f), -22) &&
            close(rsqrt[i], 1 / std::sqrt(double(f * 1000.0f + 0.001f)), -21);
    same &= close(tanh[i], std::tanh(double(f * 8.0f - 4.0f)), -10);
  }
  expect(same, "ex2, lg2, rcp, rsqrt, tanh");
}

void test_copies() {
  const std::vector<uint32_t> out = run("conform_cp_async"), memory = run("conform_memory");
  std::vector<uint32_t> want(in().begin(), in().begin() + 2048);
  for (int i = 0; i < 128; ++i) {
    if (i % 3 == 0) std::fill_n(want.begin() + 512 + i * 4, 4, 0u);
    if (i % 2 == 1) std::fill_n(want.begin() + 1280 + i * 2, 2, 0u);
    if (i % 5 == 0) want[1664 + i] = 0;
    std::copy_n(in().begin() + i * 2, 2, want.begin() + 1792 + i * 2);
  }
  bool same = true;
  for (int i = 0; i < 2048; ++i) same &= out[i] == want[i ^ 32];
  expect(same, "cp.async of 4, 8 and 16 bytes, with zero fill");
  expect(std::equal(memory.begin(), memory.begin() + 1408, in().begin()) && memory[1536] == 127,
         "vector loads, stores, a counter");
}

void test_warp() {
  const std::vector<uint32_t> out = run("conform_warp");
  bool same = true;
  uint32_t odd = 0, sum = 0, high = 0;
  for (int lane = 0; lane < 32; ++lane) {
    odd |= (in()[lane] & 1) << lane;
    sum += in()[lane];
    high = std::max(high, in()[lane]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    same &=
        out[lane] == in()[5] && out[32 + lane] == in()[lane / 8 * 8 + lane * 7 % 8] && out[64 + lane] == in()[lane ^ 9];
    same &= out[160 + lane] == in()[lane % 8 + 3 < 8 ? lane + 3 : lane] &&
            out[224 + lane] == in()[lane % 16 < 2 ? lane : lane - 2];
    same &= out[320 + lane] == odd && out[416 + lane] == sum && out[480 + lane] == high;
    same &= out[384 + lane] == (lane < 16 ? 0xaaaau : odd & 0xffff0000u);
    uint32_t equal = 0;
    for (int other = 0; other < 32; ++other) equal |= uint32_t((in()[other] & 3) == (in()[lane] & 3)) << other;
    same &= out[576 + lane] == equal;
  }
  expect(same, "shuffles, votes, reductions, matches");
}

#if KVK_HAS_TMA
void test_tensor_copies() {
  const auto element = [&](int64_t index) { return in()[index / 2] >> (index % 2 * 16) & 0xffff; };
  for (const ConformanceCase& c : conformance_cases()) {
    if (!c.map.rank) continue;
    const TensorMapContents& m = c.map;
    const int64_t start[3][4] = {{96, -3}, {8, 5, 3}, {32, 2, 1, 1}};
    const std::vector<uint32_t> out = run_conformance(c);
    bool same = true;
    for (int64_t e = 0; e < 4096; ++e) {  // elements of the box, in its order
      int64_t rest = e, from = 0;
      bool inside = true;
      for (uint32_t d = 0; d < m.rank; ++d) {
        const int64_t x = start[m.rank - 2][d] + rest % m.box[d];
        rest /= m.box[d];
        inside &= x >= 0 && x < int64_t(m.dim[d]);
        from += x * int64_t(m.stride_bytes[d]) / 2;
      }
      // The swizzle exchanges 16-byte chunks of a 128-byte line: by the line's number, as far as the pattern is wide.
      const int64_t line = e / 64, chunk = e % 64 / 8;
      const int64_t moved = m.swizzle_bytes == 128  ? chunk ^ line % 8
                            : m.swizzle_bytes == 64 ? chunk ^ line % 4
                                                    : chunk;
      const int64_t to = line * 64 + moved * 8 + e % 8;
      same &= (out[to / 2] >> (to % 2 * 16) & 0xffff) == (inside ? element(from) : 0);
    }
    expect(same, "tensor copy of rank " + std::to_string(m.rank));
  }
  const std::vector<uint32_t> bulk = run("conform_bulk_load");
  expect(std::equal(bulk.begin(), bulk.begin() + 12, in().begin() + 4) &&
             std::equal(bulk.begin() + 12, bulk.end(), in().begin() + 16),
         "bulk copies");
}
#endif

// Cases without a check of their own at least run, and answer the same under every schedule.
void test_schedules() {
  Options& o = options();
  const Options before = o;
  for (const ConformanceCase& c : conformance_cases()) {
    o = before;
    const std::vector<uint32_t> first = run_conformance(c);
    o.order = Options::Order::random;
    o.async = Options::Async::mixed;
    o.seed = 5;
    expect(first == run_conformance(c), c.expression + " under another schedule");
  }
  o = before;
}

void write_words(FILE* file, const char* name, const std::vector<uint32_t>& words) {
  std::fprintf(file, "\"%s\": [", name);
  for (size_t i = 0; i < words.size(); ++i) std::fprintf(file, "%s%u", i ? "," : "", words[i]);
  std::fprintf(file, "]");
}

void write_json(const char* path) {
  FILE* file = std::fopen(path, "w");
  if (!file) throw Error("test", std::string("cannot write ") + path);
  std::fprintf(file, "{");
  write_words(file, "in", in());
  std::fprintf(file, ",\n\"cases\": [");
  bool first = true;
  for (const ConformanceCase& c : conformance_cases()) {
    std::fprintf(file, "%s\n{\"kernel\": \"%s\", \"threads\": %u, \"smem_bytes\": %zu, \"log2_relative_error\": %d, ",
                 first ? "" : ",", c.expression.c_str(), c.threads, c.smem_bytes, c.log2_relative_error);
    first = false;
    if (c.map.rank) {
      std::fprintf(file, "\"map\": {\"swizzle_bytes\": %u, \"dims\": [", c.map.swizzle_bytes);
      for (uint32_t d = 0; d < c.map.rank; ++d) {
        std::fprintf(file, "%s{\"size\": %zu, \"stride_bytes\": %zu, \"box\": %u}", d ? ", " : "", size_t(c.map.dim[d]),
                     size_t(c.map.stride_bytes[d]), c.map.box[d]);
      }
      std::fprintf(file, "]}, ");
    }
    write_words(file, "out", run_conformance(c));
    std::fprintf(file, "}");
  }
  std::fprintf(file, "]}\n");
  std::fclose(file);
}

void test_all() {
  test_mma("bf16");
  test_mma("f16");
  test_mma_s8();
  test_ldmatrix();
#if KVK_HAS_WGMMA
  for (int n : {64, 128, 192, 256}) {
    test_wgmma(n, n == 64 || n == 192 ? "bf16" : "f16", false);
    test_wgmma(n, n == 64 || n == 192 ? "f16" : "bf16", true);
  }
#endif
  test_conversions();
  test_functions();
  test_copies();
  test_warp();
#if KVK_HAS_TMA
  test_tensor_copies();
#endif
  test_schedules();
}

}  // namespace
}  // namespace kvk::emu

int main(int argc, char** argv) {
  return kvk::emu::run_tests([&] {
    if (argc == 3 && std::string(argv[1]) == "--json") {
      kvk::emu::write_json(argv[2]);
    } else {
      kvk::emu::test_all();
    }
  });
}
