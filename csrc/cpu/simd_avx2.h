// The vocabulary of simd.h on AVX2 with FMA and F16C: eight lanes.
#pragma once
#include <immintrin.h>

namespace peftk::PEFTK_TIER {

inline constexpr int kLanes = 8;

struct F32 {
  __m256 v;
};
struct U32 {
  __m256i v;
};

inline F32 broadcast(float x) { return {_mm256_set1_ps(x)}; }

inline F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline F32 load(const Bf16* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
}
inline F32 load(const F16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }

inline __m128i to_bf16(F32 x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
inline __m128i to_f16(F32 x) { return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }
inline void store(Bf16* p, F32 x) { _mm_storeu_si128((__m128i*)p, to_bf16(x)); }
inline void store(F16* p, F32 x) { _mm_storeu_si128((__m128i*)p, to_f16(x)); }
inline void stream(float* p, F32 x) { _mm256_stream_ps(p, x.v); }
inline void stream(Bf16* p, F32 x) { _mm_stream_si128((__m128i*)p, to_bf16(x)); }
inline void stream(F16* p, F32 x) { _mm_stream_si128((__m128i*)p, to_f16(x)); }
inline void stream_fence() { _mm_sfence(); }

inline F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32 square_root(F32 x) { return {_mm256_sqrt_ps(x.v)}; }
inline F32 sign(F32 x) {
  const __m256 zero = _mm256_setzero_ps(), not_zero = _mm256_cmp_ps(x.v, zero, _CMP_NEQ_OQ);
  const __m256 one = _mm256_or_ps(_mm256_and_ps(x.v, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1.0f));
  return {_mm256_blendv_ps(x.v, one, not_zero)};
}
inline F32 multiply_add(F32 a, F32 b, F32 sum) { return {_mm256_fmadd_ps(a.v, b.v, sum.v)}; }
inline float reduce_sum(F32 x) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

inline U32 zero_bits() { return {_mm256_setzero_si256()}; }
inline U32 max_magnitude_bits(U32 so_far, F32 x) {
  return {_mm256_max_epu32(so_far.v, _mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7fffffff)))};
}
inline std::uint32_t reduce_max(U32 x) {
  __m128i best = _mm_max_epu32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
  best = _mm_max_epu32(best, _mm_shuffle_epi32(best, 0x4e));
  best = _mm_max_epu32(best, _mm_shuffle_epi32(best, 0xb1));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(best));
}

struct Table16 {
  __m256 low, high;
};
inline Table16 load_table16(const float* value) { return {_mm256_loadu_ps(value), _mm256_loadu_ps(value + 8)}; }
// vpermps reads bits 2:0; bit 3, shifted into the sign, chooses the half.
inline F32 lookup(Table16 table, U32 index) {
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index.v, 28));
  return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index.v), _mm256_permutevar8x32_ps(table.high, index.v), upper)};
}
inline U32 lookup_bits(const std::uint32_t* table, U32 index) {
  return {_mm256_castps_si256(lookup(load_table16(reinterpret_cast<const float*>(table)), index).v)};
}

struct Thresholds16 {
  const float* value;
};
inline Thresholds16 load_thresholds16(const float* value) { return {value}; }
inline U32 rank16(Thresholds16 thresholds, F32 x) {
  __m256i rank = _mm256_setzero_si256();
  for (int t = 0; t < 15; t++) {
    const __m256 above = _mm256_cmp_ps(x.v, _mm256_broadcast_ss(thresholds.value + t), _CMP_GT_OQ);
    rank = _mm256_sub_epi32(rank, _mm256_castps_si256(above));
  }
  return {rank};
}

inline U32 nibbles(const std::uint8_t* packed) {
  std::int32_t four;
  std::memcpy(&four, packed, 4);
  const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  return {_mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32))};
}
inline void pack_nibbles(std::uint8_t* packed, U32 code) {
  const __m256i bytes = _mm256_or_si256(_mm256_slli_epi64(code.v, 4), _mm256_srli_epi64(code.v, 32));
  const __m256i gather = _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                          0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i pairs = _mm256_shuffle_epi8(bytes, gather);
  const std::uint32_t low = static_cast<std::uint32_t>(_mm256_extract_epi16(pairs, 0));
  const std::uint32_t high = static_cast<std::uint32_t>(_mm256_extract_epi16(pairs, 8));
  const std::uint32_t four = low | high << 16;
  std::memcpy(packed, &four, 4);
}
inline void store_bytes(std::uint8_t* out, U32 x) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
  _mm_storel_epi64((__m128i*)out, _mm_packus_epi16(words, words));
}
inline F32 lookup256(const float* table, const std::uint8_t* index) {
  return {_mm256_i32gather_ps(table, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)index)), 4)};
}
inline U32 words(std::uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
inline U32 operator^(U32 a, U32 b) { return {_mm256_xor_si256(a.v, b.v)}; }
struct WideProduct {
  U32 high, low;
};
inline WideProduct multiply_wide(U32 x, std::uint32_t factor) {
  const __m256i f = words(factor).v;
  const __m256i even = _mm256_mul_epu32(x.v, f), odd = _mm256_mul_epu32(_mm256_srli_epi64(x.v, 32), f);
  return {{_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa)},
          {_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)}};
}
inline std::uint32_t not_below(U32 x, std::uint32_t limit) {
  const __m256i at_least = _mm256_cmpeq_epi32(_mm256_max_epu32(x.v, words(limit).v), x.v);
  return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(at_least)));
}
inline F32 where(std::uint32_t bits, F32 x) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bit);
  return {_mm256_and_ps(x.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bit)))};
}
inline U32 shift_right(U32 x, int bits) { return {_mm256_srli_epi32(x.v, bits)}; }

}  // namespace peftk::PEFTK_TIER
