// Tables that find the dynamic 8-bit code nearest to x in [-1, 1] without a search of its 255 thresholds: number of thresholds
// strictly below x, 0 for NaN, as in peftk/format/dynamic8.py.
#pragma once
#include <cstdint>

#include "format/dynamic8.h"

namespace peftk {

// By arithmetic: inside a decade the code is a linear function of |x|, and a binade crosses at most one border of decades.
// Entries of `border` and `lower` are by the low five bits of |x|'s exponent, kFirstBinade8 or more; factor and offset by decade:
// 0 is zero, 1 to 7 are the code's decades, 8 is the value 1. floor(factor * |x| + offset) is the steps from the code of zero, or
// one step less: the line starts a little too low and falls short by one step and a little where the decade ends, since the last
// code's cell reaches beyond the even ones. That is more than any rounding, and no other cell loses more than its own step.
struct Decades8 {
  alignas(64) float border[32];         // the threshold in this binade that parts two decades; +inf without one
  alignas(64) std::uint32_t lower[32];  // the decade below it
  alignas(64) float factor[16], offset[16];
};
inline constexpr int kFirstBinade8 = 127 - 23;  // biased exponent; below it every |x| is nearest to zero

// By look-up: the upper bits of x, sign apart, choose a bucket that holds one threshold at most.
inline constexpr int kBucketShift8 = 16;                                    // 7 bits of the mantissa
inline constexpr std::uint32_t kFirstBucket8 = kFirstBinade8 << 7;          // of |x|'s bits >> kBucketShift8
inline constexpr std::uint32_t kBuckets8 = (127 << 7) - kFirstBucket8 + 1;  // the last one begins at 1
inline constexpr std::uint32_t kNegativeBuckets8 = 3072;                    // where those of negative x begin

struct Nearest8 {
  const Code8* code;
  Decades8 decade;
  std::uint8_t below[2 * kNegativeBuckets8];        // thresholds below all of the bucket; its own may be the next
  alignas(64) std::uint8_t threshold_byte[4][256];  // byte b of each threshold, low ones first
};

const Nearest8& nearest8(bool is_signed);

}  // namespace peftk
