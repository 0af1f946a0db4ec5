// encode8 by arithmetic: a gather of 16 costs more than all of this.
#pragma once

namespace peftk::PEFTK_TIER {

struct Table32 {
  __m512i low, high;
  explicit Table32(const void* p) : low(_mm512_load_si512(p)), high(_mm512_load_si512((const char*)p + 64)) {}
  __m512i operator[](__m512i index) const { return _mm512_permutex2var_epi32(low, index, high); }  // reads bits 4:0
};

struct Decades {
  Table32 border, lower;
  __m512 factor, offset;

  explicit Decades(const Decades8& d)
      : border(d.border), lower(d.lower), factor(_mm512_load_ps(d.factor)), offset(_mm512_load_ps(d.offset)) {}
};

// The code of x, or the one below it, less the code of zero: a negative x's steps are rounded away from zero.
inline __m512i steps8(__m512 x, const Decades& decades) {
  constexpr int kLargestMagnitude = 0xb;
  const __m512 y = _mm512_range_ps(x, _mm512_set1_ps(0x1p-23f), kLargestMagnitude);
  const __m512i binade = _mm512_srli_epi32(_mm512_castps_si512(y), 23);
  const __mmask16 upper = _mm512_cmp_ps_mask(y, _mm512_castsi512_ps(decades.border[binade]), _CMP_GT_OQ);
  const __m512i lower = decades.lower[binade];
  const __m512i at = _mm512_mask_add_epi32(lower, upper, lower, _mm512_set1_epi32(1));
  const __m512 steps = _mm512_fmadd_ps(y, _mm512_permutexvar_ps(at, decades.factor), _mm512_permutexvar_ps(at, decades.offset));
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  const __m512i with_sign = _mm512_ternarylogic_epi32(sign, _mm512_castps_si512(x), _mm512_castps_si512(steps), 0xca);
  return _mm512_cvt_roundps_epi32(_mm512_castsi512_ps(with_sign), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

// Sums of four times 16 steps and the code of zero, as bytes from 0 to 255: dword j of quarter q is dword q of quarter j of the
// codes in their order, for vpack works in quarters.
inline __m512i turned_codes8(const __m512i (&steps)[4], bool is_signed) {
  const __m512i low = _mm512_packs_epi32(steps[0], steps[1]), high = _mm512_packs_epi32(steps[2], steps[3]);
  if (!is_signed) return _mm512_packus_epi16(low, high);
  const __m512i from_128 = _mm512_xor_si512(_mm512_packs_epi16(low, high), _mm512_set1_epi8(static_cast<char>(0x80)));
  return _mm512_subs_epu8(from_128, _mm512_set1_epi8(1));
}

inline __mmask64 joined(const __mmask16 (&part)[4]) {
  return _mm512_kunpackd(_mm512_kunpackw(part[3], part[2]), _mm512_kunpackw(part[1], part[0]));
}

inline void encode8(const Nearest8& nearest, const F32 (&x)[kGroupVectors8], std::uint8_t* codes) {
  const Decades decades(nearest.decade);
  __m512i steps[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) steps[i] = steps8(x[i].v, decades);
  const __m512i turned_code = turned_codes8(steps, nearest.code->zero != 0), code = turned(turned_code);
  F32 threshold[4];
#ifdef PEFTK_HAS_LOOKUP_64
  lookup256_turned(nearest.threshold_byte, turned_code, threshold);
#else
  alignas(64) std::uint8_t index[kGroup8];
  _mm512_store_si512(index, code);
  for (int i = 0; i < 4; i++) threshold[i] = lookup256(nearest.code->threshold, index + i * kLanes);
#endif
  __mmask16 above[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) above[i] = _mm512_cmp_ps_mask(x[i].v, threshold[i].v, _CMP_GT_OQ);
  _mm512_storeu_si512(codes, _mm512_mask_add_epi8(code, joined(above), code, _mm512_set1_epi8(1)));
}

}  // namespace peftk::PEFTK_TIER
