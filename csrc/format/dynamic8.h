// The dynamic 8-bit codes (Dettmers 2015; Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 1.3) that
// double quantisation and the 8-bit optimizers use: for each decade 10^(i-6), the midpoints of evenly spaced points on [0.1, 1].
#pragma once
#include <cstdint>

namespace peftk {

inline constexpr int kStateBlock = 256;  // elements of an optimizer state that share one absmax

struct Code8 {
  float value[256];      // ascending; value[zero] == 0
  float threshold[256];  // 255 used: the largest fp32 that is not above the midpoint, so that a tie goes to the lower code
  int zero;              // 127 (signed) or 0 (unsigned)
  alignas(64) std::uint8_t byte[4][256];  // byte b of each value, low ones first
};

const Code8& code8(bool is_signed);

}  // namespace peftk
