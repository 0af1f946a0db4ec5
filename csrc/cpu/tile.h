// The vocabulary of matrix products: a tile of R x (V * kLanes) fp32 sums that stays in registers, R = TileOf<Cell>::kRows, and
// the cells that feed it. A cell is 4 bytes: one fp32 factor, or two bf16 factors that are neighbours along the depth. Knows no
// op.
//
//   left    [groups of R rows][steps][R] cells; in squares where kSquares: [groups of R rows][steps / kLanes][R][kLanes]
//   panel   [steps][V * kLanes] cells
//   multiply_tile<V>(Cell, left, panel, steps, rows, add, tile, next)   tile[R][V * kLanes] = (add ? itself : 0) + left * panel;
//                                                      sums past `rows` may be anything; `next` will be wanted soon
//   TileRegisters<Cell>                                lives on a thread while it multiplies tiles
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

template <int Rows, int Vectors, bool Squares>
struct TileShape {
  static constexpr int kRows = Rows, kVectors = Vectors, kCols = Vectors * kLanes, kSums = kRows * kCols;
  static constexpr bool kSquares = Squares;
};
template <class Cell>
struct TileOf : TileShape<kTileRows, kTileVectors, false> {};
template <class Cell>
struct TileRegisters {
  TileRegisters() {}
};

}  // namespace peftk::PEFTK_TIER

#ifdef PEFTK_TIER_IS_AMX_BF16
#include "cpu/tile_amx.h"
#endif

namespace peftk::PEFTK_TIER {

// Steps that a depth takes. Where the left side lies in squares they are whole ones, zeros on both sides past the depth.
template <class Cell>
constexpr std::int64_t steps_of(std::int64_t depth) {
  const std::int64_t steps = (depth + Cell::kDepth - 1) / Cell::kDepth;
  return TileOf<Cell>::kSquares ? (steps + kLanes - 1) / kLanes * kLanes : steps;
}

// Where the cell of a row and a step lies in a left side with groups `line` steps apart.
template <class Cell>
constexpr std::int64_t left_index(std::int64_t row, std::int64_t step, std::int64_t line) {
  constexpr int R = TileOf<Cell>::kRows;
  const std::int64_t group = row / R * R * line;
  if (TileOf<Cell>::kSquares) return group + (step / kLanes * R + row % R) * kLanes + step % kLanes;
  return group + step * R + row % R;
}

// Calls body(std::integral_constant<int, V>) with V = vectors, 1 .. TileOf<Cell>::kVectors.
template <class Cell, class Body>
void with_vectors(int vectors, Body&& body) {
  constexpr int kMost = TileOf<Cell>::kVectors;
  static_assert(kMost <= 3);
  if (vectors == 1) return body(std::integral_constant<int, 1>{});
  if constexpr (kMost >= 2)
    if (vectors == 2) return body(std::integral_constant<int, 2>{});
  if constexpr (kMost >= 3)
    if (vectors == 3) return body(std::integral_constant<int, 3>{});
}

}  // namespace peftk::PEFTK_TIER
