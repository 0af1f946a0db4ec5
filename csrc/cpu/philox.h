// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 4 random words from a 128-bit counter and a
// 64-bit key, no state. Word i % 4 of counter i / 4 belongs to element i, on every backend.
#pragma once
#include <cstdint>

namespace peftk::PEFTK_TIER {

inline constexpr int kPhiloxLanes = 16;  // counters computed side by side, so that the compiler can use vectors

struct PhiloxWords {
  std::uint32_t word[4][kPhiloxLanes];
};

inline PhiloxWords philox(std::uint64_t first_counter, std::uint64_t key) {
  PhiloxWords c;
  for (int i = 0; i < kPhiloxLanes; i++) {
    c.word[0][i] = static_cast<std::uint32_t>(first_counter + i);
    c.word[1][i] = static_cast<std::uint32_t>((first_counter + i) >> 32);
    c.word[2][i] = c.word[3][i] = 0;
  }
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < kPhiloxLanes; i++) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c.word[0][i], p1 = std::uint64_t{0xCD9E8D57u} * c.word[2][i];
      const std::uint32_t w0 = static_cast<std::uint32_t>(p1 >> 32) ^ c.word[1][i] ^ k0;
      const std::uint32_t w2 = static_cast<std::uint32_t>(p0 >> 32) ^ c.word[3][i] ^ k1;
      c.word[1][i] = static_cast<std::uint32_t>(p1);
      c.word[3][i] = static_cast<std::uint32_t>(p0);
      c.word[0][i] = w0;
      c.word[2][i] = w2;
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace peftk::PEFTK_TIER
