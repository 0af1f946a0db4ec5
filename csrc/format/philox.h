// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 4 random words from a 128-bit counter and a
// 64-bit key, no state. Word i % 4 of counter i / 4 belongs to element i, on every backend.
#pragma once
#include <cstdint>

namespace peftk {

inline constexpr int kPhiloxRounds = 10;
inline constexpr std::uint32_t kPhiloxFactor0 = 0xD2511F53u,
                               kPhiloxFactor1 = 0xCD9E8D57u;  // scalars: no device code may index them
inline constexpr std::uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;

}  // namespace peftk
