// The vocabulary of simd.h in plain C++: eight lanes that a compiler may or may not vectorise. Runs everywhere.
#pragma once

namespace peftk::PEFTK_TIER {

inline constexpr int kLanes = 8;

struct F32 {
  float lane[kLanes];
};
struct U32 {
  std::uint32_t lane[kLanes];
};

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }
inline float to_float(F16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The exponent is moved by a multiplication, which makes denormals normal on the way.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, Bf16* out) {
  const std::uint32_t bits = bits_of(x);
  out->bits =
      static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void from_float(float x, F16* out) {
  const std::uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u)
    half = 0x7e00u;
  else if (magnitude >= 0x477ff000u)  // 65520 and above round to infinity
    half = 0x7c00u;
  else if (magnitude < 0x38800000u)  // below 2^-14: adding 0.5 leaves the result, rounded, in the low bits
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  else
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  out->bits = static_cast<std::uint16_t>(sign | half);
}

inline F32 broadcast(float x) {
  F32 v;
  for (float& lane : v.lane) lane = x;
  return v;
}
template <class T>
inline F32 load(const T* p) {
  F32 v;
  for (int i = 0; i < kLanes; i++) v.lane[i] = to_float(p[i]);
  return v;
}
template <class T>
inline void store(T* p, F32 v) {
  for (int i = 0; i < kLanes; i++) from_float(v.lane[i], p + i);
}
template <class T>
inline void stream(T* p, F32 v) {
  store(p, v);
}
inline void stream_fence() {}

inline F32 operator*(F32 a, F32 b) {
  for (int i = 0; i < kLanes; i++) a.lane[i] *= b.lane[i];
  return a;
}
inline F32 operator+(F32 a, F32 b) {
  for (int i = 0; i < kLanes; i++) a.lane[i] += b.lane[i];
  return a;
}
inline F32 operator-(F32 a, F32 b) {
  for (int i = 0; i < kLanes; i++) a.lane[i] -= b.lane[i];
  return a;
}
inline F32 operator/(F32 a, F32 b) {
  for (int i = 0; i < kLanes; i++) a.lane[i] /= b.lane[i];
  return a;
}
inline F32 square_root(F32 x) {
  for (float& lane : x.lane) lane = __builtin_sqrtf(lane);
  return x;
}
inline F32 sign(F32 x) {
  for (float& lane : x.lane) lane = lane > 0.0f ? 1.0f : lane < 0.0f ? -1.0f : lane;
  return x;
}

inline F32 multiply_add(F32 a, F32 b, F32 sum) { return a * b + sum; }
inline float reduce_sum(F32 v) {
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v.lane[i] += v.lane[i + half];
  return v.lane[0];
}

inline U32 zero_bits() { return U32{}; }
inline U32 max_magnitude_bits(U32 so_far, F32 v) {
  for (int i = 0; i < kLanes; i++) {
    const std::uint32_t bits = bits_of(v.lane[i]) & 0x7fffffffu;
    if (bits > so_far.lane[i]) so_far.lane[i] = bits;
  }
  return so_far;
}
inline std::uint32_t reduce_max(U32 v) {
  std::uint32_t best = 0;
  for (std::uint32_t lane : v.lane) best = lane > best ? lane : best;
  return best;
}

struct Table16 {
  const float* value;
};
inline Table16 load_table16(const float* value) { return {value}; }
inline F32 lookup(Table16 table, U32 index) {
  F32 v;
  for (int i = 0; i < kLanes; i++) v.lane[i] = table.value[index.lane[i] & 15u];
  return v;
}
inline U32 lookup_bits(const std::uint32_t* table, U32 index) {
  for (std::uint32_t& lane : index.lane) lane = table[lane & 15u];
  return index;
}

struct Thresholds16 {
  const float* value;
};
inline Thresholds16 load_thresholds16(const float* value) { return {value}; }
inline U32 rank16(Thresholds16 thresholds, F32 x) {
  U32 rank{};
  for (int t = 0; t < 15; t++)
    for (int i = 0; i < kLanes; i++) rank.lane[i] += x.lane[i] > thresholds.value[t];
  return rank;
}

inline U32 nibbles(const std::uint8_t* packed) {
  U32 code;
  for (int i = 0; i < kLanes / 2; i++) code.lane[2 * i] = packed[i] >> 4, code.lane[2 * i + 1] = packed[i] & 15u;
  return code;
}
inline void pack_nibbles(std::uint8_t* packed, U32 code) {
  for (int i = 0; i < kLanes / 2; i++) packed[i] = static_cast<std::uint8_t>(code.lane[2 * i] << 4 | code.lane[2 * i + 1]);
}
inline void store_bytes(std::uint8_t* out, U32 v) {
  for (int i = 0; i < kLanes; i++) out[i] = static_cast<std::uint8_t>(v.lane[i]);
}
inline F32 lookup256(const float* table, const std::uint8_t* index) {
  F32 v;
  for (int i = 0; i < kLanes; i++) v.lane[i] = table[index[i]];
  return v;
}
inline U32 words(std::uint32_t x) {
  U32 v;
  for (std::uint32_t& lane : v.lane) lane = x;
  return v;
}
inline U32 operator^(U32 a, U32 b) {
  for (int i = 0; i < kLanes; i++) a.lane[i] ^= b.lane[i];
  return a;
}
struct WideProduct {
  U32 high, low;
};
inline WideProduct multiply_wide(U32 x, std::uint32_t factor) {
  WideProduct product;
  for (int i = 0; i < kLanes; i++) {
    const std::uint64_t wide = std::uint64_t{factor} * x.lane[i];
    product.high.lane[i] = static_cast<std::uint32_t>(wide >> 32);
    product.low.lane[i] = static_cast<std::uint32_t>(wide);
  }
  return product;
}
inline std::uint32_t not_below(U32 x, std::uint32_t limit) {
  std::uint32_t bits = 0;
  for (int i = 0; i < kLanes; i++) bits |= static_cast<std::uint32_t>(x.lane[i] >= limit) << i;
  return bits;
}
inline F32 where(std::uint32_t bits, F32 x) {
  for (int i = 0; i < kLanes; i++) x.lane[i] = bits >> i & 1u ? x.lane[i] : 0.0f;
  return x;
}
inline U32 shift_right(U32 x, int bits) {
  for (std::uint32_t& lane : x.lane) lane >>= bits;
  return x;
}

}  // namespace peftk::PEFTK_TIER
