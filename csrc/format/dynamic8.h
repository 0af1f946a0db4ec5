// The dynamic 8-bit codes (Dettmers 2015; Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 1.3) that
// double quantisation and the 8-bit optimizers use: for each decade 10^(i-6), the midpoints of evenly spaced points on [0.1, 1].
#pragma once
#include <algorithm>
#include <cstdint>

namespace peftk {

struct Code8 {
  float value[256];      // ascending; value[zero] == 0
  float threshold[256];  // 255 used: the largest fp32 that is not above the midpoint, so that a tie goes to the lower code
  int zero;              // 127 (signed) or 0 (unsigned)
};

// Point `index` of `points` evenly spaced ones on [0.1, 1], from both ends towards the middle, each rounded once to fp32.
inline float linspace_point(int index, int points) {
  const float start = 0.1f, end = 1.0f, step = (end - start) / static_cast<float>(points - 1);
  const double point =
      index < points / 2 ? start + static_cast<double>(step) * index : end - static_cast<double>(step) * (points - 1 - index);
  return static_cast<float>(point);
}

inline Code8 make_code8(bool is_signed) {
  Code8 code{};
  const double decade[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0};
  int count = 0;
  for (int i = 0; i < 7; i++) {
    const int points = (1 << (is_signed ? i : i + 1)) + 1;
    for (int j = 0; j + 1 < points; j++) {
      const float middle = (linspace_point(j, points) + linspace_point(j + 1, points)) / 2.0f;
      const float value = static_cast<float>(decade[i]) * middle;
      code.value[count++] = value;
      if (is_signed) code.value[count++] = -value;
    }
  }
  code.value[count++] = 0.0f;
  code.value[count++] = 1.0f;
  std::sort(code.value, code.value + 256);
  for (int i = 0; i < 255; i++) {
    const double middle = (static_cast<double>(code.value[i]) + static_cast<double>(code.value[i + 1])) / 2.0;
    float threshold = static_cast<float>(middle);
    if (static_cast<double>(threshold) > middle) threshold = __builtin_nextafterf(threshold, -1e30f);
    code.threshold[i] = threshold;
  }
  code.threshold[255] = __builtin_huge_valf();
  code.zero = is_signed ? 127 : 0;
  return code;
}

inline const Code8& code8(bool is_signed) {
  static const Code8 with_sign = make_code8(true), without_sign = make_code8(false);
  return is_signed ? with_sign : without_sign;
}

}  // namespace peftk
