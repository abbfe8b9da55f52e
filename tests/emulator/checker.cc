#include "emulator/checker.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>

#include "emulator/emulator.h"

namespace kvk::emu {
namespace {

uintptr_t image_base() {
  static const uintptr_t base = [] {
    Dl_info info;
    return dladdr(reinterpret_cast<void*>(&site_of), &info) ? reinterpret_cast<uintptr_t>(info.dli_fbase) : 0;
  }();
  return base;
}

Cell* new_cells(size_t count) {
  void* p =
      mmap(nullptr, count * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<Cell*>(p);  // zero pages: a zero cell is an untouched one
}

// The lines of a code address, innermost inlined function first, as file:line.
std::string lines_of(uintptr_t address) {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(address), &info) || !info.dli_fname) return {};
  char command[1024];
  std::snprintf(command, sizeof command, "addr2line -e '%s' -i 0x%zx 2>/dev/null", info.dli_fname,
                size_t(address) - reinterpret_cast<size_t>(info.dli_fbase));
  FILE* pipe = popen(command, "r");
  if (!pipe) return {};
  std::string out;
  char line[1024];
  while (std::fgets(line, sizeof line, pipe)) {
    std::string text(line);
    text.erase(text.find_last_not_of(" \n") + 1);
    text.erase(std::min(text.find(" (discriminator"), text.size()));
    const size_t slash = text.rfind('/');
    if (slash != text.npos) text.erase(0, slash + 1);
    const bool noise = text.starts_with("cuda_language.h") || text.starts_with("emulator.h") || text.starts_with("??");
    if (noise || out.size() > 160) continue;
    out += (out.empty() ? "" : " < ") + text;
  }
  pclose(pipe);
  return out;
}

}  // namespace

Site site_of(const void* code_address) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(code_address) - image_base();
  return offset < 0xffffffffu ? Site(offset) : 0;
}

std::string describe(Site site) {
  if (!site) return "an unknown place";
  // A return address is past the call; the byte before belongs to it.
  std::string lines = lines_of(image_base() + site - 1);
  if (!lines.empty()) return lines;
  char text[32];
  std::snprintf(text, sizeof text, "code+0x%x", site);
  return text;
}

Shadow::~Shadow() {
  if (cells_) munmap(cells_, count_ * sizeof(Cell));
}

void Shadow::swap(Shadow& other) {
  std::swap(base_, other.base_);
  std::swap(bytes_, other.bytes_);
  std::swap(count_, other.count_);
  std::swap(log2_cell_, other.log2_cell_);
  std::swap(cells_, other.cells_);
}

void Shadow::refine(int log2_cell) {
  const size_t count = (bytes_ >> log2_cell) + 1;
  Cell* finer = new_cells(count);
  if (cells_) {
    const int ratio = log2_cell_ - log2_cell;
    for (size_t i = 0; i < count_; ++i) {
      const Cell& cell = cells_[i];
      if (!cell.epoch && !cell.flags) continue;  // keeps untouched pages untouched
      const size_t first = i << ratio, last = std::min(count, (i + 1) << ratio);
      std::fill(finer + first, finer + last, cell);
    }
    munmap(cells_, count_ * sizeof(Cell));
  }
  cells_ = finer;
  count_ = count;
  log2_cell_ = log2_cell;
}

Shadow::Span Shadow::cells(const void* p, size_t bytes) {
  const size_t at = reinterpret_cast<uintptr_t>(p) - base_;
  const int needed = std::min(4, __builtin_ctzll(at | bytes | 16));
  if (!cells_ || needed < log2_cell_) refine(std::min(needed, log2_cell_));
  return {cells_ + (at >> log2_cell_), cells_ + ((at + bytes) >> log2_cell_)};
}

void Shadow::mark_defined(const void* p, size_t bytes) {
  if (!bytes) return;
  const Span span = cells(p, bytes);
  for (Cell* cell = span.begin; cell != span.end; ++cell) cell->flags |= Cell::kDefined;
}

size_t Shadow::undefined_bytes() {
  if (!cells_) return bytes_;
  size_t undefined = 0;
  for (size_t i = 0; i < count_; ++i) {
    const size_t at = i << log2_cell_;
    if (at < bytes_ && !(cells_[i].flags & Cell::kDefined)) undefined += std::min(cell_bytes(), bytes_ - at);
  }
  return undefined;
}

}  // namespace kvk::emu
