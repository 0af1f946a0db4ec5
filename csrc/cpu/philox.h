// Philox (format/philox.h) by vectors of counters.
#pragma once
#include <cstdint>

#include "cpu/tile.h"
#include "format/philox.h"

namespace peftk::PEFTK_TIER {

struct PhiloxWords {
  U32 word[4];  // a counter in each lane
};

// The words of the counters first .. first + kLanes - 1.
inline PhiloxWords philox(std::uint64_t first, std::uint64_t key) {
  std::uint32_t low[kLanes], high[kLanes];
  for (int i = 0; i < kLanes; i++) {
    low[i] = static_cast<std::uint32_t>(first + static_cast<unsigned>(i));
    high[i] = static_cast<std::uint32_t>((first + static_cast<unsigned>(i)) >> 32);
  }
  U32 c0 = load_cells(low), c1 = load_cells(high), c2 = zero_bits(), c3 = zero_bits();
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; round++, k0 += kPhiloxKeyStep0, k1 += kPhiloxKeyStep1) {
    const WideProduct p0 = multiply_wide(c0, kPhiloxFactor0), p1 = multiply_wide(c2, kPhiloxFactor1);
    c0 = p1.high ^ c1 ^ words(k0);
    c2 = p0.high ^ c3 ^ words(k1);
    c1 = p1.low;
    c3 = p0.low;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace peftk::PEFTK_TIER
