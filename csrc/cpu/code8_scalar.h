// encode8 by look-up.
#pragma once

namespace peftk::PEFTK_TIER {

inline void encode8(const Nearest8& nearest, const F32 (&x)[kGroupVectors8], std::uint8_t* codes) {
  constexpr std::uint32_t last = kBuckets8 - 1;
  for (int i = 0; i < kGroup8; i++) {
    const float value = x[i / kLanes].lane[i % kLanes];
    const std::uint32_t bits = bits_of(value), upper = (bits & 0x7fffffffu) >> kBucketShift8;
    const std::uint32_t above = upper < kFirstBucket8 ? 0 : upper - kFirstBucket8, bucket = above < last ? above : last;
    const std::uint32_t below = nearest.below[bucket + (bits >> 31) * kNegativeBuckets8];
    codes[i] = value == value ? static_cast<std::uint8_t>(below + (value > nearest.code->threshold[below])) : 0;
  }
}

}  // namespace peftk::PEFTK_TIER
