// The vocabulary of simd.h on AVX-512 (F, BW, VL, DQ): sixteen lanes.
#pragma once
#include <immintrin.h>

namespace peftk::PEFTK_TIER {

inline constexpr int kLanes = 16;

struct F32 {
  __m512 v;
};
struct U32 {
  __m512i v;
};

inline F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }

inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F32 load(const Bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline F32 load(const F16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }

// vcvtneps2bf16 would flush denormals, so the rounding is done on the bits; a NaN becomes the quiet one, as in torch.
inline __m256i to_bf16(F32 x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}
inline __m256i to_f16(F32 x) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
inline void store(Bf16* p, F32 x) { _mm256_storeu_si256((__m256i*)p, to_bf16(x)); }
inline void store(F16* p, F32 x) { _mm256_storeu_si256((__m256i*)p, to_f16(x)); }
inline void stream(float* p, F32 x) { _mm512_stream_ps(p, x.v); }
inline void stream(Bf16* p, F32 x) { _mm256_stream_si256((__m256i*)p, to_bf16(x)); }
inline void stream(F16* p, F32 x) { _mm256_stream_si256((__m256i*)p, to_f16(x)); }
inline void stream_fence() { _mm_sfence(); }

inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 square_root(F32 x) { return {_mm512_sqrt_ps(x.v)}; }
inline F32 sign(F32 x) {
  const __mmask16 not_zero = _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_NEQ_OQ);
  const __m512 one = _mm512_or_ps(_mm512_and_ps(x.v, _mm512_set1_ps(-0.0f)), _mm512_set1_ps(1.0f));
  return {_mm512_mask_mov_ps(x.v, not_zero, one)};
}
inline F32 multiply_add(F32 a, F32 b, F32 sum) { return {_mm512_fmadd_ps(a.v, b.v, sum.v)}; }
inline float reduce_sum(F32 x) { return _mm512_reduce_add_ps(x.v); }

inline U32 zero_bits() { return {_mm512_setzero_si512()}; }
inline U32 max_magnitude_bits(U32 so_far, F32 x) {
  return {_mm512_max_epu32(so_far.v, _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff)))};
}
inline std::uint32_t reduce_max(U32 x) { return _mm512_reduce_max_epu32(x.v); }

struct Table16 {
  __m512 v;
};
inline Table16 load_table16(const float* value) { return {_mm512_loadu_ps(value)}; }
inline F32 lookup(Table16 table, U32 index) { return {_mm512_permutexvar_ps(index.v, table.v)}; }  // reads bits 3:0
inline U32 lookup_bits(const std::uint32_t* table, U32 index) {
  return {_mm512_permutexvar_epi32(index.v, _mm512_loadu_si512(table))};
}

struct Thresholds16 {
  __m512 v;
};
inline Thresholds16 load_thresholds16(const float* value) { return {_mm512_loadu_ps(value)}; }
// Binary search in a register: 4 permutes and compares where the plain sum of compares takes 15.
inline U32 rank16(Thresholds16 thresholds, F32 x) {
  __m512i rank = _mm512_setzero_si512();
  for (int step = 8; step; step >>= 1) {
    const __m512i probe = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
    const __mmask16 above = _mm512_cmp_ps_mask(x.v, _mm512_permutexvar_ps(probe, thresholds.v), _CMP_GT_OQ);
    rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
  }
  return {rank};
}

// One byte in each 64-bit lane: its high nibble belongs to the even dword, its low nibble to the odd one. Bits above 3:0 stay.
inline U32 nibbles(const std::uint8_t* packed) {
#ifdef PEFTK_TIER_IS_AVX512_BF16  // VBMI: all 8 bytes in each lane, and in each dword the 8 bits from its nibble on
  const __m512i first_bit = _mm512_setr_epi64(0x0000000000000004, 0x000000080000000c, 0x0000001000000014, 0x000000180000001c,
                                              0x0000002000000024, 0x000000280000002c, 0x0000003000000034, 0x000000380000003c);
  long long eight;
  std::memcpy(&eight, packed, 8);
  return {_mm512_multishift_epi64_epi8(first_bit, _mm512_set1_epi64(eight))};
#endif
  const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)packed));
  return {_mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32))};
}
inline void pack_nibbles(std::uint8_t* packed, U32 code) {
  const __m512i bytes = _mm512_or_si512(_mm512_slli_epi64(code.v, 4), _mm512_srli_epi64(code.v, 32));
  _mm_storel_epi64((__m128i*)packed, _mm512_cvtepi64_epi8(bytes));
}
inline void store_bytes(std::uint8_t* out, U32 x) { _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(x.v)); }
// Eight permutes of 32 entries each and a tree of blends by bits 7:5; a gather of 16 costs three times as much on Zen 4.
[[gnu::always_inline]] inline F32 lookup256(const float* table, const std::uint8_t* index) {
  const __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)index));
  __m512 part[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    part[i] = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32 * i), at, _mm512_loadu_ps(table + 32 * i + 16));
