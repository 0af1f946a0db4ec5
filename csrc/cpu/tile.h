// The vocabulary of matrix products: a tile of kTileRows x (V * kLanes) fp32 sums that stays in registers, and the cells that
// feed it. A cell is 4 bytes: one fp32 factor, or two bf16 factors that are neighbours along the depth. Knows no op.
//
//   left    [groups of kTileRows rows][steps][kTileRows] cells
//   panel   [steps][V * kLanes] cells
//   multiply_tile<Cell, V>(left, panel, steps, add, tile)   tile[kTileRows][V * kLanes] = (add ? itself : 0) + left * panel
//   store_sum(T*, F32)                                 store of simd.h, but a bf16 denormal may become zero
//   transpose(U32[kLanes])                             a square of cells, in place
#pragma once
#include <cstdint>
#include <type_traits>

#include "cpu/simd.h"

namespace peftk::PEFTK_TIER {

struct FloatCell {
  static constexpr int kDepth = 1;
};
struct PairCell {
  static constexpr int kDepth = 2;
};

#ifdef PEFTK_TIER_IS_AVX512_BF16
template <class T>
using CellOf = std::conditional_t<std::is_same_v<T, Bf16>, PairCell, FloatCell>;
#else
template <class T>
using CellOf = FloatCell;  // no dot product of bf16 pairs: 16-bit factors are multiplied in fp32
#endif

template <class Cell>
constexpr std::int64_t steps_of(std::int64_t depth) {
  return (depth + Cell::kDepth - 1) / Cell::kDepth;
}

}  // namespace peftk::PEFTK_TIER

#if defined(PEFTK_TIER_IS_AVX512) || defined(PEFTK_TIER_IS_AVX512_BF16)
#include "cpu/tile_avx512.h"
#elif defined(PEFTK_TIER_IS_AVX2)
#include "cpu/tile_avx2.h"
#else
#include "cpu/tile_scalar.h"
#endif

namespace peftk::PEFTK_TIER {

#ifndef PEFTK_TIER_IS_AVX512_BF16
template <class T>
void store_sum(T* p, F32 x) {
  store(p, x);
}
#endif

inline constexpr int kTileCols = kTileVectors * kLanes;

// Calls body(std::integral_constant<int, V>) with V = vectors, 1 .. kTileVectors.
template <class Body>
void with_vectors(int vectors, Body&& body) {
  static_assert(kTileVectors <= 3);
  if (vectors == 1) return body(std::integral_constant<int, 1>{});
  if constexpr (kTileVectors >= 2)
    if (vectors == 2) return body(std::integral_constant<int, 2>{});
  if constexpr (kTileVectors >= 3)
    if (vectors == 3) return body(std::integral_constant<int, 3>{});
}

}  // namespace peftk::PEFTK_TIER
