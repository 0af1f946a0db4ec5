#include "format/dynamic8.h"

#include <algorithm>
#include <cstring>

namespace peftk {
namespace {

// Point `index` of `points` evenly spaced ones on [0.1, 1], from both ends towards the middle, each rounded once to fp32.
float linspace_point(int index, int points) {
  const double start = 0.1f, end = 1.0, step = (1.0f - 0.1f) / static_cast<float>(points - 1);
  const double point = index < points / 2 ? start + step * index : end - step * (points - 1 - index);
  return static_cast<float>(point);
}

Code8 make_code8(bool is_signed) {
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
  for (int i = 0; i < 256; i++) {
    std::uint32_t bits;
    std::memcpy(&bits, code.value + i, 4);
    for (int b = 0; b < 4; b++) code.byte[b][i] = static_cast<std::uint8_t>(bits >> (8 * b));
  }
  return code;
}

}  // namespace

const Code8& code8(bool is_signed) {
  static const Code8 with_sign = make_code8(true), without_sign = make_code8(false);
  return is_signed ? with_sign : without_sign;
}

}  // namespace peftk
