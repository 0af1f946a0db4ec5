#include "format/nearest8.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

namespace peftk {
namespace {

constexpr int kDecades = 9;          // zero, seven, one
constexpr double kTooLow = 0x1p-10;  // of a step
constexpr float kInfinite = __builtin_huge_valf();

float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

Decades8 make_decades(const Code8& code, bool is_signed) {
  Decades8 decades{};
  for (float& border : decades.border) border = kInfinite;
  decades.offset[0] = 0.5f;
  int last = 0;
  for (int d = 1; d < kDecades; d++) {
    const double start = code.threshold[code.zero + last];
    const int binade = std::ilogb(start) + 127;
    decades.border[binade % 32] = static_cast<float>(start);
    for (int b = binade + 1; b <= 127; b++) decades.lower[b % 32] = static_cast<std::uint32_t>(d);
    const int first = last + 1, count = d == kDecades - 1 ? 0 : 1 << (is_signed ? d - 1 : d);
    last = count ? last + count : first;
    if (count < 2) {  // one code for all
      decades.offset[d] = static_cast<float>(first) + (count ? 0.5f : -0.5f);
      continue;
    }
    // From the foot of the decade's even cells to its last threshold, which lies beyond them but for the decade below 1.
    const double foot = std::pow(10.0, d - 8), end = code.threshold[code.zero + last];
    const double even = count / (9 * foot), slope = std::min(even, (count - kTooLow) / (end - foot));
    decades.factor[d] = static_cast<float>(slope);
    decades.offset[d] = static_cast<float>(first - kTooLow - slope * foot);
  }
  return decades;
}

int thresholds_below(const Code8& code, float x, bool or_equal) {
  int count = 0;
  while (count < 255 && (code.threshold[count] < x || (or_equal && code.threshold[count] == x))) count++;
  return count;
}

std::unique_ptr<const Nearest8> make_nearest8(bool is_signed) {
  auto made = std::make_unique<Nearest8>();
  const Code8& code = code8(is_signed);
  made->code = &code;
  made->decade = make_decades(code, is_signed);
  for (std::uint32_t b = 0; b < kBuckets8; b++) {
    const float from = b ? float_of((kFirstBucket8 + b) << kBucketShift8) : 0.0f;
    const float to = b + 1 < kBuckets8 ? float_of((kFirstBucket8 + b + 1) << kBucketShift8) : kInfinite;
    made->below[b] = static_cast<std::uint8_t>(thresholds_below(code, from, false));
    made->below[kNegativeBuckets8 + b] = static_cast<std::uint8_t>(thresholds_below(code, -to, true));
  }
  for (int i = 0; i < 256; i++) {
    std::uint32_t bits;
    std::memcpy(&bits, code.threshold + i, 4);
    for (int b = 0; b < 4; b++) made->threshold_byte[b][i] = static_cast<std::uint8_t>(bits >> (8 * b));
  }
  return made;
}

}  // namespace

const Nearest8& nearest8(bool is_signed) {
  static const auto with_sign = make_nearest8(true), without_sign = make_nearest8(false);
  return is_signed ? *with_sign : *without_sign;
}

}  // namespace peftk
