// Words for the dynamic 8-bit codes, kGroup8 of them at a time: a length that divides every block of an optimizer's state.
//
//   decode8(code, codes, x)      x = values of the codes
//   encode8(nearest, x, codes)   codes nearest to x in [-1, 1], the lower one on a tie; 0 for NaN
#pragma once
#include "cpu/simd.h"
#include "format/nearest8.h"

namespace peftk::PEFTK_TIER {

inline constexpr int kGroup8 = 64;
inline constexpr int kGroupVectors8 = kGroup8 / kLanes;

inline void decode8(const Code8& code, const std::uint8_t* codes, F32 (&x)[kGroupVectors8]) {
#ifdef PEFTK_HAS_LOOKUP_64
  lookup256_64(code.byte, codes, x);
#else
  for (int i = 0; i < kGroupVectors8; i++) x[i] = lookup256(code.value, codes + i * kLanes);
#endif
}

}  // namespace peftk::PEFTK_TIER

#if defined(PEFTK_TIER_IS_AVX512) || defined(PEFTK_TIER_IS_AVX512_BF16)
#include "cpu/code8_avx512.h"
#elif defined(PEFTK_TIER_IS_AVX2)
#include "cpu/code8_avx2.h"
#else
#include "cpu/code8_scalar.h"
#endif
