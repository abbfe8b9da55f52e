// SHA-256 (FIPS 180-4), for the names and checksums of cached cubins.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace kvk::cuda {

class Sha256 {
 public:
  using Digest = std::array<unsigned char, 32>;

  void update(std::string_view bytes);
  // The length, then the bytes: fields cannot run into each other.
  void field(std::string_view bytes);
  Digest finish();  // once

 private:
  void block(const unsigned char* bytes);

  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  unsigned char pending_[64];
  size_t pending_size_ = 0;
  uint64_t total_ = 0;
};

Sha256::Digest sha256(std::string_view bytes);
std::string hex(const Sha256::Digest& digest);

}  // namespace kvk::cuda
