// Rows of x in 8 bits: each run of kRun neighbours along k has a scale of its own, scale = max|x| / 127, and
// q = x / scale rounded to nearest even. Knows no op.
//
// A run whose max|x| lies below kInt8Floor counts as zero: scale 0. A run with Inf or NaN has the scale NaN and q = 0.
#pragma once
#include "cpu/matrix4.h"

namespace peftk::PEFTK_TIER {

inline constexpr float kInt8Max = 127.0f;
inline constexpr float kInt8Floor = 0x1p-100f;  // keeps scales, and products of scales, out of the denormals

// To nearest even, |x| < 2^22: the sum has no bits left below 1, and its low byte is the integer.
inline std::int8_t nearest_int8(float x) {
  const float sum = x + 0x1.8p23f;
  std::int32_t bits;
  std::memcpy(&bits, &sum, 4);
  return static_cast<std::int8_t>(bits & 0xff);
}

// A 4-bit code's table in 8 bits, in units of 1 / scale.
struct Table8 {
  std::int8_t value[16];
  float scale;

  explicit Table8(const Code4& code) : scale(code.int8_scale) {
    for (int i = 0; i < 16; i++) value[i] = nearest_int8(scale * code.value[i]);
  }
};

// q[0 .. kRun) of x[0 .. count), then zeros; returns the scale.
template <class T>
float quantize_run(const T* x, int count, std::int8_t* q) {
  constexpr int kVectors = static_cast<int>(kRun) / kLanes;
  F32 v[kVectors];
  DenseRows<T>{x, 0}.template read<kVectors>(0, 0, count, v);
  U32 most = zero_bits();
  for (const F32& lanes : v) most = max_magnitude_bits(most, lanes);
  const std::uint32_t bits = reduce_max(most);
  float max;
  std::memcpy(&max, &bits, 4);
  const bool is_finite = bits < 0x7f800000u;
  if (!is_finite || max < kInt8Floor) {
    std::memset(q, 0, kRun);
    return is_finite ? 0.0f : __builtin_nanf("");
  }
  const float scale = max / kInt8Max;
  float values[kRun];
  for (int i = 0; i < kVectors; i++) store(values + i * kLanes, v[i]);
  for (int i = 0; i < kRun; i++) q[i] = nearest_int8(values[i] / scale);
  return scale;
}

}  // namespace peftk::PEFTK_TIER
