// The vocabulary of element-wise kernels: vectors of kLanes fp32 or uint32, one implementation per tier. Knows no op.
//
//   F32, U32                       a vector each
//   load(T*), store(T*, F32)       fp32 | bf16 | fp16 in memory, fp32 in registers; rounding to nearest even, denormals kept
//   stream(T*, F32)                store past the cache; aligned to the vector's bytes
//   + - * /, square_root           each rounded on its own
//   sign                           1 above zero, -1 below; zeros and NaN as they are
//   multiply_add, reduce_sum       a * b + sum, in one rounding where the tier has FMA; the sum of the lanes
//   Table16 / lookup               16 fp32 by the low four bits of each lane
//   rank16                         number of a Thresholds16's 15 ascending thresholds that are strictly below x; 0 for NaN
//   lookup256                      256 fp32 by kLanes bytes
//   nibbles, pack_nibbles          kLanes/2 bytes <-> kLanes codes; even elements in the high nibble
//   shift_right(U32, bits)         of each lane
//   words(uint32), operator^         the same word in all lanes; bit by bit
//   multiply_wide(U32, uint32)       64-bit products of the lanes: {high words, low words}
//   not_below(U32, uint32)           bit i: lane i is at least as large
//   where(bits, F32)               lane i where bit i is set, else 0; other bits don't matter
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "format/dtype.h"

#if defined(PEFTK_TIER_IS_AVX512) || defined(PEFTK_TIER_IS_AVX512_BF16)
#include "cpu/simd_avx512.h"
#define PEFTK_HAS_WIDE_CODES 1  // decode_wide: 32 codes to bf16 at once
#ifdef PEFTK_TIER_IS_AVX512_BF16
#define PEFTK_HAS_LOOKUP_64 1  // lookup256_64: 64 bytes looked up at once
#endif
#elif defined(PEFTK_TIER_IS_AVX2)
#include "cpu/simd_avx2.h"
#else
#include "cpu/simd_scalar.h"
#endif
