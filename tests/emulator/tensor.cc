// ldmatrix and mma.sync, and the byte instructions. Fragment layouts are those of the PTX ISA.
#include <cstring>

#include "emulator/scheduler.h"

namespace kvk::emu {
namespace {

struct LdmatrixLane {
  const void* row;
  uint32_t* r;
  int count;
  bool transposed;
  Loc loc;
  Site site;
};

void run_ldmatrix(void* const* argument, uint32_t) {
  Block& b = *current_block;
  const auto lane_at = [&](int lane) -> LdmatrixLane& { return *static_cast<LdmatrixLane*>(argument[lane]); };
  const LdmatrixLane& first = lane_at(0);
  const unsigned first_thread = current_thread->index - current_thread->lane;
  stats().ldmatrix++;
  for (int tile = 0; tile < first.count; ++tile) {
    const uint16_t* row[8];
    int uses_of_bank[8] = {};
    for (int r = 0; r < 8; ++r) {
      const int lane = tile * 8 + r;
      const LdmatrixLane& a = lane_at(lane);
      if (!in_smem(a.row)) KVK_EMU_FAIL("address", "a row of ldmatrix at " + where(a.loc) + " is not in shared memory");
      if (reinterpret_cast<uintptr_t>(a.row) % 16) {
        KVK_EMU_FAIL("misaligned", "a row of ldmatrix at " + where(a.loc) + " is not on a multiple of 16 bytes");
      }
      const unsigned thread = first_thread + unsigned(lane);
      check_shared_as(thread, KVK_EMU_RACE ? b.clock(thread) : nullptr, a.row, 16, Access::read, a.loc, a.site);
      if (uses_of_bank[smem_offset(a.row) >> 4 & 7]++) stats().ldmatrix_conflicts++;
      row[r] = static_cast<const uint16_t*>(a.row);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t low = first.transposed ? row[t][g] : row[g][t];
      const uint32_t high = first.transposed ? row[t + 1][g] : row[g][t + 1];
      lane_at(lane).r[tile] = low | high << 16;
    }
  }
}

struct MmaLane {
  void* d;
  const uint32_t* a;
  uint32_t b[2];
  bool is_bf16;
};

// Element i of a fragment of 16-bit elements: its word and half.
uint16_t half_of(const uint32_t* words, int i) { return uint16_t(words[i / 2] >> (i % 2 * 16)); }
int8_t byte_of(const uint32_t* words, int i) { return int8_t(words[i / 4] >> (i % 4 * 8)); }

void run_mma_16(void* const* argument, uint32_t) {
  static thread_local float a[16][16], b[16][8], d[16][8];
  stats().mma++;
  for (int lane = 0; lane < 32; ++lane) {
    const auto& m = *static_cast<const MmaLane*>(argument[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 8; ++i) a[g + i / 2 % 2 * 8][t + i % 2 + i / 4 * 8] = value_of(half_of(m.a, i), m.is_bf16);
    for (int i = 0; i < 4; ++i) b[t + i % 2 + i / 2 * 8][g] = value_of(half_of(m.b, i), m.is_bf16);
  }
  std::memset(d, 0, sizeof d);
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* out = static_cast<float*>(static_cast<MmaLane*>(argument[lane])->d);
    for (int i = 0; i < 4; ++i) out[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

void run_mma_s8(void* const* argument, uint32_t) {
  static thread_local int32_t a[16][32], b[32][8], d[16][8];
  stats().mma++;
  for (int lane = 0; lane < 32; ++lane) {
    const auto& m = *static_cast<const MmaLane*>(argument[lane]);
    const int g = lane / 4, t = lane % 4 * 4;
    for (int i = 0; i < 16; ++i) a[g + i / 4 % 2 * 8][t + i % 4 + i / 8 * 16] = byte_of(m.a, i);
    for (int i = 0; i < 8; ++i) b[t + i % 4 + i / 4 * 16][g] = byte_of(m.b, i);
  }
  std::memset(d, 0, sizeof d);
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 32; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* out = static_cast<int32_t*>(static_cast<MmaLane*>(argument[lane])->d);
    for (int i = 0; i < 4; ++i) {
      out[i] = int32_t(uint32_t(out[i]) + uint32_t(d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]));
    }
  }
}

}  // namespace

void ldmatrix(uint32_t* r, const void* row, int count, bool transposed, Loc loc) {
  LdmatrixLane lane{row, r, count, transposed, loc, site_of(__builtin_return_address(0))};
  collective(0xffffffffu, Collective::ldmatrix, loc, &lane, run_ldmatrix);
}

void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool is_bf16, Loc loc) {
  MmaLane lane{d, a, {b0, b1}, is_bf16};
  collective(0xffffffffu, Collective::mma, loc, &lane, run_mma_16);
}

void mma_m16n8k32_s8(int32_t* d, const uint32_t* a, uint32_t b0, uint32_t b1, Loc loc) {
  MmaLane lane{d, a, {b0, b1}, false};
  collective(0xffffffffu, Collective::mma, loc, &lane, run_mma_s8);
}

uint32_t prmt(uint32_t lo, uint32_t hi, uint32_t selector, Loc loc) {
  const uint64_t bytes = uint64_t{hi} << 32 | lo;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> (4 * i) & 15;
    if (pick & 8) KVK_EMU_FAIL("prmt", "sign replication in a selector of prmt at " + where(loc) + " is not emulated");
    y |= uint32_t(bytes >> (8 * pick) & 255) << (8 * i);
  }
  return y;
}

}  // namespace kvk::emu