#pragma GCC unroll 3
  for (int half = 1; half < 8; half *= 2) {
    const __mmask16 upper = _mm512_test_epi32_mask(at, _mm512_set1_epi32(32 * half));
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2 * half) part[i] = _mm512_mask_mov_ps(part[i], upper, part[i + half]);
  }
  return {part[0]};
}
inline U32 words(std::uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
inline U32 operator^(U32 a, U32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
struct WideProduct {
  U32 high, low;
};
inline WideProduct multiply_wide(U32 x, std::uint32_t factor) {
  const __m512i f = words(factor).v;
  const __m512i even = _mm512_mul_epu32(x.v, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(x.v, 32), f);
  return {{_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd)},
          {_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32))}};
}
inline std::uint32_t not_below(U32 x, std::uint32_t limit) { return _mm512_cmpge_epu32_mask(x.v, words(limit).v); }
inline F32 where(std::uint32_t bits, F32 x) { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x.v)}; }
// Packing and unpacking work in 128-bit quarters: 64 bytes with dword q of quarter j as dword j of quarter q, and back.
inline __m512i turned(__m512i bytes) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}
#ifdef PEFTK_TIER_IS_AVX512_BF16
// 64 at once by VBMI, out[j] = table[index[16 j]] and on: each byte of the values is a table of its own, and vpermi2b looks 64
// up in half of one. 9 operations for 16 where lookup256 takes 31.
inline void lookup256_turned(const std::uint8_t (&bytes)[4][256], __m512i at, F32 (&out)[4]) {
  const __mmask64 upper = _mm512_movepi8_mask(at);
  __m512i byte[4];
#pragma GCC unroll 4
  for (int b = 0; b < 4; b++) {
    const auto quarter = [&](int i) { return _mm512_load_si512(bytes[b] + 64 * i); };
    const __m512i low = _mm512_permutex2var_epi8(quarter(0), at, quarter(1));
    byte[b] = _mm512_mask_mov_epi8(low, upper, _mm512_permutex2var_epi8(quarter(2), at, quarter(3)));
  }
  const __m512i low01 = _mm512_unpacklo_epi8(byte[0], byte[1]), low23 = _mm512_unpacklo_epi8(byte[2], byte[3]);
  const __m512i high01 = _mm512_unpackhi_epi8(byte[0], byte[1]), high23 = _mm512_unpackhi_epi8(byte[2], byte[3]);
  out[0].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
  out[1].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
  out[2].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
  out[3].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
}
inline void lookup256_64(const std::uint8_t (&bytes)[4][256], const std::uint8_t* index, F32 (&out)[4]) {
  lookup256_turned(bytes, turned(_mm512_loadu_si512(index)), out);
}
#endif
inline U32 shift_right(U32 x, int bits) { return {_mm512_srli_epi32(x.v, static_cast<unsigned>(bits))}; }

// 32 elements of 4 bits to bf16: even elements in one vector, odd ones in another, so that nibbles cost two operations.
inline constexpr int kWideCodes = 32;

inline __m512i decode_wide(Table16 table, const std::uint8_t* packed, F32 scale) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)packed));
  const F32 zero = broadcast(0.0f);
  const F32 even = lookup(table, {_mm512_srli_epi32(bytes, 4)}) * scale + zero, odd = lookup(table, {bytes}) * scale + zero;
#ifdef PEFTK_TIER_IS_AVX512_BF16
  alignas(64) static constexpr std::uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v));
#else
  const auto rounded = [](F32 x) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
  };
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(rounded(even), 16), rounded(odd));
#endif
}
inline void store_wide(Bf16* p, __m512i x) { _mm512_storeu_si512(p, x); }
inline void stream_wide(Bf16* p, __m512i x) { _mm512_stream_si512((__m512i*)p, x); }

}  // namespace peftk::PEFTK_TIER
