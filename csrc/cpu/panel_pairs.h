// Cells from bf16 rows as they lie: neighbours along the depth are a cell already (along, left), and two rows are woven
// (across). Half of what reading fp32 and rounding it again costs. panel.h sends whoever can here. Knows no op.
//   kLiesInCells<Cell, Rows>                     whether Rows can come here, where
//   dense_rows(rows)                             has scale 1; the elements
//   pair_words(rows, row, position, count)       bit i: element position + i is there, the others are zeros
#pragma once
#include "cpu/rows.h"
#include "cpu/tile.h"

namespace peftk::PEFTK_TIER {

// What a panel covers: columns [col, col + cols) in `vectors` vectors, depth [depth, depth + count).
struct Span {
  std::int64_t col;
  int cols, vectors;
  std::int64_t depth, count;
};

template <class Cell, class Rows>
inline constexpr bool kLiesInCells = false;

#ifdef PEFTK_TIER_IS_AVX512_BF16
template <>
inline constexpr bool kLiesInCells<PairCell, DenseRows<Bf16>> = true;
inline const DenseRows<Bf16>& dense_rows(const DenseRows<Bf16>& rows) { return rows; }

inline constexpr int kPairReach = 2 * kLanes;  // elements of a row in one register

inline __mmask32 first_words(std::int64_t count) {
  return count >= kPairReach ? ~__mmask32{0} : (__mmask32{1} << (count < 0 ? 0 : count)) - 1;
}

inline __mmask32 pair_words(const DenseRows<Bf16>&, std::int64_t, std::int64_t, std::int64_t count) { return first_words(count); }

// square[i] = 16 cells of row first + i, zeros where there is no row and beyond `count` elements.
template <class Rows>
void load_square(const Rows& rows, std::int64_t first, std::int64_t used, std::int64_t position, std::int64_t count,
                 U32 (&square)[kLanes]) {
  const DenseRows<Bf16>& dense = dense_rows(rows);
  const Bf16* p = dense.data + first * dense.stride + position;
  if (std::is_same_v<Rows, DenseRows<Bf16>> && used >= kLanes && count >= kPairReach) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) square[i].v = _mm512_loadu_si512(p + i * dense.stride);
    return;
  }
  for (int i = 0; i < kLanes; i++)
    square[i].v =
        i < used ? _mm512_maskz_loadu_epi16(pair_words(rows, first + i, position, count), p + i * dense.stride) : zero_bits().v;
}

template <class Rows>
void pairs_along(const Rows& rows, const Span& span, std::uint32_t* panel) {
  const std::int64_t steps = steps_of<PairCell>(span.count), line = span.vectors * kLanes;
  for (int v = 0; v < span.vectors; v++)
    for (std::int64_t d = 0; d < span.count; d += kPairReach) {
      std::uint32_t* const out = panel + d / 2 * line + v * kLanes;
      U32 square[kLanes];
      load_square(rows, span.col + v * kLanes, lanes_left(span.cols, v), span.depth + d, span.count - d, square);
      transpose(square);
      if (steps - d / 2 >= kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) store_cells(out + i * line, square[i]);
      } else {
        for (int i = 0; d / 2 + i < steps; i++) store_cells(out + i * line, square[i]);
      }
    }
}

// Rows that pairs_across asks the second-level cache for ahead of time. A panel takes 96 bytes of each row, which no hardware
// prefetcher sees coming: 2.9 ms instead of 4.9 for all panels of 4096 x 4096, Zen 4. The first-level cache can't hold them, rows
// of 8 KB meet in the same 8 lines of it.
inline constexpr std::int64_t kRowsAhead = 32;

inline void ask_for_row(const Bf16* row, std::int64_t elements) {
  for (std::int64_t i = 0; i < elements; i += kPairReach) _mm_prefetch(reinterpret_cast<const char*>(row + i), _MM_HINT_T1);
}

template <int V, class Rows>
void pairs_across(const Rows& source, const Span& span, std::uint32_t* panel) {
  const DenseRows<Bf16>& rows = dense_rows(source);
  const auto weave = [](__m256i low, __m256i high) {
    return U32{_mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16))};
  };
  const Bf16* p = rows.data + span.depth * rows.stride + span.col;
  const bool masked = !std::is_same_v<Rows, DenseRows<Bf16>>;
  const std::int64_t whole = span.cols == V * kLanes && !masked ? span.count / 2 * 2 : 0;
  for (std::int64_t d = 0; d < whole; d += 2, p += 2 * rows.stride, panel += V * kLanes) {
    if (d + kRowsAhead + 2 <= whole) {
      ask_for_row(p + kRowsAhead * rows.stride, V * kLanes);
      ask_for_row(p + (kRowsAhead + 1) * rows.stride, V * kLanes);
    }
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) {
      const auto* const low = reinterpret_cast<const __m256i*>(p + v * kLanes);
      const auto* const high = reinterpret_cast<const __m256i*>(p + rows.stride + v * kLanes);
      store_cells(panel + v * kLanes, weave(_mm256_loadu_si256(low), _mm256_loadu_si256(high)));
    }
  }
  for (std::int64_t d = whole; d < span.count; d += 2, p += 2 * rows.stride, panel += V * kLanes)
    for (int v = 0; v < V; v++) {
      const auto words = [&](std::int64_t row) {
        return static_cast<__mmask16>(pair_words(source, span.depth + row, span.col + v * kLanes, lanes_left(span.cols, v)));
      };
      const __m256i low = _mm256_maskz_loadu_epi16(words(d), p + v * kLanes);
      const __m256i high =
          d + 1 < span.count ? _mm256_maskz_loadu_epi16(words(d + 1), p + rows.stride + v * kLanes) : _mm256_setzero_si256();
      store_cells(panel + v * kLanes, weave(low, high));
    }
}

template <class Rows>
void pairs_left(const Rows& rows, std::int64_t row, std::int64_t count, std::int64_t depth, std::uint32_t* out) {
  constexpr int R = TileOf<PairCell>::kRows;
  const std::int64_t used = count < R ? count : R;
  for (std::int64_t d = 0; d < depth; d += kPairReach) {
    U32 square[kLanes];
    if constexpr (TileOf<PairCell>::kSquares) {
      for (int half = 0; half < R; half += kLanes) {
        load_square(rows, row + half, used - half, d, depth - d, square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++, out += kLanes) store_cells(out, square[i]);
      }
      continue;
    }
    static_assert(TileOf<PairCell>::kSquares || R == kLanes / 2);
    load_square(rows, row, used, d, depth - d, square);
    transpose(square);
    const std::int64_t steps = steps_of<PairCell>(depth - d);
    for (int i = 0; i < kLanes && i < steps; i++, out += R)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(square[i].v));
  }
}
#else
template <int V, class Rows>
void pairs_across(const Rows& rows, const Span& span, std::uint32_t* panel);  // named in panel.h, never called
#endif

}  // namespace peftk::PEFTK_TIER
